"""Models at work without training: weights of any known format as a model that encodes and decodes."""

import os
from collections.abc import Collection
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from causalvae.machine import capability, pick_device
from causalvae.models.build import Model, build
from causalvae.train.precision import Precision, PrecisionName, lower
from causalvae.weights.layouts import Choice
from causalvae.weights.load import Loaded, load_model


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A model on its device, computing as `precision` says. notes: what had to be assumed, for the user."""

    vae: Model
    loaded: Loaded
    device: torch.device
    precision: Precision
    notes: tuple[str, ...]


def open_vae(
    path: Path,
    *,
    prefer: Choice = "ema",
    model_config: Path | None = None,
    device: str = "auto",
    precision: PrecisionName | Literal["auto"] = "auto",
) -> Opened:
    """The model of a file, folder or run, for evaluation: in eval mode, and no parameter wants a gradient.

    prefer, model_config: as `load_model` has them. device: as `--device`. precision: auto is bf16 on a GPU
    that has it, else fp32; fewer bits are those of convolutions (level O1), weights stay fp32.
    """
    loaded = load_model(path, prefer=prefer, model_config=model_config)
    vae = build(loaded.config)
    vae.load_state_dict(vae.state_dict() | loaded.tensors, strict=True)
    place = pick_device(device)
    wanted: Collection[str] = {precision} - {"auto", "fp32"}
    if precision == "auto" and place.startswith("cuda"):
        wanted = ("bf16",)
    able = capability(place, os.environ, names=sorted(wanted))
    numbers = Precision.of(precision, "O1", device=place, capability=able)
    vae = vae.float().to(place).eval().requires_grad_(False)
    lower(vae, numbers)
    notes = (*loaded.notes, *numbers.warnings)
    return Opened(vae=vae, loaded=loaded, device=torch.device(place), precision=numbers, notes=notes)


def plain_arithmetic() -> AbstractContextManager[None]:
    """cuDNN in fp32 proper, not TF32, by kernels that give the same bits every time. Nothing on a CPU."""
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
