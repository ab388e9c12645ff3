"""Batches of clips in the order of their cursor, read ahead, whatever happens to files and processes.

A thread of this process (`Feed`) gives out tasks, gathers clips, and replaces what dies or hangs. Nothing
that it does can interrupt the training, which only takes finished batches from a queue. Without workers the
thread reads the clips itself. What is in a batch follows from `data.clips` alone.
"""

import atexit
import math
import queue
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from causalvae.data.clips import (
    ClipPlan,
    ClipRequest,
    Outcome,
    Search,
    Task,
    clip_bytes,
    clip_in,
    clip_reader,
    perform,
)
from causalvae.data.decode import Decoder
from causalvae.data.index import IndexFile
from causalvae.data.sources import ClipSource
from causalvae.data.workers import DEATHS, TICK, Crew, News, Worker
from causalvae.errors import ConfigError, RunError

Record = dict[str, Any]  # Any: what a line of JSON may hold


@dataclass(frozen=True)
class Clips:
    """A batch. pixels: uint8 b 3 t h w, of the shape that the plan has for this cursor; requests: what each
    clip is, in the same order.
    """

    pixels: Tensor
    requests: tuple[ClipRequest, ...]
    cursor: int


class ClipLoader:
    """An endless iterator over `Clips`, from any cursor. A context manager: leaving it ends the processes.

    workers: processes; with 0 a thread of this one reads, and a file that hangs it can't be given up.
    clip_timeout: seconds with one clip after which a process is taken to hang. known: ids of videos that are
    recorded already, with the reason why one is bad as a whole and is not even opened, or None. index: the
    file where indices of videos are found and kept (`data.index.prepare`). on_quarantine: called while a
    batch is taken, once per bad video, with `video`, `path`, `reason`, and `whole`: whether the file is bad
    whatever clip is asked of it. In the same order for any number of workers.
    """

    def __init__(
        self,
        source: ClipSource,
        plan: ClipPlan,
        *,
        cursor: int = 0,
        workers: int = 0,
        clip_timeout: float = 60.0,
        known: Mapping[str, str | None] | None = None,
        index: Path | None = None,
        on_quarantine: Callable[[Record], None] | None = None,
    ) -> None:
        self._feed = Feed(
            source, plan, cursor=cursor, workers=workers, clip_timeout=clip_timeout, index=index
        )
        self._recorded = set(known or {})
        self._feed.bad.update({video: why for video, why in (known or {}).items() if why is not None})
        self._on_quarantine = on_quarantine
        self._waited = 0.0
        self._thread = threading.Thread(target=self._feed.run, name="causalvae-clips", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # before multiprocessing's own, which would wait for a stopped process

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Clips:
        """The next batch. ConfigError if no video can be used for a place of it."""
        began = time.monotonic()
        batch = self._take()
        self._waited += time.monotonic() - began
        for record in batch.records():
            self._quarantine(record)
        if batch.error is not None:
            raise batch.error
        self._feed.taken(batch.cursor)
        requests = tuple(search.request for search in batch.searches if search.request is not None)
        return Clips(batch.pixels, requests, batch.cursor)

    def take_wait(self) -> float:
        """Seconds that taking batches has blocked since this was last asked."""
        waited, self._waited = self._waited, 0.0
        return waited

    def close(self) -> None:
        """End the reading processes. A second call does nothing."""
        atexit.unregister(self.close)
        if self._thread.is_alive():
            self._feed.stop()
            self._thread.join(timeout=10)  # longer only where the thread itself reads from a hanging disk

    def _take(self) -> "Batch":
        """The next batch; notices that come before it are passed on."""
        while True:
            item = self._feed.finished.get()
            if isinstance(item, Batch):
                return item
            if item is None:
                self._feed.finished.put(None)  # for a further call
                raise RunError(
                    "the thread that loads clips has ended; see above, if it was not closed", status=1
                )
            warnings.warn(item, stacklevel=3)

    def _quarantine(self, record: Record) -> None:
        if record["video"] in self._recorded:
            return
        self._recorded.add(record["video"])
        if self._on_quarantine is not None:
            self._on_quarantine(record)


class Batch:
    """A batch in the making. pixels: uint8 b 3 t h w. error: why it can't be made.

    plan: of the shape that all its clips have.
    """

    def __init__(self, source: ClipSource, plan: ClipPlan, *, cursor: int, bad: dict[str, str]) -> None:
        self.cursor = cursor
        self.plan = plan = plan.at(cursor)
        self.pixels = torch.empty((plan.batch, 3, plan.frames, *plan.size), dtype=torch.uint8)
        self.searches = [
            Search(source, plan, cursor=cursor, sample=sample, bad=bad) for sample in range(plan.batch)
        ]
        self.error: ConfigError | None = None

    @property
    def complete(self) -> bool:
        return self.error is not None or all(search.request is not None for search in self.searches)

    def records(self) -> list[dict[str, Any]]:
        """Bad videos met on the way, in an order that does not depend on timing."""
        return [record for search in self.searches for record in search.records]


class Feed:
    """Makes batches from `cursor` on. finished: batches in order, notices for a person, None at the end.

    All but `finished`, `taken` and `stop` belongs to the thread that runs `run`.
    """

    def __init__(
        self,
        source: ClipSource,
        plan: ClipPlan,
        *,
        cursor: int,
        workers: int,
        clip_timeout: float,
        index: Path | None,
    ) -> None:
        self.finished: queue.Queue[Batch | str | None] = queue.Queue()
        self.bad: dict[str, str] = {}
        self._source, self._plan, self._clip_timeout = source, plan, clip_timeout
        self._ahead = 2 + math.ceil(workers / plan.batch)
        self._limit = cursor + self._ahead
        self._next = cursor
        self._stopping = False
        self._woken, self._waker = Pipe(duplex=False)
        self._batches: deque[Batch] = deque()
        self._todo: deque[tuple[Batch, Search]] = deque()
        self._crew = Crew[Task, Outcome](
            partial(clip_reader, plan, index),
            size=workers,
            timeout=clip_timeout,
            shared_bytes=clip_bytes(plan),
        )
        self._places: dict[Worker[Task, Outcome], tuple[Batch, Search]] = {}
        self._decoder = Decoder(None if index is None else IndexFile(index))

    def taken(self, cursor: int) -> None:
        """The batch of this cursor was taken: go on reading ahead."""
        self._limit = cursor + 1 + self._ahead
        self._waker.send_bytes(b"taken")

    def stop(self) -> None:
        """End the thread and its processes soon."""
        self._stopping = True
        self._waker.send_bytes(b"stop")

    def run(self) -> None:
        """Work until stopped, or until a batch can't be made."""
        try:
            while not self._stopping and not (self._batches and self._batches[0].error):
                self._open_batches()
                self._make_do(self._crew.staff())
                if self._crew.workers:
                    self._hand_out()
                    self._listen()
                elif self._todo:
                    self._read_here(*self._todo.popleft())
                else:
                    self._rest([])
                self._ship()
        finally:
            self._crew.kill()
            self._decoder.close()
            self.finished.put(None)

    def _open_batches(self) -> None:
        while self._next < self._limit and not any(batch.error for batch in self._batches):
            batch = Batch(self._source, self._plan, cursor=self._next, bad=self.bad)
            self._batches.append(batch)
            self._todo.extend((batch, search) for search in batch.searches)
            self._next += 1

    def _ship(self) -> None:
        """Pass on the batches that are complete, in order, up to one that can't be made."""
        while self._batches and self._batches[0].complete:
            self.finished.put(self._batches[0])
            if self._batches[0].error:
                return
            self._batches.popleft()

    def _make_do(self, reason: str | None) -> None:
        """Say that there are fewer processes than wanted, if there is a reason."""
        if reason is None:
            return
        left = self._crew.size
        with_what = f"by {left} of them" if left else "in the training process itself"
        self.finished.put(
            f"--dataloader_num_workers: a process can't be started ({reason}). Clips are read {with_what}, "
            f"and they are the same. A script that trains needs `if __name__ == '__main__':` around the call"
        )

    def _hand_out(self) -> None:
        for worker in self._crew.idle():
            if not self._todo:
                return
            batch, search = self._todo.popleft()
            task = self._next_try(batch, search)
            if task is None:
                continue
            if worker.send(task):
                self._places[worker] = (batch, search)
            else:
                self._todo.appendleft((batch, search))  # it has died; `_listen` will see that

    def _next_try(self, batch: Batch, search: Search) -> Task | None:
        if batch.error is not None:
            return None
        try:
            return search.task()
        except ConfigError as error:
            batch.error = error
            return None

    def _read_here(self, batch: Batch, search: Search) -> None:
        """Fill a place in this thread."""
        task = self._next_try(batch, search)
        if task is None:
            return
        out = batch.pixels[search.sample]
        outcome = perform(task, batch.plan, decoder=self._decoder, out=out)
        if not search.settle(task, outcome):
            self._todo.appendleft((batch, search))

    def _listen(self) -> None:
        """Wait for news of the processes, and settle what they bring: clips, bad videos, deaths, hangs."""
        self._rest(self._crew.signs())
        found, problem = self._crew.news()
        for news in found:
            place = self._places.pop(news.worker)
            if news.result is not None:
                self._settle(place, news, outcome=news.result)
            else:
                self._blame(place, news)
        self._make_do(problem)

    def _rest(self, sources: list[Any]) -> None:  # Any: what multiprocessing can wait for
        """Wait until one of the sources or the training thread has news, or a tick has passed."""
        if self._woken in wait([self._woken, *sources], TICK):
            while self._woken.poll():
                self._woken.recv_bytes()

    def _settle(self, place: tuple[Batch, Search], news: News[Task, Outcome], *, outcome: Outcome) -> None:
        batch, search = place
        if not search.settle(news.task, outcome):
            self._todo.appendleft(place)
        elif news.worker.pixels is not None:
            batch.pixels[search.sample].copy_(clip_in(news.worker.pixels, batch.plan))

    def _blame(self, place: tuple[Batch, Search], news: News[Task, Outcome]) -> None:
        """A process is gone. Where it died, its task is tried once more; else the video is to blame."""
        search = place[1]
        search.deaths += 1
        if not news.hung and search.deaths < DEATHS:
            self._todo.appendleft(place)
            return
        reason = f"reading it took longer than {self._clip_timeout:g} s"
        if not news.hung:
            reason = f"the process that read it died {DEATHS} times ({news.died})"
        self._settle(place, news, outcome=Outcome("bad", reason=reason, whole=True))
