"""Files of latents as they lie on the disk, written piece by piece while a video is encoded.

A sample is one safetensors file: the header is written first, because shapes are known before the numbers
are, and then each latent frame goes to its place, so that a video of any length takes constant memory.
Samples of a part of the set lie in a folder or, with text beside them, in a tar file as WebDataset names
them. What is written depends on nothing but samples and numbers: no time, no owner.
"""

import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from causalvae.files import disk_error, remove, sync

Container = Literal["shards", "safetensors"]
DtypeName = Literal["fp32", "fp16", "bf16"]
NUMBERS: dict[DtypeName, tuple[str, torch.dtype]] = {  # name in a safetensors header, and in torch
    "fp32": ("F32", torch.float32),
    "fp16": ("F16", torch.float16),
    "bf16": ("BF16", torch.bfloat16),
}
BLOCK = tarfile.BLOCKSIZE
ENDING = ".safetensors"
TAR_END = bytes(2 * BLOCK)  # two empty blocks
Record = dict[str, Any]  # Any: JSON

# What a sample can hold, each of shape k c h w: latent frames first, so that a piece in time is one piece.
TENSORS = {"mean": ("mean",), "moments": ("mean", "logvar"), "sample": ("sample",)}


@dataclass(frozen=True)
class Sample:
    """One latent to be written. key: its name. names: of its tensors. shape: k c h w.

    record: what is known of it, for JSON.
    """

    key: str
    names: tuple[str, ...]
    shape: tuple[int, int, int, int]
    dtype: DtypeName
    record: Record

    @property
    def frame_bytes(self) -> int:
        """Bytes of one latent frame of one tensor."""
        _, c, h, w = self.shape
        return c * h * w * NUMBERS[self.dtype][1].itemsize

    @property
    def header(self) -> bytes:
        """The safetensors header: its length, then JSON that is filled up with spaces."""
        size = self.frame_bytes * self.shape[0]
        code = NUMBERS[self.dtype][0]
        entries: Record = {"__metadata__": {name: json.dumps(each) for name, each in self.record.items()}}
        for number, name in enumerate(self.names):
            place = [number * size, (number + 1) * size]
            entries[name] = {"dtype": code, "shape": list(self.shape), "data_offsets": place}
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    @property
    def num_bytes(self) -> int:
        """Of the whole file."""
        return len(self.header) + len(self.names) * self.shape[0] * self.frame_bytes


class Place:
    """Where a sample is being written: from byte `start` of an open file on."""

    def __init__(self, sample: Sample, *, descriptor: int, path: Path, start: int) -> None:
        self.sample, self.start, self._path, self._descriptor = sample, start, path, descriptor
        header = sample.header
        self._first = start + len(header)
        write_at(descriptor, header, start=start, path=path)

    def write(self, name: str, frames: Tensor, *, at: int) -> None:
        """Latent frames of one tensor, k c h w in the sample's numbers, to their place from frame `at` on."""
        sample = self.sample
        assert at + len(frames) <= sample.shape[0]
        where = sample.names.index(name) * sample.shape[0] + at
        data = frames.contiguous().view(torch.uint8).numpy().tobytes()
        write_at(self._descriptor, data, start=self._first + where * sample.frame_bytes, path=self._path)

    def index(self, file: str) -> Record:
        """The sample's line of the index: where its tensors are, for those who map the file."""
        sample, size = self.sample, self.sample.frame_bytes * self.sample.shape[0]
        code = NUMBERS[sample.dtype][0]
        tensors = {
            name: {"dtype": code, "shape": list(sample.shape), "offset": self._first + number * size}
            for number, name in enumerate(sample.names)
        }
        where = {"file": file, "offset": self.start, "bytes": sample.num_bytes, "tensors": tensors}
        return {"key": sample.key, **where, **sample.record}


class Part(Protocol):
    """Files of one part of a set while it is written: the samples of a video at a time, all or none."""

    def resume(self, records: Sequence[Record]) -> int:
        """How many of these records of videos are on the disk, from the first on; what is more is removed."""
        ...

    def begin(self, samples: Sequence[Sample]) -> list[Place]:
        """Places for the samples of the next video."""
        ...

    def commit(self) -> Record:
        """Keep what was begun, on the disk. What the video's record has to say of it."""
        ...

    def rollback(self) -> None:
        """Drop what was begun."""
        ...

    def finish(self) -> None:
        """Give the part its name."""
        ...

    def close(self) -> None:
        """Let go of its files; a part that is not finished can be gone on with."""
        ...


