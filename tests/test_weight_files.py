"""Files of weights of every format: read bit for bit, whoever wrote them; written so that they come back."""

import argparse
import datetime
import json
import pathlib
from collections import OrderedDict, defaultdict, deque
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures import FIXTURES, fixture_json, fixture_rows, fixture_tensors, under
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from weight_tables import FEW, WEIGHTS, equal

from causalvae.errors import WeightsError
from causalvae.models.build import build
from causalvae.models.presets import PRESETS
from causalvae.weights.diffusers import write_diffusers
from causalvae.weights.layouts import PREFIXES
from causalvae.weights.mindspore import write_mindspore
from causalvae.weights.pytorch import write_torch
from causalvae.weights.read import CONFIG_KEY, MODEL_KEY, read_tensors
from causalvae.weights.tensorfiles import write_safetensors
from causalvae.weights.writing import to_dtype


def test_lightnings_layout_is_read_with_its_critic() -> None:
    found = read_tensors(FIXTURES / "checkpoints/osp_v1.1_training.ckpt")
    assert (found.format, found.chosen, found.origin.kind) == ("lightning", "only", "only")
    assert equal(found.tensors, fixture_tensors("osp_v1.1/weights"))
    raw = torch.load(FIXTURES / "checkpoints/osp_v1.1_training.ckpt", weights_only=True)["state_dict"]
    assert equal(found.discriminator, under(raw, "loss."))
    assert "discriminator.main.0.weight" in found.discriminator


def test_open_sora_plans_layout_has_two_sets() -> None:
    path = FIXTURES / "checkpoints/osp_v1.2_training.ckpt"
    live, averaged = read_tensors(path, "live"), read_tensors(path)
    assert (live.format, live.chosen, averaged.chosen) == ("open-sora-plan", "live", "ema")
    assert equal(live.tensors, to_dtype(fixture_tensors("osp_v1.2/weights"), "fp16"))
    raw = torch.load(path, weights_only=True)
    assert equal(averaged.tensors, under(raw["ema_state_dict"], "module."))
    assert not equal(averaged.tensors, live.tensors)
    assert equal(live.discriminator, raw["state_dict"]["dics_model"])


def test_pickles_from_before_the_zip_format_are_read() -> None:
    found = read_tensors(FIXTURES / "checkpoints/disc2d_legacy.pt")
    assert found.format == "torch-legacy"
    assert equal(found.tensors, fixture_tensors("disc2d/weights"))


def test_an_image_vae_is_read_from_diffusers_folder_and_from_ldms_file() -> None:
    folder, file = (
        read_tensors(FIXTURES / "autoencoder_kl"),
        read_tensors(FIXTURES / "autoencoder_kl/ldm.ckpt"),
    )
    assert (folder.format, file.format) == ("diffusers", "torch")
    assert folder.config == fixture_json("autoencoder_kl/config")
    assert folder.origin.path.name == "diffusion_pytorch_model.safetensors"
    for row in fixture_rows("autoencoder_kl/name_map"):
        one, other = folder.tensors[row["diffusers"]], file.tensors[row["ldm"]]
        assert torch.equal(one.flatten(), other.flatten())


def test_a_config_beside_the_file_and_its_sum_are_told() -> None:
    found = read_tensors(FIXTURES / "osp_v1.1/weights.safetensors")
    assert found.config == fixture_json("osp_v1.1/config")
    assert found.kind is None
    assert len(found.origin.sha256) == 64


