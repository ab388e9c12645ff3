"""Video VAEs of the diffusers library behind our protocol, to be trained as our own.

The networks and their arithmetic are diffusers' and stay so: here is what they lack for training. Chunks of
a clip hand their past on as arguments, nothing is clamped or tiled, weights are a function of a seed, and
what a config says about its shapes is checked before anything is allocated. Reading and writing folders:
`models.diffusers_folder`. The library is imported when a model is made, as it is an extra.
"""

import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from causalvae import rng
from causalvae.errors import ConfigError, WeightsError
from causalvae.models.base import Posterior
from causalvae.models.presets import DIFFUSERS_GEOMETRY, DiffusersConfig
from causalvae.models.stream import ClipStream, Stream

NO_STREAM = "diffusers' code takes a clip as a whole, and its models are run by it"
LAST_LAYERS = {
    "AutoencoderKLWan": "decoder.conv_out",
    "AutoencoderKLCogVideoX": "decoder.conv_out.conv",
    "AutoencoderKLHunyuanVideo": "decoder.conv_out.conv",
    "AutoencoderKLLTXVideo": "decoder.conv_out.conv",
    "AutoencoderKLMochi": "decoder.proj_out",
    "AutoencoderKLCosmos": "decoder.conv_out.conv_t",
}
CONSTANTS = ("latents_mean", "latents_std")  # buffers of LTX; of others settings. Nothing here reads them
WAN_CHUNK = 4  # frames of a chunk after the first, whatever Wan's settings say

# Far above every published model, and small enough that a network without memory is made in seconds.
LARGEST_NUMBER = 1 << 16
LONGEST_LIST, LONGEST_STATISTICS = 16, 1024
MOST_LAYERS = 64
LAYER_COUNTS = ("layers_per_block", "decoder_layers_per_block", "num_res_blocks", "num_layers")
MAY_BE_ZERO = ("dropout", "scaling_factor", "shift_factor", *CONSTANTS)  # of the numbers; others are sizes
MOST_WEIGHTS = 4_000_000_000

# What a constructor or a pass of diffusers raises for settings that do not fit together.
MISFIT = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    UnboundLocalError,
    ValueError,
)


class DiffusersVAE(nn.Module):
    """A video VAE of diffusers. Its parameters are `net.` and the names that diffusers has.

    arithmetic: numbers that convolutions and products of matrices compute in, by autocast, with weights in
    fp32; None for those of the weights. The meta device has no autocast, and shows what fp32 takes.
    """

    net: Any  # one of the classes of _classes(), which are not there without the extra

    def __init__(self, config: DiffusersConfig) -> None:
        super().__init__()
        self.config = config
        self.geometry = config.geometry
        self.streamable = False
        self.why_not_streamable = self.why_tiles_blend = NO_STREAM
        settings = config.settings
        self.net = _network(config.class_name, settings)
        self.arithmetic: torch.dtype | None = None
        self.recompute = False
        self.wan = config.class_name == "AutoencoderKLWan"
        self.patch = settings["patch_size"] if self.wan else None
        self.certain = config.class_name == "AutoencoderKLCosmos"
        self.conditioned = bool(settings.get("timestep_conditioning"))

    @property
    def last_layer(self) -> nn.Module:
        """The convolution that makes pixels; for Mochi a linear layer."""
        return self.net.get_submodule(LAST_LAYERS[self.config.class_name])

    def encode(self, x: Tensor, stream: Stream | None = None) -> Posterior:
        """x: b 3 t h w in [-1, 1], with frames and sizes as the geometry pads them."""
        _refuse(stream)
        with self._numbers(x):
            moments = self._moments(x.to(self._dtype))
        return Posterior.of_latent(moments) if self.certain else Posterior.of_moments(moments)

    def decode(self, z: Tensor, stream: Stream | None = None) -> Tensor:
        """z: b c k h w -> b 3 t h w, about [-1, 1], unclamped."""
        _refuse(stream)
        z = z.to(self._dtype)
        with self._numbers(z):
            if self.wan:
                return _wan_decode(self.net, z, patch=self.patch, recompute=self.recompute)
            if self.conditioned:  # by how noisy the latent is, which it is not
                return self.net.decode(z, z.new_zeros(len(z))).sample
            return self.net.decode(z).sample

    def forward(self, x: Tensor, noise: Tensor | None) -> tuple[Tensor, Posterior]:
        """Reconstruction and posterior of x. noise: standard normal in the latent's shape.

        None takes the mode.
        """
        posterior = self.encode(x)
        return self.decode(posterior.latent(noise)), posterior

    def stream(self) -> ClipStream:
        """ConfigError: no model of diffusers streams."""
        return ClipStream(self, why_not=self.why_not_streamable)

    def set_recompute(self, *, on: bool) -> None:
        """Run blocks again in backward in the place of keeping what is inside; Wan's, chunks of a clip.

        The numbers are the same.
        """
        self.recompute = on
        if self.wan:
            return
        if on:
            self.net.enable_gradient_checkpointing()
        else:
            self.net.disable_gradient_checkpointing()

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.net.parameters()).dtype

    def _numbers(self, x: Tensor) -> AbstractContextManager[object]:
        if self.arithmetic is None or x.device.type == "meta":
            return nullcontext()
        return torch.autocast(x.device.type, dtype=self.arithmetic)

    def _moments(self, x: Tensor) -> Tensor:
        if self.wan:
            return _wan_encode(self.net, x, patch=self.patch, recompute=self.recompute)
        return self.net.encode(x).latent_dist.parameters


