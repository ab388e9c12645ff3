"""A model in the hands of a user: `causalvae.load(path)`, which takes tensors, arrays and files.

What comes back is of the kind that went in: a tensor for a tensor, an array for an array or a file.
"""

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from causalvae import rng
from causalvae.coders import CodingPlan, answers, decoder, encoder
from causalvae.coding import plan_coding
from causalvae.data.codings import CODECS, CodecName
from causalvae.data.films import Film, open_film, read_pieces
from causalvae.data.writer import film_writer
from causalvae.errors import ConfigError
from causalvae.export import save_model
from causalvae.geometry import Geometry
from causalvae.infer import Opened, open_vae
from causalvae.machine import available_bytes
from causalvae.models.base import Posterior
from causalvae.models.stream import ClipStream
from causalvae.train.precision import PrecisionName
from causalvae.video import crop_size, pad_size, to_model, to_uint8
from causalvae.weights.layouts import Choice

PathLike = str | os.PathLike[str]
FILE_AXES, CLIP_AXES = 4, 5  # t h w 3 of a file, and b t h w 3
LAYOUTS = "give a tensor b 3 t h w in [-1, 1] or uint8, an array of uint8 frames t h w 3, or a file"


@dataclass(frozen=True, kw_only=True)
class Latents:
    """What clips became, and what it takes to have them again. posterior: of b c k h w.

    frames, height, width: of the clips, before they were padded. axes: of the array that went in, None for a
    tensor. film: the file that it was.
    """

    posterior: Posterior
    frames: int
    height: int
    width: int
    axes: int | None = None
    film: Film | None = None

    @property
    def mean(self) -> Tensor:
        """The mean: b c k h w."""
        return self.posterior.mean

    @property
    def logvar(self) -> Tensor:
        """The log variance: b c k h w."""
        return self.posterior.logvar

    def mode(self) -> Tensor:
        """The most likely latents: b c k h w."""
        return self.posterior.mode()

    def sample(self, seed: int = 0) -> Tensor:
        """Latents drawn from the posterior, b c k h w: the same seed gives the same ones."""
        b, c, k, h, w = self.mean.shape
        clips = [
            torch.stack([rng.normal((c, h, w), rng.key("latents", seed, i, j)) for j in range(k)], dim=1)
            for i in range(b)
        ]
        return self.posterior.sample(torch.stack(clips).to(self.mean.device))


