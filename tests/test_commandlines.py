"""Training commands as people keep them: read as a shell would start them, and nothing is executed."""

import shlex
import subprocess
from pathlib import Path

import pytest

from causalvae.commandlines import Command, find_command, read_command, read_file
from causalvae.errors import ConfigError

FLAGS = ("--batch_size", "4", "--exp_name", "a b")


def script(folder: Path, text: str) -> Path:
    path = folder / "train.sh"
    path.write_text(text)
    return path


@pytest.mark.parametrize(("before", "processes"), [
    ("python train.py", None),
    ("python3.11 -u opensora/train/train_causalvae.py", None),
    ("CUDA_VISIBLE_DEVICES=0 OMP_NUM_THREADS=2 python train.py", None),
    ("nohup env A=b causalvae train", None),
    ("/opt/venv/bin/causalvae train", None),
    ("torchrun --nproc_per_node 8 --nnodes=1 train.py", 8),
    ("python -m torch.distributed.run --nproc-per-node=2 train.py", 2),
    ("accelerate launch --config_file a.yaml --num_processes 4 train.py", 4),
    ("mpirun -n 8 python train.py", 8),
    ("", None),
])  # fmt: skip
def test_flags_are_found_behind_whatever_starts_the_training(before: str, processes: int | None) -> None:
    command = read_command([*before.split(), *FLAGS])
    assert (command.flags, command.processes) == (FLAGS, processes)


def test_variables_in_front_are_told() -> None:
    assert read_command(["A=b", "env", "C=", "python", "x.py", "--d=e=f"]).variables == {"A": "b", "C": ""}


@pytest.mark.parametrize("words", [[], ["ls"], ["causalvae", "eval", "--x"], ["A=b"], ["python", "-c", "1"]])
def test_what_is_no_training_command_is_refused(words: list[str]) -> None:
    with pytest.raises(ConfigError, match="not a training command"):
        read_command(words)


BODY = """#!/bin/bash
# python other.py --batch_size 9
set -e
export NAME="a b"   # the name
SIZE=${1:-256}; STEPS=10
unused=$NAME
MORE="--flip False --crop center"
ARGS=(
  --betas 0.9 0.999   # two numbers
  --output_dir "out dir/$NAME"
)
echo "start $NAME" > log.txt && mkdir -p out
if true; then
  cd .
fi
python train.py --exp_name "$NAME" --resolution ${SIZE} \\
    --max_steps ${STEPS}0 "${ARGS[@]}" $MORE \\
    --video_path '$HOME/x' --literal \\$NAME "--a=$(date)" `id` --missing $nothing 2>&1 | tee log.txt &
wait
causalvae train --video_path b
"""


def test_a_script_means_what_a_shell_makes_of_it(tmp_path: Path) -> None:
    """The shell's own words, where nothing has to be executed."""
    plain = BODY.replace(' "--a=$(date)" `id` --missing $nothing', "")
    found = read_file(script(tmp_path, plain), {})
    shown = plain.replace("python train.py", "printf '%s\\0' MARK").replace("causalvae train", "true")
    shell = subprocess.run(["bash", "-c", shown], capture_output=True, check=True, cwd=tmp_path).stdout
    assert shell.split(b"MARK\0")[1].split(b"\0")[:-1] == [word.encode() for word in found.flags]
    assert (found.others, found.unknown, found.source) == (1, (), str(tmp_path / "train.sh"))
    assert found.variables == {"NAME": "a b"}


def test_what_only_running_would_tell_stays_as_it_is_and_is_listed(tmp_path: Path) -> None:
    found = read_file(script(tmp_path, BODY + "touch made\n"), {"HOME": "/home/you", "SECRET": "s"})
    assert found.flags[-5:] == ("--a=$(date)", "`id`", "--missing", "$nothing") or "$nothing" in found.flags
    assert set(found.unknown) == {"$(date)", "`id`", "$nothing"}
    assert not (tmp_path / "made").exists()


def test_a_script_sees_the_home_of_its_user_and_no_other_variable(tmp_path: Path) -> None:
    path = script(tmp_path, "python train.py --video_path $HOME/x --exp_name $SECRET\n")
    assert read_file(path, {"HOME": "/h", "SECRET": "s"}).flags == (
        "--video_path",
        "/h/x",
        "--exp_name",
        "$SECRET",
    )


@pytest.mark.parametrize("text", [
    "", "echo hello\n", "python prepare.py\n", "python train.py --a 'never closed\n", "ARGS=( --a\n",
    "\x00\xff\n", "$(", "`", "${", "))((&&||\n", "python train.py --a $(((((\n",
])  # fmt: skip
def test_a_script_without_a_training_command_or_broken_is_refused_or_read(text: str, tmp_path: Path) -> None:
    path = script(tmp_path, text)
    try:
        assert isinstance(read_file(path, {}), Command)
    except ConfigError as error:
        assert "no training command is in this script" in str(error)  # noqa: PT017 - either is right


def test_a_file_of_settings_and_the_folder_of_a_run_stand_for_their_settings(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("batch_size: 2\n")
    assert read_file(config, {}).flags == ("--config", str(config))
    assert read_file(tmp_path, {}).flags == ("--config", str(config))
    assert read_file(tmp_path, {}).run == tmp_path


def test_one_thing_is_explained_at_a_time(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="one script"):
        find_command(["a", "b"], None, {})
    assert find_command([], shlex.split("python x.py --a 1"), {}).flags == ("--a", "1")
