"""Fidelity of pixels by inputs worked out by hand, scikit-image and FFmpeg; the table; the bootstrap."""

import json
import math
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from av.filter import Graph
from hypothesis import given, settings
from hypothesis import strategies as st
from media import BUNDLED
from networks import efficientnet
from scipy.ndimage import gaussian_filter, uniform_filter
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

from causalvae.data.decode import read_frames
from causalvae.fidelity import (
    first_frame_gain,
    mean_curve,
    ms_ssim,
    mse,
    pooled_psnr,
    psnr,
    psnr_by_frame,
    ssim,
)
from causalvae.metrics import METRICS, bootstrap, grid_metrics, mean, measured, perceptual_metric
from causalvae.rng import integers, key

DOCS = Path(__file__).parents[1] / "docs" / "metrics.md"


def film(*, frames: int = 3, size: tuple[int, int] = (176, 184)) -> Tensor:
    """The corner of some real frames: uint8 t h w 3."""
    pixels = read_frames(BUNDLED / "city_spire.mp4", range(frames))
    assert pixels.shape[1] >= size[0]
    assert pixels.shape[2] >= size[1]
    return pixels[:, : size[0], : size[1]].contiguous()


def noisy(clip: Tensor, *, levels: int, seed: int = 0) -> Tensor:
    """The clip with errors of up to so many levels."""
    errors = integers(clip.shape, n=2 * levels + 1, base=key("noisy", seed)) - levels
    return (clip.long() + errors).clamp(0, 255).to(torch.uint8)


def flat(value: int, *, frames: int = 2, size: tuple[int, int] = (16, 16)) -> Tensor:
    return torch.full((frames, *size, 3), value, dtype=torch.uint8)


def test_psnr_of_known_errors() -> None:
    assert psnr(flat(0), flat(255)) == 0.0
    assert psnr(flat(100), flat(105)) == pytest.approx(10 * math.log10(255**2 / 25), abs=1e-12)
    one_of_ten = flat(0, frames=10)
    one_of_ten[3] = 10
    assert mse(flat(0, frames=10), one_of_ten) == 10.0


def test_equal_clips_have_100_decibels_and_json_and_means_can_hold_it() -> None:
    nearly = flat(0, frames=17, size=(256, 256))
    nearly[0, 0, 0, 0] = 1  # 113 dB
    assert psnr(flat(7), flat(7)) == 100.0
    assert psnr(flat(0, frames=17, size=(256, 256)), nearly) == 100.0
    assert json.loads(json.dumps(psnr(flat(7), flat(7)))) == 100.0


def test_mean_of_psnr_and_psnr_of_pooled_error_are_two_numbers() -> None:
    errors = [1.0, 100.0]
    separate = [10 * math.log10(255**2 / error) for error in errors]
    assert mean(separate) == pytest.approx(38.1308, abs=1e-4)
    assert pooled_psnr(errors, values=[30, 30]) == pytest.approx(10 * math.log10(255**2 / 50.5), abs=1e-12)
    assert pooled_psnr(errors, values=[99, 1]) == pytest.approx(10 * math.log10(255**2 / 1.99), abs=1e-12)


def test_psnr_by_frame_shows_where_the_error_is() -> None:
    recon = flat(50, frames=4)
    recon[0], recon[2] = 51, 60
    by_frame = psnr_by_frame(flat(50, frames=4), recon)
    assert by_frame == pytest.approx([48.130803609, 100.0, 28.130803609, 100.0], abs=1e-8)
    assert first_frame_gain(flat(50, frames=4), recon) == pytest.approx(48.130803609 - 228.130803609 / 3)
    assert first_frame_gain(flat(50, frames=1), flat(51, frames=1)) is None


def test_a_mean_curve_is_over_the_clips_that_are_long_enough() -> None:
    assert mean_curve([[1.0, 2.0, 3.0], [3.0]]) == [2.0, 2.0, 3.0]
    assert mean_curve([]) == []


def test_ssim_of_two_flat_clips_is_its_luminance_term() -> None:
    c1 = 2.55**2
    expected = (2 * 100 * 110 + c1) / (100**2 + 110**2 + c1)  # no variance: contrast and structure are 1
    assert ssim(flat(100), flat(110)) == pytest.approx(expected, abs=1e-12)
    assert ssim(flat(100, size=(10, 40)), flat(110, size=(10, 40))) is None


