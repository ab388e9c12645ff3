"""The commands of README and guide, in both languages, run as they stand but for sizes."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from media import write_film
from runs import DOOR, ENVIRONMENT, ROOT

from causalvae.cli import COMMANDS, main

PAGES = ("README.md", "README.zh.md", "docs/guide.md", "docs/guide.zh.md")
SHELL = ("scripts/", "source ", "pip ")  # what installs: the tests themselves stand on it
SMALL = {  # words that make a command small; the last one of a flag that is given twice counts
    "train": "--max_steps 2 --resolution 32 --video_num_frames 5 --batch_size 2 --model tiny --log_steps 1 "
    "--dataloader_num_workers 0 --eval_steps 0 --perceptual none",
    "demo": "--max_steps 2",
    "eval": "--num_frames 5 --resolution 32 --dataloader_num_workers 0",
    "init": "--model tiny",
}


def commands(page: str) -> list[list[str]]:
    """Every command in the bash blocks of a page, as words, with continued lines joined."""
    text = (ROOT / page).read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    found = [shlex.split(line, comments=True) for line in lines if not line.startswith(SHELL)]
    return [words for words in found if words]


def in_order() -> list[list[str]]:
    """The commands of all pages, each once."""
    return list({tuple(words): words for page in PAGES for words in commands(page)}.values())


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the pages speak of: videos, and the folders of the seed command."""
    monkeypatch.chdir(tmp_path)
    for name in ("CAUSALVAE_OFFLINE", "CAUSALVAE_HOME"):
        monkeypatch.setenv(name, ENVIRONMENT[name])
    monkeypatch.setenv("CAUSALVAE_HOME", str(tmp_path / "home"))
    for folder in ("videos", "held_out", "datasets/UCF101/train"):
        (tmp_path / folder).mkdir(parents=True)
        for number in range(2):
            write_film(tmp_path / folder / f"{number}.mp4", frames=9)
    assert main("init", shlex.split("--random --model tiny --out pretrained/causal_vae_488_init.ckpt")) == 0
    return tmp_path


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch.compile's own
@pytest.mark.slow
def test_every_command_of_the_pages_runs(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ran: set[str] = set()
    for words in in_order():
        program, command, *flags = words
        if program == "python":
            assert command == "opensora/train/train_causalvae.py"
            command = "train"
        else:
            assert program == "causalvae", words
        if command == "watch":
            watch(flags, place)
        else:
            assert main(command, [*flags, *small(command, flags)]) == 0, (words, capsys.readouterr().err)
        ran.add(command)
    assert ran >= {"train", "data", "explain", "report", "eval", "reconstruct", "encode", "watch", "doctor"}
    assert ran <= COMMANDS.keys()


def small(command: str, flags: list[str]) -> list[str]:
    """Words that make this command small, where it has not named a checkpoint that decides the model."""
    words = shlex.split(SMALL.get(command, ""))
    if command == "train" and "--load_from_checkpoint" in flags:
        place = words.index("--model")
        return words[:place] + words[place + 2 :]
    return words


def watch(flags: list[str], place: Path) -> None:
    """It serves until it is ended. Not by SIGINT, which whoever runs the tests may have told to ignore."""
    command = [sys.executable, "-c", "from causalvae.cli import run; run()", "watch", *flags]
    with subprocess.Popen(command, cwd=place, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT) as server:
        assert server.stdout is not None
        assert "http://127.0.0.1" in server.stdout.readline()
        server.terminate()
        server.communicate()


def test_both_languages_have_the_same_commands() -> None:
    def without_language(page: str) -> list[list[str]]:
        return [[word for word in words if word not in ("--lang", "zh")] for words in commands(page)]

    assert without_language("README.md") == without_language("README.zh.md")
    assert without_language("docs/guide.md") == without_language("docs/guide.zh.md")


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", text) if not link.startswith("http")]
    missing = [link for link in links if not (ROOT / page).parent.joinpath(link).exists()]
    assert links
    assert missing == []


def test_the_door_of_the_pages_is_there() -> None:
    assert DOOR.is_file()
    assert os.access(ROOT / "scripts" / "quickstart", os.X_OK)
