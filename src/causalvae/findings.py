"""What `explain` finds in a training command: facts as data, and what follows from settings alone.

A finding is an id and values; its reason and its remedy are sentences of `lang/explain.*.yaml` under ID and
ID.do. So findings are functions of data: settings, what was given, a machine, a dataset, a plan.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from causalvae.config import TrainSettings, notices, warmup_steps
from causalvae.errors import ConfigError
from causalvae.flags import Given
from causalvae.geometry import Geometry
from causalvae.machine import Capability, Machine

if TYPE_CHECKING:
    from causalvae.train.plan import StepPlan
    from causalvae.train.precision import Precision

Level = Literal["ok", "note", "warning", "problem"]  # ok: of `doctor` alone

LEVELS: tuple[Level, ...] = ("problem", "warning", "note")  # in the order of their weight
SIZE_IN_NAME = re.compile(r"(?<![0-9])(?:([0-9]{1,3})x)?([0-9]{2,4})x([0-9]{2,4})(?![0-9x])")
FEW_CHECKS = 20  # saves below which a crash may cost more than five percent of a run
# Adam-like optimisers move a weight by about the learning rate per step. Published trainers of these models
# use 1e-5 to 1e-4 with batches of 1 to 8 clips per device.
HIGHEST_RATE, LOWEST_RATE = 2e-4, 1e-7
LION_PART = 1 / 3  # of AdamW's rate: Chen et al. (2023) advise a rate that is 3 to 10 times smaller


@dataclass(frozen=True)
class Finding:
    """One thing to know. level: a problem stops the run or spoils it. flags: what it is about."""

    id: str
    level: Level
    flags: tuple[str, ...] = ()
    values: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True, kw_only=True)
class Place:
    """The machine that a run would have. device: as torch names it.

    available_bytes: what a step may take there; disk_bytes: free where the run will be; both None if the
    system does not tell. compiler: why nothing can be compiled, None if it can be or was not asked for.
    """

    machine: Machine
    device: str
    capability: Capability
    available_bytes: int | None
    disk_bytes: int | None
    compiler: str | None = None


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """The model that would be trained. path: of the checkpoint it is from, None for a preset.

    checkpoint_bytes: of a full training state; weights_bytes: of a pruned one.
    """

    name: str
    path: str | None
    geometry: Geometry
    why_not_streamable: str
    parameters: int
    checkpoint_bytes: int
    weights_bytes: int


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """The run that is in the folder already. refused: why it can't go on so, None if it can."""

    path: str
    step: int
    refused: str | None


@dataclass(frozen=True, kw_only=True)
class Case:
    """A command and all that is known around it. None: not known, or not there.

    videos: of the dataset. plan: of the step. cramped: why no plan fits. peak_bytes: predicted of the plan.
    seconds: of a step, measured.
    """

    settings: TrainSettings
    given: Mapping[str, Given]
    place: Place | None = None
    precision: "Precision | None" = None
    videos: int | None = None
    model: ModelFacts | None = None
    run: RunFacts | None = None
    plan: "StepPlan | None" = None
    cramped: str | None = None
    peak_bytes: int | None = None
    seconds: float | None = None

    @property
    def clips_per_step(self) -> int:
        """Clips that one update sees."""
        return self.settings.batch_size * self.settings.gradient_accumulation_steps


def of_settings(case: Case) -> Iterator[Finding]:
    """What follows from the command alone."""
    yield from _name(case.settings)
    yield from _frames(case)
    yield from _without_effect(case)
    yield from _mode(case.settings)
    yield from _rate(case)
    yield from _schedule(case.settings)
    yield from _saves(case.settings)
    yield from _average(case.settings)
    yield from _critic(case.settings)


def flag_of(said: str) -> str:
    """The flag that a message of the program begins with: `--NAME value: why`."""
    return said.removeprefix("--").split(" ")[0].rstrip(":")


def _name(settings: TrainSettings) -> Iterator[Finding]:
    """A name such as 9x256x256 that says something else than the flags do."""
    match = SIZE_IN_NAME.search(settings.exp_name)
    if match is None:
        return
    said = {"name": settings.exp_name, "said": match[0]}
    lengths = settings.frames or (settings.video_num_frames,)
    if match[1] is not None and int(match[1]) not in lengths:
        asked = ", ".join(map(str, lengths))
        values = {**said, "frames": match[1], "asked": asked}
        yield Finding("name-frames", "warning", ("exp_name", "video_num_frames"), values)
    sizes = [(size.height, size.width) for size in settings.resolutions or (settings.resolution,)]
    if (int(match[2]), int(match[3])) not in sizes:
        asked = ", ".join(f"{height}x{width}" for height, width in sizes)
        values = {**said, "size": f"{match[2]}x{match[3]}", "asked": asked}
        yield Finding("name-size", "warning", ("exp_name", "resolution"), values)


