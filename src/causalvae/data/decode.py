"""Exact frames out of video files: frame n of a random read is frame n of decoding the file from its start.

Seeking by time and dropping early frames is wrong for AVI with B-frames and for open GOPs. Here an index of
the file's frames is made once: from its packets where they carry true presentation times, else by decoding.
A read starts one keyframe earlier than needed (where keyframes may be recovery points), then every frame that
comes out is matched with the index. If one does not match, the file is decoded from its start and frames are
counted. Header counts are never used.
"""

import os
import re
import stat
from array import array
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import av
import av.error
import numpy as np
import torch
from av.container import InputContainer
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation, VideoReformatter
from av.video.stream import VideoStream
from torch import Tensor

from causalvae.data.index import Entry, FrameIndex, IndexFile, Stamp, bare_index
from causalvae.errors import VideoError

ACCURATE = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
MAX_PIXELS = 1 << 26  # per frame: twice 8K; a damaged header must not ask for all of the memory
INDEX_CACHE = 16384  # files; about 2 KB each for a video of 200 frames
TIMED_FORMATS = {"mov", "matroska", "mpeg", "mpegts", "flv", "asf"}  # their packets carry presentation times
CLOSED_CODECS = {"mpeg4", "vp8", "vp9"}  # nothing shown after a keyframe refers to what was before it
PART = re.compile(r"subfile,,start,(\d+),end,(\d+),,:(/.*)", re.DOTALL)  # FFmpeg's own name for one
ESCAPES = 3  # seeks that may land too late before the file is read from its start


@dataclass(frozen=True)
class VideoInfo:
    """What a file holds. frames: how many decode; height, width: as displayed; fps: average.

    codec, container: as FFmpeg names them.
    """

    path: str
    frames: int
    height: int
    width: int
    fps: float | None
    codec: str
    container: str


def printable(name: str | Path) -> str:
    """A file name for a message: control characters, direction marks and bytes that are no text escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(name))


def part_of_file(path: str, *, start: int, size: int) -> str:
    """The name under which some bytes of a file, such as a member of a tar, are read as a video."""
    return f"subfile,,start,{start},end,{start + size},,:{os.path.abspath(path)}"


def file_and_part(name: str) -> tuple[str, tuple[int, int] | None]:
    """The file that a name means, and which bytes of it, [start, end), if it is a part of one."""
    found = PART.fullmatch(name)
    return (found[3], (int(found[1]), int(found[2]))) if found else (name, None)


def shown(name: str) -> str:
    """A video's name for a message."""
    path, part = file_and_part(name)
    return printable(path) if part is None else f"{printable(path)} (bytes {part[0]} to {part[1]})"


def probe(path: str | Path) -> VideoInfo:
    """Frames and size of one file. VideoError if it can't be read as video."""
    return Decoder().probe(path)


def read_frames(path: str | Path, indices: Sequence[int]) -> Tensor:
    """Frames of one file: uint8 t h w 3, in the order of `indices`. VideoError if one can't be had."""
    return Decoder().read_frames(path, indices)


