"""How far a long work is: a bar with frames per second and time left on a terminal, plain lines elsewhere.

Both go to the error stream, so that results can be piped.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from causalvae.data.decode import printable

EVERY = 30.0  # seconds between lines about one video


@dataclass
class Telling:
    """What is told while films are worked on. total: of films."""

    total: int
    _console: Console
    _progress: Progress
    _number: int = 0
    _task: TaskID | None = None

    def say(self, text: str) -> None:
        """A line that stays."""
        self._console.print(printable(text), markup=False, highlight=False, soft_wrap=True)

    def skip(self) -> None:
        """One film needs no work."""
        self._number += 1

    def film(self, name: str, *, frames: int) -> Callable[[int], None]:
        """Begin a film. What is given is to be told of frames that are done."""
        self._number += 1
        if self._task is not None:
            self._progress.remove_task(self._task)
        shown = f"{self._number}/{self.total} {printable(name)}"
        self._task = self._progress.add_task(shown.replace("[", "("), total=frames, rate="")
        pace = Pace(total=frames)

        def advance(more: int) -> None:
            assert self._task is not None
            line = pace.line(more)
            self._progress.update(self._task, advance=more, rate=f"{pace.rate:.1f} frames/s")
            if line and not self._console.is_terminal:
                self.say(f"{shown}: {line}")

        return advance


@dataclass
class Pace:
    """How fast frames are done. total: of frames. rate: frames a second since the beginning."""

    total: int
    done: int = 0
    rate: float = 0.0
    _begun: float = field(default_factory=time.monotonic)
    _told: float = field(default_factory=time.monotonic)

    def line(self, more: int) -> str:
        """After so many more frames: a line to tell, empty where the last one is not long ago."""
        now = time.monotonic()
        self.done += more
        self.rate = self.done / max(now - self._begun, 1e-9)
        if now - self._told < EVERY:
            return ""
        self._told = now
        left = duration((self.total - self.done) / self.rate)
        return f"{self.done:,} of {self.total:,} frames, {self.rate:.1f} frames/s, {left} left"


def duration(seconds: float) -> str:
    """A time for people, such as 2 h 05 min."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02} min"


@contextmanager
def telling(films: int) -> Iterator[Telling]:
    """Within this, the bar is shown."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    progress = Progress(
        *columns,
        console=console,
        transient=True,
        disable=not console.is_terminal,
        redirect_stdout=sys.stdout.isatty(),  # what is piped stays what it is
    )
    with progress:
        yield Telling(films, console, progress)
