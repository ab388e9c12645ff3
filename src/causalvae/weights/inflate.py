"""From an image VAE to the first weights of a video VAE that does to pictures what the image VAE does.

A kernel over height and width becomes one over time too, with all of its weight in one place of time, so that
every frame sees one frame only. What has no counterpart in an image VAE starts as the identity.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from causalvae.errors import ConfigError, WeightsError
from causalvae.models.build import shapes as shapes_of
from causalvae.models.layers import MIX_INIT
from causalvae.models.presets import (
    DIFFUSERS_GEOMETRY,
    GROUPS,
    PRESETS,
    CausalVAEConfig,
    OwnConfig,
    WFVAEConfig,
    check,
)
from causalvae.weights.names import TIME_RESAMPLER, Shapes, differences, recognise
from causalvae.weights.read import WeightsFile, read_tensors

Method = Literal["tail", "center", "mean"]
QUANT = ("quant_conv.", "post_quant_conv.")
IMAGE_CLASS = "AutoencoderKL"  # of diffusers
FAMILIES = {"diffusers-image": "diffusers image VAE", "ldm-image": "LDM image VAE"}
WANTED = "give the folder or file of a diffusers AutoencoderKL, or a .ckpt of a latent diffusion image VAE"
# Names of diffusers and what stands for them in LDM, whose names those of the video VAEs here are.
RENAMED = (
    (re.compile(r"\.(down|up)_blocks\.(\d+)\.resnets\.(\d+)\."), r".\1.\2.block.\3."),
    (re.compile(r"\.(down|up)_blocks\.(\d+)\.(down|up)samplers\.0\.conv\."), r".\1.\2.\3sample.conv."),
    (re.compile(r"\.mid_block\.attentions\.0\."), ".mid.attn_1."),
    (re.compile(r"\.mid_block\.resnets\.0\."), ".mid.block_1."),
    (re.compile(r"\.mid_block\.resnets\.1\."), ".mid.block_2."),
    (re.compile(r"(?<=\.attn_1\.)group_norm\."), "norm."),
    (re.compile(r"(?<=\.attn_1\.)(?:to_q|query)\."), "q."),  # the second is that of older files
    (re.compile(r"(?<=\.attn_1\.)(?:to_k|key)\."), "k."),
    (re.compile(r"(?<=\.attn_1\.)(?:to_v|value)\."), "v."),
    (re.compile(r"(?<=\.attn_1\.)(?:to_out\.0|proj_attn)\."), "proj_out."),
    (re.compile(r"\.conv_shortcut\."), ".nin_shortcut."),
    (re.compile(r"\.conv_norm_out\."), ".norm_out."),
)


@dataclass(frozen=True)
class Image:
    """An image VAE: its tensors under LDM's names, as its file has their types. family: who saved it."""

    tensors: dict[str, Tensor]
    family: str
    file: WeightsFile


def read_image(path: Path) -> Image:
    """The image VAE in a file or folder, told apart by content.

    WeightsError, which begins with the path, if it holds anything else, a video VAE for example.
    """
    file = read_tensors(path)
    where = file.origin.path
    name = (file.config or {}).get("_class_name")
    if file.kind is not None or name in DIFFUSERS_GEOMETRY:
        raise WeightsError(_video(where, file.kind or str(name)))
    found = {name: tuple(tensor.shape) for name, tensor in file.tensors.items()}
    try:
        seen = recognise(found, file.config)
    except WeightsError as error:
        raise WeightsError(f"{where}: holds no image VAE that is known here; {WANTED}. {error}") from error
    if seen.config is not None:
        raise WeightsError(_video(where, seen.family))
    odd = next((name for name, tensor in file.tensors.items() if not tensor.is_floating_point()), None)
    if odd is not None:
        raise WeightsError(
            f"{where}: {odd} is not of floating point numbers; quantised weights are of no use"
        )
    groups = (file.config or {}).get("norm_num_groups", GROUPS) if name == IMAGE_CLASS else GROUPS
    if groups != GROUPS:
        raise WeightsError(f"{where}: its norms have {groups} groups, and those of the video VAEs {GROUPS}")
    return Image(ldm_names(file.tensors), FAMILIES[seen.family], file)


