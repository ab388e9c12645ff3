"""Processes that read videos. Each has one task at a time and, to make clips, a piece of shared memory.

They are forked from a server that has imported torch and done nothing else (multiprocessing's forkserver).
It has no threads, locks or CUDA, so forking is safe; measured: the first is there after 1.4 s, a further
one in 12 ms with 4 MB of its own, where a fresh interpreter takes 1.8 s and 150 MB. The shared memory is a
file without a name, so nothing stays in /dev/shm, and messages are too short to arrive in parts: a worker
that is killed or stopped in the middle of anything can't block the parent.
"""

import ctypes
import mmap
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from multiprocessing import reduction
from multiprocessing.connection import Connection
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

PRELOAD = ["torch", "av", "causalvae.data.clips", "causalvae.data.workers"]
PR_SET_PDEATHSIG = 1  # linux/prctl.h: get a signal when the parent ends
START_SECONDS = 120.0  # for a process to import what it needs, from a slow disk
START_FAILURES = 3  # processes in a row that ended before they were ready
DEATHS = 2  # of processes over one task before the video is blamed
TICK = 0.5  # seconds between looks at the clock
END_SECONDS = 5.0  # for a process to finish what it writes, and for one that is killed to be gone
READY = "ready"

T = TypeVar("T")
R = TypeVar("R")
# What a process does with a task, made inside it from its shared memory, flat uint8, if it has any.
Work = Callable[[Tensor | None], AbstractContextManager[Callable[[T], R]]]


class Worker(Generic[T, R]):
    """The parent's side of one process. Starting it can fail with OSError or EOFError.

    pixels: memory that is shared with the process, flat uint8, if it has any.
    """

    def __init__(self, work: Work[T, R], *, shared_bytes: int = 0) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self.connection, theirs = context.Pipe(duplex=True)
        self.ready = False  # it has said that it is there
        self.task: T | None = None
        self.seconds = 0.0  # on this task, or waiting for it to be ready
        self.pixels: Tensor | None = None
        self.process = context.Process(
            target=_serve, args=(theirs, work, shared_bytes > 0), daemon=True, name="causalvae-clips"
        )
        try:
            if shared_bytes:
                self._start_sharing(shared_bytes)
            else:
                self.process.start()
        except (OSError, EOFError):
            self.kill()
            raise
        finally:
            theirs.close()

    def _start_sharing(self, num_bytes: int) -> None:
        self.pixels, memory = _shared_memory(num_bytes)
        try:
            self.process.start()
            reduction.send_handle(self.connection, memory, self.process.pid)
        finally:
            os.close(memory)

    def send(self, task: T) -> bool:
        """Give it a task. False if it has died meanwhile."""
        try:
            self.connection.send(task)
        except OSError:
            return False
        self.task, self.seconds = task, 0.0
        return True

    def receive(self) -> tuple[T, R] | None:
        """Its task and what came of it, if that has arrived: then it is free, and `pixels` has the clip."""
        try:
            while self.connection.poll():
                message = self.connection.recv()
                if message != READY:
                    task, self.task = self.task, None
                    assert task is not None, "an answer without a task"
                    return task, message
                self.ready = True
                self.seconds = 0.0
        except (OSError, EOFError):
            return None
        return None

    def end(self) -> None:
        """Let it finish what it writes, and end it."""
        self.connection.close()
        self.process.join(timeout=END_SECONDS)
        self.kill()

    def kill(self) -> str:
        """End it at once, even if it is stopped. Returns how it ended, in words."""
        self.connection.close()
        if self.process.pid is None:
            return "it was never started"
        self.process.kill()
        self.process.join(timeout=END_SECONDS)  # longer only if it can't be killed, inside a hanging disk
        code = self.process.exitcode
        if code is None:
            return "it can't be ended"
        return f"signal {-code}" if code < 0 else f"exit status {code}"


@dataclass(frozen=True)
class News(Generic[T, R]):
    """What became of a task: a result, or why its process is gone. hung: it was killed for being too slow."""

    worker: Worker[T, R]
    task: T
    result: R | None = None
    died: str = ""
    hung: bool = False


