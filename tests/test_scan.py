"""A scan tells what is in a dataset, and what it tells is what a training then meets."""

import contextlib
import json
import os
import re
import shutil
import signal
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from media import write_film
from runs import run
from scans import scanned, write_dataset
from test_index import make_old
from test_loader import readers

from causalvae.data.clips import ClipPlan
from causalvae.data.draws import draws
from causalvae.data.index import prepare
from causalvae.data.loader import ClipLoader, Clips
from causalvae.data.quarantine import as_lines, read_quarantine
from causalvae.data.scan import Reading, spread
from causalvae.data.sources import open_source
from causalvae.errors import ConfigError

PLAN = ClipPlan(frames=5, size=(24, 32), batch=3, seed=7)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("dataset"))


def take(folder: Path, batches: int = 12, **settings: Any) -> tuple[list[Clips], list[dict[str, Any]]]:
    records: list[dict[str, Any]] = []
    with ClipLoader(open_source(str(folder)), PLAN, on_quarantine=records.append, **settings) as loader:
        return [next(loader) for _ in range(batches)], records


def test_what_a_scan_calls_broken_is_what_a_training_finds(dataset: Path) -> None:
    found = scanned(dataset, reading=Reading(workers=2))
    _, records = take(dataset, batches=30)
    met = {record["video"]: record["reason"] for record in records if record["whole"]}
    assert {each["video"]: each["reason"] for each in found.broken()} == met
    assert len(found.facts) == 7


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_scan_finds_the_same_with_any_workers(workers: int, dataset: Path, tmp_path: Path) -> None:
    plain = scanned(dataset, reading=Reading(check=True, workers=0))
    again = scanned(dataset, home=tmp_path, reading=Reading(workers=workers, check=True))
    known = scanned(dataset, home=tmp_path, reading=Reading(workers=workers))
    for other in (again, known):
        assert (other.looks, other.sizes, other.videos) == (plain.looks, plain.sizes, plain.videos)
    assert (again.known, known.known) == (0, 7)


def test_damage_in_the_middle_is_found_where_every_frame_is_decoded(dataset: Path) -> None:
    assert "half.mp4" not in {each["video"] for each in scanned(dataset).broken()}
    found = scanned(dataset, reading=Reading(check=True, workers=0))
    (record,) = [each for each in found.broken() if each["video"] == "half.mp4"]
    assert not record["whole"]
    assert "half.mp4" in record["reason"]


def test_the_same_bytes_are_found_and_only_files_of_one_size_are_read_for_it(dataset: Path) -> None:
    found = scanned(dataset)
    (group,) = found.duplicates()
    assert group["videos"] == ["long1.mp4", "twin.mp4"]
    assert sum(look.sha256 is not None for look in found.looks) == 2
    assert scanned(dataset, reading=Reading(duplicates=False, workers=0)).duplicates() == []


def test_new_changed_and_missing_videos_are_noticed_and_only_they_are_read(tmp_path: Path) -> None:
    folder, home = tmp_path / "films", tmp_path / "home"
    folder.mkdir()
    for name in ("a", "b", "c"):
        make_old(write_film(folder / f"{name}.mp4", frames=9))
    assert scanned(folder, home=home).changes is None
    second = scanned(folder, home=home)
    assert second.changes is not None
    assert (vars(second.changes), second.known) == ({"new": 0, "changed": 0, "gone": 0}, 3)
    make_old(write_film(folder / "b.mp4", frames=7))
    make_old(write_film(folder / "d.mp4", frames=5))
    (folder / "c.mp4").unlink()
    third = scanned(folder, home=home)
    assert third.changes is not None
    assert (vars(third.changes), third.known) == ({"new": 1, "changed": 1, "gone": 1}, 1)
    assert [facts.frames for facts in third.facts] == [9, 7, 5]
    assert scanned(folder, home=home, reading=Reading(refresh=True, workers=0)).known == 0
    assert scanned(folder, home=home).known == 3


def test_a_video_that_kills_or_hangs_its_readers_is_broken_and_the_rest_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "films"
    folder.mkdir()
    for number in range(4):
        write_film(folder / f"{number}.mp4", frames=9)
    bad = {
        name: write_film(folder / f"{name}.avi", codec="mpeg4", frames=3000, options={"bf": "2"})
        for name in ("deadly", "hanging")
    }
    signals = {"deadly": signal.SIGKILL, "hanging": signal.SIGSTOP}
    done = threading.Event()

    def strike() -> None:
        while not done.is_set():
            for name, path in bad.items():
                for reader in readers(path):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(reader, signals[name])

    thread = threading.Thread(target=strike)
    thread.start()
    try:
        found = scanned(folder, home=tmp_path / "home", reading=Reading(workers=2, timeout=2.0))
    finally:
        done.set()
        thread.join()
    reasons = {each["video"]: each["reason"] for each in found.broken()}
    assert reasons == {
        "deadly.avi": "the process that read it died 2 times (signal 9)",
        "hanging.avi": "reading it took longer than 2 s",
    }
    assert prepare(tmp_path / "home")[1] == []
    assert scanned(folder, home=tmp_path / "home").broken() == []  # it is tried again


