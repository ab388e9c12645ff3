"""First checkpoints: what an image VAE does to a picture, the video VAE made of it does too."""

import dataclasses
import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from fixtures import FIXTURES, fixture_tensors
from torch import Tensor

from causalvae import rng
from causalvae.errors import ConfigError, WeightsError
from causalvae.initialise import initialise
from causalvae.models.build import build, shapes, skeleton
from causalvae.models.causalvae import CausalVAE
from causalvae.models.presets import PRESETS, CausalVAEConfig
from causalvae.weights.inflate import (
    FAMILIES,
    Method,
    config_for,
    inflate,
    is_new,
    ldm_names,
    promise,
    read_image,
)
from causalvae.weights.load import load_model

FOLDER = FIXTURES / "autoencoder_kl"
WEIGHTS = FOLDER / "diffusion_pytorch_model.safetensors"
FITTING = ("causalvae-488", "causalvae-488-16ch", "osp-v1.0", "osp-v1.1", "osp-v1.2")
METHODS: tuple[Method, ...] = ("tail", "center", "mean")
STILL = 9  # frames of a video that does not move
EXACT = 1e-12  # in float64, of outputs that reach 3
SD = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4}
# Image VAEs that are made in another way than the fixture.
OTHERS: dict[str, dict[str, Any]] = {  # Any: settings of diffusers
    "no quant, 16 channels": {
        "latent_channels": 16,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
    "no attention": {"mid_block_add_attention": False},
    "five levels": {"block_out_channels": (32, 32, 32, 64, 32), "layers_per_block": 2},
}


def image_vae(**changes: Any) -> AutoencoderKL:  # Any: settings of diffusers
    """An image VAE with seeded weights; without weights under torch.device("meta")."""
    few: dict[str, Any] = {
        "block_out_channels": (32, 64, 32, 64),
        "layers_per_block": 1,
        "latent_channels": 4,
    }
    settings = few | changes
    for side, kind in (("down", "DownEncoderBlock2D"), ("up", "UpDecoderBlock2D")):
        settings[f"{side}_block_types"] = (kind,) * len(settings["block_out_channels"])
    vae = AutoencoderKL(**settings)
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            if parameter.is_meta:
                break
            scale = 0.8 / math.sqrt(math.prod(parameter.shape[1:])) if parameter.dim() > 1 else 0.2
            parameter.copy_(
                float(".norm" in name and ".weight" in name)
                + scale * rng.normal(parameter.shape, rng.key(name))
            )
    return vae


@cache
def reference() -> AutoencoderKL:
    """The fixture's image VAE in float64."""
    return AutoencoderKL.from_pretrained(FOLDER).double().eval()


@cache
def fixture_image() -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in read_image(FOLDER).tensors.items()}


def picture(*, height: int = 16, width: int = 24) -> Tensor:
    """b 3 h w in float64, about [-1, 1]."""
    return 0.5 * rng.normal((1, 3, height, width), rng.key("picture")).double()


def made_of(image: dict[str, Tensor], config: CausalVAEConfig, *, method: Method = "tail") -> CausalVAE:
    """The video VAE in float64."""
    vae = skeleton(config)
    assert isinstance(vae, CausalVAE)
    vae.load_state_dict(inflate(image, config, method=method), strict=True, assign=True)
    return vae.requires_grad_(False)


def config_of(image: dict[str, Tensor], name: str) -> CausalVAEConfig:
    return config_for({key: tuple(tensor.shape) for key, tensor in image.items()}, name)


@torch.no_grad()
def apart(vae: CausalVAE, theirs: Any, *, frames: int, x: Tensor) -> tuple[float, float]:
    """How far the video VAE is from the image VAE: in its posterior, and in what it decodes.

    theirs: AutoencoderKL (Any: its annotations leave out what it returns). x: a picture, b 3 h w, which
    stands still for so many frames.
    """
    posterior = vae.encode(x.unsqueeze(2).repeat(1, 1, frames, 1, 1))
    expected = theirs.encode(x).latent_dist
    encoded = max(
        farthest(posterior.mean, expected.mean),
        farthest(posterior.logvar, expected.logvar),
    )
    latent = expected.mean.unsqueeze(2).repeat(1, 1, posterior.mean.shape[2], 1, 1)
    return encoded, farthest(vae.decode(latent), theirs.decode(expected.mean).sample)


