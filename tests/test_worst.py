"""Films of the worst clips, and evaluations that are killed, in few bits, or two at once."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from evalruns import WORDS, moved_tiny, numbers, result_in, run
from media import in_order, write_film
from runfolders import write_run
from runs import ENVIRONMENT
from test_report import DEFAULTS, data_of

from causalvae.data.encode import side_by_side, write_video
from causalvae.metrics import psnr
from causalvae.report.build import build_report


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    return moved_tiny(tmp_path / "tiny.safetensors")


@pytest.mark.slow
def test_an_evaluation_that_was_killed_goes_on_to_the_same_numbers(weights: Path, tmp_path: Path) -> None:
    films = tmp_path / "films"
    films.mkdir()
    for number in range(12):
        write_film(films / f"{number:02}.mp4", frames=9)
    flags = ["--checkpoint", str(weights), "--video_path", str(films), "--dataloader_num_workers", "1"]
    command = [sys.executable, "-c", "from causalvae.cli import run; run()", "eval", *WORDS, *flags, "--out"]
    killed = subprocess.Popen(
        [*command, str(tmp_path / "killed")], stdout=subprocess.DEVNULL, env=ENVIRONMENT
    )
    while killed.poll() is None:
        records = list((tmp_path / "killed").glob("*.clips.jsonl"))
        if records and records[0].read_bytes().count(b"\n") > 3:
            killed.kill()
        time.sleep(0.001)
    left = next((tmp_path / "killed").glob("*.clips.jsonl")).read_bytes().count(b"\n")
    for name in ("killed", "whole"):
        done = subprocess.run(
            [*command, str(tmp_path / name)], capture_output=True, text=True, env=ENVIRONMENT
        )
        assert done.returncode == 0, done.stderr
    one, two = result_in(tmp_path / "killed"), result_in(tmp_path / "whole")
    assert left > 3
    assert numbers(one) == numbers(two)
    for film in (tmp_path / "whole").glob("*.films/*.mp4"):
        other = tmp_path / "killed" / film.relative_to(tmp_path / "whole")
        assert torch.equal(in_order(film), in_order(other))


def test_the_worst_clips_are_there_as_films(weights: Path, tmp_path: Path) -> None:
    words = ("--checkpoint", weights, "--video_path", "sample:", "--films", 2)
    assert run(tmp_path / "out", *words) == 0
    result = result_in(tmp_path / "out")
    by_error = sorted(result["clips"], key=lambda each: -each["metrics"]["mse"])
    assert [("film" in each) for each in by_error] == [True, True, False, False, False, False]
    folder = tmp_path / "out" / f"{result['name']}.films"
    assert sorted(film.name for film in folder.iterdir()) == sorted(each["film"] for each in by_error[:2])
    film = in_order(folder / by_error[0]["film"])
    assert film.shape == (5, 32, 64, 3)
    seen = psnr(film[:, :, :32].permute(3, 0, 1, 2), film[:, :, 32:].permute(3, 0, 1, 2))
    # H.264 halves the colours' resolution: measured 0.6 dB
    assert seen == pytest.approx(by_error[0]["metrics"]["psnr"], abs=2.0)
    assert run(tmp_path / "none", *words[:-1], 0) == 0
    assert not list((tmp_path / "none").glob("*.films"))


def test_fewer_bits_are_told_and_kept_apart(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CAUSALVAE_ASSUME_BF16", "1")
    words = ("--checkpoint", weights, "--video_path", "sample:heldout")
    assert run(tmp_path / "out", *words) == 0
    assert run(tmp_path / "out", *words, "--precision", "bf16") == 0
    files = sorted((tmp_path / "out").glob("tiny*.json"), key=lambda file: len(file.name))
    full, low = (json.loads(file.read_text()) for file in files)
    assert low["name"] == f"{full['name']}-bf16"
    assert (full["checkpoint"]["precision"], low["checkpoint"]["precision"]) == ("fp32", "bf16")
    change = low["metrics"]["psnr"]["mean"] - full["metrics"]["psnr"]["mean"]
    assert change != 0
    assert abs(change) < 0.5


def test_a_second_process_is_told_who_writes_the_results(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = "import sys; from pathlib import Path; from causalvae.locks import Lock\n"
    code += f"lock = Lock(Path({str(tmp_path / 'out')!r}), instead='')\n"
    code += "print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        assert run(tmp_path / "out", "--checkpoint", weights, "--video_path", "sample:heldout") == 2
        assert f"in use by process {other.pid}" in capsys.readouterr().err
        other.communicate("")


def test_clips_of_evaluations_are_played_worst_first(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", max_steps=100, saves=2)
    place, film = run / "eval", torch.full((3, 32, 32, 3), 90, dtype=torch.uint8)
    for step in (50, 100):
        folder = place / f"step-{step:08d}.films"
        folder.mkdir()
        for number in range(3):
            write_video(folder / f"clip{number:06d}.mp4", side_by_side(film, film + 10 * (number + 1)))
        facts = json.loads((place / f"step-{step:08d}.json").read_text())
        for number, clip in enumerate(facts["clips"]):
            clip["film"] = f"clip{number:06d}.mp4"
        facts["clips"][0]["film"] = ("../x.mp4", "clip000000.mp4")[step // 100]
        (place / f"step-{step:08d}.json").write_text(json.dumps(facts))
    alone = tmp_path / "alone.json"
    alone.write_bytes((place / "step-00000100.json").read_bytes())
    (tmp_path / "alone.films").mkdir()
    (tmp_path / "alone.films" / "clip000001.mp4").symlink_to(place / "step-00000100.films/clip000001.mp4")
    (place / "step-00000100.films/clip000002.mp4").rename(tmp_path / "alone.films/clip000002.mp4")
    players = data_of(build_report([run, alone], defaults=DEFAULTS).page)["players"]
    found = [(each["run"], each["name"], [v["step"] for v in each["versions"]]) for each in players]
    assert found == [
        (None, "clip 2.mp4#0", [100]),
        (0, "clip 1.mp4#0", [50, 100]),
        (0, "clip 0.mp4#0", [100]),
    ]
    assert players[0]["of"] == "model.safetensors"
