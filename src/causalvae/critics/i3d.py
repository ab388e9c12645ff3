"""I3D, the network for video whose outputs the Frechet video distance compares.

It takes tensors and loads no files. Names of weights are those of the plain tables of weights that convert
DeepMind's release for PyTorch (`rgb_imagenet.pt`, Kinetics-400): `Conv3d_1a_7x7.conv3d.weight`,
`Mixed_3b.b1a.bn.running_mean`, ...
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool3d, max_pool3d, pad

from causalvae.errors import ConfigError

CLASSES = 400  # of Kinetics
SIDE, LEAST_FRAMES = 224, 9  # fewer frames leave less than the two positions that are averaged
NORM_EPS = 1e-3
Size = tuple[int, int, int]
# channels into a module, then of its branches: 1x1; 1x1, 3x3; 1x1, 3x3; pool, 1x1
MIXED: dict[str, tuple[int, tuple[int, int, int, int, int, int]]] = {
    "Mixed_3b": (192, (64, 96, 128, 16, 32, 32)),
    "Mixed_3c": (256, (128, 128, 192, 32, 96, 64)),
    "Mixed_4b": (480, (192, 96, 208, 16, 48, 64)),
    "Mixed_4c": (512, (160, 112, 224, 24, 64, 64)),
    "Mixed_4d": (512, (128, 128, 256, 24, 64, 64)),
    "Mixed_4e": (512, (112, 144, 288, 32, 64, 64)),
    "Mixed_4f": (528, (256, 160, 320, 32, 128, 128)),
    "Mixed_5b": (832, (256, 160, 320, 32, 128, 128)),
    "Mixed_5c": (832, (384, 192, 384, 48, 128, 128)),
}
# kernel and stride of the pooling before a layer
POOLS: dict[str, tuple[Size, Size]] = {
    "Conv3d_2b_1x1": ((1, 3, 3), (1, 2, 2)),
    "Mixed_3b": ((1, 3, 3), (1, 2, 2)),
    "Mixed_4b": ((3, 3, 3), (2, 2, 2)),
    "Mixed_5b": ((2, 2, 2), (2, 2, 2)),
}


class I3D(nn.Module):
    """Carreira and Zisserman, Quo Vadis, Action Recognition? (2017), for RGB. Frozen, in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = {
            "Conv3d_1a_7x7": Unit(3, 64, kernel=(7, 7, 7), stride=(2, 2, 2)),
            "Conv3d_2b_1x1": Unit(64, 64),
            "Conv3d_2c_3x3": Unit(64, 192, kernel=(3, 3, 3)),
            **{name: Mixed(channels, branches) for name, (channels, branches) in MIXED.items()},
        }
        for name, layer in self.layers.items():
            self.add_module(name, layer)
        self.logits = nn.ModuleDict({"conv3d": nn.Conv3d(1024, CLASSES, 1)})
        self.requires_grad_(False).eval()

    def forward(self, clips: Tensor) -> Tensor:
        """clips: b 3 t 224 224 in [-1, 1], t >= 9 -> logits b 400, before softmax, mean over time."""
        frames, height, width = clips.shape[2:]
        if frames < LEAST_FRAMES or (height, width) != (SIDE, SIDE):
            raise ConfigError(
                f"clips of {frames} frames of {height}x{width} can't be judged by I3D, which needs "
                f"{LEAST_FRAMES} frames or more of {SIDE}x{SIDE}"
            )
        h = clips
        for name, layer in self.layers.items():
            if name in POOLS:
                h = pooled(h, kernel=POOLS[name][0], stride=POOLS[name][1])
            h = layer(h)
        h = avg_pool3d(h, (2, SIDE // 32, SIDE // 32), stride=1)  # b 1024 t' 1 1
        return self.logits["conv3d"](h).mean(dim=(2, 3, 4))


class Unit(nn.Module):
    """Convolution without bias, batch norm by its running statistics, ReLU."""

    def __init__(
        self, channels: int, out_channels: int, *, kernel: Size = (1, 1, 1), stride: Size = (1, 1, 1)
    ) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride
        self.conv3d = nn.Conv3d(channels, out_channels, kernel, stride=stride, bias=False)
        self.bn = nn.BatchNorm3d(out_channels, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """b c t h w -> b c' t' h' w', sizes divided by the stride and rounded up."""
        padded = pad(x, same_padding(x.shape[2:], kernel=self.kernel, stride=self.stride))
        return torch.relu(self.bn(self.conv3d(padded)))


class Mixed(nn.Module):
    """Four branches side by side, joined along channels."""

    def __init__(self, channels: int, branches: tuple[int, int, int, int, int, int]) -> None:
        super().__init__()
        one, two_in, two, three_in, three, four = branches
        self.b0 = Unit(channels, one)
        self.b1a, self.b1b = Unit(channels, two_in), Unit(two_in, two, kernel=(3, 3, 3))
        self.b2a, self.b2b = Unit(channels, three_in), Unit(three_in, three, kernel=(3, 3, 3))
        self.b3b = Unit(channels, four)

    def forward(self, x: Tensor) -> Tensor:
        """b c t h w -> b c' t h w."""
        near = pooled(x, kernel=(3, 3, 3), stride=(1, 1, 1))
        return torch.cat([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(near)], dim=1)


def pooled(x: Tensor, *, kernel: Size, stride: Size) -> Tensor:
    """Largest values, b c t h w. Zeros around it change nothing: x comes from a ReLU."""
    return max_pool3d(pad(x, same_padding(x.shape[2:], kernel=kernel, stride=stride)), kernel, stride)


def same_padding(sizes: Sequence[int], *, kernel: Size, stride: Size) -> list[int]:
    """TensorFlow's SAME for sizes t h w, in the order of `pad`: the larger half stands at the end."""
    found: list[int] = []
    for size, k, s in zip(reversed(sizes), reversed(kernel), reversed(stride), strict=True):
        total = max(0, k - (size % s or s))
        found += [total // 2, total - total // 2]
    return found
