"""Resampling without weights, and the way back of its gradients: means, interpolation and repetition.

All of it is slices and sums, which are deterministic on every device: the backward passes of the library's
3D pooling and interpolation are not.
"""

import torch
from torch import Tensor


def halved(window: Tensor) -> Tensor:
    """Means of three frames, every second one: b c (1 + 2 t') h w -> b c t' h w."""
    return (window[:, :, 0:-2:2] + window[:, :, 1:-1:2] + window[:, :, 2::2]) / 3


def doubled(x: Tensor) -> Tensor:
    """Linear between the frames after the first: b c t h w -> b c (1 + 2 (t - 1)) h w."""
    if torch.compiler.is_exporting():
        return _doubled_by_number(x)
    known = x[:, :, 1:]
    if known.shape[2] == 0:
        return x
    return torch.cat([x[:, :, :1], known[:, :, :1], between(known), known[:, :, -1:]], dim=2)


def _doubled_by_number(x: Tensor) -> Tensor:
    """What `doubled` gives, frame by frame from its number: the same work for one frame and for many.

    For programs, which have to hold for any number of frames and can't ask whether there are two.
    """
    frames = x.shape[2]
    number = torch.arange(2 * frames - 1, device=x.device)
    near = (number + 1) // 2  # of frame 0, then twice each of the others
    far = (near + 1 - 2 * (number % 2)).clamp(min=1).clamp(max=frames - 1)
    far = torch.where(number == 0, near, far)
    share = torch.where(near == far, 0.0, 0.25).to(x.dtype)[:, None, None]
    return (1 - share) * x.index_select(2, near) + share * x.index_select(2, far)


def between(known: Tensor) -> Tensor:
    """The two frames between every two neighbours: b c n h w -> b c 2(n - 1) h w."""
    u, v = known[:, :, :-1], known[:, :, 1:]
    return torch.stack([0.75 * u + 0.25 * v, 0.25 * u + 0.75 * v], dim=3).flatten(2, 3)


def pull_doubled(grad: Tensor) -> Tensor:
    """Gradient for what was doubled."""
    if grad.shape[2] == 1:
        return grad
    near, far = grad[:, :, 2:-1:2], grad[:, :, 3:-1:2]
    dx = grad[:, :, 1::2].clone()  # every other frame: a tensor with as many frames as `known`
    dx[:, :, 1:] = 0
    dx[:, :, -1] += grad[:, :, -1]
    dx[:, :, :-1] += 0.75 * near + 0.25 * far
    dx[:, :, 1:] += 0.25 * near + 0.75 * far
    return torch.cat([grad[:, :, :1], dx], dim=2)


def upsampled(x: Tensor) -> Tensor:
    """Each position four times: b c t h w -> b c t 2h 2w."""
    b, c, t, h, w = x.shape
    if not _channels_last(x):
        return x[..., None, :, None].expand(b, c, t, h, 2, w, 2).reshape(b, c, t, 2 * h, 2 * w)
    positions = x.permute(0, 2, 3, 4, 1)[:, :, :, None, :, None]  # b t h 1 w 1 c
    return positions.expand(b, t, h, 2, w, 2, c).reshape(b, t, 2 * h, 2 * w, c).movedim(-1, 1)


def downsummed(x: Tensor) -> Tensor:
    """Sums of two by two positions: b c t 2h 2w -> b c t h w."""
    return (x[..., ::2, ::2] + x[..., ::2, 1::2]) + (x[..., 1::2, ::2] + x[..., 1::2, 1::2])


def widened(x: Tensor) -> Tensor:
    """Linear along height and width, ends repeated: b c t h w -> b c t 2h 2w."""
    last = _channels_last(x)
    y = x.movedim(1, -1) if last else x
    for dim in (2, 3) if last else (3, 4):
        n = y.shape[dim]
        u, v = y.narrow(dim, 0, n - 1), y.narrow(dim, 1, n - 1)
        inner = torch.stack([0.75 * u + 0.25 * v, 0.25 * u + 0.75 * v], dim=dim + 1).flatten(dim, dim + 1)
        y = torch.cat([y.narrow(dim, 0, 1), inner, y.narrow(dim, n - 1, 1)], dim=dim)
    return y.movedim(-1, 1) if last else y


def pull_widened(grad: Tensor) -> Tensor:
    """Gradient for what was widened."""
    last = _channels_last(grad)
    g = grad.movedim(1, -1) if last else grad
    for dim in (3, 2) if last else (4, 3):
        pairs = g.unflatten(dim, (-1, 2))
        near, far = pairs.select(dim + 1, 0), pairs.select(dim + 1, 1)
        n = near.shape[dim]
        dx = 0.75 * (near + far)
        dx.narrow(dim, 0, 1).add_(near.narrow(dim, 0, 1), alpha=0.25)
        dx.narrow(dim, n - 1, 1).add_(far.narrow(dim, n - 1, 1), alpha=0.25)
        dx.narrow(dim, 0, n - 1).add_(near.narrow(dim, 1, n - 1), alpha=0.25)
        dx.narrow(dim, 1, n - 1).add_(far.narrow(dim, 0, n - 1), alpha=0.25)
        g = dx
    return g.movedim(-1, 1) if last else g


def _channels_last(x: Tensor) -> bool:
    if torch.compiler.is_exporting():  # the answer would become part of the program
        return False
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last_3d)
