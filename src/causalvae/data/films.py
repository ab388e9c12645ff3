"""Whole videos from their first frame to their last, in pieces, in memory that does not grow with length.

A film is a video or a picture and what has to be known to write it again: its exact number of frames, its
size upright, and when each frame is shown. Pieces are decoded in order and nothing is decoded twice; they
hold the frames that `decode.read_frames` gives by number.
"""

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from av.container import InputContainer
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from torch import Tensor

from causalvae.data.decode import Decoder, decoded_frames, opened, shown, upright
from causalvae.errors import VideoError

FINE_TICKS = 4  # times may be rounded to ticks that much shorter than a frame; to longer ones none is


@dataclass(frozen=True, kw_only=True)
class Film:
    """A video or picture. frames: how many decode. height, width: upright, in pixels.

    fps: frames per second, None where nothing says. times: None if frame n is shown n / fps after frame 0,
    else when each frame is shown, in units of `tick` seconds. zero: the time stamp at which the first of its
    streams begins, start: how long after that frame 0 is shown, both in seconds.
    """

    path: str
    frames: int
    height: int
    width: int
    fps: Fraction | None
    times: "array[int] | None"
    tick: Fraction
    zero: Fraction
    start: Fraction
    is_image: bool
    has_audio: bool


def open_film(path: str | Path) -> Film:
    """What a file holds. VideoError if it can't be read as video or picture."""
    name, decoder = str(path), Decoder()
    frames = decoder.num_frames(name)
    height, width = decoder.read_frames(name, [0]).shape[1:3]
    with opened(name) as (container, stream):
        times = decoder.frame_times(name) or _times_of_gif(container, stream, frames=frames)
        tick = stream.time_base or Fraction(1, av.time_base)
        rates = [Fraction(rate) for rate in (stream.average_rate, stream.base_rate) if rate]
        constant = rates[0] if times is None and rates else _constant_rate(times, rates=rates, tick=tick)
        first = Fraction(0) if times is None else times[0] * tick
        begins = Fraction(container.start_time or 0, av.time_base) if times is not None else Fraction(0)
        return Film(
            path=name,
            frames=frames,
            height=height,
            width=width,
            fps=constant or (rates[0] if rates else None),
            times=None if constant else times,
            tick=tick,
            zero=min(begins, first),
            start=first - min(begins, first),
            is_image=container.format.name.endswith("_pipe") or container.format.name == "image2",
            has_audio=bool(container.streams.audio),
        )


def read_pieces(
    film: Film, *, frames: int, start: int = 0, stop: int | None = None, stride: int = 1
) -> Iterator[Tensor]:
    """Frames start, start + stride, ... before stop, in pieces of at most `frames`: uint8 t h w 3.

    Decodes from the film's beginning. VideoError where a frame is damaged or missing.
    """
    wanted = range(start, film.frames if stop is None else min(stop, film.frames), stride)
    pictures = _pictures(film, wanted)
    for done in range(0, len(wanted), frames):
        piece = np.empty((min(frames, len(wanted) - done), film.height, film.width, 3), np.uint8)
        for place in piece:
            place[:] = next(pictures)
        yield torch.from_numpy(piece)


def _pictures(film: Film, wanted: range) -> Iterator[np.ndarray]:
    """The frames of these numbers, in order: uint8 h w 3, upright, each good until the next one."""
    reformatter = VideoReformatter()
    with opened(film.path) as (container, stream):
        for number, (frame, _) in enumerate(decoded_frames(container, stream, by_position=False)):
            if number not in wanted:
                continue
            if frame.is_corrupt:
                raise VideoError(f"{shown(film.path)}: frame {number} is damaged")
            picture = upright(frame, reformatter)
            if picture.shape != (film.height, film.width, 3):
                raise VideoError(f"{shown(film.path)}: frame {number} has another size than those before it")
            yield picture
    raise VideoError(f"{shown(film.path)}: ends before frame {wanted[-1]}, it was to have {film.frames}")


def _constant_rate(
    times: Sequence[int] | None, *, rates: Sequence[Fraction], tick: Fraction
) -> Fraction | None:
    """The rate at which frames follow each other, up to the rounding of their times; None if none fits."""
    for rate in rates if times else ():
        assert times is not None
        step, unit = rate.denominator * tick.denominator, tick.numerator * rate.numerator
        slack = unit if unit * FINE_TICKS <= step else 0
        if all(abs((time - times[0]) * unit - n * step) <= slack for n, time in enumerate(times)):
            return rate
    return None


def _times_of_gif(container: InputContainer, stream: VideoStream, *, frames: int) -> "array[int] | None":
    """When each picture of a GIF is shown: it has a delay of its own. None for other files."""
    if container.format.name != "gif":
        return None
    times = array("q", [p.pts for p in container.demux(stream) if p.size and p.pts is not None])
    return times if len(times) == frames and list(times) == sorted(set(times)) else None
