"""Statistics of latents in parts and as a whole, and decoding with some of them missing."""

import math

import pytest
import torch
from torch import Tensor

from causalvae.latentmetrics import (
    SPECTRUM_BINS,
    LatentStatistics,
    dead_channels,
    effective_rank,
    mask_latent,
    masked_psnr,
)
from causalvae.models.base import Posterior
from causalvae.moments import Moments
from causalvae.rng import key, normal
from causalvae.video import to_uint8

SHAPE = (3, 4, 2, 6, 10)  # b c k h w


def posterior(*, seed: int = 0, shape: tuple[int, ...] = SHAPE) -> Posterior:
    mean = normal(shape, key("mean", seed)) * torch.tensor([1.0, 5.0, 0.1, 2.0]).view(-1, 1, 1, 1) + 3.0
    return Posterior(mean, normal(shape, key("logvar", seed)) - 4.0)


def merged(parts: list[LatentStatistics]) -> LatentStatistics:
    total = LatentStatistics.none(4)
    for part in parts:
        total = total.merged(part)
    return total


def assert_same(a: LatentStatistics, b: LatentStatistics) -> None:
    mine, other = a.tensors(), b.tensors()
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-12, atol=1e-12, msg=name)


def test_statistics_of_a_latent_worked_out_by_hand() -> None:
    mean = torch.tensor([[1.0, -1.0, 1.0, -1.0], [5.0, 5.0, 5.0, 5.0]]).view(1, 2, 1, 2, 2)
    found = LatentStatistics.of(Posterior(mean, torch.zeros_like(mean))).summary()
    assert found["positions"] == 4
    assert found["mean"] == [0.0, 5.0]
    # The variance of the means is 1 and 0, that of the posterior 1; roots of sums differ between CPUs.
    assert found["deviation"] == pytest.approx([math.sqrt(2.0), 1.0], rel=1e-15)
    assert found["noise_deviation"] == [1.0, 1.0]
    assert found["kl"] == [0.5, 12.5]  # mean square / 2, where the variance is 1
    assert found["eigenvalues"] == [1.0, 0.0]
    assert found["effective_rank"] == 1.0
    assert found["dead_channels"] == [1]


def test_divergence_by_channel_adds_up_to_that_of_the_posterior() -> None:
    made = posterior()
    found = LatentStatistics.of(made).summary()
    assert sum(found["kl"]) * found["positions"] == pytest.approx(float(made.kl().sum()), rel=1e-5)  # fp32


def test_covariance_is_that_of_all_positions_at_once() -> None:
    made = posterior()
    rows = made.mean.double().movedim(1, -1).flatten(0, -2)
    found = LatentStatistics.of(made)
    torch.testing.assert_close(found.of_means.covariance(unbiased=False), torch.cov(rows.T, correction=0))
    torch.testing.assert_close(found.of_means.covariance(unbiased=True), torch.cov(rows.T))


def test_parts_in_any_division_and_order_give_the_whole() -> None:
    made = posterior()
    whole = LatentStatistics.of(made)
    singles = [LatentStatistics.of(Posterior(made.mean[i : i + 1], made.logvar[i : i + 1])) for i in range(3)]
    assert_same(merged(singles), whole)
    assert_same(merged(singles[::-1]), whole)
    assert_same(singles[2].merged(merged(singles[:2])), whole)


def test_a_mean_far_from_zero_costs_no_digits_of_the_covariance() -> None:
    rows = normal((1000, 3), key("rows")).double()
    far = rows + 1e6
    parts = Moments.none(3)
    for start in range(0, 1000, 77):
        parts = parts.merged(Moments.of(far[start : start + 77]))
    # what is left is the rounding of the rows themselves, 1e-10
    torch.testing.assert_close(parts.covariance(unbiased=True), torch.cov(rows.T), rtol=1e-8, atol=1e-9)


def test_statistics_survive_a_file_exactly() -> None:
    whole = LatentStatistics.of(posterior())
    again = LatentStatistics.of_tensors(whole.tensors())
    assert again.summary() == whole.summary()
    assert again.of_means.count == whole.of_means.count


