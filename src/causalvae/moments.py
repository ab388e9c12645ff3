"""Mean and covariance of vectors that come in batches, and of channels: constant memory, mergeable parts."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Count, mean and scatter of vectors of n numbers, in float64 on the CPU.

    mean: n. scatter: n n, the sum of outer products of deviations from the mean. Parts may be added in any
    order and division; the result differs by rounding only (1e-12 of it). Chan et al. 1979.
    """

    count: int
    mean: Tensor
    scatter: Tensor

    @classmethod
    def none(cls, size: int) -> "Moments":
        """Of no vector yet."""
        zeros = torch.zeros(size, dtype=torch.float64)
        return cls(0, zeros, torch.zeros(size, size, dtype=torch.float64))

    @classmethod
    def of(cls, rows: Tensor) -> "Moments":
        """Of vectors m n, at least one."""
        rows = rows.detach().cpu().double()
        mean = rows.mean(dim=0)
        deviations = rows - mean
        return cls(len(rows), mean, deviations.T @ deviations)

    def merged(self, other: "Moments") -> "Moments":
        """Of the vectors of both."""
        count = self.count + other.count
        if count == 0:
            return self
        shift = other.mean - self.mean
        mean = self.mean + shift * (other.count / count)
        between = torch.outer(shift, shift) * (self.count * other.count / count)
        return Moments(count, mean, self.scatter + other.scatter + between)

    def covariance(self, *, unbiased: bool) -> Tensor:
        """n n: the scatter divided by the count, or by one less (unbiased)."""
        assert self.count > int(unbiased)
        return self.scatter / (self.count - int(unbiased))


@dataclass(frozen=True)
class ChannelMoments:
    """Of each channel by itself: count of numbers, their mean, and sums of squared deviations from it.

    mean, squares: c, float64 on the CPU. Parts may be added in any order and division, as `Moments`.
    """

    count: int
    mean: Tensor
    squares: Tensor

    @classmethod
    def none(cls, channels: int) -> "ChannelMoments":
        """Of no number yet."""
        zeros = torch.zeros(channels, dtype=torch.float64)
        return cls(0, zeros, zeros)

    @classmethod
    def of(cls, values: Tensor, *, noise: Tensor | None = None) -> "ChannelMoments":
        """Of values c n, at least one of each channel. noise: c n, variances of what is spread about them."""
        rows = values.detach().cpu().double()
        mean = rows.mean(dim=1)
        squares = (rows - mean[:, None]).square().sum(dim=1)
        if noise is not None:
            squares = squares + noise.detach().cpu().double().sum(dim=1)
        return cls(rows.shape[1], mean, squares)

    def merged(self, other: "ChannelMoments") -> "ChannelMoments":
        """Of the numbers of both. Chan et al. 1979."""
        count = self.count + other.count
        if count == 0:
            return self
        shift = other.mean - self.mean
        between = shift.square() * (self.count * other.count / count)
        mean = self.mean + shift * (other.count / count)
        return ChannelMoments(count, mean, self.squares + other.squares + between)

    def pooled(self) -> "ChannelMoments":
        """Of all channels together, as one channel."""
        mean = self.mean.mean()
        squares = self.squares.sum() + self.count * (self.mean - mean).square().sum()
        return ChannelMoments(self.count * len(self.mean), mean[None], squares[None])

    def deviation(self) -> Tensor:
        """c: the root of the mean squared deviation. Of at least one number."""
        assert self.count > 0
        return (self.squares / self.count).sqrt()
