"""Motion, seams and the grid of the decoder, by errors that are put where each of them must see them."""

import math

import pytest
import torch
from media import BUNDLED
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from causalvae.artefacts import (
    COLOURS,
    Axis,
    Seam,
    colour_clip,
    grid_decibels,
    grid_levels,
    level_errors,
    ratio_decibels,
    seam_of_levels,
    seam_of_steps,
    step_errors,
)
from causalvae.data.decode import read_frames
from causalvae.fidelity import psnr
from causalvae.rng import integers, key
from causalvae.temporal import difference_psnr, flicker, motion_consistency

AXES: tuple[Axis, ...] = ("time", "row", "column")


def noise(shape: tuple[int, int, int, int], *, levels: int = 256, seed: int = 0) -> Tensor:
    """Integers in [0, levels), uint8."""
    return integers(shape, n=levels, base=key("motion", seed)).to(torch.uint8)


def flat(value: int, *, frames: int = 4, size: tuple[int, int] = (16, 16)) -> Tensor:
    return torch.full((frames, *size, 3), value, dtype=torch.uint8)


def test_an_error_that_stands_still_does_not_change_the_differences_of_frames() -> None:
    clip = noise((4, 8, 8, 3), levels=200)
    assert difference_psnr(clip, clip + 20) == 100.0
    assert motion_consistency(clip, clip + 20) == 1.0


def test_an_error_that_alternates_counts_by_its_change() -> None:
    recon = flat(100)
    recon[1::2] += 3  # each change is wrong by 3
    assert difference_psnr(flat(100), recon) == pytest.approx(10 * math.log10(255**2 / 9), abs=1e-12)


def test_errors_drawn_anew_for_each_frame_count_twice() -> None:
    clip = flat(100, frames=9, size=(64, 64))
    recon = clip + noise((9, 64, 64, 3), levels=11) - 5
    changes = difference_psnr(clip, recon)
    assert changes is not None
    # 110,592 draws: the ratio of two means of squares has a deviation of about 0.02 dB
    assert changes == pytest.approx(psnr(clip, recon) - 10 * math.log10(2), abs=0.1)


def test_flicker_is_the_excess_of_change_where_the_original_stands_still() -> None:
    clip, recon = flat(100), flat(100)
    clip[:, 8:] = noise((4, 8, 16, 3))  # half of it moves, and is never looked at
    recon[1::2, :8] += 6
    assert flicker(clip, recon) == 6.0
    assert flicker(clip, clip) == 0.0
    shaky = flat(100)
    shaky[1::2] += 2  # still counts as standing still; a calm reconstruction is calmer than it
    assert flicker(shaky, flat(100)) == -2.0


def test_flicker_is_absent_where_nothing_stands_still() -> None:
    clip = flat(100)
    clip[1::2] += 3
    assert flicker(clip, clip) is None
    assert flicker(flat(1, frames=1), flat(1, frames=1)) is None


def test_motion_consistency_is_the_correlation_of_changes() -> None:
    clip, double, back, other = (flat(100) for _ in range(4))
    clip[1], double[1], back[1] = 110, 120, 90
    other[2] = 110  # changes +10, -10 one frame later: (10, -10, 0) against (0, 10, -10)
    assert motion_consistency(clip, double) == pytest.approx(1.0, abs=1e-12)
    assert motion_consistency(clip, back) == pytest.approx(-1.0, abs=1e-12)
    assert motion_consistency(clip, other) == pytest.approx(-0.5, abs=1e-12)
    assert motion_consistency(clip, flat(100)) == 0.0
    assert motion_consistency(flat(100), clip) is None


@pytest.mark.parametrize("axis", AXES)
def test_a_jump_is_seen_at_its_border_and_nowhere_else(axis: Axis) -> None:
    clip = noise((12, 16, 20, 3), levels=200)
    dim = AXES.index(axis)
    recon = clip.clone()
    recon.narrow(dim, 8, clip.shape[dim] - 8).add_(5)
    steps = step_errors(clip, recon, axis=axis)
    assert len(steps) == clip.shape[dim] - 1
    assert [i for i, error in enumerate(steps) if error] == [7]
    assert steps[7] == 25.0
    seam = seam_of_steps(steps, borders=[8])
    assert seam == Seam(border=25.0, elsewhere=0.0)
    assert seam is not None
    assert seam.decibels == 100.0
    levels = level_errors(clip, recon, axis=axis)
    assert levels == [0.0] * 8 + [25.0] * (clip.shape[dim] - 8)


