"""Processes that fill slots, and what happens when one of them dies or hangs.

Workers are our own: torch's raise in the middle of a save when one dies, and are waited for when one hangs. Here a
worker that dies gets a successor, and its slot is filled again. A video that kills a second worker at the same slot, or
that is not read within the time-out, counts as broken. Pixels travel through pipes as bytes, so that no shared memory
can run out or be left behind.
"""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

import torch

from causalvae.data.clips import ClipPlan, Slot, SlotReader
from causalvae.data.sources import ClipSource
from causalvae.errors import ConfigError

PR_SET_PDEATHSIG = 1  # prctl(2)
WAKE_SECONDS = 0.5  # how often the clock is looked at while nothing comes
MAX_DEATHS = 2  # of workers at one slot and video, after which the video is left out
START_TRIES = 3  # to start a worker
MAX_STILLBORN = 3  # workers in a row that die before they have read anything
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # the parent decides when a worker ends

Task = tuple[int, int]  # cursor, sample


@dataclass
class _Worker:
    """One process: what it was asked for, which video it is reading, and since when."""

    process: BaseProcess
    connection: Connection
    task: Task | None = None
    video: str | None = None
    since: float = 0.0
    told: int = 0


class WorkerPool:
    """Fills slots in processes. To be used from one thread, but for `stop`."""

    def __init__(self, source: ClipSource, plan: ClipPlan, *, known: dict[str, str], timeout: float) -> None:
        self.source, self.plan, self.timeout = source, plan, timeout
        self.stop = threading.Event()
        self._bad = list(
            known.items()
        )  # in the order they became known, so that each worker is told what is new
        self._bad_ids = set(known)
        self._deaths: dict[tuple[Task, str], int] = {}
        self._stillborn = 0
        self._workers: list[_Worker] = []
        self._tasks: deque[Task] = deque()
        self._filled: dict[Task, Slot] = {}

    def slots(self, cursor: int, *, workers: int) -> Iterator[Slot]:
        """Every slot from a cursor on, in order, without end; ends when `stop` is set."""
        every = ((c, s) for c in count(cursor) for s in range(self.plan.batch))
        in_order: deque[Task] = deque()
        window = max(2 * workers, self.plan.batch)
        try:
            self._workers = [self._start() for _ in range(workers)]
            while not self.stop.is_set():
                while len(in_order) < window:
                    in_order.append(next(every))
                    self._tasks.append(in_order[-1])
                self._hand_out()
                self._listen()
                self._look_after()
                while in_order and in_order[0] in self._filled:
                    yield self._filled.pop(in_order.popleft())
        finally:
            self._end()

    def _start(self) -> _Worker:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["causalvae.data.clips"])
        for turn in range(START_TRIES):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, self.source, self.plan), daemon=True)
            try:
                process.start()
            except (EOFError, OSError) as error:  # also where somebody killed the process that forks them
                ours.close()
                if turn == START_TRIES - 1:
                    raise ConfigError(
                        f"--dataloader_num_workers: a process can't be started: {error}; use fewer, or 0"
                    ) from error
            else:
                return _Worker(process, ours)
            finally:
                theirs.close()
        raise AssertionError("the last try returns or raises")

    def _hand_out(self) -> None:
        for worker in self._workers:
            if worker.task is None and self._tasks:
                worker.task, worker.video, worker.since = self._tasks.popleft(), None, time.monotonic()
                news = self._bad[worker.told :]
                worker.told = len(self._bad)
                with contextlib.suppress(OSError):  # it died: _look_after sees that
                    worker.connection.send((*worker.task, news))

    def _listen(self) -> None:
        """Take what workers have to say, waiting a moment for the first word."""
        by_connection = {worker.connection: worker for worker in self._workers}
        sentinels = [worker.process.sentinel for worker in self._workers]
        ready = wait([*by_connection, *sentinels], timeout=WAKE_SECONDS)
        for connection, worker in by_connection.items():
            if connection not in ready:
                continue
            with contextlib.suppress(EOFError, OSError):  # it died: _look_after sees that
                while connection.poll():
                    self._hear(worker, connection.recv())

    def _hear(self, worker: _Worker, word: str | Slot) -> None:
        worker.since = time.monotonic()
        self._stillborn = 0
        if isinstance(word, str):
            worker.video = word
            return
        if word.request is not None:
            flat = torch.frombuffer(bytearray(worker.connection.recv_bytes()), dtype=torch.uint8)
            word = replace(word, pixels=flat.view(3, self.plan.frames, *self.plan.size))
        for video, reason in word.bad:
            self._condemn(video, reason)
        self._filled[word.cursor, word.sample] = word
        worker.task = worker.video = None

    def _look_after(self) -> None:
        """Replace workers that died or that have been at one video for too long."""
        for i, worker in enumerate(self._workers):
            hung = worker.task is not None and time.monotonic() - worker.since > self.timeout
            if hung and worker.video is not None:
                self._condemn(worker.video, f"{worker.video}: not read within {self.timeout:g} s")
            elif worker.process.is_alive():
                continue
            elif worker.task is not None and worker.video is not None:
                self._count_death(worker.task, worker.video, worker.process.exitcode)
            else:
                self._count_stillborn(worker.process.exitcode)
            self._bury(worker)
            if worker.task is not None:
                self._tasks.appendleft(worker.task)
            self._workers[i] = self._start()

    def _count_death(self, task: Task, video: str, exitcode: int | None) -> None:
        deaths = self._deaths[task, video] = self._deaths.get((task, video), 0) + 1
        if deaths >= MAX_DEATHS:
            self._condemn(video, f"{video}: ended the process that read it {deaths} times (exit {exitcode})")

    def _count_stillborn(self, exitcode: int | None) -> None:
        self._stillborn += 1
        if self._stillborn >= MAX_STILLBORN * len(self._workers):
            raise ConfigError(
                f"--dataloader_num_workers {len(self._workers)}: the processes end before they read anything "
                f"(exit {exitcode}); use 0 to see why"
            )

    def _condemn(self, video: str, reason: str) -> None:
        if video not in self._bad_ids:
            self._bad_ids.add(video)
            self._bad.append((video, reason))

    def _bury(self, worker: _Worker) -> None:
        worker.process.kill()
        worker.process.join(timeout=1.0)  # one that the kernel holds is left to it
        worker.connection.close()

    def _end(self) -> None:
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            self._bury(worker)


def _work(connection: Connection, source: ClipSource, plan: ClipPlan) -> None:
    """The life of a worker: fill the slots it is sent until the pipe closes."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    _die_with_parent()
    torch.set_num_threads(1)
    reader = SlotReader(source, plan, announce=connection.send)
    with contextlib.suppress(EOFError, OSError):
        while True:
            cursor, sample, news = connection.recv()
            reader.bad.update(news)
            slot = reader.fill(cursor, sample)
            connection.send(replace(slot, pixels=None))
            if slot.pixels is not None:
                connection.send_bytes(slot.pixels.contiguous().numpy().tobytes())


def _die_with_parent() -> None:
    """Ask the kernel to end this process with the one that forked it, even in the middle of a long decode."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == 1:
            os._exit(0)
