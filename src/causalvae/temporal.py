"""How a reconstruction moves: errors of change from frame to frame, which a mean over frames does not show.

Clips are uint8 `t h w 3`. All sums are exact integers, and one frame is worked on at a time.
A number that a clip can't give is None.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from causalvae.fidelity import psnr_of_mse

STATIC_LEVELS = 2  # a pixel stands still if no channel of the original changes by more 8-bit levels than this
LEAST_STATIC = 0.01  # share of pixels that must stand still for flicker to be measured


def changes(clip: Tensor) -> Iterator[Tensor]:
    """uint8 t h w 3 -> t - 1 times int32 h w 3: each frame minus the one before, one at a time."""
    assert clip.dtype == torch.uint8
    return (clip[t].to(torch.int32) - clip[t - 1].to(torch.int32) for t in range(1, len(clip)))


def difference_psnr(clip: Tensor, recon: Tensor) -> float | None:
    """PSNR in dB of the changes from frame to frame, with peak 255, at most 100; none of a single frame.

    10 log10(255^2 / mean(((r[t+1] - r[t]) - (x[t+1] - x[t]))^2)). An error that stays the same costs nothing,
    one that is drawn anew for each frame counts twice (3 dB below the PSNR).
    """
    if len(clip) < 2:
        return None
    total = sum(_product(r - x, r - x) for x, r in zip(changes(clip), changes(recon), strict=True))
    return psnr_of_mse(total / clip[1:].numel())


def flicker(clip: Tensor, recon: Tensor) -> float | None:
    """How much more the reconstruction changes than the original where that stands still, in 8-bit levels.

    Mean over static values of |r[t+1] - r[t]| - |x[t+1] - x[t]|. A pixel is static from t to t+1 if none of
    its channels changes by more than 2 levels in the original. None if under 1 % of the pixels are static.
    0 for equal clips; negative where the reconstruction is calmer, such as with a noisy original.
    """
    count = excess = 0
    for x, r in zip(changes(clip), changes(recon), strict=True):
        static = (x.abs() <= STATIC_LEVELS).all(dim=-1)  # h w
        count += int(static.sum())
        excess += _product(r.abs() - x.abs(), static[..., None])
    if count == 0 or count < LEAST_STATIC * clip[1:, ..., 0].numel():
        return None
    return excess / (count * clip.shape[-1])


def motion_consistency(clip: Tensor, recon: Tensor) -> float | None:
    """Correlation of the changes of both clips in [-1, 1], without optical flow or warping; 1 is the best.

    sum(dx dr) / sqrt(sum(dx^2) sum(dr^2)) over all values, with d the change from a frame to the next: the
    normalised correlation coefficient (not centred) of the temporal derivatives. It does not fall for an
    error that stands still or for a change of contrast. Comparing changes in place of warped frames: Chu et
    al., Learning temporal coherence via self-supervision (2020), whose tLP does so with LPIPS. None where
    the original does not change; 0 where only the reconstruction does not.
    """
    wanted = found = shared = 0
    for x, r in zip(changes(clip), changes(recon), strict=True):
        wanted += _product(x, x)
        found += _product(r, r)
        shared += _product(x, r)
    if wanted == 0:
        return None
    return 0.0 if found == 0 else shared / (wanted * found) ** 0.5


def _product(a: Tensor, b: Tensor) -> int:
    """Sum of products of two tensors of integers, exact."""
    return int((a * b).sum(dtype=torch.int64))
