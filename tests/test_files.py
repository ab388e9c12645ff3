"""Laws of a run's plain files: whole or not at all, one record a line, and no credentials in them."""

import json
import os
from pathlib import Path

import pytest
from faults import at_event, kill_self

from causalvae.files import redact
from causalvae.rundir import RunDir


def test_records_are_one_line_each_whatever_is_in_them(tmp_path: Path) -> None:
    name = b"a\n\xff'\x1b\xe2\x80\xae.mp4".decode("utf-8", "surrogateescape")
    with RunDir(tmp_path) as run:
        run.append("quarantine.jsonl", {"video": name, "reason": "two\nlines"})
        run.append("quarantine.jsonl", {"loss": float("nan"), "terms": [float("inf"), 1.0]})
        run.append_text("log.txt", f"{name}\n")
        assert run.warnings == []
    lines = (tmp_path / "quarantine.jsonl").read_text("ascii").splitlines()
    assert [json.loads(line) for line in lines] == [
        {"video": name, "reason": "two\nlines"}, {"loss": "nan", "terms": ["inf", 1.0]},
    ]  # fmt: skip


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_for_records_is_one_warning_and_stops_nothing(tmp_path: Path) -> None:
    with RunDir(tmp_path) as run:
        (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
        for step in range(3):
            run.append("metrics.jsonl", {"step": step})
        (warning,) = run.warnings
        assert "metrics.jsonl: lines are missing, No space left on device" in warning
        run.write_text("config.yaml", "seed: 0")
        assert (tmp_path / "config.yaml").read_text() == "seed: 0"


def test_rewinding_drops_later_steps_and_a_torn_line(tmp_path: Path) -> None:
    with RunDir(tmp_path) as run:
        run.rewind("metrics.jsonl", 4)
        for step in range(1, 8):
            run.append("metrics.jsonl", {"step": step})
        run.append("metrics.jsonl", {"note": "no step"})
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write('{"step": 3, "lo')
        run.rewind("metrics.jsonl", 4)
        run.append("metrics.jsonl", {"step": 5})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line).get("step") for line in lines] == [1, 2, 3, 4, None, 5]


def test_a_file_of_the_run_is_the_old_one_or_the_new_one_wherever_its_writer_is_killed(
    tmp_path: Path,
) -> None:
    with RunDir(tmp_path) as run:
        run.write_json("run.json", {"x": 1})
        number = 0
        while True:
            number += 1
            status = at_event(number, kill_self, lambda: run.write_json("run.json", {"x": 2}))
            assert json.loads((tmp_path / "run.json").read_text()) in ({"x": 1}, {"x": 2})
            if os.WIFEXITED(status):
                break


def test_credentials_in_a_command_line_are_not_written_down() -> None:
    command = [
        "causalvae", "train", "--hf_token", "s3cret", "--api-key=s3cret", "--video_path", "https://me:s3cret@h/a?x=1",
        "--config", "https://h/?access_token=s3cret&b=2", "--password", "s3cret", "--keep_checkpoints", "2",
        "SECRET=s3cret",
    ]  # fmt: skip
    shown = redact(command)
    assert "s3cret" not in " ".join(shown)
    assert shown[-2] == "2"
    assert "https://***@h/a?x=1" in shown
    assert "https://h/?access_token=***&b=2" in shown
    assert redact(["--batch_size", "4", "sample:"]) == ["--batch_size", "4", "sample:"]
