"""The loop of a training: steps, their records, saves, held-out evaluation, and what to do in trouble.

Reads TrainSettings, as `train.parts`, `train.networks` and `train.trainer` do.
"""

import copy
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
from causalvae.flags import flags_of, to_text
from causalvae.geometry import Geometry
from causalvae.losses import LossPlan
from causalvae.rundir import Checkpoint, RunDir, damage
from causalvae.train.compiling import back_to_eager, compile_errors, uncompiled
from causalvae.train.debug import BadPlace, Watch
from causalvae.train.heldout import evaluate_held_out, in_words
from causalvae.train.optim import (
    SMALLEST_SCALE,
    LossScale,
    clip_by_unit,
    clip_gradients,
    learning_rate,
    set_learning_rate,
)
from causalvae.train.plan import StepPlan, smaller
from causalvae.train.replay import explain_bad_step, write_replay
from causalvae.train.runlog import RunLog
from causalvae.train.samples import write_samples
from causalvae.train.signals import StopRequest
from causalvae.train.stability import MAX_ROLLBACKS, rollback_step
from causalvae.train.state import TrainState
from causalvae.train.step import Clipping, StepResult, train_step
from causalvae.video import to_model
from causalvae.worst import film_folder

MAX_SKIPPED = 20  # steps in a row that were not finite, after which a run stops
OUT_OF_MEMORY = ("can't allocate memory", "out of memory")  # words of torch's RuntimeError


@dataclass
class Training:
    """The parts of one run in one process. facts: what run.json says but for the warnings.

    loader: None where one step is repeated. samples: the clips that are reconstructed at every save, uint8
    3 t h w. held_out: videos for eval_steps. critic_stands: its last update was not finite, and was told.
    """

    settings: TrainSettings
    run: RunDir
    log: RunLog
    state: TrainState
    loader: ClipLoader | None
    loss: LossPlan
    samples: list[Tensor]
    held_out: ClipSource | None
    plan: ClipPlan
    step_plan: StepPlan
    facts: dict[str, Any]  # Any: JSON
    saved: int = -1
    critic_stands: bool = False


def train_until_done(training: Training, stop: StopRequest) -> None:
    """Steps until max_steps or a signal, with a checkpoint at the end."""
    state, settings = training.state, training.settings
    assert training.loader is not None, "a training has clips"
    while state.step < settings.max_steps and not stop.number:
        clips = next(training.loader)
        rate = _set_rate(training)
        result = _attempt(training, clips)
        _report(training, result, clips=clips, rate=rate)
        if not result.applied:
            if state.skipped >= MAX_SKIPPED:
                _diverged(training, [request.video.id for request in clips.requests])
            continue
        if state.level_off is not None and state.level_off.update(float(result.terms.pixel)):
            training.log.say(f"step {state.step}: the pixel error has levelled off; the critic starts")
        if state.step % settings.save_steps == 0 or state.step == settings.max_steps:
            _save(training)
        if settings.eval_steps > 0 and state.step % settings.eval_steps == 0:
            _evaluate(training)
    if stop.number and training.saved != state.step and state.step > 0:
        _save(training)


def repeat_step(training: Training, clips: Clips) -> BadPlace | None:
    """One step with these clips, watched as in mode 1, and nothing written."""
    _set_rate(training)
    with _watch(training) as watch:
        _step(training, clips)
    return watch.first


def record(run: RunDir, log: RunLog, facts: Mapping[str, Any]) -> None:
    """Say what the folder warned of since this was last called, and write run.json with every warning."""
    while run.warnings:
        log.warn(run.warnings.pop(0))
    run.write_json("run.json", {**facts, "warnings": log.warnings})


def evaluate_now(run: RunDir, log: RunLog, *, state: TrainState, videos: ClipSource, plan: ClipPlan) -> None:
    """Write an evaluation of the weights as they are into eval/ and tell its PSNR."""
    step, place = state.step, run.path / "eval"
    place.mkdir(exist_ok=True)
    name = f"step-{step:08d}.json"
    result = evaluate_held_out(state.vae, videos, plan, ema=state.ema, films=film_folder(place / name))
    run.write_json(f"eval/{name}", {"step": step, **result})
    for each in result["unreadable"]:
        log.warn(f"evaluation leaves out {each['video']}: {each['reason']}")
    log.say(f"step {step}: {in_words(result)}")


