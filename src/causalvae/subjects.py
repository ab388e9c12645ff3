"""What is evaluated: a model with its weights, or the clips themselves; and what measures it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from causalvae.compute import cost, flops, num_parameters
from causalvae.critics.i3d import I3D
from causalvae.errors import ConfigError
from causalvae.frechet import LEAST_CLIPS, Framing, read_i3d
from causalvae.infer import open_vae
from causalvae.metrics import METRICS, Metric, perceptual_metric
from causalvae.models.base import Posterior
from causalvae.models.build import Model
from causalvae.perceptual import Perceptual, Shelf, build_perceptual
from causalvae.scores import model_metrics
from causalvae.train.precision import PrecisionName
from causalvae.video import crop_frames, pad_frames, to_model, to_uint8

DATA = "data"  # the word for the clips themselves


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One thing to evaluate. vae: None for the data. facts: for JSON. notes: what is worth saying."""

    name: str
    vae: Model | None
    facts: dict[str, Any]  # Any: JSON
    step: int | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Judges:
    """What measures beside the table of metrics. choice, i3d: as `--perceptual` and `--i3d` say them.

    probes: clips of one colour and masked latents too. cost: measure time, memory and operations.
    """

    perceptual: str = "none"
    i3d: Path | None = None
    framing: Framing = "stretch"
    probes: bool = False
    cost: bool = False


@dataclass(frozen=True, kw_only=True)
class Panel:
    """The judges, read. asked: as they were asked for. facts: for JSON: which files they are from."""

    metrics: Mapping[str, Metric] = field(default_factory=lambda: METRICS)
    i3d: I3D | None = None
    asked: Judges = field(default_factory=Judges)
    facts: Mapping[str, Any] = field(default_factory=dict[str, Any])  # Any: JSON


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How checkpoints are read. prefer: which of two sets of weights. model_config: as `load_model` has it.

    precision: what convolutions compute in. device: as `--device`.
    """

    prefer: Literal["ema", "live"] = "ema"
    model_config: Path | None = None
    precision: PrecisionName = "fp32"
    device: str = "auto"


def read_subject(checkpoint: str, how: Reading, *, size: tuple[int, int]) -> Subject:
    """A checkpoint with its model on the device. ConfigError if the size does not fit the model."""
    if checkpoint == DATA:
        return Subject(
            name=DATA,
            vae=None,
            facts={
                "file": DATA,
                "sha256": DATA,
                "model": DATA,
                "set": "only",
                "precision": "fp32",
                "device": "cpu",
            },
        )
    opened = open_vae(
        Path(checkpoint),
        prefer=how.prefer,
        model_config=how.model_config,
        device=how.device,
        precision=how.precision,
    )
    vae, facts = (
        opened.vae,
        {**opened.loaded.facts(), "precision": opened.precision.name, "device": opened.device.type},
    )
    _refuse_size(vae, size, checkpoint)
    file = Path(str(facts["file"]))
    step = re.fullmatch(r"step-(\d+)", file.parent.name)
    numbers = "" if how.precision == "fp32" else f"-{how.precision}"  # as asked: resumed under the same name
    return Subject(
        name=f"{_short(file)}-{str(facts['sha256'])[:8]}{numbers}",
        vae=vae,
        facts=facts,
        step=None if step is None else int(step[1]),
        notes=opened.notes,
    )


def _refuse_size(vae: Model, size: tuple[int, int], checkpoint: str) -> None:
    factor = vae.geometry.spatial
    if any(side % factor for side in size):
        raise ConfigError(
            f"--resolution {size[0]}x{size[1]}: height and width must be multiples of {factor} for "
            f"{checkpoint}"
        )


def _short(file: Path) -> str:
    """A name for the files of results: letters, digits, dots, dashes and underscores."""
    parts = [file.parent.name, file.stem] if re.fullmatch(r"step-\d+", file.parent.name) else [file.stem]
    return re.sub(r"[^\w.-]+", "_", "-".join(parts), flags=re.ASCII)[:60].lstrip(".-") or "weights"


def read_panel(
    judges: Judges, *, clips: int, size: tuple[int, int], shelf: Shelf, device: torch.device
) -> Panel:
    """The judges that were asked for, on the device. ConfigError where one can't judge these clips."""
    metrics, facts, i3d = dict(METRICS), dict[str, Any](), None  # Any: JSON
    if judges.perceptual == "auto":
        raise ConfigError("--perceptual auto: evaluation takes a network by name, such as lpips-vgg, or none")
    perceptual, _ = build_perceptual(judges.perceptual, size=size, shelf=shelf)
    if perceptual is not None:
        metric = _on_device(perceptual, device)
        metrics[metric.name] = metric
        facts["perceptual"] = perceptual.facts()
    if judges.i3d is not None:
        if clips < LEAST_CLIPS:
            raise ConfigError(
                f"--i3d {judges.i3d}: rFVD needs {LEAST_CLIPS} clips or more, and there are {clips}; give "
                "more videos or a larger --clips_per_video, or leave it out"
            )
        i3d, digest = read_i3d(judges.i3d)
        i3d = i3d.to(device).eval()
        facts["i3d"] = {"sha256": digest, "framing": judges.framing}
    return Panel(metrics=metrics, i3d=i3d, asked=judges, facts=facts)