class Decoder:
    """Reads frames and remembers the index of the files it has seen. One per process or thread.

    kept: what other processes and earlier runs have found out; what is new is added to it.
    """

    def __init__(self, kept: IndexFile | None = None) -> None:
        self._kept = kept
        self._indices: OrderedDict[str, FrameIndex] = OrderedDict()
        self._reformatter = VideoReformatter()  # one for all frames: it keeps its tables

    def close(self) -> None:
        """Write what is new, and close what was opened."""
        if self._kept is not None:
            self._kept.close()

    def num_frames(self, path: str | Path) -> int:
        """How many frames of the file decode, from the index."""
        return self.index(str(path)).frames

    def frame_times(self, path: str | Path) -> "array[int] | None":
        """When each frame is shown, in the stream's time base; None where the packets don't tell."""
        index = self.index(str(path))
        return None if index.by_position or not index.labels else index.labels

    def probe(self, path: str | Path) -> VideoInfo:
        """Frames and displayed size. Decodes one frame, because only a frame knows its rotation."""
        name = str(path)
        frames = self.num_frames(name)
        height, width = self.read_frames(name, [0]).shape[1:3]
        with opened(name) as (container, stream):
            rate = float(stream.average_rate) if stream.average_rate else None
            codec, kind = stream.codec_context.name, container.format.name.split(",")[0]
        return VideoInfo(name, frames, height, width, rate, codec, kind)

    def check(self, path: str | Path) -> None:
        """Decode every frame. VideoError that names the first one that is damaged or missing."""
        name, count = str(path), 0
        with opened(name) as (container, stream):
            for frame, _ in decoded_frames(container, stream, by_position=False):
                if frame.is_corrupt:
                    raise VideoError(f"{shown(name)}: frame {count} is damaged")
                count += 1
        if count < self.num_frames(name):
            raise VideoError(f"{shown(name)}: only {count} of its {self.num_frames(name)} frames decode")

    def read_frames(self, path: str | Path, indices: Sequence[int]) -> Tensor:
        """Frames of the file by number: uint8 t h w 3, upright, in the order of `indices`."""
        name = str(path)
        index = self.index(name)
        numbers = [int(i) for i in indices]
        if not numbers or min(numbers) < 0:
            raise VideoError(f"{shown(name)}: frame numbers start at 0, got {numbers}")
        if max(numbers) >= index.frames:
            raise VideoError(f"{shown(name)}: frame {max(numbers)} was asked for, it has {index.frames}")
        wanted = sorted(set(numbers))
        frames = self._read_from_key(name, index, wanted)
        if frames is None:
            frames = self._read_from_start(name, wanted)
        if wanted == numbers:
            return torch.from_numpy(frames)
        return torch.from_numpy(frames[[wanted.index(i) for i in numbers]])

    def index(self, name: str) -> FrameIndex:
        """Where each frame of a file is. VideoError if none of it can be decoded."""
        stamp = stamp_of(name)
        known = self._indices.get(name)
        if known is not None and known.stamp == stamp:
            self._indices.move_to_end(name)
            return known
        entry = None if self._kept is None else self._kept.get(name, stamp)
        index = None if entry is None else entry.frames
        if index is None:
            index = _index_by_packets(name, stamp) or _index_by_decoding(name, stamp)
            if index.frames == 0:
                raise VideoError(f"{shown(name)}: no frame of it can be decoded")
            if self._kept is not None:
                self._kept.keep(name, Entry(stamp, index), stamp_now=stamp_of(name))
        self._indices[name] = index
        if len(self._indices) > INDEX_CACHE:
            self._indices.popitem(last=False)
        return index

    def _read_from_key(self, name: str, index: FrameIndex, wanted: list[int]) -> np.ndarray | None:
        """Frames t h w 3 by a seek, or None where it can't be shown to be exact or something is damaged."""
        needed = bisect_right(index.keys, wanted[0]) - 1
        if not index.labels or needed - index.lead < 1:
            return None  # the start of the file is as near
        with opened(name) as (container, stream):
            for entry in range(needed - index.lead, max(0, needed - index.lead - ESCAPES), -1):
                try:
                    container.seek(index.key_times[entry], stream=stream, backward=True)
                    frames = _numbered(
                        decoded_frames(container, stream, by_position=index.by_position), index
                    )
                    return self._collect(name, frames, wanted, enter_by=index.keys[needed - index.lead])
                except (av.error.FFmpegError, _NotExactError):
                    continue
        return None

    def _read_from_start(self, name: str, wanted: list[int]) -> np.ndarray:
        """Frames t h w 3, counted from the first that decodes. VideoError where one is damaged or missing."""
        with opened(name) as (container, stream):
            frames = enumerate(frame for frame, _ in decoded_frames(container, stream, by_position=False))
            try:
                return self._collect(name, frames, wanted, enter_by=None)
            except _NotExactError as error:
                raise VideoError(f"{shown(name)}: {error}") from error

    def _collect(
        self,
        name: str,
        frames: Iterator[tuple[int, VideoFrame]],
        wanted: list[int],
        *,
        enter_by: int | None,
    ) -> np.ndarray:
        """The wanted frames, t h w 3, of numbered ones in display order.

        enter_by: if given, the first frame must be this keyframe or an earlier one, lest references lack.
        """
        out: np.ndarray | None = None
        filled = 0
        begun: int | None = None
        for number, frame in frames:
            begun = number if begun is None else begun
            if enter_by is not None and begun > enter_by:
                raise _NotExactError(f"the seek led to frame {begun}, past keyframe {enter_by}")
            if number != wanted[filled]:
                continue
            if frame.is_corrupt:
                raise _NotExactError(f"frame {number} is damaged")
            picture = upright(frame, self._reformatter)
            if out is None:
                out = np.empty((len(wanted), *picture.shape), np.uint8)
            if picture.shape != out.shape[1:]:
                raise VideoError(f"{shown(name)}: frame {number} has another size than those before it")
            out[filled] = picture
            filled += 1
            if filled == len(wanted) and out is not None:
                return out
        raise _NotExactError(f"frame {wanted[filled]} can't be decoded, the file ends before it")


