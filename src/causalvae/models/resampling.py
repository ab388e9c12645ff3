"""Layers that change the resolution, as Open-Sora-Plan's v1.0 and v1.2 and WF-VAE have them.

Those of v1.1 are in models/layers.py. All of them take b c t h w and a `stream`.
"""

from torch import Tensor, nn

from causalvae.models.fused import LiftStep, Link, chain
from causalvae.models.interpolation import doubled, halved, widened
from causalvae.models.layers import CausalConv3d, FrameConv, keeps_nothing, stretched
from causalvae.models.stream import Stream, causal_window


class CausalDownsample(nn.Module):
    """Half of height and width, and of time if temporal: a strided causal convolution.

    Zeros stand at the right and at the bottom.
    """

    def __init__(self, channels: int, *, temporal: bool) -> None:
        super().__init__()
        n = 2 if temporal else 1
        self.conv = CausalConv3d(
            channels, channels, kernel=(2 * n - 1, 3, 3), stride=(n, 2, 2), corner=1
        )  # three frames or one

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        """b c t h w -> b c t' h/2 w/2, with t' = 1 + (t - 1) / 2 if temporal."""
        return self.conv(x, stream) if keeps_nothing(stream) else chain(x, self.link())

    def link(self) -> Link:
        """This layer as a step of a chain."""
        return self.conv.link()


class FrameUpsample(nn.Module):
    """Twice the height and width: nearest, then a convolution with the parameters of a 2D one."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = FrameConv(channels, channels, kernel=3, padding=1)

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:  # noqa: ARG002  as every layer
        """b c t h w -> b c t 2h 2w."""
        return chain(x, self.link())

    def link(self) -> Link:
        """This layer as a step of a chain."""
        return self.conv.link(upsample=True)


class CausalUpsample(nn.Module):
    """Twice the frames after the first, height and width: linear, then a causal convolution.

    It looks one frame ahead, so in a stream it withholds its last output as TimeUpsample does.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, channels)

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        """b c t h w -> b c t' 2h 2w with t' = 1 + 2 (t - 1)."""
        if stream is None:
            return chain(x, self.link())
        return self.conv(widened(stretched(self, x, stream)), stream)

    def link(self) -> Link:
        """This layer as a step of a chain."""
        conv, weights = self.conv.link()
        return LiftStep(conv), weights


class TimePool(nn.Module):
    """Half of the frames: the mean of three, without parameters."""

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        """b c t h w -> b c t' h w with t' = 1 + (t - 1) / 2."""
        return halved(causal_window(self, x, kernel=3, stride=2, stream=stream))


class TimeStretch(nn.Module):
    """Twice the frames after the first, linear between them, without parameters; looks one frame ahead."""

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        """b c t h w -> b c t' h w with t' = 1 + 2 (t - 1)."""
        return doubled(x) if stream is None else stretched(self, x, stream)
