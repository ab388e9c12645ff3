"""EfficientNet-Lite0 up to its last block, as a source of features: a small ImageNet network (Apache-2.0).

Tan and Le, EfficientNet (2019), in the variant for phones: no squeeze-and-excitation, ReLU6. Names of weights
are those of the PyTorch port, `_blocks.N._depthwise_conv.weight` and so on, so its file loads as it is; the
classifier is left out.
"""

from math import ceil

import torch
from torch import Tensor, nn
from torch.nn import functional

# kernel, stride, expansion, channels in, channels out, how often
BLOCKS = (
    (3, 1, 1, 32, 16, 1),
    (3, 2, 6, 16, 24, 2),
    (5, 2, 6, 24, 40, 2),
    (3, 2, 6, 40, 80, 3),
    (5, 1, 6, 80, 112, 3),
    (5, 2, 6, 112, 192, 4),
    (3, 1, 6, 192, 320, 1),
)
STAGES = (2, 4, 10, 15)  # blocks whose output is a stage: the last ones at strides 4, 8, 16 and 32
EPS = 1e-3  # of the norms, as trained


class EfficientNetLite0(nn.Module):
    """n 3 h w in [-1, 1], the range it was trained on, -> features of four stages, strides 4, 8, 16, 32."""

    smallest_side = 32  # one position in the last stage

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = SameConv2d(3, 32, 3, stride=2)
        self._bn0 = nn.BatchNorm2d(32, eps=EPS)
        blocks: list[nn.Module] = []
        for kernel, stride, expansion, channels, width, times in BLOCKS:
            for i in range(times):
                first = i == 0
                block = Block(
                    channels if first else width,
                    width,
                    kernel=kernel,
                    stride=stride if first else 1,
                    expansion=expansion,
                )
                blocks.append(block)
        self._blocks = nn.ModuleList(blocks)
        self.requires_grad_(False).eval()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """x: n 3 h w in [-1, 1] -> feature maps n c h' w' of 24, 40, 112 and 320 channels."""
        h = functional.relu6(self._bn0(self._conv_stem(x)))
        found: list[Tensor] = []
        for i, block in enumerate(self._blocks):
            h = block(h)
            if i in STAGES:
                found.append(h)
        return tuple(found)


class Block(nn.Module):
    """Inverted bottleneck: more channels, a filter for each, fewer channels; plus its input where it fits."""

    def __init__(self, channels: int, width: int, *, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = channels * expansion
        self.expands = expansion != 1
        self.adds = stride == 1 and channels == width
        if self.expands:
            self._expand_conv = SameConv2d(channels, inner, 1)
            self._bn0 = nn.BatchNorm2d(inner, eps=EPS)
        self._depthwise_conv = SameConv2d(inner, inner, kernel, stride=stride, groups=inner)
        self._bn1 = nn.BatchNorm2d(inner, eps=EPS)
        self._project_conv = SameConv2d(inner, width, 1)
        self._bn2 = nn.BatchNorm2d(width, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        """x: n channels h w -> n width h/stride w/stride, rounded up."""
        h = functional.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        h = functional.relu6(self._bn1(self._depthwise_conv(h)))
        h = self._bn2(self._project_conv(h))
        return x + h if self.adds else h


class SameConv2d(nn.Module):
    """Convolution without bias whose output has ceil(size / stride) positions, padded as by TensorFlow.

    An odd number of zeros has the larger half at the right and at the bottom.
    """

    def __init__(self, channels: int, width: int, kernel: int, *, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, channels // groups, kernel, kernel))
        self.stride, self.groups, self.kernel = stride, groups, kernel

    def forward(self, x: Tensor) -> Tensor:
        """x: n channels h w -> n width h' w'."""
        top, bottom = self.padding(x.shape[-2])
        left, right = self.padding(x.shape[-1])
        if top == bottom and left == right:
            return functional.conv2d(
                x, self.weight, stride=self.stride, padding=(top, left), groups=self.groups
            )
        padded = functional.pad(x, (left, right, top, bottom))
        return functional.conv2d(padded, self.weight, stride=self.stride, groups=self.groups)

    def padding(self, size: int) -> tuple[int, int]:
        """Zeros before and after an axis of this size."""
        missing = max((ceil(size / self.stride) - 1) * self.stride + self.kernel - size, 0)
        return missing // 2, missing - missing // 2
