"""How well a run's weights do on videos that it does not learn from, without touching the training's numbers.

Clips, numbers and sums are those of `causalvae eval`, for the averaged and the live weights side by side.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from causalvae.data.clips import ClipPlan
from causalvae.data.decode import Decoder
from causalvae.data.sources import ClipSource, VideoRef
from causalvae.errors import ConfigError, VideoError
from causalvae.evalset import ClipRule, read_first
from causalvae.metrics import METRICS
from causalvae.models.build import Model
from causalvae.scores import FORMAT, score, summary
from causalvae.train.samples import reconstruct
from causalvae.worst import MOST, Worst, with_films, write_films

MAX_CLIPS = 256  # the first videos of the source, one clip each
MEASURED = ("psnr", "mse", "ssim_gaussian11", "first_frame_gain", "psnr_of_changes")  # the rest takes longer


def evaluate_held_out(
    vae: Model, source: ClipSource, plan: ClipPlan, *, ema: Mapping[str, Tensor], films: Path
) -> dict[str, Any]:  # Any: JSON
    """Metrics of the reconstruction by the posterior's mode, with the model's weights and with averaged ones.

    A clip is the first frames of a video, cropped at the centre. ema: averaged parameters, or none. films:
    the folder for films of the worst clips, by the averaged weights if there are any. Videos that are too
    short or can't be read are listed and left out. ConfigError if there is no other.
    """
    rule = _rule(plan)
    metrics = {name: METRICS[name] for name in MEASURED}
    sides: dict[str, Mapping[str, Tensor]] = {**({"ema": ema} if ema else {}), "live": {}}
    records: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}  # Any: as above
    unreadable: list[dict[str, str]] = []
    shown, worst = next(iter(sides)), Worst(MOST)
    for video, clip in _clips(source, rule, unreadable):
        for name, weights in sides.items():
            recon = reconstruct(vae, clip, weights=weights)
            numbers = score(clip, recon, metrics=metrics)
            if name == shown:
                worst.offer(len(records[name]), numbers, clip=clip, recon=recon)
            records[name].append({"id": f"{video.id}#0", "video": video.id, "start": 0, **numbers})
    if not records["live"]:
        raise _nothing(source, unreadable)
    records[shown] = with_films(records[shown], write_films(films, worst.films()))
    found = {name: {**summary(each, metrics=metrics), "clips": each} for name, each in records.items()}
    return {"format": FORMAT, "settings": rule.settings(), "weights": found, "unreadable": unreadable}


def check_held_out(source: ClipSource, plan: ClipPlan) -> None:
    """ConfigError if no clip of the source can be evaluated: told before a training and not in its middle."""
    unreadable: list[dict[str, str]] = []
    if next(_clips(source, _rule(plan), unreadable), None) is None:
        raise _nothing(source, unreadable)


def in_words(result: Mapping[str, Any]) -> str:  # Any: JSON
    """An evaluation in a sentence."""
    sides = result["weights"]
    name = "ema" if "ema" in sides else "live"
    facts = sides[name]["metrics"]["psnr"]
    text = f"{facts['mean']:.2f} dB PSNR ({name} weights) on {facts['clips']} held-out clips"
    live = sides["live"]["metrics"]["psnr"]["mean"]
    return text if name == "live" else f"{text}; with the live weights {live:.2f} dB"


def _rule(plan: ClipPlan) -> ClipRule:
    return ClipRule(frames=plan.frames, size=plan.size, stride=plan.stride)


def _clips(
    source: ClipSource, rule: ClipRule, unreadable: list[dict[str, str]]
) -> Iterator[tuple[VideoRef, Tensor]]:
    """Videos and their first clips, uint8 3 t h w. Those that give none are added to `unreadable`."""
    decoder = Decoder()
    for index in range(min(len(source), MAX_CLIPS)):
        video = source[index]
        try:
            clip = read_first(video, rule, decoder=decoder)
        except VideoError as error:
            unreadable.append({"video": video.id, "reason": str(error)})
            continue
        yield video, clip


def _nothing(source: ClipSource, unreadable: list[dict[str, str]]) -> ConfigError:
    reasons = "; ".join(record["reason"] for record in unreadable[:3])
    return ConfigError(f"{source.name}: no video can be evaluated. The first reasons: {reasons}")