def _evaluate(training: Training) -> None:
    videos = training.held_out
    assert videos is not None, "the table refuses eval_steps without eval_video_path"
    with uncompiled(training.state.vae):
        evaluate_now(training.run, training.log, state=training.state, videos=videos, plan=training.plan)


def _attempt(training: Training, clips: Clips) -> StepResult:
    """A step; once more and eager if a block can't be compiled, in less memory if there is too little."""
    state = training.state
    counts = state.step, state.cursor
    buffers = [] if state.critic is None else [buffer.clone() for buffer in state.critic.buffers()]
    while True:
        try:
            return _watched_step(training, clips) if training.settings.mode == 1 else _step(training, clips)
        except compile_errors() as error:
            training.log.warn(back_to_eager(state.vae, error, level=training.settings.jit_level))
            training.facts["jit_level"] = "O0"
            record(training.run, training.log, training.facts)
        except RuntimeError as error:
            if state.step != counts[0]:
                raise _half_done(training, error) from error
            _plan_smaller(training, error, clips=len(clips.pixels))
        state.cursor = counts[1]
        for network in (state.vae, state.critic):
            if network is not None:
                network.zero_grad(set_to_none=True)
        if state.critic is not None:
            for buffer, before in zip(state.critic.buffers(), buffers, strict=True):
                buffer.copy_(before)


def _watch(training: Training) -> Watch:
    state = training.state
    return Watch({"vae": state.vae} | ({} if state.critic is None else {"critic": state.critic}))


def _watched_step(training: Training, clips: Clips) -> StepResult:
    """A step of mode 1: the first value that is not finite is named, and the step kept to be repeated."""
    before = copy.deepcopy(training.state)
    with _watch(training) as watch:
        result = _step(training, clips)
    if watch.first is not None:
        flags = flags_of(training.settings)
        folder = write_replay(
            training.run.path / "debug",
            before,
            clips=clips,
            bad=watch.first,
            terms=result.terms.numbers(),
            settings={name: to_text(flag, getattr(training.settings, name)) for name, flag in flags.items()},
        )
        found = explain_bad_step(watch.first, folder, step=before.step + 1, clips=clips)
        if not result.applied and training.state.scale is None:  # else an overflow that the scale follows
            raise RunError(found, status=1)
        training.log.warn(found)
    return result


def _plan_smaller(training: Training, error: RuntimeError, *, clips: int) -> None:
    """Plan for less memory where there was too little; raises where that is not it, or can't be helped."""
    if not _out_of_memory(error):
        raise error
    plan = smaller(training.step_plan, clips=clips)
    if plan is None:
        raise RunError(
            f"step {training.state.step + 1}: there is not enough memory for a step of this size; "
            f"{_again(training)} with a lower --batch_size, --resolution or --video_num_frames",
            status=1,
        ) from error
    training.step_plan = plan
    training.state.kept |= {"parts": plan.parts, "recompute": plan.recompute}
    training.state.vae.set_recompute(on=plan.recompute)
    training.log.warn(f"there was not enough memory, the step is done again. {plan.sentence()}")


def _half_done(training: Training, error: RuntimeError) -> RuntimeError | RunError:
    """What to raise where the autoencoder was updated and the critic then failed: no step can be repeated."""
    if not _out_of_memory(error):
        return error
    return RunError(
        f"step {training.state.step}: the critic found too little memory; give the command again with "
        f"--memory lean, or {_again(training)} with a smaller --batch_size",
        status=1,
    )


def _again(training: Training) -> str:
    """How to begin again with other settings: a run that has a checkpoint refuses them."""
    if not any(each.full for each in training.run.checkpoints()):
        return "start again"
    path = training.run.path / "checkpoints" / "step-N"
    return f"start another run from a good checkpoint (--exp_name NEW --load_from_checkpoint {path})"


def _out_of_memory(error: RuntimeError) -> bool:
    return any(words in str(error) for words in OUT_OF_MEMORY)


