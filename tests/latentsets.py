"""Sets of latents for tests: a tiny model, short films, and the command as a user gives it."""

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from media import write_film

from causalvae.cli import main
from causalvae.data.decode import read_frames
from causalvae.data.sources import open_source
from causalvae.encoding import Encoded, Maker, Recipe, Share, Store, encode_videos
from causalvae.footage import Cut
from causalvae.latentfiles import DtypeName
from causalvae.latentset import FORMAT
from causalvae.models.build import Model, build
from causalvae.models.presets import PRESETS
from causalvae.video import pad_frames, pad_size, to_model
from causalvae.weights.load import load_model

WORDS = ["--device", "cpu", "--memory", "1GiB"]
CLIPS = ["--num_frames", "5", "--resolution", "32", "--clips_per_video", "2"]
NUMPY = {"F16": np.float16, "F32": np.float32}


def films(folder: Path, *, count: int = 4) -> Path:
    """A folder of short films, of one size, and of 8 frames and more."""
    folder.mkdir(parents=True)
    for number in range(count):
        write_film(folder / f"{number}.mp4", frames=8 + 5 * number, size=(32 + 8 * (number % 2), 40))
    return folder


@dataclass(frozen=True, kw_only=True)
class Job:
    """The work of the command with a model that is there already, and all the memory that it wants."""

    vae: Model
    cut: Cut = field(default_factory=lambda: Cut(frames=5, size=(32, 32), per_video=2))
    container: str = "shards"
    per_shard: int = 64
    store: Store = "mean"
    dtype: DtypeName = "fp16"
    seed: int = 0

    def encode(self, videos: object, out: Path, *, share: Share | None = None, workers: int = 0) -> Encoded:
        source = open_source(str(videos))
        recipe = Recipe(cut=self.cut, store=self.store, dtype=self.dtype, seed=self.seed)
        facts = {
            "format": FORMAT,
            "model": {"sha256": "that of tests"},
            "geometry": {"channels": self.vae.geometry.channels},
            "store": self.store,
            "container": self.container,
            "videos_per_shard": self.per_shard,
            "videos": len(source),
            "memory_bytes": None,
            "made_by": {},
        }
        maker = Maker(vae=self.vae, recipe=recipe, model="that of tests")
        return encode_videos(source, out, facts=facts, maker=maker, share=share or Share(), workers=workers)


def encode(videos: object, weights: Path, out: Path, *words: object) -> int:
    flags = ["--checkpoint", str(weights), "--out", str(out), *map(str, words)]
    return main("encode", [str(videos), *WORDS, *flags])


def model(weights: Path) -> Model:
    vae = build(PRESETS["tiny"])
    vae.load_state_dict(load_model(weights).tensors)
    return vae.eval().requires_grad_(False)


def clip_input(path: Path, frames: range, vae: Model) -> torch.Tensor:
    """Frames of a film as the model gets them: 1 3 t h w."""
    pixels = read_frames(path, list(frames)).permute(3, 0, 1, 2)[None]
    return pad_frames(pad_size(to_model(pixels), vae.geometry), vae.geometry)


def digests(folder: Path) -> dict[str, str]:
    """Every file of a set by its name, but those that tell how far something is."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith(".")]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def by_standard_library(tar: Path) -> Iterator[tuple[str, dict[str, Any], dict[str, np.ndarray]]]:
    """Key, record and tensors of a tar file, with nothing of ours."""
    with tarfile.open(tar) as archive:
        files = {member.name: archive.extractfile(member) for member in archive}
        for name, file in files.items():
            key, ending = name.split(".", 1)
            if ending != "safetensors":
                continue
            assert file is not None
            beside = files[f"{key}.json"]
            assert beside is not None
            yield key, json.load(beside), _tensors(file.read())


def _tensors(data: bytes) -> dict[str, np.ndarray]:
    stream = io.BytesIO(data)
    header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    first = stream.tell()
    found = {}
    for name, facts in header.items():
        if name != "__metadata__":
            start, end = (first + place for place in facts["data_offsets"])
            found[name] = np.frombuffer(data[start:end], NUMPY[facts["dtype"]]).reshape(facts["shape"])
    return found
