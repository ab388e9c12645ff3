"""Tables of settings of `eval` and `compare`, and the rules of --fail_if. Free of torch, as `config` is."""

import math
import operator
import re
from collections.abc import Callable
from dataclasses import MISSING, dataclass
from typing import Any, Literal, cast

from causalvae.errors import ConfigError
from causalvae.flags import Resolution, check, flags_of, refuse, setting

BASICS, CLIPS, WORK = "Basics", "Clips", "Work"
REQUIRED = cast(Any, MISSING)  # Any: stands for the default of a flag of any type
AT_LEAST_1, AT_LEAST_0 = {"at_least": 1}, {"at_least": 0}
FRAMES, SIZE, STRIDE, PER_VIDEO = 17, Resolution(256, 256), 1, 1  # of clips, where nothing says otherwise
COMPARISONS: dict[str, Callable[[float, float], bool]] = {"<": operator.lt, ">": operator.gt}


@dataclass(frozen=True, kw_only=True)
class EvalSettings:
    """What `causalvae eval` is asked for. Raises ConfigError for values that can't be, alone or together."""

    # fmt: off
    checkpoint: tuple[str, ...] = setting(REQUIRED, BASICS,
        help="one or several: a checkpoint or run of this tool, or anybody's weights that training can start "
        "from; the word data stands for the clips themselves, the upper bound")
    video_path: str | None = setting(None, BASICS, none_word="none",
        help="what --video_path of training takes; with --manifest, where its videos are")
    manifest: str | None = setting(None, BASICS, none_word="none",
        help="the manifest.json of an evaluation: the same clips again, or an error")
    out: str = setting("results/eval", BASICS, help="the folder for results; given again, it goes on there")
    num_frames: int | None = setting(None, CLIPS, none_word="auto", limits=AT_LEAST_1,
        help=f"frames of a clip; auto is {FRAMES}, or what the manifest says, here and in the next three")
    resolution: Resolution | None = setting(None, CLIPS, none_word="auto",  # noqa: RUF009 - frozen
        help=f"size of clips, cropped at the centre; auto is {SIZE}")
    sample_rate: int | None = setting(None, CLIPS, none_word="auto", limits=AT_LEAST_1,
        help=f"every n-th frame; auto is {STRIDE}")
    clips_per_video: int | None = setting(None, CLIPS, none_word="auto", limits=AT_LEAST_1,
        help=f"at most so many clips of a video, evenly spaced, none overlapping; auto is {PER_VIDEO}")
    weights: Literal["ema", "live"] = setting("ema", BASICS, help="which of a checkpoint's two sets")
    model_config: str | None = setting(None, BASICS, none_word="none",
        help="a published config.json that says what names of weights can't; without, the one beside them")
    precision: Literal["fp32", "bf16", "fp16"] = setting("fp32", BASICS,
        help="what convolutions compute in; fp32 is what to publish")
    perceptual: str = setting("none", BASICS,
        help="a network that judges too, as in training: lpips-vgg, lpips-alex, lpips-squeeze, or yours")
    i3d: str | None = setting(None, BASICS, none_word="none",
        help="file of I3D's weights for Kinetics-400: measures rFVD too, of 401 clips or more")
    framing: Literal["stretch", "crop"] = setting("stretch", BASICS,
        help="of --i3d: how frames become 224x224")
    probes: bool = setting(False, BASICS, help="measure clips of one colour and masked latents too")
    cost: bool = setting(False, BASICS, help="measure clips per second, memory and operations too")
    films: int = setting(8, WORK, limits=AT_LEAST_0,
        help="worst clips of which films are written, for the report")
    batch_size: int = setting(1, WORK, limits=AT_LEAST_1, help="clips that go through the model at once")
    dataloader_num_workers: int = setting(2, WORK, limits=AT_LEAST_0, help="threads that decode ahead")
    device: str = setting("auto", WORK, help="auto, cpu, cuda, cuda:1, mps")
    # fmt: on

    def __post_init__(self) -> None:
        """Check each value by its row of the table, then the values against each other."""
        flags = flags_of(self)
        for name, flag in flags.items():
            check(flag, getattr(self, name))
        if self.video_path is None and self.manifest is None:
            raise ConfigError("--video_path is missing; give it, or the --manifest of an earlier evaluation")
        if self.framing != "stretch" and self.i3d is None:
            refuse(flags["framing"], self.framing, "has no effect without --i3d; leave it out")


@dataclass(frozen=True, kw_only=True)
class CompareSettings:
    """What `causalvae compare` is asked for. What is compared stands before the flags."""

    # fmt: off
    fail_if: tuple[str, ...] | None = setting(None, BASICS, none_word="none",
        help="exit with status 1 if a mean difference, second minus first, is so: 'psnr<-0.1', several with "
        "commas")
    weights: Literal["ema", "live"] = setting("ema", BASICS,
        help="which of the two sets of weights, where there are two")
    video_path: str | None = setting(None, CLIPS, none_word="none",
        help="evaluate two checkpoints on these videos first, as `causalvae eval` does")
    manifest: str | None = setting(None, CLIPS, none_word="none",
        help="the same, with the clips of a manifest")
    out: str = setting("results/eval", CLIPS, help="the folder for the results of that")
    num_frames: int | None = setting(None, CLIPS, none_word="auto", limits=AT_LEAST_1,
        help="as in `causalvae eval`, and the next three")
    resolution: Resolution | None = setting(None, CLIPS, none_word="auto",  # noqa: RUF009 - frozen
        help="size of clips")
    sample_rate: int | None = setting(None, CLIPS, none_word="auto", limits=AT_LEAST_1,
        help="every n-th frame")
    clips_per_video: int | None = setting(None, CLIPS, none_word="auto", limits=AT_LEAST_1,
        help="at most so many clips of a video")
    batch_size: int = setting(1, WORK, limits=AT_LEAST_1, help="clips that go through the model at once")
    dataloader_num_workers: int = setting(2, WORK, limits=AT_LEAST_0, help="threads that decode ahead")
    device: str = setting("auto", WORK, help="auto, cpu, cuda, cuda:1, mps")
    # fmt: on

    def __post_init__(self) -> None:
        """Check each value by its row of the table."""
        for name, flag in flags_of(self).items():
            check(flag, getattr(self, name))
        for text in self.fail_if or ():
            FailRule.parse(text)


@dataclass(frozen=True)
class FailRule:
    """A mean difference that fails a comparison: `psnr<-0.1`."""

    metric: str
    sign: str
    bound: float

    @classmethod
    def parse(cls, text: str) -> "FailRule":
        """ConfigError unless the text is NAME<NUMBER or NAME>NUMBER."""
        match = re.fullmatch(r"\s*([A-Za-z][\w.-]*)\s*([<>])\s*([+-]?[0-9.]+(?:[eE][+-]?[0-9]+)?)\s*", text)
        if match is None or not _is_number(match[3]):
            raise ConfigError(f"--fail_if {text}: must be a metric, < or >, and a number, such as psnr<-0.1")
        return cls(match[1], match[2], float(match[3]))

    def fails(self, difference: float) -> bool:
        """Whether this mean difference is what the rule forbids."""
        return COMPARISONS[self.sign](difference, self.bound)

    def __str__(self) -> str:
        return f"{self.metric}{self.sign}{self.bound:g}"


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
