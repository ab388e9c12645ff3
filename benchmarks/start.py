"""PSNR of untrained `shuffle` models on the sample clips, by size of the crop, as a Markdown table.

python benchmarks/start.py [--model tiny]
"""

import argparse

from causalvae.data.clips import ClipPlan, center_clip
from causalvae.data.sources import open_source
from causalvae.metrics import psnr
from causalvae.models.build import build
from causalvae.models.presets import PRESETS
from causalvae.train.samples import reconstruct

FRAMES = 33
SIZES = (64, 96, 128, 192)


def main() -> None:
    """One row for each size, one column for each clip."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny", choices=sorted(PRESETS))
    vae = build(PRESETS[parser.parse_args().model])
    sources = [open_source(name) for name in ("sample:heldout", "sample:")]
    videos = [source[i] for source in sources for i in range(len(source))]
    print(f"| short side | {' | '.join(video.id for video in videos)} |")
    print("|---" * (1 + len(videos)) + "|")
    for size in SIZES:
        clips = [center_clip(video, ClipPlan(frames=FRAMES, size=(size, size))) for video in videos]
        print(f"| {size} | {' | '.join(f'{psnr(clip, reconstruct(vae, clip)):.2f}' for clip in clips)} |")


if __name__ == "__main__":
    main()
