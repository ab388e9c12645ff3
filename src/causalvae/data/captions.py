"""What is said of a video beside its frames: a caption of a list, or the files of its key in a tar file."""

import json
from typing import Any

from causalvae.data.decode import file_and_part, printable
from causalvae.data.sources import VideoRef
from causalvae.errors import VideoError

LONGEST = 1 << 20  # bytes of a sidecar; it is kept in memory and copied for each clip


def caption_record(video: VideoRef, *, column: str | None) -> dict[str, Any]:  # Any: JSON
    """What goes with the latents of a video: `caption`, and `source` for the JSON beside it, where there are.

    column: the field of that JSON which is the caption; without, it is the text beside the video.
    VideoError if what is beside the video can't be read.
    """
    record: dict[str, Any] = {} if video.caption is None else {"caption": video.caption}  # Any: as above
    for ending, part in video.sidecars:
        text = _text(video, part)
        if ending == ".json":
            record["source"] = _parsed(video, text)
            caption = record["source"].get(column) if column is not None else None
            record |= {"caption": caption} if isinstance(caption, str) else {}
        elif column is None:
            record["caption"] = text.strip()
    return record


def _parsed(video: VideoRef, text: str) -> dict[str, Any]:  # Any: JSON
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise VideoError(f"{printable(video.id)}: the .json beside it is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise VideoError(f"{printable(video.id)}: the .json beside it is no JSON object")
    return value


def _text(video: VideoRef, part: str) -> str:
    """The text of a member of a tar file."""
    path, place = file_and_part(part)
    assert place is not None, "sidecars are parts of tar files"
    start, end = place
    if end - start > LONGEST:
        raise VideoError(f"{printable(video.id)}: the text beside it has more than {LONGEST:,} bytes")
    try:
        with open(path, "rb") as file:
            file.seek(start)
            return file.read(end - start).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise VideoError(f"{printable(video.id)}: the text beside it can't be read: {error}") from error
