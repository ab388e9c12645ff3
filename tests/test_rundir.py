"""Laws of a run's folder: whatever is killed, full or damaged, what was saved before is there and found."""

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from faults import PAST_THE_END, at_event, fail_io, kill_self
from safetensors.numpy import save_file

from causalvae.errors import ConfigError, RunError
from causalvae.files import disk_error
from causalvae.rundir import RunDir, damage, run_path

FILES = (*(f"{name}.safetensors" for name in ("model", "ema", "optimizer", "discriminator")), "state.json")
HOLD = """
import os, sys, time
from pathlib import Path
from causalvae.rundir import RunDir
run = RunDir(Path(sys.argv[1]))
if sys.argv[2] == "orphan" and os.fork() == 0:
    sys.stdout.close()
print("held", flush=True)
time.sleep(600)
"""


def save(run: RunDir, step: int) -> None:
    with run.stage(step) as folder:
        for name in FILES:
            (folder / name).write_bytes(f"{name} {step} ".encode() * 100)


def steps(run: RunDir) -> dict[int, bool]:
    """Saved steps, and whether each has its training state; all of them sound."""
    found = run.checkpoints()
    assert [damage(each.path) for each in found] == [None] * len(found)
    return {each.step: each.full for each in found}


def hold(path: Path, *, orphan: bool = False) -> subprocess.Popen[str]:
    """A process that holds the run, with a child of its own if asked."""
    words = [sys.executable, "-c", HOLD, str(path), "orphan" if orphan else "alone"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def end(process: subprocess.Popen[str]) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def test_a_checkpoint_appears_whole_with_a_manifest_and_a_readable_mode(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        with RunDir(tmp_path / "run") as run:
            assert run.was_empty
            with run.stage(7) as folder:
                save_file({"x": np.zeros(3, np.float32)}, folder / "model.safetensors")
                (folder / "state.json").write_text("{}")
                assert run.checkpoints() == []
            (checkpoint,) = run.checkpoints()
    finally:
        os.umask(before)
    assert checkpoint.path == tmp_path / "run" / "checkpoints" / "step-00000007"
    manifest = json.loads((checkpoint.path / "MANIFEST.json").read_text())
    assert manifest["step"] == 7
    assert manifest["files"].keys() == {"model.safetensors", "state.json"}
    assert {item.stat().st_mode & 0o777 for item in checkpoint.path.iterdir()} == {0o644}
    with RunDir(tmp_path / "run") as run:
        assert not run.was_empty


def test_an_error_in_a_save_leaves_nothing_and_the_save_before_it(tmp_path: Path) -> None:
    with RunDir(tmp_path) as run:
        save(run, 1)
        with pytest.raises(ZeroDivisionError), run.stage(2) as folder:  # noqa: PT012 - it fails in the middle
            (folder / "model.safetensors").write_bytes(b"half")
            _ = 1 / 0
        assert os.listdir(tmp_path / "checkpoints") == ["step-00000001"]


def test_killed_at_any_operation_of_a_save_the_newest_checkpoint_is_sound(tmp_path: Path) -> None:
    number, seen = 0, set[int]()
    while True:
        number += 1
        path = tmp_path / str(number)
        with RunDir(path) as run:
            save(run, 1)

        def work(path: Path = path) -> None:
            with RunDir(path) as run:
                save(run, 2)

        status = at_event(number, kill_self, work)
        with RunDir(path) as run:
            latest = run.latest()
            assert latest is not None
            seen.add(latest.step)
            assert run.warnings == []
            assert not any(item.name.startswith(".") for item in (path / "checkpoints").iterdir())
            assert steps(run).keys() == ({1} if latest.step == 1 else {1, 2})
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == PAST_THE_END
            break
    assert seen == {1, 2}
    assert number > 20


def test_a_disk_that_fails_at_any_operation_of_a_save_is_an_error_and_the_next_save_works(
    tmp_path: Path,
) -> None:
    number = 0
    while True:
        number += 1
        with RunDir(tmp_path / str(number)) as run:
            save(run, 1)
            status = os.waitstatus_to_exitcode(at_event(number, fail_io, lambda run=run: save(run, 2)))
            assert run.latest() is not None
            assert status in (0, 1, PAST_THE_END)  # 0: it failed after the checkpoint was whole
            save(run, 3)
            assert {1, 3} <= steps(run).keys()
        if status == PAST_THE_END:
            break
    assert number > 15


def test_killed_at_any_operation_of_pruning_every_checkpoint_is_sound(tmp_path: Path) -> None:
    number = 0
    while True:
        number += 1
        path = tmp_path / str(number)
        with RunDir(path) as run:
            for step in (1, 2, 3):
                save(run, step)
        with RunDir(path) as run:
            status = at_event(number, kill_self, lambda run=run: run.prune(1))
            assert [damage(each.path) for each in run.checkpoints()] == [None] * 3
        with RunDir(path) as run:
            assert steps(run)[3]
            for each in run.checkpoints():
                assert each.full or sorted(os.listdir(each.path)) == ["MANIFEST.json", *sorted(FILES[:2])]
        if os.WIFEXITED(status):
            break
    assert number > 5


def test_pruning_keeps_the_weights_of_every_save_and_what_is_not_ours(tmp_path: Path) -> None:
    with RunDir(tmp_path) as run:
        for step in range(1, 6):
            save(run, step)
        (tmp_path / "checkpoints" / "step-00000001" / "notes.txt").write_text("mine")
        run.prune(None)
        assert steps(run) == dict.fromkeys(range(1, 6), True)
        run.prune(2)
        run.prune(2)
        assert steps(run) == {1: False, 2: False, 3: False, 4: True, 5: True}
        names = sorted(os.listdir(tmp_path / "checkpoints" / "step-00000001"))
        assert names == ["MANIFEST.json", "ema.safetensors", "model.safetensors", "notes.txt"]
        latest = run.latest()
        assert latest is not None
        assert latest.step == 5
        run.prune(9)
        assert steps(run)[4]


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("name", [*FILES, "MANIFEST.json"])
@pytest.mark.parametrize("harm", [flip_bit, cut, Path.unlink])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(
    name: str, harm: Callable[[Path], None], tmp_path: Path
) -> None:
    with RunDir(tmp_path) as run:
        save(run, 1)
        save(run, 2)
        harm(tmp_path / "checkpoints" / "step-00000002" / name)
        latest = run.latest()
        assert latest is not None
        assert latest.step == 1
        (warning,) = run.warnings
        assert name in warning
        assert "step-00000002" in warning
        assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step-00000001", "step-00000002.broken-1"]
        save(run, 2)
        assert steps(run) == {1: True, 2: True}


def test_a_run_whose_checkpoints_are_all_damaged_never_starts_from_zero(tmp_path: Path) -> None:
    with RunDir(tmp_path) as run:
        assert run.latest() is None
        save(run, 1)
        save(run, 2)
        for step in (1, 2):
            flip_bit(tmp_path / "checkpoints" / f"step-{step:08d}" / "ema.safetensors")
    for _ in range(2):
        with RunDir(tmp_path) as run, pytest.raises(RunError, match="no checkpoint can be resumed") as caught:
            run.latest()
        assert caught.value.status == 2
        assert "ema.safetensors has another checksum" in str(caught.value)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step-00000001", "step-00000002"]


def test_a_run_with_only_weights_left_never_starts_from_zero(tmp_path: Path) -> None:
    with RunDir(tmp_path) as run:
        save(run, 1)
        save(run, 2)
        run.prune(1)
        shutil.rmtree(tmp_path / "checkpoints" / "step-00000002")
        with pytest.raises(RunError, match="only weights remain"):
            run.latest()


def test_a_folder_copied_by_hand_is_valid_and_a_part_of_it_is_not(tmp_path: Path) -> None:
    with RunDir(tmp_path / "a") as run:
        save(run, 5)
    with RunDir(tmp_path / "b") as run:
        shutil.copytree(
            tmp_path / "a" / "checkpoints" / "step-00000005", run.path / "checkpoints" / "step-00000005"
        )
        latest = run.latest()
        assert latest is not None
        assert latest.step == 5
    with RunDir(tmp_path / "c") as run:
        copy = run.path / "checkpoints" / "step-00000005"
        shutil.copytree(tmp_path / "a" / "checkpoints" / "step-00000005", copy)
        (copy / "MANIFEST.json").unlink()
        with pytest.raises(RunError, match=r"MANIFEST\.json is missing"):
            run.latest()


@pytest.mark.parametrize("text", [
    "", "[]", "{}", '{"files": []}', '{"files": {"../../x": {"bytes": 1, "sha256": ""}}}',
    '{"files": {"x": 3}}',
    "[" * 9999, '{"files": {"x": "bytes sha256"}}', "\0",
])  # fmt: skip
def test_a_manifest_that_makes_no_sense_is_damage(text: str, tmp_path: Path) -> None:
    (tmp_path / "MANIFEST.json").write_text(text)
    assert damage(tmp_path) == "MANIFEST.json is missing or can't be read"


def test_a_complete_checkpoint_is_kept_a_pruned_one_replaced_a_damaged_one_set_aside(tmp_path: Path) -> None:
    with RunDir(tmp_path) as run:
        for step in (1, 2, 3):
            save(run, step)
        run.prune(2)
        flip_bit(tmp_path / "checkpoints" / "step-00000003" / "state.json")
        for step in (1, 2, 3):
            with run.stage(step) as folder:
                (folder / "model.safetensors").write_bytes(b"new")
                (folder / "state.json").write_bytes(b"new")
        sizes = {c.step: (c.path / "state.json").stat().st_size for c in run.checkpoints()}
        assert sizes[1] == 3
        assert sizes[2] > 3
        assert sizes[3] == 3
        assert (tmp_path / "checkpoints" / "step-00000003.broken-1").is_dir()
        assert len(run.warnings) == 1


def test_a_run_killed_between_two_renames_gets_its_old_weights_back(tmp_path: Path) -> None:
    with RunDir(tmp_path) as run:
        save(run, 1)
    os.rename(tmp_path / "checkpoints" / "step-00000001", tmp_path / "checkpoints" / ".step-00000001.old")
    with RunDir(tmp_path) as run:
        assert steps(run) == {1: True}


def test_a_second_process_is_told_who_holds_the_run(tmp_path: Path) -> None:
    holder = hold(tmp_path / "run")
    try:
        with pytest.raises(
            RunError, match=f"in use by process {holder.pid} on {socket.gethostname()} since 20"
        ) as caught:
            RunDir(tmp_path / "run")
        assert caught.value.status == 2
    finally:
        end(holder)
    RunDir(tmp_path / "run").close()


def test_the_lock_of_a_killed_process_is_free_at_once_even_with_orphans(tmp_path: Path) -> None:
    holder = hold(tmp_path / "run", orphan=True)
    try:
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
        RunDir(tmp_path / "run").close()
    finally:
        end(holder)


def test_opening_removes_the_rubbish_of_dead_runs_and_nothing_else(tmp_path: Path) -> None:
    with RunDir(tmp_path) as run:
        save(run, 1)
        run.write_text("samples/a.txt", "a")
    (tmp_path / "checkpoints" / ".step-00000002.partial").mkdir()
    (tmp_path / "checkpoints" / ".step-00000002.partial" / "model.safetensors").write_text("half")
    (tmp_path / ".config.yaml.partial").write_text("half")
    (tmp_path / "samples" / ".b.png.partial").write_text("half")
    mine = ["notes.txt", ".hidden", "checkpoints/step-old", "checkpoints/.keep", "samples/mine.partial"]
    for name in mine:
        (tmp_path / name).write_text("mine")
    before = {
        path
        for path in tmp_path.rglob("*")
        if not path.name.endswith(".partial") and "00002" not in str(path)
    }
    RunDir(tmp_path).close()
    assert set(tmp_path.rglob("*")) == before | {tmp_path / "samples" / "mine.partial"}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_for_a_checkpoint_is_an_error_with_path_and_bytes(tmp_path: Path) -> None:
    with RunDir(tmp_path) as run:
        save(run, 1)
        with pytest.raises(RunError) as caught, run.stage(2) as folder:  # noqa: PT012 - it fails in the middle
            (folder / "model.safetensors").symlink_to("/dev/full")
            (folder / "model.safetensors").write_bytes(b"x" * 10**6)
        message = str(caught.value)
        assert caught.value.status == 1
        assert "step-00000002.partial: can't be written: No space left on device; needed are about" in message
        assert "bytes are free" in message
        assert os.listdir(tmp_path / "checkpoints") == ["step-00000001"]
        with (
            pytest.raises(RunError, match="needed are about 5,000,000 bytes"),
            run.stage(2, num_bytes=5_000_000),
        ):
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))


