"""Networks that judge frames, for tests: LPIPS with made-up weights, EfficientNet-Lite0 with real ones."""

from pathlib import Path

import torch
from media import BUNDLED
from torch import Tensor

from causalvae.critics.lpips import LPIPS, LpipsBackbone
from causalvae.data.decode import read_frames
from causalvae.perceptual import Perceptual, Shelf, build_perceptual
from causalvae.rng import key, normal
from causalvae.video import to_model

BACKBONES: tuple[LpipsBackbone, ...] = ("vgg", "alex", "squeeze")
SIZE = (32, 36)


def weights_of(backbone: LpipsBackbone) -> dict[str, Tensor]:
    """Weights with the published names and shapes, that keep the size of what goes through them."""
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in LPIPS(backbone).state_dict().items()}
    made: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        noise = normal(shape, key("test", name))
        inputs = max(1, shape[1:].numel())
        scale = 0.1 if name.endswith("bias") else 1.0 if name.startswith("lin") else (2 / inputs) ** 0.5
        made[name] = noise.abs() if name.startswith("lin") else noise * scale
    return made


def write_files(folder: Path, backbone: LpipsBackbone, *, zipped: bool = True) -> tuple[Path, Path]:
    """The two files, with a classifier in the first as published."""
    weights = weights_of(backbone)
    lin = {name: t for name, t in weights.items() if name.startswith("lin")}
    trunk = {name: t for name, t in weights.items() if name not in lin} | {"classifier.6.bias": torch.ones(9)}
    folder.mkdir(exist_ok=True, parents=True)
    paths = folder / "first.pth", folder / "second.pth"
    for path, tensors in zip(paths, (trunk, lin), strict=True):
        torch.save(tensors, path, _use_new_zipfile_serialization=zipped)
    return paths


def network_of(backbone: LpipsBackbone, dtype: torch.dtype = torch.float64) -> LPIPS:
    network = LPIPS(backbone).to(dtype)
    network.load_state_dict(weights_of(backbone))
    return network


def frames(n: int, *, size: tuple[int, int] = SIZE, seed: int = 0) -> Tensor:
    return 0.5 * normal((n, 3, *size), key("frames", seed)).double()


def film(name: str = "city_spire.mp4", *, numbers: range, size: int) -> Tensor:
    """The middle of some frames of a real film: n 3 size size in [-1, 1]."""
    pixels = read_frames(BUNDLED / name, numbers).permute(0, 3, 1, 2)
    top, left = (pixels.shape[2] - size) // 2, (pixels.shape[3] - size) // 2
    return to_model(pixels[:, :, top : top + size, left : left + size])


def efficientnet() -> Perceptual:
    """The installed ImageNet network."""
    made, warnings = build_perceptual("efficientnet-lite0", size=SIZE, shelf=Shelf(home=Path("nowhere")))
    assert made is not None
    assert warnings == []
    return made
