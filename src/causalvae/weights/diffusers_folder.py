"""Models of the diffusers library from and to their folders: config.json and weights.

What is read is the whole model or a WeightsError. What is written, `from_pretrained` of the same class loads
bit for bit.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from causalvae.errors import WeightsError
from causalvae.models.diffusers import CONSTANTS, DiffusersVAE, diffusers_config, skeleton
from causalvae.models.presets import DiffusersConfig
from causalvae.weights.diffusers import CONFIG, write_diffusers

PREFIX = "net."  # of DiffusersVAE's parameters
WITHOUT = dict(zip(CONSTANTS, (0.0, 1.0), strict=True))  # their values where a config has none
SHOWN = 3  # differences of each kind in a message


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
    odd = next((name for name, tensor in tensors.items() if not tensor.is_floating_point()), None)
    if odd is not None:
        raise WeightsError(
            f"{where}: {odd} is not of floating point numbers; quantised weights can't be trained"
        )
    constants = {
        name: tensors[name].float().tolist()
        for name, value in WITHOUT.items()
        if name in tensors and not bool((tensors[name] == value).all())
    }
    if constants:
        config = _config({**settings, **constants}, where)
    weights = {name: tensor for name, tensor in tensors.items() if name not in CONSTANTS}
    return config, {PREFIX + name: tensor.to(torch.float32) for name, tensor in weights.items()}


def save_folder(
    vae: DiffusersVAE,
    path: Path,
    *,
    tensors: Mapping[str, Tensor] | None = None,
    shard_size: int | None = None,
) -> None:
    """Write a folder that diffusers loads bit for bit.

    tensors: weights in the place of the model's own, such as an average, with the same names. shard_size:
    bytes of a file, where there shall be several.
    """
    own: Mapping[str, Tensor] = dict(vae.named_parameters()) if tensors is None else tensors
    named = {name.removeprefix(PREFIX): tensor for name, tensor in own.items()}
    settings = vae.config.settings
    for name, buffer in vae.net.named_buffers(recurse=False):
        if name in CONSTANTS:
            named[name] = buffer
            settings.pop(name, None)
    on_cpu = {name: tensor.detach().contiguous().cpu() for name, tensor in named.items()}
    written = {"_class_name": vae.config.class_name, **settings}
    write_diffusers(path, written, on_cpu, metadata={"format": "pt"}, shard_size=shard_size)


def _config(settings: Mapping[str, Any], where: Path) -> DiffusersConfig:
    class_name = settings.get("_class_name")
    if not isinstance(class_name, str):
        raise WeightsError(f"{where / CONFIG}: _class_name must be text")
    try:
        return diffusers_config(class_name, settings)
    except WeightsError as error:
        raise WeightsError(f"{where}: {error}") from error


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
