"""From a config to a model with seeded weights: the table from config class to model class."""

import math
from collections.abc import Callable
from typing import overload

import torch
from torch import Tensor, nn

from causalvae import rng
from causalvae.models.causalvae import CausalVAE
from causalvae.models.diffusers import DiffusersVAE, build_diffusers
from causalvae.models.diffusers import skeleton as diffusers_skeleton
from causalvae.models.layers import MIX_INIT, FrameAttention, LayerNorm, ResnetBlock
from causalvae.models.presets import (
    CausalVAEConfig,
    DiffusersConfig,
    ModelConfig,
    OwnConfig,
    WFVAEConfig,
)
from causalvae.models.start import start_linear
from causalvae.models.wavelet import Haar, InverseHaar
from causalvae.models.wfvae import WFVAE

Model = CausalVAE | WFVAE | DiffusersVAE

MODELS: dict[type[OwnConfig], Callable[..., CausalVAE | WFVAE]] = {
    CausalVAEConfig: CausalVAE,
    WFVAEConfig: WFVAE,
}


@overload
def build(config: CausalVAEConfig, *, seed: int = 0) -> CausalVAE: ...
@overload
def build(config: WFVAEConfig, *, seed: int = 0) -> WFVAE: ...
@overload
def build(config: ModelConfig, *, seed: int = 0) -> Model: ...
def build(config: ModelConfig, *, seed: int = 0) -> Model:
    """A model whose weights are a function of (config, seed), fp32 on the CPU."""
    if isinstance(config, DiffusersConfig):
        return build_diffusers(config, seed=seed)
    vae = skeleton(config).to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            _fill(parameter, name, rng.key("weights", seed, name))
        linear = isinstance(config, CausalVAEConfig) and config.resampling == "shuffle"
        for module in vae.modules():
            _calm(module, branch=0.1 if linear else 1.0)
            if isinstance(module, Haar | InverseHaar):
                module.reset()
    if isinstance(vae, CausalVAE) and vae.config.resampling == "shuffle":
        start_linear(vae)
    return vae


def skeleton(config: ModelConfig) -> Model:
    """A model whose weights are on the meta device: names and shapes, and no memory."""
    if isinstance(config, DiffusersConfig):
        return diffusers_skeleton(config)
    with torch.device("meta"):
        return MODELS[type(config)](config)


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of a model's tensors by name, as its files have them."""
    return {name: tuple(tensor.shape) for name, tensor in skeleton(config).state_dict().items()}


def _fill(parameter: Tensor, name: str, base: int) -> None:
    leaf = name.rpartition(".")[2]
    if leaf == "mix_factor":
        parameter.fill_(MIX_INIT)
    elif leaf == "bias":
        parameter.zero_()
    elif parameter.dim() == 1:  # the scale of a norm
        parameter.fill_(1.0)
    else:
        fan_in = math.prod(parameter.shape[1:])
        parameter.copy_(rng.normal(parameter.shape, base) / math.sqrt(fan_in))


def _calm(module: nn.Module, *, branch: float) -> None:
    """Residual branches start at zero, so that the network starts as its linear path.

    branch: scale of what the last convolution of a branch sees. The optimiser moves all of its weights by as
    much at once, so that with 1 the first steps spoil the linear path: a tenth was measured to keep it.
    """
    if isinstance(module, ResnetBlock):
        norm = module.norm2.norm if isinstance(module.norm2, LayerNorm) else module.norm2
        norm.weight.fill_(branch)
        for parameter in module.conv2.parameters():
            parameter.zero_()
    if isinstance(module, FrameAttention):
        for parameter in module.proj_out.parameters():
            parameter.zero_()
