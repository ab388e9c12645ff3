"""The command `encode`: videos of a source to a set of latents, part by part, in constant memory.

What is written is a function of the videos, the model and the flags. A process that was killed goes on behind
the last video that it finished, and what comes out is bitwise what an uninterrupted one makes.
"""

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from causalvae import rng
from causalvae.bars import progress_bars
from causalvae.coders import CodingPlan, encoder
from causalvae.coding import plan_coding
from causalvae.data.captions import caption_record
from causalvae.data.readahead import in_turn
from causalvae.data.sources import ClipSource, VideoRef
from causalvae.errors import VideoError
from causalvae.flags import printable
from causalvae.footage import Cut, Footage, take
from causalvae.latentfiles import NUMBERS, TENSORS, DtypeName, Place, Record, Sample
from causalvae.latentset import Merged, PartRecords, merge, moments_to_record, open_set
from causalvae.models.base import Posterior
from causalvae.models.build import Model
from causalvae.moments import ChannelMoments
from causalvae.video import pad_size, to_model

Store = Literal["mean", "moments", "sample"]
Item = Footage | Tensor


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How latents are made. store: what is kept of a posterior. seed: of samples. column: of captions.

    tile, budget: as `plan_coding` has them.
    """

    cut: Cut
    store: Store = "mean"
    dtype: DtypeName = "fp16"
    seed: int = 0
    column: str | None = None
    tile: Literal["auto", "off"] | tuple[int, int] = "auto"
    budget: int | None = None


@dataclass(frozen=True, kw_only=True)
class Share:
    """Which parts of a set one process makes: those whose number leaves this remainder."""

    number: int = 0
    of: int = 1


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """What came of it. done, broken: videos of this process. missing: parts that others have to make.

    merged: the whole set, if its index was written.
    """

    done: int
    broken: list[Record]
    missing: int
    merged: Merged | None
    notes: tuple[str, ...]


@dataclass(kw_only=True)
class Maker:
    """A model that makes latents by a recipe. model: SHA-256 of its weights.

    plans: how frames of each size are cut. notes: of the plans.
    """

    vae: Model
    recipe: Recipe
    model: str
    plans: dict[tuple[int, int], CodingPlan] = field(default_factory=dict[tuple[int, int], CodingPlan])
    notes: dict[str, None] = field(default_factory=dict[str, None])

    def plan(self, footage: Footage) -> CodingPlan:
        """How this footage is cut. A clip goes through the model whole, as in training, if there is room."""
        height, width = map(self.vae.geometry.padded_size, footage.size)
        frames = footage.cut.frames
        if (height, width) not in self.plans:
            plan = plan_coding(
                self.vae,
                height=height,
                width=width,
                tile=self.recipe.tile,
                budget=self.recipe.budget,
                chunk=None if frames is None else self.vae.geometry.padded_frames(frames),
            )
            self.plans[height, width] = plan
        return self.plans[height, width]


def encode_videos(
    source: ClipSource, out: Path, *, facts: Record, maker: Maker, share: Share, workers: int
) -> Encoded:
    """Make the parts of a set that are this process's share and are not there yet; the index with the last.

    facts: what the set says of itself. workers: threads that decode ahead. ConfigError if the folder holds
    something else.
    """
    found, notes = open_set(out, facts)
    if found.facts["memory_bytes"] != maker.recipe.budget:  # another would cut videos in another way
        maker = replace(maker, recipe=replace(maker.recipe, budget=found.facts["memory_bytes"]))
    mine = [part for part in found.missing_parts() if part % share.of == share.number]
    broken: list[Record] = []
    done = 0
    with progress_bars() as track:
        advance = track("encoding", sum(len(found.videos_of(part)) for part in mine))
        for part in mine:
            with found.held(part):
                made = PartRecords(found, part)
                advance(made.done)
                numbers = found.videos_of(part)[made.done :]
                with closing(
                    _make_part(made, source, numbers=numbers, maker=maker, workers=workers)
                ) as records:
                    for record in records:
                        broken += [record] if "reason" in record else []
                        done += 1
                        advance(1)
    missing = len(found.missing_parts())
    return Encoded(
        done=done,
        broken=broken,
        missing=missing,
        merged=merge(found) if missing == 0 else None,
        notes=(*notes, *maker.notes),
    )


def _make_part(
    made: PartRecords, source: ClipSource, *, numbers: range, maker: Maker, workers: int
) -> Generator[Record]:
    """Make what is missing of a part, these videos; the record of each when it is done."""
    videos = [source[number] for number in numbers]
    takes = (partial(take, video, maker.recipe.cut) for video in videos)
    try:
        with closing(in_turn(takes, workers=workers)) as turns:
            for items, number, video in zip(turns, numbers, videos, strict=True):
                record = _make(video, items, number=number, made=made, maker=maker)
                made.add(record)
                yield record
        made.finish()
    finally:
        made.files.close()


def _make(video: VideoRef, items: Iterator[Item], *, number: int, made: PartRecords, maker: Maker) -> Record:
    """Encode one video: its record, with its latents on the disk, or with the reason why there are none."""
    try:
        lines, moments = _encode(video, items, number=number, made=made, maker=maker)
    except VideoError as error:
        made.files.rollback()
        return {"number": number, "video": video.id, "path": video.path, "reason": str(error)}
    kept = made.files.commit()
    return {"number": number, **kept, "moments": moments_to_record(moments), "samples": lines}


def _encode(
    video: VideoRef, items: Iterator[Item], *, number: int, made: PartRecords, maker: Maker
) -> tuple[list[Record], ChannelMoments]:
    """Write the latents of one video: their lines of the index, and the moments of their numbers."""
    recipe, geometry = maker.recipe, maker.vae.geometry
    footage = next(items)
    assert isinstance(footage, Footage)
    beside = {
        "video": video.id,
        "number": number,
        "model": maker.model,
        **caption_record(video, column=recipe.column),
    }
    channels, frames, h, w = geometry.latent_shape(footage.frames, *footage.size)
    samples = [
        Sample(
            key=f"{number:08d}" if recipe.cut.frames is None else f"{number:08d}-{place:04d}",
            names=TENSORS[recipe.store],
            shape=(frames, channels, h, w),
            dtype=recipe.dtype,
            record=beside | footage.record(place),
        )
        for place in range(len(footage.starts))
    ]
    places = made.files.begin(samples)
    moments = ChannelMoments.none(channels)
    lines: list[Record] = []
    for group in footage.groups():
        writing = Writing(recipe, video.id, [places[i] for i in group])
        seams = _through(maker, footage, items, writing=writing)
        moments = moments.merged(writing.moments)
        lines += [made.line(places[i]) | seams for i in group]
    return lines, moments


@torch.inference_mode()
def _through(maker: Maker, footage: Footage, items: Iterator[Item], *, writing: "Writing") -> Record:
    """Push the pixels of one group through the model. What the index should say of how that was done."""
    plan = maker.plan(footage)
    coder = encoder(maker.vae, plan)
    device = maker.vae.last_layer.get_parameter("weight").device
    left = footage.frames
    while left > 0:
        pixels = next(items)
        assert isinstance(pixels, Tensor)
        writing.add(coder.push(pad_size(to_model(pixels.to(device)), maker.vae.geometry)))
        left -= pixels.shape[2]
    writing.add(coder.close())
    assert writing.at == writing.places[0].sample.shape[0], "as many latent frames as were announced"
    if plan.exact or coder.seams is not None:  # a clip that fits into one window is no matter of blending
        maker.notes |= dict.fromkeys(plan.notes)
    return {} if coder.seams is None else {"coding": plan.facts(), "seams": coder.seams.facts()}


class Writing:
    """Latents of clips that are encoded side by side, frame by frame to their places.

    at: how many latent frames are written. moments: of their numbers, as they are stored.
    """

    def __init__(self, recipe: Recipe, video: str, places: Sequence[Place]) -> None:
        self.at, self.places = 0, places
        self.moments = ChannelMoments.none(places[0].sample.shape[1])
        self._recipe, self._video = recipe, video

    def add(self, posterior: Posterior | None) -> None:
        """The next latent frames, b c k h w. VideoError if a number is not finite."""
        if posterior is None:
            return
        numbers = NUMBERS[self._recipe.dtype][1]
        stored = {name: each.to(numbers) for name, each in self._tensors(posterior).items()}
        for name, each in stored.items():
            if not bool(torch.isfinite(each).all()):
                raise VideoError(
                    f"{printable(self._video)}: its latents are not finite numbers in {self._recipe.dtype}"
                )
            for place, latent in zip(self.places, each, strict=True):
                place.write(name, latent.transpose(0, 1), at=self.at)  # c k h w -> k c h w
        first, *rest = (each.transpose(0, 1).flatten(1) for each in stored.values())  # c (b k h w)
        noise = rest[0].double().exp() if rest else None
        self.moments = self.moments.merged(ChannelMoments.of(first, noise=noise))
        self.at += posterior.mean.shape[2]

    def _tensors(self, posterior: Posterior) -> dict[str, Tensor]:
        """What is kept of a posterior, fp32 on the CPU."""
        mean, logvar = posterior.mean.float().cpu(), posterior.logvar.float().cpu()
        match self._recipe.store:
            case "mean":
                return {"mean": mean}
            case "moments":
                return {"mean": mean, "logvar": logvar}
            case "sample":
                noise = torch.stack([self._noise(place, mean) for place in self.places])
                return {"sample": Posterior(mean, logvar, posterior.certain).sample(noise)}

    def _noise(self, place: Place, mean: Tensor) -> Tensor:
        """c k h w: of each latent frame by its own key, so that neither order nor pieces matter."""
        record = place.sample.record
        shape = (mean.shape[1], *mean.shape[3:])
        keys = ("latent", self._recipe.seed, self._video, int(record["start"]), int(record["stride"]))
        frames = range(self.at, self.at + mean.shape[2])
        return torch.stack([rng.normal(shape, rng.key(*keys, frame)) for frame in frames], dim=1)