class Crew(Generic[T, R]):
    """A number of workers, replaced when they die, and killed when they take too long over a task.

    timeout: seconds for one task. size: how many there should be; fewer where they can't be started.
    """

    def __init__(self, work: Work[T, R], *, size: int, timeout: float, shared_bytes: int = 0) -> None:
        self.size = size
        self._work, self._timeout, self._shared_bytes = work, timeout, shared_bytes
        self.workers: list[Worker[T, R]] = []
        self._failed_starts = 0
        self._looked = time.monotonic()

    def staff(self) -> str | None:
        """Start those that are missing. If that fails again and again, do with those there are: why."""
        while len(self.workers) < self.size:
            try:
                self.workers.append(Worker(self._work, shared_bytes=self._shared_bytes))
            except (OSError, EOFError) as error:
                self._failed_starts += 1
                problem = f"{type(error).__name__}: {error}"
                if self._failed_starts >= START_FAILURES:
                    self.size = len(self.workers)
                    return problem
        return None

    def idle(self) -> list[Worker[T, R]]:
        """Those that are there and have no task."""
        return [worker for worker in self.workers if worker.ready and worker.task is None]

    def signs(self) -> list[Any]:  # Any: what multiprocessing can wait for
        """What to wait for: something happens with one of them."""
        return [x for worker in self.workers for x in (worker.connection, worker.process.sentinel)]

    def news(self) -> tuple[list[News[T, R]], str | None]:
        """Look at all: results, deaths, hangs; and why there are fewer of them now, if they can't be started.

        A machine that was suspended, or a Ctrl-Z, is no hang: a pause counts as little.
        """
        now = time.monotonic()
        seconds, self._looked = min(now - self._looked, 2 * TICK), now
        found: list[News[T, R]] = []
        problems: list[str] = []
        for worker in list(self.workers):
            answer = worker.receive()
            if answer is not None:
                self._failed_starts = 0
                found.append(News(worker, answer[0], result=answer[1]))
            elif not worker.process.is_alive():
                self._lose(worker, found, problems, hung=False)
            elif worker.task is not None or not worker.ready:
                worker.seconds += seconds
                if worker.seconds > (self._timeout if worker.ready else START_SECONDS):
                    self._lose(worker, found, problems, hung=True)
        return found, problems[0] if problems else None

    def end(self) -> None:
        """Let all finish what they write."""
        for worker in self.workers:
            worker.connection.close()
        for worker in self.workers:
            worker.end()

    def kill(self) -> None:
        """End all at once."""
        for worker in self.workers:
            worker.kill()

    def _lose(
        self, worker: Worker[T, R], found: list[News[T, R]], problems: list[str], *, hung: bool
    ) -> None:
        self.workers.remove(worker)
        how = worker.kill()
        if not worker.ready:
            self._failed_starts += 1
            if self._failed_starts >= START_FAILURES:
                self.size = len(self.workers)
                problems.append(f"not ready after {START_SECONDS:g} s" if hung else how)
        if worker.task is not None:
            found.append(News(worker, worker.task, died=how, hung=hung))


def _shared_memory(num_bytes: int) -> tuple[Tensor, int]:
    """Memory of this size, flat uint8, and its file descriptor."""
    if sys.platform == "linux":
        memory = os.memfd_create("causalvae-clip")
    else:
        with tempfile.TemporaryFile() as file:
            memory = os.dup(file.fileno())
    try:
        os.ftruncate(memory, num_bytes)
        return _mapped(memory), memory
    except OSError:
        os.close(memory)
        raise


def _mapped(memory: int) -> Tensor:
    """All of the shared memory: flat uint8."""
    return torch.frombuffer(mmap.mmap(memory, os.fstat(memory).st_size), dtype=torch.uint8)


def _serve(connection: Connection, work: Work[Any, Any], shares: bool) -> None:  # noqa: FBT001 - of Process
    """The life of a worker: tasks in, answers out, until the parent closes the connection or ends."""
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches the whole group; the parent ends its workers
    # Nothing else that was open: the server ends when the trainer does only if no worker holds its pipe.
    os.closerange(3, connection.fileno())
    os.closerange(connection.fileno() + 1, os.sysconf("SC_OPEN_MAX"))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    torch.set_num_threads(1)
    pixels = None
    if shares:
        memory = reduction.recv_handle(connection)
        pixels = _mapped(memory)
        os.close(memory)
    with work(pixels) as answer:
        try:
            connection.send(READY)
            while True:
                connection.send(answer(connection.recv()))
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return  # the parent has gone or wants no more
