"""What a training would meet here, looked at without starting it: machine, run, model, videos, plan, speed.

The precision, the plan and the reasons why a run can't go on are those of the trainer's own functions, so
that what is foretold is what happens. What can't be had becomes a finding, and the rest is still looked at.
"""

import math
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from causalvae.config import TrainSettings
from causalvae.data.sources import ClipSource, open_source
from causalvae.errors import ConfigError, RunError, WeightsError
from causalvae.findings import Case, Finding, ModelFacts, Place, RunFacts
from causalvae.flags import Given
from causalvae.losses import LossPlan
from causalvae.machine import Machine, available_bytes, free_disk_bytes, pick_device
from causalvae.models.build import Model
from causalvae.models.presets import PRESETS, DiffusersConfig, ModelConfig
from causalvae.perceptual import Shelf, build_perceptual, foresee_perceptual
from causalvae.placefindings import missing_videos, missing_weights
from causalvae.rng import key, normal
from causalvae.rundir import STATE, STEP_FOLDER, run_path
from causalvae.train.networks import Built, batch_shapes, build_state, on_paper, sketch, step_plan
from causalvae.train.parts import (
    able_to,
    checkpoint_at,
    facts_before,
    go_on_with,
    load_start,
    loss_plan,
    precision_of,
    refuse_odd_sizes,
    refuse_other_videos,
    smallest_size,
)
from causalvae.train.plan import predictor
from causalvae.train.precision import Precision
from causalvae.train.predict import MOMENTS
from causalvae.train.replay import is_replay
from causalvae.train.state import read_counters
from causalvae.train.step import train_step
from causalvae.weights.load import Loaded, own_config
from causalvae.weights.read import find_weights

LONG_STEP = 20.0  # seconds, from which on the first step is measurement enough
STEPS_MEASURED = 3


COMPILERS = ("c++", "g++", "clang++")  # of which torch.compile needs one on a CPU


@dataclass
class _Look:
    """What was found so far. path: of the run, None if it can't be. began: run.json of the run that goes on,
    None at a beginning (Any: JSON). checkpoint: the newest of the run, or the one that --resume names.
    """

    settings: TrainSettings
    findings: list[Finding] = field(default_factory=list[Finding])
    path: Path | None = None
    began: Mapping[str, Any] | None = None
    checkpoint: Path | None = None
    source: ClipSource | None = None
    loaded: Loaded | None = None


def look(
    settings: TrainSettings,
    given: Mapping[str, Given],
    *,
    place: Place | None = None,
    measure: bool = False,
) -> tuple[Case, list[Finding]]:
    """What these settings would meet, and what is wrong with what they name.

    place: the machine as data; without, the one this runs on. measure: make some steps to see how long they
    take, with frames that are nobody's.
    """
    seen = _Look(settings)
    seen.source = _videos(seen)
    run = _run_there(seen)
    place = place or _this_place(seen)
    precision = _precision(seen, place)
    case = Case(settings=settings, given=given, place=place, precision=precision, run=run)
    if seen.source is not None and "video_path" in given:
        case = replace(case, videos=len(seen.source))
    found = _model(seen)
    if found is None or precision is None:
        return case, seen.findings
    name, config = found
    networks = sketch(settings, config)
    case = replace(case, model=_facts(seen, networks, name=name, precision=precision))
    if settings.mode == 2:
        return case, seen.findings
    case = _planned(case, networks, _judge(seen), seen)
    if measure and case.plan is not None:
        case = replace(case, seconds=seconds_per_step(settings, precision, seen.loaded))
    return case, seen.findings


def _videos(seen: _Look) -> ClipSource | None:
    """The videos to train on; those for evaluation are opened too. None of them is read."""
    settings = seen.settings
    found: dict[str, ClipSource] = {}
    for name, path in (("video_path", settings.video_path), ("eval_video_path", settings.eval_video_path)):
        if path is None:
            continue
        try:
            found[name] = open_source(path)
        except ConfigError as error:
            seen.findings.append(missing_videos(name, path, str(error)))
    return found.get("video_path")


