"""Pictures of a run.

Reconstructions of the same clips at every save, without touching the training's numbers.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.func import functional_call

from causalvae.data.encode import contact_sheet, side_by_side, write_png, write_video
from causalvae.models.build import Model
from causalvae.video import crop_frames, pad_frames, to_model, to_uint8


@torch.no_grad()
def reconstruct(vae: Model, pixels: Tensor, *, weights: Mapping[str, Tensor] | None = None) -> Tensor:
    """uint8 3 t h w -> the reconstruction by the posterior's mode, uint8 3 t h w.

    weights: parameters to use instead of the model's.
    """
    parameters = dict(vae.named_parameters()) | dict(weights or {})
    x = to_model(pixels[None].to(vae.last_layer.get_parameter("weight").device))
    recon, _ = functional_call(vae, parameters, (pad_frames(x, vae.geometry), None))
    return to_uint8(crop_frames(recon, pixels.shape[1]))[0].cpu()


def write_samples(
    folder: Path, step: int, *, vae: Model, clips: Sequence[Tensor], weights: Mapping[str, Tensor]
) -> list[Path]:
    """A film of original and reconstruction beside each other for each clip, and one picture of all of them.

    clips: uint8 3 t h w each. weights: averaged parameters, or none to take the model's.
    """
    folder.mkdir(exist_ok=True)
    films, paths = [], []
    for number, pixels in enumerate(clips):
        recon = reconstruct(vae, pixels, weights=weights)
        film = side_by_side(_film(pixels), _film(recon))
        paths.append(folder / f"step-{step:08d}-clip{number}.mp4")
        write_video(paths[-1], film)
        films.append(torch.cat([_film(pixels), _film(recon)], dim=1))  # original above its reconstruction
    paths.append(folder / f"step-{step:08d}.png")
    write_png(paths[-1], contact_sheet(films))
    return paths


def _film(pixels: Tensor) -> Tensor:
    return pixels.permute(1, 2, 3, 0)  # 3 t h w -> t h w 3