def test_an_encoder_that_is_certain_has_no_divergence() -> None:
    found = LatentStatistics.of(Posterior.of_latent(posterior().mean)).summary()
    assert "kl" not in found
    assert "noise_deviation" not in found
    assert found["dead_channels"] == []


def test_the_effective_rank_counts_equal_directions() -> None:
    assert effective_rank([2.0, 2.0, 2.0]) == pytest.approx(3.0, abs=1e-12)
    assert effective_rank([7.0, 0.0]) == 1.0
    assert effective_rank([0.0, 0.0]) == 0.0
    # shares 3/4 and 1/4
    assert effective_rank([3.0, 1.0]) == pytest.approx(4 / 3**0.75, abs=1e-12)


def test_a_channel_is_dead_by_its_signal_and_not_by_its_scale() -> None:
    alive = torch.tensor([4.0, 4.0, 4.0], dtype=torch.float64)
    quiet = torch.tensor([0.001, 0.1, 0.0], dtype=torch.float64)
    assert dead_channels(alive, noise=quiet) == []
    assert dead_channels(alive * 1e-9, noise=quiet * 1e-9) == []
    drowned = torch.tensor([500.0, 1.0, 1.0], dtype=torch.float64)
    assert dead_channels(alive, noise=drowned) == [0]
    assert dead_channels(alive * torch.tensor([1.0, 0.0, 1.0]), noise=quiet * 0) == [1]
    assert dead_channels(alive * 0, noise=quiet * 0) == [0, 1, 2]


def test_the_spectrum_of_a_wave_is_in_its_bin() -> None:
    wave = torch.cos(2 * math.pi * torch.arange(16) / 4)  # a quarter of a cycle per position
    mean = wave.expand(1, 1, 1, 16, 16).contiguous()
    found = LatentStatistics.of(Posterior.of_latent(mean)).summary()["spectrum"]
    strong = [f for f, p in zip(found["frequency"], found["power"], strict=True) if p > 1e-9]
    assert strong == [pytest.approx(7.5 / 32)]  # the bin of 7/32 < f <= 8/32


def test_the_spectrum_of_noise_is_flat_and_its_height_the_variance() -> None:
    mean = normal((4, 4, 8, 32, 32), key("spectrum")) * 3.0 + 7.0
    found = LatentStatistics.of(Posterior.of_latent(mean)).summary()["spectrum"]
    assert len(found["power"]) == SPECTRUM_BINS
    # the lowest bin has four frequencies of 128 frames: deviation 6 %
    assert found["power"] == pytest.approx([9.0] * SPECTRUM_BINS, rel=0.2)


def test_a_mask_covers_its_share_in_all_channels_and_larger_ones_include_it() -> None:
    z = normal((4, 3, 5, 7), key("z")) + 10.0
    fill = torch.arange(4.0)
    covered = []
    for fraction in (0.0, 0.1, 0.5, 1.0):
        masked = mask_latent(z, fraction=fraction, fill=fill, base=key("clip", "a"))
        replaced = masked == fill.view(-1, 1, 1, 1)
        assert torch.equal(replaced, replaced[:1].expand_as(replaced))
        assert torch.equal(masked[~replaced], z[~replaced])
        assert int(replaced[0].sum()) == round(fraction * 105)
        covered.append(replaced)
    assert bool((covered[1] <= covered[2]).all())
    assert torch.equal(
        mask_latent(z, fraction=0.5, fill=fill, base=key("clip", "a")) == fill.view(-1, 1, 1, 1), covered[2]
    )
    assert not torch.equal(mask_latent(z, fraction=0.5, fill=fill, base=key("clip", "b")), z)


def test_masked_latents_cost_quality_by_their_share() -> None:
    z = normal((3, 4, 8, 8), key("pixels")).clamp(-0.9, 0.9)

    def decode(latent: Tensor) -> Tensor:
        """A model whose latents are its pixels, and that pads clips by a frame."""
        return torch.cat([latent, latent[:, :, -1:]], dim=2)

    clip = to_uint8(z).permute(1, 2, 3, 0)
    found = masked_psnr(
        clip, z, decode=decode, fill=torch.zeros(3), fractions=(0.0, 0.25, 1.0), base=key("clip")
    )
    assert found[0] == 100.0
    assert found[0] > found[1] > found[2]
