"""Folders as diffusers saves models: config.json beside one file of weights, or shards and their index."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from causalvae.errors import WeightsError
from causalvae.files import write_whole
from causalvae.weights.tensorfiles import INDEX_SUFFIX, write_safetensors
from causalvae.weights.writing import aside, num_bytes_of

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model"
NAMES = tuple(
    f"{stem}{ending}{index}"
    for stem in (WEIGHTS, "model", "pytorch_model")
    for ending in (".safetensors", ".bin")
    for index in ("", INDEX_SUFFIX)
)


def find_diffusers(folder: Path) -> Path | None:
    """The file of weights, or the index, of a model's folder; None if it is none of this kind.

    The folder of a whole pipeline stands for the autoencoder in it.
    """
    for place in (folder, folder / "vae"):
        for name in NAMES:
            if (place / CONFIG).is_file() and (place / name).is_file():
                return place / name
    return None


def write_diffusers(
    folder: Path,
    config: Mapping[str, Any],  # Any: JSON values
    tensors: Mapping[str, Tensor],
    *,
    metadata: Mapping[str, str],
    shard_size: int | None = None,
) -> None:
    """Write a folder that diffusers loads. WeightsError if the folder is there and not empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise WeightsError(f"{folder}: is there already; name a folder that is not, or that is empty")
    with aside([folder], num_bytes=num_bytes_of(tensors)) as (partial,):
        partial.mkdir()
        write_whole(partial / CONFIG, json.dumps(dict(config), indent=2, sort_keys=True) + "\n")
        write_safetensors(
            partial / f"{WEIGHTS}.safetensors", tensors, metadata=metadata, shard_size=shard_size
        )
