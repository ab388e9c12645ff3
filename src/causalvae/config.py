"""The table of settings: every flag of every command, with its default, limits and meaning (idea 1).

Command line, YAML, `--help`, `config.yaml` and docs/flags.md are readings of this table; `python -m
causalvae.config` prints the last. Only `train.trainer` reads TrainSettings. `flags` turns a table into flags.
"""

import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any, Literal, cast

from causalvae.errors import ConfigError
from causalvae.flags import (
    Flag,
    Given,
    MemoryBudget,
    Resolution,
    check,
    closest,
    flags_of,
    printable,
    read_settings,
    refuse,
    setting,
    to_text,
)
from causalvae.flagtext import help_text, markdown, to_yaml
from causalvae.models.presets import PRESETS

__all__ = [
    "DemoSettings",
    "Given",
    "MemoryBudget",
    "NoSettings",
    "Resolution",
    "TrainSettings",
    "changed_mathematics",
    "continued",
    "decay_steps",
    "help_text",
    "notices",
    "read_settings",
    "setting",
    "to_yaml",
    "warmup_steps",
]

BASICS, HARDWARE, LENGTH, INPUT = "Basics", "Hardware and speed", "Length and saving", "Input"
START, RATE, LOSS, EXPERT = "Start and restore", "Learning rate and optimiser", "Loss", "Expert"
REQUIRED = cast(Any, MISSING)  # Any: stands for the default of a flag of any type
AT_LEAST_0, AT_LEAST_1, ABOVE_0 = {"at_least": 0}, {"at_least": 1}, {"above": 0}
PART = {"at_least": 0, "below": 1}
MAX_NAME_BYTES = 200  # of exp_name; file systems stop at 255 and files in the run add to it
MAX_WARMUP_STEPS, WARMUP_PART = 1000, 50  # warm-up is max_steps / 50, at most 1000
FIRST_LEVEL = 1000  # steps after the warm-up before `disc_start auto` can end: twice stability.LEVEL_WINDOW
SQUARE_256, AUTO_MEMORY = Resolution(256, 256), MemoryBudget()


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """What a training run is asked to do. Raises ConfigError for values that can't be, alone or together."""

    # A table is read by its rows, so it keeps its own line breaks.
    # fmt: off
    exp_name: str = setting("causalvae", BASICS, on_resume="free",
        help="the run's name; the run lives in output_dir/exp_name")
    output_dir: str = setting("results/causalvae", BASICS, on_resume="free",
        help="the folder where runs live")
    seed: int = setting(0, BASICS, limits=AT_LEAST_0,
        help="data order, crops, noise and initial weights follow from it; the same seed gives the same run")
    config: str | None = setting(None, BASICS, none_word="none", on_resume="free",
        help="a YAML file with any of these settings, such as a run's config.yaml; the command line wins")

    batch_size: int = setting(1, HARDWARE, limits=AT_LEAST_1, help="clips per step and process")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = setting("auto", HARDWARE,
        help="numbers to calculate in; auto is bf16 on a GPU that has it, else fp32")
    amp_level: Literal["O0", "O1", "O2", "O3"] = setting("O1", HARDWARE,
        help="O0 all fp32; O1 weights fp32, matmul and convolution in precision; O2 weights in precision "
        "with fp32 master weights; O3 all in precision. With precision fp32 every level is O0")
    dataloader_num_workers: int = setting(4, HARDWARE, limits=AT_LEAST_0, on_resume="free",
        help="processes that decode and crop; 0 decodes in the main process. The data does not depend on it")
    device: str = setting("auto", HARDWARE, on_resume="free", help="auto, cpu, cuda, cuda:1 or mps")
    memory: MemoryBudget = setting(AUTO_MEMORY, HARDWARE, on_resume="free",  # noqa: RUF009 - frozen
        help="auto, speed (no recomputation), lean (recompute), or a budget such as 20GiB")

    max_steps: int = setting(50000, LENGTH, limits=AT_LEAST_1, on_resume="free",
        help="updates in all; raising it on a finished run goes on")
    save_steps: int = setting(1000, LENGTH, limits=AT_LEAST_1, on_resume="free",
        help="a checkpoint every so many steps, at the end, and at Ctrl-C or SIGTERM")
    keep_checkpoints: int | None = setting(2, LENGTH, limits=AT_LEAST_1, none_word="all", on_resume="free",
        help="full training states kept; of older saves the model weights stay. all keeps everything")
    log_steps: int = setting(10, LENGTH, limits=AT_LEAST_1, on_resume="free",
        help="a log line every so many steps")
    eval_steps: int = setting(0, LENGTH, limits=AT_LEAST_0, on_resume="free",
        help="evaluate the EMA weights on eval_video_path every so many steps; 0 never")
    eval_video_path: str | None = setting(None, LENGTH, none_word="none", on_resume="free",
        help="held-out videos for eval_steps, given as video_path is")
    resume: str = setting("auto", LENGTH, on_resume="free",
        help="auto goes on if the run has a checkpoint, never refuses a run folder that is not empty, or the "
        "path of a checkpoint to start from")
    tensorboard: bool = setting(False, LENGTH, on_resume="free", help="write TensorBoard files too")

    video_path: str = setting(REQUIRED, INPUT, on_resume="free",
        help="a folder that is searched for videos, one video, a text, CSV or JSONL list, a WebDataset "
        "pattern such as shard-{000..012}.tar, or sample: for the clips that come with the package")
    video_num_frames: int = setting(17, INPUT, limits=AT_LEAST_1,
        help="frames per clip; the model works on 1 + 4k of them, and other counts are padded inside")
    resolution: Resolution = setting(SQUARE_256, INPUT,  # noqa: RUF009 - frozen
        help="256 or HxW such as 256x448, multiples of 8; videos are resized to cover it and cropped")
    frames: tuple[int, ...] | None = setting(None, INPUT, limits=AT_LEAST_1, none_word="none",
        help="clip lengths such as 1,9,17 that take turns instead of video_num_frames, one for each batch")
    resolutions: tuple[Resolution, ...] | None = setting(None, INPUT, none_word="none",
        help="sizes such as 128,256x448 that take turns instead of resolution, one for each batch")
    image_ratio: float = setting(0.0, INPUT, limits=PART,
        help="share of batches that are single pictures, taken from the videos and from image files")
    sample_rate: int = setting(1, INPUT, limits=AT_LEAST_1, help="every n-th frame; 1 skips none")
    crop: Literal["random", "center"] = setting("random", INPUT, help="where training clips are cropped")
    flip: bool = setting(True, INPUT, help="mirror half of the training clips")
    short_videos: Literal["auto", "repeat", "skip"] = setting("auto", INPUT,
        help="videos shorter than a clip: auto repeats their last frame only if nothing longer exists")
    clip_timeout: float = setting(60.0, INPUT, limits=ABOVE_0, on_resume="free",
        help="seconds after which a clip that is still being read counts as broken")
    quarantine: str | None = setting(None, INPUT, none_word="none", on_resume="free",
        help="a quarantine.jsonl of `causalvae data scan`; videos that it says can't be used are not opened")

    load_from_checkpoint: str | None = setting(None, START, none_word="none", on_resume="free",
        help="weights to start from, told apart by content; a run's own checkpoints win over it")
    weights: Literal["ema", "live"] = setting("ema", START, on_resume="free",
        help="which weights are taken from a file that has averaged ones too")
    model_config: str | None = setting(None, START, none_word="none", on_resume="free",
        help="a published config.json that says what names of weights can't; without, the one beside them")
    partial: bool = setting(False, START, on_resume="free",
        help="load what fits into --model by name and shape, and list the rest; else all must fit")
    model: str = setting("causalvae-488", START,
        help="preset when no checkpoint says otherwise; `causalvae models` lists them")

    train_parts: Literal["all", "decoder", "encoder"] = setting("all", START,
        help="which half learns; the other keeps its weights")

    start_learning_rate: float = setting(1e-5, RATE, limits=ABOVE_0,
        help="peak learning rate of model and critic")
    lr_scheduler: Literal["constant", "cosine", "linear"] = setting("constant", RATE,
        aliases={"cosine_decay": "cosine"}, help="how the rate goes on after the warm-up; also cosine_decay")
    lr_warmup_steps: int | None = setting(None, RATE, limits=AT_LEAST_0, none_word="auto",
        help="steps of rising rate; auto is 2 % of max_steps, at most 1000")
    lr_decay_steps: int | None = setting(None, RATE, limits=AT_LEAST_1, none_word="auto",
        help="steps of falling rate after the warm-up; auto is the rest of max_steps")
    end_learning_rate: float = setting(1e-7, RATE, limits=AT_LEAST_0,
        help="the rate that cosine and linear end at")
    optim: Literal["adamw", "adam", "sgd", "lion", "adamw8bit"] = setting("adamw", RATE,
        help="the optimiser; adam is adamw, as no decay here is in the gradient; sgd takes its momentum from "
        "the first of betas; adamw8bit needs pip install 'causalvae[adamw8bit]'")
    betas: tuple[float, float] = setting((0.9, 0.999), RATE, limits=PART,
        help="the two decay rates of the optimiser's averages, as two words")
    weight_decay: float = setting(0.01, RATE, limits=AT_LEAST_0, help="decoupled; not on biases and norms")
    clip_grad: bool = setting(False, RATE, help="clip the gradient norm of each network at max_grad_norm")
    max_grad_norm: float = setting(1.0, RATE, limits=ABOVE_0, help="the largest gradient norm with clip_grad")
    clip_grad_mode: Literal["norm", "agc"] = setting("norm", RATE,
        help="what clip_grad does: norm as above; agc clips each unit at agc_factor times its weight's norm")
    agc_factor: float = setting(0.01, RATE, limits=ABOVE_0,
        help="the largest gradient of a unit, as a part of its weight's norm, with clip_grad_mode agc")
    on_divergence: Literal["stop", "rollback"] = setting("stop", RATE, on_resume="free",
        help="after 20 steps in a row that were not finite: stop, or go back to a checkpoint from before the "
        "trouble with half the learning rate; more keep_checkpoints give it more of them")
    gradient_accumulation_steps: int = setting(1, RATE, limits=AT_LEAST_1,
        help="batches per update; the update is that of one large batch")
    use_ema: bool = setting(True, RATE,
        help="keep an average of the weights; it is saved, resumed and evaluated")
    ema_decay: float = setting(0.999, RATE, limits=PART,
        help="decay of that average, reached by (1 + n) / (10 + n)")

    loss_type: Literal["l1", "l2", "huber"] = setting("l1", LOSS, help="the error of pixels")
    perceptual: str = setting("auto", LOSS,
        help="the network of the perceptual term: auto is LPIPS, fetched once, or none with a warning; none, "
        "lpips-vgg, lpips-alex, lpips-squeeze, efficientnet-lite0, or a file or folder of yours")
    perceptual_weight: float = setting(1.0, LOSS, limits=AT_LEAST_0, help="weight of the perceptual term")
    kl_weight: float = setting(1e-6, LOSS, limits=AT_LEAST_0, help="weight of the KL term")
    logvar_init: float = setting(0.0, LOSS, help="log variance of the reconstruction error at the start")
    learn_logvar: bool = setting(False, LOSS, help="learn the log variance")
    disc_type: Literal["patchgan3d", "patchgan2d", "none"] = setting("patchgan3d", LOSS, help="the critic")
    disc_start: int | None = setting(5, LOSS, limits=AT_LEAST_0, none_word="auto",
        help="first step with the critic; auto waits until the pixel error has levelled off")
    disc_weight: float = setting(0.5, LOSS, limits=AT_LEAST_0,
        help="weight of the critic's term, times the adaptive one")
    disc_loss: Literal["hinge", "vanilla"] = setting("hinge", LOSS, help="the critic's own loss")
    disc_norm: Literal["batch", "group", "none"] = setting("batch", LOSS,
        help="its norms; batch as published")
    lecam_weight: float = setting(0.0, LOSS, limits=AT_LEAST_0,
        help="weight of the critic's LeCam regulariser, which keeps it calm on small datasets")
    r1_weight: float = setting(0.0, LOSS, limits=AT_LEAST_0,
        help="weight of the penalty on the critic's gradient at real clips")
    disc_sync_norm: bool = setting(False, LOSS, help="share its batch statistics between processes")

    mode: int = setting(0, EXPERT, limits={"at_least": 0, "below": 3}, on_resume="free",
        help="0 train; 1 debug: eager, deterministic, every tensor checked; 2 test: evaluate, train nothing")
    init_loss_scale: float = setting(65536.0, EXPERT, limits=ABOVE_0,
        help="first value of the dynamic loss scale")
    loss_scale_window: int = setting(1000, EXPERT, limits=AT_LEAST_1,
        help="good steps until the loss scale doubles")
    jit_level: Literal["O0", "O1", "O2"] = setting("O0", EXPERT, on_resume="free",
        help="O0 eager; O1 compiled block by block; O2 compiled with autotuning")
    # fmt: on

    def __post_init__(self) -> None:
        """Check each value by its row of the table, then the values against each other."""
        flags = flags_of(self)
        for name, flag in flags.items():
            check(flag, getattr(self, name))
        _check_name(flags["exp_name"], self.exp_name)
        _check_model(flags, self)
        if self.lr_scheduler != "constant" and self.end_learning_rate > self.start_learning_rate:
            why = f"is above --start_learning_rate {self.start_learning_rate:g}; give a smaller one"
            refuse(flags["end_learning_rate"], self.end_learning_rate, why)
        if self.eval_steps > 0 and self.eval_video_path is None:
            refuse(flags["eval_steps"], self.eval_steps, "needs held-out videos: add --eval_video_path")


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """What the demo is asked to do."""

    output_dir: str = setting("results/demo", BASICS, help="the folder that the demo writes")
    seed: int = setting(0, BASICS, limits=AT_LEAST_0, help="the same seed gives the same demo")
    max_steps: int = setting(
        80, BASICS, limits=AT_LEAST_1, help="steps of training; with ten times as many it does better"
    )


