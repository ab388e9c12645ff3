"""Resizing, cropping and flipping, against exact values and a float64 reference."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from causalvae.data.transforms import flip, resize_crop
from causalvae.errors import VideoError

SIDES = st.integers(1, 80)
PLACES = st.floats(0, 1, exclude_max=True)


def frames(h: int, w: int, *, t: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(h * 1000 + w)
    return torch.randint(0, 256, (t, h, w, 3), dtype=torch.uint8, generator=generator)


def test_a_frame_of_the_right_size_is_unchanged() -> None:
    x = frames(24, 32)
    assert torch.equal(resize_crop(x, size=(24, 32)), x.permute(3, 0, 1, 2))


def test_a_crop_without_resizing_is_a_piece_of_the_frame() -> None:
    x = frames(24, 40)
    for crop, left in ((None, 8), ((0.0, 0.0), 0), ((0.5, 0.999), 16)):
        assert torch.equal(
            resize_crop(x, size=(24, 24), crop=crop), x[:, :, left : left + 24].permute(3, 0, 1, 2)
        )


@given(SIDES, SIDES, st.tuples(SIDES, SIDES), st.tuples(PLACES, PLACES))
def test_any_frame_fills_any_crop_or_is_refused_as_too_narrow(
    h: int, w: int, size: tuple[int, int], crop: tuple[float, float]
) -> None:
    try:
        clip = resize_crop(frames(h, w, t=1), size=size, crop=crop)
    except VideoError:
        assert max(h * size[1], w * size[0]) > 32 * min(h * size[1], w * size[0])
        return
    assert clip.shape == (3, 1, *size)
    assert clip.is_contiguous()


@pytest.mark.parametrize("size", [(60, 60), (33, 47), (180, 320)])
def test_resizing_is_antialiased_bilinear_within_a_level(size: tuple[int, int]) -> None:
    x = frames(120, 160)
    clip = resize_crop(x, size=size)
    scale = max(size[0] / 120, size[1] / 160)
    cover = (max(size[0], round(120 * scale)), max(size[1], round(160 * scale)))
    exact = F.interpolate(x.permute(0, 3, 1, 2).double(), cover, mode="bilinear", antialias=True)
    top, left = (cover[0] - size[0]) // 2, (cover[1] - size[1]) // 2
    exact = exact[:, :, top : top + size[0], left : left + size[1]].transpose(0, 1)
    assert (clip.double() - exact).abs().max() < 1.6  # two passes, each rounded to 8 bits


def test_an_even_grey_stays_what_it_is() -> None:
    x = torch.full((1, 90, 70, 3), 77, dtype=torch.uint8)
    assert torch.equal(resize_crop(x, size=(64, 64)), torch.full((3, 1, 64, 64), 77, dtype=torch.uint8))


def test_a_strip_is_refused_before_it_takes_all_memory() -> None:
    with pytest.raises(VideoError, match="1x20000 pixels are too narrow"):
        resize_crop(torch.zeros(1, 1, 20000, 3, dtype=torch.uint8), size=(256, 256))


def test_flip_swaps_left_and_right_only() -> None:
    clip = resize_crop(frames(8, 12), size=(8, 12))
    assert torch.equal(flip(clip), clip[..., range(11, -1, -1)])
    assert torch.equal(flip(flip(clip)), clip)
