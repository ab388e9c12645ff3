"""The loop of a training: steps, their records, saves, held-out evaluation, and what to do in trouble.

Reads TrainSettings together with `train.parts` and `train.trainer`.
"""

import resource
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from causalvae import rng
from causalvae.config import TrainSettings, decay_steps, warmup_steps
from causalvae.data.clips import ClipPlan
from causalvae.data.loader import ClipLoader, Clips
from causalvae.data.sources import ClipSource
from causalvae.errors import RunError
from causalvae.geometry import Geometry
from causalvae.losses import LossPlan
from causalvae.rundir import RunDir
from causalvae.train.heldout import evaluate_held_out
from causalvae.train.optim import clip_gradients, learning_rate, set_learning_rate
from causalvae.train.runlog import RunLog
from causalvae.train.samples import write_samples
from causalvae.train.signals import StopRequest
from causalvae.train.state import TrainState
from causalvae.train.step import StepResult, train_step
from causalvae.video import to_model

MAX_SKIPPED = 20  # steps in a row that were not finite, after which a run stops
OUT_OF_MEMORY = ("can't allocate memory", "out of memory")  # words of torch's RuntimeError


@dataclass
class Training:
    """The parts of one run in one process. facts: what run.json says but for the warnings.

    samples: the clips that are reconstructed at every save, uint8 3 t h w. held_out: videos for eval_steps.
    """

    settings: TrainSettings
    run: RunDir
    log: RunLog
    state: TrainState
    loader: ClipLoader
    loss: LossPlan
    samples: list[Tensor]
    held_out: ClipSource | None
    plan: ClipPlan
    facts: dict[str, Any]  # Any: JSON
    skipped: int = 0
    saved: int = -1


def train_until_done(training: Training, stop: StopRequest) -> None:
    """Steps until max_steps or a signal, with a checkpoint at the end."""
    state, settings = training.state, training.settings
    while state.step < settings.max_steps and not stop.number:
        try:
            result = _step(training, next(training.loader))
        except RuntimeError as error:
            raise _explained(error, training) from error
        if not result.applied:
            continue
        if state.step % settings.save_steps == 0 or state.step == settings.max_steps:
            _save(training)
        if settings.eval_steps > 0 and state.step % settings.eval_steps == 0:
            _evaluate(training)
    if stop.number and training.saved != state.step and state.step > 0:
        _save(training)


def record(run: RunDir, log: RunLog, facts: Mapping[str, Any]) -> None:
    """Say what the folder warned of since this was last called, and write run.json with every warning."""
    while run.warnings:
        log.warn(run.warnings.pop(0))
    run.write_json("run.json", {**facts, "warnings": log.warnings})


def report_held_out(run: RunDir, log: RunLog, *, step: int, result: Mapping[str, Any]) -> None:
    """Write an evaluation into eval/ and tell its mean."""
    (run.path / "eval").mkdir(exist_ok=True)
    run.write_json(f"eval/step-{step:08d}.json", {"step": step, **result})
    for each in result["unreadable"]:
        log.warn(f"evaluation leaves out {each['video']}: {each['reason']}")
    log.say(
        f"step {step}: {result['psnr']:.2f} dB PSNR ({result['weights']} weights) on {len(result['clips'])} "
        "held-out clips"
    )


def _evaluate(training: Training) -> None:
    state, held_out = training.state, training.held_out
    assert held_out is not None, "the table refuses eval_steps without eval_video_path"
    result = evaluate_held_out(state.vae, held_out, training.plan, weights=state.ema)
    report_held_out(training.run, training.log, step=state.step, result=result)


def _explained(error: RuntimeError, training: Training) -> Exception:
    """Torch's error as one that a user can act on, where it is a lack of memory; else the error itself."""
    if not any(words in str(error) for words in OUT_OF_MEMORY):
        return error
    return RunError(
        f"step {training.state.step + 1}: there is not enough memory for a step of this size; lower "
        "--batch_size, --resolution or --video_num_frames. The last checkpoint is intact",
        status=1,
    )


def _step(training: Training, clips: Clips) -> StepResult:
    state, settings = training.state, training.settings
    device = state.logvar.device
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
        clipping=partial(clip_gradients, max_norm=settings.max_grad_norm if settings.clip_grad else None),
        ema_decay=settings.ema_decay,
    )
    _report(training, result, clips=clips, rate=rate)
    return result


def draw_noise(geometry: Geometry, shape: Sequence[int], *, seed: int, cursor: int) -> Tensor:
    """Noise of a batch of clips b 3 t h w: b c k h w, a function of (seed, cursor, sample, latent frame)."""
    c, k, h, w = geometry.latent_shape(*shape[2:])
    clips = [
        torch.stack([rng.normal((c, h, w), rng.key("noise", seed, cursor, i, j)) for j in range(k)], dim=1)
        for i in range(shape[0])
    ]
    return torch.stack(clips)


def _report(training: Training, result: StepResult, *, clips: Clips, rate: float) -> None:
    names = [request.video.id for request in clips.requests]
    shape = dict(zip(("frames", "height", "width"), clips.pixels.shape[2:], strict=True))
    training.skipped = 0 if result.applied else training.skipped + 1
    if len(training.plan.shapes()) == 1:
        shape = {}
    numbers: dict[str, float | None] = {
        "cursor": training.state.cursor,
        **shape,
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


def _save(training: Training) -> None:
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
    record(run, training.log, training.facts)
    training.log.say(f"step {state.step}: checkpoint saved in {time.monotonic() - started:.1f} s")
    if training.samples:
        write_samples(
            run.path / "samples", state.step, vae=state.vae, clips=training.samples, weights=state.ema
        )


def _save_once(run: RunDir, state: TrainState) -> None:
    with run.stage(state.step) as folder:
        state.save(folder)


def _peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU where there is one, else the largest resident set of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
