"""Chains of layers that keep only their input: everything between is computed again in the backward pass.

A step of a chain is a frozen record of constants with two functions: `run`, which computes its output from
input and weights, and `pull`, which takes the gradient at the output back to both. A chain of one
convolution costs a norm and a SiLU; a chain of whole blocks is recomputation, without the last
convolution of each block, whose output nobody needs again.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from causalvae.models.convolution import convolution_gradients, convolve
from causalvae.models.interpolation import (
    doubled,
    downsummed,
    halved,
    pull_doubled,
    pull_widened,
    upsampled,
    widened,
)
from causalvae.models.norms import NormKind, norm_gradients, normed, normed_again
from causalvae.video import at_least_fp32

Weights = Sequence[Tensor | None]
Needs = Sequence[bool]
Pulled = tuple[Tensor | None, list[Tensor | None]]  # gradients for the input and for each weight


class Step(Protocol):
    """One link of a chain."""

    @property
    def num_weights(self) -> int:
        """Weights that it takes."""
        ...

    def run(self, x: Tensor, weights: Weights) -> Tensor:
        """The output."""
        ...

    def pull(self, x: Tensor, weights: Weights, *, grad: Tensor, needs: Needs) -> Pulled:
        """Gradients from that of the output. needs: for the input, then for each weight."""
        ...


Link = tuple[Step, list[Tensor | None]]  # a step, and the weights that it takes


def chain(x: Tensor, *links: Link) -> Tensor:
    """The steps one after the other, of which only x is kept."""
    return _Chain.apply(x, tuple(step for step, _ in links), *(w for _, weights in links for w in weights))


class _Context(Protocol):
    """What a function of autograd keeps from forward to backward, as far as it is used here."""

    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]
    steps: tuple[Step, ...]

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Keep inputs."""
        ...


