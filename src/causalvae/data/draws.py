"""What a run would draw from a dataset: how often, from what, and what it does to clips. Arithmetic only."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from causalvae.data.clips import ClipPlan
from causalvae.data.survey import VideoFacts


@dataclass(frozen=True, kw_only=True)
class ShapeDraws:
    """Clips of one shape. span: frames of a video that a clip reaches over. short: videos with fewer.

    upscaled: videos smaller than the clip, which are blown up to cover it. starts: different clips by where
    they begin. apart: clips that share no frame.
    """

    frames: int
    height: int
    width: int
    span: int
    short: int
    upscaled: int
    starts: int
    apart: int


@dataclass(frozen=True, kw_only=True)
class Draws:
    """A whole run. passes: over the dataset, broken videos counted, since another takes their turn.

    fewest, most: clips from a video that is neither broken nor too short, if its turns alone count.
    """

    steps: int
    batch: int
    clips: int
    videos: int
    usable: int
    passes: float
    fewest: int
    most: int
    short_videos: str
    shapes: tuple[ShapeDraws, ...]


def draws(facts: Sequence[VideoFacts], plan: ClipPlan, *, videos: int, steps: int) -> Draws:
    """What so many steps draw. facts: of the videos that can be read. videos: all, broken ones too."""
    clips = steps * plan.batch
    return Draws(
        steps=steps,
        batch=plan.batch,
        clips=clips,
        videos=videos,
        usable=len(facts),
        passes=clips / videos,
        fewest=clips // videos,
        most=math.ceil(clips / videos),
        short_videos=plan.short_videos,
        shapes=tuple(_of_shape(facts, plan, shape=shape) for shape in plan.shapes()),
    )


def _of_shape(
    facts: Sequence[VideoFacts], plan: ClipPlan, *, shape: tuple[int, tuple[int, int]]
) -> ShapeDraws:
    frames, (height, width) = shape
    span = (frames - 1) * plan.stride + 1
    long = [each for each in facts if each.frames >= span]
    return ShapeDraws(
        frames=frames,
        height=height,
        width=width,
        span=span,
        short=len(facts) - len(long),
        upscaled=sum(each.height < height or each.width < width for each in facts),
        starts=sum(each.frames - span + 1 for each in long),
        apart=sum(each.frames // span for each in long),
    )
