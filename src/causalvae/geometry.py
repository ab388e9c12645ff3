"""Arithmetic of shapes, without torch.

What a clip becomes as a latent, and how a long one is cut in chunks.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Geometry:
    """Downsample factors of a causal video VAE. One latent frame covers the first frame, each later one
    `temporal`.

    temporal, spatial: downsample factors. channels: latent channels.
    group: latent frames after the first come in multiples of this. 1 for models that take any number.
    """

    temporal: int = 4
    spatial: int = 8
    channels: int = 4
    group: int = 1

    def latent_frames(self, frames: int) -> int:
        """Latent frames of a clip of this many frames, padded as `padded_frames` says."""
        return 1 + (self.padded_frames(frames) - 1) // self.temporal

    def padded_frames(self, frames: int) -> int:
        """The next count of the form 1 + temporal * group * n, which is what the model works on."""
        return frames + -(frames - 1) % (self.temporal * self.group)

    def padded_size(self, pixels: int) -> int:
        """The next multiple of the spatial factor."""
        return pixels + -pixels % self.spatial

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Shape c t h w of the latent of a clip of this size, padded where it has to be."""
        h, w = self.padded_size(height) // self.spatial, self.padded_size(width) // self.spatial
        return (self.channels, self.latent_frames(frames), h, w)
