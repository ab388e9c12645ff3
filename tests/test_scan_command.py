"""What a person sees of a scan: text in two languages, JSON, a page, files, and mistakes."""

import html
import json
import os
import re
import signal
import string
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
from media import write_film
from runs import ENVIRONMENT
from scans import write_dataset
from test_index import make_old
from test_loader import readers

from causalvae.cli import main
from causalvae.data.index import prepare
from causalvae.report.scanpage import scan_page
from causalvae.report.scanviews import as_text, clock, sections, size
from causalvae.texts import FOLDER, Language, texts

PROGRAM = (sys.executable, "-c", "from causalvae.cli import run; run()")
HOSTILE = "<script>x=1<script>&quot;.mp4"


def call(*words: str | Path, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    environment = ENVIRONMENT | {"CAUSALVAE_HOME": str(cwd / "home"), "LC_ALL": "C.UTF-8"} | env
    words = (*PROGRAM, "data", "scan", *words)
    return subprocess.run(words, cwd=cwd, capture_output=True, text=True, check=False, env=environment)


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


@pytest.mark.slow
def test_the_command_tells_a_person_and_writes_the_list(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "dataset")
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
        (["scan", "sample:", "--", "ls", "-l"], "not a training command"),
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
        time.sleep(0.001)
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
