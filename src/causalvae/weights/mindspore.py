"""MindSpore's .ckpt: protobuf records without a header, read and written here without MindSpore.

Checkpoint { repeated Value value = 1 }, Value { tag = 1; tensor = 2 }, TensorProto { repeated dims = 1;
tensor_type = 2; tensor_content = 3 }. Large tensors are cut into consecutive records with one tag. A check
sum, if there is one, is the last 17 bytes.
"""

import mmap
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO

import torch
from torch import Tensor

from causalvae.errors import WeightsError
from causalvae.weights.tensorfiles import MAX_TENSORS, printable, refuse_holes
from causalvae.weights.writing import aside, first_line, num_bytes_of, on_cpu

PIECE_BYTES = 512 * 2**20  # MindSpore cuts larger tensors
CRC_WORD, CRC_BYTES = b"crc_num", 10
MAX_TAG_BYTES, MAX_DIMS = 1000, 16
TEXT, TEXT_ENCODING = "str", "utf-32-le"
TYPES = {
    "Float32": torch.float32, "Float16": torch.float16, "BFloat16": torch.bfloat16, "Float64": torch.float64,
    "Int8": torch.int8, "Int16": torch.int16, "Int32": torch.int32, "Int64": torch.int64,
    "UInt8": torch.uint8, "UInt16": torch.uint16, "UInt32": torch.uint32, "UInt64": torch.uint64,
    "Bool": torch.bool,
}  # fmt: skip
TO_TORCH = {
    "gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var",
}  # fmt: skip


@dataclass(frozen=True)
class Record:
    """One record: a tensor or a piece of one. content: a view of the file."""

    tag: str
    dims: tuple[int, ...]
    kind: str
    content: memoryview


@dataclass(frozen=True)
class MindSporeFile:
    """Tensors and texts under the names in the file, in its order, and whether it ends in a check sum."""

    tensors: dict[str, Tensor]
    crc: bool
    texts: dict[str, str]


def is_mindspore(head: bytes) -> bool:
    """Whether a file begins like a record: its length, a tag, a tensor. head: at least 1100 bytes."""
    view = memoryview(head)
    try:
        _, start = _field(view, 0, b"\x0a")
        length, start = _field(view, start, b"\x0a")
    except ValueError:
        return False
    end = start + length
    return 0 < length <= MAX_TAG_BYTES and head[end : end + 1] in (b"\x12", b"\x1a")


def read_mindspore(path: Path) -> MindSporeFile:
    """All tensors and texts. WeightsError if anything does not parse or the sum differs."""
    refuse_holes(path)
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)  # closed when its last view goes
        return _parse(memoryview(mapped))
    except (OSError, ValueError, MemoryError) as error:
        raise WeightsError(
            f"{path}: not a whole MindSpore checkpoint: {first_line(error)}; copy or download it again, "
            "and if it was saved with an encryption key, save it without one"
        ) from error


def to_torch_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """MindSpore's names of norms replaced by torch's."""
    named: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        owner, dot, last = name.rpartition(".")
        named[owner + dot + (TO_TORCH.get(last, last) if dot else last)] = tensor
    return named


def to_mindspore_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """torch's names of norms replaced by MindSpore's; counters of batch norms, which it lacks, left out.

    A norm is known by its weight, which has one axis; those of all other layers have more.
    """
    from_torch = {torch_name: name for name, torch_name in TO_TORCH.items()}
    norms = {n.rpartition(".")[0] for n, t in tensors.items() if n.endswith(".weight") and t.ndim == 1}
    named: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        owner, dot, last = name.rpartition(".")
        if last != "num_batches_tracked":
            named[owner + dot + (from_torch.get(last, last) if owner in norms else last)] = tensor
    return named


