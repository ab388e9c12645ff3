"""Weights from any format that is read here to any that is written, and nothing lost on the way.

What a file can't tell by its names, whose model it is, goes with the tensors: in a safetensors header, in a
torch file beside `state_dict`, in MindSpore's as two records of text, in folders as config.json.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from causalvae.errors import ConfigError, WeightsError
from causalvae.files import remove, sync
from causalvae.flags import printable
from causalvae.latentexport import Carried, carry
from causalvae.models.diffusers import skeleton
from causalvae.models.presets import CausalVAEConfig, DiffusersConfig, ModelConfig
from causalvae.weightflags import ConvertSettings, amount
from causalvae.weights.diffusers import CONFIG, WEIGHTS, write_diffusers
from causalvae.weights.diffusers_folder import PREFIX, save_folder
from causalvae.weights.layouts import Choice
from causalvae.weights.load import Loaded, load_model
from causalvae.weights.mindspore import write_mindspore
from causalvae.weights.names import recognise
from causalvae.weights.published import published_config
from causalvae.weights.pytorch import write_torch
from causalvae.weights.read import own_entries
from causalvae.weights.tensorfiles import INDEX_SUFFIX, read_index, read_json, write_safetensors
from causalvae.weights.writing import aside, num_bytes_of, to_dtype

Format = Literal["torch", "safetensors", "mindspore", "diffusers", "open-sora-plan"]
Dtype = Literal["fp32", "fp16", "bf16"]
ENDINGS: dict[str, Format] = {
    ".safetensors": "safetensors", ".pt": "torch", ".pth": "torch", ".bin": "torch", ".ckpt": "torch",
}  # fmt: skip
KEPT_FIELDS = ("_diffusers_version", "resolution", "dropout", "scale", "shift")  # that the network is without
OURS = re.compile(rf"{re.escape(CONFIG)}|{WEIGHTS}[-\w.]*")  # what a folder holds that was written here
FILES = ("torch", "safetensors", "mindspore")


@dataclass(frozen=True)
class Converted:
    """What was written. path: the file, index or folder to name. notes: for the user."""

    path: Path
    format: Format
    family: str
    num_tensors: int
    num_bytes: int
    notes: tuple[str, ...]

    @property
    def text(self) -> str:
        """What to say of it."""
        size = f"{self.num_tensors} tensors, {self.num_bytes:,} bytes"
        lines = [f"{printable(str(self.path))}: {self.family}, {size}, as {self.format}", *self.notes]
        return "".join(f"{line}\n" for line in lines)


def run_convert(settings: ConvertSettings) -> str:
    """The command `convert`; what to say of what was written."""
    done = convert(
        Path(settings.source),
        Path(settings.out),
        to=settings.to,
        dtype=settings.dtype,
        prefer=settings.weights,
        shard_size=None if settings.shard_size is None else amount(settings.shard_size),
        beside=Beside(
            model_config=None if settings.model_config is None else Path(settings.model_config),
            stats=None if settings.stats is None else Path(settings.stats),
        ),
        overwrite=settings.overwrite,
    )
    return done.text


@dataclass(frozen=True, kw_only=True)
class Beside:
    """Files that are read beside the weights. model_config: a published config.json, as `load_model` has it.

    stats: the stats.json of latents, which goes with the model.
    """

    model_config: Path | None = None
    stats: Path | None = None


def convert(
    source: Path,
    target: Path,
    *,
    to: Format | None = None,
    dtype: Dtype | None = None,
    prefer: Choice = "ema",
    shard_size: int | None = None,
    beside: Beside | None = None,
    overwrite: bool = False,
) -> Converted:
    """Write the model of one file or folder as another format has it; `weights.load.load_model` reads both.

    to: None goes by the target's ending. dtype: None keeps the numbers. prefer: averaged or live weights.
    shard_size: bytes of a file of safetensors. beside: what else is read. ConfigError or WeightsError if it
    can't be, RunError (status 1) if the disk refuses; then nothing is left.
    """
    beside = beside or Beside()
    _refuse_there(target, overwrite=overwrite)
    loaded = load_model(source, prefer=prefer, model_config=beside.model_config)
    return save_model(
        loaded, target, to=to, dtype=dtype, shard_size=shard_size, beside=beside, overwrite=overwrite
    )


def save_model(
    loaded: Loaded,
    target: Path,
    *,
    to: Format | None = None,
    dtype: Dtype | None = None,
    shard_size: int | None = None,
    beside: Beside | None = None,
    overwrite: bool = False,
) -> Converted:
    """Write a model that was loaded, with the tensors that it has now; the rest as `convert` has it."""
    beside = beside or Beside()
    before = _refuse_there(target, overwrite=overwrite)
    form = to or _by_ending(target) or _library_of(loaded.config, target)
    _refuse_unless_possible(loaded.config, form, target=target, shard_size=shard_size)
    carried = None if beside.stats is None else carry(beside.stats, loaded, form=form)
    tensors = _as_in_file(loaded) if dtype is None else to_dtype(loaded.tensors, dtype)
    given = loaded.file.config if beside.model_config is None else read_json(beside.model_config)
    fields = {} if loaded.file.kind is not None or given is None else given
    _refuse_others(target, form)
    path = _write(
        target, loaded, tensors=tensors, form=form, fields=fields, carried=carried, shard_size=shard_size
    )
    written = {path, *(read_index(path) if path.name.endswith(INDEX_SUFFIX) else ())}
    for stale in before:  # of a file that was in more pieces, or in fewer
        if stale not in written and stale.is_file():
            stale.unlink()
    return Converted(path, form, loaded.family, len(tensors), num_bytes_of(tensors), _notes(loaded))


def _refuse_there(target: Path, *, overwrite: bool) -> list[Path]:
    """What is there already, if it may be written over; ConfigError if it may not."""
    before = _there(target)
    if before and not overwrite:
        raise ConfigError(f"{before[0]}: is there already; name another, or add --overwrite True")
    return before


def _there(target: Path) -> list[Path]:
    """What the target's name stands for, if it is there: the file or folder, or an index and its shards."""
    index = target if target.name.endswith(INDEX_SUFFIX) else target.with_name(target.name + INDEX_SUFFIX)
    found = [path for path in (target, index) if path.exists()]
    if target.is_dir() and not any(target.iterdir()):
        found.remove(target)
    return [*found, *read_index(index)] if index.is_file() else found


