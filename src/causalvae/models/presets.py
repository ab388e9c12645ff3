"""Settings of models, without torch: what a network is made of, and the presets that have a name."""

import json
import math
from dataclasses import dataclass, replace
from typing import Any, Literal

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


@dataclass(frozen=True, kw_only=True)
class DiffusersConfig:
    """A video VAE of the diffusers library.

    class_name: as in diffusers. config_json: every setting of the class by name, with defaults, as JSON with
    sorted keys; `models.diffusers.diffusers_config` makes it.
    """

    class_name: str
    config_json: str

    @property
    def settings(self) -> dict[str, Any]:  # Any: JSON
        """The settings by name."""
        return json.loads(self.config_json)

    @property
    def geometry(self) -> Geometry:
        """Downsample factors and latent channels that follow from the settings."""
        return DIFFUSERS_GEOMETRY[self.class_name](self.settings)


def _wan(settings: dict[str, Any]) -> Geometry:
    spatial = 2 ** (len(settings["dim_mult"]) - 1) * (settings["patch_size"] or 1)
    temporal = 2 ** sum(settings["temperal_downsample"])
    return Geometry(temporal=temporal, spatial=spatial, channels=settings["z_dim"])


def _cogvideox(settings: dict[str, Any]) -> Geometry:
    """It decodes two latent frames at a time, and only an odd number of them has its first frame apart."""
    return Geometry(
        temporal=int(settings["temporal_compression_ratio"]),
        spatial=2 ** (len(settings["block_out_channels"]) - 1),
        channels=settings["latent_channels"],
        group=2,
    )


def _ltx(settings: dict[str, Any]) -> Geometry:
    halvings = 2 ** sum(settings["spatio_temporal_scaling"])
    return Geometry(
        temporal=settings["temporal_compression_ratio"] or settings["patch_size_t"] * halvings,
        spatial=settings["spatial_compression_ratio"] or settings["patch_size"] * halvings,
        channels=settings["latent_channels"],
    )


def _mochi(settings: dict[str, Any]) -> Geometry:
    return Geometry(
        temporal=math.prod(settings["temporal_expansions"]),
        spatial=math.prod(settings["spatial_expansions"]),
        channels=settings["latent_channels"],
    )


def _given(settings: dict[str, Any]) -> Geometry:
    return Geometry(
        temporal=settings["temporal_compression_ratio"],
        spatial=settings["spatial_compression_ratio"],
        channels=settings["latent_channels"],
    )


DIFFUSERS_GEOMETRY = {
    "AutoencoderKLWan": _wan,
    "AutoencoderKLCogVideoX": _cogvideox,
    "AutoencoderKLHunyuanVideo": _given,
    "AutoencoderKLLTXVideo": _ltx,
    "AutoencoderKLMochi": _mochi,
    "AutoencoderKLCosmos": _given,
}
