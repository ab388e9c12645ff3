"""What is made of which video, and where: names that do not collide and do not lead out of the folder."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from causalvae.data.decode import file_and_part, printable
from causalvae.data.sources import IMAGE_ENDINGS, VIDEO_ENDINGS, open_source
from causalvae.errors import ConfigError

PICTURE = ".png"
MAX_NAME = 200  # bytes of a name; file systems have 255, and endings are added to it
SIDE = ".side-by-side"


@dataclass(frozen=True, kw_only=True)
class Target:
    """One video and the files made of it.

    id: the video's in its source. side: None where it is not asked for. record: what is known of them.
    """

    id: str
    path: str
    file: Path
    side: Path | None
    record: Path
    is_picture: bool


def plan_targets(inputs: Sequence[str], out: Path, *, ending: str, side_by_side: bool) -> list[Target]:
    """What to make of files, folders and lists, each as `--video_path` takes it; in their order.

    A folder's videos keep their relative names, below the folder's own name where there are several inputs.
    Names that would collide keep the endings of the originals. ending: of videos.
    ConfigError if there is nothing, or if a result would take the place of a video.
    """
    found: dict[str, str] = {}  # path -> id; a video that is named twice is made once
    for path, video in _found(inputs, out):
        found.setdefault(path, video)
    if not found:
        raise ConfigError("causalvae reconstruct: all that was named is in --out already; name other videos")
    names = _names(list(found.values()), ending=ending)
    originals = {os.path.realpath(file_and_part(path)[0]) for path in found}
    targets: list[Target] = []
    for (path, video), name in zip(found.items(), names, strict=True):
        file = out / name
        side = file.with_name(f"{file.stem}{SIDE}{file.suffix}") if side_by_side else None
        if {os.path.realpath(each) for each in (file, side or file)} & originals:
            raise ConfigError(
                f"--out {printable(out)}: {printable(file)} would take the place of a video; choose another"
            )
        record = file.with_name(f"{file.name}.json")
        is_picture = file.suffix == PICTURE
        targets.append(
            Target(id=video, path=path, file=file, side=side, record=record, is_picture=is_picture)
        )
    return targets


def _found(inputs: Sequence[str], out: Path) -> Iterator[tuple[str, str]]:
    """Path and id of every video, but of those in --out where that is inside a folder that is named."""
    for word in dict.fromkeys(inputs):
        source = open_source(word, flag="")
        folder = Path(word).is_dir() and not word.startswith("sample:")
        within = f"{os.path.realpath(out)}{os.sep}"
        around = f"{os.path.realpath(word)}{os.sep}"
        skip_own = folder and within != around and within.startswith(around)
        above = os.path.basename(os.path.realpath(word)) if folder and len(inputs) > 1 else ""
        for ref in (source[i] for i in range(len(source))):
            if skip_own and os.path.realpath(ref.path).startswith(within):
                continue
            yield ref.path, f"{above}/{ref.id}" if above else ref.id


def _names(ids: Sequence[str], *, ending: str) -> list[str]:
    """Paths below the folder of results, all different, also where case makes no difference."""
    safe = ["/".join(map(_fitting, _parts(each))) for each in ids]
    stems = [os.path.splitext(name) for name in safe]
    endings = [PICTURE if kind.lower() in IMAGE_ENDINGS else ending for _, kind in stems]
    known = (*IMAGE_ENDINGS, *VIDEO_ENDINGS)
    short = [(stem if kind.lower() in known else stem + kind) for stem, kind in stems]
    wanted = Counter((name + kind).casefold() for name, kind in zip(short, endings, strict=True))
    taken: set[str] = set()
    names: list[str] = []
    for name, full, kind in zip(short, safe, endings, strict=True):
        alone = wanted[(name + kind).casefold()] == 1 or full.lower().endswith(kind)
        chosen, number = name if alone else full, 1
        while {(chosen + kind).casefold(), (chosen + SIDE + kind).casefold()} & taken:
            number += 1
            chosen = f"{name if alone else full}-{number}"
        taken |= {(chosen + kind).casefold(), (chosen + SIDE + kind).casefold()}
        names.append(chosen + kind)
    return names


def _parts(video: str) -> list[str]:
    """The parts of an id that lead down."""
    return [part for part in video.split("/") if part not in ("", ".", "..")] or ["video"]


def _fitting(part: str) -> str:
    """A part of a path that leaves room for endings: a long one is cut and told apart by a checksum."""
    encoded = os.fsencode(part)
    if len(encoded) <= MAX_NAME:
        return part
    stem, kind = os.path.splitext(part)
    digest = hashlib.sha256(encoded).hexdigest()[:8]
    short = os.fsencode(stem)[: MAX_NAME - 20].decode("utf-8", "ignore")
    return f"{short}-{digest}{kind}"
