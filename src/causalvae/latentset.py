"""A set of latents: a folder whose parts any number of processes make, and the index that is made of them.

Videos 0 to n - 1 of the source, n = videos_per_shard, are part 0, the next n part 1, and so on: where a
latent goes is a function of the list of videos, never of timing. A part's records grow line by line while it
is made and get their name when it is whole. Index, statistics and quarantine are a function of all records,
in their order: whoever finds every part whole writes them, and several who do write the same.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from causalvae.errors import ConfigError, RunError
from causalvae.files import append_whole, plain, sync
from causalvae.flags import printable
from causalvae.latentfiles import (
    Container,
    FolderPart,
    Part,
    Place,
    Record,
    TarPart,
    disk_refusals,
    tar_bytes,
)
from causalvae.latentstats import statistics
from causalvae.locks import Lock
from causalvae.moments import ChannelMoments
from causalvae.weights.writing import aside

FORMAT = "causalvae latents 1"
SET, INDEX, STATS, QUARANTINE, PARTS = "set.json", "index.jsonl", "stats.json", "quarantine.jsonl", "parts"
MERGING = ".merge.lock"
FREE = ("made_by", "memory_bytes")  # of what a set says of itself: may differ between those who make it
FILE_OF_MODEL = "file"  # of its model, likewise
Json = Mapping[str, Any]  # Any: JSON values nest


@dataclass(frozen=True, kw_only=True)
class LatentSet:
    """The folder of a set. facts: what its set.json says."""

    path: Path
    facts: Json

    @property
    def num_parts(self) -> int:
        """Parts, whole or not."""
        return -(-int(self.facts["videos"]) // int(self.facts["videos_per_shard"]))

    def videos_of(self, part: int) -> range:
        """Numbers of the videos of a part."""
        size = int(self.facts["videos_per_shard"])
        return range(part * size, min((part + 1) * size, int(self.facts["videos"])))

    def name_of(self, part: int) -> str:
        """Of the file or folder of a part's latents."""
        return f"latents-{part:06d}{'.tar' if self.facts['container'] == 'shards' else ''}"

    def records_of(self, part: int) -> Path:
        """The file of a part's records, once it is whole."""
        return self.path / PARTS / f"{part:06d}.jsonl"

    def is_whole(self, part: int) -> bool:
        """Whether a part was finished and its latents are still there, a tar file with all its bytes."""
        records, place = self.records_of(part), self.path / self.name_of(part)
        if not records.is_file() or not place.exists():
            return False
        return place.is_dir() or place.stat().st_size == tar_bytes(_last_end(records))

    def missing_parts(self) -> list[int]:
        """Parts that are not whole."""
        return [part for part in range(self.num_parts) if not self.is_whole(part)]

    @contextmanager
    def held(self, part: int) -> Iterator[None]:
        """The part for this process alone, which is to make it. RunError if another one has it."""
        name = f".{part:06d}.lock"
        with disk_refusals(self.path):
            lock = Lock(self.path / PARTS, name=name, instead="give each process a --shard of its own")
        with lock:
            yield
            (self.path / PARTS / name).unlink(missing_ok=True)  # who waits for a part finds it whole


class PartRecords:
    """The records of a part while it is made: one line for each video, in order."""

    def __init__(self, found: LatentSet, part: int) -> None:
        self._final = found.records_of(part)
        self._partial = self._final.with_name(f".{self._final.name}.partial")
        container: Container = found.facts["container"]
        self._place = found.path / found.name_of(part)
        self.files: Part = TarPart(self._place) if container == "shards" else FolderPart(self._place)
        self.done = self._resume()

    def _resume(self) -> int:
        """How many videos are done, after what a kill cut off is removed."""
        with disk_refusals(self._partial):
            if self._final.exists():  # its latents are gone
                self._final.unlink()
            lines = self._partial.read_bytes().splitlines(keepends=True) if self._partial.exists() else []
            whole = [line for line in lines if line.endswith(b"\n")]
            kept = self.files.resume([json.loads(line) for line in whole])
            if kept < len(lines):
                os.truncate(self._partial, sum(map(len, whole[:kept])))
        return kept

    def line(self, place: Place) -> Record:
        """The line of the index for a sample."""
        within = "" if self._place.suffix == ".tar" else f"/{place.sample.key}.safetensors"
        return place.index(f"{self._place.name}{within}")

    def add(self, record: Record) -> None:
        """The record of the next video."""
        with disk_refusals(self._partial):
            append_whole(self._partial, (json.dumps(plain(record)) + "\n").encode())

    def finish(self) -> None:
        """The part is whole: latents first, then its records."""
        self.files.finish()
        with disk_refusals(self._final):
            sync(self._partial)
            os.rename(self._partial, self._final)
            sync(self._final.parent)


def open_set(out: Path, facts: Json) -> tuple[LatentSet, list[str]]:
    """The set in a folder, made if there is none; and what is worth saying.

    facts: what it is to be. ConfigError with the differences if it is another one. What `FREE` names is that
    of the process that made the folder.
    """
    path = out / SET
    if not path.exists():
        _refuse_others(out)
        _create(path, facts)
    there = read_facts(out)
    different = [f"{name} is {a}, not {b}" for name, a, b in _differences(there, facts)]
    if different:
        raise ConfigError(
            f"--out {printable(str(out))}: has other latents: {'; '.join(different[:5])}; choose another "
            "folder"
        )
    notes = []
    if there["made_by"] != facts["made_by"]:
        notes.append(f"begun with {_words(there['made_by'])}, goes on with {_words(facts['made_by'])}")
    return LatentSet(path=out, facts=there), notes


