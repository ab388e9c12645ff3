"""Which clips an evaluation measures: a written rule, and the manifest that pins what it chose.

The rule. Videos in the order of the source. A video of n frames that decode, for clips that reach over s of
them, gives m = min(clips_per_video, n // s) clips. Clip i begins at frame i (n - s) // (m - 1), so that the
first begins at frame 0, the last ends with the video, and none overlap; a single clip begins at frame 0. Each
is resized to cover the size, antialiased, and cropped at the centre. Nothing is repeated or mirrored. Videos
that are too short or can't be read are listed with the reason.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from causalvae.data.clips import ClipPlan, ClipRequest, read_clip
from causalvae.data.decode import Decoder, file_and_part, printable
from causalvae.data.sources import ClipSource, VideoRef, open_source
from causalvae.errors import ConfigError, VideoError
from causalvae.files import HASH_BLOCK

FORMAT = "causalvae manifest 1"
Json = Mapping[str, Any]  # Any: JSON values nest
Advance = Callable[[str], None]  # told of each video that was looked at


@dataclass(frozen=True, kw_only=True)
class ClipRule:
    """How clips are chosen. size: H, W. stride: every n-th frame. per_video: the most clips of a video."""

    frames: int
    size: tuple[int, int]
    stride: int = 1
    per_video: int = 1

    @property
    def span(self) -> int:
        """Frames of a video that a clip reaches over."""
        return (self.frames - 1) * self.stride + 1

    def starts(self, num_frames: int) -> list[int]:
        """First frames of the clips of a video; none if it is too short."""
        count = min(self.per_video, num_frames // self.span)
        if count < 2:
            return [0] * count
        return [i * (num_frames - self.span) // (count - 1) for i in range(count)]

    def settings(self) -> dict[str, Any]:  # Any: JSON
        """By the names of the flags, but for `frames`."""
        return {
            "frames": self.frames,
            "resolution": f"{self.size[0]}x{self.size[1]}",
            "sample_rate": self.stride,
            "clips_per_video": self.per_video,
        }


@dataclass(frozen=True, kw_only=True)
class EvalClip:
    """One clip. video_sha256: of the file's bytes. num_frames, height, width: of the video as shown.

    pixels: SHA-256 of the clip's pixels where the manifest was made, uint8 3 t H W.
    """

    video: VideoRef
    video_sha256: str
    num_frames: int
    height: int
    width: int
    start: int
    pixels: str

    @property
    def id(self) -> str:
        """Video and first frame: the same on every machine."""
        return f"{self.video.id}#{self.start}"


@dataclass(frozen=True, kw_only=True)
class ClipSet:
    """The clips of an evaluation, in order. place: where the videos are. unreadable: left out, and why."""

    rule: ClipRule
    place: str
    clips: tuple[EvalClip, ...]
    unreadable: tuple[dict[str, str], ...]

    @property
    def digest(self) -> str:
        """SHA-256 of rule and clips: equal if and only if two evaluations measured the same clips.

        Where the files are, and to which pixels a machine decodes them, is not in it.
        """
        content = self.content()
        for clip in content["clips"]:
            del clip["pixels"]
        text = json.dumps([content["settings"], content["clips"]], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def content(self) -> dict[str, Any]:  # Any: JSON
        """The manifest."""
        return {
            "format": FORMAT,
            "settings": self.rule.settings(),
            "crop": "center",
            "place": self.place,
            "clips": [_entry(clip, self.rule) for clip in self.clips],
            "unreadable": list(self.unreadable),
        }


def _entry(clip: EvalClip, rule: ClipRule) -> dict[str, Any]:  # Any: JSON
    return {
        "video": clip.video.id,
        "video_sha256": clip.video_sha256,
        "num_frames": clip.num_frames,
        "height": clip.height,
        "width": clip.width,
        "start": clip.start,
        "end": clip.start + rule.span - 1,
        "pixels": clip.pixels,
    }


def choose_clips(video_path: str, rule: ClipRule, *, advance: Advance = lambda _: None) -> ClipSet:
    """The clips of the rule, every one of them read once. ConfigError if there is none."""
    source = open_source(video_path)
    clips: list[EvalClip] = []
    unreadable: list[dict[str, str]] = []
    videos = {source[index].id: source[index] for index in range(len(source))}  # each once
    for video in videos.values():
        try:
            clips += _clips_of(video, rule)
        except VideoError as error:
            unreadable.append({"video": video.id, "reason": str(error)})
        advance(video.id)
    if not clips:
        reasons = "; ".join(record["reason"] for record in unreadable[:3])
        raise ConfigError(f"--video_path {printable(video_path)}: no clip can be taken: {reasons}")
    place = video_path if video_path.startswith("sample:") else os.path.abspath(video_path)
    return ClipSet(rule=rule, place=place, clips=tuple(clips), unreadable=tuple(unreadable))


def _clips_of(video: VideoRef, rule: ClipRule) -> list[EvalClip]:
    """The clips of one video. VideoError if it is too short, or if any of them can't be read."""
    decoder = Decoder()
    info = decoder.probe(video.path)
    starts = rule.starts(info.frames)
    if not starts:
        raise too_short(video, rule, frames=info.frames)
    digest = video_sha256(video)
    return [
        EvalClip(
            video=video,
            video_sha256=digest,
            num_frames=info.frames,
            height=info.height,
            width=info.width,
            start=start,
            pixels=pixels_sha256(_read(video, rule, start=start, decoder=decoder)),
        )
        for start in starts
    ]