def _by_ending(target: Path) -> Format | None:
    """The format that a name stands for; None for a folder's."""
    if target.suffix in ENDINGS:
        return ENDINGS[target.suffix]
    if target.suffix and not target.is_dir():
        raise ConfigError(
            f"{target}: what to write does not follow from {target.suffix}; add --to, or end in "
            f"{', '.join(ENDINGS)}; a name without an ending is a folder"
        )
    return None


def _library_of(config: ModelConfig, target: Path) -> Format:
    """The folder that the model's own library reads."""
    if isinstance(config, DiffusersConfig):
        return "diffusers"
    if published_config(config) is not None:
        return "open-sora-plan"
    raise ConfigError(
        f"{target}: a folder is for models of diffusers and Open-Sora-Plan, and this model is neither's; end "
        "the name in .safetensors, or add --to"
    )


def _refuse_unless_possible(
    config: ModelConfig, form: Format, *, target: Path, shard_size: int | None
) -> None:
    """ConfigError if the format has no place for the model, or not for what was asked."""
    of_diffusers = isinstance(config, DiffusersConfig)
    if form == "diffusers" and not of_diffusers:
        raise ConfigError(
            "--to diffusers: diffusers has no class for this model (its AutoencoderKL classes have other "
            "layers); safetensors, torch and open-sora-plan keep all of it"
        )
    if form == "mindspore" and of_diffusers:
        raise ConfigError(
            f"--to mindspore: {config.class_name} has names that MindSpore uses for norms (gamma), so they "
            "would not come back; mindone reads folders of diffusers, which --to diffusers writes"
        )
    if form == "open-sora-plan" and (of_diffusers or published_config(config) is None):
        raise ConfigError(
            "--to open-sora-plan: the published code has no such model (norms, resampling or stem differ), "
            "so it could not load it; write safetensors or torch"
        )
    if shard_size is not None and (form in ("torch", "mindspore") or target.suffix == ".ckpt"):
        raise ConfigError(f"--shard_size: only safetensors are cut into several files, not {form} files")
    if form in FILES and target.is_dir():
        raise ConfigError(f"{target}: is a folder, and --to {form} writes a file; name the file in it")


def _refuse_others(target: Path, form: Format) -> None:
    """ConfigError if writing would take away what was not written by a conversion."""
    if target.is_dir():
        other = next((each for each in target.iterdir() if not OURS.fullmatch(each.name)), None)
        if other is not None:
            raise ConfigError(f"{other}: is no part of a model, so the folder is not written over")
    elif form in ("diffusers", "open-sora-plan") and target.exists() and target.suffix != ".ckpt":
        raise ConfigError(f"{target}: is a file, and --to {form} writes a folder; name another")