class _Chain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, x: Tensor, steps: tuple[Step, ...], *weights: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, *weights)
        ctx.steps = steps
        start = 0
        for step in steps:
            x = step.run(x, weights[start : start + step.num_weights])
            start += step.num_weights
        return x

    @staticmethod
    def backward(ctx: _Context, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("a chain that keeps its input only has no second derivative")
        x, *weights = ctx.saved_tensors
        needs = (ctx.needs_input_grad[0], *ctx.needs_input_grad[2:])
        dx, dweights = _pull_all(x, ctx.steps, weights, grad=grads[0], needs=needs)
        return dx, None, *dweights


def _pull_all(x: Tensor, steps: Sequence[Step], weights: Weights, *, grad: Tensor, needs: Needs) -> Pulled:
    inputs, spans, start = [x], [], 0
    for step in steps:
        spans.append(slice(start, start + step.num_weights))
        start += step.num_weights
    for step, span in zip(steps[:-1], spans, strict=False):
        inputs.append(step.run(inputs[-1], weights[span]))
    gradients: list[Tensor | None] = [None] * start
    flowing: Tensor | None = grad
    for step, span in zip(reversed(steps), reversed(spans), strict=True):
        source = inputs.pop()
        if flowing is None:
            break
        upstream = needs[0] or any(needs[1 : 1 + span.start])
        flowing, gradients[span] = step.pull(
            source, weights[span], grad=flowing, needs=(upstream, *needs[1 + span.start : 1 + span.stop])
        )
    return flowing if needs[0] else None, gradients


class NormStep(NamedTuple):
    """Norm and SiLU. Weights: scale and offset of the norm."""

    kind: NormKind

    num_weights = 2

    def run(self, x: Tensor, weights: Weights) -> Tensor:
        """b c t h w -> the same shape, in the numbers of the scale."""
        scale, offset = weights
        assert scale is not None
        return F.silu(normed(x, scale, bias=offset, kind=self.kind))

    def pull(self, x: Tensor, weights: Weights, *, grad: Tensor, needs: Needs) -> Pulled:
        """Gradients for x, scale and offset."""
        scale, offset = weights
        assert scale is not None
        before, statistics = normed_again(x, scale, bias=offset, kind=self.kind)
        return self.pull_from(x, before, statistics, scale=scale, grad=grad, needs=needs)

    def pull_from(
        self,
        x: Tensor,
        before: Tensor,
        statistics: tuple[Tensor, ...],
        *,
        scale: Tensor,
        grad: Tensor,
        needs: Needs,
    ) -> Pulled:
        """The same, where the normed input `before` is there already."""
        dbefore = torch.ops.aten.silu_backward(grad.to(scale.dtype), before)
        wanted = (needs[0], needs[1], needs[2])
        dx, *rest = norm_gradients(
            x, dbefore, weight=scale, statistics=statistics, kind=self.kind, needs=wanted
        )
        return dx, rest


class ConvStep(NamedTuple):
    """Nearest upsampling, frames in front, zeros around, convolution: any of them.

    front: times that the first frame is repeated before it. corner: zeros at the right and at the bottom.
    padding: zeros on both sides. numbers: what it computes in, None for those of its weight.
    Weights: weight (c' c kt kh kw) and bias.
    """

    numbers: torch.dtype | None
    stride: tuple[int, ...] = (1, 1, 1)
    padding: tuple[int, ...] = (0, 0, 0)
    front: int = 0
    corner: int = 0
    upsample: bool = False

    num_weights = 2

    def run(self, x: Tensor, weights: Weights) -> Tensor:
        """b c t h w -> b c' t' h' w'."""
        weight, bias = weights
        assert weight is not None
        return self.convolve(self.window(x.to(self.numbers or weight.dtype)), weight, bias=bias)

    def convolve(self, window: Tensor, weight: Tensor, *, bias: Tensor | None) -> Tensor:
        """The window, with what was repeated and padded, -> the output."""
        numbers = self.numbers or weight.dtype
        bias = None if bias is None else bias.to(numbers)
        weight = weight.to(numbers)
        return convolve(window.to(numbers), weight, bias, stride=self.stride, padding=self.padding)

    def window(self, x: Tensor) -> Tensor:
        """What the convolution sees of x."""
        if self.upsample:
            x = upsampled(x)
        if self.front:
            x = torch.cat([*[x[:, :, :1]] * self.front, x], dim=2)  # expanded, it would cost the layout
        return F.pad(x, (0, self.corner, 0, self.corner)) if self.corner else x

    def pull(self, x: Tensor, weights: Weights, *, grad: Tensor, needs: Needs) -> Pulled:
        """Gradients for x, weight and bias."""
        weight, _ = weights
        assert weight is not None
        window = self.window(x.to(self.numbers or weight.dtype))
        dwindow, gradients = self.pull_window(window, weight, grad=grad, needs=needs)
        return None if dwindow is None else self.pull_padding(dwindow).to(x.dtype), gradients

    def pull_window(self, window: Tensor, weight: Tensor, *, grad: Tensor, needs: Needs) -> Pulled:
        """Gradients for the window, weight and bias."""
        dwindow, *others = convolution_gradients(
            grad.to(window.dtype),
            window,
            weight.to(window.dtype),
            stride=self.stride,
            padding=self.padding,
            needs=needs,
        )
        return dwindow, [None if each is None else each.to(weight.dtype) for each in others]

    def pull_padding(self, dwindow: Tensor) -> Tensor:
        """Gradient for what `window` was made of. May work in place on its argument."""
        if self.corner:
            dwindow = dwindow[..., : -self.corner, : -self.corner]
        if self.front:
            repeated = dwindow[:, :, : self.front].sum(dim=2)
            dwindow = dwindow[:, :, self.front :]
            dwindow[:, :, 0] += repeated
        return downsummed(dwindow) if self.upsample else dwindow


class NormConvStep(NamedTuple):
    """Norm, SiLU, convolution. Weights: those of both."""

    norm: NormStep
    conv: ConvStep

    num_weights = 4

    def run(self, x: Tensor, weights: Weights) -> Tensor:
        """b c t h w -> b c' t h w."""
        return self.conv.run(self.norm.run(x, weights[:2]), weights[2:])

    def pull(self, x: Tensor, weights: Weights, *, grad: Tensor, needs: Needs) -> Pulled:
        """Gradients for x, scale, offset, weight and bias."""
        scale, offset, weight, _ = weights
        assert scale is not None
        assert weight is not None
        before, statistics = normed_again(x, scale, bias=offset, kind=self.norm.kind)
        window = self.conv.window(F.silu(before).to(self.conv.numbers or weight.dtype))
        upstream = any(needs[:3])
        dwindow, dconv = self.conv.pull_window(window, weight, grad=grad, needs=(upstream, *needs[3:]))
        if dwindow is None:
            return None, [None, None, *dconv]
        del window
        dactive = self.conv.pull_padding(dwindow)
        del dwindow
        dx, dnorm = self.norm.pull_from(x, before, statistics, scale=scale, grad=dactive, needs=needs[:3])
        return dx, [*dnorm, *dconv]


class BlockStep(NamedTuple):
    """Two norm-SiLU-convolutions and the input, or its shortcut, added. Weights: those of its parts."""

    first: NormConvStep
    second: NormConvStep
    shortcut: ConvStep | None

    @property
    def num_weights(self) -> int:
        """Weights that it takes."""
        return 8 if self.shortcut is None else 10

    def run(self, x: Tensor, weights: Weights) -> Tensor:
        """b c t h w -> b c' t h w."""
        h = self.second.run(self.first.run(x, weights[:4]), weights[4:8])
        return (x if self.shortcut is None else self.shortcut.run(x, weights[8:])) + h

    def pull(self, x: Tensor, weights: Weights, *, grad: Tensor, needs: Needs) -> Pulled:
        """Gradients for x and all weights."""
        h = self.first.run(x, weights[:4])
        upstream = any(needs[:5])
        dh, dsecond = self.second.pull(h, weights[4:8], grad=grad, needs=(upstream, *needs[5:9]))
        del h
        dx, dfirst = None, [None] * 4
        if dh is not None:
            dx, dfirst = self.first.pull(x, weights[:4], grad=dh, needs=needs[:5])
        dshort, dshortcut = grad.to(x.dtype), []
        if self.shortcut is not None:
            dshort, dshortcut = self.shortcut.pull(x, weights[8:], grad=grad, needs=(needs[0], *needs[9:]))
        total = dshort + dx if dx is not None and dshort is not None else None
        return total, [*dfirst, *dsecond, *dshortcut]


class TimeMixStep(NamedTuple):
    """Half or twice the frames by a fixed rule, mixed with a convolution of the same.

    doubles: the frames are interpolated, and then convolved; else the mean of three is mixed with a
    convolution of stride 2. Weights: logit of the rule's share (1), weight and bias of the convolution.
    """

    conv: ConvStep
    doubles: bool

    num_weights = 3

    def run(self, x: Tensor, weights: Weights) -> Tensor:
        """b c t h w -> b c t' h w."""
        factor, weight, bias = weights
        assert factor is not None
        assert weight is not None
        alpha = torch.sigmoid(factor).to(x.dtype)
        y = doubled(x) if self.doubles else x
        window = self.conv.window(y)
        rule = y if self.doubles else halved(window)
        return alpha * rule + (1 - alpha) * self.conv.convolve(window, weight, bias=bias)

    def pull(self, x: Tensor, weights: Weights, *, grad: Tensor, needs: Needs) -> Pulled:
        """Gradients for x, the logit, weight and bias.

        The convolution's output is not needed for the logit: a convolution is linear in its weights, so
        that <grad, conv(y)> = <weight, gradient of weight> + <bias, gradient of bias>.
        """
        factor, weight, bias = weights
        assert factor is not None
        assert weight is not None
        alpha = torch.sigmoid(factor).to(x.dtype)
        y = doubled(x) if self.doubles else x
        window = self.conv.window(y)
        wanted = [needs[0], needs[2] or needs[1], bias is not None and (needs[3] or needs[1])]
        numbers = self.conv.numbers or weight.dtype
        dwindow, (dweight, dbias) = self.conv.pull_window(window.to(numbers), weight, grad=grad, needs=wanted)
        rule = y if self.doubles else halved(window)
        dfactor = None
        if needs[1]:
            convolved = sum(_inner(w, g) for w, g in ((weight, dweight), (bias, dbias)) if g is not None)
            dalpha = _inner(grad, rule) - convolved
            share = torch.sigmoid(at_least_fp32(factor))
            dfactor = (dalpha * share * (1 - share)).to(factor.dtype)
        dx = None
        if dwindow is not None:
            dx = self._pull_input(dwindow.to(x.dtype).mul_(1 - alpha), grad.to(x.dtype) * alpha)
        scaled = [g * (1 - alpha).to(g.dtype) if g is not None else None for g in (dweight, dbias)]
        return dx, [dfactor, *(g if need else None for g, need in zip(scaled, needs[2:], strict=True))]

    def _pull_input(self, dwindow: Tensor, drule: Tensor) -> Tensor:
        """dwindow, drule: gradients for the convolution's window and for the output of the rule."""
        if self.doubles:
            return pull_doubled(self.conv.pull_padding(dwindow).add_(drule))
        third = drule / 3
        for i in range(3):
            dwindow[:, :, i : i + 2 * third.shape[2] - 1 : 2] += third
        return self.conv.pull_padding(dwindow)


class LiftStep(NamedTuple):
    """Twice the frames after the first, height and width, all by interpolation; then a convolution.

    What is between is eight times the input, and kept nowhere. Weights: those of the convolution.
    """

    conv: ConvStep

    num_weights = 2

    def run(self, x: Tensor, weights: Weights) -> Tensor:
        """b c t h w -> b c' t' 2h 2w."""
        return self.conv.run(widened(doubled(x)), weights)

    def pull(self, x: Tensor, weights: Weights, *, grad: Tensor, needs: Needs) -> Pulled:
        """Gradients for x, weight and bias."""
        dlifted, gradients = self.conv.pull(widened(doubled(x)), weights, grad=grad, needs=needs)
        return None if dlifted is None else pull_doubled(pull_widened(dlifted)), gradients


def _inner(a: Tensor | None, b: Tensor) -> Tensor:
    assert a is not None
    return (at_least_fp32(a) * at_least_fp32(b)).sum()
