"""A film written frame by frame, with the sound of the one that it was made from, in constant memory.

Colours: what is not RGB is written by BT.709 in limited range and says so, so that the decoder here and
players read the same colours back. Times: frame n is shown when frame n of the original is. A file is written
aside and takes its name when it is whole.
"""

import hashlib
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import av.error
from av.codec.codec import UnknownCodecError
from av.container import OutputContainer
from av.packet import Packet
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter
from av.video.stream import VideoStream
from torch import Tensor

from causalvae.data.codings import Coding
from causalvae.data.decode import ACCURATE, opened, shown
from causalvae.data.encode import write_png
from causalvae.data.films import Film
from causalvae.data.sound import Sound
from causalvae.errors import ConfigError, RunError, VideoError
from causalvae.files import disk_error, sync

MIN_TICKS = 10000  # a second, for times: finer than what is shown or heard
FPS = Fraction(25)  # of a film that does not say
BT709_MATRIX = 1  # AVCOL_SPC_BT709 in FFmpeg's list


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Where to write a file that gets its name when the block ends without an error, and else is removed."""
    partial = path.with_name(f".{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        sync(partial)
        os.rename(partial, path)
        sync(path.parent)
    except OSError as error:
        raise disk_error(error, path) or error from error
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def film_writer(
    path: Path, film: Film, *, size: tuple[int, int], coding: Coding, quality: int | None
) -> "Iterator[FilmWriter]":
    """A new film with the times and the sound of `film`. size: height and width of its frames.

    quality: the rate factor, None for the codec's own. VideoError if the film's sound can't be read or the
    size is none for the codec, RunError if the disk refuses.
    """
    _refuse_small(film.path, size=size, coding=coding)
    with opened(film.path) as (original, seen), _container(path, coding) as container:
        stream = _add_stream(container, film, size=size, coding=coding, quality=quality)
        _describe(stream, film, seen)
        sound = Sound(original, container, zero=film.zero, encoder=coding.sound)
        writer = FilmWriter(path, film, container=container, stream=stream, sound=sound)
        yield writer
        writer.finish()


@contextmanager
def silent_writer(
    path: Path, *, fps: Fraction | None, size: tuple[int, int], coding: Coding
) -> "Iterator[FilmWriter]":
    """A new film without sound. fps: frames a second, 25 where nothing is known. size: height and width.

    VideoError if the size is none for the codec, RunError if the disk refuses.
    """
    _refuse_small(str(path), size=size, coding=coding)
    zero = Fraction(0)
    film = Film(
        path=str(path),
        frames=0,
        height=size[0],
        width=size[1],
        fps=fps,
        times=None,
        tick=zero,
        zero=zero,
        start=zero,
        is_image=False,
        has_audio=False,
    )
    with _container(path, coding) as container:
        stream = _add_stream(container, film, size=size, coding=coding, quality=None)
        _name_matrix(stream)
        writer = FilmWriter(path, film, container=container, stream=stream, sound=None)
        yield writer
        writer.finish()


@contextmanager
def _container(path: Path, coding: Coding) -> Iterator[OutputContainer]:
    """A file to write streams to, which takes its name when it is whole."""
    with written_aside(path) as partial:
        with _refusals(path):
            container = av.open(str(partial), "w", format=coding.container)
        try:
            yield container
        finally:
            with _refusals(path):
                container.close()


def _refuse_small(name: str, *, size: tuple[int, int], coding: Coding) -> None:
    if min(size) < coding.least:
        raise VideoError(
            f"{shown(name)}: {size[0]}x{size[1]} is too small for {coding.encoder}, which needs "
            f"{coding.least}x{coding.least}; give another --codec"
        )


class FilmWriter:
    """A film being written. notes: what is not as in the original. See `film_writer`."""

    def __init__(
        self, path: Path, film: Film, *, container: OutputContainer, stream: VideoStream, sound: Sound | None
    ) -> None:
        self.notes = [] if sound is None else list(sound.notes)
        self._path = path
        self._film = film
        self._container = container
        self._stream = stream
        self._sound = sound
        self._reformatter = VideoReformatter()
        self._count = 0

    def push(self, frames: Tensor) -> None:
        """The next frames, uint8 t h w 3."""
        for picture in frames:
            time, tick = _time(self._film, self._count), _tick(self._film)
            self._hear(time)
            frame = self._reformatter.reformat(
                av.VideoFrame.from_ndarray(picture.contiguous().numpy(), format="rgb24"),
                format=self._stream.pix_fmt,
                dst_colorspace=Colorspace.ITU709,
                dst_color_range=ColorRange.MPEG,
                interpolation=ACCURATE,
                threads=1,
            )
            frame.pts, frame.time_base = round(time / tick), tick
            self._count += 1
            with _refusals(self._path):
                self._container.mux(self._stream.encode(frame))

    def finish(self) -> None:
        """Write what the encoder holds back, and the rest of the sound."""
        with _refusals(self._path):
            self._container.mux(self._stream.encode())
        self._hear(None)

    def _hear(self, until: Fraction | None) -> None:
        """Write the sound up to this time."""
        packets: Iterable[Packet] = () if self._sound is None else self._sound.until(until)
        for packet in packets:
            with _refusals(self._path):
                self._container.mux(packet)


@contextmanager
def picture_writer(path: Path) -> "Iterator[PictureWriter]":
    """A new picture, PNG."""
    with written_aside(path) as partial:
        yield PictureWriter(path, partial)


class PictureWriter:
    """A picture being written. See `picture_writer`."""

    def __init__(self, path: Path, partial: Path) -> None:
        self.notes: list[str] = []
        self._path = path
        self._partial = partial

    def push(self, frames: Tensor) -> None:
        """The picture, uint8 1 h w 3."""
        with _refusals(self._path):
            write_png(self._partial, frames[0])


def check_encoder(coding: Coding) -> None:
    """ConfigError if FFmpeg was built without this codec's encoder."""
    try:
        av.Codec(coding.encoder, "w")
    except UnknownCodecError as error:
        raise ConfigError(
            f"--codec: PyAV has no encoder {coding.encoder} here; give another codec"
        ) from error


