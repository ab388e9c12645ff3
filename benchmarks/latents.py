"""Latents per second that training can read from a set, as a Markdown table.

    python benchmarks/latents.py [--count 20000] [--shape 5 4 32 32]

Makes a set of random numbers in the folder for temporary files (820 MB with these flags), reads it once so
that it is in memory, and then reads all of it in each way. The second number is for busy machines.
"""

import argparse
import os
import resource
import tempfile
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from causalvae import rng
from causalvae.latentdata import Latents, latents
from causalvae.latentfiles import Sample
from causalvae.latentset import FORMAT, LatentSet, PartRecords, merge, moments_to_record, open_set
from causalvae.moments import ChannelMoments

PER_SHARD = 1000
BATCH = 64


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Latents per second.")
    parser.add_argument("--count", type=int, default=20000)
    parser.add_argument("--shape", nargs=4, type=int, default=[5, 4, 32, 32], help="k c h w")
    asked = parser.parse_args()
    k, c, h, w = asked.shape
    size = k * c * h * w * 2 / 1024
    print(
        f"{asked.count:,} latents of {c}x{k}x{h}x{w}, fp16, {size:.0f} KiB each, normalised to fp32; ", end=""
    )
    print(f"{os.cpu_count()} cores\n\n| what | latents/s | per second of processor time |\n|---|---|---|")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        _make(Path(folder) / "set", count=asked.count, shape=(k, c, h, w))
        found = latents(Path(folder) / "set")
        for tar in (Path(folder) / "set").glob("*.tar"):
            tar.read_bytes()
        for name, batches in _ways(found):
            wall, processor = _speeds(batches)
            print(f"| {name} | {wall:,.0f} | {processor:,.0f} |", flush=True)


def _ways(found: Latents) -> Iterator[tuple[str, Iterable[Any]]]:
    """What is measured: batches, one after the other."""
    yield "one process, in order", _batched(found.stream(shuffle=False))
    yield "one process, shuffled", _batched(found.stream())
    for workers in (1, 2):
        stream = found.stream(batch_size=BATCH)
        loader = DataLoader(stream, batch_size=BATCH, num_workers=workers)
        yield f"DataLoader, {workers} workers, shuffled, batches of {BATCH}", loader


def _batched(items: Iterable[Any]) -> Iterator[list[Any]]:
    rest = iter(items)
    while batch := list(islice(rest, BATCH)):
        yield batch


def _speeds(batches: Iterable[Any]) -> tuple[float, float]:
    """Latents per second, and per second of processor time of all processes, over the whole set."""
    taken, begun, spent = 0, time.perf_counter(), _processor_seconds()
    for batch in batches:
        taken += len(batch) if isinstance(batch, list) else len(batch["latent"])
    return taken / (time.perf_counter() - begun), taken / (_processor_seconds() - spent)


def _processor_seconds() -> float:
    """Of this process and of those that it started and that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def _make(out: Path, *, count: int, shape: tuple[int, int, int, int]) -> None:
    """A set of random numbers, one latent for each video."""
    facts = {
        "format": FORMAT,
        "model": {"sha256": "none"},
        "geometry": {"channels": shape[1]},
        "store": "mean",
        "container": "shards",
        "videos_per_shard": PER_SHARD,
        "videos": count,
        "made_by": {},
    }
    found, _ = open_set(out, facts)
    for part in range(found.num_parts):
        with found.held(part):
            _make_part(found, part, shape=shape)
    merge(found)


def _make_part(found: LatentSet, part: int, *, shape: tuple[int, int, int, int]) -> None:
    made = PartRecords(found, part)
    numbers = rng.normal(shape, rng.key("benchmark", part)).half()
    moments = ChannelMoments.of(numbers.transpose(0, 1).flatten(1))
    for number in found.videos_of(part):
        record = {"video": f"{number}.mp4", "number": number, "frames": 17, "height": 256, "width": 256}
        sample = Sample(f"{number:08d}", ("mean",), shape, "fp16", record)
        (place,) = made.files.begin([sample])
        place.write("mean", numbers, at=0)
        line = {"samples": [made.line(place)], "moments": moments_to_record(moments)}
        made.add({"number": number, **made.files.commit(), **line})
    made.finish()
    made.files.close()


if __name__ == "__main__":
    main()
