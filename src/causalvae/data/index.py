"""What is known of videos, kept between runs in one SQLite file: where each frame is, and what a file holds.

An entry belongs to a name and a stamp (size, time of change, inode) and to the libraries that made it; where
one of them differs, it counts as not there. A file that was changed within RACY_SECONDS before it was read
is not kept: a second change in the same tick of its clock could not be seen. Every entry has a checksum.

SQLite's rollback journal is used and not its write-ahead log: several hosts may share this file over a
network, and a home that can't be written can still be read. Nothing is synced: what a power cut spoils is
noticed and made again. A process that meets an error of SQLite goes on without the file.
"""

import contextlib
import errno
import fcntl
import json
import os
import sqlite3
import time
import zlib
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import av
import numpy as np

FILE = "videos.sqlite"
APPLICATION, VERSION = 0x43564158, 1  # what marks the file as ours; the version of its table
LIBRARIES = ("libavcodec", "libavformat")  # others of another version may count frames otherwise
MADE_BY = " ".join(".".join(map(str, av.library_versions[name])) for name in LIBRARIES)
RACY_SECONDS = 2.0  # the coarsest clock of a file system, that of FAT
HOLD_SECONDS = 2.0  # entries that wait to be written together do not wait longer
BUSY_SECONDS = 5.0  # for another process that writes
OTHER_HOME = "CAUSALVAE_HOME names another folder"
WITHOUT = f"videos are indexed anew in every run. {OTHER_HOME}"
TABLE = """CREATE TABLE IF NOT EXISTS videos (
    name BLOB PRIMARY KEY, stamp TEXT NOT NULL, made_by TEXT NOT NULL, frames BLOB, facts TEXT,
    sha256 TEXT, checksum INTEGER NOT NULL) WITHOUT ROWID"""
SOURCES = "CREATE TABLE IF NOT EXISTS sources (name BLOB PRIMARY KEY, videos BLOB NOT NULL) WITHOUT ROWID"
COLUMNS = "stamp, made_by, frames, facts, sha256, checksum"

Stamp = tuple[int, int, int]
Facts = Mapping[str, Any]  # Any: JSON


@dataclass(frozen=True)
class FrameIndex:
    """Where each frame is. All by display order.

    labels: what tells frames apart: the packet's presentation time, or its position where `by_position`.
    Empty if there is nothing to go by, and the file is always read from its start.
    keys: numbers of the keyframes; key_times: what to seek to for each.
    lead: how many keyframes before the one needed a read enters.
    """

    stamp: Stamp
    frames: int
    labels: "array[int]"
    keys: "array[int]"
    key_times: "array[int]"
    by_position: bool
    lead: int


def bare_index(stamp: Stamp, frames: int) -> FrameIndex:
    """The index of a file that is always read from its start."""
    return FrameIndex(stamp, frames, array("q"), array("q"), array("q"), by_position=False, lead=0)


@dataclass(frozen=True)
class Entry:
    """What is known of one video. facts: as a scan found it, None if it was only trained on."""

    stamp: Stamp
    frames: FrameIndex | None = None
    facts: Facts | None = None
    sha256: str | None = None