def _run_there(seen: _Look) -> RunFacts | None:
    """The run that is in the folder already, and whether it can go on with these settings."""
    settings = seen.settings
    try:
        path = run_path(settings.output_dir, settings.exp_name)
    except ConfigError:
        return None  # findings of paths tell why
    try:
        seen.path = path if path.exists() else path.parent  # a name too long is an error here
        steps = [each for each in path.glob("checkpoints/step-*") if STEP_FOLDER.fullmatch(each.name)]
        full = sorted(each for each in steps if (each / STATE).is_file())
        if not full:
            _resumed(seen, path)
            return None
        step = int(read_counters(full[-1])["step"])
        seen.began = facts_before(settings, path)
    except (OSError, ValueError, KeyError) as error:
        seen.findings.append(Finding("run-unreadable", "problem", ("exp_name",), {"said": str(error)}))
        return None
    seen.checkpoint = full[-1]
    refused: str | None = None
    try:
        seen.settings = go_on_with(settings, path / "config.yaml")
        if seen.source is not None:
            refuse_other_videos(path / "run.json", seen.source)
    except (ConfigError, OSError, ValueError, KeyError) as error:
        refused = str(error)
    return RunFacts(path=str(path), step=step, refused=refused)


def _resumed(seen: _Look, path: Path) -> None:
    """The checkpoint of another run that --resume names. path: of the new run."""
    resume = seen.settings.resume
    if resume in ("auto", "never") or is_replay(Path(resume)):
        return
    try:
        checkpoint = checkpoint_at(Path(resume))
        seen.began = facts_before(seen.settings, path)
        seen.settings = go_on_with(seen.settings, checkpoint.path.parent.parent / "config.yaml")
    except (ConfigError, RunError, OSError, ValueError, KeyError) as error:
        seen.findings.append(Finding("resume-unusable", "problem", ("resume",), {"said": str(error)}))
        return
    seen.checkpoint = checkpoint.path
    values = {"path": resume, "step": f"{checkpoint.step:,}"}
    seen.findings.append(Finding("resume-from", "note", ("resume",), values))


def _this_place(seen: _Look) -> Place:
    """The machine this runs on, with the device that was asked for if it is there."""
    settings = seen.settings
    try:
        device = pick_device(settings.device)
    except ConfigError as error:
        seen.findings.append(Finding("device-missing", "problem", ("device",), {"said": str(error)}))
        device = pick_device("auto")
    return Place(
        machine=Machine.look(),
        device=device,
        capability=able_to(settings, torch.device(device), began=seen.began),
        available_bytes=available_bytes(device),
        disk_bytes=None if seen.path is None else free_disk_bytes(seen.path),
        compiler=_no_compiler(device) if settings.jit_level != "O0" else None,
    )


def _no_compiler(device: str) -> str | None:
    """Why nothing can be compiled, as far as that can be seen without compiling, which takes seconds."""
    if device.startswith("cuda"):
        return None if find_spec("triton") else "triton is not installed"
    named = os.environ.get("CXX")
    found = any(shutil.which(name) for name in ([named] if named else COMPILERS))
    return None if found else f"no C++ compiler is there ({named or ', '.join(COMPILERS)})"


def _precision(seen: _Look, place: Place) -> Precision | None:
    try:
        return precision_of(seen.settings, place.device, place.capability, began=seen.began)
    except ConfigError as error:
        seen.findings.append(Finding("refused", "problem", ("precision",), {"said": str(error)}))
        return None


def _model(seen: _Look) -> tuple[str, ModelConfig] | None:
    """The model that is trained: that of the run, of the checkpoint, or the preset."""
    settings = seen.settings
    missing = missing_weights(settings)
    try:
        if seen.checkpoint is not None:
            kind, config = own_config(find_weights(seen.checkpoint))
            return next((name for name, preset in PRESETS.items() if preset == config), kind), config
        if missing is not None:
            seen.findings.append(missing)
            return settings.model, PRESETS[settings.model]
        seen.loaded = load_start(settings)
        if seen.loaded is None:
            return settings.model, PRESETS[settings.model]
        refuse_odd_sizes(settings, seen.loaded)
        return seen.loaded.family, seen.loaded.config
    except (ConfigError, WeightsError, RunError) as error:
        seen.findings.append(
            Finding("weights-unusable", "problem", ("load_from_checkpoint",), {"said": str(error)})
        )
        return None


