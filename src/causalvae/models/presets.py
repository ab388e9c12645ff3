"""Settings of models, without torch: what a network is made of, and the presets that have a name."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args, get_origin

from causalvae.errors import ConfigError
from causalvae.geometry import Geometry

Norm = Literal["channel", "frame", "clip"]
Resampling = Literal["conv", "shuffle"]
Temporal = Literal["mix", "pool", "joint"]

CLIP_NORM = "its GroupNorm takes statistics over all frames of a clip, so no part of it can be computed alone"
FRAME_NORM = "its GroupNorm takes statistics over a whole frame, so no part of one can be computed alone"
CLIP_ATTENTION = "its attention mixes all frames of a clip, so no part of it can be computed alone"
GROUPS = 32  # of GroupNorm, as published
# Far beyond any model, and small enough that shapes of such a network can be listed.
MOST_CHANNELS, MOST_BLOCKS, MOST_LEVELS = 16384, 16, 8


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

    For `conv` only, what the published models differ in (the defaults are those of v1.1):
    temporal: how time is halved and doubled. `mix`: by a mean and by interpolation, each mixed with a
    convolution; `pool`: by these alone; `joint`: by one layer for time and space.
    temporal_ups: the decoder's levels after which time is doubled; None for each temporal level + 1.
    flat_conv_in, flat_levels, flat_downsample: whether the encoder's first convolution, how many of its first
    levels, and whether its downsampling convolutions work frame by frame, with the parameters of 2D ones.
    mixing_attention: attention as v1.0 has it, over values of several frames that a view puts together.
    quant: convolutions of each position next to the latent. embed_dim: channels of the latent, where these
    convolutions change them; None for z_channels.
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
    temporal: Temporal = "mix"
    temporal_ups: tuple[int, ...] | None = None
    flat_conv_in: bool = True
    flat_levels: int = 2
    flat_downsample: bool = True
    mixing_attention: bool = False
    quant: bool = True
    embed_dim: int | None = None

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels at each level."""
        return tuple(self.hidden_size * mult for mult in self.hidden_size_mult)

    @property
    def latent_channels(self) -> int:
        """Channels of the latent."""
        return self.z_channels if self.embed_dim is None else self.embed_dim

    @property
    def decoder_temporal_levels(self) -> tuple[int, ...]:
        """The decoder's levels after which time is doubled."""
        ups = self.temporal_ups
        return tuple(level + 1 for level in self.temporal_levels) if ups is None else ups

    @property
    def geometry(self) -> Geometry:
        """Downsample factors and latent channels that follow from the levels."""
        spatial = self.stem * 2 ** len(self.spatial_levels)
        return Geometry(
            temporal=2 ** len(self.temporal_levels), spatial=spatial, channels=self.latent_channels
        )

    @property
    def why_not_streamable(self) -> str:
        """Why no part of a clip can be computed alone; empty if it can."""
        if self.norm == "clip":
            return CLIP_NORM
        return CLIP_ATTENTION if self.attention and self.mixing_attention else ""

    @property
    def why_tiles_blend(self) -> str:
        """Why tiles of a frame can only be blended; empty if they give what the whole frame gives.

        Attention is no reason: it works at the size of the latent, where frames stay whole.
        """
        return FRAME_NORM if self.norm == "frame" else self.why_not_streamable


