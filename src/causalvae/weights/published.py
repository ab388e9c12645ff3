"""The published `config.json` of a model: written from a config of ours, and compared with one.

Fields and names of blocks are those of Open-Sora-Plan and WF-VAE. Names that are not in here belong to blocks
that no published weights use, and are refused by name.
"""

from collections.abc import Mapping
from typing import Any

from causalvae.errors import WeightsError
from causalvae.models.presets import CausalVAEConfig, OwnConfig, WFVAEConfig

ATTENTION = {"AttnBlock3D": True, "AttnBlock3DFix": False}  # whether it mixes frames
LATENT_SCALE = 0.18215  # what diffusion models multiply latents by
SPACE_TIME = ("Spatial2xTime2x3DDownsample", "Spatial2xTime2x3DUpsample")
WAVELETS = {
    "l1_dowmsample_block": "Downsample",  # as it is spelled there
    "l1_downsample_wavelet": "HaarWaveletTransform2D",
    "l2_dowmsample_block": SPACE_TIME[0],
    "l2_downsample_wavelet": "HaarWaveletTransform3D",
    "l1_upsample_block": "Upsample",
    "l1_upsample_wavelet": "InverseHaarWaveletTransform2D",
    "l2_upsample_block": SPACE_TIME[1],
    "l2_upsample_wavelet": "InverseHaarWaveletTransform3D",
}
BLOCKS = {
    *("", "Conv2d", "CausalConv3d", "ResnetBlock2D", "ResnetBlock3D", *ATTENTION, *WAVELETS.values()),
    *("SpatialDownsample2x", "SpatialUpsample2x", "TimeDownsample2x", "TimeUpsample2x"),
    *("TimeDownsampleRes2x", "TimeUpsampleRes2x"),
}
NOT_COMPARED = ("scale", "shift")  # of latents, for diffusion models; the tensors don't depend on them


def published_config(config: OwnConfig) -> dict[str, Any] | None:  # Any: JSON
    """Fields of the published config.json for a model; None if the published code has no such model."""
    if isinstance(config, WFVAEConfig):
        return _wfvae_fields(config)
    published = (config.resampling, config.norm, config.stem, config.attention) == ("conv", "clip", 1, True)
    return _causal_fields(config) if published else None


def _wfvae_fields(config: WFVAEConfig) -> dict[str, Any]:  # Any: JSON
    return {
        "_class_name": "WFVAEModel",
        "_diffusers_version": "0.30.2",
        "latent_dim": config.z_channels,
        "base_channels": config.base_channels,
        "encoder_num_resblocks": config.encoder_res_blocks,
        "encoder_energy_flow_hidden_size": config.encoder_energy,
        "decoder_num_resblocks": config.decoder_res_blocks,
        "decoder_energy_flow_hidden_size": config.decoder_energy,
        "connect_res_layer_num": config.connect_res_blocks,
        "attention_type": "AttnBlock3DFix",
        "use_attention": config.attention,
        "dropout": 0.0,
        "norm_type": "layernorm",
        "t_interpolation": "trilinear",
        **WAVELETS,
        "scale": [LATENT_SCALE] * config.z_channels,
        "shift": [0.0] * config.z_channels,
    }


def _causal_fields(config: CausalVAEConfig) -> dict[str, Any]:  # Any: JSON
    levels = range(len(config.hidden_size_mult))
    attention = next(name for name, mixes in ATTENTION.items() if mixes == config.mixing_attention)
    fields: dict[str, Any] = {
        "_class_name": "CausalVAEModel",
        "_diffusers_version": "0.27.2",
        "hidden_size": config.hidden_size,
        "hidden_size_mult": list(config.hidden_size_mult),
        "num_res_blocks": config.num_res_blocks,
        "z_channels": config.z_channels,
        "embed_dim": config.latent_channels,
        "double_z": True,
        "dropout": 0.0,
        "resolution": 256,
        "attn_resolutions": [],
        "q_conv": "CausalConv3d",
        "encoder_conv_in": "Conv2d" if config.flat_conv_in else "CausalConv3d",
        "encoder_resnet_blocks": [f"ResnetBlock{'2D' if i < config.flat_levels else '3D'}" for i in levels],
        "decoder_conv_in": "CausalConv3d",
        "decoder_resnet_blocks": ["ResnetBlock3D"] * len(levels),
        **_resampling_fields(config, levels=levels),
    }
    for side in ("encoder", "decoder"):
        fields[f"{side}_conv_out"] = "CausalConv3d"
        fields[f"{side}_mid_resnet"] = "ResnetBlock3D"
        fields[f"{side}_attention"] = attention
    if config.temporal == "joint" or not config.quant:
        fields["use_quant_layer"] = config.quant  # the code before v1.2 has no such field
    return fields