def _on_device(judge: Perceptual, device: torch.device) -> Metric:
    """The metric of a network that works on another device than the clips."""
    judge.module.to(device)
    metric = perceptual_metric(judge)

    def measure(clip: Tensor, recon: Tensor) -> float | None:
        return metric.measure(clip.to(device), recon.to(device))

    return replace(metric, measure=measure)


def metrics_for(subject: Subject, panel: Panel) -> dict[str, Metric]:
    """Those of the panel and those of the model's own traces."""
    own = {} if subject.vae is None else model_metrics(subject.vae.geometry)
    return {**panel.metrics, **own}


@torch.no_grad()
def reconstruct_batch(subject: Subject, pixels: Tensor) -> tuple[Tensor, list[Posterior]]:
    """uint8 b 3 t h w -> reconstruction by the posterior's mode, uint8 b 3 t h w; a posterior for each clip.

    The data has no posterior, and goes through the range of models and back.
    """
    if subject.vae is None:
        return to_uint8(to_model(pixels)), []
    posterior = subject.vae.encode(_input(subject.vae, pixels))
    recon = to_uint8(crop_frames(subject.vae.decode(posterior.mode()), pixels.shape[2])).cpu()
    each = [
        Posterior(posterior.mean[i : i + 1], posterior.logvar[i : i + 1], posterior.certain)
        for i in range(len(pixels))
    ]
    return recon, each


def _input(vae: Model, pixels: Tensor) -> Tensor:
    """uint8 b 3 t h w -> b 3 t' h w in [-1, 1] on the model's device, with as many frames as it works on."""
    device = vae.last_layer.get_parameter("weight").device
    return pad_frames(to_model(pixels.to(device)), vae.geometry)


@torch.no_grad()
def cost_of(vae: Model, pixels: Tensor) -> dict[str, Any]:  # Any: JSON
    """Parameters, and of encoding and decoding one clip: operations, clips per second, peak memory."""
    x = _input(vae, pixels)
    z = vae.encode(x).mode()
    found: dict[str, Any] = {"parameters": num_parameters(vae), "device": str(x.device)}  # Any: as above
    for name, call in (("encode", lambda: vae.encode(x).mode()), ("decode", lambda: vae.decode(z))):
        spent = cost(call, clips=len(pixels), device=x.device)
        found[f"{name}_flops"] = flops(call)
        found[f"{name}_clips_per_second"] = spent.clips_per_second
        if spent.peak_bytes is not None:
            found[f"{name}_peak_bytes"] = spent.peak_bytes
    return found
