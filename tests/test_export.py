"""Conversions: the way back from any format gives the same weights and the same model, bit for bit."""

import dataclasses
import itertools
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures import FIXTURES, fixture_json, fixture_tensors
from foreign import moved
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_cli import PROGRAM, refused
from test_published import CLASS_LEVELS, FEW
from test_weight_writers import told_where_files_end_early
from weight_tables import equal

from causalvae.errors import ConfigError, WeightsError
from causalvae.export import Dtype, Format, convert
from causalvae.models.build import Model, build
from causalvae.models.presets import TINY, V1_0, CausalVAEConfig, OwnConfig, WFVAEConfig
from causalvae.train.state import model_metadata
from causalvae.weights.load import load_model
from causalvae.weights.mindspore import read_mindspore
from causalvae.weights.published import published_config
from causalvae.weights.tensorfiles import write_safetensors
from causalvae.weights.writing import to_dtype

TWO_LEVELS = {
    "hidden_size": 32, "hidden_size_mult": (1, 1), "num_res_blocks": 1, "flat_levels": 1,
    "spatial_levels": (0,), "temporal_levels": (0,),
}  # fmt: skip
OWN: dict[str, OwnConfig] = {
    "osp_v1.0": dataclasses.replace(V1_0, **FEW),
    "osp_v1.0 with the levels of its class": dataclasses.replace(CLASS_LEVELS, **FEW),
    "osp_v1.1": CausalVAEConfig(norm="clip", **TWO_LEVELS),
    "osp_v1.2": CausalVAEConfig(norm="clip", temporal="joint", **FEW),
    "wfvae": WFVAEConfig(
        base_channels=8, encoder_energy=4, decoder_energy=4, encoder_res_blocks=1, decoder_res_blocks=1
    ),
    "frame norms": CausalVAEConfig(**TWO_LEVELS),
    "shuffle": dataclasses.replace(TINY, hidden_size=16, hidden_size_mult=(1, 1, 2)),
}
THEIRS = ("wan-2.1", "ltx-0.9.0")
PLACES: dict[str, tuple[str, Format]] = {
    "torch": ("model.pt", "torch"),
    "safetensors": ("model.safetensors", "safetensors"),
    "mindspore": ("model.ckpt", "mindspore"),
    "folder": ("vae", "open-sora-plan"),
    "training file": ("checkpoint.ckpt", "open-sora-plan"),
    "diffusers": ("vae", "diffusers"),
}


@cache
def model(name: str) -> Model:
    return moved(name) if name in THEIRS else build(OWN[name], seed=2)


def places_of(name: str) -> list[str]:
    if name in THEIRS:
        return ["torch", "safetensors", "diffusers"]
    published = published_config(OWN[name]) is not None
    return ["torch", "safetensors", "mindspore", *(["folder", "training file"] if published else [])]


def saved(name: str, folder: Path) -> Path:
    """The model as a run's checkpoint has it."""
    vae = model(name)
    return write_safetensors(folder / "model.safetensors", vae.state_dict(), metadata=model_metadata(vae))


def walk(words: list[str]) -> list[str]:
    """All pairs of two words, one after the other, each once."""
    order: list[str] = []
    for i, first in enumerate(words):
        order += [first, *itertools.chain.from_iterable((first, other) for other in words[i + 1 :])]
    return [*order, words[0]]


def moved_on(path: Path, place: str, folder: Path, *, shard_size: int | None = None) -> Path:
    """One conversion into an empty folder."""
    folder.mkdir()
    ending, form = PLACES[place]
    takes_shards = place in ("safetensors", "folder", "diffusers")
    return convert(path, folder / ending, to=form, shard_size=shard_size if takes_shards else None).path