def _set_rate(training: Training) -> float:
    """The learning rate of the next step, given to the optimisers."""
    state, settings = training.state, training.settings
    rate = state.rate_factor * learning_rate(
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
    return rate


def _step(training: Training, clips: Clips) -> StepResult:
    state, settings = training.state, training.settings
    device = state.logvar.device
    x = to_model(clips.pixels.to(device)).contiguous(memory_format=torch.channels_last_3d)
    noise = draw_noise(state.vae.geometry, x.shape, seed=settings.seed, cursor=state.cursor).to(device)
    return train_step(
        state,
        x,
        noise,
        loss=training.loss,
        critic_loss=settings.disc_loss if _judging(training) else None,
        parts=min(training.step_plan.parts, len(x)),
        clipping=_clipping(settings),
        ema_decay=settings.ema_decay,
    )


def _judging(training: Training) -> bool:
    """Whether the critic takes part in the next step."""
    state, settings = training.state, training.settings
    if state.critic is None:
        return False
    if state.level_off is not None:
        return state.level_off.done
    return settings.disc_start is not None and state.step >= settings.disc_start


def _clipping(settings: TrainSettings) -> Clipping:
    if not settings.clip_grad:
        return clip_gradients
    if settings.clip_grad_mode == "agc":
        return partial(clip_by_unit, factor=settings.agc_factor)
    return partial(clip_gradients, max_norm=settings.max_grad_norm)


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
    several = len(training.plan.shapes()) > 1
    shape = dict(zip(("frames", "height", "width"), clips.pixels.shape[2:], strict=True)) if several else {}
    numbers: dict[str, float | None] = {
        "cursor": training.state.cursor,
        **shape,
        **result.terms.numbers(),
        "learning_rate": rate,
        "grad_norm": result.grad_norm,
        "critic_grad_norm": result.critic_grad_norm,
        "loss_scale": result.loss_scale,
        "critic_loss_scale": result.critic_loss_scale,
        "memory_gib": _peak_memory(training.state.logvar.device) / 2**30,
    }
    if not result.applied:
        numbers = {name: numbers[name] for name in ("cursor", "learning_rate", "loss_scale")}
        numbers["skipped"] = training.state.skipped
        training.log.warn(
            f"step {training.state.step}: loss or gradients not finite, nothing updated"
            f"{_falls(training.state.scale)}; clips: {', '.join(names)}"
        )
    stands, before = result.critic_stands, training.critic_stands
    if result.applied:
        training.critic_stands = stands
    if stands and not before:
        training.log.warn(
            f"step {training.state.step}: the critic's gradients are not finite, it was not updated"
            f"{_falls(training.state.critic_scale)}"
        )
    training.log.step(
        training.state.step,
        numbers,
        clips=len(names),
        wait=training.loader.take_wait() if training.loader is not None else 0.0,
        notable=not result.applied or (stands and not before),
    )


def _falls(scale: LossScale | None) -> str:
    """What a loss scale makes of gradients that were not finite, as the end of a warning."""
    return "" if scale is None else f"; the loss scale falls to {scale.value:g}"


def _diverged(training: Training, names: Sequence[str]) -> None:
    """Go back to an earlier checkpoint, or RunError where that was not asked for or can't help."""
    state, run, step = training.state, training.run, training.state.step
    trouble = f"{MAX_SKIPPED} steps in a row were not finite, last with {', '.join(names)}"
    target = _way_back(training) if training.settings.on_divergence == "rollback" else None
    if target is None:
        gone_back = f" after {state.rollbacks} rollbacks" if state.rollbacks else ""
        remedy = "a lower --start_learning_rate or with --clip_grad True; --mode 1 names the first bad place"
        if state.scale is not None and state.scale.value > SMALLEST_SCALE:
            remedy = f"a smaller --init_loss_scale: it has fallen to {state.scale.value:g} and is too large"
        raise RunError(f"{trouble}{gone_back}; {_again(training)} with {remedy}", status=1)
    state.roll_back(target.path)
    run.set_aside_after(state.step)
    run.rewind("metrics.jsonl", state.step)
    training.log.warn(
        f"step {step}: {trouble}. Rollback {state.rollbacks} of {MAX_ROLLBACKS}: back to step {state.step}, "
        f"with {state.rate_factor:g} times the learning rate and the clips that come next"
    )
    record(run, training.log, training.facts)


def _way_back(training: Training) -> Checkpoint | None:
    """The checkpoint to go back to, whole and from before the trouble; None if none can help."""
    state = training.state
    if state.rollbacks >= MAX_ROLLBACKS:
        return None
    whole = [each for each in training.run.checkpoints() if each.full and damage(each.path) is None]
    save_steps = training.settings.save_steps
    step = rollback_step(
        [each.step for each in whole], before=state.step, tried=state.went_back_to, save_steps=save_steps
    )
    return next((each for each in whole if each.step == step), None)


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
        with uncompiled(state.vae):
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