@dataclass(frozen=True)
class NoSettings:
    """The table of a command that has no flags."""


def _check_name(flag: Flag, name: str) -> None:
    """The name becomes a folder: one component that can't be taken for a flag, a parent or a hidden file."""
    if "/" in name or "\\" in name:
        refuse(flag, name, "must be one name without / or \\; the folder goes in --output_dir")
    if name.startswith((".", "-")):
        refuse(flag, name, "must not start with . or -")
    if not name.isprintable() or name != name.strip():
        refuse(flag, name, "has characters that can't be seen; use letters, digits, - and _")
    if len(name.encode()) > MAX_NAME_BYTES:
        refuse(flag, name[:20] + "...", f"is {len(name.encode())} bytes long; the most is {MAX_NAME_BYTES}")


def _check_model(flags: Mapping[str, Flag], settings: TrainSettings) -> None:
    """The preset exists, and its spatial factor divides height and width."""
    if settings.model not in PRESETS:
        guess = closest(settings.model, list(PRESETS))
        hint = f"did you mean {guess}?" if guess else f"there are {', '.join(PRESETS)}"
        refuse(flags["model"], settings.model, f"there is no such preset; {hint}")
    factor = PRESETS[settings.model].geometry.spatial
    sizes = [("resolution", settings.resolution), *(("resolutions", s) for s in settings.resolutions or ())]
    for name, size in sizes:
        near = Resolution(*(max(factor, round(side / factor) * factor) for side in (size.height, size.width)))
        if near != size:
            why = f"height and width must be multiples of {factor}; the nearest is {near}"
            refuse(flags[name], size, why)


