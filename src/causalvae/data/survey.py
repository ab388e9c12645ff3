"""Looks at many videos at once, each in a process that may hang or die without harm to the others.

What a process finds out it writes into the index of videos itself; only short answers come back.
"""

import hashlib
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path

from torch import Tensor

from causalvae.data.clips import LONGEST_REASON
from causalvae.data.decode import Decoder, file_and_part, stamp_of
from causalvae.data.index import Entry, IndexFile, Stamp
from causalvae.data.workers import DEATHS, TICK, Crew, News, Worker
from causalvae.errors import VideoError

HOLD = 256  # entries that a process writes together
HASH_BLOCK = 1 << 20


@dataclass(frozen=True, kw_only=True)
class VideoFacts:
    """What a video holds. height, width: as displayed. checked: every frame was decoded.

    damage: what was wrong in its middle, if it was checked.
    """

    frames: int
    height: int
    width: int
    fps: float | None
    codec: str
    container: str
    checked: bool = False
    damage: str | None = None


@dataclass(frozen=True)
class Task:
    """One video to look at. check: decode every frame. digest: of its bytes too."""

    path: str
    check: bool
    digest: bool


@dataclass(frozen=True)
class Look:
    """What came of it: facts, or the reason why it can't be read. sha256: if it was asked for."""

    facts: VideoFacts | None = None
    sha256: str | None = None
    reason: str = ""


def known_look(index: IndexFile, task: Task, stamp: Stamp) -> Look | None:
    """What the index knows of a video, if that is all that is asked for."""
    entry = index.get(task.path, stamp, frames=False)
    facts = None if entry is None or entry.facts is None else VideoFacts(**entry.facts)
    if entry is None or facts is None or (task.check and not facts.checked):
        return None
    return Look(facts, entry.sha256) if entry.sha256 is not None or not task.digest else None


def survey(
    tasks: Sequence[Task],
    *,
    workers: int,
    timeout: float,
    index: Path | None,
    refresh: bool,
    done: Callable[[int, Look], None],
) -> str | None:
    """Look at every video, and tell what came of each by its number, in any order.

    workers: processes; with 0 this one reads, and a file that hangs it can't be given up. index: the file of
    what is known, to add to. refresh: as if nothing were known. Returns why there were fewer processes than
    wanted, if so.
    """
    todo = deque(enumerate(tasks))
    crew = Crew[Task, Look](partial(looker, index, refresh), size=min(workers, len(tasks)), timeout=timeout)
    try:
        problem = _by_crew(crew, todo, timeout=timeout, done=done)
        crew.end()
    finally:
        crew.kill()
    with looker(index, refresh, None) as look:
        for number, task in todo:
            done(number, look(task))
    return problem


def _by_crew(
    crew: Crew[Task, Look],
    todo: deque[tuple[int, Task]],
    *,
    timeout: float,
    done: Callable[[int, Look], None],
) -> str | None:
    """Work off what is to do as long as there are processes; why there were fewer of them."""
    places: dict[Worker[Task, Look], int] = {}
    deaths: Counter[int] = Counter()
    problem: str | None = None
    while todo or places:
        problem = crew.staff() or problem
        if not crew.workers:
            break
        for worker in crew.idle()[: len(todo)]:
            number, task = todo.popleft()
            if worker.send(task):
                places[worker] = number
            else:
                todo.appendleft((number, task))  # it has died; that is news
        wait(crew.signs(), TICK)
        found, fewer = crew.news()
        problem = fewer or problem
        for news in found:
            number = places.pop(news.worker)
            deaths[number] += news.result is None
            if news.result is None and not news.hung and deaths[number] < DEATHS:
                todo.appendleft((number, news.task))
            else:
                done(number, news.result or Look(reason=_blame(news, timeout=timeout)))
    return problem


def _blame(news: News[Task, Look], *, timeout: float) -> str:
    if news.hung:
        return f"reading it took longer than {timeout:g} s"
    return f"the process that read it died {DEATHS} times ({news.died})"


@contextmanager
def looker(
    index: Path | None,
    refresh: bool,  # noqa: FBT001 - of functools.partial
    pixels: Tensor | None,
) -> Iterator[Callable[[Task], Look]]:
    """What a process does with a task. It needs no shared memory."""
    assert pixels is None, "a look brings no pixels"
    kept = None if index is None else IndexFile(index, hold=HOLD, refresh=refresh)
    decoder = Decoder(kept)
    try:
        yield lambda task: _look(task, decoder, kept=kept)
    finally:
        decoder.close()


def _look(task: Task, decoder: Decoder, *, kept: IndexFile | None) -> Look:
    try:
        stamp = stamp_of(task.path)
        info = decoder.probe(task.path)
        damage = _damage(task.path, decoder) if task.check else None
        facts = VideoFacts(
            frames=info.frames,
            height=info.height,
            width=info.width,
            fps=info.fps,
            codec=info.codec,
            container=info.container,
            checked=task.check,
            damage=damage,
        )
        sha256 = _sha256(task.path) if task.digest else None
        if kept is not None:
            entry = Entry(stamp, decoder.index(task.path), asdict(facts), sha256)
            kept.keep(task.path, entry, stamp_now=stamp_of(task.path))
    except VideoError as error:
        return Look(reason=str(error)[:LONGEST_REASON])
    return Look(facts, sha256)


def _damage(path: str, decoder: Decoder) -> str | None:
    try:
        decoder.check(path)
    except VideoError as error:
        return str(error)[:LONGEST_REASON]
    return None


def _sha256(name: str) -> str:
    """Of the bytes of a file, or of the part of it that a name means. VideoError if they can't be read."""
    path, part = file_and_part(name)
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            start, end = part if part is not None else (0, None)
            file.seek(start)
            while block := file.read(HASH_BLOCK if end is None else min(HASH_BLOCK, end - file.tell())):
                digest.update(block)
    except OSError as error:
        raise VideoError(f"{name}: can't be read: {error.strerror}") from error
    return digest.hexdigest()
