"""One pass of a model over a video of any length and size, as a plan says: chunks or windows, and tiles."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from causalvae.models.base import Posterior
from causalvae.models.build import Model
from causalvae.models.diffusers import DiffusersVAE
from causalvae.models.stream import DecodeStream, EncodeStream, Streamable
from causalvae.tiles import BlendedTiles, ExactTiles, Sample, SeamError, Size, Tally
from causalvae.windows import Windows

Output = TypeVar("Output")
Output_co = TypeVar("Output_co", covariant=True)


@dataclass(frozen=True, kw_only=True)
class CodingPlan:
    """How a video is cut.

    chunk: frames of one push that keep memory in the budget; the coders cut longer pieces. tile: height and
    width of a tile in pixels, None for whole frames. overlap: of blended tiles, in pixels, None for exact
    ones. window: frames of a window of a video that is not streamed, of which `shared` are those of its
    neighbour. exact: what comes out equals the full pass. notes: warnings for the user. num_bytes: predicted
    memory beside the weights, extra_work: work that tiles add, in parts of the whole; None if not asked for.
    """

    chunk: int
    tile: Size | None = None
    overlap: Size | None = None
    window: int | None = None
    shared: int | None = None
    notes: tuple[str, ...] = ()
    num_bytes: int | None = None
    extra_work: float | None = None

    @property
    def exact(self) -> bool:
        """Whether what comes out equals the full pass."""
        return self.window is None and self.overlap is None

    def facts(self) -> dict[str, Any]:  # Any: JSON
        """For JSON: what is not there is left out."""
        named = {
            "chunk": self.chunk,
            "tile": self.tile,
            "tile_overlap": self.overlap,
            "window": self.window,
            "window_overlap": self.shared,
            "predicted_bytes": self.num_bytes,
            "extra_work": self.extra_work,
        }
        there = {name: value for name, value in named.items() if value is not None}
        return {"exact": self.exact, **there, "notes": list(self.notes)}


class Coder(Protocol[Output_co]):
    """One pass over one video, or over several of one size side by side."""

    def push(self, piece: Tensor) -> Output_co | None:
        """The next piece along t, of any length >= 1; what is certain by now, or None if nothing is."""
        ...

    def close(self) -> Output_co | None:
        """What was still held back; None if nothing was."""
        ...

    @property
    def seams(self) -> SeamError | None:
        """Disagreement of overlapping neighbours so far; None where nothing overlapped."""
        ...


def encoder(vae: Model, plan: CodingPlan, *, sample: Sample | None = None) -> Coder[Posterior]:
    """Takes b 3 t h w in [-1, 1], h and w multiples of the spatial factor; gives posteriors.

    At the end the last frame is repeated to fill the latent frame. sample: for predictions.
    """
    tally, geometry = Tally(), vae.geometry
    frames = _frames(vae, plan, tally=tally, sample=sample)
    if plan.window is None or plan.shared is None:
        return _Pass(EncodeStream(frames), plan.chunk, _joined, tally, None, "latent")
    certain = isinstance(vae, DiffusersVAE) and vae.certain

    def run(x: Tensor) -> Tensor:
        posterior = frames.encode(x)
        return torch.cat([posterior.mean, posterior.logvar], dim=1)

    windows = Windows(
        run=run,
        wrap=lambda moments: Posterior(
            moments[:, : geometry.channels], moments[:, geometry.channels :], certain
        ),
        each_in=geometry.temporal,
        each_out=1,
        judged=geometry.channels,
        latents=geometry.latent_frames(plan.window),
        overlap=geometry.latent_frames(plan.shared),
        group=geometry.group,
    )
    return _Pass(windows, plan.chunk, _joined, tally, windows.tally, "latent")


def decoder(vae: Model, plan: CodingPlan, *, sample: Sample | None = None) -> Coder[Tensor]:
    """Takes latents b c k h w; gives frames b 3 t h w, unclamped. sample: for predictions."""
    tally, geometry = Tally(), vae.geometry
    frames = _frames(vae, plan, tally=tally, sample=sample)
    most = max(1, plan.chunk // geometry.temporal)
    if plan.window is None or plan.shared is None:
        return _Pass(DecodeStream(frames), most, _along_time, tally, None, "8-bit levels")
    windows = Windows(
        run=frames.decode,
        wrap=lambda x: x,
        each_in=1,
        each_out=geometry.temporal,
        judged=3,
        latents=geometry.latent_frames(plan.window),
        overlap=geometry.latent_frames(plan.shared),
        group=geometry.group,
    )
    return _Pass(windows, most, _along_time, tally, windows.tally, "8-bit levels")


def answers(coder: Coder[Output], pieces: Iterable[Tensor]) -> Iterator[Output]:
    """What a coder makes of a video that comes in pieces, as soon as it is certain and to the end."""
    for piece in pieces:
        made = coder.push(piece)
        if made is not None:
            yield made
    made = coder.close()
    if made is not None:
        yield made


class _Passage(Protocol[Output_co]):
    def push(self, x: Tensor, /) -> Output_co | None: ...
    def close(self) -> Output_co | None: ...


@dataclass
class _Pass(Generic[Output]):
    """A stream or windows, in pieces of at most so many frames, or latent frames."""

    passage: _Passage[Output]
    most: int
    join: Callable[[list[Output]], Output]
    space: Tally
    time: Tally | None
    unit: Any  # of SeamError

    def push(self, piece: Tensor) -> Output | None:
        made = [self.passage.push(each) for each in piece.split(self.most, dim=2)]
        there = [each for each in made if each is not None]
        return self.join(there) if there else None

    def close(self) -> Output | None:
        return self.passage.close()

    @property
    def seams(self) -> SeamError | None:
        space = self.space.result(unit=self.unit)
        time = None if self.time is None else self.time.result(unit=self.unit)
        return None if space is None and time is None else SeamError(unit=self.unit, time=time, space=space)


def _frames(vae: Model, plan: CodingPlan, *, tally: Tally, sample: Sample | None) -> Streamable:
    """The model over frames of any size."""
    if plan.tile is None:
        return vae
    if plan.overlap is not None:
        return BlendedTiles(vae, plan.tile, plan.overlap, tally, sample)
    assert not isinstance(vae, DiffusersVAE)
    return ExactTiles(vae, tile=plan.tile, sample=sample)


def _along_time(pieces: list[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)


def _joined(pieces: list[Posterior]) -> Posterior:
    mean, logvar = ([getattr(each, name) for each in pieces] for name in ("mean", "logvar"))
    return Posterior(_along_time(mean), _along_time(logvar), pieces[0].certain)