def read_first(video: VideoRef, rule: ClipRule, *, decoder: Decoder) -> Tensor:
    """The clip at the start of a video, uint8 3 t H W. VideoError if it is too short or can't be read."""
    frames = decoder.num_frames(video.path)
    if not rule.starts(frames):
        raise too_short(video, rule, frames=frames)
    return _read(video, rule, start=0, decoder=decoder)


def too_short(video: VideoRef, rule: ClipRule, *, frames: int) -> VideoError:
    """The error of a video that has fewer frames than a clip reaches over."""
    return VideoError(f"{printable(video.id)}: has {frames} frames, and a clip reaches over {rule.span}")


def read_pixels(clip: EvalClip, rule: ClipRule, *, decoder: Decoder) -> Tensor:
    """uint8 3 t H W. VideoError if the file is not the one that was chosen any more."""
    found = decoder.num_frames(clip.video.path)
    if found != clip.num_frames:
        raise VideoError(f"{printable(clip.video.id)}: has {found} frames, and had {clip.num_frames}")
    return _read(clip.video, rule, start=clip.start, decoder=decoder)


def _read(video: VideoRef, rule: ClipRule, *, start: int, decoder: Decoder) -> Tensor:
    request = ClipRequest(
        video=video, start=start, stride=rule.stride, crop=None, flip=False, cursor=0, sample=0, attempt=0
    )
    return read_clip(request, ClipPlan(frames=rule.frames, size=rule.size), decoder=decoder)


def pixels_sha256(pixels: Tensor) -> str:
    """Of a clip, uint8 3 t H W."""
    return hashlib.sha256(pixels.numpy().tobytes()).hexdigest()


def video_sha256(video: VideoRef) -> str:
    """Of the bytes of a video, also of one in a tar file. VideoError if it can't be read."""
    path, part = file_and_part(video.path)
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            start, end = part if part is not None else (0, os.fstat(file.fileno()).st_size)
            file.seek(start)
            while block := file.read(min(HASH_BLOCK, end - file.tell())):
                digest.update(block)
    except OSError as error:
        raise VideoError(f"{printable(video.id)}: can't be read: {error.strerror}") from error
    return digest.hexdigest()


def read_manifest(path: Path, *, video_path: str | None = None) -> ClipSet:
    """The clips of a manifest, whose videos are at video_path or where they were when it was written.

    Nothing is looked at but names: `check_clips` compares the videos. ConfigError for what is no manifest,
    and for a video that is missing.
    """
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not JSON"
        raise ConfigError(f"--manifest {printable(str(path))}: can't be read: {reason}") from error
    if not isinstance(content, dict) or cast(Json, content).get("format") != FORMAT:
        raise ConfigError(f"--manifest {printable(str(path))}: not a manifest.json of `causalvae eval`")
    found = cast(Json, content)
    try:
        place = str(found["place"]) if video_path is None else video_path
        rule = _rule(found["settings"])
        entries = [dict(entry) for entry in found["clips"]]
        unreadable = tuple(
            {"video": str(e["video"]), "reason": str(e["reason"])} for e in found["unreadable"]
        )
        refs = _refs(open_source(place), [str(entry["video"]) for entry in entries], place=place)
        clips = tuple(_clip(entry, refs[str(entry["video"])]) for entry in entries)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"--manifest {printable(str(path))}: damaged: {error!r}") from error
    if not clips:
        raise ConfigError(f"--manifest {printable(str(path))}: it names no clip")
    return ClipSet(rule=rule, place=place, clips=clips, unreadable=unreadable)


def _rule(settings: Json) -> ClipRule:
    height, width = (int(side) for side in str(settings["resolution"]).split("x"))
    return ClipRule(
        frames=int(settings["frames"]),
        size=(height, width),
        stride=int(settings["sample_rate"]),
        per_video=int(settings["clips_per_video"]),
    )


def _clip(entry: Json, video: VideoRef) -> EvalClip:
    numbers = {name: int(entry[name]) for name in ("num_frames", "height", "width", "start")}
    return EvalClip(
        video=video, video_sha256=str(entry["video_sha256"]), pixels=str(entry["pixels"]), **numbers
    )


def _refs(source: ClipSource, wanted: list[str], *, place: str) -> dict[str, VideoRef]:
    """The videos that are wanted, by id."""
    names = set(wanted)
    found = {ref.id: ref for ref in (source[i] for i in range(len(source))) if ref.id in names}
    missing = [name for name in dict.fromkeys(wanted) if name not in found]
    if missing:
        raise ConfigError(
            f"{printable(missing[0])}: the manifest names it, and it is not in {printable(place)} "
            f"({len(missing)} of {len(names)} videos are missing); say where the videos are by --video_path"
        )
    return found


def check_clips(chosen: ClipSet) -> Iterator[str]:
    """Compare every video with its SHA-256, and give its id when it holds. ConfigError if it does not."""
    for clip in {clip.video.id: clip for clip in chosen.clips}.values():
        try:
            digest = video_sha256(clip.video)
        except VideoError as error:
            raise ConfigError(f"{error}; the manifest needs it") from error
        if digest != clip.video_sha256:
            raise ConfigError(
                f"{printable(clip.video.id)}: the manifest was made with another file of this name "
                f"(SHA-256 {clip.video_sha256[:12]}..., here {digest[:12]}...), so its numbers would not be "
                "the same; bring the file back, or evaluate without --manifest into another --out"
            )
        yield clip.video.id
