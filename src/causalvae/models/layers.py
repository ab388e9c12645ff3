"""The layers that causal video VAEs are made of. Names of parameters are those of the published models.

All of them take b c t h w. A layer that spans time takes a `stream` (see models/stream.py).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from causalvae.models.convolution import Conv, convolve
from causalvae.models.fused import (
    BlockStep,
    ConvStep,
    Link,
    NormConvStep,
    NormStep,
    TimeMixStep,
    chain,
)
from causalvae.models.interpolation import between, halved
from causalvae.models.norms import NormKind, normed
from causalvae.models.stream import Stream, causal_window

MIX_INIT = 2.0  # logit of the pooled branch: sigmoid(2) = 0.88, as published

Kernel = tuple[int, int, int]


class CausalConv3d(nn.Module):
    """Convolution whose output frame sees its own and earlier frames; frame 0 is repeated in front.

    corner: zeros at the right and at the bottom, in the place of zeros on all sides.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        *,
        kernel: Kernel = (3, 3, 3),
        stride: Kernel = (1, 1, 1),
        corner: int = 0,
    ) -> None:
        super().__init__()
        self.corner = corner
        padding = (0, 0, 0) if corner else (0, kernel[1] // 2, kernel[2] // 2)
        self.conv = Conv(c_in, c_out, kernel=kernel, stride=stride, padding=padding)

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        """b c t h w -> b c' t' h' w'."""
        kernel, stride = self.conv.kernel[0], self.conv.stride[0]
        window = causal_window(self, x, kernel=kernel, stride=stride, stream=stream)
        return self.conv(F.pad(window, (0, self.corner, 0, self.corner)) if self.corner else window)

    def link(self, *, upsample: bool = False) -> tuple[ConvStep, list[Tensor | None]]:
        """This layer as a step of a chain."""
        step = ConvStep(
            self.conv.arithmetic,
            self.conv.stride,
            self.conv.padding,
            front=self.conv.kernel[0] - 1,
            corner=self.corner,
            upsample=upsample,
        )
        return step, [self.conv.weight, self.conv.bias]


class FrameConv(nn.Module):
    """Convolution of each frame by itself, with the parameters of a Conv2d."""

    def __init__(self, c_in: int, c_out: int, *, kernel: int, stride: int = 1, padding: int = 0) -> None:
        super().__init__()
        self.stride, self.padding = stride, padding
        self.weight = nn.Parameter(torch.empty(c_out, c_in, kernel, kernel))
        self.bias = nn.Parameter(torch.empty(c_out))
        self.arithmetic: torch.dtype | None = None  # as Conv has it

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:  # noqa: ARG002  as every convolution
        """b c t h w -> b c' t h' w'."""
        numbers = self.arithmetic or self.weight.dtype
        stride, padding = (1, self.stride, self.stride), (0, self.padding, self.padding)
        weight, bias = self.weight.unsqueeze(2).to(numbers), self.bias.to(numbers)
        return convolve(x.to(numbers), weight, bias, stride=stride, padding=padding)

    def link(self, *, corner: int = 0, upsample: bool = False) -> tuple[ConvStep, list[Tensor | None]]:
        """This layer as a step of a chain."""
        stride, padding = (1, self.stride, self.stride), (0, self.padding, self.padding)
        step = ConvStep(self.arithmetic, stride, padding, corner=corner, upsample=upsample)
        return step, [self.weight.unsqueeze(2), self.bias]


class Norm(nn.Module):
    """GroupNorm over one frame or the whole clip, or RMS or LayerNorm over the channels of each position.

    `channel`: x / rms(x) * weight (Zhang and Sennrich, 2019), no statistics across space or time. Computes
    in the numbers of its weight, whatever comes in.
    """

    def __init__(self, channels: int, kind: NormKind) -> None:
        super().__init__()
        self.kind: NormKind = kind
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = None if kind == "channel" else nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """b c t h w -> the same shape, in the numbers of the weight."""
        return normed(x, self.weight, bias=self.bias, kind=self.kind)

    def activated(self, x: Tensor) -> Tensor:
        """SiLU of the norm, of which x is kept."""
        return chain(x, self.link())

    def link(self) -> tuple[NormStep, list[Tensor | None]]:
        """Norm and SiLU as a step of a chain."""
        return NormStep(self.kind), [self.weight, self.bias]


class LayerNorm(nn.Module):
    """LayerNorm over the channels of each position, with its parameters one level down, as WF-VAE has it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = Norm(channels, "layer")

    def forward(self, x: Tensor) -> Tensor:
        """b c t h w -> the same shape, in the numbers of the weight."""
        return self.norm(x)

    def activated(self, x: Tensor) -> Tensor:
        """SiLU of the norm, of which x is kept."""
        return self.norm.activated(x)

    def link(self) -> tuple[NormStep, list[Tensor | None]]:
        """Norm and SiLU as a step of a chain."""
        return self.norm.link()


def norm_of(channels: int, kind: NormKind) -> Norm | LayerNorm:
    """A norm with the names of parameters that go with its kind."""
    return LayerNorm(channels) if kind == "layer" else Norm(channels, kind)


def conv3x3(c_in: int, c_out: int, *, flat: bool) -> FrameConv | CausalConv3d:
    """A 3x3 convolution of each frame, or its causal 3x3x3 relative."""
    return FrameConv(c_in, c_out, kernel=3, padding=1) if flat else CausalConv3d(c_in, c_out)


def pointwise(c_in: int, c_out: int, *, flat: bool) -> FrameConv | CausalConv3d:
    """A convolution of each position by itself."""
    return FrameConv(c_in, c_out, kernel=1) if flat else CausalConv3d(c_in, c_out, kernel=(1, 1, 1))


class ResnetBlock(nn.Module):
    """norm, SiLU, conv, norm, SiLU, conv, and the input added. `flat`: frame by frame, norms too.

    In training each convolution keeps the input of its norm, and no more.
    """

    def __init__(self, c_in: int, c_out: int, *, norm: NormKind, flat: bool = False) -> None:
        super().__init__()
        self.flat = flat
        kind = "frame" if flat and norm == "clip" else norm
        self.norm1 = norm_of(c_in, kind)
        self.conv1 = conv3x3(c_in, c_out, flat=flat)
        self.norm2 = norm_of(c_out, kind)
        self.conv2 = conv3x3(c_out, c_out, flat=flat)
        self.nin_shortcut = pointwise(c_in, c_out, flat=flat) if c_in != c_out else None

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        """b c t h w -> b c' t h w."""
        if keeps_nothing(stream):
            h = self.conv1(F.silu(self.norm1(x)), stream)
            h = self.conv2(F.silu(self.norm2(h)), stream)
            return (x if self.nin_shortcut is None else self.nin_shortcut(x, stream)) + h
        h = x
        for norm, conv in ((self.norm1, self.conv1), (self.norm2, self.conv2)):
            h = chain(h, norm_conv(norm, conv))
        return (x if self.nin_shortcut is None else self.nin_shortcut(x)) + h

    def link(self) -> Link:
        """The whole block as a step of a chain."""
        first, weights1 = norm_conv(self.norm1, self.conv1)
        second, weights2 = norm_conv(self.norm2, self.conv2)
        shortcut, weights3 = (None, []) if self.nin_shortcut is None else self.nin_shortcut.link()
        return BlockStep(first, second, shortcut), [*weights1, *weights2, *weights3]


def norm_conv(
    norm: Norm | LayerNorm, conv: FrameConv | CausalConv3d
) -> tuple[NormConvStep, list[Tensor | None]]:
    """Norm, SiLU and convolution as one step of a chain."""
    (first, weights), (second, more) = norm.link(), conv.link()
    return NormConvStep(first, second), [*weights, *more]


def keeps_nothing(stream: Stream | None) -> bool:
    """No gradient will be asked, so that a layer runs its plain order of work."""
    return stream is not None or not torch.is_grad_enabled()


class FrameAttention(nn.Module):
    """Self-attention over the positions of each frame, one head; no attention across frames.

    mixing: as v1.0 has it, which reads the values of a clip, c t h w, as if they were t c h w. What it takes
    for a frame are rows of several channels and frames, so that with more than one frame it mixes them.
    """

    def __init__(self, channels: int, *, norm: NormKind, mixing: bool = False) -> None:
        super().__init__()
        self.mixing = mixing
        self.norm = norm_of(channels, norm)
        self.q, self.k, self.v, self.proj_out = (pointwise(channels, channels, flat=False) for _ in range(4))

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:  # noqa: ARG002  as every layer
        """b c t h w -> the same shape. The residual is added."""
        b, c, t, h, w = x.shape
        normed = self.norm(x)
        q, k, v = (self._tokens(layer(normed)) for layer in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v).squeeze(1)  # (b t) (h w) c
        if self.mixing:
            return x + self.proj_out(mixed.transpose(1, 2).reshape(b, c, t, h, w))
        frames = mixed.unflatten(0, (b, t)).unflatten(2, (h, w))  # b t h w c
        return x + self.proj_out(frames.permute(0, 4, 1, 2, 3))

    def _tokens(self, x: Tensor) -> Tensor:
        """b c t h w -> (b t) 1 (h w) c."""
        if self.mixing:
            b, c, t, h, w = x.shape
            return x.reshape(b * t, c, h * w).transpose(1, 2).unsqueeze(1)
        return x.permute(0, 2, 3, 4, 1).flatten(0, 1).flatten(1, 2).unsqueeze(1)


class FrameDownsample(nn.Module):
    """Half of height and width: a strided convolution, zeros at the right and at the bottom."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = FrameConv(channels, channels, kernel=3, stride=2)

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:  # noqa: ARG002  as every layer
        """b c t h w -> b c t h/2 w/2."""
        return chain(x, self.link())

    def link(self) -> Link:
        """This layer as a step of a chain."""
        return self.conv.link(corner=1)


class SpatialUpsample(nn.Module):
    """Twice the height and width: nearest, then a convolution of each frame."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, channels, kernel=(1, 3, 3))

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:  # noqa: ARG002  as every layer
        """b c t h w -> b c t 2h 2w."""
        return chain(x, self.link())

    def link(self) -> Link:
        """This layer as a step of a chain."""
        return self.conv.link(upsample=True)


class TimeDownsample(nn.Module):
    """Half of the frames, t -> 1 + (t - 1) / 2.

    The mean of three frames, mixed with a convolution over them.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mix_factor = nn.Parameter(torch.tensor([MIX_INIT]))
        self.conv = Conv(channels, channels, kernel=(3, 3, 3), stride=(2, 1, 1), padding=(0, 1, 1))

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        """b c t h w -> b c t' h w."""
        if stream is None:
            return chain(x, self.link())
        window = causal_window(self, x, kernel=3, stride=2, stream=stream)
        alpha = torch.sigmoid(self.mix_factor).to(x.dtype)
        return alpha * halved(window) + (1 - alpha) * self.conv(window)

    def link(self) -> Link:
        """This layer as a step of a chain."""
        conv = ConvStep(self.conv.arithmetic, self.conv.stride, self.conv.padding, front=2)
        return TimeMixStep(conv, doubles=False), [self.mix_factor, self.conv.weight, self.conv.bias]


class TimeUpsample(nn.Module):
    """Twice the frames, t -> 1 + 2 (t - 1): linear between frames after the first, mixed with a convolution.

    It looks one frame ahead, so in a stream it withholds its last output until the next chunk or
    `stream.last`.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mix_factor = nn.Parameter(torch.tensor([MIX_INIT]))
        self.conv = CausalConv3d(channels, channels)

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        """b c t h w -> b c t' h w."""
        if stream is None:
            return chain(x, self.link())
        y = stretched(self, x, stream)
        alpha = torch.sigmoid(self.mix_factor).to(x.dtype)
        return alpha * y + (1 - alpha) * self.conv(y, stream)

    def link(self) -> Link:
        """This layer as a step of a chain."""
        conv, weights = self.conv.link()
        return TimeMixStep(conv, doubles=True), [self.mix_factor, *weights]


def stretched(owner: nn.Module, x: Tensor, stream: Stream) -> Tensor:
    """What `doubled` makes of a clip, chunk by chunk: b c t h w -> b c t' h w, never empty.

    It withholds what lies behind the last frame of a chunk, until the next one or `stream.last`.
    """
    past = stream.take(owner)  # the frame before x, none of them before frame 1
    head = [x[:, :, :1]] if past is None else []
    known = x[:, :, 1:] if past is None else torch.cat([past, x], dim=2)
    stream.keep(owner, known[:, :, -1:])
    if known.shape[2] == 0:
        return x
    if past is None or past.shape[2] == 0:
        head.append(known[:, :, :1])
    tail = [known[:, :, -1:]] if stream.last else []
    return torch.cat([*head, between(known), *tail], dim=2)


def space_to_depth(x: Tensor, factor: Kernel) -> Tensor:
    """b c (t p) (h q) (w r) -> b (p q r c) t h w."""
    for dim, n in zip((2, 4, 6), factor, strict=True):
        x = x.unflatten(dim, (-1, n))  # ends as b c t p h q w r
    return x.permute(0, 3, 5, 7, 1, 2, 4, 6).flatten(1, 4)


def depth_to_space(x: Tensor, factor: Kernel) -> Tensor:
    """b (p q r c) t h w -> b c (t p) (h q) (w r): the inverse of space_to_depth."""
    x = x.unflatten(1, (*factor, -1))  # b p q r c t h w
    return x.permute(0, 4, 5, 1, 6, 2, 7, 3).flatten(6, 7).flatten(4, 5).flatten(2, 3)


class ShuffleDown(nn.Module):
    """Space (and time) to depth, then a projection of each position: a linear path."""

    def __init__(self, c_in: int, c_out: int, *, temporal: bool) -> None:
        super().__init__()
        self.factor: Kernel = (2 if temporal else 1, 2, 2)
        self.proj = pointwise(c_in * 4 * self.factor[0], c_out, flat=False)

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        """b c t h w -> b c' t' h/2 w/2, with t' = 1 + (t - 1) / 2 if it halves time."""
        window = causal_window(self, x, kernel=self.factor[0], stride=self.factor[0], stream=stream)
        return self.proj(space_to_depth(window, self.factor))


class ShuffleUp(nn.Module):
    """A projection of each position, then depth to space (and time).

    The first of two first frames is dropped.
    """

    def __init__(self, c_in: int, c_out: int, *, temporal: bool) -> None:
        super().__init__()
        self.factor: Kernel = (2 if temporal else 1, 2, 2)
        self.proj = pointwise(c_in, c_out * 4 * self.factor[0], flat=False)

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        """b c t h w -> b c' t' 2h 2w, with t' = 1 + 2 (t - 1) if it doubles time."""
        first = stream is None or stream.take(self) is None
        if stream is not None:
            stream.keep(self, x[:, :, :0])  # only that there was a chunk
        y = depth_to_space(self.proj(x), self.factor)
        return y[:, :, self.factor[0] - 1 :] if first else y
