"""How near a reconstruction is to its clip, pixel by pixel, as a viewer sees it: on frames of 8 bits.

Clips are uint8 `t h w 3`. Sums are exact integers or float64, so no number here depends on the batch, and on
the number of threads by less than 1e-12 of itself.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

PEAK = 255.0
DECIBEL_LIMIT = 100.0  # equal clips would have an infinite PSNR, which JSON and means can't hold
WINDOW, SIGMA = 11, 1.5  # Wang et al. 2004
STRIP = 32  # rows of SSIM that are worked on at a time
C1, C2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Wang et al. 2003
MS_SSIM_SIDE = WINDOW * 2 ** (len(SCALE_WEIGHTS) - 1)  # one window at the smallest scale


def psnr(clip: Tensor, recon: Tensor) -> float:
    """Peak signal-to-noise ratio in dB from the mean squared error over all values, at most 100.

    clip, recon: uint8 of one shape. 10 log10(255^2 / mse).
    """
    return psnr_of_mse(mse(clip, recon))


def psnr_of_mse(error: float) -> float:
    """PSNR in dB of a mean squared error in squared 8-bit levels; 100 from 6.5e-6 down to equality."""
    floor = PEAK**2 / 10 ** (DECIBEL_LIMIT / 10)
    return DECIBEL_LIMIT if error <= floor else 10.0 * math.log10(PEAK**2 / error)


def mse(clip: Tensor, recon: Tensor) -> float:
    """Mean squared error over all values, in squared 8-bit levels. clip, recon: uint8 of one shape."""
    return sum(squared_errors(clip, recon)) / clip.numel()


def squared_errors(clip: Tensor, recon: Tensor) -> list[int]:
    """Sums of squared differences of two uint8 tensors at each position of the first axis, exact.

    One position is worked on at a time: a clip of any length takes the memory of a frame.
    """
    errors = (signed_error(a, b).to(torch.int32) for a, b in zip(clip, recon, strict=True))
    return [int(error.square().sum(dtype=torch.int64)) for error in errors]


def signed_error(clip: Tensor, recon: Tensor) -> Tensor:
    """recon - clip as int16. clip, recon: uint8 of one shape."""
    assert clip.dtype == recon.dtype == torch.uint8
    assert clip.shape == recon.shape
    return recon.to(torch.int16) - clip.to(torch.int16)


def pooled_psnr(errors: Sequence[float], *, values: Sequence[int]) -> float:
    """PSNR of a set of clips by the mean squared error over all their values, in dB.

    errors: mse of each clip. values: t h w 3 multiplied, of each clip. At most the mean of the clips' PSNR if
    all have one size (Jensen): bad clips count more.
    """
    total = math.fsum(error * count for error, count in zip(errors, values, strict=True))
    return psnr_of_mse(total / sum(values))


def psnr_by_frame(clip: Tensor, recon: Tensor) -> list[float]:
    """PSNR of frame 0, 1, ... in dB, at most 100 each. clip, recon: uint8 t h w 3."""
    return [psnr_of_mse(total / clip[0].numel()) for total in squared_errors(clip, recon)]


def first_frame_gain(clip: Tensor, recon: Tensor) -> float | None:
    """PSNR of frame 0 minus the mean PSNR of the others, in dB; none of a single frame.

    A causal model sees nothing before frame 0 and gives it a latent frame of its own.
    """
    first, *others = psnr_by_frame(clip, recon)
    return first - math.fsum(others) / len(others) if others else None


def mean_curve(curves: Sequence[Sequence[float]]) -> list[float]:
    """Mean at each position over the curves that reach it."""
    longest = max((len(curve) for curve in curves), default=0)
    columns = [[curve[i] for curve in curves if i < len(curve)] for i in range(longest)]
    return [math.fsum(column) / len(column) for column in columns]


def ssim(clip: Tensor, recon: Tensor) -> float | None:
    """Structural similarity in [-1, 1]: mean over positions, channels and frames; none below 11x11.

    11x11 Gaussian window of deviation 1.5 where it fits whole, population covariance, constants of K = 0.01
    and 0.03 with range 255: scikit-image's structural_similarity with gaussian_weights=True, sigma=1.5,
    use_sample_covariance=False, data_range=255 for each frame. Wang et al., Image quality assessment (2004).
    clip, recon: uint8 t h w 3.
    """
    if min(clip.shape[1:3]) < WINDOW:
        return None
    frames = [_similarity(*_planes(clip, recon, frame=t))[0].mean() for t in range(len(clip))]
    return float(torch.stack(frames).mean())


def ms_ssim(clip: Tensor, recon: Tensor) -> float | None:
    """SSIM over five scales, in [0, 1]; none where a side is under 176 pixels.

    For each frame and channel: contrast and structure of all scales and luminance of the last, each a mean
    over positions with a negative one taken as 0, to the power of the scale's weight, multiplied. Mean of
    them. Scales by 2x2 means; a last odd row or column is dropped. Wang et al., Multiscale structural
    similarity (2003). clip, recon: uint8 t h w 3.
    """
    if min(clip.shape[1:3]) < MS_SSIM_SIDE:
        return None
    values = []
    for t in range(len(clip)):
        x, y = _planes(clip, recon, frame=t)
        product = x.new_ones(len(x))
        for scale, weight in enumerate(SCALE_WEIGHTS):
            last = scale == len(SCALE_WEIGHTS) - 1
            full, contrast = _similarity(x, y)
            product = product * (full if last else contrast).clamp(min=0.0) ** weight
            if not last:
                x, y = avg_pool2d(x[None], 2)[0], avg_pool2d(y[None], 2)[0]
        values.append(product.mean())
    return float(torch.stack(values).mean())


def _planes(clip: Tensor, recon: Tensor, *, frame: int) -> tuple[Tensor, Tensor]:
    """One frame of both: float64 3 h w in 0...255."""
    assert clip.dtype == recon.dtype == torch.uint8
    assert clip.shape == recon.shape
    return clip[frame].permute(2, 0, 1).double(), recon[frame].permute(2, 0, 1).double()


def _similarity(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """x, y: float64 c h w in 0...255 -> means over positions of SSIM and of its contrast and structure: c.

    Rows are worked on a few at a time: what is between then stays in the processor's cache.
    """
    rows = x.shape[1] - WINDOW + 1
    full, contrast = x.new_zeros(len(x)), x.new_zeros(len(x))
    for start in range(0, rows, STRIP):
        part = slice(start, min(start + STRIP, rows) + WINDOW - 1)
        sums = _similarity_sums(x[:, part], y[:, part])
        full, contrast = full + sums[0], contrast + sums[1]
    positions = rows * (x.shape[2] - WINDOW + 1)
    return full / positions, contrast / positions


def _similarity_sums(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """As `_similarity`, and sums in the place of means."""
    mean_x, mean_y, power, product = _smooth(torch.stack([x, y, x.square() + y.square(), x * y]))
    means = mean_x * mean_y
    squares = mean_x.square() + mean_y.square()
    # the two variances are only ever added, so one filter does for both
    contrast = (2 * (product - means) + C2) / (power - squares + C2)
    full = (2 * means + C1) / (squares + C1) * contrast
    return full.sum(dim=(1, 2)), contrast.sum(dim=(1, 2))


def _smooth(maps: Tensor) -> Tensor:
    """float64 n c h w -> n c h-10 w-10: Gaussian means where the window fits whole.

    Sums of shifted slices: many times faster than a float64 convolution.
    """
    offsets = [i - WINDOW // 2 for i in range(WINDOW)]
    weights = [math.exp(-0.5 * (offset / SIGMA) ** 2) for offset in offsets]
    for dim in (2, 3):
        size = maps.shape[dim] - WINDOW + 1
        total = maps.narrow(dim, 0, size) * (weights[0] / sum(weights))
        for start, weight in enumerate(weights[1:], start=1):
            total.add_(maps.narrow(dim, start, size), alpha=weight / sum(weights))
        maps = total
    return maps
