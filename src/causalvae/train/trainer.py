"""The training of a video VAE from settings to a run's folder: builds the parts, runs the loop, saves, resumes.

The one reader of TrainSettings: everything below takes plain arguments.
"""

import os
import platform
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import causalvae
from causalvae import rng
from causalvae.config import (
    TrainSettings,
    changed_mathematics,
    continued,
    decay_steps,
    notices,
    to_yaml,
    warmup_steps,
)
from causalvae.data.clips import ClipPlan, center_clip
from causalvae.data.loader import ClipLoader
from causalvae.data.sources import ClipSource, open_source
from causalvae.errors import ConfigError, RunError, VideoError
from causalvae.files import redact
from causalvae.flags import Given, read_settings
from causalvae.geometry import Geometry
from causalvae.losses import LossPlan, build_critic
from causalvae.machine import Machine, environment, pick_device, torch_facts
from causalvae.models.build import build
from causalvae.models.presets import PRESETS
from causalvae.rundir import Checkpoint, RunDir, damage, run_path
from causalvae.train.optim import build_optimizer, learning_rate, set_learning_rate
from causalvae.train.runlog import RunLog
from causalvae.train.samples import write_samples
from causalvae.train.signals import StopRequest, stop_on_signal
from causalvae.train.state import TrainState, read_counters
from causalvae.train.step import StepResult, train_step
from causalvae.video import to_model
from causalvae.weights.read import Origin, read_model

MAX_SKIPPED = 20  # steps in a row that were not finite, after which a run stops
NUM_SAMPLES = 2  # fixed clips that are reconstructed at every save


@dataclass(frozen=True)
class RunResult:
    """Where a run is and how it ended: status 0, or 128 + the signal that stopped it."""

    path: Path
    status: int
    step: int


@dataclass
class _Training:
    """The parts of one run in one process."""

    settings: TrainSettings
    run: RunDir
    log: RunLog
    state: TrainState
    loader: ClipLoader
    loss: LossPlan
    samples: list[Tensor]
    skipped: int = 0
    saved: int = -1


def train(
    settings: TrainSettings, *, given: Mapping[str, Given] | None = None, command: Sequence[str] = ()
) -> RunResult:
    """Train until max_steps, or go on where the run stopped. Returns when it is done or a signal asked to stop.

    given: what was not a default and where it came from, for config.yaml. command: as typed, for run.json.
    Raises ConfigError for a mistake in what was asked, RunError if the run can't start or can't go on.
    """
    device = torch.device(pick_device(settings.device))
    source = open_source(settings.video_path)
    with stop_on_signal() as stop, RunDir(run_path(settings.output_dir, settings.exp_name)) as run:
        settings, start = _starting_point(run, settings)
        warnings = notices(settings, given)
        with RunLog(
            run, max_steps=settings.max_steps, log_steps=settings.log_steps, tensorboard=settings.tensorboard
        ) as log:
            state, origin = _build_state(settings, device, start=start)
            for warning in [*warnings, *run.warnings]:
                log.warn(warning)
            run.write_text("config.yaml", to_yaml(settings, given))
            facts = {
                "warnings": [*warnings, *run.warnings],
                "command": redact(command),
                "device": str(device),
            }
            run.write_json("run.json", facts | _facts(source, origin))
            _train(settings, run, log, state=state, source=source, stop=stop)
    return RunResult(run.path, stop.status, state.step)


def _train(
    settings: TrainSettings,
    run: RunDir,
    log: RunLog,
    *,
    state: TrainState,
    source: ClipSource,
    stop: StopRequest,
) -> None:
    if state.step >= settings.max_steps:
        log.say(f"{run.path} is already at step {state.step}; raise --max_steps to go on")
        return
    plan = _clip_plan(settings)
    known = run.records("quarantine.jsonl")
    with ClipLoader(
        source,
        plan,
        cursor=state.cursor,
        workers=settings.dataloader_num_workers,
        clip_timeout=settings.clip_timeout,
        quarantined={record["video"] for record in known},
        unreadable={record["video"]: record["reason"] for record in known if record["whole"]},
        on_quarantine=lambda record: _quarantine(run, log, record),
    ) as loader:
        training = _Training(
            settings, run, log, state, loader, _loss_plan(settings), _fixed_clips(source, plan)
        )
        log.say(f"{settings.exp_name}: {len(source)} videos, {_size_of(state.vae)}, from step {state.step}")
        log.start(state.step)
        _loop(training, stop)
    log.say(f"step {state.step}: {'stopped' if stop.number else 'done'}; the run is in {run.path}")


def _loop(training: _Training, stop: StopRequest) -> None:
    state, settings = training.state, training.settings
    while state.step < settings.max_steps and not stop.number:
        result = _step(training)
        done = state.step == settings.max_steps
        if result.applied and (state.step % settings.save_steps == 0 or done):
            _save(training)
    if stop.number and training.saved != state.step and state.step > 0:
        _save(training)