class Codec:
    """A causal video VAE that encodes and decodes clips of any length and size in the memory that is free.

    vae: the network. notes: what had to be assumed when it was loaded.
    """

    def __init__(self, opened: Opened) -> None:
        self.vae = opened.vae
        self.device = opened.device
        self.notes = opened.notes
        self._loaded = opened.loaded
        self._plans: dict[tuple[int, int], CodingPlan] = {}  # by height and width: making one takes a second

    @property
    def geometry(self) -> Geometry:
        """Temporal and spatial factors, and the channels of latents."""
        return self.vae.geometry

    @torch.inference_mode()
    def encode(self, x: Tensor | np.ndarray | PathLike) -> Latents:
        """Clips to latents. Sizes and counts that the model can't have are padded, and cropped by `decode`.

        x: a tensor b 3 t h w, in [-1, 1] or uint8; an array of uint8 frames, h w 3, t h w 3 or b t h w 3; or
        the path of a video or picture. ConfigError for other shapes, VideoError for a file that is no video.
        """
        if isinstance(x, Tensor | np.ndarray):
            clips = _checked(x) if isinstance(x, Tensor) else _from_array(x)
            axes, film, (frames, height, width) = (
                None if isinstance(x, Tensor) else x.ndim,
                None,
                clips.shape[2:],
            )
            plan = self._plan(height, width)
            pieces = iter(clips.split(plan.chunk, dim=2))
        else:
            film = open_film(Path(x))
            axes, frames, height, width = FILE_AXES, film.frames, film.height, film.width
            plan = self._plan(height, width)
            pieces = (_clip(piece) for piece in read_pieces(film, frames=plan.chunk))
        posterior = self._encoded(pieces, plan)
        return Latents(posterior=posterior, frames=frames, height=height, width=width, axes=axes, film=film)

    @torch.inference_mode()
    def decode(self, z: Latents | Tensor | np.ndarray) -> Tensor | np.ndarray:
        """Latents to clips: a tensor b 3 t h w, about [-1, 1], or an array of uint8 frames where one went in.

        z: what `encode` gave, whose mode is taken, or latents b c k h w, which give all of their frames.
        ConfigError for other shapes.
        """
        clips = torch.cat(list(self._decoded(z)), dim=2)
        axes = z.axes if isinstance(z, Latents) else None if isinstance(z, Tensor) else CLIP_AXES
        return clips if axes is None else _to_array(clips, axes=axes)

    @torch.inference_mode()
    def write(
        self, z: Latents, out: PathLike, *, codec: CodecName = "h264", quality: int | None = None
    ) -> None:
        """Decode what `encode` made of a file into a video, with its sound and times; frames are not kept.

        codec, quality: as `causalvae reconstruct` has them. ConfigError for latents that are not of a file.
        """
        if z.film is None:
            raise ConfigError(
                f"{os.fspath(out)}: these latents are not of a file, so that no times are known"
            )
        size, coding = (z.height, z.width), CODECS[codec]
        with film_writer(Path(out), z.film, size=size, coding=coding, quality=quality) as writer:
            for clip in self._decoded(z):
                writer.push(to_uint8(clip[0]).permute(1, 2, 3, 0).cpu())  # 3 t h w -> t h w 3

    def stream(self) -> ClipStream:
        """A pass over one clip in pieces of any length. ConfigError, with the reason, if the model can't."""
        return self.vae.stream()

    def save(self, path: PathLike) -> Path:
        """Write the model as it is now, in the format that the name ends in, or as its library's folder.

        Returns the file or folder to name. ConfigError where something is there.
        """
        tensors = {name: tensor.cpu() for name, tensor in self.vae.state_dict().items()}
        return save_model(replace(self._loaded, tensors=tensors), Path(path)).path

    def _plan(self, height: int, width: int) -> CodingPlan:
        """How videos of this size go through the model in the memory that was free at the first of them."""
        size = height, width = self.geometry.padded_size(height), self.geometry.padded_size(width)
        if size not in self._plans:
            budget = available_bytes(str(self.device))
            self._plans[size] = plan_coding(self.vae, height=height, width=width, tile="auto", budget=budget)
        return self._plans[size]

    def _encoded(self, pieces: Iterator[Tensor], plan: CodingPlan) -> Posterior:
        """Pieces b 3 t h w, uint8 or in [-1, 1], to the posterior of all of them."""
        parts = list(answers(encoder(self.vae, plan), map(self._input, pieces)))
        mean, logvar = (
            torch.cat([getattr(each, name) for each in parts], dim=2) for name in ("mean", "logvar")
        )
        return Posterior(mean, logvar, parts[0].certain)

    def _input(self, piece: Tensor) -> Tensor:
        """A piece b 3 t h w, uint8 or in [-1, 1], as the network takes it."""
        x = piece.to(self.device)
        return pad_size(to_model(x) if x.dtype == torch.uint8 else x.float(), self.geometry)

    def _decoded(self, z: Latents | Tensor | np.ndarray) -> Iterator[Tensor]:
        """Frames b 3 t h w in order, in pieces; cropped to what was encoded."""
        latents = _checked_latents(z.mode() if isinstance(z, Latents) else torch.as_tensor(z), self.geometry)
        height, width = (side * self.geometry.spatial for side in latents.shape[3:])
        plan = self._plan(height, width)
        left = z.frames if isinstance(z, Latents) else sys.maxsize
        pieces = latents.split(max(1, plan.chunk // self.geometry.temporal), dim=2)
        for made in answers(decoder(self.vae, plan), (piece.to(self.device).float() for piece in pieces)):
            frames = made[:, :, :left]
            left -= frames.shape[2]
            if frames.shape[2]:
                yield crop_size(frames, z.height, z.width) if isinstance(z, Latents) else frames


def load(
    path: PathLike,
    *,
    weights: Choice = "ema",
    model_config: PathLike | None = None,
    device: str = "auto",
    precision: PrecisionName | Literal["auto"] = "auto",
) -> Codec:
    """The model of a file, folder, run or checkpoint, of any format that docs/weights.md lists.

    weights: averaged or live ones, where there are both. model_config: a published config.json that says what
    names of weights can't. device: auto, cpu, cuda, cuda:1, mps. precision: what convolutions compute in;
    auto is bf16 on a GPU that has it, else fp32. WeightsError or ConfigError if it can't be.
    """
    config = None if model_config is None else Path(model_config)
    opened = open_vae(Path(path), prefer=weights, model_config=config, device=device, precision=precision)
    return Codec(opened)


def _clip(frames: Tensor) -> Tensor:
    return frames.permute(3, 0, 1, 2)[None]  # t h w 3 -> 1 3 t h w


def _from_array(x: np.ndarray) -> Tensor:
    """uint8 frames h w 3, t h w 3 or b t h w 3 -> uint8 b 3 t h w."""
    if x.dtype != np.uint8 or not 3 <= x.ndim <= CLIP_AXES or x.shape[-1] != 3 or x.size == 0:
        raise ConfigError(f"an array {' x '.join(map(str, x.shape))} of {x.dtype} is no clip: {LAYOUTS}")
    clips = torch.from_numpy(np.ascontiguousarray(x))[(None,) * (CLIP_AXES - x.ndim)]
    return clips.permute(0, 4, 1, 2, 3)  # b t h w 3 -> b 3 t h w


def _to_array(clips: Tensor, *, axes: int) -> np.ndarray:
    """b 3 t h w about [-1, 1] -> uint8 frames of so many axes, h w 3 to b t h w 3."""
    frames = to_uint8(clips).permute(0, 2, 3, 4, 1).cpu().numpy()  # b 3 t h w -> b t h w 3
    return frames[(0,) * (CLIP_AXES - axes)]


def _checked(clips: Tensor) -> Tensor:
    numbers = clips.is_floating_point() or clips.dtype == torch.uint8
    if clips.dim() != CLIP_AXES or clips.shape[1] != 3 or clips.numel() == 0 or not numbers:
        shape = " x ".join(map(str, clips.shape))
        raise ConfigError(f"a tensor {shape} of {clips.dtype} is no clip: {LAYOUTS}")
    return clips


def _checked_latents(z: Tensor, geometry: Geometry) -> Tensor:
    if z.dim() != CLIP_AXES or z.shape[1] != geometry.channels or z.numel() == 0 or not z.is_floating_point():
        shape = " x ".join(map(str, z.shape))
        raise ConfigError(
            f"{shape} of {z.dtype} are no latents of this model, which are b {geometry.channels} k h w in "
            "floating point"
        )
    return z
