"""WF-VAE: a network on the wavelet bands of a clip, past which the low bands flow on both sides.

Names are those of the published files, with LayerNorm over channels, so that it streams.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from causalvae.models.base import Posterior
from causalvae.models.chains import run_in_order
from causalvae.models.fused import chain
from causalvae.models.layers import (
    CausalConv3d,
    FrameAttention,
    FrameConv,
    FrameDownsample,
    LayerNorm,
    ResnetBlock,
    keeps_nothing,
    norm_conv,
)
from causalvae.models.presets import WFVAEConfig
from causalvae.models.resampling import CausalDownsample, CausalUpsample, FrameUpsample
from causalvae.models.stages import Stage, row, stage
from causalvae.models.stream import ClipStream, Stream
from causalvae.models.wavelet import Haar, InverseHaar

COLOURS = 3
BANDS_OF_TIME, BANDS_OF_SPACE = 8 * COLOURS, 4 * COLOURS  # channels after a wavelet of three and of two axes


class Bands(NamedTuple):
    """What flows past the network: level1, b 12 t' h/4 w/4; level2, b 24 t'' h/8 w/8."""

    level1: Tensor
    level2: Tensor


class Encoder(nn.Module):
    """Pixels to the moments of the posterior. recompute: see `set_recompute`."""

    def __init__(self, config: WFVAEConfig) -> None:
        super().__init__()
        self.recompute = False
        b, e, count = config.base_channels, config.encoder_energy, config.encoder_res_blocks
        self.wavelet_transform_in = Haar(frames=True)
        self.wavelet_transform_l1 = Haar(frames=False)
        self.wavelet_transform_l2 = Haar(frames=True)
        self.connect_l1 = _frame3x3(BANDS_OF_SPACE, e)
        self.connect_l2 = _frame3x3(BANDS_OF_TIME, e)
        flat = [_block(b, b, flat=True) for _ in range(count)]
        self.down1 = nn.ModuleList([_frame3x3(BANDS_OF_TIME, b), *flat, FrameDownsample(b)])
        blocks = [_block(2 * b, 2 * b) for _ in range(count)]
        down = CausalDownsample(2 * b, temporal=True)
        self.down2 = nn.ModuleList([_frame3x3(b + e, 2 * b), *blocks, down])
        self.mid = _middle(2 * b + e, 4 * b, 4 * b, attention=config.attention)
        self.norm_out = LayerNorm(4 * b)
        self.conv_out = CausalConv3d(4 * b, 2 * config.z_channels)

    def forward(self, x: Tensor, stream: Stream | None) -> tuple[Tensor, Bands]:
        """b 3 t h w -> moments b 2c k h/8 w/8, and the bands that flowed past."""
        h, level1 = self._to_quarter(x, stream)
        h, level2 = self._to_eighth(h, level1, stream)
        return self._to_moments(h, stream), Bands(level1, level2)

    def stages(self) -> list[Stage]:
        """What makes the moments, cut after each halving of space from the bands on."""
        pixels, low1, low2 = (
            self.wavelet_transform_in,
            self.wavelet_transform_l1,
            self.wavelet_transform_l2,
        )
        return [
            stage(
                lambda x, s: self._to_quarter(x[0], s), [pixels, *self.down1], [pixels, low1, self.connect_l1]
            ),
            stage(lambda x, s: self._to_eighth(x[0], x[1], s)[:1], [*self.down2], [low2, self.connect_l2]),
            row(self._to_moments, [*self.mid, self.conv_out]),
        ]

    def _to_quarter(self, x: Tensor, stream: Stream | None) -> tuple[Tensor, Tensor]:
        """Pixels -> features b c t' h/4 w/4, and the bands of level 1."""
        bands = self.wavelet_transform_in(x, stream)
        level1 = self.wavelet_transform_l1(bands[:, :COLOURS], stream)
        h = self._run(self.down1, bands, stream)
        return torch.cat([h, self.connect_l1(level1, stream)], dim=1), level1

    def _to_eighth(self, h: Tensor, level1: Tensor, stream: Stream | None) -> tuple[Tensor, Tensor]:
        """The same with half of everything, and the bands of level 2."""
        level2 = self.wavelet_transform_l2(level1[:, :COLOURS], stream)
        h = self._run(self.down2, h, stream)
        return torch.cat([h, self.connect_l2(level2, stream)], dim=1), level2

    def _to_moments(self, h: Tensor, stream: Stream | None) -> Tensor:
        h = self._run(self.mid, h, stream)
        if keeps_nothing(stream):
            return self.conv_out(self.norm_out.activated(h), stream)
        return chain(h, norm_conv(self.norm_out, self.conv_out))

    def _run(self, modules: nn.ModuleList, x: Tensor, stream: Stream | None) -> Tensor:
        return run_in_order(modules, x, stream=stream, recompute=self.recompute)