def _resampling_fields(config: CausalVAEConfig, *, levels: range) -> dict[str, list[str]]:
    kind = {"pool": "2x", "mix": "Res2x", "joint": None}[config.temporal]
    plain = "Downsample" if config.flat_downsample else "SpatialDownsample2x"
    joint_down, joint_up = SPACE_TIME if kind is None else ("", "")
    downs, ups = config.temporal_levels, config.decoder_temporal_levels

    def plan(space: str, joint: str, *, where: list[bool], time: tuple[int, ...]) -> list[str]:
        return [joint if joint and i in time else space if where[i] else "" for i in levels]

    return {
        "encoder_spatial_downsample": plan(
            plain, joint_down, where=[i in config.spatial_levels for i in levels], time=downs
        ),
        "encoder_temporal_downsample": [
            f"TimeDownsample{kind}" if kind and i in downs else "" for i in levels
        ],
        "decoder_spatial_upsample": plan(
            "SpatialUpsample2x", joint_up, where=[i - 1 in config.spatial_levels for i in levels], time=ups
        ),
        "decoder_temporal_upsample": [f"TimeUpsample{kind}" if kind and i in ups else "" for i in levels],
    }


def refuse_unknown_blocks(given: Mapping[str, Any]) -> None:  # Any: JSON
    """WeightsError if a parsed config.json names a block that is not built here."""
    for field, value in given.items():
        names = value if isinstance(value, list) else [value]
        if not field.startswith(("encoder_", "decoder_", "l1_", "l2_", "attention_type", "q_conv")):
            continue
        for name in names:
            if isinstance(name, str) and name not in BLOCKS:
                raise WeightsError(
                    f"config.json: {field} is {name[:60]!r}. No published weights use this block, and it is "
                    "not built here"
                )


def mixes_frames(given: Mapping[str, Any]) -> bool | None:  # Any: JSON
    """Whether the attention that a parsed config.json names mixes frames; None if it names none."""
    names = {str(given[field]) for field in ("encoder_attention", "decoder_attention") if field in given}
    if len(names) > 1:
        raise WeightsError(
            f"config.json: encoder and decoder with different attention, {' and '.join(sorted(names))}, are "
            "not built here"
        )
    return ATTENTION.get(names.pop()) if names else None


def named_levels(given: Mapping[str, Any], field: str) -> tuple[int, ...] | None:  # Any: JSON
    """The levels at which a list of a parsed config.json names a block; None if there is no such list."""
    value = given.get(field)
    return tuple(i for i, name in enumerate(value) if name) if isinstance(value, list) else None


def refuse_contradictions(given: Mapping[str, Any], config: OwnConfig) -> None:  # Any: JSON
    """WeightsError if a parsed config.json says something else than this config, which weights have shown.

    Fields that decide nothing about a model are not looked at.
    """
    own = published_config(config)
    assert own is not None
    ignored = (*NOT_COMPARED, "dropout", "resolution", "_diffusers_version")
    different = [
        name for name in own.keys() & given.keys() if name not in ignored and own[name] != given[name]
    ]
    if different:
        said = "; ".join(
            f"{name} is {given[name]!r:.80} there, {own[name]!r}" for name in sorted(different)[:3]
        )
        raise WeightsError(
            f"config.json does not belong to these weights: {said} by the weights' names and shapes"
        )
