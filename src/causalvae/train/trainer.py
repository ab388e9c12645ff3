"""The training of a video VAE from settings to a run's folder: the loop, its records, saves and signals.

Reads TrainSettings together with `train.parts`; everything below takes plain arguments.
"""

import os
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from causalvae import rng
from causalvae.config import TrainSettings, decay_steps, notices, to_yaml, warmup_steps
from causalvae.data.clips import ClipPlan, center_clip
from causalvae.data.loader import ClipLoader
from causalvae.data.sources import ClipSource, open_source
from causalvae.errors import RunError, VideoError
from causalvae.files import redact
from causalvae.flags import Given
from causalvae.geometry import Geometry
from causalvae.losses import LossPlan
from causalvae.machine import pick_device
from causalvae.rundir import RunDir, run_path
from causalvae.train.optim import learning_rate, set_learning_rate
from causalvae.train.parts import build_state, check_start, clip_plan, loss_plan, run_facts, starting_point
from causalvae.train.runlog import RunLog
from causalvae.train.samples import write_samples
from causalvae.train.signals import StopRequest, stop_on_signal
from causalvae.train.state import TrainState
from causalvae.train.step import StepResult, train_step
from causalvae.video import to_model

MAX_SKIPPED = 20  # steps in a row that were not finite, after which a run stops
NUM_SAMPLES = 2  # fixed clips that are reconstructed at every save
OUT_OF_MEMORY = ("can't allocate memory", "out of memory")  # words of torch's RuntimeError


@dataclass(frozen=True)
class RunResult:
    """Where a run is and how it ended: status 0, or 128 + the signal that stopped it."""

    path: Path
    status: int
    step: int


@dataclass
class _Training:
    """The parts of one run in one process. facts: what run.json says but for the warnings."""

    settings: TrainSettings
    run: RunDir
    log: RunLog
    state: TrainState
    loader: ClipLoader
    loss: LossPlan
    samples: list[Tensor]
    facts: dict[str, Any]  # Any: JSON
    skipped: int = 0
    saved: int = -1


def train(
    settings: TrainSettings, *, given: Mapping[str, Given] | None = None, command: Sequence[str] = ()
) -> RunResult:
    """Train until max_steps, or go on where the run stopped. Returns when it is done or a signal asked to
    stop.

    given: what was not a default and where it came from, for config.yaml. command: as typed, for run.json.
    Raises ConfigError for a mistake in what was asked, RunError if the run can't start or can't go on.
    """
    warnings = notices(settings, given)
    device = torch.device(pick_device(settings.device))
    source = open_source(settings.video_path)
    path = run_path(settings.output_dir, settings.exp_name)
    check_start(settings, path)
    with deterministic(), stop_on_signal() as stop, RunDir(path) as run:
        settings, start = starting_point(run, settings, source=source)
        with RunLog(
            run, max_steps=settings.max_steps, log_steps=settings.log_steps, tensorboard=settings.tensorboard
        ) as log:
            for warning in warnings:
                log.warn(warning)
            state, origin = build_state(settings, device, start=start)
            run.write_text("config.yaml", to_yaml(settings, given))
            facts = {"command": redact(command), "device": str(device), **run_facts(source, origin)}
            _record(run, log, facts)
            if state.step < settings.max_steps:
                _run(settings, run, log, state=state, source=source, stop=stop, facts=facts)
                _record(run, log, facts)
                log.say(
                    f"step {state.step}: {'stopped' if stop.number else 'done'}; the run is in {run.path}"
                )
            else:
                log.say(f"{run.path} is already at step {state.step}; raise --max_steps to go on")
    return RunResult(run.path, stop.status, state.step)


