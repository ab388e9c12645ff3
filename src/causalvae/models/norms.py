"""Norms over channels, a frame or a clip, and their gradients by formula.

`channel` is x / rms(x) * weight over the channels of each position (Zhang and Sennrich, 2019), with no
statistics across space or time; `layer` is LayerNorm over the same. `frame` and `clip` are GroupNorm over one
frame and over all frames.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from causalvae.video import at_least_fp32

GROUPS = 32  # of GroupNorm, as published
NORM_EPS = 1e-6

NormKind = Literal["channel", "layer", "frame", "clip"]
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def normed(x: Tensor, weight: Tensor, *, bias: Tensor | None, kind: NormKind) -> Tensor:
    """b c t h w -> the same shape, in the numbers of the weight."""
    x = x.to(weight.dtype)
    if kind == "channel":
        positions = x.movedim(1, -1)  # b t h w c
        return F.rms_norm(positions, weight.shape, weight, NORM_EPS).movedim(-1, 1)
    if kind == "layer":
        return F.layer_norm(x.movedim(1, -1), weight.shape, weight, bias, NORM_EPS).movedim(-1, 1)
    if kind == "clip":
        return F.group_norm(x, GROUPS, weight, bias, NORM_EPS)
    return of_frames(F.group_norm(frames_of(x), GROUPS, weight, bias, NORM_EPS), frames=x.shape[2])


def normed_again(
    x: Tensor, weight: Tensor, *, bias: Tensor | None, kind: NormKind
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """What `normed` gave, and for `norm_gradients` mean and 1 / deviation of each group, or nothing."""
    if kind == "channel":
        return normed(x, weight, bias=bias, kind=kind), ()
    if kind == "layer":
        positions = x.to(weight.dtype).movedim(1, -1)  # b t h w c
        y, mean, scale = torch.ops.aten.native_layer_norm(positions, weight.shape, weight, bias, NORM_EPS)
        return y.movedim(-1, 1), (mean, scale)
    samples = _samples(x.to(weight.dtype), kind)
    n, c, positions = len(samples), samples.shape[1], samples[0, 0].numel()
    y, mean, scale = torch.ops.aten.native_group_norm(
        samples, weight, bias, n, c, positions, GROUPS, NORM_EPS
    )
    return (of_frames(y, frames=x.shape[2]) if kind == "frame" else y), (mean, scale)


def norm_gradients(
    x: Tensor,
    grad: Tensor,
    *,
    weight: Tensor,
    statistics: tuple[Tensor, ...],
    kind: NormKind,
    needs: tuple[bool, bool, bool],
) -> Gradients:
    """Gradients for x, weight and bias, None where `needs` says no. x, grad: b c t h w.

    grad is that of the output; that for x has the numbers of x.
    """
    if kind == "channel":
        return _rms_gradients(x, grad, weight=weight, needs=needs)
    if kind == "layer":
        return _layer_gradients(x, grad, weight=weight, statistics=statistics, needs=needs)
    samples = _samples(x.to(weight.dtype), kind)
    mean, scale = statistics
    n, c, positions = len(samples), samples.shape[1], samples[0, 0].numel()
    # All three are asked for: with one left out, torch 2.13 crashes on a CPU with channels last.
    dx, dweight, dbias = torch.ops.aten.native_group_norm_backward(
        _laid_as(grad if kind == "clip" else frames_of(grad), samples),
        samples, mean, scale, weight, n, c, positions, GROUPS, [True, True, True],
    )  # fmt: skip
    if needs[0]:
        dx = (of_frames(dx, frames=x.shape[2]) if kind == "frame" else dx).to(x.dtype)
    return dx if needs[0] else None, dweight if needs[1] else None, dbias if needs[2] else None


def _rms_gradients(x: Tensor, grad: Tensor, *, weight: Tensor, needs: tuple[bool, bool, bool]) -> Gradients:
    # y = w x r with r = 1 / rms(x): dx = r w g - x r^3 mean(w g x), dw = sum(g x r).
    c = len(weight)
    rows = at_least_fp32(x.to(weight.dtype)).movedim(1, -1).reshape(-1, c)  # b c t h w -> (b t h w) c
    grads = at_least_fp32(grad).movedim(1, -1).reshape(-1, c)
    wide = weight.to(rows.dtype)
    r = torch.linalg.vector_norm(rows, dim=1, keepdim=True).square_().div_(c).add_(NORM_EPS).rsqrt_()
    product = grads * rows
    dx = dweight = None
    if needs[0]:
        share = (product @ wide).unsqueeze(1).mul_(r**3).div_(-c)
        dx = (grads * wide).mul_(r).addcmul_(rows, share).to(x.dtype)
        b, _, t, h, w = x.shape
        dx = dx.view(b, t, h, w, c).movedim(-1, 1)
    if needs[1]:
        dweight = product.mul_(r).sum(dim=0).to(weight.dtype)
    return dx, dweight, None


def _layer_gradients(
    x: Tensor,
    grad: Tensor,
    *,
    weight: Tensor,
    statistics: tuple[Tensor, ...],
    needs: tuple[bool, bool, bool],
) -> Gradients:
    mean, scale = statistics
    positions, grads = x.to(weight.dtype).movedim(1, -1), grad.to(weight.dtype).movedim(1, -1)  # b t h w c
    offset = weight if needs[2] else None  # only that there is one; its values don't matter
    dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        grads.contiguous(), positions.contiguous(), weight.shape, mean, scale, weight, offset, list(needs)
    )
    return dx.movedim(-1, 1).to(x.dtype) if needs[0] else None, dweight, dbias


def frames_of(x: Tensor) -> Tensor:
    """b c t h w -> (b t) c h w."""
    return x.transpose(1, 2).flatten(0, 1)


def of_frames(x: Tensor, *, frames: int) -> Tensor:
    """(b t) c h w -> b c t h w."""
    return x.unflatten(0, (-1, frames)).transpose(1, 2)


def _samples(x: Tensor, kind: NormKind) -> Tensor:
    """What one statistic is taken over, a row each, with channels in front or last in memory."""
    samples = x if kind == "clip" else frames_of(x)
    return _laid_as(samples, samples)


def _laid_as(x: Tensor, like: Tensor) -> Tensor:
    last = torch.channels_last if like.dim() == 4 else torch.channels_last_3d
    if not like.is_contiguous(memory_format=last):
        return x.contiguous()
    # A lone frame may have any stride along its first axis, and the kernels take that for another layout.
    rows = x.contiguous(memory_format=last).movedim(1, -1)
    return rows.flatten().view(rows.shape).movedim(-1, 1)
