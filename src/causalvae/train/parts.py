"""The parts of a run, made from its settings: where it starts, what it computes in, its plans and facts.

With `train.networks`, `train.loop` and `train.trainer` the only reader of TrainSettings.
"""

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import causalvae
from causalvae.config import TrainSettings, changed_mathematics, continued
from causalvae.data.clips import ClipPlan
from causalvae.data.sources import ClipSource
from causalvae.errors import ConfigError, RunError, WeightsError
from causalvae.flags import read_settings
from causalvae.losses import LossPlan
from causalvae.machine import Capability, Machine, capability, environment, torch_facts
from causalvae.models.presets import PRESETS
from causalvae.perceptual import Perceptual, Shelf, build_perceptual, refuse_change
from causalvae.rundir import Checkpoint, RunDir, damage
from causalvae.train.precision import Precision
from causalvae.train.replay import is_replay
from causalvae.train.state import read_counters
from causalvae.weights.load import Loaded, load_model


def check_start(settings: TrainSettings, path: Path) -> Loaded | None:
    """The weights that a new run in `path` starts from, read first, so that a mistake leaves no folder."""
    if (path / "checkpoints").exists():
        return None
    if settings.mode == 2 and settings.load_from_checkpoint is None:
        raise ConfigError(
            f"--mode 2 evaluates a checkpoint, and {path} has none; give the --exp_name and --output_dir of "
            "a run, or --load_from_checkpoint"
        )
    if settings.resume not in ("auto", "never"):
        checkpoint_at(Path(settings.resume))
        return None
    loaded = load_start(settings)
    if loaded is not None:
        refuse_odd_sizes(settings, loaded)
    return loaded


def load_start(settings: TrainSettings) -> Loaded | None:
    """The weights that a new run starts from; None where it is seeded random ones."""
    if settings.load_from_checkpoint is None:
        return None
    path = Path(settings.load_from_checkpoint)
    if not os.path.exists(path):  # Path.exists() raises for a name too long
        raise ConfigError(
            f"--load_from_checkpoint {path}: there is no such file. Leave the flag out to start from seeded "
            "random weights, make a first checkpoint with `causalvae init`, or name anybody's weights"
        )
    model_config = None if settings.model_config is None else Path(settings.model_config)
    target = PRESETS[settings.model] if settings.partial else None
    try:
        return load_model(path, prefer=settings.weights, model_config=model_config, partial=target)
    except WeightsError as error:
        raise WeightsError(f"--load_from_checkpoint {error}") from error


def refuse_odd_sizes(settings: TrainSettings, loaded: Loaded) -> None:
    """ConfigError unless the loaded model's spatial factor divides every size; `--model` may have another."""
    factor = loaded.config.geometry.spatial
    for _, size in clip_plan(settings).shapes():
        if any(side % factor for side in size):
            raise ConfigError(
                f"--resolution {size[0]}x{size[1]}: height and width must be multiples of {factor} for "
                f"{loaded.family}, which --load_from_checkpoint holds"
            )


def starting_point(
    run: RunDir, settings: TrainSettings, *, source: ClipSource
) -> tuple[TrainSettings, Checkpoint | None]:
    """The settings in force and the checkpoint to go on from; records of later steps are dropped.

    Refuses changed mathematics, and a run that is not empty where --resume never was given.
    """
    if settings.resume == "never" and not run.was_empty:
        raise RunError(
            f"{run.path} is not empty and --resume never was given; choose another --exp_name, or leave "
            "--resume out to go on"
        )
    replay = replayed(settings)
    checkpoint = None if replay is not None else run.latest()
    if checkpoint is None and settings.resume not in ("auto", "never"):
        checkpoint = checkpoint_at(Path(settings.resume))
    if checkpoint is not None:
        before = checkpoint.path.parent.parent
        settings = go_on_with(settings, before / "config.yaml")
        if before == run.path:
            refuse_other_videos(run.path / "run.json", source)
        torch.set_num_threads(read_counters(checkpoint.path)["threads"])
    if settings.mode != 2 and replay is None:
        run.rewind("metrics.jsonl", checkpoint.step if checkpoint is not None else 0)
    return settings, checkpoint


def replayed(settings: TrainSettings) -> Path | None:
    """The folder of the bad step that --resume asks to repeat; None if it asks for something else."""
    if settings.resume in ("auto", "never") or not is_replay(Path(settings.resume)):
        return None
    if settings.mode != 1:
        raise ConfigError(f"--resume {settings.resume}: this is a step to repeat; add --mode 1")
    return Path(settings.resume)


def refuse_other_videos(facts: Path, source: ClipSource) -> None:
    """ConfigError unless these are the videos of the run whose run.json this is."""
    saved = json.loads(facts.read_text())["dataset"]
    if saved["fingerprint"] != source.fingerprint:
        raise ConfigError(
            f"--video_path {source.name}: not the videos that {facts.parent} was trained on: it had "
            f"{saved['videos']}, "
            f"now there are {len(source)}, or their sizes changed. Give those again, or start another run "
            "from this one: --exp_name NEW --resume RUN/checkpoints/step-N"
        )


def checkpoint_at(path: Path) -> Checkpoint:
    """The checkpoint that --resume names. ConfigError if there is none, RunError if it is damaged."""
    if not os.path.isfile(path / "state.json"):
        raise ConfigError(
            f"--resume {path}: no checkpoint is there; name a folder such as RUN/checkpoints/step-00001000 "
            "that holds state.json"
        )
    reason = damage(path)
    if reason is not None:
        raise RunError(f"--resume {path}: this checkpoint is damaged: {reason}; name an earlier one")
    return Checkpoint(read_counters(path)["step"], path, full=True)


