"""Files of weights, told apart by content: what a path holds, whose model it is, and its tensors."""

import hashlib
import json
import re
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from causalvae.errors import WeightsError
from causalvae.files import sha256
from causalvae.models.presets import ModelConfig
from causalvae.weights.diffusers import CONFIG, find_diffusers
from causalvae.weights.layouts import Choice, choose
from causalvae.weights.mindspore import is_mindspore, read_mindspore, to_torch_names
from causalvae.weights.pytorch import is_torch_legacy, is_torch_zip, owned, read_torch
from causalvae.weights.tensorfiles import (
    is_json,
    is_safetensors,
    parse_json,
    read_index,
    read_json,
    read_safetensors,
    read_safetensors_header,
)
from causalvae.weights.writing import refuse_not_finite

CONFIG_KEY, MODEL_KEY = "causalvae.config", "causalvae.model"
HEAD_BYTES = 1200
AVERAGE, MODEL, CRITIC = (
    "ema.safetensors",
    "model.safetensors",
    "discriminator.safetensors",
)  # of our checkpoints
Json = dict[str, Any]  # Any: JSON values nest


@dataclass(frozen=True)
class Origin:
    """Where weights came from: the file, its SHA-256, and which of a checkpoint's two sets it is.

    sha256: of shards, that of the lines "sum  name" in the order of their names.
    """

    path: Path
    sha256: str
    kind: str


@dataclass(frozen=True)
class WeightsFile:
    """What a path holds. tensors: the model's, under the names of its own code, in the types of the file.

    discriminator: entries of the critic (`discriminator.*`) and of the loss; empty if there are none.
    config: config.json beside the file, or the model's config in our header. kind: the class of our model,
    by our header. chosen: "only" if the file has one set. notes: what is worth saying to the user.
    """

    tensors: dict[str, Tensor]
    discriminator: dict[str, Tensor]
    config: Json | None
    kind: str | None
    format: str
    chosen: Literal["ema", "live", "only"]
    origin: Origin
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Content:
    """One file, or one set of shards, read: its tables as they are, and what its header says."""

    table: Json
    format: str
    metadata: dict[str, str]
    num_bytes: int
    notes: tuple[str, ...] = ()


def read_tensors(path: Path, prefer: Choice = "ema") -> WeightsFile:
    """The weights of a file or folder of any known format, of the set that is preferred if there are two.

    WeightsError, which begins with the path, if it is damaged, of another kind, or not finite.
    """
    _refuse_missing(path)
    if not path.is_dir():
        return _read_file(path, prefer=prefer, kind_of_folder=None)
    checkpoint = _own_checkpoint(path)
    if checkpoint is not None:
        return _read_checkpoint(checkpoint, path, prefer=prefer)
    file = find_diffusers(path)
    if file is not None:
        return _read_file(file, prefer=prefer, kind_of_folder="diffusers")
    return _read_file(_only_file(path), prefer=prefer, kind_of_folder=None)


def _read_file(path: Path, *, prefer: Choice, kind_of_folder: str | None) -> WeightsFile:
    content = _content(path)
    chosen = choose(content.table, path, prefer=prefer)
    size = content.num_bytes
    tensors = owned(chosen.tensors, path, num_bytes=size)
    discriminator = owned(chosen.discriminator, path, num_bytes=size)
    refuse_not_finite(tensors, path)
    beside = path.parent / CONFIG
    config = _own_config(content.metadata, path)
    if config is None and beside.is_file():
        config = read_json(beside)
    return WeightsFile(
        tensors=tensors,
        discriminator=discriminator,
        config=config,
        kind=content.metadata.get(MODEL_KEY),
        format=kind_of_folder or chosen.layout or content.format,
        chosen=chosen.chosen,
        origin=Origin(path, _sum(path), chosen.chosen),
        notes=(*content.notes, *chosen.notes),
    )


def _content(path: Path) -> _Content:
    """A file's tables, by the reader of its format."""
    _refuse_missing(path)
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    size = path.stat().st_size
    if is_torch_zip(head) or is_torch_legacy(head):
        table, notes = read_torch(path)
        ours = {key: table[key] for key in (CONFIG_KEY, MODEL_KEY) if isinstance(table.get(key), str)}
        return _Content(table, "torch" if is_torch_zip(head) else "torch-legacy", ours, size, tuple(notes))
    if is_safetensors(head):
        return _Content(read_safetensors(path), "safetensors", read_safetensors_header(path).metadata, size)
    if is_json(head):
        return _shards(path)
    if is_mindspore(head):
        found = read_mindspore(path)
        return _Content(to_torch_names(found.tensors), "mindspore", found.texts, size)
    raise WeightsError(f"{path}: {_what_it_is(head)}. {KNOWN}")


KNOWN = (
    "Weights can be read from torch files, safetensors, MindSpore checkpoints (saved without a key), "
    "diffusers folders, and runs of this tool"
)


def _what_it_is(head: bytes) -> str:
    if not head:
        return "the file is empty"
    if head[:1] == b"\x80":
        return "a pickle, but none that torch wrote; only files of torch.save can be read"
    if b"ustar" in head or head[257:262] == b"ustar":
        return "a tar archive; unpack it, or save the weights again by a newer torch"
    if all(byte in b"\t\n\r\f" or byte >= 32 for byte in head) and 0 not in head:
        return "a text file, no weights"
    return "not a file of weights in a known format, or damaged at its beginning"


