"""Reads a dataset once: what it holds, how its videos are spread, what is broken, and what is there twice."""

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from causalvae.data.decode import file_and_part, stamp_of
from causalvae.data.index import IndexFile, Stamp
from causalvae.data.quarantine import Record
from causalvae.data.sources import ClipSource, VideoRef
from causalvae.data.survey import Look, Task, VideoFacts, known_look, survey
from causalvae.errors import VideoError

BINS = 24  # of a histogram
WIDE = 50.0  # largest over smallest, from where on the bins of a histogram grow
MOST_SIZES = 12  # heights and widths that are listed, the most frequent ones
QUANTILES = (0.0, 0.05, 0.5, 0.95, 1.0)

Json = dict[str, Any]  # Any: JSON
Progress = Callable[[int, int], None]  # how many of how many are done


@dataclass(frozen=True)
class Reading:
    """How videos are read. check: decode every frame. duplicates: of equal sizes, read every byte.

    workers: processes. timeout: seconds for one video. refresh: as if nothing were known.
    """

    check: bool = False
    duplicates: bool = True
    refresh: bool = False
    workers: int = 1
    timeout: float = 60.0


@dataclass(frozen=True)
class Changes:
    """What is another than in the scan before: videos by number."""

    new: int
    changed: int
    gone: int


@dataclass(frozen=True)
class Scan:
    """What every video of a source is, in its order. known: so many were not read again.

    changes: None where there was no scan before. problem: why fewer processes read than wanted.
    """

    videos: tuple[VideoRef, ...]
    sizes: tuple[int | None, ...]
    looks: tuple[Look, ...]
    known: int
    changes: Changes | None = None
    problem: str | None = None

    @property
    def facts(self) -> list[VideoFacts]:
        """Of the videos that can be read."""
        return [look.facts for look in self.looks if look.facts is not None]

    def broken(self) -> list[Record]:
        """Records of the videos that can't be read, or not all of them, for a quarantine.jsonl."""
        records: list[Record] = []
        for video, look in zip(self.videos, self.looks, strict=True):
            damage = None if look.facts is None else look.facts.damage
            if look.facts is None or damage is not None:
                reason, whole = damage or look.reason, look.facts is None
                records.append({"video": video.id, "path": video.path, "reason": reason, "whole": whole})
        return records

    def duplicates(self) -> list[Json]:
        """Videos with the same bytes, in groups."""
        groups: dict[str, list[int]] = defaultdict(list)
        for number, look in enumerate(self.looks):
            if look.sha256 is not None:
                groups[look.sha256].append(number)
        return [
            {"sha256": digest, "bytes": self.sizes[same[0]], "videos": [self.videos[i].id for i in same]}
            for digest, same in groups.items()
            if len(same) > 1
        ]


@dataclass
class _Found:
    """What is known of the videos while they are looked at: all by number."""

    looks: dict[int, Look] = field(default_factory=dict[int, Look])
    todo: dict[int, Task] = field(default_factory=dict[int, Task])
    changed: int = 0


def scan(source: ClipSource, *, name: str, reading: Reading, index: Path | None, progress: Progress) -> Scan:
    """Look at every video of a source.

    name: of the source, under which it is remembered. index: the file of what is known (`index.prepare`).
    """
    videos = tuple(source[number] for number in range(len(source)))
    stamps = [_stamp(video) for video in videos]
    sizes = tuple(_bytes(video, stamp) for video, stamp in zip(videos, stamps, strict=True))
    kept = None if index is None else IndexFile(index, refresh=reading.refresh)
    before = [] if kept is None else kept.videos_of(name)
    found = _known(videos, stamps, sizes, reading=reading, kept=kept)
    known = sum(look.facts is not None for look in found.looks.values())
    numbers = list(found.todo)

    def done(place: int, look: Look) -> None:
        found.looks[numbers[place]] = look
        progress(len(found.looks), len(videos))

    progress(len(found.looks), len(videos))
    problem = survey(
        list(found.todo.values()),
        workers=reading.workers,
        timeout=reading.timeout,
        index=index,
        refresh=reading.refresh,
        done=done,
    )
    looks = tuple(found.looks[number] for number in range(len(videos)))
    changes = None
    if kept is not None:
        changes = _remember(kept, name, videos, looks=looks, before=before, changed=found.changed)
        kept.close()
    return Scan(videos, sizes, looks, known, changes, problem)


