"""The whole job in two minutes.

Train the tiny preset on the bundled clips and look at a clip it never saw.
"""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from causalvae.config import TrainSettings
from causalvae.data.clips import ClipPlan, center_clip
from causalvae.data.encode import contact_sheet, side_by_side, write_png, write_video
from causalvae.data.sources import open_source
from causalvae.flags import Given, Resolution
from causalvae.flagtext import default_texts
from causalvae.metrics import psnr
from causalvae.models.build import Model, build
from causalvae.models.presets import PRESETS
from causalvae.report.build import has_extra, write_report
from causalvae.train.samples import reconstruct
from causalvae.train.trainer import train
from causalvae.weights.tensorfiles import read_safetensors

MODEL = "tiny"
HELD_OUT_FRAMES = 65  # of the held-back clip, from its first
# Chosen by measurement, see docs/benchmarks.md. The squared error, because PSNR is read from it; no critic,
# because it would only have begun to help.
SETTINGS: dict[str, Any] = {  # Any: values of any flag
    "exp_name": "demo",
    "video_path": "sample:",
    "model": MODEL,
    "batch_size": 4,
    "video_num_frames": 9,
    "resolution": Resolution(96, 96),
    "save_steps": 40,
    "start_learning_rate": 8e-4,
    "lr_scheduler": "cosine",
    "clip_grad": True,
    "ema_decay": 0.98,
    "loss_type": "l2",
    "disc_type": "none",
    "perceptual": "none",
    "dataloader_num_workers": 1,
    "eval_steps": 20,
    "eval_video_path": "sample:heldout",
}


@dataclass(frozen=True)
class DemoResult:
    """How it ended, and what to tell.

    Exit status, PSNR in dB on the held-back clip, and a text of a few lines.
    """

    status: int
    psnr_before: float | None
    psnr_after: float | None
    text: str


def demo(*, output_dir: Path, seed: int = 0, max_steps: int = 80) -> DemoResult:
    """Train, compare before and after on the held-back clip, and write pictures of it."""
    started = time.monotonic()
    chosen = {
        **SETTINGS,
        "output_dir": str(output_dir),
        "seed": seed,
        "max_steps": max_steps,
        "lr_warmup_steps": min(10, max_steps // 2),
    }
    settings = TrainSettings(**chosen)
    given = {name: Given(value, "causalvae demo") for name, value in chosen.items()}
    result = train(settings, given=given, command=("causalvae", "demo"))
    if result.status != 0:
        return DemoResult(result.status, None, None, "stopped; `causalvae demo` goes on from here\n")
    clip = _held_out_clip(settings)
    vae = build(PRESETS[MODEL], seed=seed)
    before = reconstruct(vae, clip)
    averaged = read_safetensors(
        result.path / "checkpoints" / f"step-{settings.max_steps:08d}" / "ema.safetensors"
    )
    after = reconstruct(vae, clip, weights=averaged)
    _write_pictures(result.path, clip, before, after)
    page = _write_page(result.path)
    score = psnr(clip, before), psnr(clip, after)
    seconds = time.monotonic() - started
    text = _text(settings, result.path, vae, clip, score=score, seconds=seconds, page=page)
    return DemoResult(0, *score, text)


def _held_out_clip(settings: TrainSettings) -> Tensor:
    size = (settings.resolution.height, settings.resolution.width)
    return center_clip(open_source("sample:heldout")[0], ClipPlan(frames=HELD_OUT_FRAMES, size=size))


def _write_pictures(folder: Path, clip: Tensor, before: Tensor, after: Tensor) -> None:
    """Each uint8 3 t h w. The picture: the clip above what came out before and after the training."""
    films = [x.permute(1, 2, 3, 0) for x in (clip, before, after)]  # 3 t h w -> t h w 3
    write_video(folder / "held_out.mp4", side_by_side(films[0], films[2]))
    sheet = contact_sheet(films)
    write_png(folder / "held_out.png", sheet.repeat_interleave(2, dim=0).repeat_interleave(2, dim=1))


def _write_page(run: Path) -> str:
    """The report of the run; the line that tells of it, or how to get one."""
    if not has_extra():
        return f"`pip install 'causalvae[report]'` and `causalvae report {run}` make a page of all this"
    page = run / "report.html"
    write_report([run], out=page, defaults=default_texts(TrainSettings))
    return f"{page}   all of this on one page: open it in a browser"


def _text(
    settings: TrainSettings,
    run: Path,
    vae: Model,
    clip: Tensor,
    *,
    score: tuple[float, float],
    seconds: float,
    page: str,
) -> str:
    latent = vae.geometry.latent_shape(*clip.shape[1:])
    kept = clip.numel() / math.prod(latent)
    size, frames, steps = settings.resolution, settings.video_num_frames, settings.max_steps
    return f"""
What happened: {steps} steps of {settings.batch_size} clips taught the preset `{MODEL}` to squeeze clips of
{frames} frames of {size}x{size} pixels into {kept:.0f} times fewer numbers, and back.
On a clip that it never saw (a tower at night, {clip.shape[1]} frames) the PSNR is
  {score[0]:.2f} dB before the training: `{MODEL}` starts as a linear code
  {score[1]:.2f} dB after it, in {seconds:.0f} s in all
Look at
  {run / "held_out.png"}   the clip, before, after
  {run / "held_out.mp4"}   the clip and its reconstruction
  {run / "samples"}        clips of the training, over the steps
  {run / "metrics.jsonl"}  every number of every step
  {page}
Next: your own videos
  causalvae train --video_path FOLDER --batch_size 1 --max_steps 5000 --model small
"""
