"""The command `init`: the first checkpoint of a model, from an image VAE or from a seed, in one file."""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from causalvae.errors import ConfigError, WeightsError
from causalvae.files import sha256, write_whole
from causalvae.models.build import build, skeleton
from causalvae.models.presets import PRESETS, OwnConfig
from causalvae.weights.inflate import (
    Method,
    config_for,
    followed_sizes,
    inflate,
    is_new,
    promise,
    read_image,
    refuse_model,
)
from causalvae.weights.published import published_config
from causalvae.weights.pytorch import write_torch
from causalvae.weights.read import own_entries
from causalvae.weights.tensorfiles import write_safetensors
from causalvae.weights.writing import to_dtype


@dataclass(frozen=True)
class First:
    """The first weights of a model. said: lines of the block that is printed, as pairs of label and text."""

    config: OwnConfig
    tensors: dict[str, Tensor]
    said: tuple[tuple[str, str], ...]


def initialise(
    source: Path | None, out: Path, *, model: str, method: Method = "tail", seed: int = 0, overwrite: bool
) -> str:
    """Write the first weights of a preset, and return what to tell the user.

    source: an image VAE; None for weights that follow from the seed. out: a torch file or .safetensors, in
    fp32. WeightsError and ConfigError for what can't be, before anything is written.
    """
    written = [out] if published_config(PRESETS[model]) is None else [out, settings_beside(out)]
    _refuse_place(written, overwrite=overwrite)
    first = _from_seed(model, seed=seed) if source is None else _from_image(source, model, method=method)
    beside = _write(out, first)
    shown = [*first.said, ("SHA-256", sha256(out))]
    if beside is not None:
        shown.append(("settings", f"{beside}, as the published code reads them"))
    block = "".join(f"  {label:9} {text}\n" for label, text in shown)
    return (
        f"Wrote {out}\n{block}Next: your own videos\n"
        f"  causalvae train --load_from_checkpoint {out} --video_path FOLDER --batch_size 1\n"
    )


def _refuse_place(files: Sequence[Path], *, overwrite: bool) -> None:
    """ConfigError if a file is there and may not be replaced, or if the folder can't be written to."""
    out = files[0]
    for path in files:
        if path.is_dir():
            raise ConfigError(f"--out {out}: {path} is a folder; name a file")
        if path.exists() and not overwrite:
            raise ConfigError(
                f"--out {out}: {path} is there already and stays as it is; name another file, or add "
                "--overwrite True"
            )
    folder = next(each for each in out.absolute().parents if each.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        what = "can't be written to" if folder.is_dir() else "is no folder"
        raise ConfigError(f"--out {out}: {folder} {what}; choose another place")


def settings_beside(out: Path) -> Path:
    """Where the published settings go. Not config.json, which would stand for all files in the folder."""
    return out.with_suffix(".json")


def _from_image(source: Path, model: str, *, method: Method) -> First:
    refuse_model(model, PRESETS[model])
    if not source.exists():
        raise ConfigError(
            f"--from {source}: there is no such file or folder. Name an image VAE, or give --random True for "
            "weights without one"
        )
    try:
        image = read_image(source)
    except WeightsError as error:
        raise WeightsError(f"--from {error}") from error
    path, found = image.file.origin.path, {name: tuple(t.shape) for name, t in image.tensors.items()}
    try:
        config = config_for(found, model)
    except WeightsError as error:
        raise WeightsError(f"--from {path}: {error}") from error
    tensors = inflate(to_dtype(image.tensors, "fp32"), config, method=method)
    new = [name for name in tensors if is_new(name, image.tensors)]
    grown = sum(tensor.dim() == 5 for name, tensor in tensors.items() if name not in new)
    sizes = followed_sizes(config, model)
    said = (
        (
            "from",
            f"{path} ({image.family}, {len(image.tensors)} tensors, SHA-256 {image.file.origin.sha256})",
        ),
        ("model", sizes or model),
        ("taken", f"{len(tensors) - len(new)} tensors, {grown} of them kernels that got time ({method})"),
        ("new", _new(new)),
        ("holds", f"before any training, {promise(config)}"),
        ("size", _size(config)),
        *(("note", note) for note in image.file.notes),
    )
    return First(config, tensors, said)


def _new(names: list[str]) -> str:
    """What the image VAE had nothing for, in words."""
    if not names:
        return "nothing"
    quant = sum("quant_conv." in name for name in names)
    parts = [(len(names) - quant, "for halving and doubling time"), (quant, "for quant_conv, which it lacks")]
    counted = " and ".join(f"{count} tensors {what}" for count, what in parts if count)
    return f"{counted}; they start as the identity"


def _from_seed(model: str, *, seed: int) -> First:
    config = PRESETS[model]
    tensors = dict(build(config, seed=seed).state_dict())
    said = (
        ("model", model),
        ("new", f"all {len(tensors)} tensors: random numbers that follow from --seed {seed}"),
        ("size", _size(config)),
    )
    return First(config, tensors, said)


def _size(config: OwnConfig) -> str:
    geometry = config.geometry
    count = sum(math.prod(p.shape) for p in skeleton(config).parameters() if p.requires_grad)
    reduced = f"{geometry.temporal} x {geometry.spatial} x {geometry.spatial}"
    return f"{count:,} parameters; time, height and width {reduced} smaller, {geometry.channels} channels"


def _write(out: Path, first: First) -> Path | None:
    """The file, and beside it the settings for the published code if it has such a model: their path."""
    entries = own_entries(first.config)
    if out.suffix.lower() == ".safetensors":
        write_safetensors(out, first.tensors, metadata=entries)
    else:
        write_torch(out, first.tensors, layout="state_dict", texts=entries)
    published = published_config(first.config)
    beside = settings_beside(out)
    if published is None:
        return None
    write_whole(beside, json.dumps(published, indent=2) + "\n")
    return beside