@FEW
@given(prefixes=st.lists(st.sampled_from(PREFIXES), max_size=4))
def test_prefixes_that_all_names_have_are_taken_off(
    prefixes: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("p") / "x.pt"
    torch.save({"".join(prefixes) + name: tensor for name, tensor in WEIGHTS.items()}, path)
    assert equal(read_tensors(path).tensors, WEIGHTS)


@pytest.mark.parametrize(
    ("payload", "chosen"),
    [
        (WEIGHTS, "only"),
        ({"state_dict": WEIGHTS, "epoch": 3, "optimizer_states": [{"state": {0: torch.ones(5)}}]}, "only"),
        ({"state_dict": {"vae": WEIGHTS}}, "only"),
        ({"state_dict": {"gen_model": {"x": torch.zeros(1)}, "ema": {"x": torch.ones(1)}}}, "ema"),
        ({"state_dict": WEIGHTS, "ema_state_dict": {}}, "only"),
        ({"ema": WEIGHTS}, "only"),
        ({"model": OrderedDict(WEIGHTS)}, "only"),
        (nn.ParameterDict({"a": nn.Parameter(torch.ones(2))}).state_dict(), "only"),
    ],
    ids=range(8),
)  # fmt: skip
def test_the_tables_of_trainers_are_found(payload: dict[str, Any], chosen: str, tmp_path: Path) -> None:
    torch.save(payload, tmp_path / "x.pt")
    found = read_tensors(tmp_path / "x.pt")
    assert found.chosen == chosen
    if "encoder.a.weight" in found.tensors:
        assert equal(found.tensors, WEIGHTS)
    elif "x" in found.tensors:
        assert found.tensors["x"].item() == 1.0


def test_averages_have_no_buffers_and_get_those_of_the_live_weights(tmp_path: Path) -> None:
    live = {"encoder.a": torch.zeros(2), "encoder.buffer": torch.full((1,), 7.0)}
    torch.save(
        {"state_dict": {"gen_model": live}, "ema_state_dict": {"module.encoder.a": torch.ones(2)}},
        tmp_path / "x",
    )
    assert read_tensors(tmp_path / "x").tensors["encoder.a"].tolist() == [1.0, 1.0]
    assert read_tensors(tmp_path / "x").tensors["encoder.buffer"].tolist() == [7.0]
    assert read_tensors(tmp_path / "x", "live").tensors["encoder.a"].tolist() == [0.0, 0.0]


def test_averages_whose_names_have_no_dots_are_found(tmp_path: Path) -> None:
    table = WEIGHTS | {"model_ema." + name.replace(".", ""): tensor + 1 for name, tensor in WEIGHTS.items()}
    table |= {"model_ema.decay": torch.tensor(0.9), "model_ema.num_updates": torch.tensor(4)}
    torch.save({"state_dict": table}, tmp_path / "x")
    found = read_tensors(tmp_path / "x")
    assert found.chosen == "ema"
    assert equal(found.tensors, {name: tensor + 1 for name, tensor in WEIGHTS.items()})


def test_averages_of_another_model_are_not_used_and_it_is_said(tmp_path: Path) -> None:
    torch.save({"state_dict": WEIGHTS, "ema_state_dict": {"encoder.other": torch.ones(1)}}, tmp_path / "x")
    found = read_tensors(tmp_path / "x")
    assert (found.chosen, equal(found.tensors, WEIGHTS)) == ("only", True)
    assert "encoder.other" in found.notes[0]


def test_the_autoencoder_is_taken_out_of_a_whole_system(tmp_path: Path) -> None:
    system = {"first_stage_model." + name: tensor for name, tensor in WEIGHTS.items()}
    system |= {"model.diffusion_model.w": torch.ones(1), "cond_stage_model.w": torch.ones(1)}
    torch.save({"state_dict": system}, tmp_path / "sd.ckpt")
    found = read_tensors(tmp_path / "sd.ckpt")
    assert equal(found.tensors, WEIGHTS)
    assert found.notes == ("2 tensors outside first_stage_model were left out",)


def allowed_now() -> list[Any]:
    return sorted(torch.serialization.get_safe_globals(), key=str)


class Settings(argparse.Namespace):
    """A type of data that no list names."""


@pytest.mark.parametrize("format_", ["zip", "legacy"])
def test_data_that_trainers_save_beside_weights_is_read_as_nothing(format_: str, tmp_path: Path) -> None:
    beside = {
        "args": argparse.Namespace(lr=1e-5, path=Path("x"), inner=argparse.Namespace(a=[1, {2}])),
        "path": pathlib.PurePosixPath("a/b"),
        "numpy": [np.float32(1.5), np.int64(3), np.ones(3), np.dtype("float32"), np.bool_(True)],
        "tables": [defaultdict(list, a=[1]), defaultdict(dict), deque([1, 2]), OrderedDict(a=1)],
        "time": [datetime.datetime(2024, 1, 1), datetime.timedelta(seconds=3)],
        "kinds": [dict, list, int, float, complex(1, 2), frozenset({1}), slice(1, 2), torch.float32],
        "device": torch.device("cpu"), "size": torch.Size([2]), "version": torch.__version__,
    }  # fmt: skip
    before = allowed_now()
    payload = {"hyper_parameters": beside, "state_dict": WEIGHTS}
    torch.save(payload, tmp_path / "x.ckpt", _use_new_zipfile_serialization=format_ == "zip")
    found = read_tensors(tmp_path / "x.ckpt")
    assert equal(found.tensors, WEIGHTS)
    assert found.format == {"zip": "torch", "legacy": "torch-legacy"}[format_]
    assert allowed_now() == before


def test_a_type_on_no_list_is_refused_by_name(tmp_path: Path) -> None:
    torch.save({"state_dict": WEIGHTS, "args": Settings()}, tmp_path / "x.ckpt")
    with pytest.raises(WeightsError, match=r"test_weight_files\.Settings") as raised:
        read_tensors(tmp_path / "x.ckpt")
    assert "nothing in it was run" in str(raised.value)


def test_tied_weights_come_back_apart_and_views_without_the_rest(tmp_path: Path) -> None:
    whole = torch.arange(10.0)
    torch.save({"encoder.a": whole, "encoder.b": whole, "encoder.c": whole[2:4]}, tmp_path / "x")
    found = read_tensors(tmp_path / "x").tensors
    assert equal(found, {"encoder.a": whole, "encoder.b": whole, "encoder.c": whole[2:4]})
    assert len({tensor.untyped_storage().data_ptr() for tensor in found.values()}) == 3
    assert found["encoder.c"].untyped_storage().nbytes() == 8
    write_safetensors(tmp_path / "y", {"encoder.a": whole, "encoder.b": whole}, metadata={})


def test_files_written_without_check_sums_are_read_and_it_is_said(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(WEIGHTS, tmp_path / "x")
    finally:
        torch.serialization.set_crc32_options(True)
    found = read_tensors(tmp_path / "x")
    assert equal(found.tensors, WEIGHTS)
    assert "without check sums" in found.notes[0]


def test_shards_may_be_torch_files(tmp_path: Path) -> None:
    for number, (name, tensor) in enumerate(WEIGHTS.items()):
        torch.save({name: tensor, "other": tensor}, tmp_path / f"{number}.bin")
    where = {name: f"{number}.bin" for number, name in enumerate(WEIGHTS)}
    index = tmp_path / "diffusion_pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    (tmp_path / "config.json").write_text('{"_class_name": "X"}')
    assert equal(read_tensors(index).tensors, WEIGHTS)
    assert equal(read_tensors(tmp_path).tensors, WEIGHTS)
    index.write_text(json.dumps({"weight_map": where | {"encoder.c": "0.bin"}}))
    with pytest.raises(WeightsError, match=r"0\.bin: encoder\.c is not in it"):
        read_tensors(index)


def test_a_name_says_nothing_about_the_format(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "x.ckpt", WEIGHTS, metadata={})
    write_mindspore(tmp_path / "x.safetensors", WEIGHTS, crc=False)
    write_torch(tmp_path / "x.json", WEIGHTS, layout="plain")
    assert [read_tensors(tmp_path / name).format for name in ("x.ckpt", "x.safetensors", "x.json")] == [
        "safetensors", "mindspore", "torch",
    ]  # fmt: skip


def test_a_run_and_its_checkpoint_stand_for_their_weights(tmp_path: Path) -> None:
    vae = build(PRESETS["tiny"], seed=0)
    header = {MODEL_KEY: type(vae.config).__name__, CONFIG_KEY: json.dumps(asdict(vae.config))}
    live, averaged = vae.state_dict(), {name: p + 1 for name, p in vae.named_parameters()}
    for step in (3, 12):
        folder = tmp_path / f"checkpoints/step-{step:08d}"
        write_safetensors(
            folder / "model.safetensors", {n: t * step for n, t in live.items()}, metadata=header
        )
        write_safetensors(folder / "ema.safetensors", averaged, metadata=header)
        write_safetensors(folder / "discriminator.safetensors", {"main.0.bias": torch.ones(1)}, metadata={})
    (tmp_path / "checkpoints/step-00000012.broken-1").mkdir()
    run, checkpoint = read_tensors(tmp_path), read_tensors(tmp_path / "checkpoints/step-00000003", "live")
    assert (run.format, run.chosen, run.kind) == ("causalvae run", "ema", "CausalVAEConfig")
    assert "step-00000012" in run.notes[0]
    assert equal(run.tensors, live | {name: tensor.detach() for name, tensor in averaged.items()})
    assert list(run.discriminator) == ["discriminator.main.0.bias"]
    assert run.config == json.loads(header[CONFIG_KEY])
    assert (checkpoint.format, checkpoint.chosen) == ("causalvae checkpoint", "live")
    assert equal(checkpoint.tensors, {name: tensor * 3 for name, tensor in live.items()})
    (tmp_path / "checkpoints/step-00000012/ema.safetensors").unlink()
    assert (read_tensors(tmp_path).chosen, read_tensors(tmp_path).origin.kind) == ("only", "model")


def test_a_folder_of_open_sora_plan_and_one_of_a_pipeline_are_read(tmp_path: Path) -> None:
    (tmp_path / "osp").mkdir()
    (tmp_path / "osp/config.json").write_text('{"hidden_size": 32}')
    for name in ("b.ckpt", "a.ckpt"):
        write_torch(tmp_path / "osp" / name, WEIGHTS, layout="open-sora-plan")
    found = read_tensors(tmp_path / "osp")
    assert (found.format, found.config, found.origin.path.name) == (
        "open-sora-plan",
        {"hidden_size": 32},
        "a.ckpt",
    )
    write_diffusers(tmp_path / "pipeline/vae", {"a": 1}, WEIGHTS, metadata={})
    assert read_tensors(tmp_path / "pipeline").format == "diffusers"
