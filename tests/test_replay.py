"""A bad step is kept with its clips and its state, and what was kept repeats it."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_debug import HUGE, LOSS, set_weight, state_of

from causalvae import rng
from causalvae.data.clips import ClipPlan
from causalvae.data.loader import ClipLoader, Clips
from causalvae.data.sources import open_source
from causalvae.errors import RunError
from causalvae.rundir import damage
from causalvae.train.debug import BadPlace, Watch
from causalvae.train.replay import explain_bad_step, is_replay, read_replay, write_replay
from causalvae.train.state import TrainState
from causalvae.train.step import train_step
from causalvae.video import to_model

SETTINGS = {"batch_size": 2, "start_learning_rate": 1e-5}


@pytest.fixture(scope="module")
def clips() -> Clips:
    plan = ClipPlan(frames=5, size=(32, 32), stride=1, batch=2, seed=0)
    with ClipLoader(open_source("sample:"), plan, cursor=3) as loader:
        return next(loader)


def poisoned(folder: Path) -> TrainState:
    """A training from a saved checkpoint in which one weight was set to a huge value."""
    training = state_of()
    training.step, training.cursor = 2, 3
    training.save(folder)
    weights = load_file(folder / "model.safetensors")
    weights["decoder.up.0.block.0.conv1.conv.bias"][0] = HUGE
    save_file(weights, folder / "model.safetensors")
    training.load(folder)
    return training


def step_of(training: TrainState, clips: Clips) -> tuple[dict[str, float], BadPlace]:
    x = to_model(clips.pixels)
    shape = training.vae.geometry.latent_shape(*x.shape[2:])
    noise = rng.normal((len(x), *shape), rng.key("noise", clips.cursor))
    assert training.critic is not None
    with Watch({"vae": training.vae, "critic": training.critic}) as watch:
        result = train_step(training, x, noise, loss=LOSS, critic_loss="hinge", ema_decay=0.9)
    assert watch.first is not None
    return result.terms.numbers(), watch.first


def test_a_replay_repeats_the_step_with_its_terms_and_its_bad_place(tmp_path: Path, clips: Clips) -> None:
    (tmp_path / "saved").mkdir()
    training = poisoned(tmp_path / "saved")
    before = copy.deepcopy(training)
    terms, bad = step_of(training, clips)
    folder = write_replay(tmp_path / "debug", before, clips=clips, bad=bad, terms=terms, settings=SETTINGS)
    assert folder.name == "step-00000003-cursor-00000003"
    assert damage(folder) is None
    assert is_replay(folder)
    assert not is_replay(tmp_path / "saved")

    replay = read_replay(folder)
    assert torch.equal(replay.clips.pixels, clips.pixels)
    assert (replay.clips.requests, replay.clips.cursor, replay.step) == (clips.requests, 3, 3)
    again = state_of()
    again.load(folder)
    assert (again.step, again.cursor) == (2, 3)
    assert step_of(again, replay.clips) == (terms, bad)
    assert replay.report["finding"] == bad.sentence()
    assert replay.report["settings"] == SETTINGS

    said = explain_bad_step(bad, folder, step=replay.step, clips=clips)
    for part in ("step 3", bad.module, clips.requests[0].video.id, f"--resume {folder} --mode 1"):
        assert part in said


def test_a_replay_that_is_there_is_kept(tmp_path: Path, clips: Clips) -> None:
    (tmp_path / "saved").mkdir()
    training = poisoned(tmp_path / "saved")
    before = copy.deepcopy(training)
    terms, bad = step_of(training, clips)
    folders = [
        write_replay(tmp_path, before, clips=clips, bad=each, terms=terms, settings={})
        for each in (bad, replace(bad, module="other"))
    ]
    assert folders[0] == folders[1]
    assert read_replay(folders[0]).report["first_bad"]["module"] == bad.module


def test_a_state_that_was_bad_before_leaves_clips_and_a_reason(tmp_path: Path, clips: Clips) -> None:
    training = state_of()
    set_weight(training.vae, "decoder.conv_in.conv.bias", float("nan"))
    before = copy.deepcopy(training)
    terms, bad = step_of(training, clips)
    folder = write_replay(tmp_path, before, clips=clips, bad=bad, terms=terms, settings={})
    assert {path.name for path in folder.iterdir()} == {"clips.safetensors", "report.json", "MANIFEST.json"}
    report = json.loads((folder / "report.json").read_text())
    assert "decoder.conv_in.conv.bias is not finite" in report["state"]
    assert report["terms"]["pixel"] == "nan"
    with pytest.raises(RunError, match="holds clips and no state"):
        read_replay(folder)
    assert "resume an earlier checkpoint" in explain_bad_step(bad, folder, step=1, clips=clips)


def test_a_damaged_replay_is_refused(tmp_path: Path, clips: Clips) -> None:
    (tmp_path / "saved").mkdir()
    training = poisoned(tmp_path / "saved")
    before = copy.deepcopy(training)
    terms, bad = step_of(training, clips)
    folder = write_replay(tmp_path, before, clips=clips, bad=bad, terms=terms, settings={})
    (folder / "report.json").write_text("{}")
    with pytest.raises(RunError, match=r"damaged: report\.json"):
        read_replay(folder)