def upright(frame: VideoFrame, reformatter: VideoReformatter) -> np.ndarray:
    """One frame as uint8 h w 3, turned as it is shown. May be a view of the frame's memory."""
    rgb = reformatter.reformat(frame, format="rgb24", interpolation=ACCURATE, threads=1)
    plane = rgb.planes[0]
    rows = np.frombuffer(memoryview(plane), np.uint8).reshape(-1, plane.line_size)[
        : rgb.height, : rgb.width * 3
    ]
    picture = rows.reshape(rgb.height, rgb.width, 3)
    return np.rot90(picture, round(frame.rotation / 90)) if frame.rotation else picture


class _NotExactError(Exception):
    """What came out of the decoder does not match the index."""


def stamp_of(name: str) -> Stamp:
    """Size, time of change and inode of a regular file. Anything else is a VideoError: a fifo would hang."""
    try:
        found = os.stat(file_and_part(name)[0])
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = error.strerror if isinstance(error, OSError) else "not a file name"
        raise VideoError(f"{shown(name)}: can't be opened: {reason}") from error
    if not stat.S_ISREG(found.st_mode):
        raise VideoError(f"{shown(name)}: not a regular file")
    return found.st_size, found.st_mtime_ns, found.st_ino


@contextmanager
def opened(name: str) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The file's first video stream, ready to decode in this thread. Errors of PyAV leave as VideoError.

    The absolute path keeps FFmpeg from reading `http:x.mp4` as an address.
    """
    stamp_of(name)
    is_part = file_and_part(name)[1] is not None
    address, protocols = (name, "subfile,file") if is_part else (os.path.abspath(name), "file")
    try:
        with av.open(address, options={"protocol_whitelist": protocols}) as container:
            yield container, _video_stream(container, name)
    except av.error.FFmpegError as error:
        raise VideoError(f"{shown(name)}: {error.strerror or type(error).__name__}") from error
    except (MemoryError, UnicodeError) as error:
        raise VideoError(f"{shown(name)}: {type(error).__name__}") from error


def _video_stream(container: InputContainer, name: str) -> VideoStream:
    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams:
        raise VideoError(f"{shown(name)}: no video in it")
    stream = streams[0]
    stream.thread_type = "NONE"
    stream.codec_context.thread_count = 1
    strict = (
        {} if stream.codec_context.name == "tiff" else {"err_detect": "explode"}
    )  # it refuses sound TIFFs
    stream.codec_context.options = {"max_pixels": str(MAX_PIXELS), **strict}
    stream.codec_context.copy_opaque = True
    return stream


def decoded_frames(
    container: InputContainer, stream: VideoStream, *, by_position: bool
) -> Iterator[tuple[VideoFrame, int | None]]:
    """Frames in display order with their label: the position of their packet, or their presentation time."""
    first_key: int | None = None
    leading = False  # before the first packet that is shown after the first keyframe
    for packet in container.demux(stream):
        if first_key is None and packet.is_keyframe and packet.pts is not None:
            first_key, leading = packet.pts, True
        elif first_key is not None and packet.pts is not None and packet.pts > first_key:
            leading = False
        if by_position and packet.size:
            packet.opaque = packet.pos
        try:
            frames = stream.codec_context.decode(packet)
        except av.error.InvalidDataError:
            # After a seek or a cut, frames shown before the first keyframe may lack what they refer to.
            earlier = leading if packet.pts is None else first_key is not None and packet.pts < first_key
            if not earlier:
                raise
            continue
        for frame in frames:
            label = frame.opaque if by_position else frame.pts
            yield frame, label if isinstance(label, int) else None


def _numbered(
    frames: Iterator[tuple[VideoFrame, int | None]], index: FrameIndex
) -> Iterator[tuple[int, VideoFrame]]:
    """Frames with their number by the index. They must follow each other as in the index, without a gap."""
    number: int | None = None
    for frame, label in frames:
        if number is None:
            number = index.labels.index(label) if label is not None and label in index.labels else None
        elif number + 1 < index.frames and index.labels[number + 1] == label:
            number += 1
        else:
            number = None
        if number is None:
            raise _NotExactError(f"a frame labelled {label} is not where the index has it")
        yield number, frame


def _index_by_packets(name: str, stamp: Stamp) -> FrameIndex | None:
    """The index by presentation times, without decoding, or None where packets don't tell the order."""
    count, shown_at, keys = 0, array("q"), list[tuple[int, int]]()
    with opened(name) as (container, stream):
        for packet in container.demux(stream):
            if not packet.size or packet.is_discard or not _is_shown(packet, stream):
                continue
            count += 1
            if packet.pts is not None:
                shown_at.append(packet.pts)
                if packet.is_keyframe:
                    keys.append((packet.pts, packet.pts if packet.dts is None else packet.dts))
        timed = bool(TIMED_FORMATS & set(container.format.name.split(",")))
        timed = timed or (container.format.name == "avi" and not stream.codec_context.has_b_frames)
        closed = stream.codec_context.name in CLOSED_CODECS or len(keys) == count
    if count <= 1:
        return bare_index(stamp, count)
    times = array("q", sorted(shown_at))
    ordered = len(times) == count and all(a < b for a, b in pairwise(times))
    if not (timed and ordered and keys and keys[0][0] == shown_at[0] == times[0]):
        return None
    keys.sort()
    return FrameIndex(
        stamp,
        count,
        times,
        array("q", [bisect_left(times, pts) for pts, _ in keys]),
        array("q", [time for _, time in keys]),
        by_position=False,
        lead=0 if closed else 1,
    )


