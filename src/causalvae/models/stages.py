"""A network in stages, cut where its resolution changes, and what a stage sees around a position.

A stage whose layers look at no more than their neighbours can be run tile by tile. With as much around each
tile as the stage sees, what comes out is what the whole frame gives; the layers say how much that is.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

from torch import Tensor, nn

from causalvae.models.convolution import Conv
from causalvae.models.layers import (
    CausalConv3d,
    FrameAttention,
    FrameConv,
    FrameDownsample,
    ResnetBlock,
    ShuffleDown,
    ShuffleUp,
    SpatialUpsample,
    TimeDownsample,
    TimeUpsample,
)
from causalvae.models.resampling import (
    CausalDownsample,
    CausalUpsample,
    FrameUpsample,
    TimePool,
    TimeStretch,
)
from causalvae.models.stream import Stream
from causalvae.models.wavelet import Haar, InverseHaar

Tensors = tuple[Tensor, ...]  # each b c t h w, all of one height and width


class Window(NamedTuple):
    """Output i of a layer sees inputs from stride * i - before, kernel of them, along height and width."""

    kernel: int
    stride: int = 1
    before: int = 0

    def needs(self, start: int, stop: int) -> tuple[int, int]:
        """The inputs that outputs start...stop - 1 see: first, and one behind the last."""
        return self.stride * start - self.before, self.stride * (stop - 1) - self.before + self.kernel


class Spread(NamedTuple):
    """Output i of a layer sees input i // factor, and a neighbour of it if it interpolates (factor 2)."""

    factor: int
    interpolates: bool = False

    def needs(self, start: int, stop: int) -> tuple[int, int]:
        """The inputs that outputs start...stop - 1 see: first, and one behind the last."""
        if self.interpolates:  # 2 j sees j - 1 and j, 2 j + 1 sees j and j + 1
            return (start - 1) // 2, stop // 2 + 1
        return start // self.factor, (stop - 1) // self.factor + 1


Look = Window | Spread


@dataclass(frozen=True)
class Stage:
    """Part of a network. paths: what is on each way through it. local: it can be run tile by tile."""

    run: Callable[[Tensors, Stream | None], Tensors]
    paths: tuple[tuple[Look, ...], ...]
    local: bool

    @property
    def down(self) -> int:
        """Inputs along height for one output; 1 where it does not halve."""
        return math.prod(look.stride for look in self.paths[0] if isinstance(look, Window))

    @property
    def up(self) -> int:
        """Outputs along height for one input; 1 where it does not double."""
        return math.prod(look.factor for look in self.paths[0] if isinstance(look, Spread))

    def needs(self, start: int, stop: int) -> tuple[int, int]:
        """The inputs that outputs start...stop - 1 see, whole groups of `down`; may reach over the edges."""
        starts, stops = zip(*(_needs(path, start, stop) for path in self.paths), strict=True)
        return min(starts) // self.down * self.down, -(-max(stops) // self.down) * self.down

    def finest(self, scale: int) -> int:
        """Pixels along an edge of the smallest positions whose neighbours it looks at.

        scale: those of its input.
        """
        return min((found for path in self.paths for found in _scales(path, scale)), default=scale)

    def then(self, other: "Stage") -> "Stage":
        """Both as one."""

        def run(tensors: Tensors, stream: Stream | None) -> Tensors:
            return other.run(self.run(tensors, stream), stream)

        paths = tuple(before + after for before, after in product(self.paths, other.paths))
        return Stage(run, paths, self.local and other.local)


def stage(run: Callable[[Tensors, Stream | None], Tensors], *ways: Sequence[nn.Module | Look]) -> Stage:
    """A stage of layers. ways: the layers on each way through it, first to last."""
    modules = [layer for way in ways for layer in way if isinstance(layer, nn.Module)]
    local = not any(isinstance(inner, FrameAttention) for module in modules for inner in module.modules())
    return Stage(run, tuple(tuple(look for layer in way for look in looks(layer)) for way in ways), local)


def row(run: Callable[[Tensor, Stream | None], Tensor], way: Sequence[nn.Module | Look]) -> Stage:
    """A stage of one way, from one tensor to one tensor."""
    return stage(lambda tensors, stream: (run(tensors[0], stream),), way)


def looks(layer: nn.Module | Look) -> tuple[Look, ...]:
    """What a layer sees of its input along height and width. A shortcut sees less than what it passes."""
    return (layer,) if isinstance(layer, Window | Spread) else LOOKS[type(layer)](layer)


def _convolved(layer: Any) -> tuple[Look, ...]:  # Any: a layer that has its convolution as `conv`
    conv = layer.conv
    return looks(conv) if isinstance(conv, CausalConv3d | FrameConv) else _sees(conv)


def _sees(conv: Conv) -> tuple[Look, ...]:
    return (Window(conv.kernel[-1], conv.stride[-1], conv.padding[-1]),)


# Any: a layer of the type before it.
LOOKS: dict[type[nn.Module], Callable[[Any], tuple[Look, ...]]] = {
    CausalConv3d: _convolved,
    FrameConv: lambda layer: (Window(layer.weight.shape[-1], layer.stride, layer.padding),),
    ResnetBlock: lambda layer: looks(layer.conv1) + looks(layer.conv2),
    TimeDownsample: _convolved,
    TimeUpsample: _convolved,
    FrameDownsample: _convolved,
    CausalDownsample: _convolved,
    SpatialUpsample: lambda layer: (Spread(2), *_convolved(layer)),
    FrameUpsample: lambda layer: (Spread(2), *_convolved(layer)),
    CausalUpsample: lambda layer: (Spread(2, interpolates=True), *_convolved(layer)),
    ShuffleDown: lambda _: (Window(2, 2),),
    Haar: lambda _: (Window(2, 2),),
    ShuffleUp: lambda _: (Spread(2),),
    InverseHaar: lambda _: (Spread(2),),
    TimePool: lambda _: (),
    TimeStretch: lambda _: (),
    FrameAttention: lambda _: (),  # whose stage runs on whole frames
}


def _needs(path: Sequence[Look], start: int, stop: int) -> tuple[int, int]:
    for look in reversed(path):
        start, stop = look.needs(start, stop)
    return start, stop


def _scales(path: Sequence[Look], scale: int) -> list[int]:
    """Pixels along an edge of the positions whose neighbours each layer looks at."""
    found = []
    for look in path:
        if isinstance(look, Window):
            found += [scale] if look.kernel > look.stride else []
            scale *= look.stride
        else:
            scale //= look.factor
    return found