@dataclass(frozen=True, kw_only=True)
class WFVAEConfig:
    """WF-VAE: wavelets take the clip apart, and their low bands flow past the network on both sides.

    base_channels: channels at half resolution, times 2 and 4 below. *_energy: channels of the flow.
    *_res_blocks: residual blocks of each of its levels, and of each end of the flow in the decoder.
    """

    base_channels: int = 128
    z_channels: int = 8
    encoder_energy: int = 128
    decoder_energy: int = 128
    encoder_res_blocks: int = 2
    decoder_res_blocks: int = 2
    connect_res_blocks: int = 1
    attention: bool = True

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels at each level."""
        return tuple(self.base_channels * mult for mult in (1, 2, 4))

    @property
    def geometry(self) -> Geometry:
        """Downsample factors, which are the same for all, and latent channels."""
        return Geometry(temporal=4, spatial=8, channels=self.z_channels)

    @property
    def why_not_streamable(self) -> str:
        """Empty: all of its layers look back, or one frame ahead."""
        return ""

    @property
    def why_tiles_blend(self) -> str:
        """Empty: its norms are of each position, and its attention works at the size of the latent."""
        return ""


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


OwnConfig = CausalVAEConfig | WFVAEConfig
ModelConfig = OwnConfig | DiffusersConfig

CONFIGS: dict[str, type[OwnConfig]] = {"CausalVAEConfig": CausalVAEConfig, "WFVAEConfig": WFVAEConfig}


def config_from_dict(kind: str, values: Mapping[str, Any]) -> OwnConfig:  # Any: JSON
    """The config that a file's header says, with defaults for what it leaves out.

    kind: name of the class. ConfigError for an unknown kind or field, a value of another type, and for what
    no network can be made of.
    """
    if kind not in CONFIGS:
        raise ConfigError(f"{kind!r} is no kind of model that is known here: {', '.join(CONFIGS)}")
    types = {field.name: field.type for field in fields(CONFIGS[kind])}
    unknown = [name for name in values if name not in types]
    if unknown:
        raise ConfigError(f"{kind} has no field {', '.join(map(repr, unknown[:3]))}; a newer version may")
    taken = {name: _of_type(types[name], value, name=name) for name, value in values.items()}
    config = CONFIGS[kind](**taken)
    check(config)
    return config


def _of_type(wanted: Any, value: object, *, name: str) -> Any:  # Any: a type and a value of it
    """The value if it has the type of the field; a list for a tuple."""
    if get_origin(wanted) is Literal:
        fits = isinstance(value, str) and value in get_args(wanted)
    elif wanted in (int, bool):
        fits = type(value) is wanted
    elif value is None:
        fits = type(None) in get_args(wanted)
    elif get_origin(wanted) is tuple or wanted == tuple[int, ...] | None:
        fits = isinstance(value, list | tuple) and all(type(each) is int for each in value)
        value = tuple(value) if isinstance(value, list | tuple) else value
    else:  # int | None
        fits = type(value) is int
    if not fits:
        raise ConfigError(f"{name} of a model can't be {value!r}")
    return value


def check(config: OwnConfig) -> None:
    """ConfigError if no network can be made of this, or none that anybody has memory for."""
    problem = _problem(config)
    if problem is not None:
        raise ConfigError(f"no model can be made of this config: {problem}")


def _problem(config: OwnConfig) -> str | None:
    for field in fields(config):
        value = getattr(config, field.name)
        most = MOST_BLOCKS if field.name.endswith("_blocks") else MOST_CHANNELS
        least = 0 if field.name in ("flat_levels", "num_res_blocks", "connect_res_blocks") else 1
        if type(value) is int and not least <= value <= most:
            return f"{field.name} {value} is not in {least}...{most}"
    if isinstance(config, WFVAEConfig):
        return None
    levels = range(len(config.hidden_size_mult))
    if not 1 <= len(levels) <= MOST_LEVELS:
        return f"it has {len(levels)} levels, not 1...{MOST_LEVELS}"
    if not all(1 <= width <= MOST_CHANNELS for width in config.widths):
        return f"its levels have {config.widths} channels, not 1...{MOST_CHANNELS}"
    return _problem_of_levels(config, levels=levels)


def _problem_of_levels(config: CausalVAEConfig, *, levels: range) -> str | None:
    space, time, ups = config.spatial_levels, config.temporal_levels, config.decoder_temporal_levels
    if not all(level in levels[:-1] for level in (*space, *time)) or not set(ups) <= set(levels[1:]):
        return f"levels {space} of space and {time}, {ups} of time are not all between two levels"
    if any(len(set(each)) < len(each) for each in (space, time, ups)) or len(ups) != len(time):
        return f"levels {space} of space and {time}, {ups} of time: one comes twice, or has no counterpart"
    if config.norm != "channel" and any(width % GROUPS for width in (config.hidden_size, *config.widths)):
        return f"GroupNorm needs multiples of {GROUPS} channels, not {config.hidden_size}, {config.widths}"
    joint = config.resampling == "shuffle" or config.temporal == "joint"
    if joint and not (set(time) <= set(space) and {level - 1 for level in ups} <= set(space)):
        return f"time is halved together with space, so {time} and {ups} have to be levels of space"
    if config.resampling == "shuffle" and config.temporal_ups is not None:
        return "temporal_ups is for `conv` resampling only"
    if config.embed_dim is not None and not (config.quant and config.resampling == "conv"):
        return "embed_dim needs the convolutions of `quant`"
    return None


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
TINY = replace(SWIFT, hidden_size=32, num_res_blocks=1)
V1_0 = CausalVAEConfig(
    norm="clip",
    temporal="pool",
    temporal_levels=(0, 1),
    temporal_ups=(2, 3),
    flat_conv_in=False,
    flat_levels=0,
    flat_downsample=False,
    mixing_attention=True,
)

PRESETS: dict[str, OwnConfig] = {
    "causalvae-488": CausalVAEConfig(),
    "causalvae-488-16ch": CausalVAEConfig(z_channels=16),
    "swift-488": SWIFT,
    "small": replace(SWIFT, hidden_size=48, num_res_blocks=2),
    "tiny": TINY,
    "osp-v1.0": V1_0,  # the levels of its released weights; those of its class are (1, 2)
    "osp-v1.1": CausalVAEConfig(norm="clip"),
    "osp-v1.2": CausalVAEConfig(norm="clip", temporal="joint"),
    "wfvae-4": WFVAEConfig(z_channels=4),
    "wfvae-8": WFVAEConfig(),
    "wfvae-16": WFVAEConfig(base_channels=192, z_channels=16),
}

# Trainable values of each; counting them takes torch.
PARAMETERS = {
    "causalvae-488": 246_859_499,
    "causalvae-488-16ch": 247_358_423,
    "swift-488": 96_616_268,
    "small": 19_072_316,
    "tiny": 6_216_844,
    "osp-v1.0": 229_169_895,
    "osp-v1.1": 246_859_499,
    "osp-v1.2": 239_189_991,
    "wfvae-4": 146_496_708,
    "wfvae-8": 146_662_604,
    "wfvae-16": 317_081_244,
}


def presets_table() -> str:
    """The presets as lines of columns: size, factors, channels, widths, whether they stream."""
    rows = [("preset", "parameters", "t x h x w", "channels", "widths", "streams")]
    for name, config in PRESETS.items():
        geometry, reason = config.geometry, config.why_not_streamable
        factors = f"{geometry.temporal} x {geometry.spatial} x {geometry.spatial}"
        widths = " ".join(str(width) for width in config.widths)
        streams = f"no: {reason}" if reason else "yes"
        size = f"{PARAMETERS[name] / 1e6:.1f} M"
        rows.append((name, size, factors, str(geometry.channels), widths, streams))
    columns = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    padded = ([cell.ljust(columns[i]) for i, cell in enumerate(row)] for row in rows)
    return "".join("  ".join(row).rstrip() + "\n" for row in padded)