def test_the_words_of_safetensors_for_a_failing_disk_are_understood(tmp_path: Path) -> None:
    script = f"""
import resource, signal, sys
from pathlib import Path
import numpy as np
from safetensors.numpy import save_file
from causalvae.rundir import RunDir, RunError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
with RunDir(Path({str(tmp_path)!r})) as run:
    resource.setrlimit(resource.RLIMIT_FSIZE, (10000, 10000))
    try:
        with run.stage(1) as folder:
            save_file({{"x": np.zeros(10000)}}, folder / "model.safetensors")
    except RunError as error:
        print(error.status, error)
"""
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert told.startswith("1 ")
    assert "File too large" in told
    assert os.listdir(tmp_path / "checkpoints") == []


def test_an_error_that_is_not_of_a_disk_stays_what_it_is(tmp_path: Path) -> None:
    assert disk_error(OSError("no number"), tmp_path) is None
    with RunDir(tmp_path) as run, pytest.raises(ZeroDivisionError), run.stage(1):
        _ = 1 / 0


def test_a_folder_that_cannot_be_made_is_a_mistake_in_what_was_asked(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "run", Path("/proc/causalvae/run")):
        with pytest.raises(RunError, match="choose another --output_dir") as caught:
            RunDir(path)
        assert caught.value.status == 2


def test_a_name_that_leads_out_of_the_output_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "link").symlink_to(tmp_path)
    assert run_path(str(tmp_path / "runs"), "a") == tmp_path / "runs" / "a"
    for name in ("link", "..", "../x", "."):
        with pytest.raises(ConfigError, match="outside"):
            run_path(str(tmp_path / "runs"), name)
