"""A folder that one process at a time writes, held by a lock that ends with its process."""

import errno
import fcntl
import json
import os
import socket
from collections.abc import Generator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self, cast

from causalvae.errors import RunError
from causalvae.files import Json, disk_error, refuse_place

NAME = "lock"  # the file in the folder
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)  # of file systems that can't lock


class Lock:
    """A folder, made if it is not there and held until `close`, or used in a `with`.

    name: of the file that is locked, for a folder of several things that are held by themselves.
    warning: what to tell where the file system has no locks. OSError if the folder can't be written;
    RunError, which names the holder and says `instead`, if another process has it.
    """

    def __init__(self, folder: Path, *, instead: str, name: str = NAME) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.warning: str | None = None
        self._file = os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            self._take(folder, instead)
        except (OSError, RunError):
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the lock back."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _take(self, folder: Path, instead: str) -> None:
        """lockf, not flock: a worker process must not inherit the lock and outlive its parent with it."""
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in NO_LOCKS:
                self.warning = f"{folder}: this file system has no locks; start no second process on it"
                return
            raise RunError(f"{folder}: {_holder(self._file)}; wait for it, stop it, or {instead}") from error
        now = datetime.now(UTC).isoformat(timespec="seconds")
        text = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": now})
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, text.encode(), 0)


def _holder(lock: int) -> str:
    """Who has the lock, in words."""
    text = os.pread(lock, 4096, 0).decode(errors="replace")
    try:
        holder = cast(Json, json.loads(text))
        return f"in use by process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (ValueError, KeyError, TypeError):
        return "in use by another process"


@contextmanager
def held(out: Path) -> Generator[None]:
    """The folder for results is this process's alone. ConfigError if nothing can be written there."""
    refuse_place(out)
    try:
        lock = Lock(out, instead="give another --out")
    except OSError as error:
        raise disk_error(error, out) or error from error
    with lock:
        yield
