"""A scan tells what is in a dataset, and what it tells is what a training then meets."""

import contextlib
import html
import json
import os
import re
import shutil
import signal
import string
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from media import BUNDLED, broken_entries, damaged, write_film
from runs import ENVIRONMENT, run
from test_index import make_old
from test_loader import readers

from causalvae.cli import main
from causalvae.commandline import split_command, training_flags
from causalvae.data.clips import ClipPlan
from causalvae.data.draws import draws
from causalvae.data.index import prepare
from causalvae.data.loader import ClipLoader, Clips
from causalvae.data.quarantine import as_lines, read_quarantine
from causalvae.data.scan import Reading, Scan, scan, spread
from causalvae.data.sources import open_source
from causalvae.errors import ConfigError
from causalvae.flags import flags_of
from causalvae.report.scanpage import scan_page
from causalvae.report.scanviews import as_text, clock, sections, size
from causalvae.reportflags import split_words
from causalvae.scanflags import ScanSettings
from causalvae.texts import FOLDER, Language, texts

PROGRAM = (sys.executable, "-c", "from causalvae.cli import run; run()")
PLAN = ClipPlan(frames=5, size=(24, 32), batch=3, seed=7)
HOSTILE = "<script>x=1<script>&quot;.mp4"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sound films of two lengths and sizes, two with the same bytes, and things that are no films."""
    folder = tmp_path_factory.mktemp("dataset")
    broken_entries(folder)
    for number in range(3):
        write_film(folder / f"long{number}.mp4", frames=40 + number, options={"g": "6"})
    write_film(folder / "short.mp4", frames=4, size=(96, 128))
    write_film(folder / "still.png", codec="png", frames=1, pixels="rgb24")
    shutil.copy(folder / "long1.mp4", folder / "twin.mp4")
    damaged(BUNDLED / "city_spire.mp4", folder / "half.mp4", first=0.6)
    for path in folder.iterdir():
        if path.is_file():
            make_old(path)
    return folder


def scanned(folder: Path, *, home: Path | None = None, **reading: Any) -> Scan:
    index = None if home is None else prepare(home)[0]
    how = Reading(**({"workers": 0} | reading))
    return scan(
        open_source(str(folder)),
        name=str(folder),
        reading=how,
        index=index,
        progress=lambda *_: None,
    )


def call(*words: str | Path, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    environment = ENVIRONMENT | {"CAUSALVAE_HOME": str(cwd / "home"), "LC_ALL": "C.UTF-8"} | env
    words = (*PROGRAM, "data", "scan", *words)
    return subprocess.run(words, cwd=cwd, capture_output=True, text=True, check=False, env=environment)


def take(folder: Path, batches: int = 12, **settings: Any) -> tuple[list[Clips], list[dict[str, Any]]]:
    records: list[dict[str, Any]] = []
    with ClipLoader(open_source(str(folder)), PLAN, on_quarantine=records.append, **settings) as loader:
        return [next(loader) for _ in range(batches)], records


def test_what_a_scan_calls_broken_is_what_a_training_finds(dataset: Path) -> None:
    found = scanned(dataset, workers=2)
    _, records = take(dataset, batches=30)
    met = {record["video"]: record["reason"] for record in records if record["whole"]}
    assert {each["video"]: each["reason"] for each in found.broken()} == met
    assert len(found.facts) == 7


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_scan_finds_the_same_with_any_workers(workers: int, dataset: Path, tmp_path: Path) -> None:
    plain = scanned(dataset, check=True)
    again = scanned(dataset, home=tmp_path, workers=workers, check=True)
    known = scanned(dataset, home=tmp_path, workers=workers)
    for other in (again, known):
        assert (other.looks, other.sizes, other.videos) == (plain.looks, plain.sizes, plain.videos)
    assert (again.known, known.known) == (0, 7)


def test_damage_in_the_middle_is_found_where_every_frame_is_decoded(dataset: Path) -> None:
    assert "half.mp4" not in {each["video"] for each in scanned(dataset).broken()}
    (record,) = [each for each in scanned(dataset, check=True).broken() if each["video"] == "half.mp4"]
    assert not record["whole"]
    assert "half.mp4" in record["reason"]


def test_the_same_bytes_are_found_and_only_files_of_one_size_are_read_for_it(dataset: Path) -> None:
    found = scanned(dataset)
    (group,) = found.duplicates()
    assert group["videos"] == ["long1.mp4", "twin.mp4"]
    assert sum(look.sha256 is not None for look in found.looks) == 2
    assert scanned(dataset, duplicates=False).duplicates() == []


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
    assert scanned(folder, home=home, refresh=True).known == 0
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
        found = scanned(folder, workers=2, timeout=2.0, home=tmp_path / "home")
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
    listed.write_text(as_lines(scanned(folder, check=True).broken()))
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


def places(words: Mapping[str, str]) -> dict[str, set[str]]:
    """The places of each text."""
    return {
        key: {name for _, name, _, _ in string.Formatter().parse(text) if name} for key, text in words.items()
    }


@pytest.mark.parametrize("topic", ["scan"])
def test_both_languages_have_the_same_texts_with_the_same_places(topic: str) -> None:
    english, chinese = texts(topic, "en"), texts(topic, "zh")
    assert places(english) == places(chinese)
    assert all(any("\u4e00" <= c <= "\u9fff" for c in text) for key, text in chinese.items() if key[0] != "p")
    files = [path for path in FOLDER.parent.rglob("*scan*") if path.suffix in (".py", ".j2")]
    source = "".join(path.read_text() for path in files)
    made_up = ("short_", "theme_")  # keys that are put together
    assert [key for key in english if f'"{key}"' not in source and not key.startswith(made_up)] == []


def test_the_command_tells_a_person_and_writes_the_list(dataset: Path, tmp_path: Path) -> None:
    done = call(dataset, "--max_steps", "10", "--batch_size", "2", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    for words in (
        "15 videos (1 of them images): 7 can be read, 8 can't",
        "8 were read now" if "8 were read now" in done.stdout else "15 were read now",
        "10 steps with a batch of 2 draw 20 clips: 1.33 passes over the videos, 1 to 2 clips from each",
        "2 videos are too short; longer ones take their place",
        "`causalvae train --quarantine results/scan/quarantine.jsonl`",
    ):
        assert words in done.stdout
    records = [
        json.loads(line) for line in (tmp_path / "results/scan/quarantine.jsonl").read_text().splitlines()
    ]
    assert len(records) == 8
    again = call(
        dataset, "--json", "--", "causalvae", "train", "--batch_size", "3", "--max_steps=5", cwd=tmp_path
    )
    result = json.loads(again.stdout)
    assert result["reading"]["known"] == 7
    assert (result["draws"]["steps"], result["draws"]["batch"]) == (5, 3)
    assert result["broken"] == records
    assert result["changes"] == {"new": 0, "changed": 0, "gone": 0}


def test_the_command_speaks_chinese_where_the_locale_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LC_ALL", "zh_CN.UTF-8")
    cases: list[tuple[list[str], Language]] = [([], "zh"), (["--lang", "en"], "en")]
    for words, lang in cases:
        assert main("data", ["scan", "sample:", "--dataloader_num_workers", "0", *words]) == 0
        assert texts("scan", lang)["nothing_broken"] in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["scan"], "name a dataset"),
        ([], "there is `causalvae data scan PATH`"),
        (["scna", "x"], "scna: there is no such command; there is `causalvae data scan PATH`"),
        (["scan", "missing"], "missing: there is no such file or folder"),
        (["scan", "sample:", "other"], "one dataset at a time"),
        (["scan", "sample:", "--out", "."], "--out .: is a folder"),
        (["scan", "sample:", "--quarantine", "/dev/null/x"], "can't be written to"),
        (["scan", "sample:", "--batch_size", "0"], "--batch_size 0: must be at least 1"),
        (["scan", "sample:", "--btch_size", "1"], "did you mean --batch_size?"),
        (["scan", "sample:", "--", "ls", "-l"], "must be a training command"),
        (["scan", "sample:", "--", "--resolution", "30"], "--resolution 30: height and width must be"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(
    words: list[str],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main("data", words) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"error: [^\n]+\n", error), error
    assert said in error
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_leaves_what_was_read_to_the_next_scan(tmp_path: Path) -> None:
    folder = tmp_path / "films"
    folder.mkdir()
    for number in range(6):
        make_old(write_film(folder / f"{number}.mp4", frames=9))
    slow = write_film(folder / "slow.avi", codec="mpeg4", frames=3000, options={"bf": "2"})
    environment = ENVIRONMENT | {"CAUSALVAE_HOME": str(tmp_path / "home")}
    process = subprocess.Popen(
        [*PROGRAM, "data", "scan", str(folder)], cwd=tmp_path, env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    while not (there := readers(slow)) and process.poll() is None:
        continue
    for reader in there:
        os.kill(reader, signal.SIGSTOP)
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate()
    assert (process.returncode, said) == (130, ("", "error: interrupted\n"))
    assert readers(slow) == []
    assert prepare(tmp_path / "home")[1] == []


def test_names_on_the_page_are_text_and_nothing_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = tmp_path / "films", str(tmp_path / "scan.html")
    folder.mkdir()
    for name in (HOSTILE, "line\nbreak\x1b[31m.mp4"):
        (folder / name).write_text("x")
    write_film(folder / "a<b>&.mp4", frames=9)
    words = ["scan", str(folder), "--out", out, "--lang", "zh", "--quarantine", "none"]
    assert main("data", [*words, "--dataloader_num_workers", "0"]) == 0
    assert "\x1b" not in capsys.readouterr().out
    page = (tmp_path / "scan.html").read_text()
    assert "default-src 'none'" in html.unescape(page)
    assert page.count("<script") == 1
    assert "&lt;script&gt;x=1" in page
    assert re.search(r"(?:src|href)=\"(?!data:|#)", page) is None
    assert '<html lang="zh">' in page


def test_sizes_and_times_are_told_without_words() -> None:
    assert [size(n) for n in (0, 999, 1000, 2.5e9)] == ["0 B", "999 B", "1.0 kB", "2.5 GB"]
    assert [clock(s) for s in (0, 3.24, 61, 3600, 100000)] == [
        "0:00.0",
        "0:03.2",
        "1:01",
        "1:00:00",
        "27:46:40",
    ]


def test_words_and_commands_are_told_apart() -> None:
    flags = flags_of(ScanSettings)
    words = ["scan", "--json", "x", "--lang", "zh"]
    assert split_words(words, flags) == (["scan", "x"], ["--json", "--lang", "zh"])
    assert split_words(["--json", "False", "x"], flags) == (["x"], ["--json", "False"])
    assert split_command(["a", "--", "b", "--", "c"]) == (["a"], ["b", "--", "c"])
    assert split_command(["a"]) == (["a"], None)
    for door in (
        "causalvae train",
        "python opensora/train/train_causalvae.py",
        "torchrun x/train_causalvae.py",
    ):
        assert training_flags([*door.split(), "--a", "1"]) == ["--a", "1"]
    assert training_flags(["--a", "1"]) == ["--a", "1"]


def test_a_scan_of_nothing_usable_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "films"
    folder.mkdir()
    (folder / "a.mp4").write_text("x")
    words = ["scan", str(folder), "--json", "--quarantine", "none", "--dataloader_num_workers", "0"]
    assert main("data", words) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["draws"]["usable"] == 0
    text = as_text(sections(result, texts("scan", "en")))
    assert texts("scan", "en")["nothing_usable"] in text
    assert scan_page(result, lang="en").startswith(b"<!doctype html>")
