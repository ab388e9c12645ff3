"""Arithmetic of shapes, without torch.

What a clip becomes as a latent, and how a large frame is cut in tiles.
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


Span = tuple[int, int]  # first position, and one behind the last


def cuts(length: int, most: int, *, multiple: int = 1) -> list[Span]:
    """0...length in as few equal pieces as there can be, none longer than `most`.

    Pieces start at multiples of `multiple`. most: a multiple of it too.
    """
    number = _ceil(length, most)
    piece = _ceil(_ceil(length, number), multiple) * multiple
    return [(start, min(start + piece, length)) for start in range(0, length, piece)]


def overlapping_cuts(length: int, most: int, *, overlap: int, multiple: int = 1) -> list[Span]:
    """The same with neighbours that share at least `overlap`, which is less than `most`.

    All pieces are as long as the first, the last ends with the length.
    """
    if length <= most:
        return [(0, length)]
    number = _ceil(length - overlap, most - overlap)
    piece = _ceil(_ceil(length + (number - 1) * overlap, number), multiple) * multiple
    starts = [min(i * (piece - overlap), length - piece) for i in range(number)]
    return [(start, start + piece) for start in dict.fromkeys(starts)]


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
