"""Files of weights, told apart by content: what a path holds, whose model it is, and its tensors."""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from causalvae.errors import ConfigError, WeightsError
from causalvae.files import sha256
from causalvae.models.presets import CausalVAEConfig

MAX_HEADER_BYTES = 16 * 2**20  # a larger safetensors header takes seconds and gigabytes to read
CONFIG_KEY, MODEL_KEY = "causalvae.config", "causalvae.model"


@dataclass(frozen=True)
class Origin:
    """Where weights came from: the file, its SHA-256, and which of a checkpoint's two sets it is."""

    path: Path
    sha256: str
    kind: str


def find_weights(path: Path) -> Path:
    """The file of weights that a run, a checkpoint or a file stands for; averaged weights where there are
    both.

    ConfigError if nothing is there, with the way to make a first checkpoint.
    """
    if not path.exists():
        raise ConfigError(
            f"--load_from_checkpoint {path}: there is no such file. Leave the flag out to start from "
            "seeded random weights, or name a run, a checkpoint folder or a .safetensors file of this tool"
        )
    if path.is_file():
        return path
    folders = [path, *sorted(path.glob("checkpoints/step-*"), reverse=True)]
    for folder in folders:
        for name in ("ema.safetensors", "model.safetensors"):
            if (folder / name).is_file():
                return folder / name
    raise WeightsError(f"--load_from_checkpoint {path}: the folder holds no checkpoint of this tool")


def read_model(path: Path) -> tuple[CausalVAEConfig, dict[str, Tensor], Origin]:
    """Config, tensors and origin of a run's, a checkpoint's or a file's weights."""
    file = find_weights(path)
    return read_header(file), read_tensors(file), Origin(file, sha256(file), file.stem)


def read_header(file: Path) -> CausalVAEConfig:
    """Config of a file of this tool's weights. Other people's formats are not read yet."""
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        is_safetensors = stream.read(1) == b"{"
    if not is_safetensors or size > MAX_HEADER_BYTES:
        raise WeightsError(
            f"--load_from_checkpoint {file}: only safetensors files written by this tool can be read; "
            "torch, MindSpore and diffusers checkpoints are not available yet"
        )
    try:
        with safe_open(str(file), framework="pt") as opened:
            metadata = opened.metadata() or {}
    except SafetensorError as error:
        raise WeightsError(f"--load_from_checkpoint {file}: not a whole safetensors file: {error}") from error
    if CONFIG_KEY not in metadata:
        raise WeightsError(
            f"--load_from_checkpoint {file}: the file does not say whose model it is; weights of other "
            "systems are not available yet"
        )
    return config_of(metadata, file)


def config_of(metadata: dict[str, str], file: Path) -> CausalVAEConfig:
    """The model's config from the header of a file."""
    known = {field.name for field in fields(CausalVAEConfig)}
    try:
        values: dict[str, Any] = json.loads(metadata[CONFIG_KEY])  # Any: JSON
        taken: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in known
        }
        return CausalVAEConfig(**taken)
    except (json.JSONDecodeError, AttributeError, TypeError) as error:
        raise WeightsError(f"{file}: the model's config in its header can't be read: {error}") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, in memory of their own."""
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a mapping
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path}: not a whole safetensors file: {error}") from error
