"""The stream is an argument: what one pass over one clip remembers from chunk to chunk.

A causal layer called with `stream=None` sees the whole clip. With a `Stream` it takes what it needs of the
past from it and leaves what the next chunk needs, so that any plan of chunks gives what the whole clip gives.
"""

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from causalvae.errors import ConfigError

if TYPE_CHECKING:
    from causalvae.geometry import Geometry
    from causalvae.models.base import Posterior


class Stream:
    """Frames that layers keep between chunks, keyed by module.

    `last` is true while the last chunk goes through.
    """

    def __init__(self) -> None:
        self.last = False
        self._kept: dict[nn.Module, Tensor] = {}
        self._parts: dict[Hashable, Stream] = {}

    def take(self, owner: nn.Module) -> Tensor | None:
        """What this module kept from the chunk before, or None in the first chunk."""
        return self._kept.get(owner)

    def keep(self, owner: nn.Module, frames: Tensor) -> None:
        """Leave frames for the next chunk. Cloned, because a view would keep the whole chunk alive."""
        self._kept[owner] = frames.clone()

    def part(self, name: Hashable) -> "Stream":
        """The stream of a part of the frame that goes through the same modules by itself, such as a tile."""
        part = self._parts.setdefault(name, Stream())
        part.last = self.last
        return part

    @property
    def num_bytes(self) -> int:
        """Memory of the frames that are kept."""
        own = sum(frames.numel() * frames.element_size() for frames in self._kept.values())
        return own + sum(part.num_bytes for part in self._parts.values())


def causal_window(owner: nn.Module, x: Tensor, *, kernel: int, stride: int, stream: Stream | None) -> Tensor:
    """x with its past in front: b c t h w -> b c (past + t) h w.

    The past of a first chunk is its first frame, kernel - 1 times. Leaves the frames that the next window
    starts with.
    """
    if kernel == 1 and stride == 1:
        return x
    past = stream.take(owner) if stream is not None else None
    # The frame is listed and not expanded: joined with an expanded tensor, x loses its layout in memory.
    before = [x[:, :, :1]] * (kernel - 1) if past is None else [past]
    window = torch.cat([*before, x], dim=2)
    if stream is not None:
        num_out = (window.shape[2] - kernel) // stride + 1
        stream.keep(owner, window[:, :, num_out * stride :])
    return window


class Streamable(Protocol):
    """What a stream needs of a model, or of a way to run one."""

    @property
    def geometry(self) -> "Geometry":
        """Downsample factors and latent channels."""
        ...

    def encode(self, x: Tensor, stream: Stream | None = None) -> "Posterior":
        """x: b 3 t h w -> posterior of b c k h w."""
        ...

    def decode(self, z: Tensor, stream: Stream | None = None) -> Tensor:
        """z: b c k h w -> b 3 t h w."""
        ...


class ClipStream:
    """One clip through a model in pieces of any length: what `vae.stream()` gives.

    Encoding and decoding are two passes that know nothing of each other. ConfigError for a model that can't
    stream, with the reason, and for a piece after the end.
    """

    def __init__(self, vae: Streamable, *, why_not: str) -> None:
        if why_not:
            raise ConfigError(f"this model can't stream: {why_not}")
        self._frames, self._latents = EncodeStream(vae), DecodeStream(vae)

    def encode(self, x: Tensor) -> "Posterior | None":
        """x: b 3 t h w in [-1, 1], any t >= 1. The posterior of what is complete, or None."""
        return self._frames.push(x)

    def finish_encoding(self) -> "Posterior | None":
        """The posterior of the frames still waiting, the last one repeated; None if none wait."""
        return self._frames.close()

    def decode(self, z: Tensor) -> Tensor | None:
        """z: b c k h w, any k >= 1: the frames that are certain, b 3 t h w, if any."""
        return self._latents.push(z)

    def finish_decoding(self) -> Tensor | None:
        """The frames that were held back; None if nothing was decoded."""
        return self._latents.close()


@dataclass
class EncodeStream:
    """Frames in, in pieces of any length; posteriors of the latent frames that they complete out.

    Nothing is computed twice. The first chunk that reaches the model has 1 + 4a frames, later ones 4a.
    """

    vae: Streamable
    _stream: Stream = field(default_factory=Stream)
    _waiting: list[Tensor] = field(default_factory=list)
    _started: bool = False
    _closed: bool = False

    @torch.inference_mode()
    def push(self, x: Tensor) -> "Posterior | None":
        """x: b 3 t h w in [-1, 1], any t >= 1. The posterior of what is complete, or None if nothing is."""
        self._refuse_if_closed()
        self._waiting.append(x)
        factor = self.vae.geometry.temporal
        frames = sum(piece.shape[2] for piece in self._waiting)
        spare = frames % factor if self._started else (frames - 1) % factor
        return self._run(frames - spare)

    @torch.inference_mode()
    def close(self) -> "Posterior | None":
        """The posterior of frames still waiting, the last one repeated to fill the latent frame.

        None if none wait.
        """
        self._refuse_if_closed()
        self._closed = True
        frames = sum(piece.shape[2] for piece in self._waiting)
        if frames == 0:
            return None
        factor = self.vae.geometry.temporal
        missing = -frames % factor if self._started else -(frames - 1) % factor
        self._waiting.append(self._waiting[-1][:, :, -1:].expand(-1, -1, missing, -1, -1))
        return self._run(frames + missing)

    def _run(self, frames: int) -> "Posterior | None":
        if frames == 0:
            return None
        joined = torch.cat(self._waiting, dim=2)
        # Cloned: a view would keep the whole chunk alive.
        self._waiting = [joined[:, :, frames:].clone()] if joined.shape[2] > frames else []
        self._started = True
        return self.vae.encode(joined[:, :, :frames], self._stream)

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise ConfigError("this stream was closed; ask the model for a new one with vae.stream()")


@dataclass
class DecodeStream:
    """Latent frames in, in pieces of any length; frames out as soon as they are certain.

    One latent frame is held back, because a layer that looks ahead has to know which chunk is the last.
    """

    vae: Streamable
    _stream: Stream = field(default_factory=Stream)
    _waiting: Tensor | None = None
    _closed: bool = False

    @torch.inference_mode()
    def push(self, z: Tensor) -> Tensor | None:
        """z: b c k h w, any k >= 1. The frames that are certain, b 3 t h w, or None."""
        self._refuse_if_closed()
        joined = z if self._waiting is None else torch.cat([self._waiting, z], dim=2)
        self._waiting = joined[:, :, -1:].clone()
        if joined.shape[2] == 1:
            return None
        return self.vae.decode(joined[:, :, :-1], self._stream)

    @torch.inference_mode()
    def close(self) -> Tensor | None:
        """The frames of the latent frame that was held back; None if nothing was pushed."""
        self._refuse_if_closed()
        self._closed = True
        if self._waiting is None:
            return None
        self._stream.last = True
        return self.vae.decode(self._waiting, self._stream)

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise ConfigError("this stream was closed; ask the model for a new one with vae.stream()")
