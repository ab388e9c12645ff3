"""Seconds of a first and a second `causalvae data scan`, and of a training's first pass, as a table.

    python benchmarks/scan.py [--videos 100000] [--folder FOLDER]

The scan is of so many small films: 12 to 27 frames of 64x48, half of them AVI with B-frames, whose frames can
only be counted by decoding. They are made in the folder and stay there. What is kept between the runs goes to
a folder that is removed. The training goes once through copies of a clip of the package, an AVI with B-frames
of 114 frames.
"""

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np

from causalvae.data.clips import ClipPlan
from causalvae.data.index import prepare
from causalvae.data.loader import ClipLoader
from causalvae.data.scan import Reading, scan
from causalvae.data.sources import CLIPS as CLIPS_OF_PACKAGE
from causalvae.data.sources import open_source
from causalvae.machine import Machine

KINDS = (("mp4", "libx264", {"g": "12"}), ("avi", "mpeg4", {"g": "12", "bf": "2"}))
LENGTHS = range(12, 28)
PER_FOLDER = 1000
BATCHES, CLIPS = 50, 4  # of the training


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Seconds of a first and a second scan.")
    parser.add_argument("--videos", type=int, default=100_000)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "causalvae-scan-films")
    asked = parser.parse_args()
    _make(asked.folder, asked.videos)
    source = open_source(str(asked.folder))
    print(f"{len(source):,} films, {Machine.look().cores} cores, PyAV {av.__version__}\n")
    print("| | nothing known | all known | ratio |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as home, tempfile.TemporaryDirectory() as other:
        index, empty = _prepared(home), _prepared(other)
        first, second = (_seconds(lambda: _scan(asked.folder, index)) for _ in range(2))
        print(f"| scan | {first:.1f} s | {second:.1f} s | {first / second:.0f} |", flush=True)
        films = _copies(Path(other) / "films")
        cold, warm = (_seconds(lambda: _train(films, empty)) for _ in range(2))
        print(f"| a pass over {BATCHES * CLIPS} films | {cold:.1f} s | {warm:.1f} s | {cold / warm:.1f} |")
        print(f"\nthe index: {index.stat().st_size / len(source):.0f} bytes a film")


def _prepared(home: str) -> Path:
    path, warnings = prepare(Path(home))
    assert path is not None, warnings
    return path


def _seconds(work: Callable[[], object]) -> float:
    began = time.monotonic()
    work()
    return time.monotonic() - began


def _scan(folder: Path, index: Path) -> None:
    found = scan(
        open_source(str(folder)),
        name=str(folder),
        reading=Reading(workers=Machine.look().cores),
        index=index,
        progress=lambda *_: None,
    )
    assert not found.broken()


def _train(folder: Path, index: Path) -> None:
    plan = ClipPlan(frames=17, size=(256, 256), batch=CLIPS)
    with ClipLoader(open_source(str(folder)), plan, workers=Machine.look().cores, index=index) as loader:
        for _ in range(BATCHES):
            next(loader)


def _copies(folder: Path) -> Path:
    """As many films as the training draws clips."""
    folder.mkdir()
    for number in range(BATCHES * CLIPS):
        path = folder / f"{number}.avi"
        shutil.copy(CLIPS_OF_PACKAGE / "city_towers.avi", path)
        os.utime(path, (0, 0))
    return folder


def _make(folder: Path, videos: int) -> None:
    """Copies of a few films, each with a few bytes of its own at the end, which decoders pass over."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        models = [
            (kind, _film(Path(place) / f"{frames}.{kind}", codec, options, frames=frames))
            for kind, codec, options in KINDS
            for frames in LENGTHS
        ]
    hour_ago = time.time_ns() - 3600 * 10**9
    for number in range(videos):
        kind, data = models[number % len(models)]
        path = folder / f"{number // PER_FOLDER:04d}" / f"{number:07d}.{kind}"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            box = b"\x00\x00\x00\x10free" if kind == "mp4" else b"JUNK\x08\x00\x00\x00"
            path.write_bytes(data + box + number.to_bytes(8, "little"))
            os.utime(path, ns=(hour_ago, hour_ago))


def _film(path: Path, codec: str, options: dict[str, str], *, frames: int) -> bytes:
    """The bytes of a film of a moving gradient."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options)
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        across = np.arange(64, dtype=np.uint8)
        for number in range(frames):
            picture = np.repeat(np.tile(across * 2 + number * 5, (48, 1))[..., None], 3, axis=2)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path.read_bytes()


if __name__ == "__main__":
    main()