def read_facts(folder: Path) -> Json:
    """What a set says of itself. ConfigError if there is no set."""
    path = folder / SET
    try:
        facts = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not JSON"
        raise ConfigError(
            f"{printable(str(folder))}: no latents of `causalvae encode`: {SET}: {reason}"
        ) from error
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise ConfigError(f"{printable(str(path))}: not written by `causalvae encode`, or by a later version")
    return facts


def _refuse_others(out: Path) -> None:
    """ConfigError unless the folder is new or empty."""
    inside = [item.name for item in out.iterdir() if item.name != PARTS] if out.is_dir() else []
    rest = [name for name in inside if not name.startswith(f".{SET}.")]
    if rest:
        raise ConfigError(
            f"--out {printable(str(out))}: holds {printable(rest[0])} and no latents; choose another folder"
        )


def _create(path: Path, facts: Json) -> None:
    """Write set.json unless another process was first: a link can't replace a file."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with disk_refusals(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_text(json.dumps(plain(facts), indent=1) + "\n")
            sync(partial)
            _link(partial, path)
            sync(path.parent)
        finally:
            partial.unlink(missing_ok=True)


def _link(partial: Path, path: Path) -> None:
    """Give a file its name, but not in the place of another one, where the file system can do that."""
    try:
        os.link(partial, path)
    except FileExistsError:
        return
    except OSError:  # one without hard links
        os.rename(partial, path)


def _differences(there: Json, facts: Json) -> Iterator[tuple[str, Any, Any]]:  # Any: JSON
    for name in [*there, *(name for name in facts if name not in there)]:
        a, b = there.get(name), facts.get(name)
        if name in FREE or a == b:
            continue
        if isinstance(a, dict) and isinstance(b, dict):
            yield from (each for each in _differences(a, b) if each[0] != FILE_OF_MODEL)
        else:
            yield name, a, b


def _words(facts: Json) -> str:
    return ", ".join(f"{name} {value}" for name, value in facts.items())


@dataclass(frozen=True, kw_only=True)
class Merged:
    """What a whole set holds. samples: latents. broken: records of videos that are left out."""

    samples: int
    broken: list[Record]


def merge(found: LatentSet) -> Merged | None:
    """Write index, quarantine and statistics of a set whose parts are all whole.

    None while another process does so. ConfigError if no video gave a latent; the quarantine has all reasons.
    """
    try:
        lock = Lock(found.path / PARTS, name=MERGING, instead="wait")
    except RunError:
        return None
    with lock:
        names = [found.path / name for name in (INDEX, QUARANTINE, STATS)]
        with aside(names, num_bytes=0) as partials:
            merged = _write(found, *partials)
        for rubbish in (*found.path.glob(f".{SET}.*.partial"), *(found.path / PARTS).glob(".[0-9]*.lock")):
            rubbish.unlink(missing_ok=True)  # of processes that were killed at a beginning or an end
        (found.path / PARTS / MERGING).unlink(missing_ok=True)
    if merged.samples == 0:
        reasons = "; ".join(dict.fromkeys(str(record["reason"]) for record in merged.broken[:3]))
        raise ConfigError(f"--video_path: no video of {found.facts['videos']} can be encoded: {reasons}")
    return merged


def _write(found: LatentSet, index: Path, quarantine: Path, stats: Path) -> Merged:
    """Write the three files, part by part."""
    moments = ChannelMoments.none(int(found.facts["geometry"]["channels"]))
    broken: list[Record] = []
    samples = 0
    with index.open("w", encoding="ascii") as lines:
        for part in range(found.num_parts):
            for record in read_records(found.records_of(part)):
                if "reason" in record:
                    broken.append(record)
                    continue
                lines.writelines(json.dumps(each) + "\n" for each in record["samples"])
                samples += len(record["samples"])
                moments = moments.merged(moments_of(record["moments"]))
    quarantine.write_text("".join(json.dumps(record) + "\n" for record in broken))
    facts = statistics(moments, samples=samples, of=found.facts["store"], model=found.facts["model"])
    stats.write_text(json.dumps(plain(facts), indent=1) + "\n")
    return Merged(samples=samples, broken=broken)


def _last_end(path: Path) -> int:
    """Where the last video in a tar file ends, by the records of a part."""
    for line in reversed(path.read_bytes().splitlines()):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise _damaged(path) from error
        if "end" in record:
            return int(record["end"])
    return 0


def _damaged(path: Path) -> RunError:
    return RunError(
        f"{path}: damaged; remove this file, and the command makes that part of the set anew", status=1
    )


def read_records(path: Path) -> Iterator[Record]:
    """The records of a part that is whole. RunError if the file is damaged."""
    with path.open("rb") as file:
        for line in file:
            try:
                yield json.loads(line)
            except ValueError as error:
                raise _damaged(path) from error


def moments_to_record(moments: ChannelMoments) -> Record:
    """For JSON, exact."""
    return {"count": moments.count, "mean": moments.mean.tolist(), "squares": moments.squares.tolist()}


def moments_of(record: Json) -> ChannelMoments:
    """The inverse of `moments_to_record`."""
    mean, squares = (torch.tensor(record[name], dtype=torch.float64) for name in ("mean", "squares"))
    return ChannelMoments(int(record["count"]), mean, squares)
