"""What a person sees who trains: the seed command, the run's folder, records, the terminal, broken videos."""

import json
import math
import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import DOOR, ENVIRONMENT, ROOT, assert_same_state, metrics, run, start, words
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from causalvae.cli import main
from causalvae.data.sources import CLIPS

SEED_COMMAND = """
    --exp_name "9x256x256_optimized" --batch_size 1 --precision bf16 --amp_level "O2"
    --max_steps 2 --save_steps 1000 --output_dir results/causalvae
    --video_path sample: --video_num_frames 16 --resolution 64 --sample_rate 1
    --dataloader_num_workers 8
    --start_learning_rate 3e-5 --lr_scheduler cosine --optim adamw --betas 0.9 0.999
    --clip_grad True --weight_decay 0.01 --mode 0 --init_loss_scale 512 --jit_level "O1"
"""
CHECKPOINT_FILES = {
    "model.safetensors",
    "ema.safetensors",
    "discriminator.safetensors",
    "optimizer.safetensors",
    "state.json",
    "MANIFEST.json",
}
OTHER_WORKERS = ("--dataloader_num_workers", "0")  # the data does not depend on them, and it is faster
CONSTANT = {"lr_scheduler": "constant", "lr_warmup_steps": 0}  # so that max_steps does not change the rates


def train(folder: Path, flags: list[str]) -> subprocess.CompletedProcess[str]:
    """The door with these flags, from a folder of the user's."""
    words = [sys.executable, str(DOOR), *flags]
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False, env=ENVIRONMENT)


@pytest.mark.slow
def test_the_seed_command_trains_and_its_config_gives_the_same_run_again(tmp_path: Path) -> None:
    flags = [word.strip('"') for word in SEED_COMMAND.split()]
    done = train(tmp_path, [*flags, "--model", "tiny"])
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    path = tmp_path / "results" / "causalvae" / "9x256x256_optimized"
    warned = [line.removeprefix("warning: ") for line in done.stdout.splitlines() if "warning" in line]
    facts = json.loads((path / "run.json").read_text())
    words = [line.split()[0] for line in warned]
    # What this machine has decides: bf16, and a compiler. Files of LPIPS can't be fetched in a test.
    assert "the" in words
    assert ("--precision" in words) == (facts["precision"] == "fp32")
    assert ("--init_loss_scale" in words) == (facts["precision"] == "fp32")
    assert ("--jit_level" in words) == (facts["jit_level"] == "O0")
    assert set(words) <= {"the", "--precision", "--init_loss_scale", "--jit_level"}
    assert facts["warnings"] == warned
    shown = [line.split(" ", 2)[2] for line in (path / "log.txt").read_text().splitlines()]
    assert shown == done.stdout.splitlines()
    checkpoint = path / "checkpoints" / "step-00000002"
    assert {file.name for file in checkpoint.iterdir()} == CHECKPOINT_FILES
    names = ["step-00000002-clip0.mp4", "step-00000002-clip1.mp4", "step-00000002.png"]
    assert sorted(file.name for file in (path / "samples").iterdir()) == names

    again = train(tmp_path, ["--config", str(path / "config.yaml"), "--exp_name", "again", *OTHER_WORKERS])
    assert again.returncode == 0, again.stderr
    for file in checkpoint.glob("*.safetensors"):
        saved = (
            load_file(file),
            load_file(path.with_name("again") / "checkpoints" / checkpoint.name / file.name),
        )
        assert saved[0].keys() == saved[1].keys()
        assert all(torch.equal(tensor, saved[1][name]) for name, tensor in saved[0].items()), file.name
    both = [(each / "config.yaml").read_text().splitlines() for each in (path, path.with_name("again"))]
    changed = ("exp_name", "dataloader_num_workers")
    settings = [[x.split("  #")[0] for x in lines if not x.startswith(changed)] for lines in both]
    assert settings[0] == settings[1]


@pytest.mark.slow
def test_every_logged_step_has_its_numbers_and_tensorboard_the_same(tmp_path: Path) -> None:
    done = run(tmp_path, max_steps=5, tensorboard=True)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    always = {"step", "time", "cursor", "pixel", "kl", "logvar", "total", "learning_rate", "grad_norm"}
    always |= {"clips_per_second", "data_wait", "memory_gib"}
    judged = {"adversarial", "adaptive_weight", "critic", "critic_grad_norm"}
    for line in lines:
        wanted = always | judged if line["step"] > 3 else always  # disc_start 3: from the fourth step on
        assert wanted <= line.keys()
        assert not (judged & line.keys()) or line["step"] > 3
        assert all(math.isfinite(value) for value in line.values())
        assert 0 <= line["data_wait"] <= 1
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    for name in (always | judged) - {"step", "time"}:
        written = [(line["step"], line[name]) for line in lines if name in line]
        assert [(point.step, pytest.approx(point.value)) for point in events.Scalars(name)] == written, name