def farthest(video: Tensor, picture: Tensor) -> float:
    """The largest difference of any frame of b c t h w from a picture, b c h w."""
    return (video - picture.unsqueeze(2)).abs().max().item()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["causalvae-488", "osp-v1.1"])
def test_pictures_and_still_videos_are_those_of_the_image_vae(name: str, method: Method) -> None:
    vae = made_of(fixture_image(), config_of(fixture_image(), name), method=method)
    for frames in (1, STILL):
        assert max(apart(vae, reference(), frames=frames, x=picture())) < EXACT
    assert "still videos" in promise(vae.config)


@pytest.mark.parametrize("method", METHODS)
def test_v1_0_keeps_pictures_and_loses_still_videos_by_its_attention_alone(method: Method) -> None:
    config = config_of(fixture_image(), "osp-v1.0")
    vae = made_of(fixture_image(), config, method=method)
    assert max(apart(vae, reference(), frames=1, x=picture())) < EXACT
    assert min(apart(vae, reference(), frames=STILL, x=picture())) > 1e-2
    assert "mixes frames" in promise(config)
    fixed = dataclasses.replace(config, mixing_attention=False)
    vae = made_of(fixture_image(), fixed, method=method)
    for frames in (1, STILL):
        assert max(apart(vae, reference(), frames=frames, x=picture())) < EXACT


@pytest.mark.parametrize("method", METHODS)
def test_v1_2_keeps_what_is_encoded_and_decodes_otherwise(method: Method) -> None:
    vae = made_of(fixture_image(), config_of(fixture_image(), "osp-v1.2"), method=method)
    for frames in (1, STILL):
        encoded, decoded = apart(vae, reference(), frames=frames, x=picture())
        assert encoded < EXACT
        assert decoded > 1e-2
    assert "linearly in space" in promise(vae.config)


def test_the_numbers_of_the_fixture_come_out_in_fp32(tmp_path: Path) -> None:
    io = fixture_tensors("autoencoder_kl/io")
    initialise(FOLDER, tmp_path / "init.ckpt", model="causalvae-488", overwrite=False)
    loaded = load_model(tmp_path / "init.ckpt")
    vae = build(loaded.config)
    vae.load_state_dict(loaded.tensors, strict=True)
    vae.requires_grad_(False)
    posterior = vae.encode(io["x"].unsqueeze(2))
    assert farthest(posterior.mean, io["mean"]) < 1e-5
    assert farthest(posterior.logvar, io["logvar"]) < 1e-5
    largest = io["recon"].abs().max()  # about 3: the same weights in another order of sums, 1.5e-5 there
    assert farthest(vae.decode(io["mean"].unsqueeze(2)), io["recon"]) < 1e-5 * largest


@pytest.mark.parametrize("case", OTHERS)
def test_image_vaes_made_otherwise_give_their_pictures_too(case: str, tmp_path: Path) -> None:
    theirs = image_vae(**OTHERS[case])
    theirs.save_pretrained(tmp_path)
    image = {name: tensor.double() for name, tensor in read_image(tmp_path).tensors.items()}
    vae = made_of(image, config_of(image, "causalvae-488"))
    assert vae.geometry.spatial == (16 if case == "five levels" else 8)
    theirs = theirs.double().eval()
    for frames in (1, 5):
        assert max(apart(vae, theirs, frames=frames, x=picture(height=32, width=32))) < EXACT


