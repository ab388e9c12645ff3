"""torch's own files of weights: the zip format and the pickles before it, read as data and never run.

Before torch's restricted reader sees a file, the archive's sizes and every name in its pickle are looked at.
No reader here executes anything that a file holds.
"""

import io
import pickle
import pickletools
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, Literal

import torch
from torch import Tensor
from torch._utils import IMPORT_MAPPING, NAME_MAPPING

from causalvae.errors import WeightsError
from causalvae.weights.standins import allowed, stand_ins
from causalvae.weights.tensorfiles import printable, refuse_holes
from causalvae.weights.writing import aside, first_line, num_bytes_of, on_cpu

MAX_DIRECTORY_BYTES = 16 * 2**20  # of the archive: about 200,000 records
MAX_PICKLE_BYTES, MAX_PICKLE_STEPS, MAX_OBJECTS = 32 * 2**20, 1_000_000, 100_000
MAKES_OBJECTS = ("GLOBAL", "REDUCE", "NEWOBJ", "BUILD")  # steps that take torch long
MAP_FROM = 2 * 2**30  # larger files are mapped, so that what is not asked for is not in memory
MAX_SHARING = 2.0  # bytes of all tensors may be so many times those of the file, for tied weights
LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
LEGACY_PICKLES = 5  # magic number, protocol, facts of the system, the tables, keys of storages
BLOCK = 1 << 20
# what torch.load raises for damaged files
UNREADABLE = (
    RuntimeError, pickle.UnpicklingError, EOFError, LookupError, ValueError, TypeError, AttributeError,
    AssertionError, ArithmeticError, OSError, MemoryError, ImportError, struct.error, zipfile.BadZipFile,
)  # fmt: skip


def is_torch_zip(head: bytes) -> bool:
    """Whether a file begins like a zip archive."""
    return head[:4] == b"PK\x03\x04"


def is_torch_legacy(head: bytes) -> bool:
    """Whether a file begins like a pickle of torch before version 1.6."""
    return head[: len(LEGACY_MAGIC)] == LEGACY_MAGIC


def read_torch(path: Path) -> tuple[dict[str, Any], list[str]]:  # Any: what the file holds beside weights
    """The table in a torch file, on the CPU, and what is worth saying about the file.

    Tensors may share memory and be larger than what they are made of: `owned` gives them memory of their own.
    """
    refuse_holes(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is old or odd in the file
        notes = _look_at(path)
        found = _load(path)
    if not isinstance(found, dict):
        raise WeightsError(f"{path}: holds {type(found).__name__} and no table of weights by name")
    return dict(dict.items(found)), notes


def _look_at(path: Path) -> list[str]:
    """Refuse what no torch file of weights has, before torch sees it. Returns what is worth saying."""
    with path.open("rb") as file:
        if is_torch_zip(file.read(4)):
            return _look_at_archive(file, path)
        file.seek(0)
        for _ in range(LEGACY_PICKLES):
            _look_at_pickle(file, path)
    return []


def _load(path: Path) -> object:
    """What torch's restricted reader makes of a file, with stand-ins for types of data."""
    known: list[Any] = [(kind, name) for name, kind in stand_ins().items()]  # Any: as torch annotates it
    mapped = zipfile.is_zipfile(path) and path.stat().st_size > MAP_FROM
    try:
        with torch.serialization.safe_globals(known):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except UNREADABLE as error:
        raise _not_whole(path, _reason(error)) from error


def _reason(error: BaseException) -> str:
    """Why torch refused, without its advice, which is to run what is in the file."""
    text = re.sub(r"(?s).*WeightsUnpickler error:\s*", "", str(error))
    line = (text.strip().splitlines() or [type(error).__name__])[0][:200]
    return "its table can't be read" if "Weights only load" in line else line


def owned(tensors: Mapping[str, Tensor], path: Path, *, num_bytes: int) -> dict[str, Tensor]:
    """The tensors in memory of their own. WeightsError for one that claims more values than it has.

    num_bytes: of all files that the tensors came from.
    """
    bare = {name: Tensor.detach(tensor) for name, tensor in tensors.items()}  # without what a file hung on it
    for name, tensor in bare.items():
        plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
        if not plain or type(tensor) is not Tensor:
            raise WeightsError(f"{path}: {printable(name)} is sparse, quantised or of another special kind")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise WeightsError(
                f"{path}: {printable(name)} claims {tensor.numel():,} values and has fewer; that is no weight"
            )
    size = num_bytes_of(bare)
    if size > MAX_SHARING * num_bytes:
        raise WeightsError(f"{path}: its tensors claim {size:,} bytes, more than the file can hold")
    return on_cpu(bare) if num_bytes <= MAP_FROM else _copies(bare)


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }


