"""Errors with a pattern: seams where chunks or tiles meet, and the grid of the decoder's upsampling.

Clips are uint8 `t h w 3`. Both are told from other errors by where they stand, not by how large they are.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from causalvae.fidelity import DECIBEL_LIMIT, signed_error

Axis = Literal["time", "row", "column"]
AXES: dict[Axis, int] = {"time": 0, "row": 1, "column": 2}
RING = 2  # bins between a grid frequency and those it is compared with: a Hann window spreads over one
# colours of clips in which anything that can be seen is the model's own
COLOURS: dict[str, tuple[int, int, int]] = {
    "black": (0, 0, 0),
    "grey": (128, 128, 128),
    "white": (255, 255, 255),
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
}


@dataclass(frozen=True)
class Seam:
    """Mean squared errors at borders and elsewhere, in squared 8-bit levels."""

    border: float
    elsewhere: float

    @property
    def decibels(self) -> float:
        """Error at borders over that elsewhere; 0 where there is no seam, within 100."""
        return ratio_decibels(self.border, self.elsewhere)


def step_errors(clip: Tensor, recon: Tensor, *, axis: Axis) -> list[float]:
    """Mean squared error of the step from position i to i + 1 along an axis, in squared 8-bit levels.

    Entry i is of the border before position i + 1. It sees what an eye sees: a jump that the clip does not
    have. An error that is the same on both sides costs nothing. clip, recon: uint8 t h w 3.
    """
    if axis != "time":
        return _mean_squares((error.diff(dim=AXES[axis] - 1) for error in _errors(clip, recon)), axis=axis)
    pairs = pairwise(_errors(clip, recon))
    return _mean_squares((after - before for before, after in pairs), axis=axis)


def level_errors(clip: Tensor, recon: Tensor, *, axis: Axis) -> list[float]:
    """Mean squared error at each position along an axis, in squared 8-bit levels. uint8 t h w 3 each."""
    return _mean_squares(_errors(clip, recon), axis=axis)


def seam_of_steps(errors: Sequence[float], *, borders: Sequence[int]) -> Seam | None:
    """Steps across borders against all other steps. errors: of step_errors, or a mean over clips of them.

    borders: first position of each chunk or tile but the first. None where there is no border inside, or
    nothing beside borders.
    """
    inside = {border - 1 for border in borders if 0 < border <= len(errors)}
    return _seam(errors, inside)


def seam_of_levels(errors: Sequence[float], *, borders: Sequence[int]) -> Seam | None:
    """Positions on both sides of borders against all others. errors: of level_errors; borders as above."""
    inside = {at for border in borders if 0 < border < len(errors) for at in (border - 1, border)}
    return _seam(errors, inside)


def grid_decibels(clip: Tensor, recon: Tensor, *, period: int) -> float | None:
    """Energy of the error at multiples of 1/period cycles per pixel over that of frequencies beside them, dB.

    The power spectrum of recon - clip, Hann window, mean over frames and channels: mean over the bins
    (i h / period, j w / period) but (0, 0), against the mean over the bins at a distance of 2 around each.
    0 where the error has no grid, within 100. Frames are cropped to multiples of the period; none if that is
    under 4 periods. clip, recon: uint8 t h w 3. Checkerboards: Odena et al., Deconvolution (2016).
    """
    height, width = (side - side % period for side in clip.shape[1:3])
    if period < 2 or min(height, width) < 2 * RING * period:
        return None
    power = _power(clip[:, :height, :width], recon[:, :height, :width])  # h w
    peaks, rings = [], []
    for i in range(period):
        for j in range(period):
            row, column = i * height // period, j * width // period
            if (i, j) != (0, 0):
                peaks.append(power[row, column])
                rings.append(torch.stack([power[r, c] for r, c in _ring(row, column, height, width)]).mean())
    return ratio_decibels(float(torch.stack(peaks).mean()), float(torch.stack(rings).mean()))


def grid_levels(clip: Tensor, recon: Tensor, *, period: int) -> float | None:
    """Root mean square of the part of the error that repeats every `period` pixels, in 8-bit levels.

    Of each frame and channel the mean error at each place of a period by period cell, without the mean of
    the cell: all energy at multiples of 1/period cycles per pixel (Parseval). None under one period.
    Mean energy over frames and channels, then the root. On a clip of one colour this is what is seen of the
    grid; on others, noise adds its share divided by the number of cells.
    """
    rows, columns = (side // period for side in clip.shape[1:3])
    if min(rows, columns) < 1:
        return None
    energies = []
    for error in _errors(clip, recon):
        whole = error[: rows * period, : columns * period].double()
        cell = whole.unflatten(0, (rows, period)).unflatten(2, (columns, period)).mean(dim=(0, 2))  # p p 3
        energies.append(float((cell - cell.mean(dim=(0, 1))).square().mean()))
    return math.sqrt(math.fsum(energies) / len(energies))


def colour_clip(colour: str, *, frames: int, size: tuple[int, int]) -> Tensor:
    """A clip of one colour of COLOURS: uint8 t h w 3."""
    return torch.tensor(COLOURS[colour], dtype=torch.uint8).expand(frames, *size, 3).contiguous()


def ratio_decibels(a: float, b: float) -> float:
    """10 log10(a / b) of two powers, within 100; 0 where both are 0."""
    if a == b:
        return 0.0
    if a == 0.0 or b == 0.0:
        return DECIBEL_LIMIT if b == 0.0 else -DECIBEL_LIMIT
    return min(DECIBEL_LIMIT, max(-DECIBEL_LIMIT, 10.0 * math.log10(a / b)))


def _errors(clip: Tensor, recon: Tensor) -> Iterator[Tensor]:
    """recon - clip, frame by frame: int32 h w 3."""
    return (signed_error(a, b).to(torch.int32) for a, b in zip(clip, recon, strict=True))


def _mean_squares(frames: Iterable[Tensor], *, axis: Axis) -> list[float]:
    """int32 h w 3 each -> mean of squares at each position of one axis."""
    squares = (each.square() for each in frames)
    if axis == "time":
        return [int(each.sum(dtype=torch.int64)) / each.numel() for each in squares]
    others = (1, 2) if axis == "row" else (0, 2)
    return torch.stack([each.double().mean(dim=others) for each in squares]).mean(dim=0).tolist()


def _seam(errors: Sequence[float], inside: set[int]) -> Seam | None:
    at = [error for i, error in enumerate(errors) if i in inside]
    elsewhere = [error for i, error in enumerate(errors) if i not in inside]
    if not at or not elsewhere:
        return None
    return Seam(border=math.fsum(at) / len(at), elsewhere=math.fsum(elsewhere) / len(elsewhere))


def _power(clip: Tensor, recon: Tensor) -> Tensor:
    """uint8 t h w 3 -> float64 h w: power spectrum of the error without its mean, mean over t and 3."""
    total = torch.zeros(clip.shape[1:3], dtype=torch.float64, device=clip.device)
    rows, columns = (torch.hann_window(n, dtype=torch.float64, device=clip.device) for n in total.shape)
    for frame in _errors(clip, recon):
        planes = frame.permute(2, 0, 1).double()  # 3 h w
        planes = (planes - planes.mean(dim=(1, 2), keepdim=True)) * rows[:, None] * columns
        total += torch.fft.fft2(planes).abs().square().mean(dim=0)
    return total / len(clip)


def _ring(row: int, column: int, height: int, width: int) -> list[tuple[int, int]]:
    """Bins whose larger distance from one bin, along rows or columns, is RING."""
    near = range(-RING, RING + 1)
    return [
        ((row + i) % height, (column + j) % width) for i in near for j in near if max(abs(i), abs(j)) == RING
    ]