def diffusers_config(class_name: str, settings: Mapping[str, Any]) -> DiffusersConfig:
    """The config of a model from the settings of a diffusers config.json, with the defaults of its class.

    Names with a leading underscore are dropped, unknown ones are kept and have no effect, as in diffusers.
    Any: JSON. WeightsError for another class and for settings that no model has.
    """
    if class_name not in DIFFUSERS_GEOMETRY:
        raise WeightsError(
            f"diffusers' class {class_name} can't be trained here; those that can: "
            f"{', '.join(sorted(DIFFUSERS_GEOMETRY))}"
        )
    defaults = {
        name: each.default for name, each in _parameters(class_name).items() if each.default is not each.empty
    }
    given = {name: value for name, value in settings.items() if not name.startswith("_")}
    merged = json.loads(json.dumps(defaults | given))  # tuples become lists, as in a file
    _check_settings(class_name, merged)
    canonical = json.dumps(merged, sort_keys=True, separators=(",", ":"))
    config = DiffusersConfig(class_name=class_name, config_json=canonical)
    _check_shapes(config)
    return config


def ignored_settings(config: DiffusersConfig) -> tuple[str, ...]:
    """Settings that the installed diffusers does not know, for a warning."""
    known = {*_parameters(config.class_name), *CONSTANTS}
    return tuple(sorted(name for name in config.settings if name not in known))


def build_diffusers(config: DiffusersConfig, *, seed: int = 0) -> DiffusersVAE:
    """A model whose weights are a function of (config, seed), fp32 on the CPU."""
    vae = skeleton(config)
    weights = {name: _first(p, name, rng.key("weights", seed, name)) for name, p in vae.named_parameters()}
    vae.load_state_dict(weights, strict=True, assign=True)
    return vae


def skeleton(config: DiffusersConfig) -> DiffusersVAE:
    """The model with its constants and with weights that have no memory; load_state_dict assigns them."""
    with torch.random.fork_rng(devices=[]), _EmptyOnMeta():
        vae = DiffusersVAE(config)
    num_weights = sum(parameter.numel() for parameter in vae.parameters())
    if num_weights > MOST_WEIGHTS:
        raise WeightsError(
            f"diffusers {config.class_name}: its settings make {num_weights} weights, "
            f"and {MOST_WEIGHTS} are the most that are taken for a video VAE"
        )
    return vae


