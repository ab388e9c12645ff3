"""Where videos come from: a folder, one file, a list, or the clips that come with the package, in a fixed order."""

import csv
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from causalvae.errors import ConfigError

VIDEO_ENDINGS = frozenset(
    ".mp4 .m4v .mov .avi .mkv .webm .mpg .mpeg .ts .m2ts .mts .wmv .flv .ogv .3gp .gif .y4m .vob .mxf".split()
)
IMAGE_ENDINGS = frozenset(".png .jpg .jpeg .bmp .webp .tif .tiff".split())
LIST_ENDINGS = frozenset((".txt", ".csv", ".jsonl"))
COLUMNS = ("video", "path", "file", "video_path")  # of a list that name the video, the first that is there
SAMPLE = "sample:"
SAMPLE_FOLDER = Path(__file__).parent.parent / "clips"
HELD_OUT = "held_out"  # the folder in SAMPLE_FOLDER that `sample:` leaves out


@dataclass(frozen=True)
class VideoRef:
    """One video. id: its name within the source, the same on every machine. path: absolute."""

    id: str
    path: str


class ClipSource(Protocol):
    """Videos in a fixed order."""

    name: str
    fingerprint: str

    def __len__(self) -> int:
        """How many."""
        ...

    def __getitem__(self, index: int) -> VideoRef:
        """One of them."""
        ...


@dataclass(frozen=True)
class VideoList:
    """A source whose videos are known from the start. fingerprint: SHA-256 over names and sizes."""

    name: str
    videos: tuple[VideoRef, ...]

    def __len__(self) -> int:
        """How many."""
        return len(self.videos)

    def __getitem__(self, index: int) -> VideoRef:
        """One of them."""
        return self.videos[index]

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the names and the sizes of the files."""
        digest = hashlib.sha256()
        for video in self.videos:
            size = os.stat(video.path).st_size if os.path.exists(video.path) else -1
            digest.update(f"{video.id}\0{size}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


def open_source(path: str) -> ClipSource:
    """The videos that --video_path names. ConfigError if there are none, with what was looked for."""
    if path.startswith(SAMPLE):
        return _samples(path)
    if path.endswith(".tar") or ".tar" in Path(path).suffixes:
        raise ConfigError(
            f"--video_path {path}: WebDataset shards are not available yet; give a folder of videos"
        )
    place = Path(path)
    if not place.exists():
        raise ConfigError(
            f"--video_path {path}: there is no such file or folder. Give a folder of videos, one video, or a list of "
            "them; --video_path sample: trains on the clips that come with the package"
        )
    if place.is_dir():
        return _folder(path, place)
    if place.suffix.lower() in LIST_ENDINGS:
        return _listed(path, place)
    return VideoList(path, (VideoRef(place.name, os.path.abspath(place)),))


def _samples(path: str) -> VideoList:
    chosen = {SAMPLE: SAMPLE_FOLDER, SAMPLE + HELD_OUT: SAMPLE_FOLDER / HELD_OUT}
    if path not in chosen:
        raise ConfigError(f"--video_path {path}: there are {' and '.join(chosen)}")
    files = sorted(p for p in chosen[path].iterdir() if p.suffix in VIDEO_ENDINGS)
    return VideoList(path, tuple(VideoRef(p.name, str(p)) for p in files))


def _folder(name: str, folder: Path) -> VideoList:
    endings = VIDEO_ENDINGS | IMAGE_ENDINGS
    found = sorted(p for p in _files_below(folder, seen=set()) if Path(p).suffix.lower() in endings)
    if not found:
        raise ConfigError(
            f"--video_path {name}: no videos in this folder or below it; looked for {' '.join(sorted(endings))}"
        )
    return VideoList(name, tuple(VideoRef(os.path.relpath(p, folder), os.path.abspath(p)) for p in found))


def _files_below(folder: Path | str, *, seen: set[tuple[int, int]]) -> Iterator[str]:
    """Paths of files, links to files and folders followed; a folder met a second time is passed over."""
    try:
        here = os.stat(folder)
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except PermissionError as error:
        raise ConfigError(f"--video_path {folder}: this folder may not be read") from error
    if (here.st_dev, here.st_ino) in seen:
        return
    seen.add((here.st_dev, here.st_ino))
    for entry in entries:
        if entry.is_dir():
            yield from _files_below(entry.path, seen=seen)
        else:
            yield entry.path


def _listed(name: str, file: Path) -> VideoList:
    entries = [entry for entry in _entries(name, file) if entry]
    if not entries:
        raise ConfigError(f"--video_path {name}: the list names no video")
    folder = os.path.abspath(file.parent)
    return VideoList(name, tuple(VideoRef(entry, os.path.join(folder, entry)) for entry in entries))


def _entries(name: str, file: Path) -> list[str]:
    """What a list names. Text: a path per line, # comments. CSV and JSONL: a column, or JSON strings."""
    text = file.read_bytes().decode("utf-8-sig", "surrogateescape")
    if file.suffix.lower() == ".csv":
        rows = list(csv.reader(text.splitlines()))
        column = next((rows[0].index(c) for c in COLUMNS if rows and c in rows[0]), None)
        return [row[column or 0] for row in rows[0 if column is None else 1 :] if len(row) > (column or 0)]
    lines = [line.strip("\r") for line in text.split("\n") if line.strip()]
    if file.suffix.lower() == ".txt":
        return [line for line in lines if not line.startswith("#")]
    return [_json_entry(name, number, line) for number, line in enumerate(lines, start=1)]


def _json_entry(name: str, number: int, line: str) -> str:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"--video_path {name}: line {number} is not JSON: {error}") from error
    if isinstance(value, dict):
        value = next((value[column] for column in COLUMNS if column in value), None)
    if not isinstance(value, str):
        raise ConfigError(
            f"--video_path {name}: line {number} names no video; expected one of {', '.join(COLUMNS)}"
        )
    return value
