"""The networks of a run and their optimisers: their weights, numbers, memory and average."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from causalvae import rng
from causalvae.config import TrainSettings, warmup_steps
from causalvae.losses import LossPlan, build_critic
from causalvae.machine import Machine, available_bytes, hand_back_memory, home
from causalvae.models.build import build
from causalvae.models.causalvae import CausalVAE, set_recompute
from causalvae.models.presets import PRESETS, CausalVAEConfig
from causalvae.rundir import MANIFEST, Checkpoint
from causalvae.train.convolutions import (
    Checked,
    ConvShape,
    check_convolutions,
    kernels,
    shapes_of_run,
)
from causalvae.train.optim import build_optimizer
from causalvae.train.parts import clip_plan
from causalvae.train.plan import StepPlan, plan_step
from causalvae.train.precision import Precision, first_loss_scale, lower
from causalvae.train.predict import blueprint
from causalvae.train.stability import LevelOff
from causalvae.train.state import TrainState, read_counters
from causalvae.weights.read import Origin, find_weights, read_header, read_model


@dataclass(frozen=True)
class Built:
    """What a run is made of. notes: lines for the log; warnings: what to warn of."""

    state: TrainState
    origin: Origin | None
    plan: StepPlan
    notes: list[str]
    warnings: list[str]


def build_state(
    settings: TrainSettings,
    device: torch.device,
    *,
    start: Checkpoint | None,
    precision: Precision,
    loss: LossPlan,
    scaled: bool,
) -> Built:
    """Networks, averages and optimisers, from the start or as the checkpoint has them.

    scaled: a loss scale was asked for.
    """
    vae, origin = _autoencoder(settings, start=start)
    vae, critic = vae.to(device), _critic(settings, device)
    lay_out(vae)
    names = _learning(vae, settings.train_parts)
    kept = read_counters(start.path) if start is not None else {}
    plan = _step_plan(settings, vae, critic, precision=precision, loss=loss, kept=kept)
    if plan.tight:
        hand_back_memory()
    set_recompute(vae, on=plan.recompute)
    ema = {name: p.detach().clone() for name, p in vae.named_parameters()} if settings.use_ema else {}
    marks = {"parts": plan.parts, "recompute": plan.recompute, "batches": _batch_shapes(settings)}
    checked = _check_convolutions(settings, vae, critic, precision=precision, parts=plan.parts, kept=kept)
    state = _trained(settings, vae, critic, ema=ema, names=names, precision=precision, keep=checked.keep)
    state.kept = {**marks, "kernels": checked.kernels, "in_fp32": sorted(checked.keep)}
    if settings.mode != 2:
        how = {"value": settings.init_loss_scale, "window": settings.loss_scale_window, "given": scaled}
        state.scale = first_loss_scale(precision, **how)
        state.critic_scale = first_loss_scale(precision, **how) if critic is not None else None
    if start is not None:
        state.load(start.path)
    said = [line for line in (plan.sentence(), checked.message) if line]
    warnings = list(checked.notes)
    if scaled and precision.level == "O0":
        warnings.append(
            "--init_loss_scale has no effect: the run computes in fp32, which needs no loss scale"
        )
    return Built(state, origin, plan, said, warnings)


def _autoencoder(settings: TrainSettings, *, start: Checkpoint | None) -> tuple[CausalVAE, Origin | None]:
    """The model with its first weights, and whose they are; those of a checkpoint are read with its state."""
    config, tensors, origin = PRESETS[settings.model], None, None
    if start is not None:
        config, origin = _model_of(start)
    elif settings.load_from_checkpoint is not None:
        config, tensors, origin = read_model(Path(settings.load_from_checkpoint))
    vae = build(config, seed=settings.seed)
    if tensors is not None:
        vae.load_state_dict(tensors, strict=True)
    return vae, origin


def _trained(
    settings: TrainSettings,
    vae: CausalVAE,
    critic: nn.Module | None,
    *,
    ema: dict[str, Tensor],
    names: set[str],
    precision: Precision,
    keep: frozenset[str],
) -> TrainState:
    """Networks in their numbers, with their optimisers. names: parameters of the autoencoder that learn."""
    logvar = nn.Parameter(
        torch.tensor(settings.logvar_init, device=vae.last_layer.get_parameter("weight").device),
        requires_grad=settings.learn_logvar,
    )
    masters = lower(vae, precision, keep=_under("vae.", keep))
    learned = [(name, p) for name, p in (masters or vae).named_parameters() if name in names]
    how = {
        "kind": settings.optim,
        "lr": settings.start_learning_rate,
        "betas": settings.betas,
        "weight_decay": settings.weight_decay,
    }
    state = TrainState(
        vae=vae,
        ema=ema,
        critic=critic,
        logvar=logvar,
        optimizer=build_optimizer([*learned, ("logvar", logvar)], **how),
        critic_optimizer=None,
        level_off=LevelOff(skip=warmup_steps(settings)) if settings.disc_start is None and critic else None,
        masters=masters,
    )
    if critic is not None:
        state.critic_masters = lower(critic, precision, keep=_under("critic.", keep))
        judged = (state.critic_masters or critic).named_parameters()
        state.critic_optimizer = build_optimizer(judged, **how)
    return state


def _under(prefix: str, names: frozenset[str]) -> set[str]:
    return {name.removeprefix(prefix) for name in names if name.startswith(prefix)}


def _batch_shapes(settings: TrainSettings) -> list[tuple[int, ...]]:
    """b 3 t h w of every kind of batch."""
    plan = clip_plan(settings)
    return [(plan.batch, 3, frames, *size) for frames, size in plan.shapes()]


def _step_plan(
    settings: TrainSettings,
    vae: CausalVAE,
    critic: nn.Module | None,
    *,
    precision: Precision,
    loss: LossPlan,
    kept: Mapping[str, Any],  # Any: JSON
) -> StepPlan:
    """Parts and recomputation. Convolutions that a check will keep in fp32 are planned in fewer bits.

    kept: of the checkpoint. What `auto` found then is taken again, whatever memory is free now, since the
    number of parts decides how sums are rounded.
    """
    least = settings.gradient_accumulation_steps
    if settings.mode == 2:
        return StepPlan(least)
    if settings.memory.policy == "auto" and _as_now(kept, settings) and kept["parts"] >= least:
        return StepPlan(kept["parts"], recompute=kept["recompute"])
    device = vae.last_layer.get_parameter("weight").device
    return plan_step(
        blueprint(vae, critic, ema=settings.use_ema, lowered=partial(lower, precision=precision)),
        shapes=_batch_shapes(settings),
        parts=settings.gradient_accumulation_steps,
        memory=settings.memory,
        available_bytes=available_bytes(str(device)),
        loss=loss,
        optimizer=settings.optim,
    )


def _as_now(kept: Mapping[str, Any], settings: TrainSettings) -> bool:
    """Whether a checkpoint was made with batches of these sizes."""
    return kept.get("batches") == [list(shape) for shape in _batch_shapes(settings)]


def _check_convolutions(
    settings: TrainSettings,
    vae: CausalVAE,
    critic: nn.Module | None,
    *,
    precision: Precision,
    parts: int,
    kept: Mapping[str, Any],  # Any: JSON
) -> Checked:
    """Which convolutions stay in fp32: on a CPU those whose kernels are wrong in fewer bits.

    kept: of the checkpoint; what was found then holds for the same batches, parts and kernels.
    """
    on_cpu = vae.last_layer.get_parameter("weight").device.type == "cpu"
    if not on_cpu or precision.level == "O0" or settings.mode == 2:
        return Checked(frozenset(), "")
    machine = Machine.look()
    same = kernels(precision.numbers, cpu=machine.cpu, variables=os.environ)
    if kept.get("kernels") == same and kept["parts"] == parts and _as_now(kept, settings):
        return Checked(frozenset(kept["in_fp32"]), "", kernels=same)
    shapes: dict[str, frozenset[ConvShape]] = {}
    for clips in _batch_shapes(settings):
        pieces = min(parts, clips[0])
        found = shapes_of_run(vae, critic, geometry=vae.geometry, clips=clips, parts=pieces)
        shapes = {name: shapes.get(name, frozenset()) | each for name, each in found.items()}
    return check_convolutions(
        shapes,
        numbers=precision.numbers,
        cache=home(os.environ) / "convolutions.json",
        cpu=machine.cpu,
        variables=os.environ,
    )


def _model_of(start: Checkpoint) -> tuple[CausalVAEConfig, Origin]:
    """Config and origin of a checkpoint's weights by header and manifest; TrainState reads the tensors."""
    file = find_weights(start.path)
    manifest = json.loads((start.path / MANIFEST).read_text())
    return read_header(file), Origin(file, manifest["files"][file.name]["sha256"], file.stem)


def lay_out(module: nn.Module) -> None:
    """Lay out the weights of 3D convolutions with channels last, where their kernels are fastest.

    By hand: Module.to(memory_format=...) refuses a module that has 2D convolutions as well.
    """
    for parameter in module.parameters():
        if parameter.ndim == 5:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last_3d)


def _critic(settings: TrainSettings, device: torch.device) -> nn.Module | None:
    if settings.disc_type == "none":
        return None
    base = rng.key("critic", settings.seed)
    return build_critic(settings.disc_type, base=base, norm=settings.disc_norm).to(device)


def _learning(vae: CausalVAE, parts: Literal["all", "decoder", "encoder"]) -> set[str]:
    """Names of the parameters that learn; the others are frozen.

    The last layer keeps its gradient: the adaptive weight is measured at it.
    """
    frozen = {"all": (), "decoder": ("encoder.", "quant_conv."), "encoder": ("decoder.", "post_quant_conv.")}
    names = {name for name, _ in vae.named_parameters() if not name.startswith(frozen[parts])}
    for name, parameter in vae.named_parameters():
        parameter.requires_grad_(name in names)
    vae.last_layer.get_parameter("weight").requires_grad_(True)
    return names
