"""Haar wavelets over blocks of two by two pixels, of one frame or of two: apart, and together again.

The filters are constants that the published files carry, so they are buffers and what a file says holds. A
transform of three axes is not orthonormal: its values are rounded, and a round trip multiplies by 1.00026.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from causalvae.models.stream import Stream, causal_window

# Bands by their published names, in the order of channels: which of (t,) h, w are high, that is [+, -].
BANDS_3D = {
    "h": (0, 0, 0),
    "g": (0, 0, 1),
    "hh": (0, 1, 0),
    "gh": (0, 1, 1),
    "h_v": (1, 0, 0),
    "g_v": (1, 0, 1),
    "hh_v": (1, 1, 0),
    "gh_v": (1, 1, 1),
}
BANDS_2D = {"aa": (0, 0), "ad": (1, 0), "da": (0, 1), "dd": (1, 1)}
SIZE_3D, SIZE_2D = 0.3536, 0.5  # of every value of a filter, as published


class Haar(nn.Module):
    """A clip's bands: b c t h w -> b (n c) t' h/2 w/2 with the band as the outer index of channels.

    frames: blocks have two of them, n is 8 and t' = 1 + (t - 1) / 2, the first frame counting twice; else n
    is 4 and t' = t.
    """

    def __init__(self, *, frames: bool) -> None:
        super().__init__()
        self.frames = frames
        # Where the published modules have them.
        self.names = [f"{band}_conv.conv.weight" for band in BANDS_3D] if frames else list(BANDS_2D)
        _register(self, self.names, frames=frames)

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        """The bands of x, in the numbers of the filters."""
        kernel = _kernel(self, self.names, channels=x.shape[1])
        n = kernel.shape[2]
        window = causal_window(self, x, kernel=n, stride=n, stream=stream)
        return F.conv3d(window.to(kernel.dtype), kernel, stride=kernel.shape[2:])

    def reset(self) -> None:
        """Give the filters their published values."""
        _reset(self, self.names, frames=self.frames)


class InverseHaar(nn.Module):
    """A clip from its bands: b (n c) t h w -> b c t' 2h 2w, with t' = 2 t - 1 if blocks have two frames."""

    def __init__(self, *, frames: bool) -> None:
        super().__init__()
        self.frames = frames
        self.names = list(BANDS_3D if frames else BANDS_2D)
        _register(self, self.names, frames=frames)

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        """The clip, in the numbers of the filters."""
        kernel = _kernel(self, self.names, channels=x.shape[1] // len(self.names))
        y = F.conv_transpose3d(x.to(kernel.dtype), kernel, stride=kernel.shape[2:])
        if not self.frames:
            return y
        first = stream is None or stream.take(self) is None
        if stream is not None:
            stream.keep(self, x[:, :, :0])  # only that there was a chunk
        return y[:, :, 1:] if first else y

    def reset(self) -> None:
        """Give the filters their published values."""
        _reset(self, self.names, frames=self.frames)


def _register(owner: nn.Module, names: list[str], *, frames: bool) -> None:
    """Buffers 1 1 (2) 2 2 of these names, in modules inside of the owner where a name has dots."""
    for name in names:
        *parents, leaf = name.split(".")
        module = owner
        for parent in parents:
            if parent not in module._modules:
                module.add_module(parent, nn.Module())
            module = module.get_submodule(parent)
        module.register_buffer(leaf, torch.empty(1, 1, *(2,) * (3 if frames else 2)))
    _reset(owner, names, frames=frames)


@torch.no_grad()
def _reset(owner: nn.Module, names: list[str], *, frames: bool) -> None:
    bands, size = (BANDS_3D, SIZE_3D) if frames else (BANDS_2D, SIZE_2D)
    for name, high in zip(names, bands.values(), strict=True):
        buffer = owner.get_buffer(name)
        values = torch.full_like(buffer[0, 0], size)
        for axis, is_high in enumerate(high):
            if is_high:
                values.narrow(axis, 1, 1).neg_()
        buffer.copy_(values)


def _kernel(owner: nn.Module, names: list[str], *, channels: int) -> Tensor:
    """All filters, each for every channel by itself: (n c) c t 2 2."""
    filters = torch.cat([owner.get_buffer(name) for name in names])  # n 1 (t) h w
    filters = filters if filters.dim() == 5 else filters.unsqueeze(2)
    each = torch.arange(channels, device=filters.device)
    kernel = filters.new_zeros(len(names), channels, channels, *filters.shape[2:])
    kernel[:, each, each] = filters
    return kernel.flatten(0, 1)
