"""How different two frames look, by the features that a network for images has of them.

LPIPS is the published metric: one of three ImageNet networks and weights learned from human judgements.
FeatureDistance is the same arithmetic with any other network and no learned weights; it is another number and
is never called LPIPS. Both take tensors and load no files.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from causalvae.errors import ConfigError

LpipsBackbone = Literal["vgg", "alex", "squeeze"]

SHIFT = (-0.030, -0.088, -0.188)  # of the published metric: ImageNet's mean and deviation in [-1, 1]
SCALE = (0.458, 0.448, 0.450)
LPIPS_EPS = 1e-10  # added to a norm, as published
FEATURE_EPS = 1e-6  # smallest norm that features are divided by: 1e-10 would make gradients of 1e10
# last layer of each stage in torchvision's numbering, and its channels
STAGES: dict[LpipsBackbone, tuple[tuple[int, int], ...]] = {
    "vgg": ((3, 64), (8, 128), (15, 256), (22, 512), (29, 512)),
    "alex": ((1, 64), (4, 192), (7, 384), (9, 256), (11, 256)),
    "squeeze": ((1, 64), (4, 128), (7, 256), (9, 384), (10, 384), (11, 512), (12, 512)),
}
SMALLEST_SIDE: dict[LpipsBackbone, int] = {"vgg": 16, "alex": 31, "squeeze": 17}  # one position in each stage


class LPIPS(nn.Module):
    """Zhang et al., The Unreasonable Effectiveness of Deep Features as a Perceptual Metric (2018), v0.1.

    Weights have the names of the published files: `features.N...` as in torchvision's vgg16, alexnet and
    squeezenet1_1, `linK.model.1.weight` as in the lpips package. They are frozen.
    """

    def __init__(self, backbone: LpipsBackbone) -> None:
        super().__init__()
        self.stages = STAGES[backbone]
        self.smallest_side = SMALLEST_SIDE[backbone]
        self.features = {"vgg": vgg16, "alex": alexnet, "squeeze": squeezenet}[backbone]()
        for i, (_, channels) in enumerate(self.stages):
            self.add_module(f"lin{i}", Lin(channels))
        # by name on the CPU, so that a network made on the meta device has them
        for name, value in (("shift", SHIFT), ("scale", SCALE)):
            constant = torch.tensor(value, device="cpu").view(1, 3, 1, 1)
            self.register_buffer(name, constant, persistent=False)
        self.requires_grad_(False).eval()

    def forward(self, recon: Tensor, clip: Tensor) -> Tensor:
        """recon, clip: n 3 h w in [-1, 1] -> one distance per frame, n 1 1 1; 0 where they are the same.

        Only recon gets a gradient.
        """
        refuse_small(recon, smallest_side=self.smallest_side)
        with torch.no_grad():
            wanted = [unit(h) for h in self.maps(clip)]
        total = recon.new_zeros(len(recon), 1, 1, 1)
        for i, h in enumerate(self.maps(recon)):
            # the published order is weights, then mean over positions: both are linear, this one is cheaper
            distance = (unit(h) - wanted[i]).square().mean(dim=(2, 3), keepdim=True)  # n c 1 1
            total = total + self.get_submodule(f"lin{i}")(distance)
        return total

    def maps(self, x: Tensor) -> list[Tensor]:
        """x: n 3 h w in [-1, 1] -> features after each stage, n c h' w'."""
        h = (x - self.get_buffer("shift")) / self.get_buffer("scale")
        ends, found = {end for end, _ in self.stages}, []
        for i, layer in enumerate(self.features):
            h = layer(h)
            if i in ends:
                found.append(h)
        return found


class FeatureDistance(nn.Module):
    """Mean over stages of the squared distance between features of unit length, by any network for images.

    backbone: n 3 h w in [-1, 1] -> feature maps n c h' w', one per stage, in evaluation mode; it is frozen.
    A stage gives a value in [0, 4], or [0, 2] where no feature is negative.
    """

    def __init__(self, backbone: nn.Module, *, smallest_side: int) -> None:
        super().__init__()
        self.smallest_side = smallest_side
        self.backbone = backbone.requires_grad_(False)
        self.training = False

    def train(self, mode: bool = True) -> "FeatureDistance":  # noqa: ARG002, FBT001, FBT002 - torch's signature
        """Stays in evaluation mode; exported programs refuse to be asked."""
        return self

    def forward(self, recon: Tensor, clip: Tensor) -> Tensor:
        """recon, clip: n 3 h w in [-1, 1] -> one distance per frame, n 1 1 1; 0 where they are the same.

        Only recon gets a gradient.
        """
        refuse_small(recon, smallest_side=self.smallest_side)
        backbone: Callable[[Tensor], Sequence[Tensor]] = self.backbone
        with torch.no_grad():
            wanted = [unit(h, eps=FEATURE_EPS) for h in backbone(clip)]
        found = backbone(recon)
        total = recon.new_zeros(len(recon), 1, 1, 1)
        for h, other in zip(found, wanted, strict=True):
            squared = (unit(h, eps=FEATURE_EPS) - other).square().sum(dim=1, keepdim=True)  # n 1 h' w'
            total = total + squared.mean(dim=(2, 3), keepdim=True)
        return total / len(wanted)


class Lin(nn.Module):
    """The learned weight of each channel of a stage: n c 1 1 -> n 1 1 1. Index 0 was dropout in training."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Identity(), nn.Conv2d(channels, 1, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """x: n c h w -> n 1 h w."""
        return self.model(x)


class Fire(nn.Module):
    """The block of SqueezeNet: fewer channels, then two kernel sizes side by side."""

    def __init__(self, channels: int, *, squeezed: int, expanded: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, squeezed, 1)
        self.expand1x1 = nn.Conv2d(squeezed, expanded, 1)
        self.expand3x3 = nn.Conv2d(squeezed, expanded, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """x: n channels h w -> n (2 expanded) h w."""
        h = torch.relu(self.squeeze(x))
        return torch.relu(torch.cat([self.expand1x1(h), self.expand3x3(h)], dim=1))


def unit(h: Tensor, *, eps: float = LPIPS_EPS) -> Tensor:
    """n c h w with channels of unit length at each position. The gradient is 0 where all channels are 0."""
    return h / (torch.linalg.vector_norm(h, dim=1, keepdim=True) + eps)


def refuse_small(frames: Tensor, *, smallest_side: int) -> None:
    """ConfigError if frames n 3 h w are smaller than the network needs."""
    height, width = frames.shape[-2:]
    if min(height, width) < smallest_side:
        raise ConfigError(
            f"frames of {height}x{width} are too small for the perceptual loss, whose network needs "
            f"{smallest_side}x{smallest_side}; use a larger --resolution, or --perceptual none"
        )


def vgg16() -> nn.Sequential:
    """Layers of torchvision's vgg16().features up to the last stage."""
    layers: list[nn.Module] = []
    channels = 3
    for widths in ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512)):
        if layers:
            layers.append(nn.MaxPool2d(2))
        for width in widths:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
    return nn.Sequential(*layers)


def alexnet() -> nn.Sequential:
    """Layers of torchvision's alexnet().features up to the last stage."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, stride=2),
        nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, stride=2),
        nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(),
    )  # fmt: skip


def squeezenet() -> nn.Sequential:
    """Layers of torchvision's squeezenet1_1().features."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, stride=2), nn.ReLU(), nn.MaxPool2d(3, stride=2, ceil_mode=True),
        Fire(64, squeezed=16, expanded=64), Fire(128, squeezed=16, expanded=64),
        nn.MaxPool2d(3, stride=2, ceil_mode=True),
        Fire(128, squeezed=32, expanded=128), Fire(256, squeezed=32, expanded=128),
        nn.MaxPool2d(3, stride=2, ceil_mode=True),
        Fire(256, squeezed=48, expanded=192), Fire(384, squeezed=48, expanded=192),
        Fire(384, squeezed=64, expanded=256), Fire(512, squeezed=64, expanded=256),
    )  # fmt: skip
