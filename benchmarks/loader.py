"""Clips per second of the loader, by format of the source and number of workers, as a Markdown table.

    python benchmarks/loader.py [--video_path PATH ...] [--seconds 4]

Without paths: the clips that come with the package, and a film of each common format made from one of them. A
row reads clips of 17 frames of 256x256 for some seconds, after the first batches are there.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import av
import torch

from causalvae.data.clips import ClipPlan
from causalvae.data.decode import Decoder, probe
from causalvae.data.loader import ClipLoader
from causalvae.data.sources import CLIPS, open_source

FORMATS = {  # name of the file: codec and its options
    "h264.mp4": ("libx264", {"g": "12", "preset": "veryfast"}),
    "h264-one-key.mp4": ("libx264", {"g": "250", "preset": "veryfast", "sc_threshold": "0"}),
    "vp9.webm": ("libvpx-vp9", {"g": "12", "cpu-used": "8", "b": "500k"}),
    "mpeg4-b.avi": ("mpeg4", {"g": "12", "bf": "2", "b": "1M"}),
    "mpeg2.mpg": ("mpeg2video", {"g": "12", "bf": "2", "b": "2M"}),
    "mjpeg.avi": ("mjpeg", {"b": "8M"}),
}
SIZES = ((240, 320), (720, 1280))
FRAMES = 180
WARM_BATCHES = 3


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Clips per second of the loader.")
    parser.add_argument("--video_path", nargs="*", default=[])
    parser.add_argument("--workers", nargs="*", type=int, default=[0, 1, 2, 4])
    parser.add_argument("--seconds", type=float, default=4.0)
    asked = parser.parse_args()
    plan = ClipPlan(frames=17, size=(256, 256), batch=4)
    print(f"clips/s, {plan.frames} frames of 256x256; {os.cpu_count()} cores, PyAV {av.__version__}\n")
    heading = ["source", "size", "frames", *(f"{n} workers" for n in asked.workers)]
    print("| " + " | ".join(heading) + " |\n|" + "---|" * len(heading))
    with tempfile.TemporaryDirectory() as folder:
        for path in asked.video_path or [
            *sorted(map(str, CLIPS.glob("*.[awm]*[i4m]"))),
            *_made(Path(folder)),
        ]:
            speeds = [_clips_per_second(path, plan, workers=n, seconds=asked.seconds) for n in asked.workers]
            first = probe(open_source(path)[0].path)
            cells = [Path(path).name, f"{first.width}x{first.height}", str(first.frames)]
            print("| " + " | ".join(cells + [f"{speed:.1f}" for speed in speeds]) + " |", flush=True)


def _clips_per_second(path: str, plan: ClipPlan, *, workers: int, seconds: float) -> float:
    """Clips taken in so many seconds, once the workers are there and hold the index of the file."""
    with ClipLoader(open_source(path), plan, workers=workers) as loader:
        for _ in range(WARM_BATCHES + workers):
            next(loader)
        began, batches = time.monotonic(), 0
        while time.monotonic() - began < seconds:
            next(loader)
            batches += 1
        return batches * plan.batch / (time.monotonic() - began)


def _made(folder: Path) -> list[str]:
    """A film of every format and size, of the frames of a bundled clip back and forth."""
    there = Decoder().read_frames(CLIPS / "bunny.webm", range(FRAMES // 2))
    frames = torch.cat([there, there.flip(0)])
    paths = []
    for height, width in SIZES:
        for name, (codec, options) in FORMATS.items():
            path = folder / f"{height}p-{name}"
            with av.open(str(path), "w") as container:
                stream = container.add_stream(codec, rate=25, options=options)
                assert isinstance(stream, av.VideoStream)
                stream.height, stream.width = height, width
                stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
                for picture in frames:
                    frame = av.VideoFrame.from_ndarray(picture.numpy(), format="rgb24")
                    container.mux(stream.encode(frame.reformat(width, height, stream.pix_fmt)))
                container.mux(stream.encode())
            paths.append(str(path))
    return paths


if __name__ == "__main__":
    main()
