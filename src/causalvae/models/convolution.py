"""Convolutions that know in which numbers they compute, apart from the numbers their weights are kept in.

Precision is decided once, for every convolution by itself (`train.precision`); norms and everything else
compute in the numbers of their own weights.

In few bits on a CPU the gradient of a 3D convolution's weight is computed by 2D convolutions, one for each
frame of the kernel. The 3D kernels for it of torch 2.13 (oneDNN 3.12) on CPUs with AMX were seen to give
other numbers each time, NaN among them, and to write where memory was not theirs, until the process was
aborted: 128 -> 128 (1, 3, 3) on 8 x 256 x 256 with two threads, on 7 x 257 x 257 by stride 2 with one. The 2D
kernels were right in all cases that were tried; docs/performance.md has their time.
"""

from collections.abc import Sequence
from typing import Protocol

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
        weight = self.weight.to(numbers)
        return convolve(x.to(numbers), weight, bias, stride=self.stride, padding=self.padding)


Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]  # for input, weight and bias


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
    """x: b c t h w or b c h w -> the same axes. All in the same numbers."""
    if _goes_by_frames(x):
        return _FewBits.apply(x, weight, bias, tuple(stride), tuple(padding))
    return (F.conv3d if x.ndim == 5 else F.conv2d)(x, weight, bias, stride, padding)


def convolution_gradients(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    needs: Sequence[bool],
) -> Gradients:
    """Gradients of a convolution from that of its output; None where none is needed.

    grad: b c' t' h' w' or b c' h' w'. x: as many axes. needs: for x, weight and bias.
    """
    own, axes = list(needs), len(stride)
    by_frames = _goes_by_frames(x)
    if by_frames:
        own[1:] = False, False
    found = torch.ops.aten.convolution_backward(
        grad, x, weight, [len(weight)], stride, padding, [1] * axes, False, [0] * axes, 1, own
    )
    dx, dweight, dbias = (each if need else None for each, need in zip(found, own, strict=True))
    if by_frames and needs[1]:
        dweight = _weight_gradient(grad, x, weight, stride=stride, padding=padding)
    if by_frames and needs[2]:
        dbias = grad.sum((0, 2, 3, 4))
    return dx, dweight, dbias


def _goes_by_frames(x: Tensor) -> bool:
    """Whether x: b c t h w is in few bits on a CPU. On the meta device too: memory is predicted there."""
    few = x.dtype in (torch.bfloat16, torch.float16)
    return x.ndim == 5 and few and x.device.type in ("cpu", "meta")


def _weight_gradient(
    grad: Tensor, x: Tensor, weight: Tensor, *, stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
    """Gradient of a 3D convolution's weight, one frame of the kernel after the other.

    Frames go first, so that those which a frame of the kernel sees lie together: copied, if there are more
    clips than one and the kernel has more frames than one.
    """
    step, before, frames = stride[0], padding[0], weight.shape[2]
    alone = frames == step == 1 and before == 0
    axes = (0, 2, 3, 4, 1) if alone else (2, 0, 3, 4, 1)
    grad, x = (each.permute(axes).contiguous() for each in (grad, x))  # t b h w c, or b t h w c
    pieces: list[Tensor] = []
    for k in range(frames):  # output frame t sees frame t * step + k - before
        pull, seen = grad, x
        if not alone:
            first = max(0, -((k - before) // step))
            last = min(len(grad) - 1, (len(x) - 1 + before - k) // step)
            start = first * step + k - before
            pull, seen = grad[first : last + 1], x[start : start + (last - first) * step + 1 : step]
        if len(pull) == 0:
            pieces.append(torch.zeros_like(weight[:, :, k]))
            continue
        flat = {"stride": stride[1:], "padding": padding[1:], "needs": (False, True, False)}
        piece = convolution_gradients(_as_pictures(pull), _as_pictures(seen), weight[:, :, k], **flat)[1]
        assert piece is not None
        pieces.append(piece)
    return torch.stack(pieces, dim=2)


def _as_pictures(frames: Tensor) -> Tensor:
    return frames.flatten(0, 1).permute(0, 3, 1, 2)  # t b h w c -> (t b) c h w


class _Context(Protocol):
    """What a function of autograd keeps from forward to backward, as far as it is used here."""

    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Keep inputs."""
        ...


class _FewBits(torch.autograd.Function):
    """A 3D convolution whose gradients are those of `convolution_gradients`."""

    @staticmethod
    def forward(
        ctx: _Context,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: tuple[int, ...],
        padding: tuple[int, ...],
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        return F.conv3d(x, weight, bias, stride, padding)

    @staticmethod
    def backward(ctx: _Context, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        found = convolution_gradients(
            grads[0], x, weight, stride=ctx.stride, padding=ctx.padding, needs=needs
        )
        return (*found, None, None)


def _each_axis(value: Sequence[int] | int, axes: int) -> tuple[int, ...]:
    return (value,) * axes if isinstance(value, int) else tuple(value)