def _shards(index: Path) -> _Content:
    """All shards of an index, as one table."""
    table: Json = {}
    metadata: dict[str, str] = {}
    size = 0
    for shard, names in read_index(index).items():
        with shard.open("rb") as file:
            head = file.read(HEAD_BYTES)
        size += shard.stat().st_size
        if is_json(head):
            raise WeightsError(f"{shard}: a shard of {index.name} is an index itself; copy it again")
        if is_safetensors(head):
            table |= read_safetensors(shard, names)
            metadata |= read_safetensors_header(shard).metadata
            continue
        found = _content(shard).table
        missing = sorted(set(names) - found.keys())
        if missing:
            raise WeightsError(f"{shard}: {missing[0]} is not in it, though {index.name} says so")
        table |= {name: found[name] for name in names}
    return _Content(table, "safetensors-sharded", metadata, size)


def _sum(path: Path) -> str:
    """SHA-256 of a file; of an index, that of the sums of its shards."""
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    if is_safetensors(head) or not is_json(head):
        return sha256(path)
    lines = [f"{sha256(shard)}  {shard.name}\n" for shard in sorted(read_index(path))]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _own_config(metadata: Mapping[str, str], path: Path) -> Json | None:
    return parse_config(metadata, path) if CONFIG_KEY in metadata else None


def _own_checkpoint(path: Path) -> Path | None:
    """The newest checkpoint of our run, or the folder itself if it is a checkpoint; None if neither."""
    steps = [each for each in path.glob("checkpoints/step-*") if re.fullmatch(r"step-\d+", each.name)]
    return next((each for each in (path, *sorted(steps, reverse=True)) if _is_own(each)), None)


def _is_own(folder: Path) -> bool:
    """Whether a folder is a checkpoint of ours; others have a model.safetensors too, without our header."""
    if (folder / AVERAGE).is_file():
        return True
    model = folder / MODEL
    return model.is_file() and MODEL_KEY in read_safetensors_header(model).metadata


def _read_checkpoint(folder: Path, path: Path, *, prefer: Choice) -> WeightsFile:
    """Weights of our checkpoint; averages have no buffers, which are those of the live weights."""
    has_both = (folder / AVERAGE).is_file() and (folder / MODEL).is_file()
    averaged = (folder / AVERAGE).is_file() and (prefer == "ema" or not has_both)
    file = folder / (AVERAGE if averaged else MODEL)
    tensors = read_safetensors(file)
    if averaged and has_both:
        others = set(read_safetensors_header(folder / MODEL).names) - tensors.keys()
        tensors = read_safetensors(folder / MODEL, sorted(others)) | tensors
    refuse_not_finite(tensors, file)
    critic: dict[str, Tensor] = {}
    if (folder / CRITIC).is_file():
        critic = {f"discriminator.{name}": t for name, t in read_safetensors(folder / CRITIC).items()}
    metadata = read_safetensors_header(file).metadata
    return WeightsFile(
        tensors=tensors,
        discriminator=critic,
        config=_own_config(metadata, file),
        kind=metadata.get(MODEL_KEY),
        format="causalvae checkpoint" if folder == path else "causalvae run",
        chosen=("ema" if averaged else "live") if has_both else "only",
        origin=Origin(file, sha256(file), file.stem),
        notes=() if folder == path else (f"{path} is a run; its newest checkpoint is {folder.name}",),
    )


def _only_file(folder: Path) -> Path:
    """The file of weights in a folder: the first .ckpt as Open-Sora-Plan takes it, else the only one."""
    checkpoints = sorted(each for each in folder.glob("*.ckpt") if each.is_file())
    if checkpoints:
        return checkpoints[0]
    endings = (".safetensors", ".pt", ".pth", ".bin", ".safetensors.index.json")
    files = [each for each in sorted(folder.iterdir()) if each.name.endswith(endings) and each.is_file()]
    if len(files) != 1:
        held = f"holds {len(files)} files that may be" if files else "the folder holds no"
        raise WeightsError(f"{folder}: {held} weights; name the file to read")
    return files[0]


def _refuse_missing(path: Path) -> None:
    """WeightsError unless the path is a folder or a regular file that can be read."""
    try:
        mode = path.stat().st_mode
        if stat.S_ISREG(mode):
            path.open("rb").close()
    except OSError as error:
        raise WeightsError(f"{path}: can't be read: {error.strerror}; check the path") from error
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise WeightsError(f"{path}: neither a file nor a folder; name a file of weights")


def find_weights(path: Path) -> Path:
    """The file of weights that a run, a checkpoint or a file of this tool stands for; averaged weights where
    there are both.

    WeightsError if there is none.
    """
    if path.is_file():
        return path
    folder = _own_checkpoint(path)
    if folder is None and (path / MODEL).is_file():
        folder = path
    if folder is None:
        raise WeightsError(f"{path}: holds no checkpoint of this tool")
    return folder / (AVERAGE if (folder / AVERAGE).is_file() else MODEL)


def own_entries(config: ModelConfig) -> dict[str, str]:
    """What a file of weights says of its model, in its header, so that it is known again."""
    return {MODEL_KEY: type(config).__name__, CONFIG_KEY: json.dumps(asdict(config))}


def parse_config(metadata: Mapping[str, str], path: Path) -> Json:
    """The model's config in a header of ours, as JSON. WeightsError if it can't be read."""
    return parse_json(metadata[CONFIG_KEY].encode(), path)
