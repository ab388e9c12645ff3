"""Processes that read clips. Each has one task at a time and one piece of shared memory, large enough
for a clip of any shape of the plan.

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
from multiprocessing import reduction
from multiprocessing.connection import Connection

import torch
from torch import Tensor

from causalvae.data.clips import ClipPlan, Outcome, Task, perform
from causalvae.data.decode import Decoder

PRELOAD = ["torch", "av", "causalvae.data.workers"]
PR_SET_PDEATHSIG = 1  # linux/prctl.h: get a signal when the parent ends


class Worker:
    """The parent's side of one process. Starting it can fail with OSError or EOFError."""

    def __init__(self, plan: ClipPlan) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self.connection, theirs = context.Pipe(duplex=True)
        self.ready = False  # it has said that it is there
        self.task: Task | None = None
        self.seconds = 0.0  # on this task, or waiting for it to be ready
        self.process = context.Process(
            target=_serve, args=(theirs, plan), daemon=True, name="causalvae-clips"
        )
        try:
            self._pixels, memory = _shared_memory(plan)
            try:
                self.process.start()
                reduction.send_handle(self.connection, memory, self.process.pid)
            finally:
                os.close(memory)
        except (OSError, EOFError):
            self.kill()
            raise
        finally:
            theirs.close()

    def send(self, task: Task) -> bool:
        """Give it a task. False if it has died meanwhile."""
        try:
            self.connection.send(task)
        except OSError:
            return False
        self.task, self.seconds = task, 0.0
        return True

    def receive(self) -> Outcome | None:
        """The outcome of its task, if one has arrived: then `clip` has the pixels."""
        try:
            while self.connection.poll():
                message = self.connection.recv()
                if isinstance(message, Outcome):
                    self.task = None
                    return message
                self.ready = True
                self.seconds = 0.0
        except (OSError, EOFError):
            return None
        return None

    def clip(self, plan: ClipPlan) -> Tensor:
        """The clip it has read, uint8 3 t H W, until it gets another task. plan: of the shape of the clip."""
        return _clip(self._pixels, plan)

    def kill(self) -> str:
        """End it at once, even if it is stopped. Returns how it ended, in words."""
        self.connection.close()
        if self.process.pid is None:
            return "it was never started"
        self.process.kill()
        self.process.join(timeout=5)  # longer only if it can't be killed, inside a hanging disk
        code = self.process.exitcode
        if code is None:
            return "it can't be ended"
        return f"signal {-code}" if code < 0 else f"exit status {code}"


def _shared_memory(plan: ClipPlan) -> tuple[Tensor, int]:
    """Memory for one clip of any shape of the plan, flat uint8, and its file descriptor."""
    if sys.platform == "linux":
        memory = os.memfd_create("causalvae-clip")
    else:
        with tempfile.TemporaryFile() as file:
            memory = os.dup(file.fileno())
    try:
        os.ftruncate(memory, max(3 * t * h * w for t, (h, w) in plan.shapes()))
        return _mapped(memory), memory
    except OSError:
        os.close(memory)
        raise


def _mapped(memory: int) -> Tensor:
    """All of the shared memory: flat uint8."""
    return torch.frombuffer(mmap.mmap(memory, os.fstat(memory).st_size), dtype=torch.uint8)


def _clip(pixels: Tensor, plan: ClipPlan) -> Tensor:
    """The part of the shared memory that holds a clip of the plan's shape: uint8 3 t H W."""
    height, width = plan.size
    return pixels[: 3 * plan.frames * height * width].view(3, plan.frames, height, width)


def _serve(connection: Connection, plan: ClipPlan) -> None:
    """The life of a worker: tasks in, outcomes out, until the parent closes the connection or ends."""
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches the whole group; the parent ends its workers
    # Nothing else that was open: the server ends when the trainer does only if no worker holds its pipe.
    os.closerange(3, connection.fileno())
    os.closerange(connection.fileno() + 1, os.sysconf("SC_OPEN_MAX"))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    torch.set_num_threads(1)
    memory = reduction.recv_handle(connection)
    pixels = _mapped(memory)
    os.close(memory)
    decoder = Decoder()
    try:
        connection.send("ready")
        while True:
            task: Task = connection.recv()
            shaped = plan.at(task.cursor)
            connection.send(perform(task, shaped, decoder=decoder, out=_clip(pixels, shaped)))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the parent has gone or wants no more
