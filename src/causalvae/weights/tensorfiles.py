"""The safetensors format: one file, or shards with an index, as the hub names them.

The library checks offsets and shapes; looked at here before: the header's size, the number of tensors, names
given twice, and files that are mostly holes.
"""

import json
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from causalvae.errors import WeightsError
from causalvae.weights.writing import aside, first_line, mode_of_new_files, num_bytes_of, on_cpu

MAX_HEADER_BYTES = 16 * 2**20  # a larger header takes seconds and gigabytes to read
MAX_TENSORS = 100_000
MAX_JSON_BYTES = 16 * 2**20
MAX_PARTS = {b"[": 4 * MAX_TENSORS, b"{": 4 * MAX_TENSORS, b'"': 20 * MAX_TENSORS}  # more take seconds
SPARSE_FROM = 256 * 2**20  # smaller files can be as empty as they like
INDEX_SUFFIX = ".index.json"


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of itself."""

    metadata: dict[str, str]
    names: list[str]


def is_safetensors(head: bytes) -> bool:
    """Whether a file begins like safetensors: the header's size, then a JSON object. head: first 16 bytes."""
    return len(head) >= 9 and head[8:9] == b"{" and not is_json(head)


def is_json(head: bytes) -> bool:
    """Whether a file begins like a JSON object. The size in a safetensors header has zero bytes."""
    return head.lstrip()[:1] == b"{" and 0 not in head[:8]


def read_safetensors(path: Path, names: Collection[str] | None = None) -> dict[str, Tensor]:
    """Tensors of a file, all or those named, in memory of their own."""
    header = read_safetensors_header(path)
    wanted = header.names if names is None else list(names)
    missing = sorted(set(wanted) - set(header.names))
    if missing:
        raise WeightsError(f"{path}: {missing[0]} is not in it, though the index says so; copy it again")
    refuse_holes(path)
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name).clone() for name in wanted}
    except (SafetensorError, OSError, RuntimeError, MemoryError, ValueError, TypeError) as error:
        raise _not_whole(path, error) from error


def read_safetensors_header(path: Path) -> Header:
    """Names and metadata. WeightsError if it is cut, absurdly large, or names a tensor twice."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if not 2 <= size <= min(MAX_HEADER_BYTES, path.stat().st_size - 8):
                raise WeightsError(
                    f"{path}: not a whole safetensors file: its header claims {size:,} bytes, possible are "
                    f"at most {MAX_HEADER_BYTES:,} and the file's own size; copy or download it again"
                )
            entries = parse_json(file.read(size), path)
    except OSError as error:
        raise _not_whole(path, error) from error
    metadata = entries.pop("__metadata__", {})
    if len(entries) > MAX_TENSORS:
        raise WeightsError(f"{path}: claims {len(entries):,} tensors; no model has more than {MAX_TENSORS:,}")
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise WeightsError(f"{path}: not a safetensors file: the metadata in its header is no table of text")
    return Header(metadata, list(entries))


def parse_json(text: bytes, path: Path) -> dict[str, Any]:  # Any: JSON values nest
    """A JSON object. WeightsError if it is none, or has one name twice."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for place, name in enumerate(names) if name in names[:place])
            raise WeightsError(f"{path}: {printable(twice)} is in it twice, so it can't be told which counts")
        return found

    for part, most in MAX_PARTS.items():
        if text.count(part) > most:
            raise WeightsError(f"{path}: its description has more parts than that of any model")
    try:
        found = json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path}: damaged, or of another kind: {first_line(error)}") from error
    if not isinstance(found, dict):
        raise WeightsError(f"{path}: a JSON object was expected, this is {type(found).__name__}")
    return found


