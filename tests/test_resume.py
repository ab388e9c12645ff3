"""The law of resume: however often a run is killed, it ends bitwise as the run that was never interrupted."""

import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from runs import assert_same_state, metrics, run, start

LAST = 20  # the last of the kills comes at step 14 where nothing else is slow
KILLS = 12


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that is never interrupted."""
    folder = tmp_path_factory.mktemp("reference")
    done = run(folder, max_steps=LAST)
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in metrics(folder)] == list(range(1, LAST + 1))
    return folder


def wait_until(process: subprocess.Popen[str], condition: "object") -> bool:
    """Look again and again until the condition holds (True) or the process ended (False)."""
    assert callable(condition)
    while process.poll() is None:
        if condition():
            return True
        time.sleep(0.001)
    return False


def lines_in(folder: Path) -> int:
    file = folder / "run" / "metrics.jsonl"
    return len(file.read_bytes().splitlines()) if file.exists() else 0


def is_saving(folder: Path) -> bool:
    return any((folder / "run" / "checkpoints").glob(".step-*.partial"))


@pytest.mark.slow
def test_a_run_killed_twelve_times_ends_as_the_one_never_interrupted(reference: Path, tmp_path: Path) -> None:
    chance = random.Random(20)
    kills = 0
    while True:
        process = start(tmp_path, max_steps=LAST, dataloader_num_workers=chance.choice((0, 2)))
        # Half of the kills wait for a save to begin, half for one or two more steps; then a moment more.
        goal = lines_in(tmp_path) + chance.randint(1, 2)
        aimed = kills % 2 == 0
        condition = (lambda: is_saving(tmp_path)) if aimed else (lambda: lines_in(tmp_path) >= goal)  # noqa: B023
        alive = kills < KILLS and wait_until(process, condition)
        if not alive:
            output = process.communicate()
            assert process.returncode == 0, output
            break
        time.sleep(chance.random() * (0.03 if aimed else 0.1))
        os.killpg(process.pid, signal.SIGKILL) if chance.random() < 0.5 else process.kill()
        process.communicate()
        kills += 1
    assert kills == KILLS
    assert_same_state(reference, tmp_path, step=LAST)
    assert metrics(tmp_path) == metrics(reference)


@pytest.mark.parametrize(
    ("number", "status", "workers"), [(signal.SIGTERM, 143, 2), (signal.SIGINT, 130, 0)], ids=["TERM", "INT"]
)
def test_a_signal_leaves_a_checkpoint_and_the_run_goes_on(
    reference: Path, tmp_path: Path, number: int, status: int, workers: int
) -> None:
    process = start(tmp_path, max_steps=LAST, dataloader_num_workers=workers, save_steps=1000)
    assert wait_until(process, lambda: lines_in(tmp_path) >= 3)
    os.killpg(process.pid, number)
    output, errors = process.communicate()
    assert process.returncode == status, errors
    assert errors == "stopping when this step is done; another signal ends it at once\n"
    assert "Traceback" not in output
    saved = [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()]
    assert len(saved) == 1
    assert saved[0] < f"step-{LAST:08d}"
    assert run(tmp_path, max_steps=LAST).returncode == 0
    assert_same_state(reference, tmp_path, step=LAST)
    assert metrics(tmp_path) == metrics(reference)


@pytest.mark.parametrize("fault", ["truncated", "flipped", "missing"])
def test_a_damaged_newest_checkpoint_is_set_aside_and_the_one_before_taken(
    reference: Path, tmp_path: Path, fault: str
) -> None:
    shutil.copytree(reference / "run", tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / f"step-{LAST:08d}"
    file = newest / "model.safetensors"
    content = bytearray(file.read_bytes())
    if fault == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif fault == "flipped":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    else:
        file.unlink()
    done = run(tmp_path, max_steps=LAST)
    assert done.returncode == 0, done.stderr
    assert "warning:" in done.stdout
    assert "model.safetensors" in done.stdout
    assert newest.with_name(f"{newest.name}.broken-1").is_dir()
    assert_same_state(reference, tmp_path, step=LAST)


def test_raising_max_steps_on_a_finished_run_goes_on(reference: Path, tmp_path: Path) -> None:
    shutil.copytree(reference / "run", tmp_path / "run")
    done = run(tmp_path, max_steps=LAST + 2)
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in metrics(tmp_path)] == list(range(1, LAST + 3))


def test_settings_that_change_the_mathematics_are_refused_with_their_names(
    reference: Path, tmp_path: Path
) -> None:
    shutil.copytree(reference / "run", tmp_path / "run")
    done = run(tmp_path, max_steps=LAST + 2, resolution=64, start_learning_rate="2e-4")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "--resolution: 32 -> 64" in done.stderr
    assert "--start_learning_rate: 0.0001 -> 0.0002" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_second_process_on_the_same_run_is_told_who_has_it(tmp_path: Path) -> None:
    first = start(tmp_path, max_steps=10**6)
    try:
        assert wait_until(first, lambda: lines_in(tmp_path) >= 1)
        second = run(tmp_path)
        assert second.returncode == 2
        assert f"process {first.pid}" in second.stderr
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.communicate()
    assert run(tmp_path, max_steps=1).returncode == 0  # the dead holder's lock is free at once