def _add_stream(
    container: OutputContainer, film: Film, *, size: tuple[int, int], coding: Coding, quality: int | None
) -> VideoStream:
    """The stream of frames. Its pixels are RGB, or as far as the codec goes."""
    options = dict(coding.options)
    if coding.quality is not None:
        options["crf"] = str(coding.quality[0] if quality is None else quality)
    stream = container.add_stream(coding.encoder, rate=film.fps or FPS, options=options)
    assert isinstance(stream, VideoStream)
    stream.height, stream.width = size
    stream.pix_fmt = coding.pixels_for(*size)
    stream.codec_context.time_base = _tick(film)
    if coding.tag is not None:
        stream.codec_context.codec_tag = coding.tag
    return stream


def _describe(stream: VideoStream, film: Film, seen: VideoStream) -> None:
    """Say what the colours mean, and the shape of a pixel, as the original has it."""
    context, before = stream.codec_context, seen.codec_context
    context.color_primaries, context.color_trc = before.color_primaries, before.color_trc
    _name_matrix(stream)
    aspect = seen.sample_aspect_ratio
    if aspect:
        turned = (film.height, film.width) != (seen.height, seen.width)
        context.sample_aspect_ratio = 1 / aspect if turned else aspect


def _name_matrix(stream: VideoStream) -> None:
    """Say how RGB became these pixels, unless they are RGB."""
    if not (stream.pix_fmt or "").startswith("bgr"):
        stream.codec_context.colorspace, stream.codec_context.color_range = BT709_MATRIX, ColorRange.MPEG


def _tick(film: Film) -> Fraction:
    """Seconds of a unit of the new film's times: frames of a constant rate fall on whole ones."""
    if film.times is not None:
        return film.tick
    fps = film.fps or FPS
    return Fraction(1, fps.numerator * math.ceil(MIN_TICKS / fps.numerator))


def _time(film: Film, number: int) -> Fraction:
    """When a frame is shown, in seconds."""
    if film.times is not None:
        return film.start + (film.times[number] - film.times[0]) * film.tick
    return film.start + number / (film.fps or FPS)


@contextmanager
def _refusals(path: Path) -> Iterator[None]:
    """What FFmpeg can't write leaves as RunError."""
    try:
        yield
    except av.error.FFmpegError as error:
        if isinstance(error, OSError):
            raise disk_error(error, path) or error from error
        raise RunError(f"{path}: can't be written: {error.strerror}", status=1) from error