def _as_in_file(loaded: Loaded) -> dict[str, Tensor]:
    """The tensors in the types that the file has them in."""
    types = {name: tensor.dtype for name, tensor in loaded.file.tensors.items()}
    return {
        name: tensor.to(types.get(name, types.get(name.removeprefix(PREFIX), tensor.dtype)))
        for name, tensor in loaded.tensors.items()
    }


def _write(
    target: Path,
    loaded: Loaded,
    *,
    tensors: Mapping[str, Tensor],
    form: Format,
    fields: Mapping[str, Any],  # Any: JSON
    carried: Carried | None,
    shard_size: int | None,
) -> Path:
    """Write, and say which path to name. fields: of the config.json that was read."""
    carried = carried or Carried(config=loaded.config, fields={}, texts={})
    told = {**_told(loaded), **carried.texts}
    if form == "safetensors":
        return write_safetensors(target, tensors, metadata=told, shard_size=shard_size)
    if form == "torch":
        write_torch(target, tensors, layout="state_dict", texts=told)
    elif form == "mindspore":
        write_mindspore(target, tensors, crc=False, texts=told if _names_are_silent(loaded) else {})
    elif isinstance(loaded.config, DiffusersConfig):
        assert isinstance(carried.config, DiffusersConfig)
        vae = skeleton(carried.config)
        vae.load_state_dict(loaded.tensors, strict=True, assign=True)
        with in_the_place_of(target) as folder:
            save_folder(vae, folder, tensors=tensors, shard_size=shard_size)
    else:
        published = published_config(loaded.config)
        assert published is not None
        kept = {name: fields[name] for name in KEPT_FIELDS if name in fields}
        written = {**published, **kept, **carried.fields}
        _write_published(target, loaded.config, tensors=tensors, fields=written, shard_size=shard_size)
    return target


def _told(loaded: Loaded) -> dict[str, str]:
    """Whose model it is, as text. Not for a file that may lack tensors and does: its names are told apart."""
    if loaded.missing:
        return {}
    return own_entries(loaded.config)


def _names_are_silent(loaded: Loaded) -> bool:
    """Whether names and shapes alone would lead to another model, or to none."""
    try:
        return recognise({n: tuple(t.shape) for n, t in loaded.tensors.items()}).config != loaded.config
    except WeightsError:
        return True


def _write_published(
    target: Path,
    config: ModelConfig,
    *,
    tensors: Mapping[str, Tensor],
    fields: Mapping[str, Any],  # Any: JSON
    shard_size: int | None,
) -> None:
    """A folder as Open-Sora-Plan has it, or for a name in .ckpt a file as its training writes it.

    The code before v1.2 looks for weights under `state_dict`, later code under `gen_model` in it too.
    """
    if target.suffix != ".ckpt":
        with in_the_place_of(target) as folder:
            write_diffusers(folder, fields, tensors, metadata={}, shard_size=shard_size)
        return
    older = isinstance(config, CausalVAEConfig) and config.temporal != "joint"
    places = [target, target.parent / CONFIG]
    with aside(places, num_bytes=num_bytes_of(tensors)) as (weights, described):
        write_torch(weights, tensors, layout="state_dict" if older else "open-sora-plan")
        described.write_text(json.dumps(dict(fields), indent=2, sort_keys=True) + "\n")


@contextmanager
def in_the_place_of(folder: Path) -> Iterator[Path]:
    """A name to write a folder under, which takes the place of this one if the block ends well."""
    if not folder.is_dir() or not any(folder.iterdir()):
        yield folder
        return
    new, old = (folder.with_name(f".{folder.name}.{word}") for word in ("new", "old"))
    for each in (new, old):
        remove(each)  # of a writer that was killed
    try:
        yield new
        os.rename(folder, old)
        os.rename(new, folder)
        sync(folder.parent)
    finally:
        remove(new)
    remove(old)


def _notes(loaded: Loaded) -> tuple[str, ...]:
    notes = loaded.notes
    if loaded.file.chosen != "only":
        notes = (*notes, f"the file has averaged and live weights; these are the {loaded.file.chosen} ones")
    if loaded.file.discriminator:
        count = len(loaded.file.discriminator)
        notes = (*notes, f"{count} tensors of the critic and the loss are left out")
    return notes
