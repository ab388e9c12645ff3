"""What `explain` says of a command: true of the run that it describes, and never in the way of the rest."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from runs import ENVIRONMENT, ROOT, TINY, run, words
from test_cli import PROGRAM, refused
from test_config import SEED_COMMAND

from causalvae.asked import read_asked
from causalvae.commandlines import Command, read_file
from causalvae.explain import Explanation, as_json, as_text, explain
from causalvae.findings import Case, Finding, ModelFacts, Place, of_settings
from causalvae.machine import Capability, Machine
from causalvae.machinefindings import of_machine, of_model
from causalvae.models.presets import PARAMETERS, PRESETS
from causalvae.placefindings import of_paths
from causalvae.texts import LANGUAGES, texts
from causalvae.train.parts import precision_of
from causalvae.train.plan import StepPlan

GIB = 2**30
SNAPSHOTS = Path(__file__).parent / "snapshots"
MACHINE = Machine(
    system="Linux 6", cores=16, memory_bytes=128 * GIB, cpu="A CPU", cpu_flags=("avx2",), shm_bytes=8 * GIB
)
H100 = Place(
    machine=MACHINE,
    device="cuda",
    capability=Capability(),
    available_bytes=66 * GIB,
    disk_bytes=2000 * GIB,
)
NO_BF16 = Capability(missing={"bf16": "Tesla T4 has no bf16 (A100 and later have)"})
T4 = replace(H100, capability=NO_BF16, available_bytes=4 * GIB, machine=replace(MACHINE, cores=8))
LAPTOP = Place(
    machine=replace(MACHINE, cores=2, memory_bytes=8 * GIB, shm_bytes=16 * 2**20),
    device="cpu",
    capability=Capability(missing={"bf16": "this CPU has no bf16"}),
    available_bytes=4 * GIB,
    disk_bytes=3 * GIB,
    compiler="no C++ compiler is there (c++, g++, clang++)",
)
RUN: dict[str, Any] = {  # Any: words and numbers
    "batch_size": 4, "video_num_frames": 6, "resolution": 32, "max_steps": 2, "disc_start": 1,
    "memory": "268MiB", "save_steps": 1, "keep_checkpoints": 1, "lr": "1e-4", "start_learning_rate": None,
    "model": "tiny", "disc_type": "patchgan3d",
}  # fmt: skip
TINY_FACTS = ModelFacts(
    name="tiny",
    path=None,
    geometry=PRESETS["tiny"].geometry,
    why_not_streamable="",
    parameters=PARAMETERS["tiny"],
    checkpoint_bytes=150 * 2**20,
    weights_bytes=50 * 2**20,
)
SMALL = {"video_num_frames": 4, "memory": "40GiB"}  # what tiny runs are explained with: nothing to plan


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder, no locale, and nothing that was fetched before."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CAUSALVAE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("CAUSALVAE_OFFLINE", raising=False)
    monkeypatch.delenv("CAUSALVAE_MIRROR", raising=False)


def flags(**changes: object) -> list[str]:
    """The flags of a tiny run. None leaves one out."""
    chosen = TINY | SMALL | changes
    return [f"--{name}={value}" for name, value in chosen.items() if value is not None]


def explained(words: Sequence[str], place: Place | None = H100) -> Explanation:
    return explain(Command(tuple(words)), place=place)


def found(explanation: Explanation) -> dict[str, Finding]:
    return {each.id: each for each in explanation.findings}


def finds(place: Place | None = H100, /, **changes: object) -> dict[str, Finding]:
    return found(explained(flags(**changes), place))


@pytest.mark.parametrize(("name", "place", "more"), [
    ("h100", H100, []), ("t4", T4, ["--model", "small"]), ("laptop", LAPTOP, ["--model", "small"]),
])  # fmt: skip
def test_the_first_command_on_several_machines(name: str, place: Place, more: list[str]) -> None:
    explanation = explained([*SEED_COMMAND, *more], place)
    kept = [
        each for each in explanation.findings if each.id not in ("output-temporary", "perceptual-fetched")
    ]
    text = as_text(replace(explanation, findings=tuple(kept)), "en", width=100)
    told = text[text.index("What was found") :]
    assert told == (SNAPSHOTS / f"explain_{name}.txt").read_text()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The output folder of a run that had to be split, and what it said. Tests copy what they change."""
    folder = tmp_path_factory.mktemp("finished")
    done = run(folder, **RUN)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_its_numbers_are_those_of_the_run(finished: tuple[Path, str]) -> None:
    folder, log = finished
    numbers = json.loads(as_json(explained(words(Path("elsewhere"), **RUN)[2:], None), "en"))["numbers"]
    split = re.search(r"the batch goes in (\d+) parts \((\d+) MiB\)", log)
    assert split is not None, log
    assert numbers["parts"] == int(split[1])
    assert numbers["step_bytes"] / 2**20 == pytest.approx(int(split[2]), abs=1)
    assert numbers["recompute"] == ("blocks are recomputed" in log)
    facts = json.loads((folder / "run" / "run.json").read_text())
    assert (numbers["precision"], numbers["amp_level"]) == (facts["precision"], facts["amp_level"])
    assert numbers["videos"] == facts["dataset"]["videos"]
    last = json.loads((folder / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert numbers["clips"] == last["cursor"] * RUN["batch_size"]
    assert f"{numbers['parameters'] / 1e6:.1f} M parameters" in log
    saves = sorted((folder / "run" / "checkpoints").iterdir())
    pruned, full = (sum(file.stat().st_size for file in save.iterdir()) for save in saves)
    assert numbers["checkpoint_each_bytes"] == pytest.approx(full, rel=0.01)
    assert numbers["checkpoint_end_bytes"] == pytest.approx(pruned + full, rel=0.01)


def test_a_run_is_explained_by_what_was_given_to_it_and_how_it_went(
    finished: tuple[Path, str], tmp_path: Path
) -> None:
    moved = shutil.copytree(finished[0] / "run", tmp_path / "moved")
    told = json.loads(as_json(explain(read_file(moved, {})), "en"))
    rows = {row["name"]: row for row in told["flags"]}
    assert rows["start_learning_rate"]["source"] == rows["max_steps"]["source"] == "command line"
    assert rows["seed"]["source"] is None
    ids = {each["id"]: each for each in told["findings"]}
    assert {"run-was", "run-warned", "run-done"} <= ids.keys()
    assert ids["run-done"]["values"]["step"] == "2"
    assert "--lr 1e-4 is called" in ids["run-warned"]["why"]
    assert ids["model-loaded"]["values"]["model"] == "tiny"


def test_a_run_that_is_there_is_gone_on_with_or_refused(finished: tuple[Path, str], tmp_path: Path) -> None:
    shutil.copytree(finished[0] / "run", tmp_path / "run")
    how: dict[str, object] = {**RUN, "memory": "auto", "output_dir": tmp_path, "max_steps": 3}
    assert finds(None, **how)["run-goes-on"].values["step"] == "2"
    assert "--seed: 0 -> 1" in finds(None, **how, seed=1)["run-refused"].values["said"]
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "a.mp4").write_text("")
    others = {**how, "video_path": tmp_path / "clips"}
    assert "not the videos" in finds(None, **others)["run-refused"].values["said"]
    assert "run-not-empty" in finds(None, **how, resume="never")
    other = {**how, "output_dir": "new", "resume": tmp_path / "run" / "checkpoints" / "step-00000002"}
    assert finds(None, **other)["resume-from"].values["step"] == "2"
    assert "--seed: 0 -> 1" in finds(None, **other, seed=1)["resume-unusable"].values["said"]
    assert "resume-unusable" in finds(None, **{**other, "resume": "nowhere"})
    (tmp_path / "run" / "checkpoints" / "step-00000002" / "state.json").write_text("{")
    assert "run-unreadable" in finds(None, **how)


def test_it_speaks_as_the_locale_does_and_writes_nothing(tmp_path: Path) -> None:
    command = [*PROGRAM, "explain", "--", *flags(output_dir="out")]
    env = ENVIRONMENT | {"LC_ALL": "zh_CN.UTF-8", "PYTHONUTF8": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(texts("explain", "zh")["ui.title"])
    assert list(tmp_path.iterdir()) == []


def test_every_mistake_is_found_and_the_rest_explained() -> None:
    line = (
        "stray --batch_size 0 --epohcs 3 --maxsteps 4 --resolution 250 --model x --eval_steps 3 "
        "--exp_name a/b --betas 0.9 --seed --epochs 3 --lr 1e-4 --start_learning_rate 1e-5 "
        "--lr_scheduler cosin --ema --dynamic_sample False --config nope.yaml --sample_rate 2 --memory 40GiB "
        "--video_num_frames 1"
    )
    explanation = explained(line.split(" "))
    assert [each.id for each in explanation.asked.mistakes if each.level == "problem"] == [
        "config-unreadable", "stray-word", "value-wrong", "flag-unknown", "flag-misspelt", "value-wrong",
        "value-missing", "alias-refused", "alias-differs", "value-wrong", "videos-not-named", "value-refused",
        "value-refused", "value-refused", "value-refused",
    ]  # fmt: skip
    settings = explanation.asked.settings
    assert (settings.sample_rate, settings.use_ema, settings.start_learning_rate) == (2, True, 1e-4)
    assert {"alias", "alias-dropped"} <= found(explanation).keys()


def test_a_file_of_settings_of_another_trainer_is_understood(tmp_path: Path) -> None:
    config = tmp_path / "train.yaml"
    config.write_text(
        "lr: 3e-4\nnum_frames: 5\nbetas: [0.9, 0.99]\nmodel: tiny\nvideo_path: 'sample:'\nresolution: 32\n"
        "epochs: 3\nxyzzy: {a: [1]}\nmemory: 40GiB\nseed:\n"
    )
    explanation = explain(read_file(config, {}), place=H100)
    settings, given = explanation.asked.settings, explanation.asked.given
    assert (settings.start_learning_rate, settings.video_num_frames, settings.betas) == (3e-4, 5, (0.9, 0.99))
    assert given["start_learning_rate"].source == str(config)
    assert {"alias", "alias-refused", "flag-unknown", "value-wrong"} <= found(explanation).keys()
    over = explained(["--config", str(config), "--lr", "1e-4"])
    assert over.asked.settings.start_learning_rate == 1e-4


@pytest.mark.parametrize("hostile", ["a\x1b[31mb", "a\u202eb", "\udcff", "a\nb", "x" * 5000, "{0}{x}%s"])
def test_no_value_can_write_on_the_terminal_or_stop_the_rest(hostile: str) -> None:
    names = ("video_path", "output_dir", "exp_name", "load_from_checkpoint", "perceptual", "device", "resume")
    explanation = explained([*flags(**dict.fromkeys(names, hostile)), f"--{hostile}"], None)
    for lang in LANGUAGES:
        text = as_text(explanation, lang, width=80)
        assert all(c.isprintable() for line in text.split("\n") for c in line)
        text.encode()
        json.loads(as_json(explanation, lang).encode("ascii"))


def test_secrets_are_not_repeated() -> None:
    text = as_text(explained(flags(wandb_api_key="abc123")), "en", width=80)
    assert "abc123" not in text


def as_data(changes: dict[str, object], place: Place) -> dict[str, Finding]:
    """Findings of a tiny run on two videos that takes 1 GiB, all of it data: nothing is looked at."""
    asked = read_asked(flags(**changes))
    case = Case(
        settings=asked.settings,
        given=asked.given,
        place=place,
        precision=precision_of(asked.settings, place.device, place.capability, began=None),
        videos=2,
        model=TINY_FACTS,
        plan=StepPlan(1, budget_bytes=40 * GIB),
        peak_bytes=GIB,
    )
    chained = chain(of_settings(case), of_paths(case), of_machine(case), of_model(TINY_FACTS))
    return {each.id: each for each in chained}


@pytest.mark.parametrize(("changes", "place", "kind", "values"), [
    ({"exp_name": "17x32x32"}, H100, "name-frames", {"frames": "17", "asked": "4"}),
    ({"exp_name": "4x64x64_b"}, H100, "name-size", {"size": "64x64", "asked": "32x32"}),
    ({}, H100, "padded-frames", {"worked": "5", "added": "1", "shorter": "1", "latent": "2"}),
    ({"frames": "1,3,5"}, H100, "padded-frames", {"frames": "3", "worked": "5"}),
    ({"agc_factor": 2}, H100, "no-effect", {"said": "--agc_factor 2.0 has no effect: --clip_grad is False"}),
    ({"mode": 1}, H100, "mode-debug", {}),
    ({"start_learning_rate": 1e-3}, H100, "rate-high", {"most": "2e-04"}),
    ({"start_learning_rate": 1e-4, "optim": "lion"}, H100, "rate-high", {"most": "7e-05"}),
    ({"start_learning_rate": 1e-8, "lr_scheduler": "constant"}, H100, "rate-low", {}),
    ({"lr_warmup_steps": 160}, H100, "warmup-long", {"reached": "1e-05"}),
    ({"save_steps": 16}, H100, "saves-only-end", {"saves": "1"}),
    ({"max_steps": 50000, "save_steps": 10000}, H100, "saves-few", {"share": "20"}),
    ({}, H100, "ema-short", {"end": "0.6538", "window": "3", "reached": "8,990"}),
    ({"disc_start": 16}, H100, "critic-late", {"start": "16"}),
    ({"precision": "bf16"}, T4, "precision-missing", {"used": "fp32"}),
    ({"precision": "bf16", "amp_level": "O2"}, T4, "amp-no-effect", {}),
    ({"precision": "bf16", "amp_level": "O0"}, H100, "amp-o0", {}),
    ({"precision": "fp32"}, H100, "precision-unused", {}),
    ({"precision": "fp32", "init_loss_scale": 512}, H100, "scale-no-effect", {}),
    ({"precision": "bf16", "init_loss_scale": 512}, H100, "scale-not-needed", {}),
    ({}, H100, "precision-auto", {"used": "bf16"}),
    ({"dataloader_num_workers": 3}, LAPTOP, "workers-cores", {"cores": "2", "best": "1"}),
    ({"dataloader_num_workers": 99}, LAPTOP, "workers-memory", {"needed": "2.3 GiB"}),
    ({"dataloader_num_workers": 2000}, LAPTOP, "workers-shm", {"shared": "16 MiB"}),
    ({"jit_level": "O1"}, LAPTOP, "compiler-missing", {}),
    ({}, H100, "memory-fits", {"budget": "40.0 GiB"}),
    ({"max_steps": 1, "batch_size": 1}, H100, "passes-part", {"needed": "2"}),
    ({"max_steps": 5000}, H100, "passes-many", {"passes": "5,000", "videos": "2"}),
    ({}, H100, "passes", {"clips": "32", "passes": "16"}),
    ({"max_steps": 50000}, LAPTOP, "disk-full", {}),
    ({"output_dir": "~/runs"}, H100, "path-unexpanded", {"flag": "output_dir"}),
    ({"output_dir": "/dev/null/x"}, H100, "output-unwritable", {"nearest": "/dev/null"}),
])  # fmt: skip
def test_each_finding_follows_from_data(
    changes: dict[str, object], place: Place, kind: str, values: dict[str, str]
) -> None:
    told = as_data(changes, place)
    assert kind in told
    assert values.items() <= told[kind].values.items()


def test_an_optimiser_whose_library_is_missing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert "causalvae[adamw8bit]" in as_data({"optim": "adamw8bit"}, H100)["refused"].values["said"]


@pytest.mark.parametrize(("changes", "place", "kind", "values"), [
    ({"memory": "1MiB"}, H100, "memory-too-small", {}),
    ({"memory": "lean", "jit_level": "O1"}, H100, "jit-recompute", {}),
    ({"video_path": "nowhere"}, H100, "videos-missing", {"path": "nowhere", "flag": "video_path"}),
    ({"eval_video_path": "ucf101/x", "eval_steps": 1}, H100, "ucf101-missing", {"flag": "eval_video_path"}),
    ({"load_from_checkpoint": "x.ckpt"}, H100, "weights-missing", {"model": "tiny"}),
    ({"model": "osp-v1.1", "disc_type": "none"}, H100, "model-no-stream", {}),
    ({"device": "cuda:99"}, None, "device-missing", {}),
    ({"eval_video_path": "sample:", "eval_steps": 1}, H100, "eval-not-held-out", {}),
])  # fmt: skip
def test_each_finding_is_found_where_it_is(
    changes: dict[str, object], place: Place, kind: str, values: dict[str, str]
) -> None:
    told = finds(place, **changes)
    assert kind in told
    assert values.items() <= told[kind].values.items()


def test_a_sound_command_has_neither_warnings_nor_problems() -> None:
    changes = {"video_num_frames": 5, "max_steps": 400, "save_steps": 100, "exp_name": "5x32x32"}
    told = finds(H100, **changes, output_dir=ROOT / "runs").values()
    # these sources may themselves be in a folder for temporary files
    assert [each for each in told if each.level != "note" and each.id != "output-temporary"] == []


def test_a_checkpoint_is_told_by_its_content(tmp_path: Path) -> None:
    files = ROOT / "tests" / "fixtures" / "checkpoints"
    finding = finds(H100, load_from_checkpoint=files / "osp_v1.1_training.ckpt")
    assert finding["model-loaded"].values["model"] == "osp-v1.1"
    assert "statistics over all frames" in finding["model-no-stream"].values["why"]
    (tmp_path / "text.ckpt").write_text("no weights")
    assert "a text file" in finds(H100, load_from_checkpoint="text.ckpt")["weights-unusable"].values["said"]


def test_a_run_among_its_videos_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "films").mkdir()
    (tmp_path / "films" / "a.mp4").write_text("")
    finding = finds(H100, video_path="films", output_dir="films/out", eval_video_path="films", eval_steps=2)
    assert {"output-in-videos", "eval-not-held-out"} <= finding.keys()


def test_a_measurement_tells_how_long_the_run_takes() -> None:
    explanation = explain(Command(tuple(flags(disc_type="none"))), measure=True)
    assert explanation.case.seconds is not None
    assert 0 < explanation.case.seconds < 60
    assert "time" in found(explanation)


@pytest.mark.parametrize(("argv", "said"), [
    ([], "give a command behind --"),
    (["nowhere"], "there is no such file"),
    (["a", "--", "b.py"], "one script, YAML file or run"),
    (["--", "ls", "-l"], "not a training command"),
    (["--", "causalvae", "eval", "--x"], "not a training command"),
    (["."], "not the folder of a run"),
    (["--josn"], "did you mean --json?"),
])  # fmt: skip
def test_what_can_not_be_explained_is_a_mistake(argv: list[str], said: str, tmp_path: Path) -> None:
    assert said in refused(*PROGRAM, "explain", *argv, cwd=tmp_path)
