"""Mean and covariance of vectors that come in batches: constant memory, and mergeable from parts."""

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
