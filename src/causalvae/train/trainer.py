"""The training of a video VAE from settings to a run's folder: what is opened, built and closed around the
loop.

Reads TrainSettings, as `train.parts`, `train.networks` and `train.loop` do; what is below them takes plain
arguments.
"""

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from causalvae.config import TrainSettings, notices, to_yaml
from causalvae.data.clips import ClipPlan, center_clip
from causalvae.data.index import prepare
from causalvae.data.loader import ClipLoader
from causalvae.data.quarantine import Record, as_lines, read_quarantine
from causalvae.data.sources import ClipSource, open_source
from causalvae.errors import VideoError
from causalvae.files import redact
from causalvae.flags import Given
from causalvae.machine import home, pick_device
from causalvae.perceptual import Perceptual
from causalvae.rundir import Checkpoint, RunDir, run_path
from causalvae.train.compiling import JitLevel, compile_blocks
from causalvae.train.heldout import check_held_out
from causalvae.train.loop import Training, evaluate_now, record, repeat_step, train_until_done
from causalvae.train.networks import Built, build_state
from causalvae.train.parts import (
    check_start,
    choose_precision,
    clip_plan,
    facts_before,
    find_perceptual,
    loss_plan,
    replayed,
    run_facts,
    starting_point,
)
from causalvae.train.precision import Precision
from causalvae.train.replay import read_replay
from causalvae.train.runlog import RunLog
from causalvae.train.signals import StopRequest, stop_on_signal
from causalvae.weights.load import Loaded

QUARANTINE = "quarantine.jsonl"
ERROR = 2  # torch's deterministic mode in which a kernel that isn't raises
NUM_SAMPLES = 2  # fixed clips that are reconstructed at every save


@dataclass(frozen=True)
class RunResult:
    """Where a run is and how it ended: status 0, or 128 + the signal that stopped it."""

    path: Path
    status: int
    step: int


@dataclass(frozen=True)
class _Asked:
    """What a call of `train` was given, opened: settings in force, videos, where to compute, when to stop.

    left_out: records of videos that --quarantine says can't be used.
    """

    settings: TrainSettings
    given: Mapping[str, Given] | None
    command: Sequence[str]
    device: torch.device
    source: ClipSource
    left_out: Sequence[Record]
    held_out: ClipSource | None
    perceptual: Perceptual | None
    precision: Precision
    loaded: Loaded | None
    stop: StopRequest


