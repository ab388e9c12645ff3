"""Films of a page: original and reconstructions of the same clips over the steps, small enough to embed.

A film becomes one picture with all of its frames, a sprite, so that the page can show any frame exactly.
Only films are read that lie where trainings and evaluations write them, and have the names that these give.
"""

import base64
import math
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.error import FFmpegError
from av.video.reformatter import Interpolation

from causalvae.flags import printable
from causalvae.report.evals import Eval
from causalvae.report.records import Run

NAME = re.compile(r"step-([0-9]{8,})-clip([0-9]{1,4})\.mp4")
PEAK = 255.0
ACCURATE = (
    Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
)  # as clips are read
MAX_FRAMES = 65  # of a film, from its first
MAX_PIXELS = 1 << 26  # of a film; a damaged header must not ask for all of the memory
MAX_CLIPS = 8  # of a run's samples, and as many of its held-out clips
MAX_VERSIONS = 8  # steps at which a clip is shown: first, last, and evenly between
MAX_SIDE = 384  # pixels of a frame on the page
PIXELS = 18_000_000  # of all sprites of a page; about 5 MB
BYTES = 5_500_000  # of all sprites of a page
SMALLEST = 0.1  # of the sides that frames could have
QUALITY = 82  # of WebP; the luma of a film differs by 2.5 of 255 then

Clip = dict[str, Any]  # Any: JSON
Sprites = dict[tuple[object, ...], "Film"]  # what was encoded before, by file, time, length and size


@dataclass(frozen=True)
class Film:
    """Both as WebP in base64, and the PSNR of every frame in dB, None where equal.

    original: empty where another film of the clip has it.
    """

    original: str
    reconstruction: str
    psnr: tuple[float | None, ...]
    size: tuple[int, int]  # height and width of a frame on the page


@dataclass(frozen=True, kw_only=True)
class Footage:
    """One clip and its films by step. run: place among the runs, None for an evaluation that is of none.

    name: the clip's own, empty for a clip of the training, which has a number. of: the evaluation's name.
    """

    run: int | None
    number: int
    films: Mapping[int, Path]
    name: str = ""
    of: str = ""


def players(
    footage: Sequence[Footage], *, notes: list[str], known: Sprites | None = None, num_bytes: int = BYTES
) -> list[Clip]:
    """The clips, worst first. known: read and filled. num_bytes: the most for all sprites."""
    cache = {} if known is None else known
    found = [(each, _chosen(each.films)) for each in footage]
    scale = 1.0
    clips = _encode(found, scale=scale, notes=notes, known=cache)
    while (size := sprite_bytes(clips)) > num_bytes and scale > SMALLEST:  # noise needs more than films do
        scale *= math.sqrt(num_bytes / size) * 0.9
        clips = _encode(found, scale=scale, notes=notes, known=cache)
    return sorted(clips, key=_badness)


def footage_of(runs: Sequence[Run], evals: Sequence[Eval]) -> list[Footage]:
    """All clips that there are films of: of trainings and of evaluations."""
    own = (samples(run.path, index) for index, run in enumerate(runs))
    return [*chain.from_iterable(own), *held_out(evals)]


def samples(run: Path, index: int) -> list[Footage]:
    """Clips of a run's own pictures. index: its place among the runs."""
    folder = run / "samples"
    found: dict[int, dict[int, Path]] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if (match := NAME.fullmatch(path.name)) and stat.S_ISREG(path.lstat().st_mode):
            found.setdefault(int(match[2]), {})[int(match[1])] = path
    chosen = sorted(found.items())[:MAX_CLIPS]
    return [Footage(run=index, number=number, films=steps) for number, steps in chosen]


def held_out(evals: Sequence[Eval]) -> list[Footage]:
    """The worst clips of the last evaluation of each run and file, with the films of earlier steps."""
    filmed = [each for each in evals if each.films]
    last = {(each.run, each.label if each.run is None else ""): each for each in filmed}
    found: list[Footage] = []
    for (run, _), newest in last.items():
        before = [each for each in filmed if run is not None and each.run == run]
        for number, name in enumerate(list(newest.films)[:MAX_CLIPS]):
            steps = {each.step or 0: each.films[name] for each in (*before, newest) if name in each.films}
            of = newest.label if run is None else ""
            found.append(Footage(run=run, number=number, films=steps, name=name, of=of))
    return found


def _chosen(steps: Mapping[int, Path]) -> dict[int, Path]:
    order = sorted(steps)
    places = np.linspace(0, len(order) - 1, min(MAX_VERSIONS, len(order))).round().astype(int)
    return {order[place]: steps[order[place]] for place in dict.fromkeys(places.tolist())}


def _encode(
    found: Sequence[tuple[Footage, dict[int, Path]]], *, scale: float, notes: list[str], known: Sprites
) -> list[Clip]:
    """Every chosen film as sprites. The original is that of the clip's last film."""
    sprites = sum(len(steps) + 1 for _, steps in found)
    clips: list[Clip] = []
    for footage, steps in found:
        read: dict[int, Film] = {}
        for step, path in sorted(steps.items(), reverse=True):
            newest = not read  # its original is shown for all
            try:
                frames, height, width = _shape(path)
                size = _fit(height, width, share=scale * scale * PIXELS / (sprites * frames))
                facts = path.stat()
                key = (str(path), facts.st_mtime_ns, facts.st_size, size, newest)
                if key not in known:
                    known[key] = _read(path, size, original=newest)
                read[step] = known[key]
            except (FFmpegError, OSError, ValueError, IndexError) as error:
                note = f"{printable(path.name)}: can't be shown: {printable(str(error))}"
                notes += [] if note in notes else [note]
        if read:
            clips.append(_clip(footage, read))
    return clips


