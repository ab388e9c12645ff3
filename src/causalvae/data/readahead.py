"""Threads that make what comes next while something is done with what is there. Little is kept ready."""

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from queue import SimpleQueue
from typing import Generic, TypeVar

T = TypeVar("T")
DEPTH = 2  # items of one source that are kept ready


def in_turn(sources: Iterable[Callable[[], Iterator[T]]], *, workers: int) -> Generator[Iterator[T]]:
    """For each source, in order, its items, which threads make: `workers` sources at a time.

    The items of a source must be taken before the next one is asked for, or are given up. What goes wrong in
    a source is raised where its items are taken. Close it, or take it to its end: threads wait for that.
    workers: 0 makes them in this thread.
    """
    if workers == 0:
        yield from (source() for source in sources)
        return
    rest = iter(sources)
    lines: deque[_Line[T]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="causalvae-ahead") as pool:
        try:
            while True:
                for source in islice(rest, workers - len(lines)):
                    lines.append(_Line(source, pool))
                if not lines:
                    return
                yield lines[0].items()
                lines.popleft().stop()
        finally:
            for line in lines:
                line.stop()


class _Line(Generic[T]):
    """The items of one source."""

    def __init__(self, source: Callable[[], Iterator[T]], pool: ThreadPoolExecutor) -> None:
        self._ready: SimpleQueue[tuple[T] | None] = SimpleQueue()
        self._room = threading.Semaphore(DEPTH)
        self._stopped = False
        self._making = pool.submit(self._make, source)
        self._making.add_done_callback(lambda _: self._ready.put(None))

    def items(self) -> Iterator[T]:
        """What is made, as it gets ready."""
        while (item := self._ready.get()) is not None:
            self._room.release()
            yield item[0]
        self._making.result()

    def stop(self) -> None:
        """No more of it is wanted."""
        self._stopped = True
        self._room.release()
        self._making.cancel()

    def _make(self, source: Callable[[], Iterator[T]]) -> None:
        for item in source():
            self._room.acquire()
            if self._stopped:
                return
            self._ready.put((item,))
