"""The table of metrics of one clip and its reconstruction, and what may be said of a set of their values."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from causalvae import rng
from causalvae.artefacts import grid_decibels, grid_levels
from causalvae.fidelity import first_frame_gain, ms_ssim, mse, psnr, ssim
from causalvae.perceptual import Perceptual
from causalvae.temporal import difference_psnr, flicker, motion_consistency
from causalvae.video import to_model

RESAMPLES, COVERED = 2000, 0.95
FRAMES_AT_ONCE = 8  # that a perceptual network judges
Better = Literal["higher", "lower"]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A number of one clip. measure: (clip, recon), uint8 t h w 3 each; None where the clip can't give it.

    better: None where neither direction is. source: where its definition is from.
    """

    name: str
    definition: str
    unit: str
    better: Better | None
    source: str
    measure: Callable[[Tensor, Tensor], float | None]


TABLE = (
    Metric(
        name="psnr", unit="dB", better="higher", source="definition", measure=psnr,
        definition="10 log10(255^2 / mse) of the clip, at most 100",
    ),
    Metric(
        name="mse", unit="levels^2", better="lower", source="definition", measure=mse,
        definition="mean squared error of 8-bit values; its mean over clips of one size gives psnr_pooled",
    ),
    Metric(
        name="ssim_gaussian11", unit="", better="higher", source="Wang et al. 2004", measure=ssim,
        definition="structural similarity, 11x11 Gaussian window of deviation 1.5, RGB, as scikit-image with "
        "gaussian_weights=True, use_sample_covariance=False",
    ),
    Metric(
        name="ms_ssim_gaussian11", unit="", better="higher", source="Wang et al. 2003", measure=ms_ssim,
        definition="the same over five scales; sides from 176 pixels",
    ),
    Metric(
        name="first_frame_gain", unit="dB", better=None, source="definition", measure=first_frame_gain,
        definition="PSNR of frame 0 minus the mean PSNR of the other frames",
    ),
    Metric(
        name="psnr_of_changes", unit="dB", better="higher", source="definition", measure=difference_psnr,
        definition="PSNR of the differences of neighbouring frames, peak 255, at most 100",
    ),
    Metric(
        name="flicker", unit="levels", better="lower", source="definition", measure=flicker,
        definition="how much more pixels change that stand still in the original, mean per value",
    ),
    Metric(
        name="motion_consistency", unit="", better="higher", source="after Chu et al. 2020",
        measure=motion_consistency,
        definition="correlation of the changes from frame to frame of both clips, without warping",
    ),
)  # fmt: skip
METRICS: dict[str, Metric] = {metric.name: metric for metric in TABLE}


def grid_metrics(period: int) -> dict[str, Metric]:
    """Metrics of the grid that a decoder of this spatial factor leaves, by name."""

    def decibels(clip: Tensor, recon: Tensor) -> float | None:
        return grid_decibels(clip, recon, period=period)

    def levels(clip: Tensor, recon: Tensor) -> float | None:
        return grid_levels(clip, recon, period=period)

    made = (
        Metric(
            name="grid", unit="dB", better="lower", source="after Odena et al. 2016", measure=decibels,
            definition=f"energy of the error at multiples of 1/{period} cycles per pixel over that beside",
        ),
        Metric(
            name="grid_levels", unit="levels", better="lower", source="definition", measure=levels,
            definition=f"root mean square of the part of the error that repeats every {period} pixels",
        ),
    )  # fmt: skip
    return {metric.name: metric for metric in made}


def perceptual_metric(judge: Perceptual) -> Metric:
    """The distance of a network under its own name: LPIPS only with its published weights."""

    @torch.no_grad()
    def measure(clip: Tensor, recon: Tensor) -> float | None:
        if min(clip.shape[1:3]) < judge.module.smallest_side:
            return None
        return perceptual_distance(clip, recon, judge=judge)

    lpips = judge.name.startswith("lpips-")
    return Metric(
        name=judge.name,
        definition="mean over frames of the distance of the network's features, frames in [-1, 1]",
        unit="",
        better="lower",
        source="Zhang et al. 2018, v0.1" if lpips else "network of the user; not LPIPS",
        measure=measure,
    )


def perceptual_distance(clip: Tensor, recon: Tensor, *, judge: Perceptual) -> float:
    """Mean over frames. clip, recon: uint8 t h w 3, on the device of the judge's module."""
    found = []
    for start in range(0, len(clip), FRAMES_AT_ONCE):
        frames = [
            to_model(each[start : start + FRAMES_AT_ONCE]).permute(0, 3, 1, 2) for each in (recon, clip)
        ]
        found.append(judge.module(frames[0], frames[1]).flatten().double())
    return float(torch.cat(found).mean())


def measured(clip: Tensor, recon: Tensor, *, metrics: dict[str, Metric]) -> dict[str, float]:
    """Values of one clip by name; what it can't give is absent. clip, recon: uint8 t h w 3."""
    values = {name: metric.measure(clip, recon) for name, metric in metrics.items()}
    return {name: value for name, value in values.items() if value is not None}


def bootstrap(values: Sequence[float], *, seed: int) -> tuple[float, float] | None:
    """Bounds between which the mean over clips lies with 95 %: percentiles of 2000 resampled means.

    A function of the values and the seed: their order does not matter. None for fewer than two values, which
    tell nothing of how values differ. For a paired comparison give the differences. Efron 1979.
    """
    if len(values) < 2:
        return None
    ordered = torch.tensor(sorted(values), dtype=torch.float64)
    means = torch.empty(RESAMPLES, dtype=torch.float64)
    for i in range(RESAMPLES):
        chosen = rng.integers(ordered.shape, n=len(ordered), base=rng.key("bootstrap", seed, i))
        means[i] = ordered[chosen].mean()
    tail = (1.0 - COVERED) / 2
    low, high = torch.quantile(means, torch.tensor([tail, 1.0 - tail], dtype=torch.float64)).tolist()
    return low, high


def mean(values: Sequence[float]) -> float:
    """Mean, the same for any order of the values."""
    return math.fsum(values) / len(values)
