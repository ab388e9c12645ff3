"""Lists of videos that are left out: `quarantine.jsonl`, written by a scan and read by a training."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

from causalvae.data.decode import printable
from causalvae.data.sources import ClipSource
from causalvae.errors import ConfigError

Record = dict[str, Any]  # Any: JSON. video, path, reason; whole: bad whatever clip of it is asked for


def as_lines(records: Iterable[Record]) -> str:
    """A line of JSON each, in ASCII so that names that are not text fit in."""
    return "".join(json.dumps(record) + "\n" for record in records)


def read_quarantine(path: Path, source: ClipSource) -> list[Record]:
    """The records of a list that are about videos of a source and bad as a whole, under their ids there.

    A video is told by its path, or by its id where the list comes from another place. ConfigError if the
    file is no such list, or is one and none of its videos is in the source.
    """
    records = _read(path)
    by_path = {str(record["path"]): record for record in records}
    by_id = {str(record["video"]): record for record in records}
    found: list[Record] = []
    met = False
    for number in range(len(source)):
        ref = source[number]
        record = by_path.get(ref.path) or by_id.get(ref.id)
        met = met or record is not None
        if record is not None and record["whole"]:
            found.append({**record, "video": ref.id, "path": ref.path})
    if records and not met:
        raise ConfigError(
            f"--quarantine {printable(path)}: none of its {len(records)} videos is in --video_path "
            f"{printable(source.name)}; give the list that `causalvae data scan` wrote about these videos"
        )
    return found


def _read(path: Path) -> list[Record]:
    shown = f"--quarantine {printable(path)}"
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(
            f"{shown}: can't be read: {error.strerror}; `causalvae data scan` writes such a list"
        ) from error
    records: list[Record] = []
    for number, line in enumerate(lines, start=1):
        try:
            record: object = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{shown} line {number}: not JSON; give a quarantine.jsonl") from error
        if not isinstance(record, dict) or not {"video", "path", "reason", "whole"} <= record.keys():
            raise ConfigError(f"{shown} line {number}: must have video, path, reason and whole")
        records.append(cast(Record, record))
    return records
