"""What `explain` finds where a command meets a machine: its numbers, memory, cores, time and compiler.

Torch-free, as all findings: the plan of a step and the precision come as data.
"""

import math
from collections.abc import Iterator
from itertools import chain

from causalvae.findings import Case, Finding, ModelFacts, Place
from causalvae.machine import amount

GIB = 2**30
FULL_HD_BYTES = 3 * 1080 * 1920  # of a frame of a large video, before it is resized
CPU_PARAMETERS = 50_000_000  # a model of more takes days on a CPU
MANY_PASSES = 500  # over a dataset, from which on a model learns it by heart
DAY, HOUR, MINUTE = 86400, 3600, 60


def of_machine(case: Case) -> Iterator[Finding]:
    """What follows from the command on this machine."""
    if case.place is not None:
        place = case.place
        yield from chain(_precision(case, place), _scale(case), _workers(case, place), _device(case, place))
        yield from _compiler(case, place)
    yield from _memory(case)
    yield from _passes(case)
    yield from _time(case)


def duration(seconds: float) -> str:
    """A time for people in one unit, as a number and `d`, `h`, `min` or `s`."""
    for unit, name in ((DAY, "d"), (HOUR, "h"), (MINUTE, "min")):
        if seconds >= 1.5 * unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.3g} s"


def _precision(case: Case, place: Place) -> Iterator[Finding]:
    """What is asked for against what the hardware has, and what the level makes of it."""
    settings, inforce = case.settings, case.precision
    if inforce is None:
        return
    asked, values = settings.precision, {"precision": settings.precision, "level": settings.amp_level}
    values |= {"used": inforce.name, "device": place.device}
    if asked in place.capability.missing and settings.amp_level != "O0":
        why = place.capability.missing[asked]
        yield Finding("precision-missing", "warning", ("precision",), {**values, "why": why})
    elif asked in place.capability.remarks:
        why = place.capability.remarks[asked]
        yield Finding("precision-slow", "warning", ("precision",), {**values, "why": why})
    elif asked == "auto":
        yield Finding("precision-auto", "note", ("precision",), values)
    elif asked == "fp32" and place.device.startswith("cuda") and "bf16" not in place.capability.missing:
        yield Finding("precision-unused", "note", ("precision",), values)
    if inforce.level == "O0" and settings.amp_level != "O0" and "amp_level" in case.given:
        yield Finding("amp-no-effect", "note", ("amp_level", "precision"), values)
    elif inforce.level == "O0" and asked in ("bf16", "fp16") and settings.amp_level == "O0":
        yield Finding("amp-o0", "warning", ("amp_level", "precision"), values)


def _scale(case: Case) -> Iterator[Finding]:
    """A loss scale that is not needed, or not used."""
    given = [name for name in ("init_loss_scale", "loss_scale_window") if name in case.given]
    if case.precision is None or not given or case.precision.name == "fp16":
        return
    kind = "scale-no-effect" if case.precision.name == "fp32" else "scale-not-needed"
    yield Finding(kind, "note", tuple(given), {"flags": " ".join(f"--{name}" for name in given)})


def _workers(case: Case, place: Place) -> Iterator[Finding]:
    """Processes that decode, against cores, memory and shared memory."""
    workers, cores = case.settings.dataloader_num_workers, place.machine.cores
    flags = ("dataloader_num_workers",)
    values = {"workers": str(workers), "cores": str(cores)}
    if workers > cores:
        best = 1 if place.device == "cpu" else max(1, cores)
        yield Finding("workers-cores", "warning", flags, {**values, "best": str(best)})
    memory = place.machine.memory_bytes
    decoded = workers * _most_frames(case) * FULL_HD_BYTES
    if memory is not None and decoded > memory / 4:
        values |= {"needed": amount(decoded), "memory": amount(memory)}
        yield Finding("workers-memory", "warning", flags, values)
    shared = place.machine.shm_bytes
    needed = max(1, workers) * _clip_bytes(case)
    if shared is not None and workers and needed > shared:
        yield Finding("workers-shm", "warning", flags, {"needed": amount(needed), "shared": amount(shared)})


def _clip_bytes(case: Case) -> int:
    """Bytes of the largest clip, uint8."""
    sizes = case.settings.resolutions or (case.settings.resolution,)
    return 3 * _most_frames(case) * max(size.height * size.width for size in sizes)


