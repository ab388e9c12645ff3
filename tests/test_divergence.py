"""A run that diverges goes back with half the rate, and does the same when it was killed on its way."""

import json
from pathlib import Path

import pytest
from runs import metrics, run, start, tensors

ROLLBACK = {
    "video_num_frames": 1,
    "optim": "sgd",
    "betas": None,
    "disc_type": "none",
    "lr_scheduler": "constant",
    "start_learning_rate": 0.5,  # its warm-up reaches what this model can't bear after some good steps
    "lr_warmup_steps": 16,
    "max_steps": 100,
    "save_steps": 2,
    "keep_checkpoints": "all",
    "on_divergence": "rollback",
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that is never killed: it goes back three times and stops."""
    folder = tmp_path_factory.mktemp("reference")
    done = run(folder, **ROLLBACK)
    assert done.returncode == 1
    assert done.stderr.startswith("error: 20 steps in a row were not finite")
    assert "after 3 rollbacks; start another run from a good checkpoint" in done.stderr
    warned = json.loads((folder / "run" / "run.json").read_text())["warnings"]
    told = [text.split("Rollback ")[1].split(",")[0] for text in warned if "Rollback " in text]
    assert [text.split(":")[0] for text in told] == ["1 of 3", "2 of 3", "3 of 3"]
    return folder


def states(folder: Path) -> list[tuple[str, str]]:
    """Checkpoints that are resumed from, by name, with what their state.json says."""
    found = (folder / "run" / "checkpoints").glob("step-????????")
    return sorted((path.name, (path / "state.json").read_text()) for path in found)


@pytest.mark.slow
def test_the_rate_is_halved_each_time_and_no_clips_come_twice(reference: Path) -> None:
    lines = metrics(reference)
    last = lines[-1]
    assert last["skipped"] == 20
    assert last["learning_rate"] == pytest.approx(0.125 * 0.5 * min(1.0, (last["step"] + 1) / 16))
    cursors = [line["cursor"] for line in lines]
    assert cursors == sorted(set(cursors))
    assert cursors[-1] == 80 + len({line["step"] for line in lines}) + gone_back_over(reference)


def gone_back_over(folder: Path) -> int:
    """Updates that were undone."""
    log = (folder / "run" / "log.txt").read_text()
    lines = [line for line in log.splitlines() if "Rollback " in line]
    pairs = [line.split("warning: step ")[1] for line in lines]
    return sum(int(p.split(":")[0]) - int(p.split("back to step ")[1].split(",")[0]) for p in pairs)


@pytest.mark.slow
def test_a_run_killed_after_a_rollback_ends_as_the_one_never_killed(reference: Path, tmp_path: Path) -> None:
    process = start(tmp_path, **ROLLBACK)
    assert process.stdout is not None
    for line in process.stdout:
        if "Rollback 2 of 3" in line:
            break
    process.kill()
    process.communicate()
    done = run(tmp_path, **ROLLBACK)
    assert done.returncode == 1
    assert metrics(tmp_path) == metrics(reference)
    assert states(tmp_path) == states(reference)
    last = int(states(reference)[-1][0].removeprefix("step-"))
    one, other = tensors(reference, last), tensors(tmp_path, last)
    assert all(one[name].equal(other[name]) for name in one | other)
