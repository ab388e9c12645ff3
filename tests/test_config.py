"""Laws of the settings table: every reading of it agrees, and every bad value says what is wrong with it."""

import dataclasses
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given as drawn
from hypothesis import settings as how
from hypothesis import strategies as st

from causalvae.config import (
    Given,
    MemoryBudget,
    Resolution,
    TrainSettings,
    changed_mathematics,
    continued,
    decay_steps,
    help_text,
    notices,
    read_settings,
    to_yaml,
    warmup_steps,
)
from causalvae.errors import ConfigError
from causalvae.flags import Flag, flags_of, to_text
from causalvae.flagtext import markdown
from causalvae.models.presets import PRESETS

SEED_COMMAND = shlex.split("""
    --exp_name "9x256x256_optimized" --batch_size 4 --precision bf16 --amp_level "O2"
    --max_steps 50000 --save_steps 1000 --output_dir results/causalvae
    --video_path datasets/UCF101/train --video_num_frames 16 --resolution 256 --sample_rate 1
    --dataloader_num_workers 8 --load_from_checkpoint pretrained/causal_vae_488_init.ckpt
    --start_learning_rate 3e-5 --lr_scheduler cosine --optim adamw --betas 0.9 0.999
    --clip_grad True --weight_decay 0.01 --mode 0 --init_loss_scale 512 --jit_level "O1"
""")
FLAGS = flags_of(TrainSettings)
VIDEO = ("--video_path", "videos")


def read(*argv: str) -> TrainSettings:
    return read_settings(TrainSettings, argv)[0]


