"""Folders of the diffusers library: a config.json and safetensors, read without running anything in them.

What is read is the whole model or a WeightsError: sizes are compared by the headers of the files before the
numbers are read. What is written, `from_pretrained` of the same class loads bit for bit.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from causalvae.errors import WeightsError
from causalvae.models.diffusers import CONSTANTS, DiffusersVAE, diffusers_config, skeleton
from causalvae.models.presets import DiffusersConfig

CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
MAX_JSON_BYTES = 8 * 2**20  # thousands of times what is published
MAX_HEADER_BYTES = 16 * 2**20
PREFIX = "net."  # of DiffusersVAE's parameters
FLOATS = {"F64", "F32", "F16", "BF16"}
SHOWN = 3  # differences of each kind in a message


def model_folder(path: Path) -> Path | None:
    """The folder of a diffusers model that a path stands for: itself, or `vae` in a pipeline's; else None."""
    for folder in (path, path / "vae"):
        if (folder / CONFIG).is_file() and "_class_name" in _read_json(folder / CONFIG):
            return folder
    return None


def weights_file(folder: Path) -> Path:
    """What stands for the weights of a model's folder: its file, or the index of its shards."""
    files = list(_files_of(folder))
    return files[0] if len(files) == 1 else folder / INDEX


def read_folder(path: Path) -> tuple[DiffusersConfig, dict[str, Tensor]]:
    """Config and weights in fp32, named as in DiffusersVAE.

    WeightsError where the folder is not the whole of a model that can be trained.
    """
    folder = model_folder(path)
    if folder is None:
        raise WeightsError(f"{path}: not a folder of diffusers: it has no {CONFIG} that names a class")
    settings = _read_json(folder / CONFIG)
    config = _config(settings, folder)
    files = _files_of(folder)
    shapes = {name: shape for file, names in files.items() for name, shape in _shapes(file, names).items()}
    _compare(folder, config, shapes)
    tensors = {name: t for file, names in files.items() for name, t in _tensors(file, names).items()}
    return adopt(settings, tensors, where=folder)


