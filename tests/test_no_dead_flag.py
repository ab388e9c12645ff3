"""No flag is dead: each one, changed alone, changes numbers, files or what is said."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
from runs import ENVIRONMENT, MEASURED, words
from safetensors.torch import load_file

from causalvae.cli import main
from causalvae.config import TrainSettings
from causalvae.flags import flags_of

BASE = {
    "video_path": "sample:",
    "video_num_frames": 5,
    "resolution": "32",
    "max_steps": 2,
    "batch_size": 1,
    "save_steps": 2,
    "disc_type": "none",
    "lr_warmup_steps": 0,
}
WILD: dict[str, object] = {"start_learning_rate": "1e30", "save_steps": 1}  # the second step is not finite
CLIPPED: dict[str, object] = {"clip_grad": True}
JUDGED: dict[str, object] = {"disc_type": "patchgan3d", "disc_start": 0}
FALLING: dict[str, object] = {"lr_scheduler": "cosine"}
SAID = ("warning: ", "error: ", "memory: ")
HELD_OUT: dict[str, object] = {"eval_video_path": "sample:"}
# Each flag, the value it is changed to, and what has to be given as well for it to matter.
CHANGES: dict[str, tuple[object, Mapping[str, object]]] = {
    "exp_name": ("other", {}),
    "output_dir": ("{folder}/elsewhere", {}),
    "config": ("{folder}/config.yaml", {}),
    "device": ("cuda:7", {}),
    "seed": (1, {}),
    "batch_size": (2, {}),
    "precision": ("bf16", {}),
    "amp_level": ("O0", {"precision": "bf16"}),
    "memory": ("lean", {}),
    "dataloader_num_workers": (1, {"clip_timeout": "1e-9"}),  # without, no clip is given up
    "max_steps": (1, {}),
    "save_steps": (1, {}),
    "keep_checkpoints": (1, {"save_steps": 1}),
    "log_steps": (2, {}),
    "eval_steps": (1, HELD_OUT),
    "eval_video_path": ("sample:", {}),
    "resume": ("{folder}/missing", {}),
    "tensorboard": (True, {}),
    "video_path": ("{folder}/missing", {}),
    "video_num_frames": (9, {}),
    "resolution": (64, {}),
    "frames": ("1,5", {}),
    "resolutions": ("64,32", {}),
    "image_ratio": (1.0, {}),
    "sample_rate": (2, {}),
    "crop": ("center", {}),
    "flip": (False, {}),
    "short_videos": ("repeat", {"sample_rate": 30}),
    "clip_timeout": ("1e-9", {"dataloader_num_workers": 1}),
    "quarantine": ("{folder}/missing", {}),
    "load_from_checkpoint": ("{folder}/missing", {}),
    "weights": ("live", {"model": "tiny"}),
    "model_config": ("{folder}/missing", {}),
    "partial": (True, {"model": "tiny"}),
    "model": ("small", {"model": "tiny"}),
    "train_parts": ("decoder", {}),
    "start_learning_rate": ("2e-4", {}),
    "lr_scheduler": ("constant", {}),
    "lr_warmup_steps": (1, {}),
    "lr_decay_steps": (10, FALLING),
    "end_learning_rate": ("1e-5", FALLING),
    "optim": ("lion", {}),
    "betas": ((0.5, 0.9), {}),
    "weight_decay": (1, {}),
    "clip_grad": (True, {"max_grad_norm": "1e-3"}),
    "max_grad_norm": ("1e-3", CLIPPED),
    "clip_grad_mode": ("agc", CLIPPED),
    "agc_factor": ("1e-4", CLIPPED | {"clip_grad_mode": "agc"}),
    "gradient_accumulation_steps": (2, {}),
    "use_ema": (False, {}),
    "ema_decay": (0.01, {}),
    "loss_type": ("l2", {}),
    "perceptual": ("auto", {}),
    "perceptual_weight": (2, {}),
    "kl_weight": (1, {}),
    "logvar_init": (1, {}),
    "learn_logvar": (True, {}),
    "disc_type": ("patchgan2d", JUDGED),
    "disc_start": (1, JUDGED),
    "disc_weight": (5, JUDGED),
    "disc_loss": ("vanilla", JUDGED),
    "disc_norm": ("group", JUDGED),
    "lecam_weight": (1, JUDGED),
    "r1_weight": (1, JUDGED),
    "disc_sync_norm": (True, {}),
    "mode": (1, WILD),
    "init_loss_scale": (2, {}),
    "loss_scale_window": (2, {}),
    "jit_level": ("O1", {}),
}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As the command runs elsewhere in these tests, and without a compiler, which takes long."""
    monkeypatch.setenv("CAUSALVAE_HOME", str(tmp_path / "home"))
    for name in ("CAUSALVAE_OFFLINE", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, ENVIRONMENT[name])
    monkeypatch.setenv("CXX", "no such compiler")


@pytest.fixture(scope="module")
def unchanged() -> dict[str, dict[str, object]]:
    """What runs without the change gave, by what was given as well."""
    return {}


def test_every_flag_is_changed() -> None:
    elsewhere = {"on_divergence"}  # test_divergence.py changes it, in trainings that are long enough
    assert CHANGES.keys() | elsewhere == flags_of(TrainSettings).keys()


@pytest.mark.parametrize("flag", CHANGES)
def test_a_flag_that_is_changed_changes_something(
    flag: str,
    unchanged: dict[str, dict[str, object]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "config.yaml").write_text("start_learning_rate: 3e-4\nloss_type: l2\n")
    value, also = CHANGES[flag]
    key = json.dumps(also, sort_keys=True)
    if key not in unchanged:
        unchanged[key] = seen(tmp_path / "unchanged", dict(also), capsys=capsys)
    told = value.format(folder=tmp_path) if isinstance(value, str) else value
    changed = dict(also) | {flag: told}
    assert seen(tmp_path / "changed", changed, capsys=capsys) != unchanged[key]


def test_what_is_not_changed_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = (seen(tmp_path / name, dict(JUDGED), capsys=capsys) for name in ("first", "second"))
    assert first == second
    assert first["weights"]


def seen(folder: Path, given: dict[str, object], *, capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    """All that tells one run from another: status, messages, files, metrics, weights.

    Nothing is known of the videos before: reading them takes longer than the shortest timeout.
    """
    shutil.rmtree(os.environ["CAUSALVAE_HOME"], ignore_errors=True)
    status = main("train", words(folder, **BASE | given)[2:])
    said = "".join(capsys.readouterr()).replace(str(folder), "FOLDER")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    lines = [line for path in files if path.name == "metrics.jsonl" for line in path.read_text().splitlines()]
    return {
        "status": status,
        "said": [line for line in said.splitlines() if any(word in line for word in SAID)],
        "files": [str(path.relative_to(folder)) for path in files],
        "weights": {
            f"{path.stem} {name}": float(tensor.double().sum())
            for path in files
            if path.name in ("model.safetensors", "ema.safetensors")
            for name, tensor in load_file(path).items()
        },
        "metrics": [
            {name: value for name, value in json.loads(line).items() if name not in MEASURED}
            for line in lines
        ],
    }