def _step(training: _Training) -> StepResult:
    state, settings = training.state, training.settings
    device = state.logvar.device
    clips = next(training.loader)
    rate = learning_rate(
        state.step,
        peak=settings.start_learning_rate,
        end=settings.end_learning_rate,
        kind=settings.lr_scheduler,
        warmup=warmup_steps(settings),
        decay=decay_steps(settings),
    )
    for optimizer in (state.optimizer, state.critic_optimizer):
        if optimizer is not None:
            set_learning_rate(optimizer, rate)
    x = to_model(clips.pixels.to(device)).contiguous(memory_format=torch.channels_last_3d)
    noise = draw_noise(state.vae.geometry, x.shape, seed=settings.seed, cursor=state.cursor).to(device)
    judging = state.critic is not None and state.step >= settings.disc_start
    result = train_step(
        state,
        x,
        noise,
        loss=training.loss,
        critic_loss=settings.disc_loss if judging else None,
        parts=settings.gradient_accumulation_steps,
        max_grad_norm=settings.max_grad_norm if settings.clip_grad else None,
        ema_decay=settings.ema_decay,
    )
    _report(training, result, rate=rate, names=[request.video.id for request in clips.requests])
    return result


def draw_noise(geometry: Geometry, shape: Sequence[int], *, seed: int, cursor: int) -> Tensor:
    """Noise of a batch of clips b 3 t h w: b c k h w, a function of (seed, cursor, sample, latent frame)."""
    c, k, h, w = geometry.latent_shape(*shape[2:])
    clips = [
        torch.stack([rng.normal((c, h, w), rng.key("noise", seed, cursor, i, j)) for j in range(k)], dim=1)
        for i in range(shape[0])
    ]
    return torch.stack(clips)


def _report(training: _Training, result: StepResult, *, rate: float, names: list[str]) -> None:
    training.skipped = 0 if result.applied else training.skipped + 1
    numbers: dict[str, float | None] = {
        "cursor": training.state.cursor,
        **result.terms.numbers(),
        "learning_rate": rate,
        "grad_norm": result.grad_norm,
        "critic_grad_norm": result.critic_grad_norm,
        "memory_gib": _peak_memory(training.state.logvar.device) / 2**30,
    }
    if not result.applied:
        numbers = {name: value for name, value in numbers.items() if name in ("cursor", "learning_rate")}
        numbers["skipped"] = training.skipped
        training.log.warn(
            f"step {training.state.step}: loss or gradients not finite, nothing updated; clips: {', '.join(names)}"
        )
    training.log.step(
        training.state.step,
        numbers,
        clips=len(names),
        wait=training.loader.take_wait(),
        notable=not result.applied,
    )
    if training.skipped >= MAX_SKIPPED:
        raise RunError(
            f"{MAX_SKIPPED} steps in a row were not finite, last with {', '.join(names)}. The checkpoints before are "
            "good: start again with a lower --start_learning_rate or with --clip_grad True",
            status=1,
        )


def _save(training: _Training) -> None:
    state, run = training.state, training.run
    started = time.monotonic()
    try:
        _save_once(run, state)
    except RunError as error:
        if error.status != 1 or not run.path.exists():
            raise
        training.log.warn(f"{error}. Trying once more")
        _save_once(run, state)
    training.saved = state.step
    run.prune(training.settings.keep_checkpoints)
    training.log.say(f"step {state.step}: checkpoint saved in {time.monotonic() - started:.1f} s")
    if training.samples:
        write_samples(
            run.path / "samples", state.step, vae=state.vae, clips=training.samples, weights=state.ema
        )


def _save_once(run: RunDir, state: TrainState) -> None:
    with run.stage(state.step) as folder:
        state.save(folder)


def _starting_point(run: RunDir, settings: TrainSettings) -> tuple[TrainSettings, Checkpoint | None]:
    """The settings in force and the checkpoint to go on from; records of later steps are dropped.

    Refuses changed mathematics, and a run that is not empty where --resume never was given.
    """
    if settings.resume == "never" and not run.was_empty:
        raise RunError(
            f"{run.path} is not empty and --resume never was given; choose another --exp_name, or leave --resume out "
            "to go on"
        )
    checkpoint = run.latest()
    if checkpoint is None and settings.resume not in ("auto", "never"):
        checkpoint = _checkpoint_at(Path(settings.resume))
    if checkpoint is not None:
        settings = _continue(settings, checkpoint.path.parent.parent / "config.yaml")
        torch.set_num_threads(read_counters(checkpoint.path)["threads"])
    run.rewind("metrics.jsonl", checkpoint.step if checkpoint is not None else 0)
    return settings, checkpoint