def go_on_with(settings: TrainSettings, config: Path) -> TrainSettings:
    """The settings with which a run goes on. config: what it saved. ConfigError if they make another run."""
    saved, _ = read_settings(TrainSettings, ["--config", str(config)])
    changed = changed_mathematics(saved, settings)
    if changed:
        listed = "; ".join(f"--{name}: {old} -> {new}" for name, old, new in changed)
        raise ConfigError(
            f"{config.parent} was trained with other settings, and with these it would not be the same "
            f"run: {listed}. Give the old values, or choose another --exp_name"
        )
    return continued(saved, settings)


def choose_precision(
    settings: TrainSettings,
    device: torch.device,
    *,
    began: Mapping[str, Any] | None,  # Any: JSON
) -> Precision:
    """What a run computes in here; one that goes on keeps to what it began with. began: `facts_before`."""
    able = able_to(settings, device, began=began)
    return precision_of(settings, str(device), able, began=began)


def able_to(
    settings: TrainSettings,
    device: torch.device,
    *,
    began: Mapping[str, Any] | None,  # Any: JSON
) -> Capability:
    """What the device can do of what the run may want; the rest is not tried, which takes time."""
    wanted = {settings.precision, *([began["precision"]] if began is not None else [])} & {"bf16", "fp16"}
    if settings.precision == "auto" and device.type == "cuda":
        wanted.add("bf16")
    return capability(str(device), os.environ, names=sorted(wanted))


def precision_of(
    settings: TrainSettings,
    device: str,
    able: Capability,
    *,
    began: Mapping[str, Any] | None,  # Any: JSON
) -> Precision:
    """What a run computes in on a device that can do this."""
    saved = None if began is None else (began["precision"], began["amp_level"])
    return Precision.of(settings.precision, settings.amp_level, device=device, capability=able, saved=saved)


def clip_plan(settings: TrainSettings) -> ClipPlan:
    """How clips are cut; the batch holds all that one update sees."""
    sizes = settings.resolutions or (settings.resolution,)
    frames = settings.frames or (settings.video_num_frames,)
    return ClipPlan(
        frames=max(frames),
        size=(sizes[0].height, sizes[0].width),
        frame_buckets=settings.frames or (),
        size_buckets=tuple((size.height, size.width) for size in settings.resolutions or ()),
        image_ratio=settings.image_ratio,
        stride=settings.sample_rate,
        batch=settings.batch_size * settings.gradient_accumulation_steps,
        seed=settings.seed,
        crop=settings.crop,
        flip=settings.flip,
        short_videos=settings.short_videos,
    )


def find_perceptual(
    settings: TrainSettings,
    path: Path,
    *,
    began: Mapping[str, Any] | None,  # Any: JSON
) -> tuple[Perceptual | None, list[str]]:
    """The network of the perceptual term for the run in `path`, and what to warn of.

    A run keeps to what it was begun with: ConfigError if that is another network now. began: `facts_before`.
    """
    choice, warnings = settings.perceptual, list[str]()
    if settings.mode == 2:
        return None, []
    if began is not None and choice == "auto" and began.get("perceptual") is None:
        choice, warnings = "none", ["this run was begun without a perceptual term and goes on without"]
    found, more = build_perceptual(
        choice, size=smallest_size(settings), shelf=Shelf.of(os.environ), progress=True
    )
    if began is not None:
        refuse_change(began.get("perceptual"), found, run=path)
    return found, warnings + more


def smallest_size(settings: TrainSettings) -> tuple[int, int]:
    """Height and width of the smallest clips, which a network that judges frames has to take."""
    return min((min(size), size) for _, size in clip_plan(settings).shapes())[1]


def facts_before(settings: TrainSettings, path: Path) -> dict[str, Any] | None:  # Any: JSON
    """run.json of the run that goes on, or whose checkpoint --resume names; None at a beginning."""
    if settings.resume not in ("auto", "never") and not (path / "checkpoints").exists():
        path = Path(settings.resume).absolute().parent.parent
    file = path / "run.json"
    return json.loads(file.read_text()) if (path / "checkpoints").exists() and file.exists() else None


def loss_plan(settings: TrainSettings, perceptual: Perceptual | None) -> LossPlan:
    """What the reconstruction pays for."""
    return LossPlan(
        kind=settings.loss_type,
        perceptual=None if perceptual is None else perceptual.module,
        perceptual_weight=settings.perceptual_weight,
        kl_weight=settings.kl_weight,
        disc_weight=settings.disc_weight,
        lecam_weight=settings.lecam_weight,
        r1_weight=settings.r1_weight,
    )


def run_facts(
    source: ClipSource,
    weights: Mapping[str, Any] | None,
    *,
    perceptual: Perceptual | None,
    precision: Precision,
) -> dict[str, Any]:  # Any: JSON
    """What a run stands on: versions, machine, data and weights."""
    return {
        "causalvae": causalvae.__version__,
        "python": platform.python_version(),
        "torch": asdict(torch_facts()),
        "machine": asdict(Machine.look()),
        "environment": environment(os.environ),
        **precision.facts(),
        "deterministic": True,
        "weights": weights,
        "perceptual": None if perceptual is None else perceptual.facts(),
        "dataset": {"name": source.name, "videos": len(source), "fingerprint": source.fingerprint},
    }
