"""What `explain` finds about paths: what is missing, what is dangerous, what a disk has room for."""

import os
import re
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path

from causalvae.commandlines import Command
from causalvae.config import TrainSettings
from causalvae.errors import ConfigError
from causalvae.findings import Case, Finding, ModelFacts
from causalvae.machine import amount
from causalvae.rundir import run_path

TEMPORARY = ("/tmp", "/var/tmp", "/dev/shm", "/run")  # emptied when the machine starts, or sooner
PATHS = ("output_dir", "video_path", "eval_video_path", "load_from_checkpoint", "model_config", "config")
DEVICE_VARIABLES = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "CAUSALVAE_ASSUME_BF16")
TIGHT = 0.9  # of the free disk


def of_command(command: Command) -> Iterator[Finding]:
    """What stands around the flags: launchers, variables, what only a shell knows."""
    if command.processes is not None and command.processes > 1:
        yield Finding("launcher", "problem", (), {"count": str(command.processes)})
    for name in DEVICE_VARIABLES:
        if name in command.variables:
            yield Finding("variable", "note", (), {"name": name, "value": command.variables[name]})
    for text in dict.fromkeys(command.unknown):
        yield Finding("shell-unknown", "warning", (), {"text": text})
    if command.others:
        yield Finding("script-more", "note", (), {"count": str(command.others)})


def of_paths(case: Case) -> Iterator[Finding]:
    """Dangerous paths, a run that is there already, and the disk."""
    settings = case.settings
    yield from chain(_unexpanded(settings), _output(settings), _held_out(settings))
    yield from _run(case)
    if case.model is not None:
        yield from _disk(case, case.model)


def missing_weights(settings: TrainSettings) -> Finding | None:
    """A checkpoint that is not there."""
    path = settings.load_from_checkpoint
    if path is None or os.path.exists(path):
        return None
    values = {"path": path, "model": settings.model}
    return Finding("weights-missing", "problem", ("load_from_checkpoint",), values)


def missing_videos(name: str, path: str, said: str) -> Finding:
    """Videos that can't be opened. name: of the flag. said: why, as the run would say it."""
    kind = "videos-unusable" if os.path.exists(path) else "videos-missing"
    kind = "ucf101-missing" if kind == "videos-missing" and "ucf101" in path.lower() else kind
    return Finding(kind, "problem", (name,), {"path": path, "said": said, "flag": name})


def _unexpanded(settings: TrainSettings) -> Iterator[Finding]:
    """Paths with what a shell would have replaced, and with characters that nobody sees."""
    for name in PATHS:
        path = getattr(settings, name)
        if path is None:
            continue
        if re.match(r"~|.*\$", path):
            yield Finding("path-unexpanded", "warning", (name,), {"path": path, "flag": name})
        if not path.isprintable():
            yield Finding("path-hidden", "warning", (name,), {"path": path, "flag": name})


def _output(settings: TrainSettings) -> Iterator[Finding]:
    """Where the run is written: out of place, or among the videos that it learns from."""
    try:
        run = run_path(settings.output_dir, settings.exp_name)
    except ConfigError as error:
        yield Finding("refused", "problem", ("exp_name", "output_dir"), {"said": str(error)})
        return
    values = {"path": str(run), "output": settings.output_dir, "videos": settings.video_path}
    if any(run.is_relative_to(place) for place in TEMPORARY):
        yield Finding("output-temporary", "warning", ("output_dir",), values)
    nearest = next(each for each in (run, *run.parents) if os.path.exists(each))
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        yield Finding("output-unwritable", "problem", ("output_dir",), {**values, "nearest": str(nearest)})
    videos = Path(settings.video_path).resolve()
    if os.path.isdir(videos) and run.is_relative_to(videos):
        yield Finding("output-in-videos", "problem", ("output_dir", "video_path"), values)


def _held_out(settings: TrainSettings) -> Iterator[Finding]:
    """Videos for evaluation that are trained on too."""
    if settings.eval_video_path is None:
        return
    videos, held_out = settings.video_path, settings.eval_video_path
    same = videos == held_out
    if os.path.exists(videos) and os.path.exists(held_out):
        inside, outside = Path(held_out).resolve(), Path(videos).resolve()
        same = inside == outside or (outside.is_dir() and inside.is_relative_to(outside) and inside.is_dir())
    if same:
        values = {"videos": videos, "held_out": held_out}
        yield Finding("eval-not-held-out", "warning", ("eval_video_path", "video_path"), values)


def _run(case: Case) -> Iterator[Finding]:
    """What is in the run's folder already."""
    run, settings, flags = case.run, case.settings, ("exp_name", "output_dir", "resume")
    if run is None:
        return
    values = {"path": run.path, "step": f"{run.step:,}", "steps": f"{settings.max_steps:,}"}
    if settings.resume == "never":
        yield Finding("run-not-empty", "problem", flags, values)
    elif run.refused is not None:
        yield Finding("run-refused", "problem", flags, {**values, "said": run.refused})
    elif run.step >= settings.max_steps:
        yield Finding("run-done", "note", flags, values)
    else:
        yield Finding("run-goes-on", "note", flags, values)
        if settings.load_from_checkpoint is not None:
            path = settings.load_from_checkpoint
            yield Finding("run-own-weights", "note", ("load_from_checkpoint",), {**values, "weights": path})


def disk_bytes(settings: TrainSettings, model: ModelFacts) -> Mapping[str, int]:
    """What checkpoints take: `most` while one is being written, `end` when the run is done, `each` of one."""
    saves = max(1, -(-settings.max_steps // settings.save_steps))
    full = saves if settings.keep_checkpoints is None else min(saves, settings.keep_checkpoints)
    end = full * model.checkpoint_bytes + (saves - full) * model.weights_bytes
    # The last save is written before the oldest full one is pruned.
    most = end + (model.checkpoint_bytes - model.weights_bytes if saves > full else 0)
    return {"each": model.checkpoint_bytes, "saves": saves, "end": end, "most": most}


def _disk(case: Case, model: ModelFacts) -> Iterator[Finding]:
    """The disk that checkpoints need, against what is free."""
    if case.settings.mode == 2:
        return
    found = disk_bytes(case.settings, model)
    values = {name: amount(size) for name, size in found.items()} | {"saves": f"{found['saves']:,}"}
    values["weights"] = amount(model.weights_bytes)
    flags = ("save_steps", "keep_checkpoints", "output_dir")
    free = None if case.place is None else case.place.disk_bytes
    if free is None:
        yield Finding("disk", "note", flags, values)
        return
    values["free"] = amount(free)
    if found["most"] > free:
        yield Finding("disk-full", "problem", flags, values)
    elif found["most"] > TIGHT * free:
        yield Finding("disk-tight", "warning", flags, values)
    else:
        yield Finding("disk-enough", "note", flags, values)
