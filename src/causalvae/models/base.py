"""What every video VAE here is.

The protocol that trainer, streams and evaluation rely on, and its posterior.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from causalvae.geometry import Geometry
from causalvae.models.presets import ModelConfig
from causalvae.models.stream import ClipStream, Stream
from causalvae.video import at_least_fp32

LOGVAR_RANGE = (-30.0, 20.0)  # as the published weights were trained


@dataclass(frozen=True)
class Posterior:
    """Diagonal Gaussian over latents. mean, logvar: b c k h w; logvar is clamped to [-30, 20].

    certain: the encoder gives the latent itself. A sample is the mean, and there is no divergence to pull it.
    """

    mean: Tensor
    logvar: Tensor
    certain: bool = False

    @staticmethod
    def of_moments(moments: Tensor) -> "Posterior":
        """moments: b 2c k h w, mean and log variance joined along channels; at least fp32 from here on."""
        mean, logvar = at_least_fp32(moments).chunk(2, dim=1)
        return Posterior(mean, logvar.clamp(*LOGVAR_RANGE))

    @staticmethod
    def of_latent(latent: Tensor) -> "Posterior":
        """latent: b c k h w, of an encoder that is certain of it. At least fp32 from here on."""
        mean = at_least_fp32(latent)
        return Posterior(mean, mean.new_full(mean.shape, LOGVAR_RANGE[0]), certain=True)

    def sample(self, noise: Tensor) -> Tensor:
        """mean + std * noise, with noise standard normal of the same shape."""
        if self.certain:
            return self.mean
        return self.mean + (0.5 * self.logvar).exp() * noise

    def mode(self) -> Tensor:
        """The most likely latent, which is the mean."""
        return self.mean

    def latent(self, noise: Tensor | None) -> Tensor:
        """A sample by this noise; the mode without."""
        return self.mode() if noise is None else self.sample(noise)

    def kl(self) -> Tensor:
        """Divergence from the standard normal, per clip, in nats, summed over c k h w: shape b."""
        mean, logvar = at_least_fp32(self.mean), at_least_fp32(self.logvar)
        if self.certain:
            return mean.new_zeros(len(mean))
        return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).flatten(1).sum(dim=1)


class VideoVAE(Protocol):
    """An nn.Module with these."""

    geometry: Geometry
    streamable: bool
    why_not_streamable: str
    why_tiles_blend: str

    @property
    def config(self) -> ModelConfig:
        """What the network is made of."""
        ...

    @property
    def last_layer(self) -> nn.Module:
        """The convolution that makes pixels; its weight measures the adaptive weight."""
        ...

    def encode(self, x: Tensor, stream: Stream | None = None) -> Posterior:
        """x: b 3 t h w in [-1, 1], t = 1 + temporal * n."""
        ...

    def decode(self, z: Tensor, stream: Stream | None = None) -> Tensor:
        """z: b c k h w -> b 3 t h w, unclamped."""
        ...

    def forward(self, x: Tensor, noise: Tensor | None) -> tuple[Tensor, Posterior]:
        """Reconstruction and posterior. noise: standard normal in the latent's shape; None takes the mode."""
        ...

    def stream(self) -> ClipStream:
        """A clip in pieces of any length. ConfigError if the model can't, with the reason."""
        ...

    def set_recompute(self, *, on: bool) -> None:
        """Whether backward runs blocks again in the place of keeping what is inside."""
        ...