class IndexFile:
    """A connection to the file, for one thread at a time. It is opened when it is first needed.

    hold: entries that are written together. refresh: what was there before counts as not there. Any error of
    SQLite ends the use of the file: then nothing is found.
    """

    def __init__(self, path: Path, *, hold: int = 1, refresh: bool = False) -> None:
        self._path, self._hold, self._refresh = path, hold, refresh
        self._connection: sqlite3.Connection | None = None
        self._broken = False
        self._waiting: dict[str, Entry] = {}
        self._since = 0.0

    def get(self, name: str, stamp: Stamp, *, frames: bool = True) -> Entry | None:
        """What is known of the video with this name, if it is still the file that it was.

        frames: with its frame index, which takes most of the time.
        """
        if name in self._waiting:
            return self._waiting[name] if self._waiting[name].stamp == stamp else None
        self._write_if_due()
        if self._refresh:
            return None
        rows = self._ask(f"SELECT {COLUMNS} FROM videos WHERE name = ?", (os.fsencode(name),))
        return _unpacked(rows[0], name, stamp, with_frames=frames) if rows else None

    def has_other(self, name: str, stamp: Stamp) -> bool:
        """Whether the video with this name was another file when it was read."""
        rows = self._ask("SELECT stamp FROM videos WHERE name = ?", (os.fsencode(name),))
        return bool(rows) and rows[0][0] != _text(stamp)

    def keep(self, name: str, entry: Entry, *, stamp_now: Stamp) -> None:
        """Remember what is known of a video, unless it was changed just now or while it was read."""
        if stamp_now != entry.stamp or entry.stamp[1] > time.time_ns() - RACY_SECONDS * 1e9:
            return
        self._since = self._since if self._waiting else time.monotonic()
        self._waiting[name] = entry
        self._write_if_due()

    def videos_of(self, source: str) -> list[str]:
        """Names of the videos that a source had when it was last scanned; none if it never was."""
        rows = self._ask("SELECT videos FROM sources WHERE name = ?", (os.fsencode(source),))
        try:
            text = zlib.decompress(rows[0][0]) if rows else b""
        except (zlib.error, TypeError):
            return []
        return [os.fsdecode(name) for name in text.split(b"\0") if name]

    def keep_source(self, source: str, videos: Iterable[str], *, gone: Iterable[str]) -> None:
        """Remember which videos a source has, and forget those that are gone."""
        text = zlib.compress(b"\0".join(os.fsencode(name) for name in videos), 1)
        self._ask("INSERT OR REPLACE INTO sources VALUES (?, ?)", [(os.fsencode(source), text)])
        self._ask("DELETE FROM videos WHERE name = ?", [(os.fsencode(name),) for name in gone])

    def flush(self) -> None:
        """Write what waits."""
        rows = [_packed(name, entry) for name, entry in self._waiting.items()]
        self._waiting.clear()
        if rows:
            self._ask("INSERT OR REPLACE INTO videos VALUES (?, ?, ?, ?, ?, ?, ?)", rows)

    def close(self) -> None:
        """Write what waits, and close the file. A later call opens it again."""
        self.flush()
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _write_if_due(self) -> None:
        late = time.monotonic() - self._since > HOLD_SECONDS
        if len(self._waiting) >= self._hold or (self._waiting and late):
            self.flush()

    def _ask(self, sql: str, values: tuple[object, ...] | list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
        """Rows of a question, or none; a list of values is written in one go. Any: what a column holds."""
        if self._broken:
            return []
        try:
            if self._connection is None:
                self._connection = _connected(self._path)
            if isinstance(values, tuple):
                return self._connection.execute(sql, values).fetchall()
            with self._connection:
                self._connection.executemany(sql, values)
        except sqlite3.Error:
            self._broken = True  # said in the module's first lines; `prepare` looks into it at the next start
        return []


def prepare(home: Path) -> tuple[Path | None, list[str]]:
    """The index file in this folder, made if need be; None if there can be none. And what to warn of.

    A file there that is none of ours, or is damaged, is set aside under another name.
    """
    path, said = home / FILE, list[str]()
    try:
        home.mkdir(parents=True, exist_ok=True)
        if _problem(path) is not None:
            said += _set_aside(path)
    except OSError as error:
        return None, [*said, f"{home}: {error.strerror}; {WITHOUT}"]
    if not (os.access(path, os.W_OK) and os.access(home, os.W_OK)):
        said.append(f"{path}: can't be written, so nothing is added to it; {OTHER_HOME}")
    return path, said


def _set_aside(path: Path) -> list[str]:
    """Rename a file that can't be used, with its journal, and make another; what to say of that.

    One process at a time, and only if it is still so.
    """
    with path.with_name(f"{path.name}.lock").open("ab") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        problem = _problem(path)
        if problem is None:
            return []
        number = 1
        while path.with_name(f"{path.name}.broken-{number}").exists():
            number += 1
        aside = path.with_name(f"{path.name}.broken-{number}")
        os.rename(path, aside)
        journal = path.with_name(f"{path.name}-journal")
        if journal.exists():  # it must not be played back into the new file
            os.rename(journal, aside.with_name(f"{aside.name}-journal"))
        again = _problem(path)
        if again is not None:
            raise OSError(errno.EIO, again)
        return [f"{path}: {problem}; it is now {aside.name}, and another one is made"]


def _problem(path: Path) -> str | None:
    """Make the tables if the file is new; why it can't be used, or None. OSError if there can be no file."""
    if path.exists() and not os.access(path, os.R_OK):
        raise PermissionError(errno.EACCES, "the index of videos can't be read")
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=BUSY_SECONDS)) as connection:
            return _checked(connection)
    except sqlite3.OperationalError as error:
        if path.is_file() and path.stat().st_size:
            return None  # it is busy, or not to be written
        raise OSError(errno.EIO, str(error)) from error
    except sqlite3.DatabaseError as error:
        return str(error)


