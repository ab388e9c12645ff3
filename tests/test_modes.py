"""Modes, memory and precision as a user asks for them: by the flags of the command."""

import json
from pathlib import Path

import pytest
import torch
from runs import ENVIRONMENT, assert_same_state, metrics, tensors, words

from causalvae.cli import main
from causalvae.files import sha256
from causalvae.rundir import MANIFEST

WILD = {"max_steps": 3, "start_learning_rate": "1e30", "lr_warmup_steps": 0, "mode": 1}


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As the command runs elsewhere in these tests: nothing is fetched, and its cache is a new folder."""
    for name in ("CAUSALVAE_OFFLINE", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, ENVIRONMENT[name])
    monkeypatch.setenv("CAUSALVAE_HOME", str(tmp_path / "home"))


def train(folder: Path, **changes: object) -> int:
    return main("train", words(folder, **changes)[2:])


def test_a_watched_run_equals_a_plain_one_bitwise(tmp_path: Path) -> None:
    assert train(tmp_path / "plain", max_steps=4) == 0
    assert train(tmp_path / "watched", max_steps=4, mode=1) == 0
    assert_same_state(tmp_path / "plain", tmp_path / "watched", step=4)
    assert metrics(tmp_path / "plain") == metrics(tmp_path / "watched")
    assert not (tmp_path / "watched/run/debug").exists()


def test_mode_1_stops_at_the_bad_step_and_its_folder_repeats_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path, **WILD) == 1
    said = capsys.readouterr().err
    (folder,) = (tmp_path / "run/debug").iterdir()
    found = json.loads((folder / "report.json").read_text())
    assert said.startswith("error: step 2: first non-finite value in vae.encoder")
    assert found["finding"] in said
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    assert train(tmp_path, **WILD, resume=folder) == 0
    assert found["finding"] in capsys.readouterr().out
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before
    assert train(tmp_path, **WILD | {"mode": 0}, resume=folder) == 2
    assert "add --mode 1" in capsys.readouterr().err


def test_a_critic_that_stands_still_is_told_once_and_only_flags_that_were_given_are_named(
    tmp_path: Path,
) -> None:
    endless = {"r1_weight": "1e38", "disc_start": 0, "loss_scale_window": 5, "max_steps": 3}
    assert train(tmp_path, **endless, log_steps=100) == 0
    warned = json.loads((tmp_path / "run/run.json").read_text())["warnings"]
    assert warned == [
        "--loss_scale_window has no effect: the run computes in fp32, which needs no loss scale",
        "step 1: the critic's gradients are not finite, it was not updated",
    ]
    assert [line["step"] for line in metrics(tmp_path)] == [1, 3]
    assert all("critic_r1" in line and "critic_grad_norm" not in line for line in metrics(tmp_path))


def test_a_run_that_ends_not_finite_says_how_to_begin_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path, **WILD | {"mode": 0, "save_steps": 1}) == 1
    said = capsys.readouterr().err
    path = tmp_path / "run/checkpoints"
    assert said.startswith("error: 20 steps in a row were not finite")
    assert f"--exp_name NEW --load_from_checkpoint {path}/step-N) with a lower --start" in said


def test_less_memory_gives_the_same_run(tmp_path: Path) -> None:
    plain = {"max_steps": 3, "disc_start": 0, "optim": "sgd", "start_learning_rate": 0.01}
    assert train(tmp_path / "speed", **plain, memory="speed") == 0
    assert train(tmp_path / "lean", **plain, memory="lean") == 0
    assert_same_state(tmp_path / "speed", tmp_path / "lean", step=3)


def test_a_run_goes_on_in_as_many_parts_as_before_whatever_memory_is_free(tmp_path: Path) -> None:
    assert train(tmp_path, max_steps=1) == 0
    folder = tmp_path / "run/checkpoints/step-00000001"
    counters = json.loads((folder / "state.json").read_text())
    assert counters["parts"] == 1
    (folder / "state.json").write_text(json.dumps({**counters, "parts": 2}))
    manifest = json.loads((folder / MANIFEST).read_text())
    written = (folder / "state.json").stat().st_size, sha256(folder / "state.json")
    manifest["files"]["state.json"] = dict(zip(("bytes", "sha256"), written, strict=True))
    (folder / MANIFEST).write_text(json.dumps(manifest))
    assert train(tmp_path, max_steps=2) == 0
    after = json.loads((tmp_path / "run/checkpoints/step-00000002/state.json").read_text())
    assert after["parts"] == 2


def test_a_budget_that_nothing_fits_into_is_a_mistake(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path, memory="1MiB") == 2
    said = capsys.readouterr().err
    assert said.startswith("error: a step needs at least ")
    assert "--memory gives it 1 MiB; lower --resolution" in said


@pytest.mark.parametrize(("precision", "level"), [("bf16", "O2")])
def test_half_precision_goes_on_bitwise_and_says_what_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, level: str
) -> None:
    monkeypatch.setenv("CAUSALVAE_ASSUME_BF16", "1")  # slow where there is no hardware, and the same
    chosen = {
        "precision": precision,
        "amp_level": level,
        "init_loss_scale": 512,
        "disc_start": 1,
        "lr_scheduler": "constant",
        "lr_warmup_steps": 0,
    }
    assert train(tmp_path / "once", **chosen, max_steps=3) == 0
    assert train(tmp_path / "twice", **chosen, max_steps=2) == 0
    cache = tmp_path / "home/convolutions.json"
    cache.unlink()  # what was found about the kernels is kept with the run
    assert train(tmp_path / "twice", **chosen, max_steps=3) == 0
    assert not cache.exists()
    assert_same_state(tmp_path / "once", tmp_path / "twice", step=3)
    facts = json.loads((tmp_path / "once/run/run.json").read_text())
    assert (facts["precision"], facts["amp_level"]) == (precision, level)
    kept = {t.dtype for name, t in tensors(tmp_path / "once", 3).items() if name.startswith("model/")}
    assert (torch.bfloat16 in kept) == (level == "O3")
    assert metrics(tmp_path / "once")[-1]["loss_scale"] == 512
