"""Where videos come from: a folder, a file, a list, or the clips of the package, each in a fixed order.

A source knows names, not contents: making one opens no video. The id of a video is its path relative to the
source, so that it is the same on every machine.
"""

import csv
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from causalvae.data.decode import file_and_part, part_of_file, printable
from causalvae.data.shards import is_shard_pattern, members, shards
from causalvae.errors import ConfigError

VIDEO_ENDINGS = (".3gp", ".asf", ".avi", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4")
VIDEO_ENDINGS += (".mpeg", ".mpg", ".mts", ".ogv", ".ts", ".vob", ".webm", ".wmv")
IMAGE_ENDINGS = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
LIST_ENDINGS = (".txt", ".csv", ".jsonl")
LIST_KEYS = ("video", "path", "file")  # of a CSV column or JSON field that holds the path
CLIPS = Path(__file__).parent.parent / "clips"
SAMPLES = {"sample:": ("bunny.webm", "city_towers.avi"), "sample:heldout": ("city_spire.mp4",)}
UCF101 = "https://www.crcv.ucf.edu/data/UCF101.php"
# A line of its split files: the class, a video of it by its fixed name, and in lists for training a label.
UCF101_LINE = re.compile(r"(\w+/v_\w+_g\d\d_c\d\d\.avi)(?: \d+)?")
UCF101_FOLDER = "UCF-101"  # beside the folder of lists, as both are unpacked
TRY_SAMPLES = "meanwhile `--video_path sample:` works, with the clips that come with the package"


@dataclass(frozen=True)
class VideoRef:
    """One video of a source. id: stable across machines, for logs and manifests; path: where it is here.

    The path of a video in a tar file is what `decode.part_of_file` makes: only the decoder can open it.
    """

    id: str
    path: str


class ClipSource(Protocol):
    """Videos in a fixed order. fingerprint: changes when a video is added, removed, renamed or resized."""

    @property
    def name(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> VideoRef: ...


class FileSource:
    """A source made of files whose names are known."""

    def __init__(self, name: str, refs: Iterable[VideoRef]) -> None:
        self.name = name
        self._refs = tuple(refs)

    def __len__(self) -> int:
        return len(self._refs)

    def __getitem__(self, index: int) -> VideoRef:
        return self._refs[index]

    @property
    def fingerprint(self) -> str:
        """sha256 over the id and size of every video, in order. A missing file counts as size -1."""
        digest = hashlib.sha256()
        for ref in self._refs:
            digest.update(json.dumps([ref.id, _size(ref.path)]).encode("ascii") + b"\n")
        return digest.hexdigest()


def open_source(video_path: str) -> ClipSource:
    """The source that `--video_path` names. ConfigError, with what to do, if there is none.

    A folder (searched recursively), a video or image, a list (.txt: a path per line, or a split of UCF101;
    .csv, .jsonl: a column `video`, `path` or `file`), tar files (`shard-{000..012}.tar`), `sample:`, or
    `sample:heldout`.
    """
    if video_path.startswith("sample:"):
        return _sample_source(video_path)
    path = Path(video_path)
    try:
        is_folder, is_file = path.is_dir(), path.exists()
    except (OSError, ValueError) as error:  # a name too long, a NUL
        raise ConfigError(f"--video_path {printable(video_path)}: not a path that can be opened") from error
    if is_folder:
        return _folder_source(path)
    if is_shard_pattern(video_path):
        return _shard_source(video_path)
    if not is_file:
        raise ConfigError(_missing(path))
    if path.suffix.lower() in LIST_ENDINGS:
        return _list_source(path)
    return FileSource(path.name, [VideoRef(path.name, os.path.abspath(path))])


def _sample_source(video_path: str) -> FileSource:
    if video_path not in SAMPLES:
        raise ConfigError(f"--video_path {printable(video_path)}: there are {' and '.join(SAMPLES)}")
    return FileSource(video_path, [VideoRef(name, str(CLIPS / name)) for name in SAMPLES[video_path]])


def _missing(path: Path) -> str:
    """What to say of a path that is not there."""
    nearest = next((p for p in path.parents if p.is_dir()), Path("."))
    text = f"--video_path {printable(path)}: there is no such file or folder"
    text += f" (of that path, {printable(os.path.abspath(nearest))} exists)"
    if "ucf101" in str(path).lower():
        text += (
            f". UCF101 is published at {UCF101}: fetch UCF101.rar, unpack it with `unrar x "
            "UCF101.rar` or `7z x UCF101.rar`, and give the folder UCF-101 that comes out of it, or a list "
            "of its train/test splits (trainlist01.txt)"
        )
    else:
        text += ". Give a folder with videos, a video, or a list of paths"
    return f"{text}; {TRY_SAMPLES}"


def _folder_source(folder: Path) -> FileSource:
    root = os.path.abspath(folder)
    endings = VIDEO_ENDINGS + IMAGE_ENDINGS
    found = [path for path in _walk(root) if os.path.splitext(path)[1].lower() in endings]
    if not found:
        raise ConfigError(
            f"--video_path {printable(folder)}: no video or image in this folder or below it. Looked for "
            f"files ending in {' '.join(endings)}; {TRY_SAMPLES}"
        )
    refs = (VideoRef(os.path.relpath(path, root).replace(os.sep, "/"), path) for path in found)
    return FileSource(os.path.basename(root) or root, sorted(refs, key=lambda ref: os.fsencode(ref.id)))


def _walk(root: str) -> Iterator[str]:
    """Every file below, with links followed. A folder is entered once, so a loop of links ends.

    Fifos and devices with the right ending are given as well: reading them is an error that names them.
    """
    entered: set[tuple[int, int]] = set()
    for folder, below, files in os.walk(root, followlinks=True, onerror=_refuse):
        found = os.stat(folder)
        if (found.st_dev, found.st_ino) in entered:
            below.clear()
            continue
        entered.add((found.st_dev, found.st_ino))
        below.sort(key=os.fsencode)
        yield from (os.path.join(folder, name) for name in files)


def _refuse(error: OSError) -> None:
    raise ConfigError(f"{printable(error.filename)}: this folder can't be read: {error.strerror}") from error


def _list_source(path: Path) -> FileSource:
    """Videos named by a list, in its order; a relative path starts at the list's folder."""
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        if path.suffix.lower() == ".csv":
            names = list(_csv_names(file))
        elif path.suffix.lower() == ".jsonl":
            names = list(_jsonl_names(file, path))
        else:
            names = [name for line in file if (name := line.rstrip("\r\n")).strip() and name[0] != "#"]
    if not names:
        raise ConfigError(f"--video_path {printable(path)}: the list names no video")
    folder = os.path.dirname(os.path.abspath(path))
    splits = [UCF101_LINE.fullmatch(name.rstrip()) for name in names]
    if all(splits):
        names = [split[1] for split in splits if split]
        folder = _ucf101_videos(folder, first=names[0])
    refs = (VideoRef(name, os.path.normpath(os.path.join(folder, name))) for name in names)
    return FileSource(path.name, refs)


def _ucf101_videos(folder: str, *, first: str) -> str:
    """Where the videos of a split file are: in its own folder, else in UCF-101 beside or in it."""
    places = (folder, os.path.join(folder, UCF101_FOLDER), os.path.join(folder, "..", UCF101_FOLDER))
    return next((place for place in places if os.path.exists(os.path.join(place, first))), folder)


def _shard_source(pattern: str) -> FileSource:
    """Videos and images in tar files, in the order of the shards and of their members."""
    paths = shards(pattern)
    root = os.path.commonpath([os.path.dirname(path) for path in paths])
    refs: dict[str, VideoRef] = {}
    for path in paths:
        shard = os.path.relpath(path, root).replace(os.sep, "/")
        for name, start, size in members(path):
            if os.path.splitext(name)[1].lower() in VIDEO_ENDINGS + IMAGE_ENDINGS:
                video = f"{shard}/{name}"  # twice in a shard: the later one counts, as when it is unpacked
                refs[video] = VideoRef(video, part_of_file(path, start=start, size=size))
    if not refs:
        raise ConfigError(f"--video_path {printable(pattern)}: no video or image in {len(paths)} tar files")
    return FileSource(os.path.basename(pattern), refs.values())


def _csv_names(lines: Iterable[str]) -> Iterator[str]:
    """The column `video`, `path` or `file` of a table with a heading, else the first column of every row."""
    column: int | None = None
    for row in csv.reader(lines):
        if column is None:
            heading = [cell.strip().lower() for cell in row]
            known = [heading.index(key) for key in LIST_KEYS if key in heading]
            column = known[0] if known else 0
            if known:
                continue
        if len(row) > column and row[column].strip():
            yield row[column]


def _jsonl_names(lines: Iterable[str], path: Path) -> Iterator[str]:
    """One JSON value a line: a path, or an object with `video`, `path` or `file`."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(
                f"--video_path {printable(path)}, line {number}: not JSON ({error.msg})"
            ) from error
        if isinstance(value, dict):
            value = next((value[key] for key in LIST_KEYS if key in value), None)
        if not isinstance(value, str) or not value:
            raise ConfigError(
                f"--video_path {printable(path)}, line {number}: neither a path nor an object with one of "
                f"{', '.join(LIST_KEYS)}"
            )
        yield value


def _size(path: str) -> int:
    """Bytes of a video, or -1 if it is missing."""
    _, part = file_and_part(path)
    if part is not None:
        return part[1] - part[0]
    try:
        return os.stat(path).st_size
    except (OSError, ValueError):
        return -1
