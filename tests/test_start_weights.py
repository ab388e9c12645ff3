"""Trainings that start from everybody's weights, by the command: what was loaded is what goes on."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from fixtures import FIXTURES, fixture_tensors
from foreign import moved
from runs import ENVIRONMENT, assert_same_state, tensors, words
from torch import Tensor

from causalvae.cli import main
from causalvae.machine import ASSUME_BF16
from causalvae.weights.diffusers_folder import save_folder
from causalvae.weights.load import load_model

STILL = {
    "start_learning_rate": "1e-30",
    "weight_decay": 0,
    "max_steps": 1,
    "disc_type": "none",
    "lr_scheduler": "constant",
}
SMALL = {"video_path": "sample:", "video_num_frames": 5, "resolution": 32, "batch_size": 1}
CHECKPOINTS, MINDSPORE = FIXTURES / "checkpoints", FIXTURES / "mindspore"
# What is named, the model that it is, the set that is taken, and whose weights those are.
STARTS: dict[str, tuple[Path, str, str, str]] = {
    "v1.0": (FIXTURES / "osp_v1.0/weights.safetensors", "osp-v1.0", "only", "osp_v1.0"),
    "v1.1 by Lightning": (CHECKPOINTS / "osp_v1.1_training.ckpt", "osp-v1.1", "only", "osp_v1.1"),
    "v1.1 by MindSpore": (MINDSPORE / "trained_amp_crc.ckpt", "osp-v1.1", "only", "osp_v1.1"),
    "v1.2": (FIXTURES / "osp_v1.2/weights.safetensors", "osp-v1.2", "only", "osp_v1.2"),
    "WF-VAE": (FIXTURES / "wfvae/weights.safetensors", "wfvae", "only", "wfvae"),
}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CAUSALVAE_OFFLINE", "CAUSALVAE_HOME", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, ENVIRONMENT[name])


def train(folder: Path, **changes: object) -> int:
    return main("train", words(folder, **{**SMALL, **STILL, **changes})[2:])


def weights_of(folder: Path, step: int = 1) -> dict[str, Tensor]:
    found = tensors(folder, step)
    return {n.removeprefix("model/"): t for n, t in found.items() if n.startswith("model/")}


@pytest.mark.slow
@pytest.mark.parametrize("name", STARTS)
def test_a_run_starts_from_published_weights_goes_on_and_evaluates(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, family, chosen, whose = STARTS[name]
    assert train(tmp_path, load_from_checkpoint=path) == 0
    expected, started = fixture_tensors(f"{whose}/weights"), weights_of(tmp_path)
    assert started.keys() == expected.keys()
    assert all(torch.allclose(started[each], tensor, rtol=0, atol=1e-7) for each, tensor in expected.items())
    told = json.loads((tmp_path / "run/run.json").read_text())["weights"]
    assert (told["model"], told["set"]) == (family, chosen)
    assert len(told["sha256"]) == 64
    assert train(tmp_path, load_from_checkpoint=path, max_steps=2) == 0
    if name == "WF-VAE":  # the others have the layers of our own presets
        assert train(tmp_path / "once", load_from_checkpoint=path, max_steps=2) == 0
        assert_same_state(tmp_path, tmp_path / "once", step=2)
    assert train(tmp_path, mode=2) == 0
    assert "dB PSNR (ema weights)" in capsys.readouterr().out


@pytest.mark.parametrize("chosen", ["ema", "live"])
def test_averaged_weights_are_taken_unless_the_others_are_asked_for(chosen: str, tmp_path: Path) -> None:
    path = CHECKPOINTS / "osp_v1.2_training.ckpt"
    assert train(tmp_path, load_from_checkpoint=path, weights=chosen) == 0
    raw = torch.load(path, weights_only=True)
    expected = raw["state_dict"]["gen_model"]
    if chosen == "ema":
        expected = {name.removeprefix("module."): t for name, t in raw["ema_state_dict"].items()}
    started = weights_of(tmp_path)
    assert all(torch.allclose(started[name], t.float(), rtol=0, atol=1e-7) for name, t in expected.items())


@pytest.mark.slow
def test_a_folder_of_diffusers_trains_in_fp32_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ASSUME_BF16, "1")
    save_folder(moved("wan-2.1"), tmp_path / "vae")
    chosen = {
        "load_from_checkpoint": tmp_path / "vae", "start_learning_rate": "1e-4", "memory": "lean",
        "precision": "bf16", "amp_level": "O2",
    }  # fmt: skip
    for steps in (1, 2):
        assert train(tmp_path, **chosen, max_steps=steps) == 0
    assert train(tmp_path / "once", **chosen, max_steps=2) == 0
    assert_same_state(tmp_path, tmp_path / "once", step=2)
    config = load_model(tmp_path / "vae").config
    assert load_model(tmp_path / "run").config == config
    facts = json.loads((tmp_path / "run/run.json").read_text())
    assert (facts["precision"], facts["amp_level"]) == ("fp32", "O0")
    assert "on a CPU diffusers' models compute in fp32" in (tmp_path / "run/log.txt").read_text()


def test_the_initial_file_without_entries_for_time_starts_a_run(tmp_path: Path) -> None:
    whole = fixture_tensors("osp_v1.1/weights")
    kept = {
        name: t for name, t in whole.items() if "time_downsample" not in name and "time_upsample" not in name
    }
    assert len(kept) < len(whole)
    torch.save(kept, tmp_path / "init.ckpt")
    assert train(tmp_path, load_from_checkpoint=tmp_path / "init.ckpt") == 0
    assert "they keep their initial values" in (tmp_path / "run/log.txt").read_text()
    assert weights_of(tmp_path).keys() == whole.keys()


def test_a_critic_of_the_same_shape_goes_on_with_its_weights(tmp_path: Path) -> None:
    judged = {"disc_type": "patchgan3d", "disc_start": 0, "model": "tiny"}
    assert train(tmp_path / "first", **judged, start_learning_rate="1e-3") == 0
    assert train(tmp_path, **judged, load_from_checkpoint=tmp_path / "first/run") == 0
    before, after = tensors(tmp_path / "first", 1), tensors(tmp_path, 1)
    name = "discriminator/main.0.weight"
    assert torch.equal(before[name], after[name])
    assert "the critic's weights are those of" in (tmp_path / "run/log.txt").read_text()
    assert (
        train(
            tmp_path / "other",
            **judged | {"disc_type": "patchgan2d"},
            load_from_checkpoint=tmp_path / "first/run",
        )
        == 0
    )
    assert "so it begins anew" in (tmp_path / "other/run/log.txt").read_text()


def test_what_fits_is_loaded_if_that_was_asked_for(tmp_path: Path) -> None:
    assert train(tmp_path / "first", model="tiny") == 0
    chosen = {"model": "small", "load_from_checkpoint": tmp_path / "first/run"}
    assert train(tmp_path, **chosen, partial=True) == 0
    log = (tmp_path / "run/log.txt").read_text()
    assert "tensors are loaded from" in log
    assert "kept as they began: " in log
    assert "of the file, not used: " in log


MISTAKES = {
    "an image VAE": (FIXTURES / "autoencoder_kl", {}, "causalvae init --from"),
    "a critic": (CHECKPOINTS / "disc2d_legacy.pt", {}, "no model that is known here"),
    "another size": (FIXTURES / "wfvae/weights.safetensors", {"resolution": 20}, "multiples of 8"),
    "a config of another model": (
        FIXTURES / "osp_v1.1/weights.safetensors",
        {"model_config": FIXTURES / "osp_v1.2/config.json"},
        "does not belong to these weights",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_weights_that_no_run_can_start_from_are_refused_in_a_line(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, changes, reason = MISTAKES[name]
    assert train(tmp_path, load_from_checkpoint=path, **changes) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert reason in said
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_v1_0_without_its_config_is_taken_as_released_and_says_so(tmp_path: Path) -> None:
    shutil.copy(FIXTURES / "osp_v1.0/weights.safetensors", tmp_path / "vae.safetensors")
    assert any("released" in note for note in load_model(tmp_path / "vae.safetensors").notes)
    beside = load_model(FIXTURES / "osp_v1.0/weights.safetensors")
    assert beside.notes == ()
    given = load_model(tmp_path / "vae.safetensors", model_config=FIXTURES / "osp_v1.0/config.json")
    assert given.config == beside.config