@pytest.mark.parametrize("levels", [2, 20, 200])
def test_psnr_and_ssim_are_those_of_scikit_image(levels: int) -> None:
    clip = film(frames=2, size=(61, 96))
    recon = noisy(clip, levels=levels)
    pairs = list(zip(clip.numpy(), recon.numpy(), strict=True))
    theirs = [
        structural_similarity(
            a, b, channel_axis=-1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
            data_range=255,
        )
        for a, b in pairs
    ]  # fmt: skip
    assert ssim(clip, recon) == pytest.approx(np.mean(theirs), abs=1e-10)
    assert psnr(clip, recon) == pytest.approx(peak_signal_noise_ratio(clip.numpy(), recon.numpy()), abs=1e-10)


def test_ms_ssim_is_the_formula_written_with_scipy() -> None:
    clip = film(frames=1, size=(179, 200))  # odd sides at several scales
    recon = noisy(clip, levels=30)
    values = []
    for channel in range(3):
        x, y = (each[0, :, :, channel].double().numpy() for each in (clip, recon))
        product = 1.0
        for scale, weight in enumerate((0.0448, 0.2856, 0.3001, 0.2363, 0.1333)):
            if scale:
                x, y = (
                    uniform_filter(each, 2, origin=-1)[: len(each) // 2 * 2 : 2, : each.shape[1] // 2 * 2 : 2]
                    for each in (x, y)
                )
            full, contrast = scipy_terms(x, y)
            product *= (full if scale == 4 else contrast) ** weight
        values.append(product)
    assert ms_ssim(clip, recon) == pytest.approx(np.mean(values), abs=1e-10)
    assert ms_ssim(flat(0, size=(175, 300)), flat(0, size=(175, 300))) is None


def scipy_terms(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Means of SSIM and of its contrast and structure term, window whole inside."""

    def smooth(values: np.ndarray) -> np.ndarray:
        return gaussian_filter(values, 1.5, truncate=3.5)[5:-5, 5:-5]

    mx, my = smooth(x), smooth(y)
    vx, vy, cov = smooth(x * x) - mx**2, smooth(y * y) - my**2, smooth(x * y) - mx * my
    c1, c2 = 2.55**2, 7.65**2
    contrast = (2 * cov + c2) / (vx + vy + c2)
    return float(np.mean((2 * mx * my + c1) / (mx**2 + my**2 + c1) * contrast)), float(np.mean(contrast))


@settings(max_examples=20, deadline=None)
@given(levels=st.integers(0, 255), seed=st.integers(0, 99))
def test_fidelity_is_symmetric_and_best_for_equal_clips(levels: int, seed: int) -> None:
    clip = noisy(flat(128, frames=2, size=(16, 20)), levels=100, seed=-1)
    recon = noisy(clip, levels=levels, seed=seed)
    for function, best in ((psnr, 100.0), (ssim, 1.0)):
        value, swapped = function(clip, recon), function(recon, clip)
        assert value is not None
        assert value == pytest.approx(swapped, abs=1e-12)
        assert value <= best + 1e-12
        assert function(clip, clip) == pytest.approx(best, abs=1e-12)


def test_psnr_of_luma_is_that_of_ffmpeg_and_ssim_near_its_block_variant(tmp_path: Path) -> None:
    clip = film(frames=3, size=(96, 128))
    for levels in (3, 25):
        grey, other = (each[..., 1:2].expand(-1, -1, -1, 3) for each in (clip, noisy(clip, levels=levels)))
        theirs = ffmpeg_stats("psnr", grey, other, folder=tmp_path)["psnr_y"]
        # two decimals are written
        assert psnr_by_frame(grey, other) == pytest.approx(theirs, abs=0.00501)
        # FFmpeg takes 8x8 blocks every 4 pixels without a Gaussian: another number, near by
        blocks = ffmpeg_stats("ssim", grey, other, folder=tmp_path)["Y"]
        assert ssim(grey, other) == pytest.approx(np.mean(blocks), abs=0.03)


def ffmpeg_stats(name: str, a: Tensor, b: Tensor, *, folder: Path) -> dict[str, list[float]]:
    """Numbers by frame that a filter of FFmpeg writes for the first channel of two clips."""
    path = folder / f"{name}.log"
    graph = Graph()
    grey, (height, width) = av.VideoFormat("gray"), a.shape[1:3]
    sources = [
        graph.add_buffer(width=width, height=height, format=grey, time_base=Fraction(1, 25)) for _ in range(2)
    ]
    judge, sink = graph.add(name, f"stats_file={path}"), graph.add("buffersink")
    for number in range(2):
        sources[number].link_to(judge, 0, number)
    judge.link_to(sink)
    graph.configure()
    for t in range(len(a)):
        for number, clip in enumerate((a, b)):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(clip[t, :, :, 0].numpy()), format="gray")
            frame.pts, frame.time_base = t, Fraction(1, 25)
            sources[number].push(frame)
        sink.pull()
    del sources, judge, sink, graph  # closes the file
    lines = [
        dict(word.split(":") for word in line.split() if ":" in word)
        for line in path.read_text().splitlines()
    ]
    return {key: [float(line[key]) for line in lines] for key in lines[0] if key in ("psnr_y", "Y")}


def test_the_table_measures_real_frames_and_leaves_out_what_they_cannot_give() -> None:
    clip = film(frames=5)
    table = METRICS | grid_metrics(8)
    values = measured(clip, noisy(clip, levels=5), metrics=table)
    assert set(values) | {"flicker"} == set(table)
    assert all(math.isfinite(value) for value in values.values())
    same = measured(clip, clip, metrics=table)
    assert same["psnr"] == same["psnr_of_changes"] == 100.0
    assert same["grid"] == same["grid_levels"] == same["first_frame_gain"] == 0.0
    assert same["motion_consistency"] == 1.0
    single = measured(clip[:1], clip[:1], metrics=table)
    assert set(table) - set(single) == {
        "first_frame_gain",
        "psnr_of_changes",
        "flicker",
        "motion_consistency",
    }


def test_every_metric_of_the_table_is_in_the_docs_with_its_unit_and_direction() -> None:
    rows = [line for line in DOCS.read_text().splitlines() if line.startswith("| `")]
    for metric in (METRICS | grid_metrics(8)).values():
        row = next(line for line in rows if line.startswith(f"| `{metric.name}` "))
        cells = [cell.strip() for cell in row.split("|")]
        assert cells[3] == (metric.unit.replace("^2", "²") or "none")
        assert cells[4] == (metric.better or "neither")
        assert metric.source in row


def test_numbers_do_not_depend_on_threads() -> None:
    clip = film(frames=2, size=(176, 176))
    recon = noisy(clip, levels=9)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = measured(clip, recon, metrics=METRICS | grid_metrics(8))
        torch.set_num_threads(2)
        two = measured(clip, recon, metrics=METRICS | grid_metrics(8))
    finally:
        torch.set_num_threads(threads)
    assert two == pytest.approx(one, rel=1e-12)


def test_a_network_of_the_user_is_a_metric_under_its_own_name() -> None:
    judge = efficientnet()
    metric = perceptual_metric(judge)
    clip = film(frames=9, size=(32, 40))  # more than are judged at once
    values = [metric.measure(clip, noisy(clip, levels=levels)) for levels in (0, 10, 60)]
    assert metric.name == "efficientnet-lite0"
    assert "not LPIPS" in metric.source
    assert values[0] == 0.0
    assert None not in values
    assert values == sorted(value for value in values if value is not None)
    parts = [metric.measure(clip[t : t + 1], noisy(clip, levels=60)[t : t + 1]) for t in range(9)]
    assert values[2] == pytest.approx(mean([part for part in parts if part is not None]), rel=1e-5)  # fp32
    assert metric.measure(clip[:, :31], clip[:, :31]) is None


def test_the_bootstrap_knows_neither_order_nor_state() -> None:
    values = [float(value) for value in integers((40,), n=1000, base=key("values"))]
    assert bootstrap(values, seed=1) == bootstrap(values[::-1], seed=1)
    assert bootstrap(values, seed=1) != bootstrap(values, seed=2)
    assert bootstrap([3.0, 3.0, 3.0], seed=0) == (3.0, 3.0)
    assert bootstrap([3.0], seed=0) is None


def test_the_bootstrap_has_the_width_of_a_normal_interval() -> None:
    values = torch.arange(400, dtype=torch.float64)
    interval = bootstrap(values.tolist(), seed=0)
    assert interval is not None
    half = 1.96 * float(values.std(correction=0)) / 20
    # 2000 resamples place a bound with a deviation of about 3 % of the half width
    assert interval[0] == pytest.approx(199.5 - half, abs=0.12 * half)
    assert interval[1] == pytest.approx(199.5 + half, abs=0.12 * half)
