"""Folders of diffusers: what it wrote is read, what is written it reads, and the rest is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import SETTINGS, config_of, moved
from safetensors.torch import load_file, save_file

from causalvae.errors import WeightsError
from causalvae.models.diffusers import DiffusersVAE, build_diffusers, diffusers_config
from causalvae.models.presets import DiffusersConfig
from causalvae.weights.diffusers_folder import save_folder
from causalvae.weights.load import load_model

NAMES = sorted(SETTINGS)
WEIGHTS = "diffusion_pytorch_model.safetensors"


def load_folder(path: Path) -> DiffusersVAE:
    found = load_model(path)
    assert isinstance(found.config, DiffusersConfig)
    vae = build_diffusers(found.config)
    vae.load_state_dict(found.tensors, strict=True)
    return vae


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_that_is_written_is_the_same_model_here_and_in_diffusers(name: str, tmp_path: Path) -> None:
    vae = moved(name)
    if name.startswith("ltx"):
        settings = {**vae.config.settings, "latents_mean": [0.1] * 8, "latents_std": [1.7] * 8}
        weights = vae.state_dict()
        vae = build_diffusers(diffusers_config(vae.config.class_name, settings))
        vae.load_state_dict(weights)
    save_folder(vae, tmp_path)
    theirs, ours = type(vae.net).from_pretrained(tmp_path), load_folder(tmp_path)
    assert ours.config.geometry == vae.config.geometry
    for name, tensor in vae.net.named_parameters():
        assert torch.equal(theirs.get_parameter(name), tensor)
        assert torch.equal(ours.net.get_parameter(name), tensor)
    for name, tensor in vae.net.named_buffers():
        assert torch.equal(theirs.get_buffer(name), tensor)
        assert torch.equal(ours.net.get_buffer(name), tensor)
    again = tmp_path / "again"
    save_folder(ours, again)
    assert (again / WEIGHTS).read_bytes() == (tmp_path / WEIGHTS).read_bytes()


@pytest.mark.parametrize("name", ["wan-2.1", "ltx-0.9.0", "cosmos"])
def test_a_folder_that_diffusers_wrote_in_shards_is_read(name: str, tmp_path: Path) -> None:
    vae = moved(name)
    vae.net.save_pretrained(tmp_path, max_shard_size="200KB")
    if name.startswith("ltx"):  # its buffers, which ours keeps in the config and not among the weights
        written = json.loads((tmp_path / f"{WEIGHTS}.index.json").read_text())
        assert "latents_mean" not in written["weight_map"]
        shard = sorted(tmp_path.glob("*.safetensors"))[0]
        extra = {"latents_mean": torch.full((8,), 0.1), "latents_std": torch.full((8,), 1.7)}
        save_file(load_file(shard) | extra, shard, metadata={"format": "pt"})
        written["weight_map"] |= dict.fromkeys(extra, shard.name)
        (tmp_path / f"{WEIGHTS}.index.json").write_text(json.dumps(written))
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ours = load_folder(tmp_path)
    for each, tensor in vae.named_parameters():
        assert torch.equal(ours.get_parameter(each), tensor)
    if name.startswith("ltx"):
        assert torch.equal(ours.net.latents_std, torch.full((8,), 1.7))


def test_weights_in_fewer_bits_become_fp32_with_the_same_values(tmp_path: Path) -> None:
    vae = moved("wan-2.1")
    vae.net.to(torch.bfloat16).save_pretrained(tmp_path)
    tensors = load_model(tmp_path).tensors
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    assert all(torch.equal(tensors[name], p.float()) for name, p in vae.named_parameters())


def test_an_average_is_written_in_the_place_of_the_weights(tmp_path: Path) -> None:
    vae, other = moved("cogvideox"), moved("cogvideox", seed=2)
    save_folder(vae, tmp_path, tensors=dict(other.named_parameters()))
    tensors = load_model(tmp_path).tensors
    assert all(torch.equal(tensors[name], p) for name, p in other.named_parameters())


def test_the_folder_of_a_pipeline_stands_for_its_vae(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    save_folder(moved("wan-2.1"), tmp_path / "vae")
    for folder in (tmp_path, tmp_path / "vae"):
        found = load_model(folder)
        assert found.config == config_of("wan-2.1")
        assert found.file.origin.path == tmp_path / "vae" / WEIGHTS


Damage = Callable[[Path], Any]


def _config(**changes: object) -> Damage:
    def damage(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return damage


def _weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return damage


NAN, QUANT = float("nan"), "quant_conv.bias"
BAD: dict[str, tuple[Damage, str]] = {
    "another class": (_config(_class_name="AutoencoderKL"), "AutoencoderKL can't be trained.*KLWan"),
    "a class that is no text": (_config(_class_name=["AutoencoderKLWan"]), "not the weights of a model"),
    "a huge width": (_config(base_dim=1 << 40), "no model has base_dim = 1099511627776"),
    "an infinite width": (_config(base_dim=float("inf")), "no model has base_dim"),
    "a thousand layers": (_config(num_res_blocks=1000), "no model has num_res_blocks = 1000"),
    "a long list": (_config(dim_mult=[1] * 1000), "no model has dim_mult"),
    "a list of lists": (_config(dim_mult=[[1], [2]]), "no model has dim_mult"),
    "very many weights": (_config(base_dim=30000), "4000000000 are the most"),
    "a width of zero": (_config(base_dim=0), "no model has base_dim = 0"),
    "text for a number": (_config(base_dim="eight"), "do not make a network"),
    "nothing for a list": (_config(dim_mult=None), "do not make a network"),
    "no level": (_config(dim_mult=[]), "do not make a network"),
    "time that Wan's chunks do not have": (
        _config(temperal_downsample=[True, False]),
        "but the network makes|do not make a network",
    ),
    "dropout": (_config(dropout=0.1), "dropout every pass draws"),
    "another width": (_config(base_dim=16), r"conv_in.bias is \(16,\) and should be \(32,\)"),
    "a tensor missing": (_weights(lambda t: t.pop(QUANT)), rf"1 missing \({QUANT}\)"),
    "a tensor too many": (_weights(lambda t: t.update(more=torch.zeros(1))), r"1 unknown \(more\)"),
    "another shape": (_weights(lambda t: t.update({QUANT: torch.zeros(3)})), rf"{QUANT} is \(3,\)"),
    "NaN": (_weights(lambda t: t[QUANT].fill_(NAN)), f"{QUANT} .*finite"),
    "integers": (_weights(lambda t: t.update({QUANT: t[QUANT].to(torch.int8)})), "not of floating point"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    save_folder(moved("wan-2.1"), folder)
    return folder


@pytest.mark.parametrize("name", BAD)
def test_a_folder_that_is_no_whole_model_is_refused_with_the_reason(
    name: str, whole: Path, tmp_path: Path
) -> None:
    damage, reason = BAD[name]
    folder = shutil.copytree(whole, tmp_path / "vae")
    damage(folder)
    with pytest.raises(WeightsError, match=reason):
        load_folder(folder)