def _is_shown(packet: av.Packet, stream: VideoStream) -> bool:
    """False for a VP8 packet that only updates a reference (RFC 6386, 9.1: bit 4 of its first byte)."""
    return stream.codec_context.name != "vp8" or bool(memoryview(packet)[0] & 16)


def _index_by_decoding(name: str, stamp: Stamp) -> FrameIndex:
    """The index by decoding the file once. In an AVI, frames are known by the position of their packet."""
    labels: list[int | None] = []
    keys: list[int] = []
    with opened(name) as (container, stream):
        seekable = container.format.name == "avi"
        closed = stream.codec_context.name in CLOSED_CODECS
        for frame, label in decoded_frames(container, stream, by_position=True):
            if frame.key_frame:
                keys.append(len(labels))
            labels.append(label)
    known = [label for label in labels if label is not None and label >= 0]
    if not seekable or len(set(known)) != len(labels):
        return bare_index(stamp, len(labels))
    with opened(name) as (container, stream):
        starts = {packet.pos: packet.dts for packet in container.demux(stream) if packet.dts is not None}
    keys = [key for key in keys if known[key] in starts]
    times = array("q", [starts[known[key]] for key in keys])
    lead = 0 if closed else 1
    return FrameIndex(
        stamp, len(known), array("q", known), array("q", keys), times, by_position=True, lead=lead
    )
