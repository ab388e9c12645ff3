"""Clips of models that can't stream: windows that overlap in time and are blended.

A causal model takes the first frame of whatever it is given as the start of a clip. So a window begins where
a latent frame ends, on the last frame that it covers, and what the window says of that one has weight zero.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch
from torch import Tensor

from causalvae.tiles import Tally
from causalvae.video import at_least_fp32

Output = TypeVar("Output")


@dataclass
class Windows(Generic[Output]):
    """One clip through a model, window by window.

    run: the model, b c n h w -> b c n' h w, where n is 1 + each_in * i and n' is 1 + each_out * i for a
    window of 1 + i latent frames. wrap: what is made of the output. judged: channels of it that the tally
    compares. latents: latent frames of a window, of which `overlap` are shared with the one before;
    latents - 1 and overlap - 1 are multiples of group, and neither is zero.
    """

    run: Callable[[Tensor], Tensor]
    wrap: Callable[[Tensor], Output]
    each_in: int
    each_out: int
    judged: int
    latents: int
    overlap: int
    group: int = 1
    tally: Tally = field(default_factory=Tally)
    _waiting: Tensor | None = None
    _tail: Tensor | None = None  # of the window before, where the next one overlaps

    @torch.inference_mode()
    def push(self, x: Tensor) -> Output | None:
        """x: b c n h w, any n >= 1. What is certain, or None if nothing is."""
        joined = x if self._waiting is None else torch.cat([self._waiting, x], dim=2)
        window, step = 1 + self.each_in * (self.latents - 1), self.each_in * (self.latents - self.overlap)
        made: list[Tensor] = []
        while joined.shape[2] >= window:
            made.append(self._blended(self.run(joined[:, :, :window]), last=False))
            joined = joined[:, :, step:]
        self._waiting = joined.clone()
        return self.wrap(torch.cat(made, dim=2)) if made else None

    @torch.inference_mode()
    def close(self) -> Output | None:
        """The rest. What is missing of the last latent frame, or group, is its last frame repeated."""
        waiting, tail = self._waiting, self._tail
        self._waiting = self._tail = None
        if waiting is None:
            return None
        shared = 0 if tail is None else 1 + self.each_in * (self.overlap - 1)
        if waiting.shape[2] == shared:
            return None if tail is None else self.wrap(tail)
        self._tail = tail
        missing = -(waiting.shape[2] - 1) % (self.each_in * self.group)
        padded = torch.cat([waiting, waiting[:, :, -1:].expand(-1, -1, missing, -1, -1)], dim=2)
        made = self.run(padded)
        if self.each_in == 1:  # latents that were added
            made = made[:, :, : 1 + self.each_out * (waiting.shape[2] - 1)]
        return self.wrap(self._blended(made, last=True))

    def _blended(self, made: Tensor, *, last: bool) -> Tensor:
        """What is certain after a window: its start blended with the end of the one before."""
        made, shared = at_least_fp32(made), 1 + self.each_out * (self.overlap - 1)
        if self._tail is not None:
            head = made[:, :, :shared]
            weight = torch.arange(shared, device=made.device, dtype=made.dtype)[:, None, None] / shared
            before = self._tail[:, : self.judged, 1:]
            self.tally.add(head[:, : self.judged, 1:] - before, before, values=before.numel())
            made = torch.cat([torch.lerp(self._tail, head, weight), made[:, :, shared:]], dim=2)
        certain = made.shape[2] if last else made.shape[2] - shared
        self._tail = None if last else made[:, :, certain:].clone()
        return made[:, :, :certain]
