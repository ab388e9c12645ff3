"""What a user of the command line sees: exit status, the text of errors, and what is left behind."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from causalvae import __version__
from causalvae.commands import COMMANDS
from causalvae.models.presets import PRESETS

ROOT = Path(__file__).parents[1]
DOOR = ROOT / "opensora" / "train" / "train_causalvae.py"
PROGRAM = (sys.executable, "-c", "from causalvae.cli import run; run()")


def call(*words: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "80"}
    return subprocess.run(words, capture_output=True, text=True, check=False, cwd=cwd, env=environment)


def refused(*words: str | Path, cwd: Path | None = None) -> str:
    """The one line that a mistake leads to."""
    done = call(*words, cwd=cwd)
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.fullmatch(r"error: [^\n]+\n", done.stderr), done.stderr
    return done.stderr


def test_the_help_of_the_program_lists_what_exists_and_only_that() -> None:
    for word in ("--help", "-h", "help"):
        done = call(*PROGRAM, word)
        assert (done.returncode, done.stderr) == (0, "")
        listed = re.findall(r"^  (\w+) ", done.stdout, re.MULTILINE)
        assert listed == list(COMMANDS)
    assert call(*PROGRAM).stdout == call(*PROGRAM, "--help").stdout
    assert call(*PROGRAM, "--version").stdout == f"causalvae {__version__}\n"


def test_a_wrong_command_gets_a_suggestion() -> None:
    assert "did you mean train?" in refused(*PROGRAM, "trian")
    assert f"there are {', '.join(COMMANDS)}" in refused(*PROGRAM, "xyzzy")
    assert "a command comes first" in refused(*PROGRAM, "--video_path", "x")
    assert r"\x1b[31m" in refused(*PROGRAM, "\x1b[31m")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_refuses_what_it_does_not_know(command: str) -> None:
    done = call(*PROGRAM, command, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    entry = COMMANDS[command]
    assert done.stdout.startswith(f"usage: causalvae {command} {entry.words}[FLAGS]\n\n{entry.does}. ")
    assert all(len(line) <= 80 for line in done.stdout.splitlines())
    assert "did you mean --help?" in refused(*PROGRAM, command, "--hlep")


@pytest.mark.parametrize(
    "words", [["--help"], ["train", "--help"], ["models"], ["train", "--hlep"], ["--version"]]
)
def test_no_answer_about_the_program_itself_imports_torch(words: list[str]) -> None:
    code = (
        "import sys\nfrom causalvae.cli import main\nmain(sys.argv[1], sys.argv[2:])\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'av', 'rich', 'yaml')))"
    )
    assert call(sys.executable, "-c", code, *words).returncode == 0


def test_the_models_command_lists_every_preset() -> None:
    lines = call(*PROGRAM, "models").stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["preset", *PRESETS]


def test_the_door_works_from_any_folder_without_an_installation(tmp_path: Path) -> None:
    help_page = call(sys.executable, "-S", "-E", DOOR, "--help", cwd=tmp_path)
    assert (help_page.returncode, help_page.stderr) == (0, "")
    assert help_page.stdout == call(*PROGRAM, "train", "--help").stdout
    assert "did you mean --help?" in refused(sys.executable, DOOR, "--hlep", cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named_with_what_to_do() -> None:
    done = call(sys.executable, "-S", "-E", DOOR, "--config", __file__)
    assert done.returncode == 1
    assert (
        done.stderr
        == "error: the Python package yaml is missing; `pip install -r requirements.txt` installs it\n"
    )


@pytest.mark.parametrize(("argv", "words"), [
    ([], "--video_path is missing"),
    (["--video_path", "no/such/folder"], "no/such/folder"),
    (["--video_path", "sample:", "--exp_name", "../x"], "--exp_name ../x: must be one name"),
    (["--video_path", "sample:", "--resolution", "250"], "the nearest is 248"),
    (["--video_path", "sample:", "--batch_size", "x\ny"], r"--batch_size x\ny: must be a whole number"),
    (["--video_path", "sample:", "--device", "cuda:99"], "--device cuda:99: not on this machine"),
])  # fmt: skip
def test_a_mistake_in_a_training_command_leaves_nothing_behind(
    argv: list[str], words: str, tmp_path: Path
) -> None:
    assert words in refused(sys.executable, DOOR, *argv, cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_output_folder_that_cannot_be_written_is_a_mistake(tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").write_text("not a video")
    (tmp_path / "file").write_text("")
    message = refused(sys.executable, DOOR, "--video_path", tmp_path, "--output_dir", tmp_path / "file")
    assert "choose another --output_dir" in message


def test_a_reader_that_goes_away_ends_the_command_without_complaint() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*PROGRAM, "train", "--help"], stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_bug_is_one_line_and_leaves_its_traceback_in_a_file(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom causalvae import cli, commands\n"
        "commands.COMMANDS['models'] = commands.Command(lambda argv: 1 // 0, commands.NoSettings, '', '')\n"
        "sys.exit(cli.main('models', []))"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 1
    match = re.fullmatch(r"error: unexpected ZeroDivisionError: .* is in (.*)\n", done.stderr)
    assert match is not None
    assert "Traceback" in Path(match[1]).read_text()
    assert Path(match[1]).parent == tmp_path