def _facts(
    seen: _Look, networks: tuple[Model, nn.Module | None], *, name: str, precision: Precision
) -> ModelFacts:
    """The model, and what its checkpoints take: what `TrainState.save` writes."""
    settings, (vae, critic) = seen.settings, networks
    loaded, config = seen.loaded, vae.config
    path = seen.checkpoint if loaded is None else loaded.file.origin.path
    weights = sum(t.numel() for t in vae.state_dict().values())
    learned = sum(p.numel() for p in vae.parameters() if p.requires_grad)
    judging = 0 if critic is None else sum(p.numel() for p in critic.parameters())
    width = 2 if precision.level == "O3" else 4  # bytes of a weight; below O3 masters are saved
    kept = weights * (width + (4 if settings.use_ema else 0))
    moments = int(4 * MOMENTS[settings.optim] * (learned + judging))
    return ModelFacts(
        name=name,
        path=None if path is None else str(path),
        geometry=vae.geometry,
        why_not_streamable="" if isinstance(config, DiffusersConfig) else config.why_not_streamable,
        parameters=sum(p.numel() for p in vae.parameters()),
        checkpoint_bytes=kept + judging * width + moments,
        weights_bytes=kept,
    )


def _judge(seen: _Look) -> nn.Module | None:
    """The network of the perceptual term as the run would have it; what is wrong or missing is found."""
    settings, choice = seen.settings, seen.settings.perceptual
    if seen.began is not None and choice == "auto" and seen.began.get("perceptual") is None:
        choice = "none"
    size, shelf = smallest_size(settings), Shelf.of(os.environ)
    try:
        module, missing = foresee_perceptual(choice, size=size, shelf=shelf)
    except (ConfigError, WeightsError, RunError) as error:
        kind, level = ("perceptual-none", "warning") if choice == "auto" else ("refused", "problem")
        seen.findings.append(Finding(kind, level, ("perceptual",), {"said": str(error)}))
        return None
    if missing:
        values = {"files": ", ".join(path.name for path in missing), "folder": str(missing[0].parent)}
        seen.findings.append(Finding("perceptual-fetched", "note", ("perceptual",), values))
    return module


def _planned(
    case: Case, networks: tuple[Model, nn.Module | None], judge: nn.Module | None, seen: _Look
) -> Case:
    """The case with the plan of its step, and the bytes that the step is predicted to take."""
    settings, precision, place = seen.settings, case.precision, case.place
    assert precision is not None, "without numbers nothing is planned"
    loss = replace(loss_plan(settings, None), perceptual=judge)
    kept = read_counters(seen.checkpoint) if seen.checkpoint is not None else {}
    available = None if place is None else place.available_bytes
    how = {"precision": precision, "loss": loss, "available": available, "kept": kept}
    try:
        plan = step_plan(settings, networks, **how)
    except ConfigError as error:
        return replace(case, cramped=str(error))
    peak = plan.peak_bytes
    if peak is None:
        state = on_paper(settings, networks, precision=precision)
        peak = predictor(state, shapes=batch_shapes(settings), loss=loss, optimizer=settings.optim)(plan)
    return replace(case, plan=plan, peak_bytes=peak)


def seconds_per_step(settings: TrainSettings, precision: Precision, loaded: Loaded | None) -> float:
    """How long a step takes on this machine, with frames in memory: the fastest of a few, after a first.

    loaded: the weights to start from; without, those of the preset. A perceptual network that would have to
    be fetched is left out.
    """
    settings = replace(settings, load_from_checkpoint=None, resume="auto")
    device = torch.device(pick_device(settings.device))
    size, shelf = smallest_size(settings), Shelf.of(os.environ)
    _, missing = foresee_perceptual(settings.perceptual, size=size, shelf=shelf)
    choice = "none" if missing else settings.perceptual
    perceptual, _ = build_perceptual(choice, size=size, shelf=shelf)
    if perceptual is not None:
        perceptual.module.to(device)
    loss = loss_plan(settings, perceptual)
    built = build_state(
        settings, device, start=None, loaded=loaded, precision=precision, loss=loss, scaled=()
    )
    times: list[float] = []
    while len(times) < 1 + STEPS_MEASURED and (not times or times[0] < LONG_STEP):
        times.append(_one_step(built, settings, loss, device))
    return min(times)


def _one_step(built: Built, settings: TrainSettings, loss: LossPlan, device: torch.device) -> float:
    """Seconds of one step on grey frames that are a little noisy."""
    shape = max(batch_shapes(settings), key=math.prod)
    clip = 0.1 * normal(shape, key("measure")).to(device)
    latent = built.state.vae.geometry.latent_shape(shape[2], shape[3], shape[4])
    noise = normal((shape[0], *latent), key("noise")).to(device)
    began = time.perf_counter()
    judge = settings.disc_loss if built.state.critic is not None else None
    train_step(built.state, clip, noise, loss=loss, critic_loss=judge, parts=built.plan.parts)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began
