"""Threads beside the main one: one makes the next piece, one takes what is done. Nothing piles up."""

from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self, TypeVar

T = TypeVar("T")


def ahead(pieces: Iterator[T]) -> Generator[T]:
    """The same pieces; a thread makes the next one while one is used. None of them may be None."""
    with ThreadPoolExecutor(1, thread_name_prefix="causalvae-ahead") as thread:
        waiting = thread.submit(next, pieces, None)
        while (piece := waiting.result()) is not None:
            waiting = thread.submit(next, pieces, None)
            yield piece


class Behind:
    """A thread that makes calls in their order. Use it in a `with`: its end waits for them.

    An error of a call leaves with the next call, or at the end.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="causalvae-behind")
        self._last: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def call(self, work: Callable[[], None]) -> None:
        """Make a call while the caller goes on; waits for the one before."""
        if self._last is not None:
            self._last.result()
        self._last = self._thread.submit(work)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._thread.shutdown(wait=True)
        finally:
            self._thread.shutdown(wait=True)  # also after a second Ctrl-C: what it writes to is closed next
        if kind is None and self._last is not None:
            self._last.result()
