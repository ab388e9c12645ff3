"""rFVD: how far the reconstructions of a set are from its clips, as distributions of what I3D sees in them.

The network's weights are the user's file. Only a table of weights is read; a TorchScript file is a program
and is refused.
"""

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from causalvae.critics.i3d import CLASSES, I3D, SIDE
from causalvae.errors import ConfigError, WeightsError
from causalvae.files import sha256
from causalvae.moments import Moments
from causalvae.video import to_model
from causalvae.weights.pytorch import read_torch
from causalvae.weights.tensorfiles import is_safetensors, read_safetensors

Framing = Literal["stretch", "crop"]
FRAMINGS: tuple[Framing, ...] = get_args(Framing)
LEAST_CLIPS = CLASSES + 1  # fewer leave the covariance of 400 logits singular
COUNTER = "num_batches_tracked"  # of batch norm in training; old files have none


@dataclass(frozen=True)
class FrechetParts:
    """Moments of the logits of clips and of their reconstructions, so far."""

    clips: Moments
    recons: Moments

    @classmethod
    def none(cls) -> "FrechetParts":
        """Of no clip yet."""
        return cls(Moments.none(CLASSES), Moments.none(CLASSES))

    def merged(self, other: "FrechetParts") -> "FrechetParts":
        """Of the clips of both."""
        return FrechetParts(self.clips.merged(other.clips), self.recons.merged(other.recons))

    def distance(self) -> float:
        """rFVD. ConfigError for fewer clips than it needs."""
        if self.clips.count < LEAST_CLIPS:
            raise ConfigError(
                f"rFVD needs {LEAST_CLIPS} clips or more, because it compares covariances of {CLASSES} "
                f"numbers, and there are {self.clips.count}; evaluate more clips, or go without it"
            )
        return frechet_distance(self.clips, self.recons)


def frechet_distance(a: Moments, b: Moments) -> float:
    """|mean_a - mean_b|^2 + trace(A + B - 2 (A B)^(1/2)) with covariances over n - 1.

    Of two normal distributions; 0 where they are equal. Unterthiner et al., Towards accurate generative
    models of video (2018). The root's trace is that of (A^(1/2) B A^(1/2))^(1/2), which is symmetric.
    """
    cov_a, cov_b = a.covariance(unbiased=True), b.covariance(unbiased=True)
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0.0).sqrt() @ vectors.T
    shared = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0.0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + cov_a.trace() + cov_b.trace() - 2.0 * shared
    return max(0.0, float(distance))


@torch.no_grad()
def frechet_parts(clip: Tensor, recon: Tensor, *, network: I3D, framing: Framing) -> FrechetParts:
    """Of one clip and its reconstruction, uint8 t h w 3 each, on the network's device."""
    device = network.get_parameter("logits.conv3d.bias").device
    logits = [network(framed(each.to(device), framing=framing)[None]) for each in (clip, recon)]
    return FrechetParts(Moments.of(logits[0]), Moments.of(logits[1]))


def framed(clip: Tensor, *, framing: Framing) -> Tensor:
    """uint8 t h w 3 -> 3 t 224 224 in [-1, 1], bilinear without antialiasing, as published.

    stretch: both sides to 224, whatever their ratio (StyleGAN-V). crop: the short side to 224, the long one
    in proportion and rounded up, and the middle of it (Open-Sora-Plan). Equal for square clips.
    """
    frames = to_model(clip).permute(0, 3, 1, 2)  # t 3 h w
    height, width = frames.shape[-2:]
    size = [SIDE, SIDE]
    if framing == "crop":
        short = min(height, width)
        size = [-(-side * SIDE // short) for side in (height, width)]
    resized = interpolate(frames, size=size, mode="bilinear", align_corners=False)
    top, left = (size[0] - SIDE) // 2, (size[1] - SIDE) // 2
    return resized[:, :, top : top + SIDE, left : left + SIDE].transpose(0, 1)


def read_i3d(path: Path) -> tuple[I3D, str]:
    """The network with the weights of a file, and the file's SHA-256. WeightsError says what is wrong."""
    if not path.is_file():
        raise WeightsError(f"{path}: no such file; I3D is a file of weights such as rgb_imagenet.pt")
    tensors = _table(path)
    with torch.device("meta"):
        network = I3D()
    needed = {name: t for name, t in network.state_dict().items() if not name.endswith(COUNTER)}
    wrong = [name for name, t in needed.items() if name not in tensors or tensors[name].shape != t.shape]
    if wrong:
        raise WeightsError(
            f"{path}: not I3D for Kinetics-400: {len(wrong)} of {len(needed)} weights are missing or have "
            f"another shape: {wrong[0]} ..."
        )
    taken = {name: tensors[name].float() for name in needed}
    broken = [name for name, t in taken.items() if not bool(torch.isfinite(t).all())]
    if broken:
        raise WeightsError(f"{path}: {broken[0]} has values that are not finite")
    counters = {
        name: torch.zeros((), dtype=torch.int64) for name in network.state_dict() if name not in needed
    }
    network.load_state_dict(taken | counters, strict=True, assign=True)
    return network.requires_grad_(False), sha256(path)


def _table(path: Path) -> Mapping[str, Tensor]:
    """Tensors by name, of a safetensors file or a torch file of nothing else. Nothing of the file runs."""
    with path.open("rb") as file:
        head = file.read(64)
    if is_safetensors(head):
        return read_safetensors(path)
    if _is_program(path):
        raise WeightsError(
            f"{path}: a TorchScript file is a program, and none is run here; give a table of the weights of "
            "I3D for Kinetics-400, such as rgb_imagenet.pt or the same as safetensors"
        )
    found, _ = read_torch(path)
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def _is_program(path: Path) -> bool:
    """Whether a file is an archive of TorchScript."""
    if not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return any("/code/" in name or name.endswith("/constants.pkl") for name in archive.namelist())
    except zipfile.BadZipFile:
        return False  # the reader of torch files says what is wrong with it
