"""From a path to a model of ours: its config, and tensors that fit it exactly, whoever made the file."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from causalvae.errors import ConfigError, WeightsError
from causalvae.models.build import shapes as shapes_of
from causalvae.models.diffusers import diffusers_config, ignored_settings
from causalvae.models.presets import (
    DIFFUSERS_GEOMETRY,
    PRESETS,
    CausalVAEConfig,
    DiffusersConfig,
    ModelConfig,
    config_from_dict,
)
from causalvae.weights.diffusers_folder import adopt
from causalvae.weights.layouts import Choice
from causalvae.weights.names import FAMILIES, differences, recognise
from causalvae.weights.published import published_config
from causalvae.weights.read import (
    CONFIG_KEY,
    MODEL_KEY,
    WeightsFile,
    find_weights,
    parse_config,
    read_tensors,
)
from causalvae.weights.tensorfiles import read_json, read_safetensors_header

DISCRIMINATOR = "discriminator."


@dataclass(frozen=True)
class Loaded:
    """Weights that fit a model of ours.

    tensors: under its names, in the types of the file. missing: names that the file may lack and does; they
    keep their initial values. critic: the discriminator's tensors under its own names, if the file has them.
    family: whose model it is. notes: what had to be assumed, for the user.
    """

    config: ModelConfig
    tensors: dict[str, Tensor]
    missing: tuple[str, ...]
    critic: dict[str, Tensor]
    family: str
    file: WeightsFile
    notes: tuple[str, ...]

    def facts(self) -> dict[str, Any]:  # Any: JSON
        """For run.json: what was loaded, and from where."""
        origin = self.file.origin
        return {
            "file": str(origin.path),
            "sha256": origin.sha256,
            "format": self.file.format,
            "model": self.family,
            "set": self.file.chosen,
        }


def load_model(
    path: Path,
    *,
    prefer: Choice = "ema",
    model_config: Path | None = None,
    partial: ModelConfig | None = None,
) -> Loaded:
    """The model that a file or folder holds, of any known format.

    prefer: averaged or live weights, where there are both. model_config: a published config.json, which
    decides what names can't. partial: take what fits into this model, whatever else there is.
    WeightsError, which begins with the path, if names and shapes are not exactly those of a model.
    """
    file = read_tensors(path, prefer)
    given = read_json(model_config) if model_config is not None else file.config
    critic = {
        name.removeprefix(DISCRIMINATOR): tensor
        for name, tensor in file.discriminator.items()
        if name.startswith(DISCRIMINATOR)
    }
    if partial is not None:
        return _partly(file, partial, critic)
    try:
        return _exactly(file, given, critic)
    except (WeightsError, ConfigError) as error:
        raise _at(file.origin.path, error) from error


def own_config(file: Path) -> tuple[str, ModelConfig]:
    """Class and config of a file of this tool, by its header alone."""
    metadata = read_safetensors_header(find_weights(file)).metadata
    if MODEL_KEY not in metadata or CONFIG_KEY not in metadata:
        raise WeightsError(f"{file}: its header does not say whose model it is, so no run goes on from it")
    try:
        return metadata[MODEL_KEY], _config(metadata[MODEL_KEY], parse_config(metadata, file))
    except (WeightsError, ConfigError) as error:
        raise _at(file, error) from error


def _at(path: Path, error: WeightsError | ConfigError) -> WeightsError:
    said = str(error)
    return WeightsError(said if said.startswith(str(path)) else f"{path}: {said}")


def _config(kind: str, values: Mapping[str, Any]) -> ModelConfig:  # Any: JSON
    """The config that a header of ours holds, checked."""
    if kind != DiffusersConfig.__name__:
        return config_from_dict(kind, values)
    found = DiffusersConfig(**{name: str(values.get(name)) for name in ("class_name", "config_json")})
    try:
        settings = found.settings
    except ValueError as error:
        raise WeightsError(f"the model's settings in its header can't be read: {error}") from error
    return diffusers_config(found.class_name, settings)


def _exactly(
    file: WeightsFile,
    given: Mapping[str, Any] | None,  # Any: JSON
    critic: dict[str, Tensor],
) -> Loaded:
    """The model whose names and shapes are exactly those of the file."""
    found = {name: tuple(tensor.shape) for name, tensor in file.tensors.items()}
    if file.kind is not None:
        config = _config(file.kind, file.config or {})
        text = differences(shapes_of(config), found)
        if text:
            raise WeightsError(f"the weights are not those of the {file.kind} that the header names: {text}")
        return Loaded(config, file.tensors, (), critic, _family(config), file, file.notes)
    theirs = str((given or {}).get("_class_name"))
    if given is not None and theirs in DIFFUSERS_GEOMETRY:
        return _foreign(file, given, critic)
    try:
        seen = recognise(found, given)
    except WeightsError as error:
        if not theirs.startswith("AutoencoderKL"):
            raise
        raise WeightsError(
            f"diffusers' class {theirs[:60]} can't be trained here; those that can: "
            f"{', '.join(sorted(DIFFUSERS_GEOMETRY))}"
        ) from error
    if seen.config is None:
        raise WeightsError(
            "these are weights of an image VAE; `causalvae init --from` makes a video VAE of them, which "
            "training can start from"
        )
    notes = (*file.notes, *seen.notes)
    return Loaded(seen.config, file.tensors, seen.missing, critic, seen.family, file, notes)


def _foreign(file: WeightsFile, given: Mapping[str, Any], critic: dict[str, Tensor]) -> Loaded:  # Any: JSON
    """A model that the diffusers library has."""
    config, tensors = adopt(given, file.tensors, where=file.origin.path.parent)
    ignored = ignored_settings(config)
    notes = (
        (f"diffusers does not know these settings of config.json: {', '.join(ignored)}",) if ignored else ()
    )
    return Loaded(config, tensors, (), critic, config.class_name, file, (*file.notes, *notes))


def _family(config: ModelConfig) -> str:
    """What people call a model: the preset that it is, or whose layers it has."""
    if isinstance(config, DiffusersConfig):
        return config.class_name
    presets = [name for name, preset in PRESETS.items() if preset == config]
    if presets or published_config(config) is None:
        return presets[0] if presets else "causalvae"
    return FAMILIES[config.temporal] if isinstance(config, CausalVAEConfig) else "wfvae"


def _partly(file: WeightsFile, config: ModelConfig, critic: dict[str, Tensor]) -> Loaded:
    """What fits into this model by name and shape; the notes list the rest."""
    wanted = shapes_of(config)
    fitting = {n: t for n, t in file.tensors.items() if wanted.get(n) == tuple(t.shape)}
    if not fitting:
        raise WeightsError(f"{file.origin.path}: none of its {len(file.tensors)} tensors fits the model")
    missing = tuple(name for name in wanted if name not in fitting)
    strange = [name for name in file.tensors if name not in fitting]
    notes = [f"{len(fitting)} of the model's {len(wanted)} tensors are loaded from {file.origin.path}"]
    notes += [f"kept as they began: {', '.join(missing)}"] if missing else []
    notes += [f"of the file, not used: {', '.join(strange)}"] if strange else []
    return Loaded(config, fitting, missing, critic, _family(config), file, (*file.notes, *notes))