def write_mindspore(
    path: Path, tensors: Mapping[str, Tensor], *, crc: bool, texts: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Write tensors with torch's names under MindSpore's. crc: end in a check sum. texts: records behind."""
    write_records(path, to_mindspore_names(tensors), crc=crc, texts=texts)


def write_records(
    path: Path,
    tensors: Mapping[str, Tensor],
    *,
    crc: bool,
    texts: Mapping[str, str] = MappingProxyType({}),
    piece_bytes: int = PIECE_BYTES,
) -> None:
    """Write tensors under their own names, in order, then texts.

    Tensors larger than piece_bytes are cut.
    """
    kinds = {dtype: kind for kind, dtype in TYPES.items()}
    for name, tensor in tensors.items():
        if tensor.dtype not in kinds:
            raise WeightsError(f"{path}: {name} is {tensor.dtype}, for which MindSpore's files have no word")
    with aside([path], num_bytes=num_bytes_of(tensors)) as (partial,), partial.open("wb") as file:
        total = 0
        for name, tensor in on_cpu(tensors).items():
            content = memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data)
            step = piece_bytes - piece_bytes % tensor.element_size()
            for start in range(0, max(1, len(content)), step):
                piece = content[start : start + step]
                head = _head(name, tuple(tensor.shape), kinds[tensor.dtype], length=len(piece))
                total = _write(file, piece, _write(file, head, total))
        for name, text in texts.items():
            content = text.encode(TEXT_ENCODING)
            head = _head(name, (0,), TEXT, length=len(content))
            total = _write(file, content, _write(file, head, total))
        if crc:
            file.write(CRC_WORD + total.to_bytes(CRC_BYTES, "big"))


def _write(file: BinaryIO, data: bytes | memoryview, total: int) -> int:
    """Write, and carry the check sum on."""
    file.write(data)
    return zlib.crc32(data, total)


def _head(name: str, dims: tuple[int, ...], kind: str, *, length: int) -> bytes:
    """A record up to its content of that many bytes."""
    tag = b"\x0a" + _sized(name.encode())
    shape = b"".join(b"\x08" + _varint(size) for size in dims)
    shape += b"\x12" + _sized(kind.encode()) + b"\x1a" + _varint(length)
    body = tag + b"\x12" + _varint(len(shape) + length) + shape
    return b"\x0a" + _varint(len(body) + length) + body


def _sized(data: bytes) -> bytes:
    return _varint(len(data)) + data


def _varint(number: int) -> bytes:
    parts = []
    while number > 0x7F:
        parts.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*parts, number])


def _parse(view: memoryview) -> MindSporeFile:
    tail = len(CRC_WORD) + CRC_BYTES
    end, crc = len(view), bytes(view[-tail:-CRC_BYTES]) == CRC_WORD
    if crc:
        end -= tail
        if zlib.crc32(view[:end]) != int.from_bytes(view[-CRC_BYTES:], "big"):
            raise ValueError("its check sum does not hold, so it is damaged")
    pieces: dict[str, list[Record]] = {}
    before = ""
    for number, record in enumerate(_records(view[:end])):
        if record.tag in pieces and record.tag != before:
            raise ValueError(f"{printable(record.tag)} is in it twice, so it can't be told which counts")
        if number >= MAX_TENSORS:
            raise ValueError(f"more than {MAX_TENSORS:,} records; no model has so many")
        pieces.setdefault(record.tag, []).append(record)
        before = record.tag
    joined = {tag: _joined(records) for tag, records in pieces.items() if records[0].kind != TEXT}
    texts = {tag: _text(records) for tag, records in pieces.items() if records[0].kind == TEXT}
    return MindSporeFile(joined, crc, texts)


def _text(records: list[Record]) -> str:
    return b"".join(each.content for each in records).decode(TEXT_ENCODING, "replace")


def _records(view: memoryview) -> Iterator[Record]:
    position = 0
    while position < len(view):
        length, start = _field(view, position, b"\x0a")
        position = start + length
        if position > len(view):
            raise ValueError(f"the record at byte {start} ends behind the end of the file")
        yield _record(view[start:position], start)


def _record(view: memoryview, place: int) -> Record:
    """place: where the record begins, for messages."""
    length, start = _field(view, 0, b"\x0a")
    try:
        tag = bytes(view[start : start + min(length, MAX_TAG_BYTES)]).decode()
    except UnicodeDecodeError:
        raise ValueError(f"the name of the record at byte {place} is not text") from None
    length, start = _field(view, start + length, b"\x12")
    body, start = view[start:], 0
    dims: list[int] = []
    while body[start : start + 1] == b"\x08" and len(dims) <= MAX_DIMS:
        size, start = _varint_at(body, start + 1)
        dims.append(size)
    size, start = _field(body, start, b"\x12")
    kind = bytes(body[start : start + min(size, 20)]).decode("ascii", "replace")
    size, start = _field(body, start + size, b"\x1a")
    if length != len(body) or start + size != len(body):
        raise ValueError(f"the lengths in the record {printable(tag)} at byte {place} do not fit each other")
    return Record(tag, tuple(dims), kind, body[start:])


def _joined(records: list[Record]) -> Tensor:
    """One tensor from its pieces, in memory of its own."""
    first = records[0]
    if any((each.dims, each.kind) != (first.dims, first.kind) for each in records):
        raise ValueError(f"the pieces of {printable(first.tag)} differ in shape or type")
    if first.kind not in TYPES:
        raise ValueError(f"{printable(first.tag)} has type {printable(first.kind)}, which is not known")
    dtype = TYPES[first.kind]
    content = bytearray().join(each.content for each in records)
    is_scalar = first.dims == (0,) and len(content) == dtype.itemsize  # as older files write them
    shape = () if is_scalar else first.dims
    if len(content) != prod(shape) * dtype.itemsize or len(shape) > MAX_DIMS:
        raise ValueError(
            f"{printable(first.tag)} has shape {list(shape)[:MAX_DIMS]} of {first.kind} and {len(content):,} "
            "bytes, which do not fit each other; is it there twice, or cut off?"
        )
    if not content:
        return torch.empty(shape, dtype=dtype)
    values = torch.frombuffer(content, dtype=torch.uint8)
    return (values.view(dtype) if dtype != torch.bool else values != 0).reshape(shape)


def _field(view: memoryview, position: int, key: bytes) -> tuple[int, int]:
    """Length of the field with this key, and where its content begins."""
    if bytes(view[position : position + 1]) != key:
        raise ValueError(f"no record can begin as byte {position} does")
    return _varint_at(view, position + 1)


def _varint_at(view: memoryview, position: int) -> tuple[int, int]:
    """A number of 7 bits a byte, the last without the top bit; and the position behind it."""
    number = 0
    for place, byte in enumerate(view[position : position + 10]):
        number |= (byte & 0x7F) << (7 * place)
        if byte < 0x80:
            return number, position + place + 1
    raise ValueError(f"the number at byte {position} has no end")
