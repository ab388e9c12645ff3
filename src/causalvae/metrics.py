"""How near a reconstruction is to its clip, as a viewer sees it: on frames clamped and rounded to 8 bits."""

import math

import torch
from torch import Tensor

PEAK = 255.0


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio of two clips of one shape, uint8, in dB; infinite where they are equal.

    From the mean squared error over all values, pooled: 10 log10(255^2 / mse).
    """
    mse = squared_error(a, b) / a.numel()
    return math.inf if mse == 0 else 10.0 * math.log10(PEAK**2 / mse)


def squared_error(a: Tensor, b: Tensor) -> float:
    """Sum of squared differences of two uint8 tensors, exact."""
    assert a.dtype == b.dtype == torch.uint8
    difference = a.to(torch.int32) - b.to(torch.int32)
    return float(difference.square().sum(dtype=torch.int64))
