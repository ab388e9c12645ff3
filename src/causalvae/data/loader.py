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
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import wait
from typing import Any, Self

import torch
from torch import Tensor

from causalvae.data.clips import ClipPlan, ClipRequest, Outcome, Search, Task, perform
from causalvae.data.decode import Decoder
from causalvae.data.sources import ClipSource
from causalvae.data.workers import Worker
from causalvae.errors import ConfigError, RunError

START_SECONDS = 120.0  # for a process to import what it needs, from a slow disk
START_FAILURES = 3  # processes in a row that ended before they were ready
DEATHS = 2  # of processes over one task before the video is blamed
TICK = 0.5  # seconds between looks at the clock

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
    clip_timeout: seconds with one clip after which a process is taken to hang. quarantined: ids of videos
    recorded by an earlier run; they are not recorded again. unreadable: ids of those that are bad as a
    whole, with the reason; they are not even opened. on_quarantine: called while a batch is taken, once per
    bad video, with `video`, `path`, `reason`, and `whole`: whether the file is bad whatever clip is asked
    of it. In the same order for any number of workers.
    """

    def __init__(
        self,
        source: ClipSource,
        plan: ClipPlan,
        *,
        cursor: int = 0,
        workers: int = 0,
        clip_timeout: float = 60.0,
        quarantined: Collection[str] = (),
        unreadable: Mapping[str, str] | None = None,
        on_quarantine: Callable[[Record], None] | None = None,
    ) -> None:
        self._feed = Feed(source, plan, cursor=cursor, workers=workers, clip_timeout=clip_timeout)
        self._feed.bad.update(unreadable or {})
        self._recorded = {*quarantined, *self._feed.bad}
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
        self, source: ClipSource, plan: ClipPlan, *, cursor: int, workers: int, clip_timeout: float
    ) -> None:
        self.finished: queue.Queue[Batch | str | None] = queue.Queue()
        self.bad: dict[str, str] = {}
        self._source, self._plan, self._clip_timeout = source, plan, clip_timeout
        self._wanted_workers = workers
        self._ahead = 2 + math.ceil(workers / plan.batch)
        self._limit = cursor + self._ahead
        self._next = cursor
        self._stopping = False
        self._woken, self._waker = Pipe(duplex=False)
        self._batches: deque[Batch] = deque()
        self._todo: deque[tuple[Batch, Search]] = deque()
        self._crew: dict[Worker, tuple[Batch, Search] | None] = {}
        self._failed_starts = 0
        self._looked = time.monotonic()
        self._decoder = Decoder()

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
                self._staff()
                if self._crew:
                    self._hand_out()
                    self._listen()
                elif self._todo:
                    self._read_here(*self._todo.popleft())
                else:
                    self._rest([])
                self._ship()
        finally:
            for worker in self._crew:
                worker.kill()
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

    def _staff(self) -> None:
        """Start the processes that are missing. If that fails, go on with those there are, and say so."""
        while len(self._crew) < self._wanted_workers:
            try:
                self._crew[Worker(self._plan)] = None
            except (OSError, EOFError) as error:
                self._count_failed_start(f"{type(error).__name__}: {error}")

    def _make_do(self, reason: str) -> None:
        self._wanted_workers = len(self._crew)
        with_what = f"by {len(self._crew)} of them" if self._crew else "in the training process itself"
        self.finished.put(
            f"--dataloader_num_workers: a process can't be started ({reason}). Clips are read {with_what}, "
            f"and they are the same. A script that trains needs `if __name__ == '__main__':` around the call"
        )

    def _hand_out(self) -> None:
        for worker in [w for w, place in self._crew.items() if w.ready and place is None]:
            if not self._todo:
                return
            batch, search = self._todo.popleft()
            task = self._next_try(batch, search)
            if task is None:
                continue
            if worker.send(task):
                self._crew[worker] = (batch, search)
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
        self._rest([x for worker in self._crew for x in (worker.connection, worker.process.sentinel)])
        # A machine that was suspended, or a Ctrl-Z, is no hang: a pause counts as little.
        now = time.monotonic()
        seconds, self._looked = min(now - self._looked, 2 * TICK), now
        for worker in list(self._crew):
            task = worker.task
            outcome = worker.receive()
            if outcome is not None and task is not None:
                self._settle(worker, task, outcome)
            elif not worker.process.is_alive():
                self._bury(worker)
            elif worker.task is not None or not worker.ready:
                worker.seconds += seconds
                if worker.seconds > (self._clip_timeout if worker.ready else START_SECONDS):
                    self._end(worker)

    def _rest(self, sources: list[Any]) -> None:  # Any: what multiprocessing can wait for
        """Wait until one of the sources or the training thread has news, or a tick has passed."""
        if self._woken in wait([self._woken, *sources], TICK):
            while self._woken.poll():
                self._woken.recv_bytes()

    def _settle(self, worker: Worker, task: Task, outcome: Outcome) -> None:
        place = self._crew[worker]
        self._crew[worker] = None
        self._failed_starts = 0
        assert place is not None, "an outcome without a task"
        self._settle_place(place, task, outcome=outcome, clip=worker.clip(place[0].plan))

    def _settle_place(
        self, place: tuple[Batch, Search], task: Task, *, outcome: Outcome, clip: Tensor | None
    ) -> None:
        batch, search = place
        if not search.settle(task, outcome):
            self._todo.appendleft(place)
        elif clip is not None:
            batch.pixels[search.sample].copy_(clip)

    def _bury(self, worker: Worker) -> None:
        """A process has died. Its task is tried once more; then the video is taken to be the cause."""
        place, task = self._crew.pop(worker), worker.task
        how = worker.kill()
        if not worker.ready:
            self._count_failed_start(how)
        if place is None or task is None:
            return
        place[1].deaths += 1
        if place[1].deaths < DEATHS:
            self._todo.appendleft(place)
            return
        reason = f"the process that read it died {DEATHS} times ({how})"
        self._settle_place(place, task, outcome=Outcome("bad", reason=reason, whole=True), clip=None)

    def _end(self, worker: Worker) -> None:
        """A process hangs. It is killed, and the video is taken to be the cause."""
        place, task = self._crew.pop(worker), worker.task
        worker.kill()
        if not worker.ready:
            self._count_failed_start(f"not ready after {START_SECONDS:g} s")
        if place is None or task is None:
            return
        reason = f"reading it took longer than {self._clip_timeout:g} s"
        self._settle_place(place, task, outcome=Outcome("bad", reason=reason, whole=True), clip=None)

    def _count_failed_start(self, how: str) -> None:
        self._failed_starts += 1
        if self._failed_starts >= START_FAILURES:
            self._make_do(how)
