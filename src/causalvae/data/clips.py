"""Which clip fills which slot of a batch: a function of (seed, cursor, sample) and nothing else.

`draw` says what fills a slot; a video that can't be read is replaced by the next of the slot's own list of substitutes.
Because being broken is a property of a file, the clips are the same in every repetition, with any number of workers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from causalvae import rng
from causalvae.data.decode import Decoder
from causalvae.data.sources import ClipSource, VideoRef
from causalvae.data.transforms import flip, resize_crop
from causalvae.errors import VideoError

ShortVideos = Literal["auto", "repeat", "skip"]
Crop = Literal["random", "center"]

MAX_SHORT = 64  # substitutes that are tried in the hope of a longer video, before a short one is taken
CENTRE = (0.5, 0.5)
SAMPLES_OF_CROP = 2**32  # a crop is a fraction of the room there is, in these steps


@dataclass(frozen=True, kw_only=True)
class ClipPlan:
    """How clips are cut. size: height, width. stride: every n-th frame. batch: clips per cursor."""

    frames: int
    size: tuple[int, int]
    stride: int = 1
    batch: int = 1
    seed: int = 0
    crop: Crop = "random"
    flip: bool = True
    short_videos: ShortVideos = "auto"

    @property
    def span(self) -> int:
        """Frames of the video from the first to the last of a clip."""
        return (self.frames - 1) * self.stride + 1


@dataclass(frozen=True)
class ClipRequest:
    """One clip: frames start, start + stride, ... of a video, cropped and mirrored.

    crop: top and left as fractions of the room that the crop leaves, in [0, 1).
    """

    video: VideoRef
    start: int
    stride: int
    crop: tuple[float, float]
    flip: bool


@dataclass(frozen=True)
class Clips:
    """A batch. pixels: uint8 b 3 t h w. requests: what is in it, in order. cursor: which batch it is."""

    pixels: Tensor
    requests: tuple[ClipRequest, ...]
    cursor: int


@dataclass(frozen=True)
class Slot:
    """A place in a batch and what filled it. bad: ids of the videos that could not, with the reason, in order."""

    cursor: int
    sample: int
    pixels: Tensor | None
    request: ClipRequest | None
    bad: tuple[tuple[str, str], ...]
    num_short: int = 0


def candidate(num_videos: int, plan: ClipPlan, *, cursor: int, sample: int, attempt: int) -> int:
    """Index of the video that a slot tries. Attempt 0 walks the shuffled epochs; later ones the slot's own shuffle."""
    if attempt == 0:
        position = cursor * plan.batch + sample
        epoch, place = divmod(position, num_videos)
        return rng.permuted(place, num_videos, rng.key("epoch", plan.seed, epoch))
    return rng.permuted(attempt - 1, num_videos, rng.key("substitute", plan.seed, cursor, sample))


def draw(video: VideoRef, num_frames: int, plan: ClipPlan, *, cursor: int, sample: int) -> ClipRequest:
    """The clip that a slot takes from a video of this many frames: a function, no state."""
    base = rng.key("clip", plan.seed, cursor, sample)
    start = rng.below(rng.key(base, "start"), max(1, num_frames - plan.span + 1))
    top, left = (
        rng.below(rng.key(base, axis), SAMPLES_OF_CROP) / SAMPLES_OF_CROP for axis in ("top", "left")
    )
    mirrored = plan.flip and rng.below(rng.key(base, "flip"), 2) == 1
    return ClipRequest(
        video, start, plan.stride, (top, left) if plan.crop == "random" else CENTRE, flip=mirrored
    )


def read_clip(request: ClipRequest, plan: ClipPlan, *, decoder: Decoder) -> Tensor:
    """The pixels of a request: uint8 3 t h w. Frames past the end are the last one. VideoError if it can't be read."""
    last = decoder.num_frames(request.video.path) - 1
    wanted = [min(request.start + i * request.stride, last) for i in range(plan.frames)]
    pixels = resize_crop(decoder.read_frames(request.video.path, wanted), size=plan.size, crop=request.crop)
    return flip(pixels) if request.flip else pixels


def center_clip(video: VideoRef, plan: ClipPlan, *, start: int = 0) -> Tensor:
    """The first frames of a video, or those from `start`, cropped at the centre, not mirrored: uint8 3 t h w."""
    request = ClipRequest(video, start, plan.stride, CENTRE, flip=False)
    return read_clip(request, plan, decoder=Decoder())


class SlotReader:
    """Fills slots in one process. Keeps what it learned about files, and nothing that a clip depends on."""

    def __init__(self, source: ClipSource, plan: ClipPlan, *, announce: Callable[[str], None]) -> None:
        """announce: told the id of each video before it is opened, for the case that opening never returns."""
        self.source, self.plan, self.announce = source, plan, announce
        self.bad: dict[str, str] = {}
        self._decoder = Decoder()

    def fill(self, cursor: int, sample: int) -> Slot:
        """The slot's clip, or a slot without one if no video can be used."""
        found: list[tuple[str, str]] = []
        short: list[ClipRequest] = []
        policy = self.plan.short_videos
        for attempt in range(len(self.source) + 1):
            index = candidate(len(self.source), self.plan, cursor=cursor, sample=sample, attempt=attempt)
            video = self.source[index]
            request = self._request(video, cursor, sample)
            if request is not None and policy != "repeat" and self._is_short(request):
                short.append(request)
                if len(short) > MAX_SHORT and policy == "auto":
                    break
                continue
            pixels = self._pixels(request)
            if pixels is not None:
                return Slot(cursor, sample, pixels, request, tuple(found))
            found.append((video.id, self.bad[video.id]))
        for request in short if policy == "auto" else []:
            pixels = self._pixels(request)
            if pixels is not None:
                return Slot(cursor, sample, pixels, request, tuple(found))
            found.append((request.video.id, self.bad[request.video.id]))
        return Slot(cursor, sample, None, None, tuple(found), num_short=len(short))

    def _request(self, video: VideoRef, cursor: int, sample: int) -> ClipRequest | None:
        if video.id in self.bad:
            return None
        self.announce(video.id)
        try:
            frames = self._decoder.num_frames(video.path)
        except VideoError as error:
            self.bad[video.id] = str(error)
            return None
        return draw(video, frames, self.plan, cursor=cursor, sample=sample)

    def _is_short(self, request: ClipRequest) -> bool:
        return self._decoder.num_frames(request.video.path) < self.plan.span

    def _pixels(self, request: ClipRequest | None) -> Tensor | None:
        if request is None:
            return None
        self.announce(request.video.id)
        try:
            return read_clip(request, self.plan, decoder=self._decoder)
        except VideoError as error:
            self.bad[request.video.id] = str(error)
            return None