# Any: a config.json
def adopt(
    settings: Mapping[str, Any], tensors: Mapping[str, Tensor], *, where: Path
) -> tuple[DiffusersConfig, dict[str, Tensor]]:
    """Config and weights of a model that was read: its config.json and its tensors under diffusers' names.

    The weights become fp32 and are named as in DiffusersVAE. where: for messages. WeightsError where the two
    are not of one model that can be trained.
    """
    config = _config(settings, where)
    _compare(where, config, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    constants = {name: tensors[name].float().tolist() for name in CONSTANTS if name in tensors}
    if constants:
        config = _config({**settings, **constants}, where)
    weights = {name: tensor for name, tensor in tensors.items() if name not in CONSTANTS}
    return config, {PREFIX + name: tensor.to(torch.float32) for name, tensor in weights.items()}


def load_folder(path: Path) -> DiffusersVAE:
    """The model of a folder, fp32 on the CPU."""
    config, tensors = read_folder(path)
    vae = skeleton(config)
    vae.load_state_dict(tensors, strict=True, assign=True)
    return vae


def save_folder(vae: DiffusersVAE, path: Path, *, tensors: Mapping[str, Tensor] | None = None) -> None:
    """Write a folder that diffusers loads bit for bit.

    tensors: weights in the place of the model's own, such as an average, with the same names.
    """
    own: Mapping[str, Tensor] = dict(vae.named_parameters()) if tensors is None else tensors
    named = {name.removeprefix(PREFIX): tensor for name, tensor in own.items()}
    settings = vae.config.settings
    for name, buffer in vae.net.named_buffers(recurse=False):
        if name in CONSTANTS:
            named[name] = buffer
            settings.pop(name, None)
    on_cpu = {name: tensor.detach().contiguous().cpu() for name, tensor in named.items()}
    path.mkdir(parents=True, exist_ok=True)
    save_file(on_cpu, path / WEIGHTS, metadata={"format": "pt"})
    written = {"_class_name": vae.config.class_name, **settings}
    (path / CONFIG).write_text(json.dumps(written, indent=2) + "\n")


def _config(settings: Mapping[str, Any], where: Path) -> DiffusersConfig:
    class_name = settings.get("_class_name")
    if not isinstance(class_name, str):
        raise WeightsError(f"{where / CONFIG}: _class_name must be text")
    try:
        return diffusers_config(class_name, settings)
    except WeightsError as error:
        raise WeightsError(f"{where}: {error}") from error


def _read_json(file: Path) -> dict[str, Any]:  # Any: JSON
    try:
        if file.stat().st_size > MAX_JSON_BYTES:
            raise WeightsError(f"{file}: too large for what it should be")
        found = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{file}: can't be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise WeightsError(f"{file}: not an object of JSON")
    return found


def _files_of(folder: Path) -> dict[Path, set[str] | None]:
    """Files of weights, and which of their tensors count: None for all."""
    if (folder / WEIGHTS).is_file():
        return {folder / WEIGHTS: None}
    if (folder / INDEX).is_file():
        return _shards(folder)
    variants = sorted(folder.glob("diffusion_pytorch_model.*.safetensors"))
    if len(variants) == 1:
        return {variants[0]: None}
    raise WeightsError(
        f"{folder}: there is no {WEIGHTS} and no {INDEX} in it; pickles (.bin) are not read: load the model "
        "in diffusers and call save_pretrained, which writes safetensors"
    )


def _shards(folder: Path) -> dict[Path, set[str] | None]:
    shards = _read_json(folder / INDEX).get("weight_map")
    named = isinstance(shards, dict) and all(isinstance(name, str) for name in shards.values())
    if not named or not shards or any(Path(name).name != name for name in shards.values()):
        raise WeightsError(f"{folder / INDEX}: its weight_map does not say which file of the folder has what")
    files: dict[Path, set[str] | None] = {folder / name: set() for name in sorted(set(shards.values()))}
    for tensor, name in shards.items():
        files[folder / name] = {*(files[folder / name] or ()), tensor}
    return files


def _shapes(file: Path, names: set[str] | None) -> dict[str, tuple[int, ...]]:
    """Sizes by the header of a file."""
    try:
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
        if size > MAX_HEADER_BYTES:
            raise WeightsError(f"{file}: its header says it is {size} bytes long, which no such file has")
        with safe_open(str(file), framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in _wanted(file, opened.keys(), names)}
            odd = [name for name, each in slices.items() if each.get_dtype() not in FLOATS]
            shapes = {name: tuple(each.get_shape()) for name, each in slices.items()}
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{file}: not a whole safetensors file: {error}") from error
    if odd:
        raise WeightsError(
            f"{file}: {odd[0]} is not of floating point numbers; quantised weights can't be trained"
        )
    return shapes


def _tensors(file: Path, names: set[str] | None) -> dict[str, Tensor]:
    """Tensors in fp32. WeightsError if one is not finite."""
    tensors: dict[str, Tensor] = {}
    try:
        with safe_open(str(file), framework="pt") as opened:
            for name in _wanted(file, opened.keys(), names):
                tensors[name] = opened.get_tensor(name).to(torch.float32)
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{file}: not a whole safetensors file: {error}") from error
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise WeightsError(f"{file}: {name} is not finite, so the file is damaged")
    return tensors


def _wanted(file: Path, there: Iterable[str], names: set[str] | None) -> list[str]:
    found = set(there)
    if names is not None and not names <= found:
        raise WeightsError(f"{file}: {sorted(names - found)[0]} should be in it and is not")
    return sorted(found if names is None else names)


def _compare(folder: Path, config: DiffusersConfig, found: Mapping[str, tuple[int, ...]]) -> None:
    """Raise WeightsError unless names and sizes are those of the model."""
    vae = skeleton(config)
    expected = {name.removeprefix(PREFIX): tuple(p.shape) for name, p in vae.named_parameters()}
    expected |= {
        name: tuple(b.shape) for name, b in vae.net.named_buffers(recurse=False) if name in CONSTANTS
    }
    missing = sorted(expected.keys() - found.keys())
    unknown = sorted(found.keys() - expected.keys())
    sizes = [n for n in sorted(expected.keys() & found.keys()) if expected[n] != found[n]]
    said = [f"{len(missing)} missing ({', '.join(missing[:SHOWN])})"] if missing else []
    said += [f"{len(unknown)} unknown ({', '.join(unknown[:SHOWN])})"] if unknown else []
    said += [f"{n} is {found[n]} and should be {expected[n]}" for n in sizes[:SHOWN]]
    if said:
        raise WeightsError(
            f"{folder}: the weights are not those of the {config.class_name} that its {CONFIG} describes: "
            f"{'; '.join(said)}"
        )
