"""Statistics of latents in the files of a model, where the libraries that read them look for them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from causalvae.errors import ConfigError
from causalvae.flags import printable
from causalvae.latentstats import Statistics, read_statistics
from causalvae.models.diffusers import diffusers_config
from causalvae.models.presets import DiffusersConfig, ModelConfig, WFVAEConfig
from causalvae.weights.load import Loaded

# Classes whose pipelines take mean and deviation of each channel, and multiply by scaling_factor, where there
# is one, after that (diffusers 0.42: pipelines of Wan, LTX, Mochi, Cosmos). Others multiply by it alone.
BY_CHANNEL = ("AutoencoderKLWan", "AutoencoderKLLTXVideo", "AutoencoderKLMochi", "AutoencoderKLCosmos")
TEXT = "causalvae.latents"  # in the header of a safetensors file


@dataclass(frozen=True, kw_only=True)
class Carried:
    """Statistics as a format has them. fields: of a published config.json. texts: of a safetensors header."""

    config: ModelConfig
    fields: Mapping[str, Any]  # Any: JSON
    texts: Mapping[str, str]


def carry(path: Path, loaded: Loaded, *, form: str) -> Carried:
    """The statistics of a stats.json for a model that is written as `form`.

    ConfigError if they are of other weights, or if the format has no place for them.
    """
    found = read_statistics(path)
    named = f"--stats {printable(str(path))}"
    ours = loaded.facts()["sha256"]
    if found.model.get("sha256") != ours:
        raise ConfigError(
            f"{named}: of latents of weights with SHA-256 {str(found.model.get('sha256'))[:12]}..., and "
            f"these are {str(ours)[:12]}...; encode with these weights"
        )
    if len(found.mean) != loaded.config.geometry.channels:
        raise ConfigError(f"{named}: of {len(found.mean)} channels, the model has another number")
    config = loaded.config
    if form == "safetensors":
        return Carried(config=config, fields={}, texts={TEXT: json.dumps(_facts(found))})
    if form == "diffusers" and isinstance(config, DiffusersConfig):
        return Carried(config=_of_diffusers(config, found), fields={}, texts={})
    if form == "open-sora-plan" and isinstance(config, WFVAEConfig):
        scale = [1.0 / each for each in found.deviation]  # z -> (z - shift) * scale, as its code has it
        return Carried(config=config, fields={"scale": scale, "shift": list(found.mean)}, texts={})
    raise ConfigError(
        f"{named}: {form} has no place for it with this model (Open-Sora-Plan's CausalVAEModel multiplies by "
        "0.18215 whatever is written); safetensors have one"
    )


def _of_diffusers(config: DiffusersConfig, found: Statistics) -> DiffusersConfig:
    """The config with the statistics that the class and its pipelines know."""
    settings = config.settings
    if config.class_name in BY_CHANNEL:
        settings |= {"latents_mean": list(found.mean), "latents_std": list(found.deviation)}
        settings |= {"scaling_factor": 1.0} if "scaling_factor" in settings else {}
    else:
        settings |= {"scaling_factor": found.scaling_factor}
    return diffusers_config(config.class_name, settings)


def _facts(found: Statistics) -> dict[str, Any]:  # Any: JSON
    return {
        "mean": list(found.mean),
        "deviation": list(found.deviation),
        "scaling_factor": found.scaling_factor,
    }