class _EmptyOnMeta(TorchFunctionMode):
    """What is allocated without numbers, to be filled by an initialisation, gets no memory."""

    # Any: whatever functions take and return
    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run a function of torch."""
        kwargs = kwargs or {}
        if func is torch.empty:
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


def _classes() -> dict[str, type[nn.Module]]:
    try:
        from diffusers.models.autoencoders.autoencoder_kl_cogvideox import AutoencoderKLCogVideoX
        from diffusers.models.autoencoders.autoencoder_kl_cosmos import AutoencoderKLCosmos
        from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import AutoencoderKLHunyuanVideo
        from diffusers.models.autoencoders.autoencoder_kl_ltx import AutoencoderKLLTXVideo
        from diffusers.models.autoencoders.autoencoder_kl_mochi import AutoencoderKLMochi
        from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
    except ImportError as error:
        raise ConfigError(
            f"models of diffusers need the extra of that name: pip install 'causalvae[diffusers]' ({error})"
        ) from error
    return {
        "AutoencoderKLWan": AutoencoderKLWan,
        "AutoencoderKLCogVideoX": AutoencoderKLCogVideoX,
        "AutoencoderKLHunyuanVideo": AutoencoderKLHunyuanVideo,
        "AutoencoderKLLTXVideo": AutoencoderKLLTXVideo,
        "AutoencoderKLMochi": AutoencoderKLMochi,
        "AutoencoderKLCosmos": AutoencoderKLCosmos,
    }


def _parameters(class_name: str) -> dict[str, inspect.Parameter]:
    return dict(list(inspect.signature(_classes()[class_name].__init__).parameters.items())[1:])


# Any: settings by name, as in JSON, and a class of diffusers
def _network(class_name: str, settings: Mapping[str, Any]) -> Any:
    """The network of diffusers, without cutting clips in pieces that overlap."""
    known = _parameters(class_name)
    network: Any = _classes()[class_name](**{n: value for n, value in settings.items() if n in known})
    if class_name == "AutoencoderKLHunyuanVideo":  # on by default for clips of more than 16 frames
        network.use_framewise_encoding = network.use_framewise_decoding = False
    for name, buffer in list(network.named_buffers(recurse=False)):
        if name in CONSTANTS:  # in the config, so that a file of parameters alone is the whole model
            values = settings.get(name)
            kept = buffer if values is None else buffer.new_tensor(values)
            network.register_buffer(name, kept, persistent=False)
    return network


def _check_settings(class_name: str, settings: Mapping[str, Any]) -> None:  # Any: JSON
    for name, value in settings.items():
        each = value if isinstance(value, list) else [value]
        longest = LONGEST_STATISTICS if name in CONSTANTS else LONGEST_LIST
        most = MOST_LAYERS if name in LAYER_COUNTS else LARGEST_NUMBER
        plain = all(item is None or isinstance(item, str | int | float) for item in each)
        empty = name not in MAY_BE_ZERO and any(_is_no_size(item) for item in each)
        if not plain or empty or len(each) > longest or any(_too_large(item, most) for item in each):
            said = json.dumps(value)
            raise WeightsError(
                f"diffusers {class_name}: no model has {name} = {said[:80]}{'...' if said[80:] else ''}"
            )
    chance = [n for n in ("dropout", "decoder_inject_noise") if _any(settings.get(n))]
    if chance:
        raise WeightsError(
            f"diffusers {class_name}: with {chance[0]} every pass draws numbers of its own, so that no step "
            f"could be repeated; only models without it can be trained"
        )


def _too_large(value: object, most: int) -> bool:
    return isinstance(value, int | float) and not abs(value) <= most


def _is_no_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value <= 0


def _any(value: object) -> bool:
    return any(value) if isinstance(value, list) else bool(value)


def _check_shapes(config: DiffusersConfig) -> None:
    """Raise WeightsError unless a pass without memory has the shapes that the geometry says."""
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"), torch.no_grad():
            vae = DiffusersVAE(config).to("meta")  # Cosmos keeps constants on the CPU
            g = vae.geometry
            x = torch.empty(1, 3, 1 + g.temporal * g.group, 2 * g.spatial, 2 * g.spatial)
            mean = vae.encode(x).mean
            recon = vae.decode(mean)
    except MISFIT as error:
        raise WeightsError(
            f"diffusers {config.class_name}: its settings do not make a network: "
            f"{type(error).__name__}: {str(error).strip()[:300]}"
        ) from error
    expected = (1, *g.latent_shape(*x.shape[2:]))
    if tuple(mean.shape) != expected or recon.shape != x.shape:
        raise WeightsError(
            f"diffusers {config.class_name}: by its settings a clip of {tuple(x.shape)} becomes a latent of "
            f"{expected} and a clip again, but the network makes {tuple(mean.shape)} and {tuple(recon.shape)}"
        )


def _first(parameter: Tensor, name: str, base: int) -> Tensor:
    """First numbers of a parameter: norms scale by 1, biases are 0, the rest keeps the size of its input."""
    leaf = name.rpartition(".")[2]
    if leaf == "timestep_scale_multiplier":
        return torch.full(parameter.shape, 1000.0)  # as LTX has it
    if leaf == "bias" or leaf.startswith("per_channel_scale"):
        return torch.zeros(parameter.shape)
    if leaf == "gamma" or (leaf == "weight" and parameter.dim() == 1):
        return torch.ones(parameter.shape)
    return rng.normal(parameter.shape, base) / math.sqrt(max(1, math.prod(parameter.shape[1:])))


def _refuse(stream: Stream | None) -> None:
    if stream is not None:
        raise ConfigError(f"this model can't stream: {NO_STREAM}")


# Here and below, Any is Wan's network.
def _wan_encode(net: Any, x: Tensor, *, patch: int | None, recompute: bool) -> Tensor:
    """Moments of the latent. The first frame is a chunk, then every four; each takes the past of the others.

    x: b 3 t h w -> b 2c k h w.
    """
    from diffusers.models.autoencoders.autoencoder_kl_wan import patchify

    x = x if patch is None else patchify(x, patch_size=patch)
    last = range((x.shape[2] - 1) // WAN_CHUNK + 1)
    chunks = [x[:, :, max(0, WAN_CHUNK * (i - 1) + 1) : WAN_CHUNK * i + 1] for i in last]
    return net.quant_conv(_in_chunks(net.encoder, chunks, first={}, recompute=recompute))


def _wan_decode(net: Any, z: Tensor, *, patch: int | None, recompute: bool) -> Tensor:
    """Pixels as they leave the network: AutoencoderKLWan.decode would clamp them, and no gradient come back.

    z: b c k h w -> b 3 t h w.
    """
    from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

    chunks = net.post_quant_conv(z).split(1, dim=2)
    x = _in_chunks(net.decoder, chunks, first={"first_chunk": True}, recompute=recompute)
    return x if patch is None else unpatchify(x, patch_size=patch)


Past = tuple[Tensor | str | None, ...]  # of every causal layer; Wan writes a word for the second chunk


def _in_chunks(
    network: nn.Module, chunks: Sequence[Tensor], *, first: dict[str, bool], recompute: bool
) -> Tensor:
    """Chunks b c t h w through an encoder or a decoder of Wan, one after the other, joined along t.

    first: arguments for the first chunk. The past is handed on, so it ends with this call.
    """
    past: Past = (None,) * sum(1 for _ in network.modules())
    # A step in parts first has the last layer learn alone, and only its input is kept without recomputation.
    learns = any(p.requires_grad for n, p in network.named_parameters() if not n.startswith("conv_out."))
    made: list[Tensor] = []
    for i, chunk in enumerate(chunks):
        run = partial(network, **first) if i == 0 else network
        if recompute and torch.is_grad_enabled() and (learns or chunk.requires_grad):
            out, past = checkpoint(_chunk, run, chunk, past, use_reentrant=False, preserve_rng_state=False)
        else:
            out, past = _chunk(run, chunk, past)
        made.append(out)
    return torch.cat(made, dim=2)


def _chunk(run: Callable[..., Tensor], x: Tensor, past: Past) -> tuple[Tensor, Past]:
    """One chunk and what the next one needs. A function: what Wan changes in place is made here."""
    kept = list(past)
    out = run(x, feat_cache=kept, feat_idx=[0])
    return out, tuple(kept)
