"""From decoded frames to the pixels of a clip: resized to cover, cropped, flipped. All in uint8."""

import torch
from torch import Tensor
from torch.nn import functional as F

from causalvae.errors import VideoError

LARGEST_COVER = 64  # pixels of the resized frame per pixel of the crop; a thin strip of a frame asks for more


def resize_crop(frames: Tensor, *, size: tuple[int, int], crop: tuple[float, float] | None = None) -> Tensor:
    """uint8 t h w 3 -> uint8 3 t H W: resized to the smallest frame that covers H W, then cropped.

    Antialiased, up or down, the aspect ratio kept. size: H, W. crop: where the crop lies, (down, across),
    each in [0, 1) from the first to the last place where it fits; None is the centre.
    """
    h, w = frames.shape[1:3]
    height, width = size
    cover_h, cover_w = _cover(h, w, size=size)
    if cover_h * cover_w > LARGEST_COVER * height * width:
        raise VideoError(f"frames of {h}x{w} pixels are too narrow for clips of {height}x{width}")
    images = frames.permute(0, 3, 1, 2)  # t h w 3 -> t 3 h w
    if (cover_h, cover_w) != (h, w):
        images = F.interpolate(images, (cover_h, cover_w), mode="bilinear", antialias=True)
    top, left = _place(cover_h - height, crop and crop[0]), _place(cover_w - width, crop and crop[1])
    images = images[:, :, top : top + height, left : left + width]
    return images.transpose(0, 1).contiguous()  # t 3 H W -> 3 t H W


def centre_crop(h: int, w: int, *, size: tuple[int, int]) -> dict[str, int]:
    """What `resize_crop` does to frames of h x w: the size they get, and where the crop at the centre is."""
    cover_h, cover_w = _cover(h, w, size=size)
    return {
        "resized_height": cover_h,
        "resized_width": cover_w,
        "top": _place(cover_h - size[0], None),
        "left": _place(cover_w - size[1], None),
    }


def flip(clip: Tensor) -> Tensor:
    """uint8 3 t H W -> the same, left and right swapped."""
    return torch.flip(clip, dims=(3,))


def _cover(h: int, w: int, *, size: tuple[int, int]) -> tuple[int, int]:
    """Size of the resized frame: one side is the crop's, the other at least that, rounded."""
    height, width = size
    if w * height >= h * width:  # wider than the crop
        return height, max(width, (2 * w * height + h) // (2 * h))
    return max(height, (2 * h * width + w) // (2 * w)), width


def _place(room: int, where: float | None) -> int:
    """Where a crop begins on an axis with this many pixels to spare."""
    return room // 2 if where is None else min(room, int(where * (room + 1)))