def test_every_tensor_of_the_image_vae_is_used_once_and_time_starts_as_the_identity() -> None:
    image = fixture_image()
    numbered = {name: torch.full_like(tensor, i) for i, (name, tensor) in enumerate(image.items(), start=1)}
    config = config_of(image, "osp-v1.1")
    made = inflate(numbered, config, method="tail")
    assert {name: tuple(tensor.shape) for name, tensor in made.items()} == shapes(config)
    taken = [int(tensor.max()) for name, tensor in made.items() if not is_new(name, image)]
    assert sorted(taken) == list(range(1, len(image) + 1))
    new = {name: tensor for name, tensor in made.items() if is_new(name, image)}
    assert len(new) == 12
    x = picture()[:, :1].unsqueeze(2).repeat(1, config.widths[1], 3, 1, 1)
    kernel = new["encoder.down.1.time_downsample.conv.weight"]
    assert torch.equal(torch.nn.functional.conv3d(x, kernel, padding=(0, 1, 1)), x[:, :, 2:])
    assert all(float(new[name]) == 2.0 for name in new if name.endswith("mix_factor"))


def test_older_files_of_diffusers_have_other_names_of_attention() -> None:
    tensors = fixture_tensors("autoencoder_kl/diffusion_pytorch_model")
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = dict(tensors)
    for new, old in older.items():
        renamed = {name.replace(f".{new}.", f".{old}."): tensor for name, tensor in renamed.items()}
    assert renamed.keys() != tensors.keys()
    found, expected = ldm_names(renamed), ldm_names(tensors)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_names_of_diffusers_are_those_that_the_fixture_lists() -> None:
    found, expected = read_image(FOLDER), read_image(FOLDER / "ldm.ckpt")
    assert found.tensors.keys() == expected.tensors.keys()
    assert all(torch.equal(found.tensors[name], expected.tensors[name]) for name in expected.tensors)
    assert {found.family, expected.family} == set(FAMILIES.values())


def full_size(**changes: Any) -> dict[str, Tensor]:  # Any: settings of diffusers
    with torch.device("meta"):
        return ldm_names(image_vae(**SD | changes).state_dict())


def test_the_published_sizes_are_the_presets() -> None:
    image = full_size()
    for name in ("causalvae-488", "osp-v1.0", "osp-v1.1", "osp-v1.2"):
        assert config_of(image, name) == PRESETS[name]
    with pytest.raises(WeightsError, match=r"4 latent channels; --model causalvae-488 fits it exactly"):
        config_of(image, "causalvae-488-16ch")


def test_sixteen_channels_have_a_preset_of_their_own() -> None:
    image = full_size(latent_channels=16, use_quant_conv=False, use_post_quant_conv=False)
    assert config_of(image, "causalvae-488-16ch") == PRESETS["causalvae-488-16ch"]
    message = r"has .*, 4 latent channels, while .*, 16 latent channels; --model causalvae-488-16ch fits"
    with pytest.raises(WeightsError, match=message):
        config_of(image, "causalvae-488")
    wide = config_of(image, "osp-v1.1")
    assert wide == dataclasses.replace(CausalVAEConfig(norm="clip"), z_channels=16)


@pytest.mark.parametrize(("settings", "message"), [
    ({"in_channels": 4}, "conv_in.weight is 32x4x3x3, not 32x3x3x3"),
    ({"block_out_channels": (32, 64)}, "are not all between two levels"),
    ({"block_out_channels": (64, 96, 64, 64)}, "no multiples of 64"),
])  # fmt: skip
def test_sizes_that_no_model_has_are_refused(settings: dict[str, Any], message: str) -> None:
    image = ldm_names(image_vae(**settings).state_dict())
    with pytest.raises(WeightsError, match=message):
        config_of(image, "causalvae-488")


def test_a_tensor_too_many_or_too_few_is_refused() -> None:
    image = fixture_image()
    with pytest.raises(WeightsError, match=r"1 unexpected: encoder\.down\.3\.attn\.0\.norm\.weight"):
        config_of({**image, "encoder.down.3.attn.0.norm.weight": torch.ones(64)}, "osp-v1.1")
    rest = {name: tensor for name, tensor in image.items() if name != "decoder.mid.block_1.norm1.bias"}
    with pytest.raises(WeightsError, match=r"1 missing: decoder\.mid\.block_1\.norm1\.bias"):
        config_of(rest, "osp-v1.0")


def test_models_of_other_layers_are_refused_with_the_reason() -> None:
    for name in set(PRESETS) - set(FITTING):
        with pytest.raises(ConfigError, match=rf"--model {name}: can't start from an image VAE: "):
            config_of(fixture_image(), name)