@pytest.mark.slow
@pytest.mark.parametrize("name", [*OWN, *THEIRS])
def test_the_way_through_every_pair_of_formats_keeps_every_bit_and_the_config(
    name: str, tmp_path: Path
) -> None:
    path = saved(name, tmp_path)
    before = load_model(path)
    for number, place in enumerate(walk(places_of(name))):
        path = moved_on(path, place, tmp_path / str(number))
        after = load_model(path)
        assert after.config == before.config, place
        assert equal(after.tensors, before.tensors), place


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_chain_of_conversions_comes_back(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    name = data.draw(st.sampled_from(list(OWN)))
    place = tmp_path_factory.mktemp("chain")
    before = load_model(path := saved(name, place))
    for number in range(data.draw(st.integers(1, 3))):
        word = data.draw(st.sampled_from(places_of(name)))
        shard_size = data.draw(st.sampled_from([None, 1, 100_000]))
        path = moved_on(path, word, place / str(number), shard_size=shard_size)
    after = load_model(path)
    assert (after.config, equal(after.tensors, before.tensors)) == (before.config, True)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("name", ["osp_v1.1", "wan-2.1"])
def test_other_numbers_are_those_of_a_cast_and_are_kept_on_the_way(
    name: str, dtype: Dtype, tmp_path: Path
) -> None:
    cast = to_dtype(load_model(saved(name, tmp_path)).tensors, dtype)
    path = convert(tmp_path / "model.safetensors", tmp_path / "cast.pt", dtype=dtype).path
    for number, place in enumerate(places_of(name)):
        path = moved_on(path, place, tmp_path / str(number))
        found = {n: tensor.to(cast[n].dtype) for n, tensor in load_model(path).tensors.items()}
        assert equal(found, cast)
    if name == "osp_v1.1":
        assert {t.dtype for t in load_model(path).tensors.values()} == {cast["encoder.conv_in.bias"].dtype}


def test_shards_have_the_size_that_was_asked_and_an_index_of_all(tmp_path: Path) -> None:
    before = load_model(saved("osp_v1.1", tmp_path))
    out = tmp_path / "out/vae.safetensors"
    done = convert(tmp_path / "model.safetensors", out, shard_size=200_000)
    shards = sorted(out.parent.glob("*.safetensors"))
    assert done.path.name == "vae.safetensors.index.json"
    assert len(shards) > 2
    assert all(path.stat().st_size < 220_000 for path in shards)
    index = json.loads(done.path.read_text())
    assert index["weight_map"].keys() == before.tensors.keys()
    assert (
        index["metadata"]["total_size"]
        == done.num_bytes
        == sum(4 * t.numel() for t in before.tensors.values())
    )
    with pytest.raises(ConfigError, match="is there already"):
        convert(tmp_path / "model.safetensors", out)
    convert(tmp_path / "model.safetensors", out, overwrite=True)
    assert [path.name for path in out.parent.iterdir()] == ["vae.safetensors"]
    assert equal(load_model(out).tensors, before.tensors)


@pytest.mark.parametrize("name", ["osp_v1.0", "osp_v1.1", "osp_v1.2", "wfvae"])
def test_a_published_folder_is_as_its_own_loader_takes_it(name: str, tmp_path: Path) -> None:
    convert(FIXTURES / name / "weights.safetensors", tmp_path / "vae", to="open-sora-plan")
    assert sorted(path.name for path in (tmp_path / "vae").iterdir()) == [
        "config.json", "diffusion_pytorch_model.safetensors",
    ]  # fmt: skip
    config = json.loads((tmp_path / "vae/config.json").read_text())
    theirs: dict[str, Any] = fixture_json(f"{name}/config")
    assert {field: config[field] for field in theirs if field in config} == {
        field: value for field, value in theirs.items() if field in config
    }
    convert(FIXTURES / name / "weights.safetensors", tmp_path / "e.ckpt", to="open-sora-plan")
    table = torch.load(tmp_path / "e.ckpt", weights_only=True)
    newer = name in ("osp_v1.2", "wfvae")
    weights = table["state_dict"]["gen_model"] if newer else table["state_dict"]
    assert equal(weights, fixture_tensors(f"{name}/weights"))
    assert json.loads((tmp_path / "config.json").read_text()) == config


def test_what_a_config_says_beside_the_network_is_kept(tmp_path: Path) -> None:
    convert(FIXTURES / "wfvae/weights.safetensors", tmp_path / "vae", to="open-sora-plan")
    config = json.loads((tmp_path / "vae/config.json").read_text())
    config |= {"scale": [0.5] * 8, "shift": [0.25] * 8}
    (tmp_path / "vae/config.json").write_text(json.dumps(config))
    convert(tmp_path / "vae", tmp_path / "again")
    assert json.loads((tmp_path / "again/config.json").read_text()) == config


def test_a_file_of_mindspore_comes_out_as_mindspore_wrote_it(tmp_path: Path) -> None:
    convert(FIXTURES / "mindspore/converted.ckpt", tmp_path / "a.safetensors")
    convert(FIXTURES / "mindspore/converted.ckpt", tmp_path / "b.ckpt", to="mindspore")
    assert (tmp_path / "b.ckpt").read_bytes() == (FIXTURES / "mindspore/converted.ckpt").read_bytes()
    convert(tmp_path / "a.safetensors", tmp_path / "c.ckpt", to="mindspore")
    theirs, ours = (
        read_mindspore(path) for path in (FIXTURES / "mindspore/converted.ckpt", tmp_path / "c.ckpt")
    )
    assert equal(ours.tensors, theirs.tensors)
    assert ours.texts == {}


def test_mindspore_files_say_whose_they_are_only_where_names_do_not(tmp_path: Path) -> None:
    saved("shuffle", tmp_path)
    convert(tmp_path / "model.safetensors", tmp_path / "m.ckpt", to="mindspore")
    assert read_mindspore(tmp_path / "m.ckpt").texts.keys() == {"causalvae.model", "causalvae.config"}


def test_averaged_weights_are_taken_unless_live_ones_are_asked_for(tmp_path: Path) -> None:
    source = FIXTURES / "checkpoints/osp_v1.2_training.ckpt"
    taken = {}
    for prefer in ("ema", "live"):
        done = convert(source, tmp_path / f"{prefer}.safetensors", prefer=prefer)
        assert equal(load_model(done.path).tensors, load_model(source, prefer=prefer).tensors)
        assert any(f"these are the {prefer} ones" in note for note in done.notes)
        assert any("of the critic and the loss are left out" in note for note in done.notes)
        taken[prefer] = done.path.read_bytes()
    assert taken["ema"] != taken["live"]


def test_a_folder_of_a_user_is_not_written_over(tmp_path: Path) -> None:
    source, out = FIXTURES / "osp_v1.1/weights.safetensors", tmp_path / "vae"
    convert(source, out)
    convert(source, out, overwrite=True, shard_size=500_000)
    assert not (out / "diffusion_pytorch_model.safetensors").exists()
    assert equal(load_model(out).tensors, fixture_tensors("osp_v1.1/weights"))
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"notes\.txt: is no part of a model"):
        convert(source, out, overwrite=True)
    assert (out / "notes.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["vae"]


def test_a_file_can_take_its_own_place(tmp_path: Path) -> None:
    before = load_model(path := saved("osp_v1.1", tmp_path)).tensors
    convert(path, path, dtype="bf16", overwrite=True)
    assert equal(load_model(path).tensors, to_dtype(before, "bf16"))


REFUSED = {
    "no such format": (("out.xyz",), r"what to write does not follow from \.xyz; add --to"),
    "of others": (("out", "--to", "diffusers"), "diffusers has no class for this model"),
    "shards of torch": (("out.pt", "--shard_size", "1MB"), "only safetensors are cut"),
    "no amount": (("out.pt", "--shard_size", "many"), "must be an amount such as 2GB"),
    "a third place": (("out.pt", "more.pt"), "more.pt: there are two places"),
    "there already": (("weights.safetensors",), "is there already; name another, or add --overwrite True"),
    "a word for torch": (("out.pt", "--to", "pytorch"), "--to pytorch: must be one of"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_mistake_is_one_line_and_leaves_nothing(case: str, tmp_path: Path) -> None:
    words, said = REFUSED[case]
    source = tmp_path / "weights.safetensors"
    source.write_bytes((FIXTURES / "osp_v1.1/weights.safetensors").read_bytes())
    out, *others = words
    line = refused(*PROGRAM, "convert", str(source), str(tmp_path / out), *others)
    assert re.search(said, line), line
    assert [path.name for path in tmp_path.iterdir()] == ["weights.safetensors"]


def test_what_a_format_has_no_place_for_is_refused_by_name(tmp_path: Path) -> None:
    path = saved("wan-2.1", tmp_path)
    with pytest.raises(ConfigError, match="AutoencoderKLWan has names that MindSpore uses for norms"):
        convert(path, tmp_path / "x.ckpt", to="mindspore")
    (tmp_path / "own").mkdir()
    path = saved("shuffle", tmp_path / "own")
    for to in ("diffusers", "open-sora-plan", None):
        with pytest.raises(ConfigError, match=r"no class for this model|no such model|is neither's"):
            convert(path, tmp_path / "x", to=to)
    with pytest.raises(WeightsError, match="these are weights of an image VAE"):
        convert(FIXTURES / "autoencoder_kl", tmp_path / "x.pt")


@pytest.mark.parametrize("place", [place for place in PLACES if place != "diffusers"])
def test_a_disk_that_refuses_leaves_nothing(place: str, tmp_path: Path) -> None:
    ending, form = PLACES[place]
    source = FIXTURES / "osp_v1.1/weights.safetensors"
    said = told_where_files_end_early(lambda folder: convert(source, folder / ending, to=form), tmp_path)
    assert said.startswith(f"{tmp_path}/{ending}")
    assert "can't be written" in said
    assert list(tmp_path.iterdir()) == []
