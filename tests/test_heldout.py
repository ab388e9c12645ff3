"""Held-out evaluation: while a run trains it changes nothing of it, and mode 2 repeats it from the files."""

import json
import shutil
from pathlib import Path

import pytest
from runs import SMALL, assert_same_state, metrics, run, words

from causalvae.cli import main
from causalvae.data.clips import ClipPlan, center_clip
from causalvae.data.sources import open_source
from causalvae.metrics import psnr
from causalvae.models.build import build
from causalvae.train.samples import reconstruct
from causalvae.weights.tensorfiles import read_safetensors


def flags(folder: Path, **changes: object) -> list[str]:
    """The words after the program's name."""
    return words(folder, **changes)[2:]


def test_a_run_with_evaluation_equals_one_without_bitwise(tmp_path: Path) -> None:
    plain, looked = tmp_path / "plain", tmp_path / "looked"
    assert run(plain, max_steps=4).returncode == 0
    done = run(looked, max_steps=4, eval_steps=2, eval_video_path="sample:heldout")
    assert done.returncode == 0, done.stderr
    assert_same_state(plain, looked, step=4)
    assert metrics(plain) == metrics(looked)
    assert sorted(file.name for file in (looked / "run/eval").iterdir()) == [
        "step-00000002.films",
        "step-00000002.json",
        "step-00000004.films",
        "step-00000004.json",
    ]
    assert "dB PSNR (ema weights) on 1 held-out clips" in done.stdout

    # The number is that of the averaged weights in the checkpoint, and mode 2 finds it again.
    result = json.loads((looked / "run/eval/step-00000004.json").read_text())
    clip = center_clip(open_source("sample:heldout")[0], ClipPlan(frames=5, size=(32, 32)))
    averaged = read_safetensors(looked / "run/checkpoints/step-00000004/ema.safetensors")
    recon = reconstruct(build(SMALL), clip, weights=averaged)
    assert result["weights"]["ema"]["metrics"]["psnr"]["mean"] == psnr(clip, recon)
    live = read_safetensors(looked / "run/checkpoints/step-00000004/model.safetensors")
    recon = reconstruct(build(SMALL), clip, weights=live)
    assert result["weights"]["live"]["metrics"]["psnr"]["mean"] == psnr(clip, recon)
    shutil.rmtree(looked / "run/eval")
    config = (looked / "run/config.yaml").read_bytes()
    again = run(looked, max_steps=4, eval_video_path="sample:heldout", mode=2)
    assert again.returncode == 0, again.stderr
    assert json.loads((looked / "run/eval/step-00000004.json").read_text()) == result
    assert (looked / "run/config.yaml").read_bytes() == config
    assert_same_state(plain, looked, step=4)


def test_mode_2_says_what_it_lacks_and_leaves_no_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main("train", flags(tmp_path, mode=2, model="tiny")) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: --mode 2 evaluates a checkpoint, and ")
    assert message.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_broken_held_out_video_is_named_and_leaves_the_mean(tmp_path: Path) -> None:
    folder = tmp_path / "held"
    folder.mkdir()
    shutil.copy(open_source("sample:heldout")[0].path, folder / "a.mp4")
    (folder / "b.mp4").write_bytes(b"no video")
    done = run(tmp_path, max_steps=1, eval_steps=1, eval_video_path=folder)
    assert done.returncode == 0, done.stderr
    assert "evaluation leaves out b.mp4" in done.stdout
    result = json.loads((tmp_path / "run/eval/step-00000001.json").read_text())
    sides = result["weights"]
    assert [[clip["id"] for clip in sides[name]["clips"]] for name in ("ema", "live")] == [["a.mp4#0"]] * 2
    assert [record["video"] for record in result["unreadable"]] == ["b.mp4"]