def _known(
    videos: Sequence[VideoRef],
    stamps: Sequence[Stamp | str],
    sizes: Sequence[int | None],
    *,
    reading: Reading,
    kept: IndexFile | None,
) -> _Found:
    """What needs no reading: what can't be opened, and what is known."""
    found, counts = _Found(), Counter(sizes)
    for number, (video, stamp) in enumerate(zip(videos, stamps, strict=True)):
        if isinstance(stamp, str):
            found.looks[number] = Look(reason=stamp)
            continue
        task = Task(video.path, reading.check, reading.duplicates and counts[sizes[number]] > 1)
        look = None if kept is None else known_look(kept, task, stamp)
        if look is not None:
            found.looks[number] = look
            continue
        found.todo[number] = task
        found.changed += kept is not None and kept.has_other(video.path, stamp)
    return found


def _remember(
    kept: IndexFile,
    name: str,
    videos: Sequence[VideoRef],
    *,
    looks: Sequence[Look],
    before: Sequence[str],
    changed: int,
) -> Changes | None:
    """Write down which videos there are, and forget those that are gone or broken now."""
    now = {video.path for video in videos}
    gone = [path for path in before if path not in now]
    broken = [video.path for video, look in zip(videos, looks, strict=True) if look.facts is None]
    kept.keep_source(name, (video.path for video in videos), gone=[*gone, *broken])
    new = len(now.difference(before))
    return Changes(new=new, changed=changed, gone=len(gone)) if before else None


def summary(found: Scan) -> Json:
    """The whole dataset in numbers, for JSON, a table and a page."""
    facts = found.facts
    films = [each for each in facts if each.frames > 1]
    return {
        "videos": len(found.videos),
        "images": len(facts) - len(films),
        "readable": len(facts),
        "bytes": sum(size or 0 for size in found.sizes),
        "frames": sum(each.frames for each in facts),
        "seconds": sum(each.frames / each.fps for each in films if each.fps),
        "lengths": spread([each.frames for each in films]),
        "durations": spread([each.frames / each.fps for each in films if each.fps]),
        "short_sides": spread([min(each.height, each.width) for each in facts]),
        "shapes": _counted((f"{each.height}x{each.width}" for each in facts), most=MOST_SIZES),
        "rates": _counted(f"{each.fps:.4g}" if each.fps else "?" for each in films),
        "codecs": _counted(each.codec for each in facts),
        "containers": _counted(each.container for each in facts),
    }


def spread(values: Sequence[float]) -> Json | None:
    """How numbers are spread: quantiles, and a histogram; None without numbers.

    edges: one more than counts. Where the largest is WIDE times the smallest, bins are as wide as they are
    far from zero.
    """
    if not values:
        return None
    data = np.asarray(values, np.float64)
    low, high = float(data.min()), float(data.max())
    if low == high:
        edges = np.array([low, high])
    elif low > 0 and high / low > WIDE:
        edges = np.array([low, *np.geomspace(low, high, BINS + 1)[1:-1], high])  # its ends are rounded
    else:
        edges = np.linspace(low, high, BINS + 1)
    counts = np.array([len(data)]) if low == high else np.histogram(data, edges)[0]
    quantiles = [float(q) for q in np.quantile(data, QUANTILES)]
    return {
        "quantiles": dict(zip(("min", "p5", "median", "p95", "max"), quantiles, strict=True)),
        "edges": [float(f"{edge:.6g}") for edge in edges],
        "counts": counts.tolist(),
    }


def _counted(words: Iterable[str], *, most: int | None = None) -> Mapping[str, int]:
    """How often each word is there, the most frequent first; those past `most` together as `other`."""
    counts = Counter(words)
    ordered = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    if most is None or len(ordered) <= most:
        return dict(ordered)
    return {**dict(ordered[:most]), "other": sum(count for _, count in ordered[most:])}


def _stamp(video: VideoRef) -> Stamp | str:
    """The stamp of a file, or why it can't be opened."""
    try:
        return stamp_of(video.path)
    except VideoError as error:
        return str(error)


def _bytes(video: VideoRef, stamp: Stamp | str) -> int | None:
    """Size of a video in bytes, None if there is no such file."""
    _, part = file_and_part(video.path)
    if isinstance(stamp, str):
        return None
    return stamp[0] if part is None else part[1] - part[0]


def source_name(video_path: str) -> str:
    """Under which name a source is remembered: its absolute path, or `sample:`."""
    return video_path if video_path.startswith("sample:") else os.path.abspath(video_path)