class Decoder(nn.Module):
    """Latents to pixels. recompute: see `set_recompute`."""

    def __init__(self, config: WFVAEConfig) -> None:
        super().__init__()
        self.recompute = False
        b, count = config.base_channels, config.decoder_res_blocks
        self.energy = e = config.decoder_energy
        self.conv_in = CausalConv3d(config.z_channels, 4 * b)
        self.mid = _middle(4 * b, 4 * b, 4 * b + e, attention=config.attention)
        blocks = [_block(4 * b, 4 * b) for _ in range(count)]
        self.up2 = nn.ModuleList([*blocks, CausalUpsample(4 * b), _block(4 * b, 4 * b + e)])
        blocks = [_block(4 * b if i == 0 else 2 * b, 2 * b) for i in range(count)]
        self.up1 = nn.ModuleList([*blocks, FrameUpsample(2 * b), _block(2 * b, 2 * b)])
        self.layer = nn.ModuleList([_block(2 * b, b), _block(b, b)])
        ends = [_block(e, e) for _ in range(config.connect_res_blocks)]
        self.connect_l1 = nn.ModuleList([*ends, _frame3x3(e, BANDS_OF_SPACE)])
        ends = [_block(e, e) for _ in range(config.connect_res_blocks)]
        self.connect_l2 = nn.ModuleList([*ends, _frame3x3(e, BANDS_OF_TIME)])
        self.norm_out = LayerNorm(b)
        self.conv_out = _frame3x3(b, BANDS_OF_TIME)
        self.inverse_wavelet_transform_out = InverseHaar(frames=True)
        self.inverse_wavelet_transform_l1 = InverseHaar(frames=False)
        self.inverse_wavelet_transform_l2 = InverseHaar(frames=True)

    def forward(self, z: Tensor, stream: Stream | None) -> tuple[Tensor, Bands]:
        """b c k h w -> pixels b 3 t 8h 8w, and the bands that flow past."""
        h, level1, level2 = self._to_quarter(self._from_latent(z, stream), stream)
        return self._to_pixels(h, level1, stream), Bands(level1, level2)

    def stages(self) -> list[Stage]:
        """What makes the pixels, cut before each doubling of space up to that of the bands."""
        low2, low1, pixels = (
            self.inverse_wavelet_transform_l2,
            self.inverse_wavelet_transform_l1,
            self.inverse_wavelet_transform_out,
        )
        network = [*self.up1, *self.layer, self.conv_out]
        return [
            row(self._from_latent, [self.conv_in, *self.mid]),
            stage(
                lambda x, s: self._to_quarter(x[0], s)[:2],
                [*self.up2, *self.connect_l1],
                [*self.connect_l2, low2],
            ),
            stage(lambda x, s: (self._to_pixels(x[0], x[1], s),), [*network, pixels], [low1, pixels]),
        ]

    def _from_latent(self, z: Tensor, stream: Stream | None) -> Tensor:
        return self._run(self.mid, self.conv_in(z, stream), stream)

    def _to_quarter(self, h: Tensor, stream: Stream | None) -> tuple[Tensor, Tensor, Tensor]:
        """Features of the latent's size -> those of twice the size, and the bands of levels 1 and 2."""
        e = self.energy
        level2 = self._run(self.connect_l2, h[:, -e:], stream)
        low2 = self.inverse_wavelet_transform_l2(level2, stream)
        h = self._run(self.up2, h[:, :-e], stream)
        level1 = self._run(self.connect_l1, h[:, -e:], stream)
        # What lies before the upsampler is ahead of it in a stream, which withholds frames.
        low2 = low2 if stream is None else _waiting(self, low2, frames=level1.shape[2], stream=stream)
        return h[:, :-e], _add_low(level1, low2), level2

    def _to_pixels(self, h: Tensor, level1: Tensor, stream: Stream | None) -> Tensor:
        low1 = self.inverse_wavelet_transform_l1(level1, stream)
        h = self._run(self.layer, self._run(self.up1, h, stream), stream)
        # Not in a chain: the gradient of its weight alone is asked for twice in a step.
        bands = self.conv_out(self.norm_out.activated(h), stream)
        return self.inverse_wavelet_transform_out(_add_low(bands, low1), stream)

    def _run(self, modules: nn.ModuleList, x: Tensor, stream: Stream | None) -> Tensor:
        return run_in_order(modules, x, stream=stream, recompute=self.recompute)


