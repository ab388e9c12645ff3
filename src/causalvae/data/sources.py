"""Where videos come from: a folder, a file, a list, or the clips of the package, each in a fixed order.

A source knows names, not contents: making one opens no video. The id of a video is its path relative to the
source, so that it is the same on every machine.
"""

import csv
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
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
SIDECARS = (".txt", ".json")  # of a video in a tar file
LIST_KEYS = ("video", "path", "file")  # of a CSV column or JSON field that holds the path
CLIPS = Path(__file__).parent.parent / "clips"
SAMPLES = {"sample:": ("bunny.webm", "city_towers.avi"), "sample:heldout": ("city_spire.mp4",)}
UCF101 = "https://www.crcv.ucf.edu/data/UCF101.php"
# A line of its split files: the class, a video of it by its fixed name, and in lists for training a label.
UCF101_LINE = re.compile(r"(\w+/v_\w+_g\d\d_c\d\d\.avi)(?: \d+)?")
UCF101_FOLDER = "UCF-101"  # beside the folder of lists, as both are unpacked
TRY_SAMPLES = "meanwhile `{}sample:` works, with the clips that come with the package"


@dataclass(frozen=True)
class VideoRef:
    """One video of a source. id: stable across machines, for logs and manifests; path: where it is here.

    The path of a video in a tar file is what `decode.part_of_file` makes: only the decoder can open it.
    caption: what a list says of it, if that was asked for. sidecars: in a tar file, the .txt and .json of the
    same key: ending, and a path of the same kind.
    """

    id: str
    path: str
    caption: str | None = None
    sidecars: tuple[tuple[str, str], ...] = ()


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


def open_source(
    video_path: str, *, flag: str = "--video_path ", caption_column: str | None = None
) -> ClipSource:
    """The source that `--video_path` names. ConfigError, with what to do, if there is none.

    A folder (searched recursively), a video or image, a list (.txt: a path per line, or a split of UCF101;
    .csv, .jsonl: a column `video`, `path` or `file`), tar files (`shard-{000..012}.tar`), `sample:`, or
    `sample:heldout`.
    flag: what stands before the path on the command line, for messages. caption_column: the column or field
    of a .csv or .jsonl that says what is in a video.
    """
    named = f"{flag}{printable(video_path)}"
    if video_path.startswith("sample:"):
        return _sample_source(video_path, named=named)
    path = Path(video_path)
    try:
        is_folder, is_file = path.is_dir(), path.exists()
    except (OSError, ValueError) as error:  # a name too long, a NUL
        raise ConfigError(f"{named}: not a path that can be opened") from error
    if is_folder:
        return _folder_source(path, named=named, flag=flag)
    if is_shard_pattern(video_path):
        return _shard_source(video_path, named=named)
    if not is_file:
        raise ConfigError(_missing(path, named=named, flag=flag))
    if path.suffix.lower() in LIST_ENDINGS:
        return _list_source(path, caption_column, named=named)
    return FileSource(path.name, [VideoRef(path.name, os.path.abspath(path))])


def _sample_source(video_path: str, *, named: str) -> FileSource:
    if video_path not in SAMPLES:
        raise ConfigError(f"{named}: there are {' and '.join(SAMPLES)}")
    return FileSource(video_path, [VideoRef(name, str(CLIPS / name)) for name in SAMPLES[video_path]])


def _missing(path: Path, *, named: str, flag: str) -> str:
    """What to say of a path that is not there."""
    nearest = next((p for p in path.parents if p.is_dir()), Path("."))
    text = f"{named}: there is no such file or folder"
    text += f" (of that path, {printable(os.path.abspath(nearest))} exists)"
    if "ucf101" in str(path).lower():
        text += (
            f". UCF101 is published at {UCF101}: fetch UCF101.rar, unpack it with `unrar x "
            "UCF101.rar` or `7z x UCF101.rar`, and give the folder UCF-101 that comes out of it, or a list "
            "of its train/test splits (trainlist01.txt)"
        )
    else:
        text += ". Give a folder with videos, a video, or a list of paths"
    return f"{text}; {TRY_SAMPLES.format(flag)}"


