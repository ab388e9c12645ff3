"""Settings of models, without torch: what a network is made of, and the presets that have a name."""

from dataclasses import dataclass, replace
from typing import Literal

from causalvae.geometry import Geometry

Norm = Literal["channel", "frame", "clip"]
Resampling = Literal["conv", "shuffle"]


@dataclass(frozen=True, kw_only=True)
class CausalVAEConfig:
    """A causal convolutional video VAE; level 0 is the full resolution on both sides.

    hidden_size: channels at level 0, times hidden_size_mult[i] at level i.
    spatial_levels, temporal_levels: the levels after which space and time are halved.
    norm: what one statistic covers. `channel`: the channels of one position (streams and tiles exactly);
    `frame`: a group of channels over one frame (streams); `clip`: over time too (neither), as the published
    models.
    resampling: `conv` as the published models, or `shuffle`, space-to-depth with a linear path.
    stem: space-to-depth factor of the pixels before the first level, 1 for none.
    """

    hidden_size: int = 128
    hidden_size_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    z_channels: int = 4
    spatial_levels: tuple[int, ...] = (0, 1, 2)
    temporal_levels: tuple[int, ...] = (1, 2)
    norm: Norm = "frame"
    resampling: Resampling = "conv"
    stem: int = 1
    attention: bool = True

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels at each level."""
        return tuple(self.hidden_size * mult for mult in self.hidden_size_mult)

    @property
    def geometry(self) -> Geometry:
        """Downsample factors and latent channels that follow from the levels."""
        spatial = self.stem * 2 ** len(self.spatial_levels)
        return Geometry(temporal=2 ** len(self.temporal_levels), spatial=spatial, channels=self.z_channels)


# Space-to-depth at every level, norms at each position: streams and tiles exactly.
SWIFT = CausalVAEConfig(
    hidden_size=96,
    hidden_size_mult=(1, 2, 4),
    num_res_blocks=3,
    z_channels=16,
    spatial_levels=(0, 1),
    temporal_levels=(0, 1),
    norm="channel",
    resampling="shuffle",
    stem=2,
    attention=False,
)

PRESETS: dict[str, CausalVAEConfig] = {
    "causalvae-488": CausalVAEConfig(),
    "causalvae-488-16ch": CausalVAEConfig(z_channels=16),
    "swift-488": SWIFT,
    "small": replace(SWIFT, hidden_size=48, num_res_blocks=2),
    "tiny": replace(SWIFT, hidden_size=32, num_res_blocks=1),
}