def test_a_training_with_the_list_never_opens_what_is_on_it_and_draws_the_same_clips(
    dataset: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(
        dataset, folder, symlinks=True, copy_function=shutil.copy2, ignore=lambda *_: ["fifo.mp4"]
    )
    plain, _ = take(folder)
    listed = tmp_path / "quarantine.jsonl"
    listed.write_text(as_lines(scanned(folder, reading=Reading(check=True, workers=0)).broken()))
    records = read_quarantine(listed, open_source(str(folder)))
    assert "half.mp4" not in {record["video"] for record in records}
    for record in records:  # were one of them opened now, its sound frames would be used
        path = folder / record["video"]
        path.unlink(missing_ok=True)
        shutil.copy(folder / "long0.mp4", path)
    known = {record["video"]: record["reason"] for record in records}
    again, news = take(folder, known=known)
    for one, other in zip(plain, again, strict=True):
        assert one.requests == other.requests
        assert torch.equal(one.pixels, other.pixels)
    assert {record["video"] for record in news} <= {"half.mp4"}


@pytest.mark.slow
def test_a_run_writes_down_what_it_was_told_to_leave_out_and_goes_on_with_it(tmp_path: Path) -> None:
    folder = tmp_path / "films"
    folder.mkdir()
    write_film(folder / "a.mp4", frames=9)
    (folder / "b.mp4").write_text("no film")
    record = {"video": "b.mp4", "path": "/elsewhere/b.mp4", "reason": "as I say", "whole": True}
    (tmp_path / "list.jsonl").write_text(as_lines([record]))
    given = {"video_path": str(folder), "quarantine": str(tmp_path / "list.jsonl"), "disc_type": "none"}
    done = run(tmp_path, **given, max_steps=1)
    assert done.returncode == 0
    assert f"1 videos are left out, as --quarantine {tmp_path / 'list.jsonl'} says" in done.stdout
    lines = (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(lines[0]) == {**record, "path": str(folder / "b.mp4")}
    assert run(tmp_path, **{**given, "quarantine": None}, max_steps=2).returncode == 0
    assert (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines() == lines


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("no json\n", "line 1: not JSON"),
        ('{"video": "a"}\n', "line 1: must have video, path, reason and whole"),
        ('{"video": "x", "path": "/x", "reason": "", "whole": true}\n', "none of its 1 videos is in"),
    ],
)
def test_a_list_that_is_none_or_of_other_videos_is_refused(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "list.jsonl").write_text(text)
    with pytest.raises(ConfigError, match=re.escape(words)):
        read_quarantine(tmp_path / "list.jsonl", open_source("sample:"))
    with pytest.raises(ConfigError, match="can't be read"):
        read_quarantine(tmp_path / "missing.jsonl", open_source("sample:"))


@pytest.mark.parametrize("kind", ["auto", "repeat", "skip"])
def test_what_a_run_would_draw_is_what_it_draws(kind: Any, dataset: Path) -> None:
    plan = replace(PLAN, short_videos=kind, frames=9, size=(64, 64))
    found = scanned(dataset)
    steps = 2 * len(found.videos)
    told = draws(found.facts, plan, videos=len(found.videos), steps=steps)
    with ClipLoader(open_source(str(dataset)), plan) as loader:
        requests = [request for _ in range(steps) for request in next(loader).requests]
    assert len(requests) == told.clips
    assert told.passes == 6.0
    counts = Counter(request.video.id for request in requests)
    assert told.fewest == told.most == 6
    assert all(counts[f"long{number}.mp4"] >= told.fewest for number in range(3))
    (shape,) = told.shapes
    assert (shape.short, shape.upscaled) == (2, 5)  # short.mp4 and still.png; all of 48x64
    assert (counts["short.mp4"] > 0) == (kind == "repeat")
    starts = {(r.video.id, r.start) for r in requests if r.video.id not in ("short.mp4", "still.png")}
    assert len(starts) <= shape.starts
    assert shape.starts == sum(each.frames - 8 for each in found.facts if each.frames >= 9)


def test_every_shape_of_a_run_with_buckets_is_told_of(dataset: Path) -> None:
    plan = replace(PLAN, frame_buckets=(1, 9), size_buckets=((24, 32), (64, 64)))
    told = draws(scanned(dataset).facts, plan, videos=14, steps=1)
    assert [(each.frames, each.height, each.short) for each in told.shapes] == [
        (1, 24, 0), (1, 64, 0), (9, 24, 2), (9, 64, 2),
    ]  # fmt: skip


@pytest.mark.parametrize("values", [[5], [3, 3], [1, 2, 2, 9], [1, 1e6], [0, 1e9], [0.1, 0.7]])
def test_a_histogram_counts_every_value_once(values: list[float]) -> None:
    found = spread(values)
    assert found is not None
    assert sum(found["counts"]) == len(values)
    assert len(found["edges"]) == len(found["counts"]) + 1
    assert (found["quantiles"]["min"], found["quantiles"]["max"]) == (min(values), max(values))
    assert spread([]) is None
