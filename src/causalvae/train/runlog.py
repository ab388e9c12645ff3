"""What a run says while it goes: a line per step in metrics.jsonl, the terminal, log.txt, TensorBoard if
asked.

On a terminal a progress bar; elsewhere plain lines. Trouble with any of these never stops a training.
"""

import logging
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from causalvae.errors import CausalVAEError, ConfigError
from causalvae.rundir import RunDir

SHOWN = (  # the numbers that a person watches, by name
    ("total", "loss {:.4f}"),
    ("pixel", "pixel {:.4f}"),
    ("critic", "critic {:.3f}"),
    ("learning_rate", "lr {:.2e}"),
    ("grad_norm", "grad {:.2f}"),
    ("clips_per_second", "{:.2f} clips/s"),
    ("data_wait", "wait {:.1%}"),
)
BESIDE_BAR = tuple(
    each for each in SHOWN if each[0] in ("total", "clips_per_second", "data_wait")
)  # in 80 columns


class ScalarWriter(Protocol):
    """The part of TensorBoard's writer that is used."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        """One point of one curve."""
        ...

    def close(self) -> None:
        """Write what is left."""
        ...


class RunLog:
    """The voice of one run, from its start to its end. A context manager."""

    def __init__(self, run: RunDir, *, max_steps: int, log_steps: int, tensorboard: bool) -> None:
        self.run, self.max_steps, self.log_steps = run, max_steps, log_steps
        self.console = Console(highlight=False, soft_wrap=True)
        self.warnings: list[str] = []
        self._file = _log_file(run.path)
        self._board = _board(run.path) if tensorboard else None
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._since = time.monotonic()
        self._clips = 0
        self._wait = 0.0

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        if isinstance(error, CausalVAEError):
            self._file.info(f"error: {error}")  # the command shows it on the terminal
        if self._board is not None:
            self._board.close()
        self._file.close()

    def say(self, message: str) -> None:
        """One line for the person: on the terminal and in log.txt."""
        self._file.info(message)
        if self.console.is_terminal:
            (self._bar.console if self._bar is not None else self.console).print(Text(message))
        else:
            _print_plain(message)

    def warn(self, message: str) -> None:
        """A line that begins with `warning:`, kept in `warnings` for run.json."""
        self.warnings.append(message)
        self.say(f"warning: {message}")

    def start(self, step: int) -> None:
        """Training begins or goes on after this step."""
        self._since = time.monotonic()
        if not self.console.is_terminal:
            return
        columns = (
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.description}"),
            TimeRemainingColumn(compact=True),
        )
        self._bar = Progress(*columns, console=self.console, transient=True)
        self._task = self._bar.add_task("starting", total=self.max_steps, completed=step)
        self._bar.start()

    def step(
        self, step: int, numbers: Mapping[str, float | None], *, clips: int, wait: float, notable: bool
    ) -> None:
        """One step was made. numbers: by name, None where not measured. wait: seconds without data."""
        self._clips += clips
        self._wait += wait
        if not notable and step % self.log_steps != 0 and step != self.max_steps:
            self._advance(step, None)
            return
        seconds = max(time.monotonic() - self._since, 1e-9)
        speed = {"clips_per_second": self._clips / seconds, "data_wait": self._wait / seconds}
        measured = {name: value for name, value in {**numbers, **speed}.items() if value is not None}
        self.run.append("metrics.jsonl", {"step": step, "time": round(time.time(), 3), **measured})
        if self._board is not None:
            for name, value in measured.items():
                self._board.add_scalar(name, value, step)
        self._advance(step, measured)
        self._since, self._clips, self._wait = time.monotonic(), 0, 0.0

    def _advance(self, step: int, measured: Mapping[str, float] | None) -> None:
        line = None if measured is None else _line(measured, SHOWN)
        if self._bar is not None and self._task is not None:
            brief = None if measured is None else _line(measured, BESIDE_BAR)
            self._bar.update(self._task, completed=step, description=brief or None)
            if line:
                self._file.info(f"step {step}/{self.max_steps}  {line}")
        elif line:
            self.say(f"step {step}/{self.max_steps}  {line}")


class _LogFile:
    """log.txt. A full disk or a file that went away silences it and nothing else."""

    def __init__(self, path: Path) -> None:
        self._handler = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace", delay=True)
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        self._handler.handleError = self._broken  # logging prints a traceback otherwise
        self.working = True

    def _broken(self, record: logging.LogRecord) -> None:  # noqa: ARG002  the signature of logging
        self.working = False

    def info(self, message: str) -> None:
        """Add a line with the time."""
        self._handler.handle(logging.LogRecord("causalvae", logging.INFO, "", 0, message, None, None))

    def close(self) -> None:
        """Nothing is written afterwards."""
        self._handler.close()


def _log_file(folder: Path) -> _LogFile:
    return _LogFile(folder / "log.txt")


def _board(folder: Path) -> ScalarWriter:
    try:
        from torch.utils.tensorboard.writer import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            "--tensorboard True needs its extra: pip install 'causalvae[tensorboard]', or leave the flag out"
        ) from error
    return SummaryWriter(str(folder / "tensorboard"))


def _print_plain(message: str) -> None:
    safe = "".join(c if c.isprintable() or c == " " else ascii(c)[1:-1] for c in message)
    try:
        sys.stdout.write(safe.encode(errors="backslashreplace").decode() + "\n")
        sys.stdout.flush()
    except OSError:  # a closed pipe or a full disk: the run goes on without a listener
        sys.stdout = open("/dev/null", "w")  # noqa: SIM115  for the rest of the process


def _line(measured: Mapping[str, float], shown: Sequence[tuple[str, str]]) -> str:
    """Those of the numbers that are shown, if they were measured."""
    return "  ".join(form.format(measured[name]) for name, form in shown if name in measured)