def _frames(case: Case) -> Iterator[Finding]:
    """Clip lengths that the model can only work on with repeated frames."""
    if case.model is None:
        return
    geometry, settings = case.model.geometry, case.settings
    name = "frames" if settings.frames else "video_num_frames"
    for frames in settings.frames or (settings.video_num_frames,):
        worked = geometry.padded_frames(frames)
        if worked == frames:
            continue
        shorter = max(1, worked - geometry.temporal * geometry.group)
        values = {"frames": frames, "worked": worked, "added": worked - frames, "shorter": shorter}
        values |= {"temporal": geometry.temporal, "latent": geometry.latent_frames(frames)}
        yield Finding("padded-frames", "note", (name,), {key: str(value) for key, value in values.items()})


def _without_effect(case: Case) -> Iterator[Finding]:
    """What the run itself would warn of, in its own words."""
    try:
        warned = notices(case.settings, case.given)
    except ConfigError as error:
        yield Finding("refused", "problem", (flag_of(str(error)),), {"said": str(error)})
        return
    for said in warned:
        if flag_of(said) == "disc_start" and any(_critic(case.settings)):
            continue  # that says it, whether the flag was given or not
        yield Finding("no-effect", "warning", (flag_of(said),), {"said": said})


def _mode(settings: TrainSettings) -> Iterator[Finding]:
    if settings.mode == 1:
        yield Finding("mode-debug", "note", ("mode",))
    elif settings.mode == 2:
        yield Finding("mode-test", "warning", ("mode",))


def _rate(case: Case) -> Iterator[Finding]:
    """The learning rate against the optimiser and the batch, which belong together."""
    settings, clips = case.settings, case.clips_per_step
    if settings.optim == "sgd":
        return
    most = HIGHEST_RATE * (LION_PART if settings.optim == "lion" else 1.0) * max(1.0, clips / 8) ** 0.5
    values = {"rate": f"{settings.start_learning_rate:g}", "clips": str(clips), "optim": settings.optim}
    flags = ("start_learning_rate", "batch_size")
    if settings.start_learning_rate > most:
        yield Finding("rate-high", "warning", flags, {**values, "most": f"{most:.0e}"})
    elif settings.start_learning_rate < LOWEST_RATE:
        yield Finding("rate-low", "warning", flags, {**values, "least": f"{LOWEST_RATE:.0e}"})
    else:
        doubled = f"{settings.start_learning_rate * 2**0.5:.2g}"
        yield Finding("rate-batch", "note", flags, {**values, "double": str(2 * clips), "doubled": doubled})


def _schedule(settings: TrainSettings) -> Iterator[Finding]:
    warmup, steps = warmup_steps(settings), settings.max_steps
    if warmup >= steps and settings.lr_warmup_steps is not None:
        reached = settings.start_learning_rate * steps / warmup
        values = {"warmup": f"{warmup:,}", "steps": f"{steps:,}", "reached": f"{reached:.2g}"}
        yield Finding("warmup-long", "problem", ("lr_warmup_steps", "max_steps"), values)
    if settings.lr_scheduler != "constant":
        values = {
            "kind": settings.lr_scheduler,
            "steps": f"{steps:,}",
            "end": f"{settings.end_learning_rate:g}",
        }
        yield Finding("schedule-resume", "note", ("lr_scheduler", "max_steps"), values)


def _saves(settings: TrainSettings) -> Iterator[Finding]:
    every, steps = settings.save_steps, settings.max_steps
    saves = max(1, -(-steps // every))
    values = {"every": f"{every:,}", "steps": f"{steps:,}", "saves": str(saves)}
    if every >= steps:
        yield Finding("saves-only-end", "warning", ("save_steps", "max_steps"), values)
    elif saves < FEW_CHECKS and steps >= 10_000:
        values["share"] = f"{100 * every / steps:.0f}"
        yield Finding("saves-few", "note", ("save_steps", "max_steps"), values)


def _average(settings: TrainSettings) -> Iterator[Finding]:
    """An average of the weights that a short run can't fill."""
    if not settings.use_ema:
        return
    decay, steps = settings.ema_decay, settings.max_steps
    reached = (10 * decay - 1) / (1 - decay)  # where (1 + n) / (10 + n) comes to the decay
    if steps < reached:
        end = (1 + steps) / (10 + steps)
        values = {"decay": f"{decay:g}", "steps": f"{steps:,}", "reached": f"{reached:,.0f}"}
        values |= {"end": f"{end:.4g}", "window": f"{1 / (1 - end):,.0f}"}
        yield Finding("ema-short", "note", ("ema_decay", "max_steps"), values)


def _critic(settings: TrainSettings) -> Iterator[Finding]:
    start = settings.disc_start
    if settings.disc_type != "none" and start is not None and start >= settings.max_steps:
        values = {"start": f"{start:,}", "steps": f"{settings.max_steps:,}"}
        yield Finding("critic-late", "warning", ("disc_start", "max_steps"), values)
