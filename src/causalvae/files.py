"""Files that appear whole or not at all, lines that are never torn, and the words for what a disk refuses."""

import errno
import hashlib
import math
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError

from causalvae.errors import ConfigError, RunError

HASH_BLOCK = 1 << 20
SECRET_NAME = r"[\w.-]*(?:token|secret|passw|credential|authorization|api[_-]?key|access[_-]?key)[\w.-]*|key"

Json = Mapping[str, Any]  # Any: JSON values nest


def write_whole(path: Path, content: str | bytes) -> None:
    """Write aside, sync, rename, sync the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    data = content if isinstance(content, bytes) else content.encode(errors="backslashreplace")
    try:
        partial.write_bytes(data)
        sync(partial)
        os.rename(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    sync(path.parent)


def append_whole(path: Path, data: bytes) -> None:
    """Add to a file in one write; what a full disk cut off is taken back."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        size = os.fstat(descriptor).st_size
        if os.write(descriptor, data) != len(data):
            os.ftruncate(descriptor, size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    finally:
        os.close(descriptor)


def plain(value: Any) -> Any:  # Any: JSON values nest
    """The value with numbers that JSON has no word for as text, such as "nan"."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in cast(Json, value).items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in cast("Sequence[Any]", value)]
    return value


def disk_error(error: OSError | SafetensorError, path: Path, *, num_bytes: int = 0) -> RunError | None:
    """What a disk refused, in words, with status 1; None if the error has no number of the system's.

    num_bytes: about how much was to be written, if known. safetensors puts the number in its text.
    """
    number = error.errno if isinstance(error, OSError) else None
    match = re.search(r"os error ([0-9]+)", str(error))
    if match is not None:
        number = int(match[1])
    if number is None:
        return None
    place = next(each for each in (path, *path.parents) if each.exists())
    disk = os.statvfs(place)
    needed = f"needed are about {num_bytes:,} bytes, " if num_bytes else ""
    return RunError(
        f"{path}: can't be written: {os.strerror(number)}; {needed}{disk.f_bavail * disk.f_frsize:,} "
        "bytes are free. What was saved before is intact; make room and give the command again",
        status=1,
    )


def refuse_place(out: Path) -> None:
    """ConfigError if results can't be written there: told before the work."""
    there = next(each for each in (out.absolute(), *out.absolute().parents) if each.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        what = "can't be written to" if there.is_dir() else "is no folder"
        raise ConfigError(f"--out {out}: {there} {what}; choose another place")


def redact(command: Sequence[str]) -> list[str]:
    """A command line to be written down: values that look like credentials are replaced by ***."""
    shown: list[str] = []
    hide_next = False
    for word in command:
        if hide_next and not word.startswith("--"):
            shown.append("***")
            hide_next = False
            continue
        hide_next = re.fullmatch(rf"--?(?:{SECRET_NAME})", word, re.IGNORECASE) is not None
        word = re.sub(r"(\w+://)[^/@\s]+@", r"\1***@", word)
        shown.append(re.sub(rf"((?:^|[-?&;])(?:{SECRET_NAME})=)[^&;]*", r"\1***", word, flags=re.IGNORECASE))
    return shown


def remove(path: Path) -> None:
    """Remove a file, a link or a whole folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Bring a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Checksum of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()
