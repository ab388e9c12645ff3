"""Which clip fills a place in a batch: a function of (seed, cursor, sample) and of what the files are.

Every epoch goes through all videos once, in an order of its own. A video that can't be used is replaced by
the place's own list of substitutes. Only tries of this place and facts about files count, never what other
places or processes met before: a film damaged in its middle is used where its frames are sound, and one
that is bad as a whole is bad for everyone. So the clips are the same in every repetition, from any cursor,
with any workers. The shape of a batch is a function of its cursor.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from causalvae.data.decode import Decoder, printable
from causalvae.data.index import IndexFile
from causalvae.data.sources import ClipSource, VideoRef
from causalvae.data.transforms import flip, resize_crop
from causalvae.errors import ConfigError, VideoError
from causalvae.rng import below, key, permuted

MAX_ATTEMPTS = 1000  # videos tried for one place before the dataset is called unusable
SHORT_ATTEMPTS = 64  # videos found too short before one of them is used after all
LONGEST_REASON = 2000  # characters, so that a message between processes is written in one piece
PLACES = 1 << 32  # a crop's place is one of so many numbers in [0, 1)


Shape = tuple[int, tuple[int, int]]  # of a clip: t, (H, W)


@dataclass(frozen=True, kw_only=True)
class ClipPlan:
    """What clips look like and how they are drawn. batch: clips per cursor; size: H, W.

    stride: every n-th frame of a video. short_videos: what to do with videos that are shorter than a clip:
    `auto` repeats their last frame only if nothing longer is found, `repeat` always does, `skip` never uses
    them.
    frame_buckets, size_buckets: where given, batches take every pair of these in equal shares, instead of
    frames and size; one listed twice has two shares. image_ratio: share of batches, in [0, 1), whose clips
    are single frames. What takes one clip takes a plan of one shape, which is `plan.at(cursor)`.
    """

    frames: int
    size: tuple[int, int]
    stride: int = 1
    batch: int = 1
    seed: int = 0
    crop: Literal["random", "center"] = "random"
    flip: bool = True
    short_videos: Literal["auto", "repeat", "skip"] = "auto"
    frame_buckets: tuple[int, ...] = ()
    size_buckets: tuple[tuple[int, int], ...] = ()
    image_ratio: float = 0.0

    @property
    def span(self) -> int:
        """Frames of a video that a clip reaches over, first and last included."""
        return (self.frames - 1) * self.stride + 1

    def at(self, cursor: int) -> "ClipPlan":
        """The plan of the batch at a cursor, which has one shape: a function of (seed, cursor)."""
        if not (self.frame_buckets or self.size_buckets or self.image_ratio):
            return self
        images = _images_before(self, cursor)
        if _images_before(self, cursor + 1) > images:
            frames, size = _share(self._image_shapes(), images, key("image shapes", self.seed))
        else:
            frames, size = _share(self._video_shapes(), cursor - images, key("shapes", self.seed))
        return replace(self, frames=frames, size=size, frame_buckets=(), size_buckets=(), image_ratio=0.0)

    def shapes(self) -> list[Shape]:
        """Every shape that a batch of this plan can have, each once."""
        return list(dict.fromkeys(self._video_shapes() + (self._image_shapes() if self.image_ratio else [])))

    def _video_shapes(self) -> list[Shape]:
        return [(t, size) for t in self.frame_buckets or (self.frames,) for size in self._sizes()]

    def _image_shapes(self) -> list[Shape]:
        return [(1, size) for size in self._sizes()]

    def _sizes(self) -> tuple[tuple[int, int], ...]:
        return self.size_buckets or (self.size,)


def _images_before(plan: ClipPlan, cursor: int) -> int:
    """How many batches before this one are of images: never a whole batch away from the share asked for."""
    ratio = Fraction(str(plan.image_ratio))  # the decimal that was asked for: 0.2 is every fifth batch
    phase = below(key("image batches", plan.seed), ratio.denominator)
    return (cursor * ratio.numerator + phase) // ratio.denominator


def _share(shapes: list[Shape], number: int, base: int) -> Shape:
    """The shape of batch `number` of its kind. Each round goes through all shapes, in an order of its own."""
    turn, position = divmod(number, len(shapes))
    return shapes[permuted(position, len(shapes), key("round", base, turn))]


@dataclass(frozen=True, kw_only=True)
class ClipRequest:
    """One clip: frames start, start + stride, ... of a video, and how they are cut.

    crop: (down, across) as fractions in [0, 1) of the room there is; None is the centre.
    cursor, sample, attempt: the place it fills, and how many videos were tried before.
    """

    video: VideoRef
    start: int
    stride: int
    crop: tuple[float, float] | None
    flip: bool
    cursor: int
    sample: int
    attempt: int


def choose(plan: ClipPlan, *, num_videos: int, cursor: int, sample: int, attempt: int) -> int:
    """The number of the video for a place. Attempts 1 to num_videos go through all of them in some order."""
    if attempt > 0:
        return permuted(attempt - 1, num_videos, key("substitute", plan.seed, cursor, sample))
    epoch, position = divmod(cursor * plan.batch + sample, num_videos)
    return permuted(position, num_videos, key("order", plan.seed, epoch))


def draw(
    video: VideoRef, *, num_frames: int, plan: ClipPlan, cursor: int, sample: int, attempt: int = 0
) -> ClipRequest:
    """The clip that a place takes from a video of num_frames: from the first one if the video is short."""
    place = (plan.seed, cursor, sample, attempt)
    crop = None
    if plan.crop == "random":
        crop = (below(key("down", *place), PLACES) / PLACES, below(key("across", *place), PLACES) / PLACES)
    return ClipRequest(
        video=video,
        start=below(key("start", *place), max(1, num_frames - plan.span + 1)),
        stride=plan.stride,
        crop=crop,
        flip=plan.flip and below(key("flip", *place), 2) == 1,
        cursor=cursor,
        sample=sample,
        attempt=attempt,
    )


def read_clip(request: ClipRequest, plan: ClipPlan, *, decoder: Decoder) -> Tensor:
    """The pixels of a clip: uint8 3 t H W. Past the end, the last frame. VideoError if unreadable."""
    last = decoder.num_frames(request.video.path) - 1
    indices = [min(request.start + i * request.stride, last) for i in range(plan.frames)]
    clip = resize_crop(decoder.read_frames(request.video.path, indices), size=plan.size, crop=request.crop)
    return flip(clip) if request.flip else clip


def center_clip(video: VideoRef, plan: ClipPlan, *, start: int = 0) -> Tensor:
    """The clip for samples and evaluation: frames from `start`, their centre, not flipped. uint8 3 t H W."""
    request = ClipRequest(
        video=video, start=start, stride=plan.stride, crop=None, flip=False, cursor=0, sample=0, attempt=0
    )
    return read_clip(request, plan, decoder=Decoder())


@dataclass(frozen=True)
class Task:
    """One try to fill a place. repeat: a video that is too short is used, its last frame repeated."""

    video: VideoRef
    cursor: int
    sample: int
    attempt: int
    repeat: bool


@dataclass(frozen=True)
class Outcome:
    """How a try ended. num_frames: of the video, if it is known. reason: why there is no clip.

    whole: the file is bad whatever clip of it is asked for.
    """

    kind: Literal["clip", "short", "bad"]
    num_frames: int = 0
    reason: str = ""
    whole: bool = False


def perform(task: Task, plan: ClipPlan, *, decoder: Decoder, out: Tensor) -> Outcome:
    """Try to read the clip of a task into `out`, uint8 3 t H W. plan: of the shape of the task's batch."""
    try:
        num_frames = decoder.num_frames(task.video.path)
    except VideoError as error:
        return Outcome("bad", reason=str(error)[:LONGEST_REASON], whole=True)
    if num_frames < plan.span and not task.repeat:
        return Outcome("short", num_frames)
    request = draw(
        task.video,
        num_frames=num_frames,
        plan=plan,
        cursor=task.cursor,
        sample=task.sample,
        attempt=task.attempt,
    )
    try:
        out.copy_(read_clip(request, plan, decoder=decoder))
    except VideoError as error:
        return Outcome("bad", num_frames, str(error)[:LONGEST_REASON])
    return Outcome("clip", num_frames)


