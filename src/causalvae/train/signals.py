"""Signals: one asks the loop to end after its step, and a second one ends the process; or one is an exit."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
HEARD = b"stopping when this step is done; another signal ends it at once\n"


@dataclass
class StopRequest:
    """The signal that asked, or 0."""

    number: int = 0

    @property
    def status(self) -> int:
        """Exit status by convention: 128 + the signal's number, 0 if none came."""
        return 128 + self.number if self.number else 0


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Within this, the signals above set a flag and say so, as a step may take minutes.

    The handlers that were there before come back.
    """
    request = StopRequest()

    def handle(number: int, frame: FrameType | None) -> None:  # noqa: ARG001  the signature of a handler
        if request.number:
            os._exit(128 + number)  # checkpoints are whole or absent at every moment
        request.number = number
        with suppress(OSError):  # a terminal that is gone
            os.write(2, HEARD)

    before = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Within this, SIGTERM raises SystemExit, so that what is half done is removed on the way out."""

    def leave(number: int, frame: FrameType | None) -> None:  # noqa: ARG001  the signature of a handler
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