@contextmanager
def deterministic() -> Iterator[None]:
    """Kernels that give the same bits every time, so that a resumed run is the one never interrupted.

    On a CPU this changes nothing. cuBLAS reads its variable when the first matrix product is made.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    options: Any = torch.utils.deterministic  # Any: its option is a property that the stubs lack
    before = torch.are_deterministic_algorithms_enabled(), options.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    options.fill_uninitialized_memory = False  # a help for debugging that costs a pass over memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        options.fill_uninitialized_memory = before[1]


def _run(
    settings: TrainSettings,
    run: RunDir,
    log: RunLog,
    *,
    state: TrainState,
    source: ClipSource,
    stop: StopRequest,
    facts: dict[str, Any],
) -> None:
    plan = clip_plan(settings)
    known = run.records("quarantine.jsonl")

    def quarantine(record: dict[str, Any]) -> None:
        run.append("quarantine.jsonl", record)
        log.warn(f"{record['video']} is left out: {record['reason']}")

    with ClipLoader(
        source,
        plan,
        cursor=state.cursor,
        workers=settings.dataloader_num_workers,
        clip_timeout=settings.clip_timeout,
        quarantined={record["video"] for record in known},
        unreadable={record["video"]: record["reason"] for record in known if record["whole"]},
        on_quarantine=quarantine,
    ) as loader:
        samples = _fixed_clips(source, plan)
        training = _Training(settings, run, log, state, loader, loss_plan(settings), samples, facts)
        log.say(f"{settings.exp_name}: {len(source)} videos, {_size_of(state.vae)}, from step {state.step}")
        log.start(state.step)
        _loop(training, stop)


def _loop(training: _Training, stop: StopRequest) -> None:
    state, settings = training.state, training.settings
    while state.step < settings.max_steps and not stop.number:
        try:
            result = _step(training)
        except RuntimeError as error:
            raise _explained(error, training) from error
        if result.applied and (state.step % settings.save_steps == 0 or state.step == settings.max_steps):
            _save(training)
    if stop.number and training.saved != state.step and state.step > 0:
        _save(training)


def _explained(error: RuntimeError, training: _Training) -> Exception:
    """Torch's error as one that a user can act on, where it is a lack of memory; else the error itself."""
    if not any(words in str(error) for words in OUT_OF_MEMORY):
        return error
    return RunError(
        f"step {training.state.step + 1}: there is not enough memory for a step of this size; lower "
        "--batch_size, --resolution or --video_num_frames. The last checkpoint is intact",
        status=1,
    )


def _record(run: RunDir, log: RunLog, facts: Mapping[str, Any]) -> None:
    """Say what the folder warned of since this was last called, and write run.json with every warning."""
    while run.warnings:
        log.warn(run.warnings.pop(0))
    run.write_json("run.json", {**facts, "warnings": log.warnings})


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
    judging = (
        state.critic is not None and settings.disc_start is not None and state.step >= settings.disc_start
    )
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
            f"step {training.state.step}: loss or gradients not finite, nothing updated; clips: "
            f"{', '.join(names)}"
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
            f"{MAX_SKIPPED} steps in a row were not finite, last with {', '.join(names)}. The checkpoints "
            "before are good: start again with a lower --start_learning_rate or with --clip_grad True",
            status=1,
        )


def _save(training: _Training) -> None:
    state, run = training.state, training.run
    started = time.monotonic()
    try:
        _save_once(run, state)
    except RunError as error:
        if error.__cause__ is None or not run.path.exists():  # not the disk's: it would fail again
            raise
        training.log.warn(f"{error}. Trying once more")
        _save_once(run, state)
    training.saved = state.step
    run.prune(training.settings.keep_checkpoints)
    _record(run, training.log, training.facts)
    training.log.say(f"step {state.step}: checkpoint saved in {time.monotonic() - started:.1f} s")
    if training.samples:
        write_samples(
            run.path / "samples", state.step, vae=state.vae, clips=training.samples, weights=state.ema
        )


def _save_once(run: RunDir, state: TrainState) -> None:
    with run.stage(state.step) as folder:
        state.save(folder)


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


def _size_of(module: nn.Module) -> str:
    return f"{sum(p.numel() for p in module.parameters()) / 1e6:.1f} M parameters"


def _peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU where there is one, else the largest resident set of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