def refused(*argv: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read_settings(TrainSettings, argv)
    message = str(caught.value)
    assert "\n" not in message
    return message


def values_of(flag: Flag) -> st.SearchStrategy[Any]:
    """Values that this flag allows."""
    texts = st.text(st.characters(exclude_characters="\0"), min_size=1).filter(str.strip)
    pixels = st.integers(1, 200).map(lambda n: 8 * n)
    budgets = st.one_of(
        st.sampled_from(["auto", "speed", "lean"]), st.integers(1, 2**59).map(lambda n: f"{n}B")
    )
    special: dict[str, st.SearchStrategy[Any]] = {
        "exp_name": st.from_regex(r"\A[A-Za-z0-9_][\w. -]{0,30}[A-Za-z0-9_]\Z"),
        "model": st.sampled_from(sorted(PRESETS)),
        "resolution": st.builds(Resolution, pixels, pixels),
        "memory": budgets.map(MemoryBudget.parse),
        "end_learning_rate": st.floats(0, 1e-6),
        "start_learning_rate": st.floats(1e-6, 1),
        "eval_steps": st.just(0),
        "frames": st.lists(st.integers(1, 99), min_size=1, max_size=4).map(tuple) | st.none(),
        "resolutions": st.lists(st.builds(Resolution, pixels, pixels), min_size=1, max_size=3).map(tuple)
        | st.none(),
        "config": st.just(None),
    }
    if flag.name in special:
        return special[flag.name]
    if flag.choices:
        return st.sampled_from(flag.choices)
    low, high = flag.at_least or 0, (flag.below or 1e9)
    number = st.floats(low, high, exclude_max=True).filter(
        lambda x: x > (flag.above if flag.above is not None else -1)
    )
    kinds: dict[Any, st.SearchStrategy[Any]] = {
        int: st.integers(int(low), int(high) - 1), float: number, bool: st.booleans(), str: texts
    }  # fmt: skip
    values = st.tuples(number, number) if flag.size == 2 else kinds[flag.kind]
    return values | st.none() if flag.none_word is not None else values.filter(lambda v: v != flag.none_word)


def settings_of(values: dict[str, Any]) -> TrainSettings:
    """Settings with these values; the default where text says None by chance."""
    kept: dict[str, Any] = {n: v for n, v in values.items() if v is None or v != FLAGS[n].none_word}
    return TrainSettings(**kept)


ALL_SETTINGS = st.fixed_dictionaries({name: values_of(flag) for name, flag in FLAGS.items()}).map(settings_of)


def test_the_seed_command_is_read_as_it_stands() -> None:
    settings, given = read_settings(TrainSettings, SEED_COMMAND)
    assert settings.exp_name == "9x256x256_optimized"
    assert settings.resolution == Resolution(256, 256)
    assert (settings.betas, settings.clip_grad, settings.start_learning_rate) == ((0.9, 0.999), True, 3e-5)
    assert {item.source for item in given.values()} == {"command line"}
    assert given.keys() == {word[2:] for word in SEED_COMMAND if word.startswith("--")}


@how(derandomize=True, deadline=None)
@drawn(settings=ALL_SETTINGS)
def test_settings_to_yaml_and_back_are_the_same(
    settings: TrainSettings, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("yaml") / "config.yaml"
    path.write_text(to_yaml(settings), encoding="utf-8")
    again, given = read_settings(TrainSettings, ["--config", str(path)])
    assert dataclasses.replace(again, config=None) == settings
    changed = {n for n, flag in FLAGS.items() if getattr(settings, n) != flag.default}
    assert given.keys() == changed | {"config"}


def test_a_default_in_a_runs_own_file_was_asked_for_only_if_a_remark_says_so(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    asked = {"precision": "bf16", "weight_decay": 0.01}
    sources = {name: Given(value, "command line") for name, value in asked.items()}
    path.write_text(to_yaml(TrainSettings(video_path="films", precision="bf16"), sources))
    settings, given = read_settings(TrainSettings, ["--config", str(path)])
    assert given.keys() == {"config", "video_path", "precision", "weight_decay"}
    assert notices(settings, given) == []
    path.write_text(path.read_text().replace("agc_factor: 0.01", "agc_factor: 0.5"))  # by hand
    assert [each.split()[0] for each in notices(*read_settings(TrainSettings, ["--config", str(path)]))] == [
        "--agc_factor"
    ]


@how(derandomize=True, deadline=None)
@drawn(settings=ALL_SETTINGS)
def test_settings_to_words_and_back_are_the_same(settings: TrainSettings) -> None:
    argv: list[str] = []
    for name, flag in FLAGS.items():
        text = to_text(flag, getattr(settings, name))
        if flag.size > 1:
            argv += [f"--{name}", *text.split()]
        elif name != "config":
            argv.append(f"--{name}={text}")
    assert read(*argv) == settings


def test_the_command_line_wins_over_the_file_and_the_file_over_the_table(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(
        "video_path: from_file\nbatch-size: 8\nmax_steps: 1_000\nflip: no\nstart_learning_rate: 1e-4\n"
    )
    settings, given = read_settings(TrainSettings, ["--config", str(path), "--batch-size", "2"])
    assert (settings.batch_size, settings.max_steps, settings.flip, settings.seed) == (2, 1000, False, 0)
    assert settings.start_learning_rate == 1e-4
    assert given["batch_size"] == Given(2, "command line")
    assert given["max_steps"] == Given(1000, str(path))
    assert "seed" not in given


@pytest.mark.parametrize(
    "text",
    ["on", "2024-01-01", "1e-5", "~", "0x10", "sample:", "a: b", "#x", "'", "\x1b[2J", "\u202e", "日本"],
)
def test_a_word_means_in_a_file_what_it_means_on_the_command_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(to_yaml(TrainSettings(video_path=text)), encoding="utf-8")
    assert read("--config", str(path)).video_path == read("--video_path", text).video_path == text


def test_names_that_are_not_text_survive_the_yaml_file(tmp_path: Path) -> None:
    name = b"clips/\xff\xfe.mp4".decode("utf-8", "surrogateescape")
    path = tmp_path / "settings.yaml"
    path.write_text(to_yaml(TrainSettings(video_path=name)), encoding="ascii")
    assert read("--config", str(path)).video_path == name


def test_both_spellings_and_all_words_for_booleans_are_one_flag() -> None:
    for word, value in {
        "True": True,
        "true": True,
        "1": True,
        "yes": True,
        "False": False,
        "0": False,
        "no": False,
    }.items():
        assert read(*VIDEO, "--clip-grad", word).clip_grad is value
        assert read(*VIDEO, f"--clip_grad={word}").clip_grad is value
    assert read("--clip_grad", *VIDEO).clip_grad is True
    assert read(*VIDEO, "--max-steps", "1_000").max_steps == 1000
    assert read(*VIDEO, "--logvar_init", "-1e-3").logvar_init == -1e-3
    assert read(*VIDEO, "--lr_scheduler", "cosine_decay").lr_scheduler == "cosine"
    assert read(*VIDEO, "--keep_checkpoints", "all").keep_checkpoints is None


@pytest.mark.parametrize(("argv", "words"), [
    (["--hlep"], "did you mean --help"),
    (["--bach_size", "4"], "did you mean --batch_size"),
    (["-batch_size", "4"], "did you mean --batch_size"),
    (["--batch", "4"], "there is no such flag"),
    (["stray"], "stray: not a flag"),
    (["--batch_size"], "--batch_size: its value is missing"),
    (["--batch_size", "four"], "--batch_size four: must be a whole number"),
    (["--batch_size", "0"], "--batch_size 0: must be at least 1"),
    (["--batch_size", "2.0"], "must be a whole number"),
    (["--weight_decay", "much"], "--weight_decay much: must be a number"),
    (["--weight_decay", "nan"], "must be a finite number"),
    (["--weight_decay", "-inf"], "must be a finite number"),
    (["--weight_decay", "-1e-3"], "must be at least 0"),
    (["--ema_decay", "1"], "--ema_decay 1.0: must be less than 1"),
    (["--start_learning_rate", "0"], "must be more than 0"),
    (["--clip_grad", "maybe"], "--clip_grad maybe: must be True or False"),
    (["--disc_start", "soon"], "must be a whole number, such as 1000, or auto"),
    (["--betas", "0.9"], "takes 2 values, not 1"),
    (["--betas", "0.9", "1.5"], "--betas 0.9 1.5: must be less than 1"),
    (["--precision", "bf61"], "did you mean bf16?"),
    (["--precision", "float"], "must be one of auto, fp32, bf16, fp16"),
    (["--resolution", "250"], "multiples of 8; the nearest is 248"),
    (["--resolution", "256x30"], "the nearest is 256x32"),
    (["--resolution", "0"], "must be a size"),
    (["--resolution", "256x"], "must be a size"),
    (["--memory", "lots"], "an amount such as 20GiB"),
    (["--model", "tiiny"], "did you mean tiny?"),
    (["--mode", "3"], "must be less than 3"),
    (["--exp_name", "../x"], "must be one name"),
    (["--exp_name", "/tmp/x"], "must be one name"),
    (["--exp_name", ".."], "must not start with"),
    (["--exp_name=-x"], "must not start with"),
    (["--exp_name", "a\x1b[31m"], "can't be seen"),
    (["--exp_name", "a\nb"], "can't be seen"),
    (["--exp_name", "a\u202eb"], "can't be seen"),
    (["--exp_name", "x" * 201], "201 bytes long"),
    (["--exp_name", ""], "is empty"),
    (["--video_path", "a\0b"], "NUL"),
    (["--lr_scheduler", "cosine", "--start_learning_rate", "1e-8"], "is above --start_learning_rate"),
    (["--eval_steps", "10"], "add --eval_video_path"),
    (["--config", "no/such/file.yaml"], "No such file"),
])  # fmt: skip
def test_a_bad_value_is_one_line_that_says_what_to_do(argv: list[str], words: str) -> None:
    assert words in refused(*VIDEO, *argv)


@pytest.mark.parametrize(("text", "words"), [
    ("bach_size: 4", "line 1: there is no setting bach_size; did you mean batch_size?"),
    ("seed: 1\nseed: 2", "line 2: seed is set twice"),
    ("batch_size: 1\nbatch-size: 2", "line 2: batch_size is set twice"),
    ("seed: [1, 2]", "takes one value, not 2"),
    ("betas: {a: 1}", "must be a value or a list of values"),
    ("seed: one", "line 1: --seed one: must be a whole number"),
    ("- seed", "lines of the form"),
    ("seed: [", "not a YAML file"),
    ("a: &a [*a, *a]", "there is no setting a"),
    ("[" * 5000, "not a YAML file"),
    ("config: other.yaml", "there is no setting config"),
    ("seed: !!python/object/apply:os.system [exit]", "--seed exit: must be a whole number"),
    ("\x07", "not a YAML file"),
])  # fmt: skip
def test_a_bad_file_of_settings_names_the_file_and_the_line(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    message = refused("--config", str(path))
    assert words in message
    assert str(path) in message


def test_an_amount_of_memory_is_exact_in_any_unit() -> None:
    amounts = {"20GiB": 20 * 2**30, "1.5 GB": 1_500_000_000, "7kib": 7168, "1125899906842625B": 2**50 + 1}
    for text, amount in amounts.items():
        assert MemoryBudget.parse(text) == MemoryBudget("budget", amount)
        assert MemoryBudget.parse(str(MemoryBudget.parse(text))) == MemoryBudget.parse(text)


def test_a_video_path_is_required_and_the_error_says_what_it_is() -> None:
    assert "--video_path is missing" in refused("--batch_size", "4")
    assert "sample:" in refused()


def test_values_from_python_are_checked_as_those_of_the_command_line() -> None:
    wrong: list[dict[str, Any]] = [
        {"batch_size": 0}, {"batch_size": True}, {"batch_size": "4"}, {"betas": (0.9,)}, {"betas": 0.9},
        {"precision": "bf61"}, {"flip": 1}, {"resolution": 256}, {"seed": None}, {"ema_decay": float("nan")},
    ]  # fmt: skip
    for values in wrong:
        with pytest.raises(ConfigError, match=f"--{next(iter(values))}"):
            TrainSettings(video_path="videos", **values)
    assert TrainSettings(video_path="videos", weight_decay=1).weight_decay == 1


def test_every_flag_has_a_group_a_meaning_and_a_default_that_it_allows() -> None:
    groups = list(dict.fromkeys(flag.group for flag in FLAGS.values()))
    assert groups == [
        "Basics", "Hardware and speed", "Length and saving", "Input", "Start and restore",
        "Learning rate and optimiser", "Loss", "Expert",
    ]  # fmt: skip
    assert all(flag.help and "|" not in flag.help for flag in FLAGS.values())
    assert [flag.name for flag in FLAGS.values() if flag.required] == ["video_path"]
    assert TrainSettings(video_path="videos") == read(*VIDEO)


def test_the_docs_page_and_the_help_page_say_what_the_table_says() -> None:
    page = Path(__file__).parents[1] / "docs" / "flags.md"
    text = markdown(TrainSettings, title="Flags of `causalvae train`")
    assert page.read_text() == text, "make it again: python -m causalvae.config > docs/flags.md"
    made = subprocess.run(
        [sys.executable, "-m", "causalvae.config"], capture_output=True, text=True, check=True
    )
    assert made.stdout == text


@pytest.mark.parametrize("width", [20, 60, 80, 100, 300])
def test_the_help_page_has_every_flag_and_fits_the_terminal(width: int) -> None:
    text = help_text(TrainSettings, usage="causalvae train [FLAGS]", intro="It trains.", width=width)
    lines = text.splitlines()
    assert all(len(line) <= max(60, min(width, 110)) for line in lines)
    assert {name for name in FLAGS if any(line.startswith(f"  --{name} ") for line in lines)} == FLAGS.keys()
    joined = " ".join(text.split())
    assert all(" ".join(flag.help.split()) in joined for flag in FLAGS.values())


def test_what_a_resumed_run_may_change_leaves_the_mathematics_alone() -> None:
    saved = read(*SEED_COMMAND)
    free = [
        "--max_steps", "90000", "--dataloader_num_workers", "0", "--save_steps", "7", "--log_steps", "3",
        "--keep_checkpoints", "all", "--device", "cpu", "--tensorboard", "--resume", "auto",
    ]  # fmt: skip
    assert changed_mathematics(saved, read(*SEED_COMMAND, *free)) == []
    changes = changed_mathematics(
        saved, read(*SEED_COMMAND, "--batch_size", "8", "--betas", "0.5", "0.9", "--seed", "1")
    )
    assert changes == [("seed", "0", "1"), ("batch_size", "4", "8"), ("betas", "0.9 0.999", "0.5 0.9")]
    assert [
        name for name, _, _ in changed_mathematics(saved, read(*SEED_COMMAND, "--lr_decay_steps", "10"))
    ] == ["lr_decay_steps"]
    assert changed_mathematics(saved, read(*SEED_COMMAND, "--lr_warmup_steps", "1000")) == []


def test_raising_max_steps_keeps_the_schedule_that_the_run_began_with() -> None:
    saved = read(*VIDEO, "--max_steps", "1000", "--lr_scheduler", "cosine")
    assert (warmup_steps(saved), decay_steps(saved)) == (20, 980)
    longer = continued(saved, read(*VIDEO, "--max_steps", "5000", "--lr_scheduler", "cosine"))
    assert (longer.max_steps, warmup_steps(longer), decay_steps(longer)) == (5000, 20, 980)
    again = continued(longer, read(*VIDEO, "--max_steps", "5000", "--lr_scheduler", "cosine"))
    assert again == longer
    assert changed_mathematics(longer, again) == []
    assert warmup_steps(read(*VIDEO, "--max_steps", "2")) == 0
    assert warmup_steps(read(*VIDEO, "--max_steps", "900000")) == 1000


def test_the_seed_command_asks_for_nothing_that_is_missing_or_without_effect() -> None:
    assert notices(*read_settings(TrainSettings, SEED_COMMAND)) == []
    assert notices(*read_settings(TrainSettings, VIDEO)) == []
    assert notices(*read_settings(TrainSettings, [*VIDEO, "--precision", "fp32", "--amp_level", "O2"])) == []


def test_a_library_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match=r"pip install 'causalvae\[adamw8bit\]'"):
        notices(*read_settings(TrainSettings, [*VIDEO, "--optim", "adamw8bit"]))


@pytest.mark.parametrize("argv", [
    ["--max_grad_norm", "2"], ["--use_ema", "False", "--ema_decay", "0.9"], ["--end_learning_rate", "0"],
    ["--disc_type", "none", "--disc_weight", "1"], ["--disc_sync_norm"],
    ["--agc_factor", "1"], ["--eval_video_path", "held"],
    ["--perceptual", "none", "--perceptual_weight", "2"],
    ["--disc_start", "auto", "--max_steps", "1020"], ["--disc_start", "9", "--max_steps", "9"],
    ["--train_parts", "decoder", "--kl_weight", "1"],
])  # fmt: skip
def test_a_setting_without_effect_is_told(argv: list[str]) -> None:
    found = notices(*read_settings(TrainSettings, [*VIDEO, *argv]))
    assert len(found) == 1
    assert "has no effect" in found[0]


def test_lists_are_written_with_commas_and_may_have_any_length() -> None:
    assert read(*VIDEO, "--frames", "1,9,17").frames == (1, 9, 17)
    assert read(*VIDEO, "--frames", "9").frames == (9,)
    assert read(*VIDEO, "--resolutions=128,256x448").resolutions == (
        Resolution(128, 128),
        Resolution(256, 448),
    )
    assert "--frames 1,x" in refused(*VIDEO, "--frames", "1,x")
    assert "--frames 1,0: must be at least 1" in refused(*VIDEO, "--frames", "1,0")
    assert "the nearest is 128" in refused(*VIDEO, "--resolutions", "128,130")
