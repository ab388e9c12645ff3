"""What is taken of a video to be encoded: all of its frames, or clips of it, as they are or at one size."""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from causalvae.data.decode import Decoder
from causalvae.data.films import Film, open_film, read_pieces
from causalvae.data.sources import VideoRef
from causalvae.data.transforms import centre_crop, resize_crop
from causalvae.evalset import ClipRule, too_short

MOST_FRAMES = 16  # of a piece
PIECE_BYTES = 1 << 26  # of a piece of large frames


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How videos are cut. frames: of a clip, None for whole videos. stride: every n-th frame.

    size: H, W of the crop at the centre, None for frames as they are. per_video: the most clips of a video.
    batch: how many of them are encoded side by side.
    """

    frames: int | None = None
    size: tuple[int, int] | None = None
    stride: int = 1
    per_video: int = 1
    batch: int = 1

    def facts(self) -> dict[str, Any]:  # Any: JSON
        """By the names of the flags."""
        return {
            "num_frames": self.frames,
            "resolution": None if self.size is None else list(self.size),
            "sample_rate": self.stride,
            "clips_per_video": self.per_video,
            "batch_size": self.batch,
        }


@dataclass(frozen=True, kw_only=True)
class Footage:
    """What is taken of one video. starts: first frames of its clips. frames: of each. size: H, W."""

    film: Film
    starts: tuple[int, ...]
    frames: int
    size: tuple[int, int]
    cut: Cut

    def groups(self) -> Iterator[tuple[int, ...]]:
        """The clips that are encoded side by side, by their places in `starts`."""
        places = range(len(self.starts))
        yield from (tuple(places[i : i + self.cut.batch]) for i in range(0, len(places), self.cut.batch))

    def record(self, place: int) -> dict[str, Any]:  # Any: JSON
        """What there is to know of one clip, for JSON."""
        film, cut = self.film, self.cut
        rate = None if film.fps is None or film.is_image else Fraction(film.fps) / cut.stride
        record: dict[str, Any] = {
            "start": self.starts[place],
            "stride": cut.stride,
            "frames": self.frames,
            "height": self.size[0],
            "width": self.size[1],
            **({} if rate is None else {"fps": [rate.numerator, rate.denominator]}),
            "video_frames": film.frames,
            "video_height": film.height,
            "video_width": film.width,
        }
        if cut.size is not None:
            record["crop"] = centre_crop(film.height, film.width, size=cut.size)
        return record


def take(video: VideoRef, cut: Cut) -> Iterator[Footage | Tensor]:
    """What is taken of a video, then its pixels: of each group in turn, uint8 b 3 t H W in pieces along t.

    VideoError if it can't be read, or is too short for a clip.
    """
    film = open_film(video.path)
    size = cut.size or (film.height, film.width)
    if cut.frames is None:
        frames = -(-film.frames // cut.stride)
        yield Footage(film=film, starts=(0,), frames=frames, size=size, cut=cut)
        most = max(1, min(MOST_FRAMES, PIECE_BYTES // (3 * film.height * film.width)))
        for piece in read_pieces(film, frames=most, stride=cut.stride):
            yield _fitted(piece, cut)[None]
        return
    rule = ClipRule(frames=cut.frames, size=size, stride=cut.stride, per_video=cut.per_video)
    starts = rule.starts(film.frames)
    if not starts:
        raise too_short(video, rule, frames=film.frames)
    footage = Footage(film=film, starts=tuple(starts), frames=cut.frames, size=size, cut=cut)
    yield footage
    decoder = Decoder()
    for group in footage.groups():
        clips = [range(starts[place], starts[place] + rule.span, cut.stride) for place in group]
        yield torch.stack([_fitted(decoder.read_frames(video.path, clip), cut) for clip in clips])


def _fitted(frames: Tensor, cut: Cut) -> Tensor:
    """uint8 t h w 3 -> uint8 3 t H W."""
    return frames.permute(3, 0, 1, 2) if cut.size is None else resize_crop(frames, size=cut.size)