def _checked(connection: sqlite3.Connection) -> str | None:
    """What is wrong with an open file. An empty one gets its tables."""
    marks = [
        connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")
    ]
    tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    if marks == [0, 0] and tables == 0:
        with connection:
            for line in (f"PRAGMA application_id = {APPLICATION}", f"PRAGMA user_version = {VERSION}"):
                connection.execute(line)
            connection.execute(TABLE)
            connection.execute(SOURCES)
    elif marks != [APPLICATION, VERSION]:
        return "not an index of videos of this version"
    found = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
    return None if found == "ok" else f"damaged ({found.splitlines()[0]})"


def _connected(path: Path) -> sqlite3.Connection:
    # Closed by the thread that made it or by the one that ends the first: sqlite3 itself takes any thread.
    connection = sqlite3.connect(path, timeout=BUSY_SECONDS, check_same_thread=False)
    connection.execute("PRAGMA synchronous = OFF")
    return connection


def _packed(name: str, entry: Entry) -> tuple[object, ...]:
    """The row of an entry."""
    frames = None if entry.frames is None else _pack(entry.frames)
    facts = None if entry.facts is None else json.dumps(entry.facts)
    row = (_text(entry.stamp), MADE_BY, frames, facts, entry.sha256)
    return (os.fsencode(name), *row, _checksum(name, row))


def _unpacked(row: tuple[Any, ...], name: str, stamp: Stamp, *, with_frames: bool) -> Entry | None:
    """The entry of a row, if it is of this stamp, these libraries, and whole."""
    *values, checksum = row
    stamp_text, made_by, frames, facts, sha256 = values
    if (stamp_text, made_by) != (_text(stamp), MADE_BY) or _checksum(name, tuple(values)) != checksum:
        return None
    return Entry(
        stamp,
        replace(_unpack(frames), stamp=stamp) if with_frames and frames is not None else None,
        None if facts is None else json.loads(facts),
        sha256,
    )


def _text(stamp: Stamp) -> str:
    return " ".join(str(part) for part in stamp)  # an inode may be more than SQLite's integers hold


def _checksum(name: str, row: tuple[object, ...]) -> int:
    return zlib.crc32(repr((os.fsencode(name), *row)).encode())


def _pack(index: FrameIndex) -> bytes:
    """About 60 bytes for a video of 300 frames: times and positions are nearly even, so differences are."""
    head = np.array([index.frames, index.by_position, index.lead, len(index.labels), len(index.keys)], "<i8")
    arrays = [np.frombuffer(each, "<i8") for each in (index.labels, index.keys, index.key_times)]
    rest = [np.diff(each, prepend=np.int64(0)).tobytes() for each in arrays]
    return zlib.compress(b"".join([head.tobytes(), *rest]), 1)


def _unpack(data: bytes) -> FrameIndex:
    numbers = np.frombuffer(zlib.decompress(data), "<i8")
    frames, by_position, lead, labels, keys = (int(number) for number in numbers[:5])
    parts = np.split(numbers[5:], [labels, labels + keys])
    arrays = [array("q", np.cumsum(part).tobytes()) for part in parts]
    return FrameIndex((0, 0, 0), frames, *arrays, by_position=bool(by_position), lead=lead)