def train(
    settings: TrainSettings,
    *,
    given: Mapping[str, Given] | None = None,
    command: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> RunResult:
    """Train until max_steps, or go on where the run stopped. Returns when it is done or a signal asked to
    stop.

    given: what was not a default and where it came from, for config.yaml. command: as typed, for run.json.
    notes: on how it was read, to warn of.
    Raises ConfigError for a mistake in what was asked, RunError if the run can't start or can't go on.
    """
    warnings = [*notes, *notices(settings, given)]
    device = torch.device(pick_device(settings.device))
    source = open_source(settings.video_path)
    left_out = read_quarantine(Path(settings.quarantine), source) if settings.quarantine is not None else []
    held_out = open_source(settings.eval_video_path) if settings.eval_video_path is not None else None
    if held_out is not None:
        check_held_out(held_out, clip_plan(settings))
    path = run_path(settings.output_dir, settings.exp_name)
    loaded = check_start(settings, path)
    began = facts_before(settings, path)
    perceptual, more = find_perceptual(settings, path, began=began)
    if perceptual is not None:
        perceptual.module.to(device)
    precision = choose_precision(settings, device, began=began)
    with deterministic(compiled=settings.jit_level != "O0"), stop_on_signal() as stop, RunDir(path) as run:
        settings, start = starting_point(run, settings, source=source)
        with RunLog(
            run, max_steps=settings.max_steps, log_steps=settings.log_steps, tensorboard=settings.tensorboard
        ) as log:
            for warning in [*warnings, *precision.warnings, *more]:
                log.warn(warning)
            chosen = (settings, given, command, device, source, left_out, held_out)
            asked = _Asked(*chosen, perceptual, precision, loaded, stop)
            step = _work(asked, run, log, start=start)
    return RunResult(path, stop.status, step)


def _work(asked: _Asked, run: RunDir, log: RunLog, *, start: Checkpoint | None) -> int:
    """Evaluate or train; the step at the end."""
    settings, built = asked.settings, _built(asked, start=start)
    state = built.state
    if settings.mode == 2:
        videos = asked.held_out or asked.source
        evaluate_now(run, log, state=state, videos=videos, plan=clip_plan(settings))
        return state.step
    replay = replayed(settings)
    if replay is not None:
        _repeat(asked, run, log, built=built, folder=replay)
        return state.step
    run.write_text("config.yaml", to_yaml(settings, asked.given))
    facts = {
        "command": redact(asked.command),
        "device": str(asked.device),
        **run_facts(asked.source, built.weights, perceptual=asked.perceptual, precision=built.precision),
        "jit_level": "O0" if settings.mode == 1 else settings.jit_level,
    }
    for line in built.notes:
        log.say(line)
    for line in built.warnings:
        log.warn(line)
    record(run, log, facts)
    if state.step >= settings.max_steps:
        log.say(f"{run.path} is already at step {state.step}; raise --max_steps to go on")
        return state.step
    _train(asked, run, log, built=built, facts=facts)
    record(run, log, facts)
    log.say(f"step {state.step}: {'stopped' if asked.stop.number else 'done'}; the run is in {run.path}")
    return state.step


def _built(asked: _Asked, *, start: Checkpoint | None) -> Built:
    given = asked.given or {}
    return build_state(
        asked.settings,
        asked.device,
        start=start,
        loaded=asked.loaded,
        precision=asked.precision,
        loss=loss_plan(asked.settings, asked.perceptual),
        scaled=[name for name in ("init_loss_scale", "loss_scale_window") if name in given],
    )


@contextmanager
def deterministic(*, compiled: bool) -> Iterator[None]:
    """Kernels that give the same bits every time, so that a resumed run is the one never interrupted.

    On a CPU this changes nothing. cuBLAS reads its variable when the first matrix product is made.
    compiled: the compiler of torch is told as well.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    options: Any = torch.utils.deterministic  # Any: its option is a property that the stubs lack
    before = torch.get_deterministic_debug_mode(), options.fill_uninitialized_memory
    _set_deterministic(ERROR, compiled=compiled)
    options.fill_uninitialized_memory = False  # a help for debugging that costs a pass over memory
    try:
        yield
    finally:
        _set_deterministic(before[0], compiled=compiled)
        options.fill_uninitialized_memory = before[1]


def _set_deterministic(mode: int, *, compiled: bool) -> None:
    """mode: as torch numbers them. compiled: imports the compiler to tell it, which takes 0.9 s."""
    if compiled:
        torch.use_deterministic_algorithms(mode > 0, warn_only=mode < ERROR)
    else:
        torch.set_deterministic_debug_mode(mode)


def _train(
    asked: _Asked,
    run: RunDir,
    log: RunLog,
    *,
    built: Built,
    facts: dict[str, Any],  # Any: JSON
) -> None:
    settings, source, state = asked.settings, asked.source, built.state
    plan = clip_plan(settings)
    with _loader(asked, run, log, plan=plan, cursor=state.cursor) as loader:
        training = _training(asked, run, log, built=built, loader=loader, facts=facts)
        training.samples += _fixed_clips(source, plan, left_out=_unusable(run.records(QUARANTINE)).keys())
        log.say(f"{settings.exp_name}: {len(source)} videos, {_size_of(state.vae)}, from step {state.step}")
        for warning in _compile(settings, built, level=facts["jit_level"]):
            facts["jit_level"] = "O0"
            log.warn(warning)
        log.start(state.step)
        train_until_done(training, asked.stop)


def _training(
    asked: _Asked,
    run: RunDir,
    log: RunLog,
    *,
    built: Built,
    loader: ClipLoader | None,
    facts: dict[str, Any],  # Any: JSON
) -> Training:
    return Training(
        settings=asked.settings,
        run=run,
        log=log,
        state=built.state,
        loader=loader,
        loss=loss_plan(asked.settings, asked.perceptual),
        samples=[],
        held_out=asked.held_out,
        plan=clip_plan(asked.settings),
        step_plan=built.plan,
        facts=facts,
    )


def _compile(settings: TrainSettings, built: Built, *, level: JitLevel) -> list[str]:
    """Have blocks compiled; warnings where that can't be."""
    if level != "O0" and built.plan.recompute:
        return [f"--jit_level {settings.jit_level} has no effect: blocks that are recomputed run eager"]
    return compile_blocks(built.state.vae, level)


def _repeat(asked: _Asked, run: RunDir, log: RunLog, *, built: Built, folder: Path) -> None:
    """The bad step of a folder once more; nothing of the run is changed."""
    replay = read_replay(folder)
    training = _training(asked, run, log, built=built, loader=None, facts={})
    bad = repeat_step(training, replay.clips)
    found = "this time every value was finite" if bad is None else bad.sentence()
    log.say(f"step {replay.step} of {folder} again: {found}")


def _loader(asked: _Asked, run: RunDir, log: RunLog, *, plan: ClipPlan, cursor: int) -> ClipLoader:
    """The clips from this cursor on; bad videos are told once, and known ones not even opened."""
    unusable = _unusable(run.records(QUARANTINE))
    new = [record for record in asked.left_out if record["video"] not in unusable]
    if new:
        run.append_text(QUARANTINE, as_lines(new))
        log.say(f"{len(new)} videos are left out, as --quarantine {asked.settings.quarantine} says")
    known = run.records(QUARANTINE)
    index, warnings = prepare(home(os.environ))
    for warning in warnings:
        log.warn(warning)

    def quarantine(record: Record) -> None:
        run.append(QUARANTINE, record)
        log.warn(f"{record['video']} is left out: {record['reason']}")

    return ClipLoader(
        asked.source,
        plan,
        cursor=cursor,
        workers=asked.settings.dataloader_num_workers,
        clip_timeout=asked.settings.clip_timeout,
        known=dict.fromkeys(record["video"] for record in known) | _unusable(known),
        index=index,
        on_quarantine=quarantine,
    )


def _unusable(records: Sequence[Record]) -> dict[str, str]:
    """Videos that are bad as a whole, with the reason."""
    return {record["video"]: record["reason"] for record in records if record["whole"]}


def _fixed_clips(source: ClipSource, plan: ClipPlan, *, left_out: Collection[str]) -> list[Tensor]:
    """The first clips of the dataset that can be read, cropped at the centre: uint8 3 t h w each."""
    clips: list[Tensor] = []
    for index in range(min(len(source), 4 * NUM_SAMPLES)):
        if source[index].id in left_out:
            continue
        try:
            clips.append(center_clip(source[index], plan))
        except VideoError:
            continue  # training meets it too and quarantines it with its reason
        if len(clips) == NUM_SAMPLES:
            break
    return clips


def _size_of(module: nn.Module) -> str:
    return f"{sum(p.numel() for p in module.parameters()) / 1e6:.1f} M parameters"
