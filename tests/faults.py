"""Faults for tests: a child that is killed, or whose disk fails, at its n-th operation on files."""

import errno
import os
import signal
import sys
from collections.abc import Callable

from causalvae.errors import RunError

DISK_EVENTS = (
    "open",
    "os.rename",
    "os.mkdir",
    "os.rmdir",
    "os.remove",
    "os.chmod",
    "os.listdir",
    "os.scandir",
)
PAST_THE_END = 99


def at_event(number: int, action: Callable[[], None], work: Callable[[], None]) -> int:
    """Do the work in a child that acts at its n-th operation on files: its wait status.

    It exits with PAST_THE_END if there is no n-th.
    """
    child = os.fork()
    if child == 0:
        count = 0

        def hook(event: str, args: object) -> None:
            nonlocal count
            if event in DISK_EVENTS:
                count += 1
                if count == number:
                    action()

        status = 70
        sys.addaudithook(hook)
        try:
            work()
            status = PAST_THE_END if count < number else 0
        except RunError as error:
            status = error.status
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1]


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail_io() -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))
