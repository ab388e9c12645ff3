"""Evaluations as a user starts them, and weights for them."""

import json
from pathlib import Path
from typing import Any

from causalvae import rng
from causalvae.cli import main
from causalvae.models.build import build
from causalvae.models.presets import PRESETS
from causalvae.weights.read import own_entries
from causalvae.weights.tensorfiles import write_safetensors

WORDS = ["--num_frames", "5", "--resolution", "32", "--clips_per_video", "3", "--device", "cpu"]


def moved_tiny(path: Path) -> Path:
    """A file of a tiny model whose weights are its first ones and a little noise."""
    vae = build(PRESETS["tiny"])
    shifted = {
        name: tensor + 0.002 * rng.normal(tensor.shape, rng.key("moved", name))
        for name, tensor in vae.state_dict().items()
    }
    write_safetensors(path, shifted, metadata=own_entries(vae.config))
    return path


def result_in(out: Path, start: str = "tiny") -> dict[str, Any]:
    (file,) = out.glob(f"{start}*.json")
    return json.loads(file.read_text())


def numbers(result: dict[str, Any]) -> dict[str, Any]:
    """What does not depend on the clock or on where files are."""
    return {name: result[name] for name in ("metrics", "curves", "latents", "clips", "manifest")}


def run(out: Path, *words: object) -> int:
    return main("eval", [*WORDS, "--out", str(out), *map(str, words)])