def read_json(path: Path) -> dict[str, Any]:  # Any: JSON values nest
    """A JSON object from a file of reasonable size."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise WeightsError(f"{path}: too large for a description of weights; is it another file?")
        return parse_json(path.read_bytes(), path)
    except OSError as error:
        raise WeightsError(f"{path}: can't be read: {error.strerror}") from error


def read_index(path: Path) -> dict[Path, list[str]]:
    """Which tensors are in which shard, by an index file. Shards lie beside it and nowhere else."""
    index = read_json(path)
    where = index.get("weight_map")
    if not isinstance(where, dict) or not where or len(where) > MAX_TENSORS:
        raise WeightsError(
            f"{path}: JSON, but no index of weights, which has a table weight_map; name the file of weights, "
            "an index, or the folder of a model"
        )
    shards: dict[Path, list[str]] = {}
    for name, shard in where.items():
        if not isinstance(shard, str) or shard in ("", ".", "..") or any(c in shard for c in "/\\\0"):
            raise WeightsError(f"{path}: names a shard {printable(str(shard))}; shards must lie beside it")
        shards.setdefault(path.parent / shard, []).append(name)
    for shard in shards:
        if not shard.is_file():
            raise WeightsError(f"{shard}: this shard of {path.name} is missing; copy or download it again")
    return shards


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str], shard_size: int | None = None
) -> Path:
    """Write one file, or shards of about shard_size bytes and their index. Returns the one to name."""
    shards = _shards(on_cpu(tensors), shard_size)
    if len(shards) == 1:
        names, written = [path], path
    else:
        names = [_shard_name(path, number, len(shards)) for number in range(1, len(shards) + 1)]
        written = path.with_name(path.name + INDEX_SUFFIX)
        names.append(written)
    with aside(names, num_bytes=num_bytes_of(tensors)) as partials:
        mode = mode_of_new_files(partials[0])
        for partial, shard in zip(partials, shards, strict=False):  # the index is left over
            save_file(shard, partial, metadata={"format": "pt", **metadata})
            partial.chmod(mode)  # the library's files can be read by their owner only
        if len(shards) > 1:
            where = {name: p.name for p, s in zip(names, shards, strict=False) for name in sorted(s)}
            index = {"metadata": {"total_size": num_bytes_of(tensors)}, "weight_map": where}
            partials[-1].write_text(json.dumps(index, indent=2) + "\n")
    return written


def _shards(tensors: dict[str, Tensor], shard_size: int | None) -> list[dict[str, Tensor]]:
    """The tensors in order, cut where the next one would pass the size; a larger one stands alone."""
    shards: list[dict[str, Tensor]] = [{}]
    for name, tensor in tensors.items():
        size = num_bytes_of(shards[-1]) + tensor.numel() * tensor.element_size()
        if shard_size is not None and shards[-1] and size > shard_size:
            shards.append({})
        shards[-1][name] = tensor
    return shards


def _shard_name(path: Path, number: int, count: int) -> Path:
    return path.with_name(f"{path.stem}-{number:05d}-of-{count:05d}{path.suffix}")


def refuse_holes(path: Path) -> None:
    """WeightsError for a large file most of which was never written: it claims memory for nothing."""
    size = path.stat().st_size
    if size < SPARSE_FROM:
        return
    written = position = 0
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        while position < size and written < size // 2:
            start = os.lseek(descriptor, position, os.SEEK_DATA)
            position = os.lseek(descriptor, start, os.SEEK_HOLE)
            written += position - start
    except OSError:  # no data behind this position, or a disk that knows no holes
        written = written if position else size
    finally:
        os.close(descriptor)
    if written < size // 2:
        raise WeightsError(f"{path}: most of it was never written (a copy that broke off?); copy it again")


def printable(text: str) -> str:
    """A name from a file, fit for a message of one line."""
    shown = repr(text)
    return shown if len(shown) <= 100 else shown[:97] + "..."


def _not_whole(path: Path, error: BaseException) -> WeightsError:
    return WeightsError(
        f"{path}: not a whole safetensors file: {first_line(error)}; copy or download it again"
    )
