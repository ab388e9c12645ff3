"""Latents for training: `causalvae.latents(path)`, a torch dataset over the folder of `causalvae encode`.

The index is read once, for where its lines are; a latent is then one line and one read at its place, in any
order and in any process. Shuffling and samples are functions of (seed, epoch, position), so no state exists.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from causalvae import rng
from causalvae.errors import ConfigError, RunError
from causalvae.flags import printable
from causalvae.latentfiles import Record
from causalvae.latentreader import LatentFiles
from causalvae.latentset import INDEX, STATS, read_facts
from causalvae.latentstats import count_samples, read_statistics

SCAN_BYTES = 1 << 24
Normalise = Literal["channel", "scale", "none"]


def latents(
    path: str | Path,
    *,
    normalise: Normalise = "channel",
    sample: bool = True,
    seed: int = 0,
    epoch: int = 0,
) -> "Latents":
    """The latents in a folder of `causalvae encode`, by number.

    normalise: `channel` gives each channel mean 0 and deviation 1 by stats.json, `scale` multiplies by its
    scaling factor, `none` gives what is stored. sample: where mean and variance are stored, draw by
    (seed, epoch, latent); without, the mean. ConfigError if the folder has no whole set.
    """
    return Latents(Path(path), normalise=normalise, sample=sample, seed=seed, epoch=epoch)


class Latents(Dataset[dict[str, Any]]):  # Any: a latent and texts
    """See `latents`. facts: what set.json says."""

    def __init__(self, path: Path, *, normalise: Normalise, sample: bool, seed: int, epoch: int) -> None:
        self.path, self.facts = path, read_facts(path)
        self._sample, self._keys = sample, (seed, epoch)
        self._normalise: Normalise = normalise
        self._files = LatentFiles(path)
        self._starts = _line_starts(path)
        self._scale, self._shift = _factors(path / STATS, normalise, channels=self.channels)

    @property
    def channels(self) -> int:
        """Of each latent."""
        return int(self.facts["geometry"]["channels"])

    def at(self, *, epoch: int) -> "Latents":
        """The same set with other samples."""
        return Latents(
            self.path, normalise=self._normalise, sample=self._sample, seed=self._keys[0], epoch=epoch
        )

    def stream(
        self,
        *,
        shuffle: bool = True,
        rank: int = 0,
        world: int = 1,
        batch_size: int = 1,
    ) -> "LatentStream":
        """The set one after the other, in an order that is a function of (seed, epoch, position).

        Of `world` processes each takes every world-th one, all the same number, which leaves up to world - 1
        out. The workers of a DataLoader share them; batch_size: that of the DataLoader, so that its batches
        are the same for any number of workers.
        """
        if not 0 <= rank < world:
            raise ConfigError(f"rank {rank} of {world} processes: must be 0 to {world - 1}")
        return LatentStream(self, shuffle=shuffle, rank=rank, world=world, batch_size=batch_size)

    def place(self, position: int) -> int:
        """The number of the latent at a position of the shuffled order."""
        return rng.permuted(position, len(self), rng.key("latents", *self._keys))

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, number: int) -> dict[str, Any]:  # Any: as above
        """latent: c k h w fp32; key; caption, empty where there is none."""
        record = self.record(number)
        tensors = self._files.tensors(record)
        latent = tensors.get("sample", tensors.get("mean"))
        assert latent is not None
        if self._sample and "logvar" in tensors:
            noise = [
                rng.normal(frame.shape, rng.key("draw", *self._keys, record["key"], i))
                for i, frame in enumerate(latent)
            ]
            latent = latent.float() + (0.5 * tensors["logvar"].float()).exp() * torch.stack(noise)
        z = latent.transpose(0, 1).to(torch.float32, memory_format=torch.contiguous_format)  # c k h w
        if self._scale is not None:
            z = z.mul_(self._scale)
        if self._shift is not None:
            z = z.add_(self._shift)
        return {"latent": z, "key": record["key"], "caption": record.get("caption", "")}

    def record(self, number: int) -> Record:
        """What the index says of a latent: its video, frames, size, rate."""
        if not -len(self) <= number < len(self):
            raise IndexError(f"latent {number} of {len(self)}")
        number %= len(self)
        start, end = int(self._starts[number]), int(self._starts[number + 1])
        try:
            found = json.loads(self._files.read(INDEX, end - start, offset=start))
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise RunError(
                f"{self.path / INDEX}, line {number + 1}: damaged; give the encode command again, which "
                "writes it anew",
                status=1,
            )
        return found


class LatentStream(IterableDataset[dict[str, Any]]):  # Any: as above
    """See `Latents.stream`."""

    def __init__(self, found: Latents, *, shuffle: bool, rank: int, world: int, batch_size: int) -> None:
        self._found, self._shuffle = found, shuffle
        self._rank, self._world, self._batch_size = rank, world, batch_size

    def __len__(self) -> int:
        return len(self._found) // self._world

    def __iter__(self) -> Iterator[dict[str, Any]]:  # Any: as above
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        for position in range(len(self)):
            if position // self._batch_size % workers == worker:
                number = position * self._world + self._rank
                yield self._found[self._found.place(number) if self._shuffle else number]


def _line_starts(path: Path) -> np.ndarray:
    """Where each line of the index begins, and where the last one ends: int64.

    ConfigError if there is no index, or not that of the set.
    """
    starts, offset = [np.zeros(1, np.int64)], 0
    try:
        samples = count_samples(path / STATS)
        with (path / INDEX).open("rb") as file:
            while block := file.read(SCAN_BYTES):
                ends = np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n"))
                starts.append(ends.astype(np.int64) + offset + 1)
                offset += len(block)
    except OSError as error:
        raise ConfigError(
            f"{printable(str(path))}: {INDEX}: {error.strerror}; the set is not whole: give the encode "
            "command again, which goes on"
        ) from error
    found = np.concatenate(starts)
    if len(found) != samples + 1 or found[-1] != offset:
        raise ConfigError(
            f"{printable(str(path / INDEX))}: damaged: {len(found) - 1} lines, and the set has {samples} "
            "latents; give the encode command again, which writes it anew"
        )
    return found


def _factors(path: Path, normalise: Normalise, *, channels: int) -> tuple[Tensor | None, Tensor | None]:
    """What a latent is multiplied by, and what is then added: c 1 1 1 each."""
    if normalise == "none":
        return None, None
    found = read_statistics(path)
    if normalise == "scale":
        return torch.tensor(found.scaling_factor), None
    mean, deviation = torch.tensor([found.mean, found.deviation], dtype=torch.float64)
    if len(mean) != channels:
        raise ConfigError(f"{printable(str(path))}: of {len(mean)} channels, and the latents have {channels}")
    scale = 1.0 / deviation
    return scale.float().view(-1, 1, 1, 1), (-mean * scale).float().view(-1, 1, 1, 1)
