"""From a config to a model with seeded weights: the table from config class to model class."""

import math

import torch
from torch import Tensor, nn

from causalvae import rng
from causalvae.models.causalvae import CausalVAE
from causalvae.models.layers import MIX_INIT, FrameAttention, ResnetBlock
from causalvae.models.presets import CausalVAEConfig
from causalvae.models.start import start_linear

MODELS = {CausalVAEConfig: CausalVAE}


def build(config: CausalVAEConfig, *, seed: int = 0) -> CausalVAE:
    """A model whose weights are a function of (config, seed), fp32 on the CPU."""
    with torch.device("meta"):
        vae = MODELS[type(config)](config)
    vae.to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            _fill(parameter, name, rng.key("weights", seed, name))
        for module in vae.modules():
            _calm(module, branch=0.1 if config.resampling == "shuffle" else 1.0)
    if config.resampling == "shuffle":
        start_linear(vae)
    return vae


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
        module.norm2.weight.fill_(branch)
        for parameter in module.conv2.parameters():
            parameter.zero_()
    if isinstance(module, FrameAttention):
        for parameter in module.proj_out.parameters():
            parameter.zero_()
