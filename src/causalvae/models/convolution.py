"""Convolutions that know in which numbers they compute, apart from the numbers their weights are kept in.

Precision is decided once, for every convolution by itself (`train.precision`); norms and everything else
compute in the numbers of their own weights.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Conv(nn.Module):
    """A convolution over the last len(kernel) axes, with the parameters that nn.Conv2d and nn.Conv3d have.

    arithmetic: numbers to compute in, input and output included; None for those of the weight.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        *,
        kernel: Sequence[int],
        stride: Sequence[int] | int = 1,
        padding: Sequence[int] | int = 0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.kernel = tuple(kernel)
        self.stride, self.padding = _each_axis(stride, len(kernel)), _each_axis(padding, len(kernel))
        self.weight = nn.Parameter(torch.empty(c_out, c_in, *kernel))
        self.bias = nn.Parameter(torch.empty(c_out)) if bias else None
        self.arithmetic: torch.dtype | None = None

    def forward(self, x: Tensor) -> Tensor:
        """b c t h w or b c h w -> the same axes, in `arithmetic`."""
        numbers = self.arithmetic or self.weight.dtype
        bias = None if self.bias is None else self.bias.to(numbers)
        convolve = F.conv3d if len(self.kernel) == 3 else F.conv2d
        return convolve(x.to(numbers), self.weight.to(numbers), bias, self.stride, self.padding)


def _each_axis(value: Sequence[int] | int, axes: int) -> tuple[int, ...]:
    return (value,) * axes if isinstance(value, int) else tuple(value)
