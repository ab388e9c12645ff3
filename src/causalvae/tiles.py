"""Frames that do not fit: tiles that give what the whole frame gives, and tiles that are blended.

Exact tiles go through a network stage by stage. Each tile takes as much around it as its stage sees, and a
frame is put together again after each stage, so that what is computed twice stays narrow. Blended tiles go
through the whole network alone, and neighbours that overlap are mixed.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from causalvae.geometry import Geometry, Span, cuts, overlapping_cuts
from causalvae.models.base import Posterior
from causalvae.models.causalvae import CausalVAE
from causalvae.models.stages import Stage, Tensors
from causalvae.models.stream import Stream, Streamable
from causalvae.models.wfvae import WFVAE
from causalvae.video import at_least_fp32, to_levels

SMALL_LATENT = 8  # positions along an edge of the latent on which work is counted
Size = tuple[int, int]  # height, width
Tile = tuple[Span, Span]  # rows, columns


class Sample:
    """One tile stands for all of its kind, to predict memory on the meta device in little time."""

    def __init__(self) -> None:
        self._others: dict[Stream, float] = {}

    def one_of(self, tiles: Sequence[Tile], *, areas: Sequence[int], stream: Stream | None) -> Tile:
        """The largest tile. Its part of the stream counts for all of them, by their areas."""
        area, tile = max(zip(areas, tiles, strict=True))
        if stream is not None:
            self._others[stream.part(tile)] = sum(areas) / area - 1
        return tile

    def missing_bytes(self) -> int:
        """What the tiles that were not run would keep."""
        return int(sum(share * stream.num_bytes for stream, share in self._others.items()))


class ExactTiles:
    """A model run tile by tile: what comes out equals the full pass. Stages with attention see whole frames.

    tile: in pixels, multiples of the spatial factor, of the stage that has the pixels. Tiles of other stages
    have as many positions, so they cover more pixels.
    """

    def __init__(self, vae: CausalVAE | WFVAE, *, tile: Size, sample: Sample | None = None) -> None:
        self.vae, self.tile, self.geometry = vae, tile, vae.geometry
        self._encode = in_tiles(vae.encode_stages(), tile=tile, scale=1, sample=sample)
        self._decode = in_tiles(vae.decode_stages(), tile=tile, scale=vae.geometry.spatial, sample=sample)

    def encode(self, x: Tensor, stream: Stream | None = None) -> Posterior:
        """x: b 3 t h w in [-1, 1], h and w multiples of the spatial factor."""
        return Posterior.of_moments(_through(self._encode, x, stream))

    def decode(self, z: Tensor, stream: Stream | None = None) -> Tensor:
        """z: b c k h w -> b 3 t h w, unclamped."""
        return _through(self._decode, z, stream)

    def times(self, size: Size) -> float:
        """Work on frames of this size in pixels over that on whole ones, of encoding and decoding together.

        The share of each stage in the work is counted on a small clip. The model is one on the meta device.
        """
        geometry = self.geometry
        edge = SMALL_LATENT * geometry.spatial
        x = torch.empty(1, 3, 1 + geometry.temporal, edge, edge, device="meta")
        z = torch.empty(1, geometry.channels, 2, SMALL_LATENT, SMALL_LATENT, device="meta")
        sides = (size[0] // geometry.spatial, size[1] // geometry.spatial)
        ways = ((self._encode, x, size), (self._decode, z, sides))
        work = [each for stages, start, sides in ways for each in _work(stages, start, sides)]
        return sum(whole * times for whole, times in work) / sum(whole for whole, _ in work)


@dataclass(frozen=True)
class TiledStage:
    """A stage, and the most positions of its output that a tile may have."""

    stage: Stage
    most: Size
    sample: Sample | None = None

    def run(self, tensors: Tensors, stream: Stream | None) -> Tensors:
        """What the stage makes of whole frames."""
        height, width = tensors[0].shape[3:]
        tiles = self.tiles((height, width))
        if len(tiles) == 1:
            return self.stage.run(tensors, stream)
        stream = None if stream is None else stream.part(self.stage)
        if self.sample is not None:
            areas = [_area(self.needs(tile, (height, width))) for tile in tiles]
            tiles = [self.sample.one_of(tiles, areas=areas, stream=stream)]
        whole: Tensors = ()
        for tile in tiles:
            made = self._tile(tensors, tile, None if stream is None else stream.part(tile))
            whole = whole or tuple(
                each.new_empty(*each.shape[:3], *self.made((height, width))) for each in made
            )
            for frame, part in zip(whole, made, strict=True):
                _at(frame, tile).copy_(part)
        return whole

    def made(self, sides: Size) -> Size:
        """Height and width of the output of this input."""
        down, up = self.stage.down, self.stage.up
        return sides[0] // down * up, sides[1] // down * up

    def tiles(self, sides: Size) -> list[Tile]:
        """Tiles of the output, for whole frames of this input; one if the stage is not to be cut."""
        height, width = self.made(sides)
        if not self.stage.local:
            return [((0, height), (0, width))]
        return list(product(cuts(height, self.most[0]), cuts(width, self.most[1])))

    def needs(self, tile: Tile, sides: Size) -> Tile:
        """What a tile sees of an input of this size."""
        (first, last), (left, right) = (self.stage.needs(*span) for span in tile)
        return (max(0, first), min(sides[0], last)), (max(0, left), min(sides[1], right))

    def times(self, sides: Size) -> float:
        """Area that it works on for an input of this size, over that of whole frames."""
        tiles = self.tiles(sides)
        return (
            1.0
            if len(tiles) == 1
            else sum(_area(self.needs(tile, sides)) for tile in tiles) / math.prod(sides)
        )

    def _tile(self, tensors: Tensors, tile: Tile, stream: Stream | None) -> Tensors:
        height, width = tensors[0].shape[3:]
        needed = self.needs(tile, (height, width))
        made = self.stage.run(tuple(_at(each, needed) for each in tensors), stream)
        top, left = self.made((needed[0][0], needed[1][0]))
        (first, last), (left_column, right_column) = tile
        inside = (first - top, last - top), (left_column - left, right_column - left)
        return tuple(_at(each, inside) for each in made)


def _work(stages: Sequence[TiledStage], x: Tensor, sides: Size) -> Iterator[tuple[int, float]]:
    """Operations of each stage on x, and how many times over it works on an input of this size."""
    tensors: Tensors = (x,)
    for each in stages:
        with FlopCounterMode(display=False) as counter:
            tensors = each.stage.run(tensors, None)
        yield counter.get_total_flops(), each.times(sides)
        sides = each.made(sides)


def in_tiles(
    stages: Sequence[Stage], *, tile: Size, scale: int, sample: Sample | None = None
) -> list[TiledStage]:
    """The stages with sizes of their tiles.

    tile: in pixels, of the stage that has the pixels. scale: pixels along an edge of the first input's
    positions.
    """
    scales = [scale]
    for stage in stages:
        scales.append(scales[-1] * stage.down // stage.up)
    finest = [stage.finest(before) for stage, before in zip(stages, scales, strict=False)]
    smallest = min(finest)
    sizes = [
        (tile[0] * fine // smallest // after, tile[1] * fine // smallest // after)
        for fine, after in zip(finest, scales[1:], strict=True)
    ]
    return [TiledStage(stage, size, sample) for stage, size in zip(stages, sizes, strict=True)]


def _through(stages: Sequence[TiledStage], x: Tensor, stream: Stream | None) -> Tensor:
    tensors: Tensors = (x,)
    for each in stages:
        tensors = each.run(tensors, stream)
    return tensors[0]


@dataclass(frozen=True, kw_only=True)
class Disagreement:
    """What two neighbours say of the same values. mean, largest: absolute differences.

    share: the mean over the mean size of the values.
    """

    mean: float
    largest: float
    share: float


@dataclass
class Tally:
    """Disagreements so far."""

    total: float = 0.0
    size: float = 0.0
    largest: float = 0.0
    values: int = 0

    def add(self, difference: Tensor, before: Tensor, *, values: int) -> None:
        """difference: zero outside of the overlap, of which before are the values; both of any one shape."""
        self.total += float(difference.abs().sum())
        self.size += float(before.abs().sum())
        self.largest = max(self.largest, float(difference.abs().max()))
        self.values += values

    def result(self, *, unit: Literal["8-bit levels", "latent"]) -> Disagreement | None:
        """In this unit; None if nothing overlapped."""
        if self.values == 0:
            return None
        mean = self.total / self.values
        share = self.total / self.size if self.size else 0.0
        if unit == "latent":
            return Disagreement(mean=mean, largest=self.largest, share=share)
        return Disagreement(mean=to_levels(mean), largest=to_levels(self.largest), share=share)


@dataclass
class BlendedTiles:
    """A model run tile by tile, each alone, with a linear blend where neighbours overlap.

    tile, overlap: in pixels, multiples of the spatial factor. tally: how far neighbours disagree.
    """

    vae: Streamable
    tile: Size
    overlap: Size
    tally: Tally = field(default_factory=Tally)
    sample: Sample | None = None

    @property
    def geometry(self) -> Geometry:
        """That of the model."""
        return self.vae.geometry

    def encode(self, x: Tensor, stream: Stream | None = None) -> Posterior:
        """x: b 3 t h w in [-1, 1], h and w multiples of the spatial factor."""
        factor, certain = self.geometry.spatial, False

        def made(tile: Tile) -> Tensor:
            nonlocal certain
            (top, bottom), (left, right) = tile
            piece = x[..., top * factor : bottom * factor, left * factor : right * factor]
            posterior = self.vae.encode(piece, None if stream is None else stream.part(tile))
            certain = posterior.certain
            return torch.cat([posterior.mean, posterior.logvar], dim=1)

        sides = (x.shape[3] // factor, x.shape[4] // factor)
        tiles = self._tiles(sides, stream)
        moments = self._blend(made, tiles, sides=sides, scale=1, judged=self.geometry.channels)
        mean, logvar = moments.chunk(2, dim=1)
        return Posterior(mean, logvar, certain)

    def decode(self, z: Tensor, stream: Stream | None = None) -> Tensor:
        """z: b c k h w -> b 3 t h w, unclamped."""

        def made(tile: Tile) -> Tensor:
            return self.vae.decode(_at(z, tile), None if stream is None else stream.part(tile))

        sides = (z.shape[3], z.shape[4])
        return self._blend(
            made, self._tiles(sides, stream), sides=sides, scale=self.geometry.spatial, judged=3
        )

    def times(self, sides: Size) -> float:
        """Area that it works on for a latent of this size, over that of whole frames."""
        return sum(map(_area, self._cuts(sides))) / math.prod(sides)

    def _blend(
        self,
        made: Callable[[Tile], Tensor],
        tiles: Sequence[Tile],
        *,
        sides: Size,
        scale: int,
        judged: int,
    ) -> Tensor:
        """made: what the model gives for a tile of the latent's positions, of which there are `sides`.

        scale: positions of that for each of the latent. judged: channels that the tally compares.
        """
        whole = weights = None
        for tile in tiles:
            part = at_least_fp32(made(tile))
            rows, columns = ((scale * start, scale * stop) for start, stop in tile)
            height, width = (scale * side for side in sides)
            if whole is None or weights is None:
                whole = part.new_zeros(*part.shape[:3], height, width)
                weights = part.new_zeros(height, width)
            weight = _ramp(rows, height, over=self._over(0) * scale, like=part)[:, None]
            weight = weight * _ramp(columns, width, over=self._over(1) * scale, like=part)
            seen = _at(whole, (rows, columns))[:, :judged]
            self._compare(part[:, :judged], seen, _at(weights, (rows, columns)))
            _at(whole, (rows, columns)).addcmul_(part, weight)
            _at(weights, (rows, columns)).add_(weight)
        assert whole is not None
        assert weights is not None
        return whole.div_(weights)

    def _compare(self, part: Tensor, whole: Tensor, weights: Tensor) -> None:
        """Tell the tally of a tile, and of what its place holds by now: weighted sums, and their weights."""
        known = (weights > 0).to(part.dtype)
        values = int(known.sum()) * part[..., 0, 0].numel()
        if values:
            before = whole / weights.clamp(min=torch.finfo(weights.dtype).tiny)
            self.tally.add((part - before) * known, before, values=values)

    def _tiles(self, sides: Size, stream: Stream | None) -> list[Tile]:
        """Tiles of a latent of this size; one of them for a prediction."""
        tiles = self._cuts(sides)
        if self.sample is None:
            return tiles
        return [self.sample.one_of(tiles, areas=[_area(tile) for tile in tiles], stream=stream)]

    def _cuts(self, sides: Size) -> list[Tile]:
        factor = self.geometry.spatial
        rows, columns = (
            overlapping_cuts(side, most // factor, overlap=self._over(axis))
            for axis, (side, most) in enumerate(zip(sides, self.tile, strict=True))
        )
        return list(product(rows, columns))

    def _over(self, axis: int) -> int:
        """Positions of the latent in which neighbours overlap."""
        return self.overlap[axis] // self.geometry.spatial


def _ramp(span: Span, length: int, *, over: int, like: Tensor) -> Tensor:
    """Weights of the positions of a span: up from each end that is no edge of the frame, 1 inside."""
    start, stop = span
    at = torch.arange(stop - start, device=like.device, dtype=like.dtype) + 0.5
    rising = at if start > 0 else torch.full_like(at, over)
    falling = (stop - start) - at if stop < length else torch.full_like(at, over)
    return (torch.minimum(rising, falling) / over).clamp(max=1.0)


def _area(tile: Tile) -> int:
    return math.prod(stop - start for start, stop in tile)


def _at(x: Tensor, tile: Tile) -> Tensor:
    """A view of a tile: ... h w."""
    (top, bottom), (left, right) = tile
    return x[..., top:bottom, left:right]


@dataclass(frozen=True, kw_only=True)
class SeamError:
    """How far neighbours disagree where they overlap, before they are blended.

    unit: 8-bit levels for frames, numbers of the latent for latents. time: of windows, space: of tiles; None
    where nothing overlapped.
    """

    unit: Literal["8-bit levels", "latent"]
    time: Disagreement | None
    space: Disagreement | None

    def facts(self) -> dict[str, Any]:  # Any: JSON
        """For JSON."""
        facts: dict[str, Any] = {"unit": self.unit}
        for axis, found in (("time", self.time), ("space", self.space)):
            if found is not None:
                facts[axis] = {"mean": found.mean, "largest": found.largest, "share": found.share}
        return facts
