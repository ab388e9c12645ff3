"""PatchGAN critics: networks that judge overlapping patches of frames (2D) or of clips (3D).

The layers sit at the indices of the published networks, so the keys `main.N.*` are theirs and published
weights load as they are (those of WF-VAE, with dropout in between, have other indices). Critics stay in
training mode: BatchNorm uses the statistics of the batch, and the running ones are kept only to be saved.
"""

from math import gcd
from typing import Literal

import torch
from torch import Tensor, nn

from causalvae.errors import ConfigError
from causalvae.models.convolution import Conv
from causalvae.rng import key, normal

CriticNorm = Literal["batch", "group", "none"]

SQUARE, CUBE = (4, 4), (3, 3, 3)  # kernels, as published
SLOPE = 0.2  # of LeakyReLU, as published
INITIAL_STD = 0.02  # of convolution weights, and of BatchNorm weights around 1, as published
WIDEST = 8  # channels grow up to ndf * 8
GROUPS = 32  # of GroupNorm, or fewer where the channels have no such divisor


class PatchGAN2d(nn.Module):
    """Judges each frame by itself: kernel 4, the published image critic. Frames are the batch of BatchNorm.

    ndf: channels of the first layer. n_layers: convolutions that halve the frame.
    """

    def __init__(self, *, ndf: int = 64, n_layers: int = 3, norm: CriticNorm = "batch") -> None:
        super().__init__()
        widths = channel_widths(ndf, n_layers)
        strides = [2] * n_layers + [1]
        layers: list[nn.Module] = [
            Conv(3, ndf, kernel=SQUARE, stride=2, padding=1),
            nn.LeakyReLU(SLOPE, inplace=True),
        ]
        for i in range(1, len(widths)):
            bias = norm == "none"
            layers += [
                Conv(widths[i - 1], widths[i], kernel=SQUARE, stride=strides[i], padding=1, bias=bias),
                nn.BatchNorm2d(widths[i]) if norm == "batch" else other_norm(widths[i], norm),
                nn.LeakyReLU(SLOPE, inplace=True),
            ]
        layers.append(Conv(widths[-1], 1, kernel=SQUARE, padding=1))
        self.main = nn.Sequential(*layers)
        self.smallest_side = 3 * 2**n_layers  # what the two last convolutions leave one position of

    def forward(self, clip: Tensor) -> Tensor:
        """clip: b 3 t h w in [-1, 1] -> logits (b t) 1 h' w', above zero where a patch looks real."""
        height, width = clip.shape[-2:]
        if min(height, width) < self.smallest_side:
            side = self.smallest_side
            message = (
                f"frames of {height}x{width} are too small for the 2D critic, which needs {side}x{side};"
            )
            raise ConfigError(f"{message} use patchgan3d or a larger resolution")
        return self.main(clip.transpose(1, 2).flatten(0, 1))  # b c t h w -> (b t) c h w


class PatchGAN3d(nn.Module):
    """Judges patches of a clip in space and time: kernel 3, the published critic from v1.1 on.

    The first two layers halve t, h and w, the others up to n_layers only h and w. Any clip size will do.
    """

    def __init__(self, *, ndf: int = 64, n_layers: int = 3, norm: CriticNorm = "batch") -> None:
        super().__init__()
        widths = channel_widths(ndf, n_layers)
        strides = [(2, 2, 2)] * 2 + [(1, 2, 2)] * (n_layers - 2) + [(1, 1, 1)]
        layers: list[nn.Module] = [
            Conv(3, ndf, kernel=CUBE, stride=2, padding=1),
            nn.LeakyReLU(SLOPE, inplace=True),
        ]
        for i in range(1, len(widths)):
            bias = norm == "none"
            layers += [
                Conv(widths[i - 1], widths[i], kernel=CUBE, stride=strides[i], padding=1, bias=bias),
                nn.BatchNorm3d(widths[i]) if norm == "batch" else other_norm(widths[i], norm),
                nn.LeakyReLU(SLOPE, inplace=True),
            ]
        layers.append(Conv(widths[-1], 1, kernel=CUBE, padding=1))
        self.main = nn.Sequential(*layers)

    def forward(self, clip: Tensor) -> Tensor:
        """clip: b 3 t h w in [-1, 1] -> logits b 1 t' h' w', above zero where a patch looks real."""
        return self.main(clip)


def channel_widths(ndf: int, n_layers: int) -> list[int]:
    """Channels after each convolution but the last: doubling up to 8 * ndf."""
    return [ndf * min(2**i, WIDEST) for i in range(n_layers + 1)]


def other_norm(channels: int, norm: CriticNorm) -> nn.Module:
    """GroupNorm, which looks at one clip or frame alone, or nothing at the same place in the list of layers.

    The convolution before it has a bias only where nothing follows: a norm has its own.
    """
    if norm == "group":
        return nn.GroupNorm(gcd(GROUPS, channels), channels)
    return nn.Identity()


@torch.no_grad()
def reset(critic: nn.Module, base: int) -> None:
    """Give a critic the initial weights of this key: the same on every machine, whatever was drawn before.

    Convolutions N(0, 0.02) and norm weights N(1, 0.02) as published; biases 0; running statistics as new.
    """
    for name, parameter in critic.named_parameters():
        noise = INITIAL_STD * normal(parameter.shape, key("critic", base, name))
        if name.endswith(".bias"):
            parameter.zero_()
        elif parameter.ndim == 1:
            parameter.copy_(1.0 + noise)
        else:
            parameter.copy_(noise)
    for module in critic.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
            module.reset_running_stats()
