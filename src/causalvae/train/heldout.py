"""How well a run's weights do on videos that it does not learn from, without touching the training's
numbers."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from causalvae.data.clips import ClipPlan, center_clip
from causalvae.data.sources import ClipSource
from causalvae.errors import ConfigError, VideoError
from causalvae.metrics import psnr
from causalvae.models.build import Model
from causalvae.train.samples import reconstruct

MAX_CLIPS = 256  # the first videos of the source, one clip each


def evaluate_held_out(
    vae: Model, source: ClipSource, plan: ClipPlan, *, weights: Mapping[str, Tensor]
) -> dict[str, Any]:  # Any: JSON
    """PSNR of the reconstruction by the posterior's mode, clip by clip and the mean of them, in dB.

    A clip is the first frames of a video, cropped at the centre. weights: averaged parameters, or none to
    take the model's. Videos that can't be read are listed and leave the mean. ConfigError if none can.
    """
    clips: list[dict[str, Any]] = []
    unreadable: list[dict[str, str]] = []
    for index in range(min(len(source), MAX_CLIPS)):
        video = source[index]
        try:
            clip = center_clip(video, plan)
        except VideoError as error:
            unreadable.append({"video": video.id, "reason": str(error)})
            continue
        clips.append({"video": video.id, "psnr": psnr(clip, reconstruct(vae, clip, weights=weights))})
    if not clips:
        reasons = "; ".join(record["reason"] for record in unreadable[:3])
        raise ConfigError(f"{source.name}: no video can be evaluated. The first reasons: {reasons}")
    return {
        "weights": "ema" if weights else "live",
        "frames": plan.frames,
        "resolution": f"{plan.size[0]}x{plan.size[1]}",
        "sample_rate": plan.stride,
        "psnr": sum(clip["psnr"] for clip in clips) / len(clips),
        "clips": clips,
        "unreadable": unreadable,
    }
