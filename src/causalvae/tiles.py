"""Frames that do not fit: tiles that give what the whole frame gives, and tiles that are blended.

Exact tiles go through a network stage by stage. Each tile takes as much around it as its stage sees, and a
frame is put together again after each stage, so that what is computed twice stays narrow. Blended tiles go
through the whole network alone, and neighbours that overlap are mixed.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Literal

import torch
from torch import Tensor

from causalvae.geometry import Geometry, Span, cuts, overlapping_cuts
from causalvae.models.base import Posterior
from causalvae.models.causalvae import CausalVAE
from causalvae.models.stages import Stage, Tensors
from causalvae.models.stream import Stream, Streamable
from causalvae.models.wfvae import WFVAE
from causalvae.video import at_least_fp32, to_levels

Size = tuple[int, int]  # height, width


class ExactTiles:
    """A model run tile by tile: what comes out equals the full pass. Stages with attention see whole frames.

    tile: in pixels, multiples of the spatial factor, of the stage that has the pixels. Tiles of other stages
    have as many positions, so they cover more pixels.
    """

    def __init__(self, vae: CausalVAE | WFVAE, *, tile: Size) -> None:
        self.geometry = vae.geometry
        self._encode = _in_tiles(vae.encode_stages(), tile=tile, scale=1)
        self._decode = _in_tiles(vae.decode_stages(), tile=tile, scale=vae.geometry.spatial)

    def encode(self, x: Tensor, stream: Stream | None = None) -> Posterior:
        """x: b 3 t h w in [-1, 1], h and w multiples of the spatial factor."""
        return Posterior.of_moments(_through(self._encode, x, stream))

    def decode(self, z: Tensor, stream: Stream | None = None) -> Tensor:
        """z: b c k h w -> b 3 t h w, unclamped."""
        return _through(self._decode, z, stream)


@dataclass(frozen=True)
class _TiledStage:
    """A stage, and the most positions of its output that a tile may have."""

    stage: Stage
    most: Size

    def run(self, tensors: Tensors, stream: Stream | None) -> Tensors:
        """What the stage makes of whole frames."""
        sides = tuple(side // self.stage.down * self.stage.up for side in tensors[0].shape[3:])
        if not self.stage.local or all(side <= most for side, most in zip(sides, self.most, strict=True)):
            return self.stage.run(tensors, stream)
        rows, columns = (cuts(side, most) for side, most in zip(sides, self.most, strict=True))
        whole: Tensors = ()
        for tile in product(rows, columns):
            made = self._tile(tensors, tile, None if stream is None else stream.part((self, tile)))
            whole = whole or tuple(each.new_empty(*each.shape[:3], *sides) for each in made)
            for frame, part in zip(whole, made, strict=True):
                _at(frame, tile).copy_(part)
        return whole

    def _tile(self, tensors: Tensors, tile: tuple[Span, Span], stream: Stream | None) -> Tensors:
        stage, sides = self.stage, tensors[0].shape[3:]
        needed = [stage.needs(*span) for span in tile]
        rows, columns = (
            (max(0, start), min(side, stop)) for (start, stop), side in zip(needed, sides, strict=True)
        )
        made = stage.run(tuple(_at(each, (rows, columns)) for each in tensors), stream)
        top, left = (first // stage.down * stage.up for first, _ in (rows, columns))
        (first, last), (left_column, right_column) = tile
        inside = (first - top, last - top), (left_column - left, right_column - left)
        return tuple(_at(each, inside) for each in made)


def _in_tiles(stages: Sequence[Stage], *, tile: Size, scale: int) -> list[_TiledStage]:
    """scale: pixels along an edge of the first input's positions."""
    scales = [scale]
    for stage in stages:
        scales.append(scales[-1] * stage.down // stage.up)
    finest = [stage.finest(before) for stage, before in zip(stages, scales, strict=False)]
    smallest = min(finest)
    return [
        _TiledStage(stage, (tile[0] * fine // smallest // after, tile[1] * fine // smallest // after))
        for stage, fine, after in zip(stages, finest, scales[1:], strict=True)
    ]


def _through(stages: Sequence[_TiledStage], x: Tensor, stream: Stream | None) -> Tensor:
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

    @property
    def geometry(self) -> Geometry:
        """That of the model."""
        return self.vae.geometry

    def encode(self, x: Tensor, stream: Stream | None = None) -> Posterior:
        """x: b 3 t h w in [-1, 1], h and w multiples of the spatial factor."""
        factor, certain = self.geometry.spatial, False

        def made(tile: tuple[Span, Span]) -> Tensor:
            nonlocal certain
            (top, bottom), (left, right) = tile
            piece = x[..., top * factor : bottom * factor, left * factor : right * factor]
            posterior = self.vae.encode(piece, None if stream is None else stream.part(tile))
            certain = posterior.certain
            return torch.cat([posterior.mean, posterior.logvar], dim=1)

        sides = (x.shape[3] // factor, x.shape[4] // factor)
        mean, logvar = self._blend(made, sides, scale=1, judged=self.geometry.channels).chunk(2, dim=1)
        return Posterior(mean, logvar, certain)

    def decode(self, z: Tensor, stream: Stream | None = None) -> Tensor:
        """z: b c k h w -> b 3 t h w, unclamped."""

        def made(tile: tuple[Span, Span]) -> Tensor:
            return self.vae.decode(_at(z, tile), None if stream is None else stream.part(tile))

        return self._blend(made, (z.shape[3], z.shape[4]), scale=self.geometry.spatial, judged=3)

    def _blend(
        self, made: Callable[[tuple[Span, Span]], Tensor], sides: Size, *, scale: int, judged: int
    ) -> Tensor:
        """made: what the model gives for a tile of the latent's positions, of which there are `sides`.

        scale: positions of that for each of the latent. judged: channels that the tally compares.
        """
        whole = weights = None
        for tile in self._tiles(sides):
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

    def _tiles(self, sides: Size) -> Iterator[tuple[Span, Span]]:
        factor = self.geometry.spatial
        rows, columns = (
            overlapping_cuts(side, most // factor, overlap=self._over(axis))
            for axis, (side, most) in enumerate(zip(sides, self.tile, strict=True))
        )
        return product(rows, columns)

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


def _at(x: Tensor, tile: tuple[Span, Span]) -> Tensor:
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
