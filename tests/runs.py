"""Runs of the training command as a user starts them: real processes, tiny model, bundled clips."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from causalvae.models.build import build
from causalvae.models.presets import PRESETS
from causalvae.weights.read import own_entries
from causalvae.weights.tensorfiles import write_safetensors

ROOT = Path(__file__).parent.parent
DOOR = ROOT / "opensora" / "train" / "train_causalvae.py"
TINY = {
    "exp_name": "run",
    "video_path": "sample:",
    "model": "tiny",
    "batch_size": 2,
    "video_num_frames": 5,
    "resolution": 32,
    "max_steps": 16,
    "save_steps": 2,
    "log_steps": 1,
    "start_learning_rate": "1e-4",
    "lr_scheduler": "cosine",
    "disc_start": 3,
    "disc_type": "patchgan2d",
    "dataloader_num_workers": 0,
    "perceptual": "none",
}
SMALL = replace(PRESETS["tiny"], hidden_size=8)
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",  # threads that wait for each other are slow on busy machines
    "CAUSALVAE_OFFLINE": "1",  # no test fetches anything
    "CAUSALVAE_HOME": os.environ["CAUSALVAE_HOME"],  # which conftest.py sets
}
MEASURED = {
    "time",
    "clips_per_second",
    "data_wait",
    "memory_gib",
}  # differ between two runs of the same thing


def small_weights() -> Path:
    """The first weights of SMALL, a fifteenth of those of `tiny`: steps and saves are quick."""
    path = Path(ENVIRONMENT["CAUSALVAE_HOME"]) / "small.safetensors"
    if not path.exists():
        write_safetensors(path, build(SMALL).state_dict(), metadata=own_entries(SMALL))
    return path


def words(folder: Path, **changes: object) -> list[str]:
    """The command line of a tiny run that lives in folder/run. None leaves a flag out, a tuple has words.

    It starts from `small_weights`, unless the changes say from what.
    """
    chosen = TINY | {"output_dir": str(folder)} | changes
    if not changes.keys() & {"model", "load_from_checkpoint"}:
        chosen["load_from_checkpoint"] = small_weights()
    given = {name: value if isinstance(value, tuple) else (value,) for name, value in chosen.items()}
    flags = [(f"--{name}", *map(str, value)) for name, value in given.items() if value != (None,)]
    return [sys.executable, str(DOOR), *(word for pair in flags for word in pair)]


def start(folder: Path, *, env: dict[str, str] | None = None, **changes: object) -> subprocess.Popen[str]:
    """The command as a process of its own, in a session of its own."""
    return subprocess.Popen(
        words(folder, **changes),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=ENVIRONMENT | (env or {}),
    )


def run(folder: Path, **changes: object) -> subprocess.CompletedProcess[str]:
    """The command, to its end."""
    return subprocess.run(
        words(folder, **changes), capture_output=True, text=True, check=False, env=ENVIRONMENT
    )


def tensors(folder: Path, step: int) -> dict[str, Tensor]:
    """Every tensor of a checkpoint of folder/run."""
    checkpoint = folder / "run" / "checkpoints" / f"step-{step:08d}"
    found: dict[str, Tensor] = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        found |= {f"{file.stem}/{name}": tensor for name, tensor in load_file(file).items()}
    assert found, f"nothing in {checkpoint}"
    return found


def assert_same_state(folder: Path, other: Path, *, step: int) -> None:
    """Bitwise: weights, averages, critic and optimisers of two runs."""
    one, two = tensors(folder, step), tensors(other, step)
    assert one.keys() == two.keys()
    different = [name for name in one if not torch.equal(one[name], two[name])]
    assert not different, different[:5]


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl without what depends on the clock."""
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in MEASURED} for line in lines]