def warmup_steps(settings: TrainSettings) -> int:
    """Steps of rising learning rate."""
    if settings.lr_warmup_steps is not None:
        return settings.lr_warmup_steps
    return min(MAX_WARMUP_STEPS, settings.max_steps // WARMUP_PART)


def decay_steps(settings: TrainSettings) -> int:
    """Steps of falling learning rate after the warm-up."""
    if settings.lr_decay_steps is not None:
        return settings.lr_decay_steps
    return max(1, settings.max_steps - warmup_steps(settings))


def continued(saved: TrainSettings, asked: TrainSettings) -> TrainSettings:
    """The settings asked for, with the schedule of the saved run where none is given.

    A run that goes on to another max_steps keeps the warm-up and decay that it began with, so this is what it
    saves, and not what was asked for.
    """
    if asked.max_steps == saved.max_steps:
        warmup, decay = saved.lr_warmup_steps, saved.lr_decay_steps
    else:
        warmup, decay = warmup_steps(saved), decay_steps(saved)
    return replace(
        asked,
        lr_warmup_steps=warmup if asked.lr_warmup_steps is None else asked.lr_warmup_steps,
        lr_decay_steps=decay if asked.lr_decay_steps is None else asked.lr_decay_steps,
    )


def changed_mathematics(saved: TrainSettings, asked: TrainSettings) -> list[tuple[str, str, str]]:
    """Settings that a resumed run may not change: name, saved value, value asked for, as text."""
    asked = continued(saved, asked)
    changes: list[tuple[str, str, str]] = []
    for name, flag in flags_of(asked).items():
        old, new = _resolved(saved, name), _resolved(asked, name)
        if flag.on_resume == "refused" and old != new:
            changes.append((name, to_text(flag, old), to_text(flag, new)))
    return changes


def _resolved(settings: TrainSettings, name: str) -> object:
    """A setting's value, with `auto` of the schedule worked out."""
    automatic = {"lr_warmup_steps": warmup_steps, "lr_decay_steps": decay_steps}
    return automatic[name](settings) if name in automatic else getattr(settings, name)


def notices(settings: TrainSettings, given: Mapping[str, Given] | None = None) -> list[str]:
    """Warnings to print and record: what was asked for and is not done.

    given: what was asked for; without it, what is not a default. Raises ConfigError where a setting needs
    what is not there and nothing else can stand in for.
    """
    flags = flags_of(settings)
    changed = {field.name for field in fields(settings) if getattr(settings, field.name) != field.default}
    asked = changed if given is None else set(given)
    shown = {n: f"--{n} {printable(to_text(flag, getattr(settings, n)))}" for n, flag in flags.items()}
    for name, applies, instead in NOT_AVAILABLE:
        if applies(settings):
            raise ConfigError(f"{shown[name]}: {instead}")
    return [
        f"{shown[name]} has no effect: {why}"
        for names, applies, why in NO_EFFECT
        for name in names.split()
        if name in asked and applies(settings)
    ]


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


Rule = tuple[str, Callable[[TrainSettings], bool], str]  # flags, whether the rule applies, what to say

NOT_AVAILABLE: tuple[Rule, ...] = (
    (
        "optim",
        lambda s: s.optim == "adamw8bit" and not _installed("bitsandbytes"),
        "its library is not installed: pip install 'causalvae[adamw8bit]', or use --optim adamw",
    ),
)
NO_EFFECT: tuple[Rule, ...] = (
    ("jit_level", lambda s: s.mode == 1 and s.jit_level != "O0", "--mode 1 runs eager"),
    ("video_num_frames", lambda s: s.frames is not None, "--frames says how long clips are"),
    ("resolution", lambda s: s.resolutions is not None, "--resolutions says how large clips are"),
    ("max_grad_norm clip_grad_mode agc_factor", lambda s: not s.clip_grad, "--clip_grad is False"),
    ("max_grad_norm", lambda s: s.clip_grad and s.clip_grad_mode == "agc", "--clip_grad_mode is agc"),
    ("agc_factor", lambda s: s.clip_grad and s.clip_grad_mode == "norm", "--clip_grad_mode is norm"),
    ("disc_sync_norm", lambda s: s.disc_sync_norm, "the run has one process"),
    ("ema_decay", lambda s: not s.use_ema, "--use_ema is False"),
    ("end_learning_rate lr_decay_steps", lambda s: s.lr_scheduler == "constant", "the rate is constant"),
    ("eval_video_path", lambda s: s.eval_steps == 0 and s.mode != 2, "--eval_steps is 0"),
    (
        "disc_start disc_weight disc_loss disc_norm lecam_weight r1_weight",
        lambda s: s.disc_type == "none",
        "--disc_type is none",
    ),
    (
        "weights model_config partial",
        lambda s: s.load_from_checkpoint is None,
        "there is no --load_from_checkpoint",
    ),
    ("perceptual_weight", lambda s: s.perceptual == "none", "the run has no perceptual term"),
    ("kl_weight", lambda s: s.train_parts == "decoder", "the encoder, which it is about, does not learn"),
    (
        "disc_start",
        lambda s: s.disc_type != "none" and s.disc_start is not None and s.disc_start >= s.max_steps,
        "--max_steps ends the run before it, so the critic never takes part",
    ),
    (
        "disc_start",
        lambda s: s.disc_start is None and s.max_steps <= warmup_steps(s) + FIRST_LEVEL,
        f"auto needs {FIRST_LEVEL} steps after the warm-up to see a level, so the critic never starts",
    ),
)


if __name__ == "__main__":
    sys.stdout.write(markdown(TrainSettings, title="Flags of `causalvae train`"))
