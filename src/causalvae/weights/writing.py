"""Files of weights appear whole or not at all: written aside, synced, renamed; and the casting before it."""

import errno
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from torch import Tensor

from causalvae.errors import RunError, WeightsError
from causalvae.files import disk_error, remove, sync

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
BUFFERS = ("running_mean", "running_var")  # of batch norms: statistics, which stay as they are


@contextmanager
def aside(targets: Sequence[Path], *, num_bytes: int) -> Iterator[list[Path]]:
    """Names to write to beside the targets, which get their own names, in order, if the block ends well.

    num_bytes: about how much will be written, for the message. RunError (status 1) if the disk refuses it;
    then nothing of it is left.
    """
    partials = [target.with_name(f".{target.name}.partial") for target in targets]
    folder = targets[0].parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_all(partials)  # of a writer that was killed
        yield partials
        for partial in partials:
            _sync_all(partial)
        for partial, target in zip(partials, targets, strict=True):
            os.rename(partial, target)
        sync(folder)
    except RunError as error:  # of a file in a folder that is written aside
        said = str(error).replace(str(partials[0]), str(targets[0]))
        raise RunError(said, status=error.status) from error
    except (OSError, SafetensorError, RuntimeError) as error:
        raise refused(error, targets[0], num_bytes=num_bytes) from error
    finally:
        with suppress(OSError):  # what goes wrong here has a reason that was already told
            _remove_all(partials)


def _remove_all(paths: Sequence[Path]) -> None:
    for path in paths:
        remove(path)


def refused(error: OSError | SafetensorError | RuntimeError, path: Path, *, num_bytes: int) -> RunError:
    """Why a file could not be written, in words. torch does not say that a disk is full: its space tells."""
    known = disk_error(error, path, num_bytes=num_bytes) if not isinstance(error, RuntimeError) else None
    if known is not None:
        return known
    disk = os.statvfs(next(each for each in path.parents if each.exists()))
    if disk.f_bavail * disk.f_frsize < num_bytes:
        full = disk_error(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), path, num_bytes=num_bytes)
        assert full is not None, "an error with a number has words"
        return full
    return RunError(f"{path}: can't be written: {first_line(error)}", status=1)


def first_line(error: BaseException) -> str:
    """The first line of an error's text, for a message of one line; its kind if there is no text."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def mode_of_new_files(partial: Path) -> int:
    """Permissions that a new file gets here; made and removed under the name given."""
    with partial.open("wb") as file:
        mode = os.fstat(file.fileno()).st_mode & 0o777
    partial.unlink()
    return mode


def num_bytes_of(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of all values."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in C order, on the CPU, none sharing memory with another of them."""
    taken: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        storage = plain.untyped_storage()
        if storage.nbytes() != plain.numel() * plain.element_size() or storage.data_ptr() in seen:
            plain = plain.clone()
        seen.add(plain.untyped_storage().data_ptr())
        taken[name] = plain
    return taken


def to_dtype(tensors: Mapping[str, Tensor], dtype: Literal["fp32", "fp16", "bf16"]) -> dict[str, Tensor]:
    """The tensors with their floating-point values in another type; integers and statistics stay.

    WeightsError if a finite value has no place in fp16.
    """
    cast: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or name.rsplit(".", 1)[-1] in BUFFERS:
            cast[name] = tensor
            continue
        cast[name] = tensor.to(DTYPES[dtype])
        if dtype == "fp16" and bool((torch.isinf(cast[name]) & torch.isfinite(tensor)).any()):
            raise WeightsError(f"{name}: has values beyond 65504, too large for fp16; choose bf16 or fp32")
    return cast


def refuse_not_finite(tensors: Mapping[str, Tensor], path: Path) -> None:
    """WeightsError that names the first tensor with a NaN or an infinite value."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            continue
        if not all_finite(tensor):
            raise WeightsError(
                f"{path}: {name} holds values that are not numbers (NaN or infinite), so the training that "
                "wrote it had broken down; take an earlier checkpoint"
            )


def all_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite, from the extremes: a twentieth of the time of torch.isfinite."""
    if tensor.numel() == 0:
        return True
    values = tensor.float() if tensor.element_size() == 1 else tensor
    low, high = torch.aminmax(values)  # NaN if a value is
    return math.isfinite(float(low)) and math.isfinite(float(high))


def _sync_all(path: Path) -> None:
    """Bring a file, or a folder and the files in it, to the disk."""
    if path.is_dir():
        for inner in path.iterdir():
            sync(inner)
    sync(path)
