"""Flags of other trainers: what they are called here, and that none is taken for something else."""

import json
import re
from pathlib import Path

import pytest
from runs import ROOT, run, words
from test_cli import refused

from causalvae.config import TrainSettings
from causalvae.errors import ConfigError
from causalvae.flags import flags_of, parse, read_settings
from causalvae.foreignflags import GONE, RENAMED, REWORDED, VALUES, translate
from causalvae.texts import texts

FLAGS = flags_of(TrainSettings)
# As the scripts of the trainers have them.
OPEN_SORA_PLAN = (
    "--exp_name test --video_path sample: --resolution 64 --num_frames 5 --batch_size 1 --lr 1e-4 "
    "--disc_start 2 --save_ckpt_step 2 --log_steps 1 --max_steps 2 --mix_precision fp32 --sample_rate 2 "
    "--dataset_num_worker 0 --ema --ema_decay 0.99 --perceptual_weight 1.0 --loss_type l1 --freeze_encoder "
    "--disc_cls opensora.models.causalvideovae.model.losses.LPIPSWithDiscriminator3D --wavelet_weight 0.0"
)


def read(line: str) -> tuple[TrainSettings, list[str]]:
    ours, notes = translate(line.split(" "))
    return read_settings(TrainSettings, ours)[0], notes


def test_no_foreign_name_is_one_of_ours_and_every_counterpart_exists() -> None:
    foreign = {*RENAMED, *REWORDED, *GONE}
    assert foreign & FLAGS.keys() == set()
    assert {*RENAMED.values(), *(name for name, _ in REWORDED.values())} <= FLAGS.keys()
    assert {name for name, _ in VALUES} <= FLAGS.keys()
    for name, known in REWORDED.values():
        for word in known.values():
            parse(FLAGS[name], [word])


def test_every_reason_is_there_in_both_languages_and_none_is_unused() -> None:
    reasons = {gone.why for gone in GONE.values()} | set(VALUES.values()) | {"renamed", "dropped"}
    assert texts("foreign", "en").keys() == texts("foreign", "zh").keys() == reasons


def test_every_counterpart_is_in_the_docs() -> None:
    page = (ROOT / "docs" / "explain.md").read_text()
    for theirs in {*RENAMED, *REWORDED} - {"c"}:
        assert f"`{theirs}" in page, theirs


def test_a_reason_names_only_flags_that_exist() -> None:
    for reason in texts("foreign", "en").values():
        assert set(re.findall(r"--(\w+)", reason)) <= FLAGS.keys(), reason


def test_a_command_of_another_trainer_means_here_what_it_means_there() -> None:
    settings, notes = read(OPEN_SORA_PLAN)
    ours = (
        "--exp_name test --video_path sample: --resolution 64 --video_num_frames 5 --batch_size 1 "
        "--start_learning_rate 1e-4 --disc_start 2 --save_steps 2 --log_steps 1 --max_steps 2 "
        "--precision fp32 --sample_rate 2 --dataloader_num_workers 0 --use_ema --ema_decay 0.99 "
        "--perceptual_weight 1.0 --loss_type l1 --train_parts decoder --disc_type patchgan3d"
    )
    assert settings == read_settings(TrainSettings, ours.split(" "))[0]
    assert notes[0] == "--num_frames 5 is called --video_num_frames 5 here"
    assert len(notes) == 9


def test_a_command_in_our_words_is_left_as_it_is() -> None:
    line = ["stray", "--betas=0.9", "0.99", "--logvar_init", "-1e-3", "--flip", "--exp_name", "", "--x=a=b"]
    assert translate(line) == (line, [])


@pytest.mark.parametrize(("line", "said"), [
    ("--epochs 3", "--epochs 3: the length of a run is counted in steps"),
    ("--dynamic_sample", "--dynamic_sample: the frame rate"),
    ("--resume_from_checkpoint checkpoint-14000.ckpt", "use --load_from_checkpoint with it"),
    ("--lr_scheduler polynomial_decay", "linear is the nearest"),
    ("--optim momentum", "use sgd"),
    ("--disc_cls my.Critic", "--disc_type patchgan3d, patchgan2d or none"),
    ("--lr 1e-4 --start_learning_rate 1e-5", "both mean --start_learning_rate here, and differ"),
    ("--lr 1e-4 --learning_rate 1e-5", "both mean --start_learning_rate here, and differ"),
    ("--num_frames x", "--video_num_frames x: must be a whole number"),
])  # fmt: skip
def test_what_can_not_be_meant_is_refused_with_what_to_do(line: str, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        translate(line.split(" "))


@pytest.mark.parametrize(("line", "name", "value"), [
    ("--lr 1e-4 --start_learning_rate 0.0001", "start_learning_rate", 1e-4),
    ("--random_crop False", "crop", "center"),
    ("--random-crop=1", "crop", "random"),
    ("--use_discriminator no", "disc_type", "none"),
    ("--use_discriminator True", "disc_type", "patchgan3d"),
    ("--resume_from_checkpoint True", "resume", "auto"),
    ("--resume_from_checkpoint False", "resume", "never"),
    ("--resume_from_checkpoint a/step-00000001", "resume", "a/step-00000001"),
    ("--mixed_precision no", "precision", "fp32"),
    ("--disc_cls LPIPSWithDiscriminator", "disc_type", "patchgan2d"),
    ("--scale_lr False --loss_scaler_type dynamic --n_nodes 1", "batch_size", 1),
])  # fmt: skip
def test_values_are_translated_too(line: str, name: str, value: object) -> None:
    assert getattr(read(f"--video_path sample: {line}")[0], name) == value


def test_a_run_takes_foreign_flags_with_a_note_that_it_records(tmp_path: Path) -> None:
    done = run(tmp_path, max_steps=None, max_train_steps=1, dynamic_sample=False, disc_type="none")
    assert done.returncode == 0, done.stderr
    notes = [
        "--max_train_steps 1 is called --max_steps 1 here",
        "--dynamic_sample False is left out: it asks for what is done here anyway",
    ]
    for note in notes:
        assert f"warning: {note}\n" in done.stdout
    assert set(notes) <= set(json.loads((tmp_path / "run" / "run.json").read_text())["warnings"])


def test_a_foreign_flag_without_a_counterpart_leaves_nothing_behind(tmp_path: Path) -> None:
    assert "--epochs 3: the length" in refused(*words(tmp_path, epochs=3))
    assert list(tmp_path.iterdir()) == []