def _folder_source(folder: Path, *, named: str, flag: str) -> FileSource:
    root = os.path.abspath(folder)
    endings = VIDEO_ENDINGS + IMAGE_ENDINGS
    found = [path for path in _walk(root) if os.path.splitext(path)[1].lower() in endings]
    if not found:
        raise ConfigError(
            f"{named}: no video or image in this folder or below it. Looked for "
            f"files ending in {' '.join(endings)}; {TRY_SAMPLES.format(flag)}"
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


def _list_source(path: Path, caption_column: str | None, *, named: str) -> FileSource:
    """Videos named by a list, in its order; a relative path starts at the list's folder."""
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        if path.suffix.lower() == ".csv":
            rows = list(_csv_rows(file, path, caption_column))
        elif path.suffix.lower() == ".jsonl":
            rows = list(_jsonl_rows(file, caption_column, named=named))
        else:
            names = (line.rstrip("\r\n") for line in file)
            rows = [(name, None) for name in names if name.strip() and name[0] != "#"]
    if not rows:
        raise ConfigError(f"{named}: the list names no video")
    folder = os.path.dirname(os.path.abspath(path))
    splits = [UCF101_LINE.fullmatch(name.rstrip()) for name, _ in rows]
    if all(splits):
        rows = [(split[1], text) for split, (_, text) in zip(splits, rows, strict=True) if split]
        folder = _ucf101_videos(folder, first=rows[0][0])
    refs = (VideoRef(name, os.path.normpath(os.path.join(folder, name)), text) for name, text in rows)
    return FileSource(path.name, refs)


def _ucf101_videos(folder: str, *, first: str) -> str:
    """Where the videos of a split file are: in its own folder, else in UCF-101 beside or in it."""
    places = (folder, os.path.join(folder, UCF101_FOLDER), os.path.join(folder, "..", UCF101_FOLDER))
    return next((place for place in places if os.path.exists(os.path.join(place, first))), folder)


def _shard_source(pattern: str, *, named: str) -> FileSource:
    """Videos and images in tar files, in the order of the shards and of their members."""
    paths = shards(pattern)
    root = os.path.commonpath([os.path.dirname(path) for path in paths])
    refs: dict[str, VideoRef] = {}
    for path in paths:
        shard = os.path.relpath(path, root).replace(os.sep, "/")
        found = {name: part_of_file(path, start=start, size=size) for name, start, size in members(path)}
        for name, part in found.items():  # twice in a shard: the later one counts, as when it is unpacked
            if os.path.splitext(name)[1].lower() in VIDEO_ENDINGS + IMAGE_ENDINGS:
                video = f"{shard}/{name}"
                refs[video] = VideoRef(video, part, sidecars=tuple(_sidecars(name, found)))
    if not refs:
        raise ConfigError(f"{named}: no video or image in {len(paths)} tar files")
    return FileSource(os.path.basename(pattern), refs.values())


def _sidecars(name: str, found: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Files of a shard that tell of a member: WebDataset's key is the name up to its first dot."""
    folder, base = os.path.split(name)
    key = os.path.join(folder, base.split(".", 1)[0])
    yield from ((ending, found[key + ending]) for ending in SIDECARS if key + ending in found)


def _csv_rows(
    lines: Iterable[str], path: Path, caption_column: str | None
) -> Iterator[tuple[str, str | None]]:
    """Path and caption by the column `video`, `path` or `file` of a table with a heading.

    Without such a heading, the first column of every row, and no captions.
    """
    column: int | None = None
    text: int | None = None
    for row in csv.reader(lines):
        if column is None:
            heading = [cell.strip().lower() for cell in row]
            known = [heading.index(key) for key in LIST_KEYS if key in heading]
            column = known[0] if known else 0
            if caption_column is not None:
                text = _caption_place(heading if known else [], caption_column, path)
            if known:
                continue
        if len(row) > column and row[column].strip():
            yield row[column], row[text] if text is not None and len(row) > text else None


def _caption_place(heading: list[str], wanted: str, path: Path) -> int:
    """Which column has the captions. ConfigError if none has that name."""
    if wanted.strip().lower() in heading:
        return heading.index(wanted.strip().lower())
    said = f"its columns are {', '.join(heading)}" if heading else "it has no heading with a column `video`"
    raise ConfigError(f"--caption_column {printable(wanted)}: not in {printable(path)}; {printable(said)}")


def _jsonl_rows(
    lines: Iterable[str], caption_column: str | None, *, named: str
) -> Iterator[tuple[str, str | None]]:
    """One JSON value a line: a path, or an object with `video`, `path` or `file`, and maybe a caption."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{named}, line {number}"
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{place}: not JSON ({error.msg})") from error
        text = value.get(caption_column) if isinstance(value, dict) and caption_column is not None else None
        if isinstance(value, dict):
            value = next((value[key] for key in LIST_KEYS if key in value), None)
        if not isinstance(value, str) or not value:
            raise ConfigError(f"{place}: neither a path nor an object with one of {', '.join(LIST_KEYS)}")
        if text is not None and not isinstance(text, str):
            raise ConfigError(f"{place}: {printable(str(caption_column))} is no text")
        yield value, text


def _size(path: str) -> int:
    """Bytes of a video, or -1 if it is missing."""
    _, part = file_and_part(path)
    if part is not None:
        return part[1] - part[0]
    try:
        return os.stat(path).st_size
    except (OSError, ValueError):
        return -1
