"""CausalVAE: the published convolutional family and our presets, in one class.

`conv` resampling has the layers and names of Open-Sora-Plan's v1.0, v1.1 and v1.2; `shuffle` has
space-to-depth and back.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from causalvae.models.base import Posterior
from causalvae.models.chains import run_in_order
from causalvae.models.fused import chain
from causalvae.models.layers import (
    CausalConv3d,
    FrameAttention,
    FrameConv,
    FrameDownsample,
    Norm,
    ResnetBlock,
    ShuffleDown,
    ShuffleUp,
    SpatialUpsample,
    TimeDownsample,
    TimeUpsample,
    depth_to_space,
    keeps_nothing,
    norm_conv,
    pointwise,
    space_to_depth,
)
from causalvae.models.presets import CausalVAEConfig
from causalvae.models.resampling import CausalDownsample, CausalUpsample, TimePool, TimeStretch
from causalvae.models.stages import Spread, Stage, Window, row
from causalvae.models.stream import ClipStream, Stream


class Level(nn.Module):
    """Residual blocks at one resolution, and what changes it afterwards. Named as in the published files."""

    def __init__(self, blocks: list[nn.Module], resample: dict[str, nn.Module]) -> None:
        super().__init__()
        self.block = nn.ModuleList(blocks)
        for name, module in resample.items():
            self.add_module(name, module)
        self.order = tuple(resample)

    def forward(self, x: Tensor, stream: Stream | None) -> Tensor:
        """b c t h w -> b c' t' h' w'."""
        for block in self.block:
            x = block(x, stream)
        for name in self.order:
            x = self.get_submodule(name)(x, stream)
        return x


class Middle(nn.Module):
    """Two residual blocks, with attention over each frame between them if the model has it."""

    def __init__(self, channels: int, config: CausalVAEConfig) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, norm=config.norm)
        self.attn_1 = (
            FrameAttention(channels, norm=config.norm, mixing=config.mixing_attention)
            if config.attention
            else None
        )
        self.block_2 = ResnetBlock(channels, channels, norm=config.norm)

    def forward(self, x: Tensor, stream: Stream | None) -> Tensor:
        """b c t h w -> the same shape."""
        x = self.block_1(x, stream)
        if self.attn_1 is not None:
            x = self.attn_1(x, stream)
        return self.block_2(x, stream)


class Encoder(nn.Module):
    """Pixels to the moments of the posterior. recompute: see `set_recompute`."""

    def __init__(self, config: CausalVAEConfig) -> None:
        super().__init__()
        self.recompute = False
        widths = config.widths
        self.stem = (1, config.stem, config.stem)
        published = config.resampling == "conv"
        c_pixels = 3 * config.stem**2
        self.conv_in = (
            FrameConv(c_pixels, widths[0], kernel=3, padding=1)
            if published and config.flat_conv_in
            else CausalConv3d(c_pixels, widths[0])
        )
        self.down = nn.ModuleList()
        c = widths[0]
        for i, width in enumerate(widths):
            flat = published and i < config.flat_levels
            blocks, c = resnet_blocks(c, width, config=config, count=config.num_res_blocks, flat=flat)
            resample, c = _downsample(config, i, c)
            self.down.append(Level(blocks, resample))
        self.mid = Middle(c, config)
        # `shuffle` ends without, to keep its path linear.
        self.norm_out = Norm(c, config.norm) if published else None
        self.conv_out = CausalConv3d(c, 2 * config.z_channels)

    def forward(self, x: Tensor, stream: Stream | None) -> Tensor:
        """b 3 t h w -> b 2c k h/8 w/8."""
        layers = _layers([self.conv_in, *self.down, self.mid])
        h = run_in_order(layers, self._begin(x, stream), stream=stream, recompute=self.recompute)
        return self._end(h, stream)

    def stages(self) -> list[Stage]:
        """The same, cut after each halving of space."""
        groups: list[list[nn.Module]] = [[self.conv_in]]
        for level in self.down:
            groups[-1] += _layers([level])
            if isinstance(level, Level) and "downsample" in level.order:
                groups.append([])
        groups[-1] += _layers([self.mid])
        stages = [_stage(group) for group in groups]
        stages[0] = row(self._begin, [Window(self.stem[1], self.stem[1])]).then(stages[0])
        stages[-1] = stages[-1].then(row(self._end, [self.conv_out]))
        return stages

    def _begin(self, x: Tensor, stream: Stream | None) -> Tensor:  # noqa: ARG002  as every layer
        return x if self.stem[1] == 1 else space_to_depth(x, self.stem)

    def _end(self, h: Tensor, stream: Stream | None) -> Tensor:
        if self.norm_out is None:
            return self.conv_out(h, stream)
        if keeps_nothing(stream):
            return self.conv_out(self.norm_out.activated(h), stream)
        return chain(h, norm_conv(self.norm_out, self.conv_out))


class Decoder(nn.Module):
    """Latents to pixels. Levels are named by their resolution, so the last runs first.

    recompute: see `set_recompute`.
    """

    def __init__(self, config: CausalVAEConfig) -> None:
        super().__init__()
        self.recompute = False
        widths = config.widths
        self.stem = (1, config.stem, config.stem)
        c = widths[-1]
        self.conv_in = CausalConv3d(config.z_channels, c)
        self.mid = Middle(c, config)
        levels: list[Level] = []
        count = config.num_res_blocks + (config.resampling == "conv")
        for i in reversed(range(len(widths))):
            blocks, c = resnet_blocks(c, widths[i], config=config, count=count, flat=False)
            resample, c = _upsample(config, i, c)
            levels.insert(0, Level(blocks, resample))
        self.up = nn.ModuleList(levels)
        self.norm_out = Norm(c, config.norm) if config.resampling == "conv" else None
        self.conv_out = CausalConv3d(c, 3 * config.stem**2)

    def forward(self, z: Tensor, stream: Stream | None) -> Tensor:
        """b c k h w -> b 3 t 8h 8w."""
        layers = _layers([self.mid, *reversed(self.up)])
        h = run_in_order(layers, self.conv_in(z, stream), stream=stream, recompute=self.recompute)
        return self._end(h, stream)

    def stages(self) -> list[Stage]:
        """The same, cut before each doubling of space."""
        groups: list[list[nn.Module]] = [[self.conv_in, *_layers([self.mid])]]
        for level in reversed(self.up):
            assert isinstance(level, Level)
            groups[-1] += level.block
            resample = _layers([level])[len(level.block) :]
            if "upsample" in level.order:
                groups.append([])
            groups[-1] += resample
        stages = [_stage(group) for group in groups]
        stages[-1] = stages[-1].then(row(self._end, [self.conv_out, Spread(self.stem[1])]))
        return stages

    def _end(self, h: Tensor, stream: Stream | None) -> Tensor:
        if self.norm_out is not None:
            h = self.norm_out.activated(h)
        # Not in a chain: the gradient of its weight alone is asked for twice in a step.
        x = self.conv_out(h, stream)
        return x if self.stem[1] == 1 else depth_to_space(x, self.stem)


def _layers(parts: Sequence[nn.Module]) -> list[nn.Module]:
    """The layers of levels and middles, and what is a layer itself, first to last."""
    layers: list[nn.Module] = []
    for part in parts:
        if isinstance(part, Level):
            layers += [*part.block, *(part.get_submodule(name) for name in part.order)]
        elif isinstance(part, Middle):
            layers += [part.block_1, *([] if part.attn_1 is None else [part.attn_1]), part.block_2]
        else:
            layers.append(part)
    return layers


def _stage(layers: Sequence[nn.Module]) -> Stage:
    def run(x: Tensor, stream: Stream | None) -> Tensor:
        return run_in_order(layers, x, stream=stream, recompute=False)

    return row(run, layers)


def resnet_blocks(
    c_in: int, c_out: int, *, config: CausalVAEConfig, count: int, flat: bool
) -> tuple[list[nn.Module], int]:
    """`count` blocks, the first of which changes the channels; and the channels that leave."""
    blocks = [
        ResnetBlock(c_in if i == 0 else c_out, c_out, norm=config.norm, flat=flat) for i in range(count)
    ]
    return list(blocks), c_out


def _downsample(config: CausalVAEConfig, level: int, c: int) -> tuple[dict[str, nn.Module], int]:
    space, time = level in config.spatial_levels, level in config.temporal_levels
    if config.resampling == "shuffle":
        if not space:
            return {}, c
        c_next = config.widths[level + 1]
        return {"downsample": ShuffleDown(c, c_next, temporal=time)}, c_next
    if config.temporal == "joint" and time:
        return {"downsample": CausalDownsample(c, temporal=True)}, c
    modules: dict[str, nn.Module] = {}
    if space:
        flat = config.flat_downsample
        modules["downsample"] = FrameDownsample(c) if flat else CausalDownsample(c, temporal=False)
    if time:
        modules["time_downsample"] = TimePool() if config.temporal == "pool" else TimeDownsample(c)
    return modules, c


def _upsample(config: CausalVAEConfig, level: int, c: int) -> tuple[dict[str, nn.Module], int]:
    # What the encoder did after level i - 1, the decoder undoes after its level i, but for v1.0's time.
    space, time = level - 1 in config.spatial_levels, level in config.decoder_temporal_levels
    if config.resampling == "shuffle":
        if not space:
            return {}, c
        c_next = config.widths[level - 1]
        return {"upsample": ShuffleUp(c, c_next, temporal=time)}, c_next
    if config.temporal == "joint" and time:
        return {"upsample": CausalUpsample(c)}, c
    modules: dict[str, nn.Module] = {"upsample": SpatialUpsample(c)} if space else {}
    if time:
        modules["time_upsample"] = TimeStretch() if config.temporal == "pool" else TimeUpsample(c)
    return modules, c


class CausalVAE(nn.Module):
    """A causal video VAE: encode, decode, and both with the reparameterised sample between them."""

    def __init__(self, config: CausalVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.geometry = config.geometry
        self.why_not_streamable = config.why_not_streamable
        self.streamable = not self.why_not_streamable
        self.why_tiles_blend = config.why_tiles_blend
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        quant = config.resampling == "conv" and config.quant
        c, latent = config.z_channels, config.latent_channels
        self.quant_conv = pointwise(2 * c, 2 * latent, flat=False) if quant else None
        self.post_quant_conv = pointwise(latent, c, flat=False) if quant else None

    @property
    def last_layer(self) -> nn.Module:
        """The convolution that makes pixels."""
        return self.decoder.conv_out.conv

    def encode(self, x: Tensor, stream: Stream | None = None) -> Posterior:
        """x: b 3 t h w in [-1, 1], t = 1 + temporal * n, h and w multiples of the spatial factor."""
        moments = self.encoder(x, stream)
        return Posterior.of_moments(moments if self.quant_conv is None else self.quant_conv(moments))

    def decode(self, z: Tensor, stream: Stream | None = None) -> Tensor:
        """z: b c k h w -> b 3 t h w, about [-1, 1], unclamped."""
        return self.decoder(z if self.post_quant_conv is None else self.post_quant_conv(z), stream)

    def encode_stages(self) -> list[Stage]:
        """What `encode` does up to the moments of the posterior, b 2c k h w."""
        stages = self.encoder.stages()
        if self.quant_conv is not None:
            stages[-1] = stages[-1].then(row(self.quant_conv, [self.quant_conv]))
        return stages

    def decode_stages(self) -> list[Stage]:
        """What `decode` does."""
        stages = self.decoder.stages()
        if self.post_quant_conv is not None:
            stages[0] = row(self.post_quant_conv, [self.post_quant_conv]).then(stages[0])
        return stages

    def forward(self, x: Tensor, noise: Tensor | None) -> tuple[Tensor, Posterior]:
        """Reconstruction and posterior of x. noise: standard normal in the latent's shape.

        None takes the mode.
        """
        posterior = self.encode(x)
        return self.decode(posterior.latent(noise)), posterior

    def stream(self) -> ClipStream:
        """A clip in pieces. ConfigError if the model can't, with the reason."""
        return ClipStream(self, why_not=self.why_not_streamable)

    def set_recompute(self, *, on: bool) -> None:
        """Keep the input of each block, or of a few layers, in training, and run them again in backward.

        The numbers are the same. Blocks run in chains, so that forward hooks and compiled blocks are passed
        by.
        """
        self.encoder.recompute = self.decoder.recompute = on
