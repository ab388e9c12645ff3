"""A model over videos of any length and any size, in constant memory.

`plan_coding` decides once how videos of a size are cut; `encoder` and `decoder` then take one video in pieces
of any length. A model that streams gives what the full pass gives.
"""

from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

from torch import Tensor

from causalvae.errors import ConfigError
from causalvae.models.base import Posterior
from causalvae.models.build import Model
from causalvae.models.stream import DecodeStream, EncodeStream

CHUNK = 16  # frames of a chunk where memory is no question

Output = TypeVar("Output", covariant=True)


@dataclass(frozen=True, kw_only=True)
class SeamError:
    """How far neighbours disagree where they overlap, before they are blended."""

    def facts(self) -> dict[str, Any]:  # Any: JSON
        """For JSON."""
        return {}


@dataclass(frozen=True, kw_only=True)
class CodingPlan:
    """How a video is cut.

    chunk: frames of one push that keep memory in the budget. tile: height and width of a tile in pixels, None
    for whole frames. exact: what comes out equals the full pass. notes: warnings for the user.
    """

    chunk: int
    tile: tuple[int, int] | None
    exact: bool
    notes: tuple[str, ...]

    def facts(self) -> dict[str, Any]:  # Any: JSON
        """For JSON."""
        return {"chunk": self.chunk, "tile": self.tile and list(self.tile), "exact": self.exact}


class Coder(Protocol[Output]):
    """One pass over one video, or over several of one size side by side."""

    def push(self, piece: Tensor) -> Output | None:
        """The next piece along t, of any length >= 1; what is certain by now, or None if nothing is."""
        ...

    def close(self) -> Output | None:
        """What was still held back; None if nothing was."""
        ...

    @property
    def seams(self) -> SeamError | None:
        """Disagreement of overlapping neighbours so far; None where nothing overlaps."""
        ...


@dataclass
class _Whole:
    """Whole frames through a stream, which has no seams."""

    stream: Any  # EncodeStream or DecodeStream

    def push(self, piece: Tensor) -> Any:
        """The next piece."""
        return self.stream.push(piece)

    def close(self) -> Any:
        """The end."""
        return self.stream.close()

    @property
    def seams(self) -> SeamError | None:
        """None."""
        return None


def plan_coding(
    vae: Model,
    *,
    height: int,
    width: int,
    tile: Literal["auto", "off"] | tuple[int, int],
    budget: int | None,
    chunk: int | None = None,
) -> CodingPlan:
    """How videos of this size are cut, for encoding and for decoding.

    height, width: in pixels, multiples of the spatial factor. budget: bytes that may be taken beside the
    weights, None for no limit. chunk: frames of a chunk, None to choose.
    """
    del height, width, tile, budget
    if vae.why_not_streamable:
        raise ConfigError(f"this model can't stream: {vae.why_not_streamable}")
    return CodingPlan(chunk=chunk or CHUNK, tile=None, exact=True, notes=())


def encoder(vae: Model, plan: CodingPlan) -> Coder[Posterior]:
    """Takes b 3 t h w in [-1, 1], h and w multiples of the spatial factor; the last frame fills the last latent.

    Gives posteriors of the latent frames that are complete.
    """
    del plan
    return _Whole(EncodeStream(vae))


def decoder(vae: Model, plan: CodingPlan) -> Coder[Tensor]:
    """Takes latents b c k h w; gives frames b 3 t h w, unclamped."""
    del plan
    return _Whole(DecodeStream(vae))
