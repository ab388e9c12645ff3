"""Trainings by `causalvae.train` in this process: all kinds of settings train, go on, start from weights."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import SMALL, assert_same_state, small_weights, tensors
from safetensors.torch import load_file, save_file

import causalvae
from causalvae.data.encode import write_png
from causalvae.flags import Resolution
from causalvae.models.build import build
from causalvae.models.presets import CausalVAEConfig
from causalvae.rng import key, normal
from causalvae.train.state import model_metadata
from causalvae.train.trainer import RunResult
from causalvae.video import to_uint8

BASE: dict[str, Any] = {  # Any: values of any flag
    "exp_name": "run",
    "video_path": "sample:",
    "model": "tiny",
    "batch_size": 1,
    "video_num_frames": 5,
    "resolution": Resolution(32, 32),
    "max_steps": 2,
    "dataloader_num_workers": 0,
    "start_learning_rate": 1e-4,
    "lr_warmup_steps": 0,
    "disc_start": 1,
    "log_steps": 1,
    "perceptual": "none",
}
OTHER_SETTINGS: list[dict[str, Any]] = [
    {"optim": "lion", "loss_type": "huber", "use_ema": False, "disc_type": "none", "video_num_frames": 1},
    {
        "optim": "sgd",
        "loss_type": "l2",
        "disc_type": "patchgan2d",
        "disc_norm": "group",
        "learn_logvar": True,
    },
    {
        "optim": "adam",
        "lr_scheduler": "linear",
        "lr_decay_steps": 3,
        "disc_loss": "vanilla",
        "clip_grad": True,
    },
    {
        "crop": "center",
        "flip": False,
        "sample_rate": 3,
        "short_videos": "repeat",
        "video_num_frames": 6,
        "resolution": Resolution(24, 40),
        "gradient_accumulation_steps": 2,
        "disc_norm": "none",
        "logvar_init": -1.0,
    },
]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other are slow on busy machines."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def train(folder: Path, **changes: Any) -> RunResult:
    chosen: dict[str, Any] = {**BASE, "output_dir": str(folder), **changes}
    if not changes.keys() & {"model", "load_from_checkpoint"}:
        chosen["load_from_checkpoint"] = str(small_weights())
    return causalvae.train(causalvae.TrainSettings(**chosen))


@pytest.mark.parametrize("changes", OTHER_SETTINGS, ids=lambda changes: "-".join(map(str, changes.values())))
def test_other_settings_train_and_go_on_as_if_never_stopped(tmp_path: Path, changes: dict[str, Any]) -> None:
    once, twice = tmp_path / "once", tmp_path / "twice"
    result = train(once, **changes, max_steps=3)
    assert (result.status, result.step, result.path) == (0, 3, once / "run")
    for steps in (2, 3):
        train(twice, **changes, max_steps=steps)
    assert_same_state(once, twice, step=3)
    names = {name.split("/")[0] for name in tensors(once, 3)}
    assert ("ema" in names) == changes.get("use_ema", True)
    assert ("discriminator" in names) == (changes.get("disc_type") != "none")
    lines = [json.loads(line) for line in (once / "run" / "metrics.jsonl").read_text().splitlines()]
    assert ("critic" in lines[-1]) == ("discriminator" in names)
    moved = tensors(once, 3)["optimizer/logvar"] != changes.get("logvar_init", 0.0)
    assert bool(moved) == changes.get("learn_logvar", False)


def test_a_network_with_the_published_layers_trains_and_goes_on(tmp_path: Path) -> None:
    config = CausalVAEConfig(hidden_size=32, hidden_size_mult=(1, 1, 1, 1), num_res_blocks=1)
    vae = build(config)
    save_file(vae.state_dict(), tmp_path / "start.safetensors", metadata=model_metadata(vae))
    common = {"load_from_checkpoint": str(tmp_path / "start.safetensors"), "disc_type": "none"}
    train(tmp_path / "once", **common, max_steps=3)
    for steps in (2, 3):
        train(tmp_path / "twice", **common, max_steps=steps)
    assert_same_state(tmp_path / "once", tmp_path / "twice", step=3)


def test_pictures_train_as_videos_of_one_frame(tmp_path: Path) -> None:
    (tmp_path / "pictures" / "below").mkdir(parents=True)
    for number, name in enumerate(("a.png", "below/b with a space.PNG")):
        pixels = to_uint8(0.5 * normal((3, 48, 64), key("picture", number)))
        write_png(tmp_path / "pictures" / name, pixels.permute(1, 2, 0))
    result = train(tmp_path, video_path=str(tmp_path / "pictures"), video_num_frames=1, batch_size=2)
    assert result.step == 2
    assert not (result.path / "quarantine.jsonl").exists()
    assert len(list((result.path / "samples").glob("*.mp4"))) == 2


def test_clips_of_several_shapes_and_pictures_train_and_go_on(tmp_path: Path) -> None:
    mixed: dict[str, Any] = {
        "frames": (1, 5, 9),
        "resolutions": (Resolution(32, 32), Resolution(24, 40)),
        "image_ratio": 0.25,
    }
    train(tmp_path / "once", **mixed, max_steps=8)
    for steps in (3, 8):
        train(tmp_path / "twice", **mixed, max_steps=steps)
    assert_same_state(tmp_path / "once", tmp_path / "twice", step=8)
    lines = [
        json.loads(line) for line in (tmp_path / "once" / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    shapes = {(line["frames"], line["height"], line["width"]) for line in lines}
    assert {frames for frames, _, _ in shapes} == {1, 5, 9}
    assert {(height, width) for _, height, width in shapes} == {(32, 32), (24, 40)}


@pytest.mark.parametrize(
    ("half", "rests"),
    [("decoder", ("encoder.", "quant_conv.")), ("encoder", ("decoder.", "post_quant_conv."))],
)
def test_one_half_learns_and_the_other_keeps_its_weights(
    tmp_path: Path, half: str, rests: tuple[str, str]
) -> None:
    common = {"train_parts": half, "start_learning_rate": 1e-3, "disc_start": 0}
    before = build(SMALL).state_dict()
    train(tmp_path / "once", **common, max_steps=3)
    for name, tensor in tensors(tmp_path / "once", 3).items():
        kind, _, key = name.partition("/")
        if kind in ("model", "ema"):
            assert torch.equal(tensor, before[key]) == key.startswith(rests), name
        assert kind != "optimizer" or not key.removeprefix("vae.").startswith(rests), name
    for steps in (2, 3):
        train(tmp_path / "twice", **common, max_steps=steps)
    assert_same_state(tmp_path / "once", tmp_path / "twice", step=3)
    train(tmp_path / "parts", **common, max_steps=3, gradient_accumulation_steps=2)  # and split in parts


def test_two_batches_of_two_give_the_update_of_one_batch_of_four(tmp_path: Path) -> None:
    # Plain gradient steps: Adam divides by the size of a gradient and so lifts the rounding of tiny ones.
    plain = {"optim": "sgd", "start_learning_rate": 0.01, "disc_start": 0}
    train(tmp_path / "four", batch_size=4, **plain)
    train(tmp_path / "two", batch_size=2, gradient_accumulation_steps=2, **plain)
    four, two = tensors(tmp_path / "four", 2), tensors(tmp_path / "two", 2)
    assert four.keys() == two.keys()
    for name in four:
        if name.startswith(("model/", "ema/")):
            torch.testing.assert_close(two[name], four[name], rtol=0, atol=1e-6, msg=name)


def test_a_run_starts_from_the_averaged_weights_of_a_run_a_checkpoint_or_a_file(tmp_path: Path) -> None:
    first = train(tmp_path / "first", start_learning_rate=1e-3, disc_type="none")
    checkpoint = first.path / "checkpoints" / "step-00000002"
    averaged, own = checkpoint / "ema.safetensors", checkpoint / "model.safetensors"
    assert any(not torch.equal(x, load_file(own)[name]) for name, x in load_file(averaged).items())
    cases = {"a_run": (first.path, averaged), "a_checkpoint": (checkpoint, averaged), "a_file": (own, own)}
    still = {"start_learning_rate": 1e-30, "weight_decay": 0.0, "model": "small", "disc_type": "none"}
    for name, (given, expected) in cases.items():
        run = train(tmp_path / name, load_from_checkpoint=str(given), **still, max_steps=1)
        facts = json.loads((run.path / "run.json").read_text())
        digest = hashlib.sha256(expected.read_bytes()).hexdigest()
        assert facts["weights"]["sha256"] == digest
        assert facts["weights"]["file"] == str(expected)
        saved = load_file(run.path / "checkpoints" / "step-00000001" / "model.safetensors")
        for each, tensor in load_file(expected).items():
            torch.testing.assert_close(saved[each], tensor, rtol=0, atol=1e-29, msg=each)  # a step of 1e-30

    # On resume the run's own checkpoint wins: the file may be gone.
    moved = tmp_path / "a_file"
    own.unlink()
    again = train(moved, load_from_checkpoint=str(own), **still, max_steps=2)
    assert again.step == 2