def _video(path: Path, whose: str) -> str:
    return (
        f"{path}: holds a video VAE ({whose}) and no image VAE; training can start from it as it is: "
        f"`causalvae train --load_from_checkpoint {path}`"
    )


def ldm_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of an image VAE under LDM's names, which count the decoder's levels from full resolution.

    Weights of attention become kernels of one pixel. Other names stay as they are.
    """
    ups = {int(match[1]) for name in tensors if (match := re.match(r"decoder\.up_blocks\.(\d{1,3})\.", name))}
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        new = re.sub(
            r"^decoder\.up_blocks\.(\d{1,3})\.",
            lambda match: f"decoder.up_blocks.{max(ups) - int(match[1])}.",
            name,
        )
        for pattern, text in RENAMED:
            new = pattern.sub(text, new)
        flat = ".attn_1." in new and tensor.dim() == 2
        renamed[new] = tensor[:, :, None, None] if flat else tensor
    return renamed


def refuse_model(name: str, config: OwnConfig) -> CausalVAEConfig:
    """The config of a model that image VAEs have the layers of. ConfigError that says why not."""
    if isinstance(config, WFVAEConfig):
        why = "its network works on wavelets of a clip, and an image VAE on pixels"
    elif config.resampling == "shuffle":
        why = "it changes the resolution by space-to-depth, and an image VAE by strided convolutions"
    else:
        return config
    fitting = [n for n, c in PRESETS.items() if isinstance(c, CausalVAEConfig) and c.resampling == "conv"]
    raise ConfigError(
        f"--model {name}: can't start from an image VAE: {why}. Take one of {', '.join(fitting)}, or "
        "--random True"
    )


def config_for(image: Shapes, name: str) -> CausalVAEConfig:
    """The preset of this name, with the sizes of the image VAE if no preset has those.

    image: shapes under LDM's names. WeightsError if another preset has exactly its sizes, or if what the
    image VAE is made of has no counterpart in the preset's family.
    """
    preset = refuse_model(name, PRESETS[name])
    try:
        config = _with_sizes(preset, image)
        check(config)
    except (LookupError, ValueError, ZeroDivisionError, ConfigError) as error:
        said = f": {error}" if isinstance(error, ConfigError) else ""
        raise WeightsError(f"the image VAE's sizes are none that {name} can have{said}") from error
    other = next((each for each, known in PRESETS.items() if known == config and each != name), None)
    if other is not None:
        raise WeightsError(
            f"the image VAE does not fit --model {name}, which has {_sizes(preset)}, while the image VAE has "
            f"{_sizes(config)}; --model {other} fits it exactly"
        )
    text = differences(_image_shapes(config, image), image)
    if text:
        raise WeightsError(f"the image VAE is not made as {name} is; by LDM's names: {text}")
    return config


def _with_sizes(preset: CausalVAEConfig, image: Shapes) -> CausalVAEConfig:
    """The preset with the image VAE's levels, widths, blocks and channels."""
    hidden = image["encoder.conv_in.weight"][0]
    levels = 0
    while f"encoder.down.{levels}.block.0.conv1.weight" in image:
        levels += 1
    widths = [image[f"encoder.down.{i}.block.0.conv1.weight"][0] for i in range(levels)]
    if any(width % hidden for width in widths):
        raise ConfigError(f"{widths} channels at its levels are no multiples of {hidden}")
    blocks = 0
    while f"encoder.down.0.block.{blocks}.conv1.weight" in image:
        blocks += 1
    z = image["decoder.conv_in.weight"][1]
    latent = image.get("post_quant_conv.weight", (z, z))[1]
    return replace(
        preset,
        hidden_size=hidden,
        hidden_size_mult=tuple(width // hidden for width in widths),
        num_res_blocks=blocks,
        z_channels=z,
        embed_dim=None if latent == z else latent,
        spatial_levels=tuple(range(levels - 1)),
        attention="encoder.mid.attn_1.q.weight" in image,
    )


def _sizes(config: CausalVAEConfig) -> str:
    """The sizes that an image VAE has too, in words."""
    widths = " ".join(map(str, config.widths))
    blocks = f"{config.num_res_blocks} block{'s' if config.num_res_blocks != 1 else ''}"
    return f"{widths} channels at its levels, {blocks} at each, {config.latent_channels} latent channels"


def followed_sizes(config: CausalVAEConfig, name: str) -> str | None:
    """What to say where sizes are the image VAE's and not the preset's; None if they are the preset's."""
    preset = PRESETS[name]
    if config == preset or not isinstance(preset, CausalVAEConfig):
        return None
    return (
        f"the layers of {name} in the sizes of the image VAE: {_sizes(config)}; {name} has {_sizes(preset)}"
    )


def _image_shapes(config: CausalVAEConfig, image: Shapes) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the image VAE that this config's weights are made of."""
    shapes = shapes_of(config)
    return {
        _source(name, shapes): shape if len(shape) < 5 else (*shape[:2], *shape[3:])
        for name, shape in shapes.items()
        if not is_new(name, image)
    }


def _source(name: str, shapes: Shapes) -> str:
    """The image VAE's name of a tensor: convolutions over time have a `.conv` more in theirs."""
    stem, _, leaf = name.rpartition(".")
    over_time = len(shapes[f"{stem}.weight"]) == 5
    return f"{stem.removesuffix('.conv')}.{leaf}" if over_time else name


def is_new(name: str, image: Mapping[str, object]) -> bool:
    """Whether the image VAE has nothing for it: time's resampling, and quant layers where it has none."""
    quant = name.startswith(QUANT) and "quant_conv.weight" not in image
    return quant or TIME_RESAMPLER.match(name) is not None


def inflate(image: Mapping[str, Tensor], config: CausalVAEConfig, *, method: Method) -> dict[str, Tensor]:
    """Every tensor of the video VAE, in the types of the image VAE's.

    image: under LDM's names; config: as `config_for` makes it. method: where in time the weight of a kernel
    is put: `tail` the frame itself, `center` the one before it, `mean` both and the one before them, alike.
    """
    shapes = shapes_of(config)
    dtype = next(iter(image.values())).dtype
    return {
        name: _identity(name, shape, dtype=dtype)
        if is_new(name, image)
        else _over_time(image[_source(name, shapes)], shape, method=method)
        for name, shape in shapes.items()
    }


def _over_time(tensor: Tensor, shape: tuple[int, ...], *, method: Method) -> Tensor:
    """o i h w -> o i t h w; what has no axis of time in the video VAE stays."""
    if len(shape) < 5:
        return tensor
    frames = shape[2]
    if method == "mean":
        return (tensor / frames).unsqueeze(2).repeat(1, 1, frames, 1, 1)
    kernel = tensor.new_zeros(shape)
    kernel[:, :, frames - 1 if method == "tail" else frames // 2] = tensor
    return kernel


def _identity(name: str, shape: tuple[int, ...], *, dtype: torch.dtype) -> Tensor:
    """A convolution that gives back the newest frame that it sees; a mixing factor as models start with."""
    if name.endswith(".mix_factor"):
        return torch.full(shape, MIX_INIT, dtype=dtype)
    tensor = torch.zeros(shape, dtype=dtype)
    if len(shape) == 5:
        channels = torch.arange(shape[0])
        tensor[channels, channels, -1, shape[3] // 2, shape[4] // 2] = 1
    return tensor


def promise(config: CausalVAEConfig) -> str:
    """What holds before any training, as measured in float64: a sentence without its end."""
    if config.temporal == "joint":
        return (
            "pictures are encoded exactly as by the image VAE; decoded they are not, because this model "
            "interpolates linearly in space where the image VAE repeats pixels"
        )
    if config.attention and config.mixing_attention:
        return (
            "pictures come out exactly as from the image VAE; videos do not, still ones neither, because "
            "this model's attention mixes frames"
        )
    return "pictures and still videos come out exactly as from the image VAE"
