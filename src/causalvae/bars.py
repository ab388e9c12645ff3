"""Bars of progress on a terminal."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from causalvae.flags import printable

Track = Callable[[str, int], Callable[[int], None]]  # a bar of so many steps -> what moves it


@contextmanager
def progress_bars() -> Iterator[Track]:
    """Bars on a terminal, nothing elsewhere; on the error stream, so that what is printed can be piped."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:

        def track(name: str, total: int) -> Callable[[int], None]:
            task = progress.add_task(printable(name).replace("[", "("), total=total)
            return lambda steps: progress.advance(task, steps)

        yield track