def _checkpoint_at(path: Path) -> Checkpoint:
    if not (path / "state.json").is_file():
        raise ConfigError(
            f"--resume {path}: no checkpoint is there; name a folder such as RUN/checkpoints/step-00001000 that holds "
            "state.json"
        )
    reason = damage(path)
    if reason is not None:
        raise RunError(f"--resume {path}: this checkpoint is damaged: {reason}; name an earlier one")
    return Checkpoint(read_counters(path)["step"], path, full=True)


def _continue(settings: TrainSettings, config: Path) -> TrainSettings:
    saved, _ = read_settings(TrainSettings, ["--config", str(config)])
    changed = changed_mathematics(saved, settings)
    if changed:
        listed = "; ".join(f"--{name}: {old} -> {new}" for name, old, new in changed)
        raise ConfigError(
            f"{config.parent} was trained with other settings, and with these it would not be the same run: {listed}. "
            "Give the old values, or choose another --exp_name"
        )
    return continued(saved, settings)


def _build_state(
    settings: TrainSettings, device: torch.device, *, start: Checkpoint | None
) -> tuple[TrainState, Origin | None]:
    config, tensors, origin = PRESETS[settings.model], None, None
    weights = start.path if start is not None else settings.load_from_checkpoint
    if weights is not None:
        config, tensors, origin = read_model(Path(weights))
    vae = build(config, seed=settings.seed)
    if tensors is not None and start is None:
        vae.load_state_dict(tensors, strict=True)
    vae = vae.to(device=device, memory_format=torch.channels_last_3d)
    ema = {name: p.detach().clone() for name, p in vae.named_parameters()} if settings.use_ema else {}
    critic = _critic(settings, device)
    logvar = nn.Parameter(
        torch.tensor(settings.logvar_init, device=device), requires_grad=settings.learn_logvar
    )
    learned = [("logvar", logvar)] if settings.learn_logvar else []
    how = {
        "kind": settings.optim,
        "lr": settings.start_learning_rate,
        "betas": settings.betas,
        "weight_decay": settings.weight_decay,
    }
    state = TrainState(
        vae=vae,
        ema=ema,
        critic=critic,
        logvar=logvar,
        optimizer=build_optimizer([*vae.named_parameters(), *learned], **how),
        critic_optimizer=build_optimizer(critic.named_parameters(), **how) if critic is not None else None,
    )
    if start is not None:
        state.load(start.path)
    return state, origin


def _critic(settings: TrainSettings, device: torch.device) -> nn.Module | None:
    if settings.disc_type == "none":
        return None
    base = rng.key("critic", settings.seed)
    return build_critic(settings.disc_type, base=base, norm=settings.disc_norm).to(device)


def _clip_plan(settings: TrainSettings) -> ClipPlan:
    return ClipPlan(
        frames=settings.video_num_frames,
        size=(settings.resolution.height, settings.resolution.width),
        stride=settings.sample_rate,
        batch=settings.batch_size * settings.gradient_accumulation_steps,
        seed=settings.seed,
        crop=settings.crop,
        flip=settings.flip,
        short_videos=settings.short_videos,
    )


def _loss_plan(settings: TrainSettings) -> LossPlan:
    return LossPlan(kind=settings.loss_type, kl_weight=settings.kl_weight, disc_weight=settings.disc_weight)


def _fixed_clips(source: ClipSource, plan: ClipPlan) -> list[Tensor]:
    """The first clips of the dataset that can be read, cropped at the centre: uint8 3 t h w each."""
    clips: list[Tensor] = []
    for index in range(min(len(source), 4 * NUM_SAMPLES)):
        try:
            clips.append(center_clip(source[index], plan))
        except VideoError:
            continue  # training meets it too and quarantines it with its reason
        if len(clips) == NUM_SAMPLES:
            break
    return clips


def _quarantine(run: RunDir, log: RunLog, record: dict[str, Any]) -> None:
    run.append("quarantine.jsonl", record)
    log.warn(f"{record['video']} is left out: {record['reason']}")


def _facts(source: ClipSource, origin: Origin | None) -> dict[str, Any]:  # Any: JSON
    """What a run stands on: versions, machine, data and weights."""
    return {
        "causalvae": causalvae.__version__,
        "python": platform.python_version(),
        "torch": asdict(torch_facts()),
        "machine": asdict(Machine.look()),
        "environment": environment(os.environ),
        "precision": "fp32",
        "amp_level": "O0",
        "jit_level": "O0",
        "deterministic": True,
        "weights": None if origin is None else {"file": str(origin.path), "sha256": origin.sha256},
        "dataset": {"name": source.name, "videos": len(source), "fingerprint": source.fingerprint},
    }


def _size_of(module: nn.Module) -> str:
    return f"{sum(p.numel() for p in module.parameters()) / 1e6:.1f} M parameters"


def _peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU where there is one, else the largest resident set of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
