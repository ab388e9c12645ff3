"""Whose model tensors are, by their names and shapes; published names are those of the models here.

A family is recognised by a few names, its config is read off shapes, and then every name and shape has to be
that of the model that follows. What names can't tell, a published config.json does.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from causalvae.errors import ConfigError, WeightsError
from causalvae.models.build import shapes as shapes_of
from causalvae.models.presets import PRESETS, CausalVAEConfig, OwnConfig, WFVAEConfig, check
from causalvae.weights.published import (
    mixes_frames,
    named_levels,
    refuse_contradictions,
    refuse_unknown_blocks,
)

Shapes = Mapping[str, tuple[int, ...]]
WAVELET = "encoder.wavelet_transform_in.h_conv.conv.weight"  # all of WF-VAE have it
BLOCK = "encoder.down.0.block.0.norm1.bias"  # all of the others
FAMILIES = {"pool": "osp-v1.0", "mix": "osp-v1.1", "joint": "osp-v1.2"}  # by how time is halved
SHOWN = 3  # differences of each kind in a message
TIME_RESAMPLER = re.compile(r"(encoder\.down|decoder\.up)\.\d+\.time_(down|up)sample\.")
RELEASE_LEVELS = (
    "names and shapes can't tell the two kinds of v1.0 apart, and no config.json did: taken as its released "
    "weights are, with time halved after levels 0 and 1"
)
INITIAL_TIME = (
    "the file has no entries for the time resamplers, as the published initial weights: they keep their "
    "initial values"
)


@dataclass(frozen=True)
class Recognised:
    """family: `osp-v1.0` and so on, `wfvae`, or `ldm-image`, `diffusers-image`, which have no config.

    notes: what had to be assumed. missing: names of the model that the file may lack, and does.
    """

    family: str
    config: OwnConfig | None
    notes: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()


def recognise(shapes: Shapes, config: Mapping[str, Any] | None = None) -> Recognised:  # Any: JSON
    """The model of tensors with these names and shapes.

    config: a published config.json, of which fields that say nothing about the model are ignored.
    WeightsError if no model here has exactly these, or if config.json says something else than they do.
    """
    image = _image_family(shapes)
    if image is not None:
        return Recognised(image, None)
    if WAVELET not in shapes and BLOCK not in shapes:
        raise WeightsError(_unknown(shapes))
    _refuse_by_name(shapes)
    given = config or {}
    refuse_unknown_blocks(given)
    try:
        found = _read_wfvae(shapes) if WAVELET in shapes else _read_causal(shapes, given)
    except (LookupError, ValueError, ZeroDivisionError) as error:  # what all models have isn't there
        raise WeightsError(_unknown(shapes)) from error
    family = FAMILIES[found.temporal] if isinstance(found, CausalVAEConfig) else "wfvae"
    notes, missing = _refuse_unless_exact(shapes, found, family=family)
    refuse_contradictions(given, found)
    if family == "osp-v1.0" and "encoder_temporal_downsample" not in given:
        notes = (*notes, RELEASE_LEVELS)
    return Recognised(family, found, notes, missing)


def _image_family(shapes: Shapes) -> str | None:
    flat = len(shapes.get("encoder.conv_in.weight", ())) == 4
    if flat and "encoder.down_blocks.0.resnets.0.norm1.weight" in shapes:
        return "diffusers-image"
    attention = len(shapes.get("encoder.mid.attn_1.q.weight", ())) == 4
    if flat and attention and "encoder.down.0.block.0.norm1.weight" in shapes:
        return "ldm-image"
    return None


def _refuse_by_name(shapes: Shapes) -> None:
    """WeightsError for relatives of WF-VAE that are not built here."""
    if WAVELET not in shapes:
        return
    if "encoder.wavelet_transform_l1.h_conv.conv.weight" in shapes:
        raise WeightsError(
            "these are weights of Open-Sora-Plan v1.5's VAE (time 8 times smaller, wavelets of three axes at "
            "both levels), which is not built here; WF-VAE with 4, 8 and 16 channels is"
        )
    if "encoder.norm_out.weight" in shapes:
        raise WeightsError(
            "these are weights of a WF-VAE with norm_type groupnorm; no published weights use it, and only "
            "layernorm is built here"
        )


def _read_wfvae(shapes: Shapes) -> WFVAEConfig:
    last = max(_numbers(shapes, r"decoder\.connect_l1\.(\d{1,3})\.weight"))
    return WFVAEConfig(
        base_channels=shapes["encoder.down1.0.weight"][0],
        z_channels=shapes["encoder.conv_out.conv.weight"][0] // 2,
        encoder_energy=shapes["encoder.connect_l1.weight"][0],
        decoder_energy=shapes[f"decoder.connect_l1.{last}.weight"][1],
        encoder_res_blocks=len(_numbers(shapes, r"encoder\.down1\.(\d{1,3})\.conv1\.weight")),
        decoder_res_blocks=len(_numbers(shapes, r"decoder\.up2\.(\d{1,3})\.conv1\.conv\.weight")) - 1,
        connect_res_blocks=last,
        attention="encoder.mid.1.q.conv.weight" in shapes,
    )


def _read_causal(shapes: Shapes, given: Mapping[str, Any]) -> CausalVAEConfig:  # Any: JSON
    """What names and shapes show, and the config.json where they can't."""
    flat_in = "encoder.conv_in.weight" in shapes
    hidden = shapes["encoder.conv_in.weight" if flat_in else "encoder.conv_in.conv.weight"][0]
    levels = range(len(_numbers(shapes, r"encoder\.down\.(\d{1,3})\.block\.0\.")))
    flat = [f"encoder.down.{i}.block.0.conv1.weight" in shapes for i in levels]
    widths = [shapes[f"encoder.down.{i}.block.0.conv1{'' if flat[i] else '.conv'}.weight"][0] for i in levels]
    quant = "post_quant_conv.conv.weight" in shapes
    z = shapes["post_quant_conv.conv.weight"][0] if quant else shapes["decoder.conv_in.conv.weight"][1]
    latent = shapes["post_quant_conv.conv.weight"][1] if quant else z
    found = CausalVAEConfig(
        hidden_size=hidden,
        hidden_size_mult=tuple(width // hidden for width in widths),
        num_res_blocks=len(_numbers(shapes, r"encoder\.down\.0\.block\.(\d{1,3})\.")),
        z_channels=z,
        embed_dim=None if latent == z else latent,
        norm="clip",
        quant=quant,
        spatial_levels=_numbers(shapes, r"encoder\.down\.(\d{1,3})\.downsample\."),
        flat_conv_in=flat_in,
        flat_levels=sum(flat),
        flat_downsample=any(re.search(r"\.downsample\.conv\.weight$", name) for name in shapes),
    )
    return _with_time(found, shapes, given)


def _with_time(found: CausalVAEConfig, shapes: Shapes, given: Mapping[str, Any]) -> CausalVAEConfig:
    """The config with what shapes, config.json (Any: JSON) or the published models say of time."""
    joint = _joint_levels(shapes, r"encoder\.down\.(\d{1,3})\.downsample\.conv\.conv\.weight$")
    mixed = _numbers(shapes, r"encoder\.down\.(\d{1,3})\.time_downsample\.mix_factor$")
    named = given.get("encoder_temporal_downsample")
    pools = isinstance(named, list) and "TimeDownsample2x" in named
    downs = named_levels(given, "encoder_temporal_downsample")
    ups = named_levels(given, "decoder_temporal_upsample")
    if joint:
        temporal, downs = "joint", joint
        ups = _joint_levels(shapes, r"decoder\.up\.(\d{1,3})\.upsample\.conv\.conv\.weight$")
    elif mixed:
        temporal, downs = "mix", mixed
        ups = _numbers(shapes, r"decoder\.up\.(\d{1,3})\.time_upsample\.mix_factor$")
    elif found.flat_conv_in and not pools:  # the published initial weights, without entries for time
        temporal, downs = "mix", (1, 2) if downs is None else downs
    else:
        temporal, downs = "pool", (0, 1) if downs is None else downs
        ups = (2, 3) if ups is None else ups
    mixing = mixes_frames(given)
    return replace(
        found,
        temporal=temporal,
        temporal_levels=downs,
        temporal_ups=None if ups == tuple(level + 1 for level in downs) else ups,
        mixing_attention=temporal == "pool" if mixing is None else mixing,
    )


def _joint_levels(shapes: Shapes, pattern: str) -> tuple[int, ...]:
    """Levels at which one layer, which spans three frames, changes time and space."""
    found = [(re.fullmatch(pattern, name), shape) for name, shape in shapes.items()]
    levels = {int(match[1]) for match, shape in found if match and len(shape) == 5 and shape[2] == 3}
    return tuple(sorted(levels))


def _numbers(shapes: Shapes, pattern: str) -> tuple[int, ...]:
    """What the group of the pattern, found at the beginning of names, counts: in order, each once."""
    found = (re.match(pattern, name) for name in shapes)
    return tuple(sorted({int(match[1]) for match in found if match}))


def _refuse_unless_exact(
    found: Shapes, config: OwnConfig, *, family: str
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Notes, and the names that may be missing and are. WeightsError if anything else differs."""
    try:
        check(config)
    except ConfigError as error:
        raise WeightsError(f"the shapes are nearly those of {family}, but {error}") from error
    wanted = shapes_of(config)
    optional = tuple(name for name in wanted if may_be_missing(family, name))
    missing = () if any(name in found for name in optional) else optional
    text = differences({name: shape for name, shape in wanted.items() if name not in missing}, found)
    if text:
        raise WeightsError(f"the weights are nearest to those of {family}, but not the same: {text}")
    return ((INITIAL_TIME,) if missing else ()), missing


def may_be_missing(family: str, name: str) -> bool:
    """Whether a name of the family's models has no entry in its published initial weights.

    All of those are missing together, or none is.
    """
    return family == "osp-v1.1" and TIME_RESAMPLER.match(name) is not None


def differences(wanted: Shapes, found: Shapes) -> str:
    """How names and shapes differ, the first of each kind; empty if they don't."""
    missing = [name for name in wanted if name not in found]
    unexpected = [name for name in found if name not in wanted]
    other = [name for name in wanted if name in found and tuple(found[name]) != tuple(wanted[name])]
    said = [
        f"{len(names)} {what}: {', '.join(names[:SHOWN])}{', ...' if len(names) > SHOWN else ''}"
        for what, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", [f"{n} is {_size(found[n])}, not {_size(wanted[n])}" for n in other]),
        )
        if names
    ]
    return "; ".join(said)


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a single value"


def _unknown(found: Shapes) -> str:
    """What to say of tensors that no family is recognised in: the model with most of the names."""
    models = {name: shapes_of(config) for name, config in PRESETS.items()}
    nearest = max(models, key=lambda name: _likeness(models[name], found))
    shared = len(models[nearest].keys() & found.keys())
    if shared == 0:
        first = ", ".join(list(found)[:SHOWN]) or "there are none"
        return f"no model that is known here has tensors of these names: {first}"
    text = differences(models[nearest], found)
    return (
        f"not the weights of a model that is known here. The nearest is {nearest}, with {shared} of its "
        f"{len(models[nearest])} names; {text or 'the names are its own, but its config is not in the file'}"
    )


def _likeness(wanted: Shapes, found: Shapes) -> tuple[float, int]:
    """The share of all names that both have, and for how many of those shapes are equal too."""
    shared = wanted.keys() & found.keys()
    same = sum(tuple(wanted[name]) == tuple(found[name]) for name in shared)
    return len(shared) / len(wanted.keys() | found.keys()), same
