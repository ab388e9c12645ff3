"""Latents read where they lie: a whole one in one read, or some of its frames, in any order or process."""

import json
import math
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from causalvae.data.shards import members
from causalvae.errors import ConfigError, RunError
from causalvae.flags import printable
from causalvae.latentfiles import ENDING, NUMBERS, Record, disk_refusals

OPEN_FILES = 128  # of each process
MOST_HEADER = 1 << 22  # bytes
OF_HEADER = dict(NUMBERS.values())


class LatentFiles:
    """The files of a set, opened when they are needed. A copy in another process opens its own."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._open: OrderedDict[str, int] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:  # Any: attributes
        return {"_path": self._path, "_open": OrderedDict()}

    def __del__(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)

    def read(self, file: str, size: int, *, offset: int) -> bytearray:
        """Bytes of a file. RunError if they are not there."""
        return read_at(self._descriptor(file), size, start=offset, path=self._path / file)

    def tensors(self, record: Record) -> dict[str, Tensor]:
        """The tensors of a latent, k c h w each, by its line of the index. RunError if they are not there."""
        try:
            offset, size, places = int(record["offset"]), int(record["bytes"]), dict(record["tensors"])
            data = self.read(str(record["file"]), size, offset=offset)
            first = min(int(each["offset"]) for each in places.values()) - offset
            if int.from_bytes(data[:8], "little") != first - 8:
                raise RunError(_not_there(self._path, record), status=1)
            found: dict[str, Tensor] = {}
            for name, each in places.items():
                numbers, shape = OF_HEADER[each["dtype"]], [int(side) for side in each["shape"]]
                at, count = int(each["offset"]) - offset, math.prod(shape)
                found[name] = torch.frombuffer(data, dtype=numbers, count=count, offset=at).view(shape)
            return found
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise RunError(_not_there(self._path, record), status=1) from error

    def frames(self, record: Record, name: str, *, first: int, count: int) -> Tensor:
        """Some latent frames of one tensor: k c h w."""
        place = record["tensors"][name]
        numbers, (_, *shape) = OF_HEADER[place["dtype"]], (int(side) for side in place["shape"])
        size = math.prod(shape) * numbers.itemsize
        data = self.read(str(record["file"]), count * size, offset=int(place["offset"]) + first * size)
        return torch.frombuffer(data, dtype=numbers).view(count, *shape)

    def _descriptor(self, file: str) -> int:
        """The file, opened; of many, those not used for longest are closed."""
        if file in self._open:
            self._open.move_to_end(file)
            return self._open[file]
        try:
            descriptor = os.open(self._path / file, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise RunError(f"{self._path / file}: can't be read: {error.strerror}", status=1) from error
        self._open[file] = descriptor
        if len(self._open) > OPEN_FILES:
            os.close(self._open.popitem(last=False)[1])
        return descriptor


def _not_there(path: Path, record: Record) -> str:
    return (
        f"{path}: the index is not that of the files: {printable(str(record.get('file')))} does not have "
        f"{printable(str(record.get('key')))} where it says; give the encode command again"
    )


def read_at(descriptor: int, size: int, *, start: int, path: Path) -> bytearray:
    """So many bytes of a file. RunError if the disk refuses or the file ends before."""
    try:
        data = bytearray(os.pread(descriptor, size, start))
    except OSError as error:
        raise RunError(f"{path}: can't be read: {error.strerror}", status=1) from error
    if len(data) != size:
        raise RunError(
            f"{path}: cut: it ends before byte {start + size}; copy it again, or encode anew", status=1
        )
    return data


def read_samples(path: Path) -> list[Record]:
    """Lines of an index for one file of latents, tar or safetensors, by the headers in it. ConfigError if it
    holds none.
    """
    places = [(path.stem, 0)]
    if path.suffix == ".tar":
        found = ((name, start) for name, start, _ in members(str(path)))
        places = [(name.removesuffix(ENDING), start) for name, start in found if name.endswith(ENDING)]
    with disk_refusals(path):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        records = [_sample(descriptor, key, start=start, path=path) for key, start in places]
    finally:
        os.close(descriptor)
    if not records:
        raise ConfigError(f"{printable(str(path))}: holds no latents")
    return records


def _sample(descriptor: int, key: str, *, start: int, path: Path) -> Record:
    """The line of the index of a sample that begins at this byte."""
    length = int.from_bytes(read_at(descriptor, 8, start=start, path=path), "little")
    wrong = ConfigError(f"{printable(str(path))}: {printable(key)} is no latent of `causalvae encode`")
    if length > MOST_HEADER:
        raise wrong
    try:
        header = json.loads(read_at(descriptor, length, start=start + 8, path=path))
        known = {name: json.loads(text) for name, text in header.pop("__metadata__").items()}
        first = start + 8 + length
        tensors = {
            name: {**each, "offset": first + int(each["data_offsets"][0])} for name, each in header.items()
        }
        size = 8 + length + max(int(each["data_offsets"][1]) for each in header.values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise wrong from error
    where = {"key": key, "file": path.name, "offset": start, "bytes": size, "tensors": tensors}
    return where | {name: value for name, value in known.items() if name not in where}
