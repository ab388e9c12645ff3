"""What an evaluation learns of a model by asking for it: clips of one colour, and latents with holes."""

from typing import Any

import torch
from torch import Tensor

from causalvae import rng
from causalvae.artefacts import COLOURS, colour_clip, grid_levels
from causalvae.data.decode import Decoder
from causalvae.evalset import ClipSet, read_pixels
from causalvae.fidelity import mean_curve
from causalvae.latentmetrics import masked_psnr
from causalvae.metrics import mean
from causalvae.models.build import Model
from causalvae.subjects import Subject, reconstruct_batch

MASKED_CLIPS = 16  # the first ones of the set
FRACTIONS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.4)  # of latent positions that are masked


def probed(subject: Subject, vae: Model, *, clips: ClipSet, fill: list[float]) -> dict[str, Any]:  # Any: JSON
    """Metrics and curves of a model that need clips or latents of their own.

    fill: what masked positions get, the mean of each channel.
    """
    curve = {"x": list(FRACTIONS), "y": _masked(subject, vae, clips=clips, fill=fill), "unit": "dB"}
    colours = colour_grid(subject, vae, clips=clips)
    facts = {"clips": len(COLOURS), "unit": "levels", "better": "lower"}
    return {
        "metrics": {} if colours is None else {"grid_levels_of_colours": {"mean": colours, **facts}},
        "curves": {"psnr_masked": {**curve, "x_label": "share of masked latent positions"}},
    }


def colour_grid(subject: Subject, vae: Model, *, clips: ClipSet) -> float | None:
    """Mean of `grid_levels` over clips of one colour each; none where the model has no spatial factor."""
    rule, found = clips.rule, list[float]()
    for colour in COLOURS:
        film = colour_clip(colour, frames=rule.frames, size=rule.size)  # t h w 3
        recons, _ = reconstruct_batch(subject, film.permute(3, 0, 1, 2)[None])
        levels = grid_levels(film, recons[0].permute(1, 2, 3, 0), period=vae.geometry.spatial)
        if levels is not None and vae.geometry.spatial > 1:
            found.append(levels)
    return mean(found) if found else None


def _masked(subject: Subject, vae: Model, *, clips: ClipSet, fill: list[float]) -> list[float]:
    """PSNR in dB by masked share, mean over the first clips."""
    decoder, curves = Decoder(), list[list[float]]()

    def decode(z: Tensor) -> Tensor:
        return vae.decode(z).cpu()

    for clip in clips.clips[:MASKED_CLIPS]:
        pixels = read_pixels(clip, clips.rule, decoder=decoder)
        _, posteriors = reconstruct_batch(subject, pixels[None])
        curves.append(
            masked_psnr(
                pixels.permute(1, 2, 3, 0),
                posteriors[0].mode()[0],
                decode=decode,
                fill=torch.tensor(fill),
                fractions=FRACTIONS,
                base=rng.key("masked latents", clip.id),
            )
        )
    return mean_curve(curves)
