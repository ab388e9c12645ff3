"""What a person sees whose training can't start or can't go on: one line, an exit status, nothing spoiled."""

import json
import resource
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from runs import ENVIRONMENT, assert_same_state, metrics, run, words

from causalvae.cli import main

CONSTANT = {"lr_scheduler": "constant", "lr_warmup_steps": 0}
FILE_LIMIT = 5 * 2**20  # bytes; the weights of the tiny model take 25 MB


def no_folder(folder: Path) -> dict[str, object]:
    return {"video_path": folder / "nothing" / "here"}


def empty_folder(folder: Path) -> dict[str, object]:
    (folder / "empty").mkdir()
    return {"video_path": folder / "empty"}


def no_checkpoint(folder: Path) -> dict[str, object]:
    return {"load_from_checkpoint": folder / "pretrained" / "causal_vae_488_init.ckpt"}


def foreign_checkpoint(folder: Path) -> dict[str, object]:
    torch.save({"state_dict": {"weight": torch.zeros(3)}}, folder / "theirs.ckpt")
    return {"load_from_checkpoint": folder / "theirs.ckpt"}


def empty_checkpoint(folder: Path) -> dict[str, object]:
    (folder / "empty.safetensors").write_bytes(b"")
    return {"load_from_checkpoint": folder / "empty.safetensors"}


def torn_checkpoint(folder: Path) -> dict[str, object]:
    (folder / "torn.safetensors").write_bytes((10**4).to_bytes(8, "little") + b'{"weight": {"dty')
    return {"load_from_checkpoint": folder / "torn.safetensors"}


def no_checkpoint_to_resume(folder: Path) -> dict[str, object]:
    return {"resume": folder / "checkpoints" / "step-00000010"}


def file_for_folder(folder: Path) -> dict[str, object]:
    (folder / "results").write_text("mine")
    return {"output_dir": folder / "results"}


def unknown_device(folder: Path) -> dict[str, object]:
    return {"device": "gpu"}


MISTAKES: list[tuple[Callable[[Path], dict[str, object]], tuple[str, ...]]] = [
    (no_folder, ("--video_path", "nothing/here", "there is no such file or folder", "sample:")),
    (empty_folder, ("--video_path", "empty", "no video or image", ".mp4")),
    (no_checkpoint, ("--load_from_checkpoint", "init.ckpt", "there is no such file", "Leave the flag out")),
    (foreign_checkpoint, ("--load_from_checkpoint", "theirs.ckpt", "no model that is known here")),
    (empty_checkpoint, ("--load_from_checkpoint", "empty.safetensors")),
    (torn_checkpoint, ("--load_from_checkpoint", "torn.safetensors", "not a whole safetensors file")),
    (no_checkpoint_to_resume, ("--resume", "step-00000010", "no checkpoint is there")),
    (file_for_folder, ("results/run", "can't be written", "choose another --output_dir")),
    (unknown_device, ("--device", "gpu", "auto, cpu, cuda")),
    (lambda _: {"exp_name": "../x"}, ("--exp_name ../x", "one name without /", "--output_dir")),
    (lambda _: {"resolution": 100}, ("--resolution", "multiples of 8", "96")),
    (lambda _: {"batch_size": 0}, ("--batch_size 0",)),
    (lambda _: {"betas": "0.9"}, ("--betas",)),
    (lambda _: {"bach_size": 2}, ("--bach_size", "did you mean --batch_size")),
]


@pytest.mark.parametrize(("mistake", "said"), MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing_behind(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    mistake: Callable[[Path], dict[str, object]],
    said: tuple[str, ...],
) -> None:
    changes = mistake(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    status = main("train", words(tmp_path, **changes)[2:])  # in this process: a start takes seconds
    shown = capsys.readouterr()
    assert status == 2
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert len(shown.err.splitlines()) == 1
    for part in said:
        assert part in shown.err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_mistake_has_its_status_and_no_traceback_in_a_process_of_its_own(tmp_path: Path) -> None:
    done = run(tmp_path, load_from_checkpoint="pretrained/causal_vae_488_init.ckpt")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: --load_from_checkpoint pretrained/causal_vae_488_init.ckpt: ")
    assert done.stderr.count("\n") == 1
    assert not any(tmp_path.iterdir())


def test_a_folder_of_broken_videos_is_a_mistake_with_its_first_reasons(tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    (videos / "text.mp4").write_text("This is not a video.\n" * 50)
    (videos / "zero.avi").write_bytes(b"")
    done = run(tmp_path, video_path=videos)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert "text.mp4" in done.stderr
    assert "zero.avi" in done.stderr
    records = [json.loads(x) for x in (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()]
    assert sorted(record["video"] for record in records) == ["text.mp4", "zero.avi"]
    assert all(record["reason"] in done.stderr for record in records)
    assert not any((tmp_path / "run" / "checkpoints").iterdir())


def small_files() -> None:
    """In the child: no file may grow past the limit, as on a disk that is full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_LIMIT, FILE_LIMIT))


@pytest.mark.slow
def test_a_full_disk_ends_the_run_which_goes_on_when_there_is_room(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = {"save_steps": 2, **CONSTANT}
    full, straight = tmp_path / "full", tmp_path / "straight"
    assert run(full, max_steps=2, **common).returncode == 0
    checkpoint = full / "run" / "checkpoints" / "step-00000002"
    saved = {file.name: file.read_bytes() for file in checkpoint.iterdir()}

    command = words(full, max_steps=4, **common)
    failed = subprocess.run(
        command, capture_output=True, text=True, check=False, env=ENVIRONMENT, preexec_fn=small_files
    )
    assert failed.returncode == 1
    assert failed.stderr.startswith("error: ")
    assert len(failed.stderr.splitlines()) == 1
    for part in ("step-00000004", "can't be written", "needed are about", "bytes are free", "make room"):
        assert part in failed.stderr
    assert failed.stdout.count("Trying once more") == 1
    assert (full / "run" / "log.txt").read_text().endswith(failed.stderr)
    assert [each.name for each in checkpoint.parent.iterdir()] == [checkpoint.name]
    assert {file.name: file.read_bytes() for file in checkpoint.iterdir()} == saved

    assert run(full, max_steps=4, **common).returncode == 0
    assert run(straight, max_steps=4, **common).returncode == 0
    assert_same_state(full, straight, step=4)
    assert metrics(full) == metrics(straight)

    assert main("train", words(full, max_steps=6, **common, resume="never")[2:]) == 2
    assert "is not empty and --resume never was given" in capsys.readouterr().err
