"""Tiny video VAEs of diffusers for tests, of every class and of the variants that take another path."""

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from causalvae import rng
from causalvae.models.diffusers import DiffusersVAE, build_diffusers, diffusers_config
from causalvae.models.presets import DiffusersConfig

SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "wan-2.1": (
        "AutoencoderKLWan",
        {
            "base_dim": 8,
            "z_dim": 4,
            "dim_mult": [1, 1, 2],
            "num_res_blocks": 1,
            "temperal_downsample": [True, True],
        },
    ),
    "wan-2.2": (
        "AutoencoderKLWan",
        {
            "base_dim": 8,
            "decoder_base_dim": 16,
            "z_dim": 4,
            "dim_mult": [1, 2, 2],
            "num_res_blocks": 1,
            "temperal_downsample": [True, True],
            "is_residual": True,
            "patch_size": 2,
            "in_channels": 12,
            "out_channels": 12,
            "clip_output": False,  # in the published config, and unknown to the class
        },
    ),
    "cogvideox": (
        "AutoencoderKLCogVideoX",
        {
            "block_out_channels": [8, 8, 16],
            "down_block_types": ["CogVideoXDownBlock3D"] * 3,
            "up_block_types": ["CogVideoXUpBlock3D"] * 3,
            "latent_channels": 4,
            "layers_per_block": 1,
            "norm_num_groups": 4,
        },
    ),
    "hunyuan": (
        "AutoencoderKLHunyuanVideo",
        {
            "block_out_channels": [8, 8, 16, 16],
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "latent_channels": 4,
        },
    ),
    "ltx-0.9.0": (
        "AutoencoderKLLTXVideo",
        {
            "latent_channels": 8,
            "block_out_channels": [8, 8, 16, 16],
            "decoder_block_out_channels": [8, 8, 16, 16],
            "layers_per_block": [1] * 5,
            "decoder_layers_per_block": [1] * 5,
            "patch_size": 1,
        },
    ),
    "ltx-0.9.5": (
        "AutoencoderKLLTXVideo",
        {
            "latent_channels": 8,
            "block_out_channels": [8, 16, 32, 32, 64],
            "down_block_types": ["LTXVideo095DownBlock3D"] * 4,
            "decoder_block_out_channels": [8, 16, 32],
            "layers_per_block": [1] * 5,
            "decoder_layers_per_block": [1] * 4,
            "spatio_temporal_scaling": [True] * 4,
            "decoder_spatio_temporal_scaling": [True] * 3,
            "decoder_inject_noise": [False] * 4,
            "downsample_type": ["spatial", "temporal", "spatiotemporal", "spatiotemporal"],
            "upsample_residual": [True] * 3,
            "upsample_factor": [2] * 3,
            "timestep_conditioning": True,
            "patch_size": 1,
            "spatial_compression_ratio": 8,
            "temporal_compression_ratio": 8,
        },
    ),
    "mochi": (
        "AutoencoderKLMochi",
        {
            "latent_channels": 4,
            "encoder_block_out_channels": [32] * 4,
            "decoder_block_out_channels": [32] * 4,
            "layers_per_block": [1] * 5,
            "temporal_expansions": [1, 2, 3],
        },
    ),
    "cosmos": (
        "AutoencoderKLCosmos",
        {
            "latent_channels": 4,
            "encoder_block_out_channels": [8, 8, 8, 16],
            "decode_block_out_channels": [8, 16, 16, 16],
            "attention_resolutions": [4],
            "resolution": 32,
            "num_layers": 1,
        },
    ),
}


@cache
def config_of(name: str) -> DiffusersConfig:
    """The config of a tiny model."""
    return diffusers_config(*SETTINGS[name])


def moved(name: str, *, seed: int = 1) -> DiffusersVAE:
    """A tiny model whose every weight was moved, so that nothing is zero or one by its start."""
    vae = build_diffusers(config_of(name), seed=seed)
    with torch.no_grad():
        for each, parameter in vae.named_parameters():
            scale = 0.2 / math.sqrt(max(1, math.prod(parameter.shape[1:])))
            parameter.add_(scale * rng.normal(parameter.shape, rng.key("moved", seed, each)))
    return vae


def clip_for(vae: DiffusersVAE, *, groups: int, base: int = 0, batch: int = 1) -> Tensor:
    """b 3 t h w in about [-1, 1] of 1 + `groups` groups of latent frames, two latent positions high."""
    g = vae.geometry
    size = (1 + g.temporal * g.group * groups, 2 * g.spatial, 2 * g.spatial)
    return 0.5 * rng.normal((batch, 3, *size), rng.key("clip", base))


def noise_for(vae: DiffusersVAE, x: Tensor) -> Tensor:
    """Standard normal in the shape of the latents."""
    return rng.normal((len(x), *vae.geometry.latent_shape(*x.shape[2:])), rng.key("noise", 3))


def gradients(vae: DiffusersVAE, loss: Callable[[], Tensor]) -> dict[str, Tensor | None]:
    """Gradient of each parameter, and none left behind."""
    loss().backward()
    found = {name: parameter.grad for name, parameter in vae.named_parameters()}
    vae.zero_grad(set_to_none=True)
    return found