def _most_frames(case: Case) -> int:
    return max(case.settings.frames or (case.settings.video_num_frames,))


def _device(case: Case, place: Place) -> Iterator[Finding]:
    model = case.model
    if place.device == "cpu" and model is not None and model.parameters > CPU_PARAMETERS:
        values = {"model": model.name, "millions": f"{model.parameters / 1e6:.0f}", "cpu": place.machine.cpu}
        yield Finding("cpu-slow", "warning", ("device", "model"), values)


def _compiler(case: Case, place: Place) -> Iterator[Finding]:
    level = case.settings.jit_level
    if level == "O0" or case.settings.mode == 1:
        return
    if place.compiler is not None:
        yield Finding("compiler-missing", "warning", ("jit_level",), {"level": level, "why": place.compiler})
    elif case.plan is not None and case.plan.recompute:
        yield Finding("jit-recompute", "warning", ("jit_level", "memory"), {"level": level})


def _memory(case: Case) -> Iterator[Finding]:
    """What a step takes, and how it is made to fit."""
    plan, flags = case.plan, ("batch_size", "memory", "resolution", "video_num_frames")
    if case.cramped is not None:
        yield Finding("memory-too-small", "problem", flags, {"said": case.cramped})
    if plan is None or case.peak_bytes is None:
        return
    budget = plan.budget_bytes
    values = {"peak": amount(case.peak_bytes), "parts": str(plan.parts)}
    if budget is None:
        yield Finding("memory-unknown", "note", flags, values)
        return
    values["budget"] = amount(budget)
    whole = plan.whole_bytes
    if not plan.recompute and plan.parts <= case.settings.gradient_accumulation_steps:
        yield Finding("memory-fits", "note", flags, values)
        return
    kind = "memory-split" if plan.parts > 1 else "memory-recompute"
    kind = "memory-parts" if plan.parts > 1 and not plan.recompute else kind
    values["whole"] = amount(whole if whole is not None else case.peak_bytes)
    yield Finding(kind, "note", flags, values)


def _passes(case: Case) -> Iterator[Finding]:
    """The length of the run in clips, and in passes over the videos."""
    steps, videos, flags = case.settings.max_steps, case.videos, ("max_steps", "batch_size", "video_path")
    if case.settings.mode == 2:
        return
    clips = steps * case.clips_per_step
    values = {"steps": f"{steps:,}", "batch": str(case.clips_per_step), "clips": f"{clips:,}"}
    if videos is None:
        yield Finding("clips", "note", flags, values)
        return
    passes = clips / videos
    values |= {"videos": f"{videos:,}", "passes": f"{passes:,.0f}" if passes >= 10 else f"{passes:.1f}"}
    needed = math.ceil(videos / case.clips_per_step)
    if passes < 1:
        yield Finding("passes-part", "warning", flags, {**values, "needed": f"{needed:,}"})
    elif passes > MANY_PASSES:
        yield Finding("passes-many", "warning", flags, values)
    else:
        yield Finding("passes", "note", flags, values)


def _time(case: Case) -> Iterator[Finding]:
    """How long the run takes, if a step was measured."""
    if case.settings.mode == 2:
        return
    if case.seconds is None:
        yield Finding("time-unknown", "note", ("max_steps",))
        return
    done = 0 if case.run is None else min(case.run.step, case.settings.max_steps)
    left = case.settings.max_steps - done
    values = {"each": duration(case.seconds), "left": f"{left:,}", "all": duration(case.seconds * left)}
    values["hour"] = f"{HOUR / case.seconds:,.0f}"
    yield Finding("time", "note", ("max_steps",), values)


def of_model(model: ModelFacts) -> Iterator[Finding]:
    """Whose model it is, and whether it can be streamed."""
    geometry = model.geometry
    values = {"model": model.name, "path": model.path or "", "why": model.why_not_streamable}
    values |= {"millions": f"{model.parameters / 1e6:.0f}", "channels": str(geometry.channels)}
    values["factors"] = f"{geometry.temporal}x{geometry.spatial}x{geometry.spatial}"
    flags = ("model",) if model.path is None else ("load_from_checkpoint",)
    yield Finding("model-preset" if model.path is None else "model-loaded", "note", flags, values)
    kind = "model-streams" if not model.why_not_streamable else "model-no-stream"
    yield Finding(kind, "note", flags, values)