def _clip(footage: Footage, read: Mapping[int, Film]) -> Clip:
    """What the page needs of one clip. Films of another shape than the last one are left out."""
    last = read[max(read)]
    frames = len(last.psnr)
    fitting = [
        (step, film)
        for step, film in sorted(read.items())
        if film.size == last.size and len(film.psnr) == frames
    ]
    return {
        "run": footage.run,
        "clip": footage.number,
        "name": printable(footage.name),
        "of": printable(footage.of),
        "height": last.size[0],
        "width": last.size[1],
        "frames": frames,
        "columns": _columns(frames),
        "original": last.original,
        "versions": [
            {"step": step, "film": film.reconstruction, "psnr": film.psnr} for step, film in fitting
        ],
    }


def sprite_bytes(clips: Sequence[Clip]) -> int:
    """Of all sprites."""
    texts = [
        text for clip in clips for text in (clip["original"], *(each["film"] for each in clip["versions"]))
    ]
    return sum(len(text) for text in texts) * 3 // 4


def _badness(clip: Clip) -> float:
    """Mean PSNR of the last version, in dB; equal frames count as 100."""
    psnr = clip["versions"][-1]["psnr"]
    return sum(100.0 if value is None else value for value in psnr) / len(psnr)


def _shape(path: Path) -> tuple[int, int, int]:
    """Frames, at most as many as are shown, height, and width of one of the two halves."""
    with av.open(str(path.resolve())) as container:
        stream = container.streams.video[0]
        frames = sum(1 for packet in container.demux(stream) if packet.size)
        if frames == 0 or stream.width < 2:
            raise ValueError("it has no frames")
        if stream.height * stream.width > MAX_PIXELS:
            raise ValueError(f"its frames have {stream.height} x {stream.width} pixels")
        return min(frames, MAX_FRAMES), stream.height, stream.width // 2


def _fit(height: int, width: int, *, share: float) -> tuple[int, int]:
    """Height and width on the page. share: pixels that a frame may have."""
    scale = min(1.0, MAX_SIDE / max(height, width), math.sqrt(share / (height * width)))
    return max(16, round(height * scale)), max(16, round(width * scale))


def _read(path: Path, size: tuple[int, int], *, original: bool) -> Film:
    """Decode a film of two halves side by side. PSNR is of the frames before they are resized."""
    sides: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    psnr: list[float | None] = []
    with av.open(str(path.resolve())) as container:
        for frame in container.decode(video=0):
            picture = frame.reformat(format="rgb24", interpolation=ACCURATE).to_ndarray()  # h 2w 3
            half = picture.shape[1] // 2
            halves = picture[:, :half], picture[:, half : 2 * half]
            psnr.append(_psnr(*halves))
            for side, pixels in zip(sides, halves, strict=True):
                side.append(_resized(pixels, size))
            if len(psnr) == MAX_FRAMES:
                break
    if not psnr:
        raise ValueError("it has no frames")
    return Film(_sprite(sides[0]) if original else "", _sprite(sides[1]), tuple(psnr), size)


def _psnr(a: np.ndarray, b: np.ndarray) -> float | None:
    """Of two pictures uint8 h w 3, in dB."""
    mse = float(np.square(a.astype(np.int32) - b.astype(np.int32)).mean())
    return None if mse == 0 else round(10 * math.log10(PEAK**2 / mse), 2)


def _resized(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 h w 3 -> uint8 of another height and width, antialiased."""
    if pixels.shape[:2] == size:
        return pixels
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
    return frame.reformat(height=size[0], width=size[1], interpolation="AREA").to_ndarray()


def _columns(frames: int) -> int:
    return math.ceil(math.sqrt(frames))


def _sprite(frames: Sequence[np.ndarray]) -> str:
    """Frames uint8 h w 3 in rows of a near-square grid, as WebP in base64."""
    height, width, _ = frames[0].shape
    columns = _columns(len(frames))
    rows = math.ceil(len(frames) / columns)
    sheet = np.zeros((rows * height, columns * width, 3), np.uint8)
    for number, picture in enumerate(frames):
        y, x = number // columns * height, number % columns * width
        sheet[y : y + height, x : x + width] = picture
    codec = av.CodecContext.create("libwebp", "w")
    assert isinstance(codec, av.VideoCodecContext)
    codec.height, codec.width, codec.pix_fmt = sheet.shape[0], sheet.shape[1], "bgra"
    codec.options = {"quality": str(QUALITY), "compression_level": "2"}
    frame = av.VideoFrame.from_ndarray(sheet, format="rgb24").reformat(format="bgra")
    packets = [*codec.encode(frame), *codec.encode(None)]
    return base64.b64encode(b"".join(bytes(packet) for packet in packets)).decode()