def write_torch(
    path: Path,
    tensors: Mapping[str, Tensor],
    *,
    layout: Literal["plain", "state_dict", "open-sora-plan"],
    texts: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Write a torch file: the bare table, under `state_dict`, or as Open-Sora-Plan v1.2 and later do.

    texts: what else stands in the outermost table, such as whose model it is.
    """
    own = on_cpu(tensors)
    tables: dict[str, dict[str, Any]] = {  # Any: tables in tables
        "plain": own,
        "state_dict": {"state_dict": own},
        "open-sora-plan": {"state_dict": {"gen_model": own}, "ema_state_dict": {}},
    }
    with aside([path], num_bytes=num_bytes_of(own)) as (partial,), partial.open("wb") as file:
        torch.save(tables[layout] | dict(texts), file)  # a file, so that its name is not in it


def _look_at_archive(file: BinaryIO, path: Path) -> list[str]:
    """Refuse an archive that is not as torch writes it: nothing packed, nothing overlapping, all there."""
    if _directory_bytes(file) > MAX_DIRECTORY_BYTES:
        raise _not_whole(path, "its table of contents is absurdly large")
    try:
        with zipfile.ZipFile(file) as archive:
            records = sorted(archive.infolist(), key=lambda each: each.header_offset)
            _refuse_sizes(records, path)
            pickles = [each for each in records if each.filename.endswith("/data.pkl")]
            if any(each.filename.endswith("/constants.pkl") for each in records):
                raise WeightsError(f"{path}: a TorchScript program; give a file of its weights (state_dict)")
            if len(pickles) != 1:
                raise WeightsError(f"{path}: a zip archive, but none of torch weights")
            _go_to(file, pickles[0])
            _look_at_pickle(io.BytesIO(file.read(pickles[0].file_size)), path)
            return _check_sums(file, records, path)
    except (zipfile.BadZipFile, OSError, ValueError, EOFError, NotImplementedError, struct.error) as error:
        raise _not_whole(path, first_line(error)) from error


def _directory_bytes(file: BinaryIO) -> int:
    """Size of the archive's table of contents, as its last record says; 0 if there is none."""
    file.seek(0, io.SEEK_END)
    file.seek(max(0, file.tell() - 2**16 - 100))
    tail = file.read()
    small, large = tail.rfind(b"PK\x05\x06"), tail.rfind(b"PK\x06\x06")
    sizes = [0]
    if small >= 0 and len(tail) >= small + 22:
        sizes.append(int.from_bytes(tail[small + 12 : small + 16], "little"))
    if large >= 0 and len(tail) >= large + 56 and sizes[-1] == 0xFFFFFFFF:
        sizes[-1] = int.from_bytes(tail[large + 40 : large + 48], "little")
    return sizes[-1]


def _refuse_sizes(records: list[zipfile.ZipInfo], path: Path) -> None:
    """records: in the order of their places in the file."""
    size = path.stat().st_size
    names: set[str] = set()
    end = 0
    for each in records:
        if (
            each.compress_type != zipfile.ZIP_STORED
            or each.file_size != each.compress_size
            or each.flag_bits & 1
        ):
            raise WeightsError(f"{path}: {printable(each.filename)} is packed, which torch never does")
        if each.filename in names or each.header_offset < end:
            raise WeightsError(
                f"{path}: {printable(each.filename)} overlaps another record or is there twice"
            )
        names.add(each.filename)
        end = each.header_offset + 30 + each.file_size
        if end > size:
            raise _not_whole(path, f"{printable(each.filename)} ends behind the end of the file")
        if each.filename.endswith("/data.pkl") and each.file_size > MAX_PICKLE_BYTES:
            raise WeightsError(f"{path}: its table is {each.file_size:,} bytes, more than weights can need")


def _check_sums(file: BinaryIO, records: list[zipfile.ZipInfo], path: Path) -> list[str]:
    """Refuse damaged records. Files may be written without sums: then all differ, and it is said."""
    told = [each for each in records if "/data/" in each.filename or each.filename.endswith("/data.pkl")]
    wrong = [each.filename for each in told if _sum(file, each) != each.CRC]
    if wrong and len(wrong) == len(told) > 1:
        return [f"{path.name} was written without check sums, so damage in it can't be seen"]
    if wrong:
        raise _not_whole(path, f"the check sum of {printable(wrong[0])} does not hold, so it is damaged")
    return []


def _sum(file: BinaryIO, record: zipfile.ZipInfo) -> int:
    total, left = 0, record.file_size
    _go_to(file, record)
    while block := file.read(min(BLOCK, left)):
        total, left = zlib.crc32(block, total), left - len(block)
    return total


def _go_to(file: BinaryIO, record: zipfile.ZipInfo) -> None:
    """Go to where a record's content begins: behind its own head, a name and more of varying size."""
    file.seek(record.header_offset + 26)
    name, extra = struct.unpack("<HH", file.read(4))
    file.seek(name + extra, io.SEEK_CUR)


def _look_at_pickle(file: BinaryIO, path: Path) -> None:
    """Refuse a pickle that names anything but weights and types of data, without running it."""
    names, objects = allowed(), 0
    try:
        for steps, (step, value, _) in enumerate(pickletools.genops(file)):
            objects += step.name in MAKES_OBJECTS
            if steps > MAX_PICKLE_STEPS or objects > MAX_OBJECTS:
                raise WeightsError(f"{path}: its table takes more steps to read than weights can need")
            if step.name == "PROTO" and value != 2:
                raise WeightsError(
                    f"{path}: a pickle of protocol {value}; save it by torch.save as it is by default"
                )
            if step.name == "GLOBAL":
                _refuse_name(str(value), names, path)
    except (ValueError, IndexError, struct.error, UnicodeError, OverflowError, MemoryError) as error:
        raise _not_whole(path, first_line(error)) from error


def _refuse_name(value: str, names: frozenset[str], path: Path) -> None:
    """value: a module and a name in it, with a blank between."""
    module, _, name = value.partition(" ")
    module, name = _python3(module, name)
    if f"{module}.{name}" not in names:
        raise WeightsError(
            f"{path}: holds {printable(f'{module}.{name}')}, which is neither a weight nor plain data, so it "
            "was not read and nothing in it was run. Save the state_dict alone, or as safetensors"
        )


def _python3(module: str, name: str) -> tuple[str, str]:
    """The name that Python 2 had for something, in Python 3."""
    if (module, name) in NAME_MAPPING:
        return NAME_MAPPING[(module, name)]
    return IMPORT_MAPPING.get(module, module), name


def _not_whole(path: Path, reason: str) -> WeightsError:
    return WeightsError(f"{path}: not a whole file of torch weights: {reason}; copy or download it again")