def broken_clips(folder: Path) -> set[str]:
    """Files that end early, are text, or are empty; their names."""
    folder.mkdir(exist_ok=True)
    whole = (CLIPS / "city_spire.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 3])
    (folder / "text.mp4").write_text("This is not a video.\n" * 50)
    (folder / "zero.avi").write_bytes(b"")
    return {"cut.mp4", "text.mp4", "zero.avi"}


def quarantined(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "run" / "quarantine.jsonl").read_text().splitlines()
    return sorted((json.loads(line) for line in lines), key=lambda record: str(record["video"]))


@pytest.mark.slow
def test_broken_videos_are_set_down_once_and_change_nothing_with_workers_or_a_resume(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    videos = tmp_path / "my videos"
    broken = broken_clips(videos)
    shutil.copy(CLIPS / "bunny.webm", videos)
    shutil.copy(CLIPS / "city_towers.avi", videos / "it's a tower.avi")
    common = {"video_path": videos, "save_steps": 100, **CONSTANT}
    straight = run(tmp_path / "straight", max_steps=6, **common)
    assert straight.returncode == 0, straight.stderr
    for steps in (3, 6):
        done = run(tmp_path / "resumed", max_steps=steps, dataloader_num_workers=2, **common)
        assert done.returncode == 0, done.stderr
    assert_same_state(tmp_path / "straight", tmp_path / "resumed", step=6)
    records = quarantined(tmp_path / "straight")
    assert records == quarantined(tmp_path / "resumed")
    assert {record["video"] for record in records} == broken
    assert len(records) == len(broken)
    assert all(record["reason"] for record in records)
    assert all(f"warning: {name} is left out: " in straight.stdout for name in broken)

    (videos / "one more.avi").write_bytes((CLIPS / "city_towers.avi").read_bytes())
    assert main("train", words(tmp_path / "straight", max_steps=8, **common)[2:]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --video_path")
    assert "it had 5, now there are 6" in error


def test_a_run_that_diverges_stops_and_saves_nothing_that_is_not_finite(tmp_path: Path) -> None:
    absurd = {
        "start_learning_rate": "1e30",
        "end_learning_rate": 0,
        "optim": "sgd",
        "lr_scheduler": "constant",
    }
    done = run(tmp_path, max_steps=100, save_steps=1, disc_type="none", **absurd, lr_warmup_steps=0)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    assert "--start_learning_rate" in done.stderr
    assert "Trying once more" not in done.stdout
    lines = metrics(tmp_path)
    assert [line["skipped"] for line in lines if "skipped" in line] == list(range(1, 21))
    assert len({line["cursor"] for line in lines}) == len(lines)  # each skipped step took new clips
    files = list((tmp_path / "run" / "checkpoints").glob("step-*/*.safetensors"))
    assert files
    assert all(torch.isfinite(x).all() for file in files for x in load_file(file).values())


def on_a_terminal(command: list[str]) -> tuple[int, str]:
    """Exit status of a command on a pseudo-terminal, and all that it wrote there."""
    ours, theirs = pty.openpty()
    environment = ENVIRONMENT | {"TERM": "xterm-256color", "COLUMNS": "80", "LINES": "40"}
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, env=environment
    )
    os.close(theirs)
    seen = bytearray()
    while True:
        try:
            block = os.read(ours, 65536)
        except OSError:  # EIO: the last process on it has ended
            break
        if not block:
            break
        seen += block
    os.close(ours)
    return process.wait(), seen.decode()


@pytest.mark.slow
def test_a_terminal_shows_a_bar_that_is_gone_at_the_end(tmp_path: Path) -> None:
    status, text = on_a_terminal(words(tmp_path, max_steps=4, dataloader_num_workers=1))
    assert status == 0, text
    bar = [line for line in text.replace("\r", "\n").split("\n") if "4/4" in line and "clips/s" in line]
    assert bar
    assert all(part in bar[-1] for part in ("step", "loss", "clips/s", "wait"))
    assert "\x1b[?25l" in text  # the cursor is hidden
    assert text.split("done; the run is in")[1].endswith("\x1b[?25h\r\x1b[1A\x1b[2K")  # back, and no bar
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "step 4/4  loss" in log
    assert "\x1b" not in log


def test_a_reader_that_goes_away_does_not_stop_the_training(tmp_path: Path) -> None:
    process = start(tmp_path, max_steps=4)
    assert process.stdout is not None
    assert process.stderr is not None
    first = process.stdout.readline()
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 0, errors
    assert errors == ""
    assert first.startswith("run: 2 videos")
    assert "step 4: done" in (tmp_path / "run" / "log.txt").read_text()


def test_the_python_api_trains_from_a_script_and_imports_no_compiler(tmp_path: Path) -> None:
    script = tmp_path / "my_training.py"
    script.write_text(
        "import sys\n"
        "import causalvae\n"
        "from causalvae.config import Resolution\n"
        "if __name__ == '__main__':\n"
        "    settings = causalvae.TrainSettings(\n"
        "        exp_name='run', output_dir='.', video_path='sample:', model='tiny', max_steps=1,\n"
        "        video_num_frames=5,\n"
        "        resolution=Resolution(32, 48), dataloader_num_workers=0)\n"
        "    first = causalvae.train(settings)\n"
        "    result = causalvae.train(settings)\n"
        "    print(result.status, result.step, result.path, 'torch._dynamo' in sys.modules)\n"
    )
    environment = ENVIRONMENT | {"PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, str(script)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"0 1 {tmp_path / 'run'} False"