def _block(c_in: int, c_out: int, *, flat: bool = False) -> ResnetBlock:
    return ResnetBlock(c_in, c_out, norm="layer", flat=flat)


def _frame3x3(c_in: int, c_out: int) -> FrameConv:
    return FrameConv(c_in, c_out, kernel=3, padding=1)


def _middle(c_in: int, c: int, c_out: int, *, attention: bool) -> nn.ModuleList:
    between = [FrameAttention(c, norm="layer")] if attention else []
    return nn.ModuleList([_block(c_in, c), *between, _block(c, c_out)])


def _add_low(bands: Tensor, low: Tensor) -> Tensor:
    """bands: b n t h w, to whose lowest three channels low, b 3 t h w, is added."""
    return torch.cat([bands[:, :COLOURS] + low, bands[:, COLOURS:].to(low.dtype)], dim=1)


def _waiting(owner: nn.Module, x: Tensor, *, frames: int, stream: Stream) -> Tensor:
    """The first frames of x, b c t h w, and of what waits from the chunks before; the others wait."""
    past = stream.take(owner)
    joined = x if past is None else torch.cat([past, x], dim=2)
    stream.keep(owner, joined[:, :, frames:])
    return joined[:, :, :frames]


class WFVAE(nn.Module):
    """WF-VAE: encode, decode, and both with the reparameterised sample between them."""

    def __init__(self, config: WFVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.geometry = config.geometry
        self.why_not_streamable = config.why_not_streamable
        self.streamable = not self.why_not_streamable
        self.why_tiles_blend = config.why_tiles_blend
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    @property
    def last_layer(self) -> nn.Module:
        """The convolution that makes the bands of the pixels."""
        return self.decoder.conv_out

    def encode(self, x: Tensor, stream: Stream | None = None) -> Posterior:
        """x: b 3 t h w in [-1, 1], t = 1 + 4 n, h and w multiples of 8."""
        return self.encode_bands(x, stream)[0]

    def decode(self, z: Tensor, stream: Stream | None = None) -> Tensor:
        """z: b c k h w -> b 3 t h w, about [-1, 1], unclamped."""
        return self.decode_bands(z, stream)[0]

    def encode_bands(self, x: Tensor, stream: Stream | None = None) -> tuple[Posterior, Bands]:
        """What `encode` gives, and the bands: the published training pulls the decoder's towards them."""
        moments, bands = self.encoder(x, stream)
        return Posterior.of_moments(moments), bands

    def decode_bands(self, z: Tensor, stream: Stream | None = None) -> tuple[Tensor, Bands]:
        """What `decode` gives, and the bands that the decoder made on the way."""
        return self.decoder(z, stream)

    def encode_stages(self) -> list[Stage]:
        """What `encode` does up to the moments of the posterior, b 2c k h w."""
        return self.encoder.stages()

    def decode_stages(self) -> list[Stage]:
        """What `decode` does."""
        return self.decoder.stages()

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