@contextmanager
def clip_reader(
    plan: ClipPlan, index: Path | None, pixels: Tensor | None
) -> Iterator[Callable[[Task], Outcome]]:
    """`perform` for a process of its own. pixels: where clips go, of the size that `clip_bytes` says.

    index: the file where it finds and keeps the indices of videos, if there is one.
    """
    assert pixels is not None, "clips need a place"
    decoder = Decoder(None if index is None else IndexFile(index))

    def read(task: Task) -> Outcome:
        shaped = plan.at(task.cursor)
        return perform(task, shaped, decoder=decoder, out=clip_in(pixels, shaped))

    try:
        yield read
    finally:
        decoder.close()


def clip_bytes(plan: ClipPlan) -> int:
    """Memory for one clip of any shape of the plan."""
    return max(3 * t * h * w for t, (h, w) in plan.shapes())


def clip_in(pixels: Tensor, plan: ClipPlan) -> Tensor:
    """The part of flat uint8 memory that holds a clip of the plan's shape: uint8 3 t H W."""
    shape = (3, plan.frames, *plan.size)
    return pixels[: math.prod(shape)].view(shape)


class Search:
    """What has been tried for one place, and what to try next.

    plan: of the shape of the place's batch; a video too short for it may fill another place.
    bad: videos known to be bad as a whole, with the reason; shared by all searches.
    request: the clip that fills the place, once there is one. records: the bad videos met on the way.
    """

    def __init__(
        self, source: ClipSource, plan: ClipPlan, *, cursor: int, sample: int, bad: dict[str, str]
    ) -> None:
        self.source, self.plan, self.cursor, self.sample, self.bad = source, plan, cursor, sample, bad
        self.request: ClipRequest | None = None
        self.records: list[dict[str, Any]] = []
        self.deaths = 0  # of processes, during this task
        self._attempt = 0
        self._short: list[int] = []
        self._reasons: list[str] = []

    def task(self) -> Task:
        """The next try. ConfigError if there is no video left."""
        while not self._enough_are_short():
            if self._attempt > min(len(self.source), MAX_ATTEMPTS):
                raise ConfigError(self._why_nothing())
            video = self._video(self._attempt)
            if video.id not in self.bad:
                return self._task(video, self._attempt, repeat=self.plan.short_videos == "repeat")
            self._record(video, self.bad[video.id], whole=True)
            self._attempt += 1
        return self._task(self._video(self._short[0]), self._short[0], repeat=True)

    def settle(self, task: Task, outcome: Outcome) -> bool:
        """Take the outcome of a try. True if the place is filled."""
        self.deaths = 0
        if outcome.kind == "clip":
            self.request = draw(
                task.video,
                num_frames=outcome.num_frames,
                plan=self.plan,
                cursor=self.cursor,
                sample=self.sample,
                attempt=task.attempt,
            )
            return True
        if outcome.kind == "short":
            self._short.append(task.attempt)
            self._reasons.append(f"{printable(task.video.id)} has {outcome.num_frames} frames")
        else:
            self._record(task.video, outcome.reason, whole=outcome.whole)
            if outcome.whole:
                self.bad[task.video.id] = outcome.reason
        if self._short and task.attempt == self._short[0] and task.repeat:
            self._short.pop(0)
        else:
            self._attempt += 1
        return False

    def _enough_are_short(self) -> bool:
        """Whether to use a short video: enough were found, or there is nothing else."""
        if self.plan.short_videos == "skip" or not self._short:
            return False
        return len(self._short) >= SHORT_ATTEMPTS or self._attempt > min(len(self.source), MAX_ATTEMPTS)

    def _task(self, video: VideoRef, attempt: int, *, repeat: bool) -> Task:
        return Task(video, self.cursor, self.sample, attempt, repeat)

    def _video(self, attempt: int) -> VideoRef:
        number = choose(
            self.plan, num_videos=len(self.source), cursor=self.cursor, sample=self.sample, attempt=attempt
        )
        return self.source[number]

    def _record(self, video: VideoRef, reason: str, *, whole: bool) -> None:
        self.records.append({"video": video.id, "path": video.path, "reason": reason, "whole": whole})
        self._reasons.append(reason)

    def _why_nothing(self) -> str:
        tried = min(len(self.source), MAX_ATTEMPTS)
        text = f"--video_path {printable(self.source.name)}: none of the {tried} videos tried can be used"
        text += f" for clips of {self.plan.frames} frames. The first reasons: "
        return text + "; ".join(list(dict.fromkeys(self._reasons))[:3])
