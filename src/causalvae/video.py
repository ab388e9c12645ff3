"""The only place where pixels change their range, and where clips are padded and cropped in time.

Pixels are uint8 0...255 on disk, floats in [-1, 1] inside the model, and in [0, 1] for metrics and pictures.
"""

import torch
from torch import Tensor

from causalvae.geometry import Geometry

HALF_RANGE = 127.5  # of 8-bit pixels: [-1, 1] spans 255


def to_model(pixels: Tensor) -> Tensor:
    """uint8 of any shape -> fp32 in [-1, 1]."""
    return pixels.float() / HALF_RANGE - 1.0


def to_unit(x: Tensor) -> Tensor:
    """uint8 or model range [-1, 1] -> fp32 in [0, 1], clamped."""
    if x.dtype == torch.uint8:
        return x.float() / 255.0
    return (x.float() * 0.5 + 0.5).clamp(0.0, 1.0)


def to_uint8(x: Tensor) -> Tensor:
    """Model range [-1, 1] -> uint8 0...255: clamped and rounded, what a viewer sees."""
    return ((x.float() + 1.0) * HALF_RANGE).round().clamp(0.0, 255.0).to(torch.uint8)


def to_levels(difference: float) -> float:
    """A difference of two values in model range, in 8-bit levels."""
    return difference * HALF_RANGE


def pad_frames(x: Tensor, geometry: Geometry) -> Tensor:
    """b c t h w -> the same with the last frame repeated until the model can work on it."""
    missing = geometry.padded_frames(x.shape[2]) - x.shape[2]
    if missing == 0:
        return x
    return torch.cat([x, x[:, :, -1:].expand(-1, -1, missing, -1, -1)], dim=2)


def crop_frames(x: Tensor, frames: int) -> Tensor:
    """b c t h w -> its first `frames` frames: the inverse of pad_frames on a reconstruction."""
    return x[:, :, :frames]


def pad_size(x: Tensor, geometry: Geometry) -> Tensor:
    """b c t h w -> the same with the last row and column repeated, to multiples of the spatial factor."""
    height, width = x.shape[3:]
    below, right = geometry.padded_size(height) - height, geometry.padded_size(width) - width
    if below:
        x = torch.cat([x, x[:, :, :, -1:].expand(-1, -1, -1, below, -1)], dim=3)
    if right:
        x = torch.cat([x, x[..., -1:].expand(-1, -1, -1, -1, right)], dim=4)
    return x


def crop_size(x: Tensor, height: int, width: int) -> Tensor:
    """b c t h w -> its upper left height x width: the inverse of pad_size on a reconstruction."""
    return x[:, :, :, :height, :width]


def at_least_fp32(x: Tensor) -> Tensor:
    """Half precisions as fp32: losses, statistics and metrics are not computed in less."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