def test_borders_with_the_error_of_elsewhere_are_no_seam() -> None:
    clip = flat(100, frames=33, size=(64, 64))
    recon = clip + noise((33, 64, 64, 3), levels=11)
    for axis in AXES:
        for seam in (
            seam_of_steps(step_errors(clip, recon, axis=axis), borders=[9, 17, 25]),
            seam_of_levels(level_errors(clip, recon, axis=axis), borders=[9, 17, 25]),
        ):
            assert seam is not None
            assert seam.decibels == pytest.approx(0.0, abs=0.2)  # 36,864 draws at borders: 0.03 dB deviation


def test_a_seam_of_levels_is_both_sides_of_a_border() -> None:
    assert seam_of_levels([1.0, 1.0, 4.0, 8.0, 1.0], borders=[3]) == Seam(border=6.0, elsewhere=1.0)


def test_a_seam_needs_a_border_inside_and_something_beside_it() -> None:
    assert seam_of_steps([1.0, 2.0], borders=[]) is None
    assert seam_of_steps([1.0, 2.0], borders=[0, 3, 9]) is None
    assert seam_of_steps([1.0, 2.0], borders=[1, 2]) is None
    assert seam_of_steps([], borders=[1]) is None


def test_ratios_stay_finite() -> None:
    assert [ratio_decibels(a, b) for a, b in ((0, 0), (1, 0), (0, 1), (10, 1), (1e-30, 1))] == [
        0.0, 100.0, -100.0, 10.0, -100.0
    ]  # fmt: skip


def test_the_grid_in_levels_is_the_pattern_that_repeats() -> None:
    for colour in COLOURS:
        clip = colour_clip(colour, frames=2, size=(36, 44))  # the last periods are not whole
        assert grid_levels(clip, clip, period=8) == 0.0
    grey = colour_clip("grey", frames=2, size=(36, 44))
    recon = grey.clone()
    recon[:, :, ::8] += 4  # a line of 4 in every 8 columns: mean 0.5, mean square 2
    assert grid_levels(grey, recon, period=8) == pytest.approx(math.sqrt(2 - 0.25), abs=1e-12)
    assert grid_levels(grey, grey + 9, period=8) == 0.0
    assert grid_levels(grey[:, :7], grey[:, :7], period=8) is None


def test_the_grid_in_decibels_tells_a_pattern_from_noise() -> None:
    clip = flat(100, frames=4, size=(64, 96))
    plain = clip + noise((4, 64, 96, 3), levels=9)
    lined = plain.clone()
    lined[:, ::8, ::8] += 8
    without, with_lines = (grid_decibels(clip, recon, period=8) for recon in (plain, lined))
    assert without is not None
    assert with_lines is not None
    assert abs(without) < 1.0  # 63 bins of 12 planes: deviation 0.2 dB
    assert with_lines > 6.0


def test_a_pattern_that_only_repeats_is_nothing_but_grid() -> None:
    grey = flat(100, frames=1, size=(64, 64))
    recon = grey.clone()
    recon[:, ::8] += 4
    assert grid_decibels(grey, recon, period=8) == 100.0
    assert grid_decibels(grey, grey, period=8) == 0.0
    assert grid_decibels(grey, grey + 1, period=8) == 0.0


def test_the_grid_needs_four_periods() -> None:
    clip = flat(0, size=(31, 64))
    assert grid_decibels(clip, clip, period=8) is None
    assert grid_decibels(flat(0, size=(32, 32)), flat(0, size=(32, 32)), period=8) == 0.0


def test_blocks_of_a_real_film_are_a_grid_and_its_blur_is_less_of_one() -> None:
    clip = read_frames(BUNDLED / "city_spire.mp4", range(2))[:, :176, :176].contiguous()
    planes = clip.permute(0, 3, 1, 2).float()
    small = avg_pool2d(planes, 8)
    found = []
    for mode in ("nearest", "bicubic"):
        recon = interpolate(small, scale_factor=8, mode=mode).round().clamp(0, 255).to(torch.uint8)
        found.append(grid_decibels(clip, recon.permute(0, 2, 3, 1).contiguous(), period=8))
    blocks, smooth = found
    assert blocks is not None
    assert smooth is not None
    assert blocks > 2.0  # measured: 2.9 and 0.3
    assert abs(smooth) < 1.0