class TarPart:
    """A tar file: for each sample KEY.safetensors, KEY.json, and KEY.txt where there is a caption."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._partial = path.with_name(f".{path.name}.partial")
        self._end = self._next = 0
        with disk_refusals(path):
            if path.exists():  # killed before its last record was written
                os.rename(path, self._partial)
            self._file = os.open(self._partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)

    def resume(self, records: Sequence[Record]) -> int:
        """See `Part`: as far as the file reaches."""
        size, kept = os.fstat(self._file).st_size, 0
        for record in records:
            if record.get("end", 0) > size:
                break
            self._end, kept = record.get("end", self._end), kept + 1
        self.rollback()
        return kept

    def begin(self, samples: Sequence[Sample]) -> list[Place]:
        """See `Part`."""
        places: list[Place] = []
        for sample in samples:
            start = self._member(f"{sample.key}{ENDING}", sample.num_bytes)
            places.append(Place(sample, descriptor=self._file, path=self._path, start=start))
            self._text(f"{sample.key}.json", json.dumps(sample.record))
            if "caption" in sample.record:
                self._text(f"{sample.key}.txt", sample.record["caption"])
        return places

    def commit(self) -> Record:
        """See `Part`: where the video ends."""
        with disk_refusals(self._path):
            os.ftruncate(self._file, self._next)  # the filling of the last block
            os.fsync(self._file)
        self._end = self._next
        return {"end": self._end}

    def rollback(self) -> None:
        """See `Part`."""
        with disk_refusals(self._path):
            os.ftruncate(self._file, self._end)
        self._next = self._end

    def finish(self) -> None:
        """See `Part`."""
        write_at(self._file, TAR_END, start=self._end, path=self._path)
        with disk_refusals(self._path):
            os.fsync(self._file)
            os.rename(self._partial, self._path)
            sync(self._path.parent)

    def close(self) -> None:
        """See `Part`."""
        os.close(self._file)

    def _text(self, name: str, text: str) -> None:
        data = text.encode(errors="backslashreplace")
        write_at(self._file, data, start=self._member(name, len(data)), path=self._path)

    def _member(self, name: str, size: int) -> int:
        """Write a member's header; where its bytes begin."""
        info = tarfile.TarInfo(name)
        info.size = size
        header = info.tobuf(tarfile.GNU_FORMAT)  # which has a place for sizes over 8 GiB
        write_at(self._file, header, start=self._next, path=self._path)
        first = self._next + len(header)
        self._next = first + size + -size % BLOCK
        return first


def tar_bytes(end: int) -> int:
    """Bytes of a tar file whose last video ends there."""
    return end + len(TAR_END)


class FolderPart:
    """A folder with KEY.safetensors for each sample."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._open: dict[Path, int] = {}
        with disk_refusals(path):
            path.mkdir(parents=True, exist_ok=True)
            for item in path.glob(".*.partial"):  # of a writer that was killed
                remove(item)

    def resume(self, records: Sequence[Record]) -> int:
        """See `Part`: as long as every file is there."""
        for kept, record in enumerate(records):
            for sample in record.get("samples", ()):
                file = self._path.parent / sample["file"]
                if not file.is_file() or file.stat().st_size != sample["bytes"]:
                    return kept
        return len(records)

    def begin(self, samples: Sequence[Sample]) -> list[Place]:
        """See `Part`."""
        places: list[Place] = []
        for sample in samples:
            path = self._path / f"{sample.key}{ENDING}"
            with disk_refusals(path):
                partial = path.with_name(f".{path.name}.partial")
                self._open[path] = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
            places.append(Place(sample, descriptor=self._open[path], path=path, start=0))
        return places

    def commit(self) -> Record:
        """See `Part`."""
        for path, descriptor in self._open.items():
            with disk_refusals(path):
                os.fsync(descriptor)
                os.rename(path.with_name(f".{path.name}.partial"), path)
        with disk_refusals(self._path):
            sync(self._path)
        self.close()
        return {}

    def rollback(self) -> None:
        """See `Part`."""
        paths = list(self._open)
        self.close()
        for path in paths:
            remove(path.with_name(f".{path.name}.partial"))

    def finish(self) -> None:
        """See `Part`: it has its name from the beginning."""

    def close(self) -> None:
        """See `Part`."""
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()


def write_at(descriptor: int, data: bytes | memoryview, *, start: int, path: Path) -> None:
    """All of the bytes, from byte `start` of the file on. RunError if the disk refuses."""
    rest = memoryview(data)
    with disk_refusals(path):
        while rest:
            written = os.pwrite(descriptor, rest, start)
            rest, start = rest[written:], start + written


@contextmanager
def disk_refusals(path: Path) -> Iterator[None]:
    """What the disk refuses leaves as RunError."""
    try:
        yield
    except OSError as error:
        raise disk_error(error, path) or error from error
