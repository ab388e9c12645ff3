"""What a latent space holds: statistics by channel over any number of clips in constant memory, and how a
decoder bears missing latents."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from causalvae import rng
from causalvae.fidelity import psnr
from causalvae.models.base import Posterior
from causalvae.moments import Moments
from causalvae.video import crop_frames, to_uint8

SPECTRUM_BINS = 16  # of spatial frequency, from 0 to half a cycle per latent position
DEAD_SIGNAL = 0.01  # of the posterior's variance
DEAD_SHARE = 1e-4  # of the mean variance of all channels


@dataclass(frozen=True)
class LatentStatistics:
    """Sums over the latent positions seen so far, float64 on the CPU; parts merge in any order.

    of_means: moments of the posterior's mean, a vector of c at each position. noise, kl: c, sums over
    positions of the posterior's variance and of its divergence in nats. certain: no position had a variance
    (None before the first). power, bins: sums and counts of the spatial power spectrum by frequency,
    c SPECTRUM_BINS and SPECTRUM_BINS.
    """

    of_means: Moments
    noise: Tensor
    kl: Tensor
    certain: bool | None
    power: Tensor
    bins: Tensor

    @classmethod
    def none(cls, channels: int) -> "LatentStatistics":
        """Of no latent yet."""
        zeros = torch.zeros(channels, dtype=torch.float64)
        power = torch.zeros(channels, SPECTRUM_BINS, dtype=torch.float64)
        return cls(Moments.none(channels), zeros, zeros, None, power, power[0])

    @classmethod
    def of(cls, posterior: Posterior) -> "LatentStatistics":
        """Of the posterior of some clips, b c k h w."""
        mean = posterior.mean.detach().cpu().double()
        logvar = posterior.logvar.detach().cpu().double()
        positions = (0, 2, 3, 4)
        noise = kl = mean.new_zeros(mean.shape[1])
        if not posterior.certain:
            noise = logvar.exp().sum(dim=positions)
            kl = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).sum(dim=positions)
        moments = Moments.of(mean.movedim(1, -1).flatten(0, -2))
        return cls(moments, noise, kl, posterior.certain, *_spectrum(mean))

    def merged(self, other: "LatentStatistics") -> "LatentStatistics":
        """Of the latents of both."""
        known = [each.certain for each in (self, other) if each.certain is not None]
        return LatentStatistics(
            self.of_means.merged(other.of_means),
            self.noise + other.noise,
            self.kl + other.kl,
            all(known) if known else None,
            self.power + other.power,
            self.bins + other.bins,
        )

    def tensors(self) -> dict[str, Tensor]:
        """All that is known, to be saved and given to `of_tensors`. Of at least one latent."""
        assert self.certain is not None
        return {
            "count": torch.tensor(self.of_means.count),
            "mean": self.of_means.mean,
            "scatter": self.of_means.scatter,
            "noise": self.noise,
            "kl": self.kl,
            "certain": torch.tensor(self.certain),
            "power": self.power,
            "bins": self.bins,
        }

    @classmethod
    def of_tensors(cls, saved: Mapping[str, Tensor]) -> "LatentStatistics":
        """The inverse of `tensors`, exact."""
        moments = Moments(int(saved["count"]), saved["mean"], saved["scatter"])
        certain = bool(saved["certain"])
        return cls(moments, saved["noise"], saved["kl"], certain, saved["power"], saved["bins"])

    def summary(self) -> dict[str, Any]:  # Any: JSON
        """What docs/metrics.md names, for JSON. Of at least one latent position."""
        moments = self.of_means
        covariance = moments.covariance(unbiased=False)
        variance = covariance.diagonal()
        noise = self.noise / moments.count
        eigenvalues = torch.linalg.eigvalsh(covariance).flip(0).clamp(min=0.0)
        found: dict[str, Any] = {
            "positions": moments.count,
            "mean": moments.mean.tolist(),
            "deviation": (variance + noise).sqrt().tolist(),
            "eigenvalues": eigenvalues.tolist(),
            "effective_rank": effective_rank(eigenvalues.tolist()),
            "dead_channels": dead_channels(variance, noise=noise),
            "spectrum": self._spectrum_by_frequency(),
        }
        if not self.certain:
            kl = self.kl / moments.count
            found |= {"kl": kl.tolist(), "noise_deviation": noise.sqrt().tolist()}
        return found

    def _spectrum_by_frequency(self) -> dict[str, list[float]]:
        """Mean power over channels in the bins that have any, and the middle of each bin in cycles."""
        seen = [i for i, count in enumerate(self.bins.tolist()) if count > 0]
        power = (self.power.mean(dim=0) / self.bins.clamp(min=1.0)).tolist()
        return {
            "frequency": [(i + 0.5) * 0.5 / SPECTRUM_BINS for i in seen],
            "power": [power[i] for i in seen],
        }


def effective_rank(eigenvalues: Sequence[float]) -> float:
    """exp of the entropy of the eigenvalues' shares: from 1, one direction holds all, to their number.

    eigenvalues: of a covariance. 0 where all are 0. Roy and Vetterli, The effective rank (2007).
    """
    total = math.fsum(eigenvalues)
    shares = [value / total for value in eigenvalues if value > 0.0]
    return math.exp(-math.fsum(share * math.log(share) for share in shares)) if shares else 0.0


def dead_channels(variance: Tensor, *, noise: Tensor) -> list[int]:
    """Channels that say nothing of the clip. variance, noise: c, of the means and mean of the posterior's.

    A channel is dead if its mean varies by less than 1 % of the posterior's variance, so that its sample is
    noise, or by at most 1e-4 of what channels vary on average. After the active units of Burda et al.,
    Importance weighted autoencoders (2016), made free of the latent's scale.
    """
    dead = (variance < DEAD_SIGNAL * noise) | (variance <= DEAD_SHARE * variance.mean())
    return [i for i, each in enumerate(dead.tolist()) if each]


def mask_latent(z: Tensor, *, fraction: float, fill: Tensor, base: int) -> Tensor:
    """z: c k h w -> the same with round(fraction k h w) positions replaced in all channels by fill: c.

    base: a key of rng, one for each clip. Positions of a larger fraction include those of a smaller one.
    """
    places = z[0].numel()
    order = rng.normal(z.shape[1:], base).flatten().argsort(stable=True)
    masked = torch.zeros(places, dtype=torch.bool)
    masked[order[: round(fraction * places)]] = True
    mask = masked.view(z.shape[1:]).to(z.device)  # k h w
    return torch.where(mask, fill.to(z).view(-1, 1, 1, 1), z)


@torch.no_grad()
def masked_psnr(
    clip: Tensor, z: Tensor, *, decode: Callable[[Tensor], Tensor], fill: Tensor, fractions: Sequence[float],
    base: int,
) -> list[float]:  # fmt: skip
    """PSNR in dB of a clip decoded from its latent with each fraction of the positions masked.

    clip: uint8 t h w 3. z: c k h w. decode: 1 c k h w -> 1 3 t' h w in [-1, 1], t' >= t. fill: c, such as the
    mean of each channel. base: a key of rng made of the clip's name, so that no other clip matters.
    """
    found = []
    for fraction in fractions:
        recon = decode(mask_latent(z, fraction=fraction, fill=fill, base=base)[None])
        frames = to_uint8(crop_frames(recon, len(clip)))[0].permute(1, 2, 3, 0)  # 3 t h w -> t h w 3
        found.append(psnr(clip, frames.to(clip.device)))
    return found


def _spectrum(mean: Tensor) -> tuple[Tensor, Tensor]:
    """b c k h w, float64 -> power summed over bins of radial frequency: c bins; and how many: bins.

    Each latent frame without its mean; the transform keeps the energy, so the power over all frequencies
    averages to the spatial variance. Frequencies over half a cycle (the corners) and 0 are left out.
    """
    height, width = mean.shape[-2:]
    centred = mean - mean.mean(dim=(-2, -1), keepdim=True)
    power = torch.fft.fft2(centred, norm="ortho").abs().square()  # b c k h w
    rows, columns = (torch.fft.fftfreq(n, dtype=torch.float64) for n in (height, width))
    radius = (rows[:, None].square() + columns.square()).sqrt()  # h w, cycles per position
    places = (radius * 2 * SPECTRUM_BINS).ceil().long() - 1  # bin i holds i < 2 SPECTRUM_BINS radius <= i + 1
    inside = (places >= 0) & (places < SPECTRUM_BINS)
    chosen = places[inside]
    frames = len(mean) * mean.shape[2]
    by_place = power.sum(dim=(0, 2))[:, inside]  # c places
    totals = by_place.new_zeros(len(by_place), SPECTRUM_BINS).index_add(1, chosen, by_place)
    counts = torch.bincount(chosen, minlength=SPECTRUM_BINS).double() * frames
    return totals, counts
