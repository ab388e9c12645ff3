"""Tables of settings of `encode` and `decode`. Free of torch, as `config` is."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass
from typing import Any, Literal, cast

from causalvae.data.codings import CodecName
from causalvae.errors import ConfigError
from causalvae.flags import Flag, Resolution, check, flags_of, refuse, setting
from causalvae.reconstructflags import MEMORY_HELP, TILE_HELP, memory_wish, tile_wish

BASICS, CLIPS, FILES, WORK = "Basics", "Frames", "Files", "Work"
REQUIRED = cast(Any, MISSING)  # Any: stands for the default of a flag of any type
AT_LEAST_1, AT_LEAST_0 = {"at_least": 1}, {"at_least": 0}
PER_SHARD = 64  # videos


@dataclass(frozen=True, kw_only=True)
class EncodeSettings:
    """What `causalvae encode` is asked for. ConfigError for values that can't be, alone or together."""

    # fmt: off
    video_path: str = setting(REQUIRED, BASICS,
        help="what --video_path of training takes; the first word without a flag")
    checkpoint: str = setting(REQUIRED, BASICS,
        help="a checkpoint or run of this tool, or anybody's weights that training can start from")
    out: str = setting("results/latents", BASICS,
        help="the folder for latents; given again, it goes on there")
    store: Literal["mean", "moments", "sample"] = setting("mean", BASICS,
        help="the posterior's mean; mean and log variance, to draw from when they are read; or one sample")
    dtype: Literal["fp32", "fp16", "bf16"] = setting("fp16", BASICS, help="numbers that are written")
    seed: int = setting(0, BASICS, limits=AT_LEAST_0, help="of --store sample")
    caption_column: str | None = setting(None, BASICS, none_word="none",
        help="the column of a .csv or field of a .jsonl list that goes with the latents as their caption; of "
        "tar files, the field of the .json beside a video, without it the .txt")
    weights: Literal["ema", "live"] = setting("ema", BASICS, help="which of a checkpoint's two sets")
    model_config: str | None = setting(None, BASICS, none_word="none",
        help="a published config.json that says what names of weights can't; without, the one beside them")
    num_frames: int | None = setting(None, CLIPS, none_word="all", limits=AT_LEAST_1,
        help="frames of a clip; all encodes whole videos, of any length")
    resolution: Resolution | None = setting(None, CLIPS, none_word="keep",  # noqa: RUF009 - frozen
        help="size that frames are resized to cover, and cropped to at the centre; keep leaves them be")
    sample_rate: int = setting(1, CLIPS, limits=AT_LEAST_1, help="every n-th frame")
    clips_per_video: int = setting(1, CLIPS, limits=AT_LEAST_1,
        help="at most so many clips of a video, evenly spaced, none overlapping")
    format_: Literal["shards", "safetensors"] = setting("shards", FILES,
        help="tar files as WebDataset names them, or folders with a safetensors file for each latent")
    videos_per_shard: int = setting(PER_SHARD, FILES, limits=AT_LEAST_1,
        help="videos whose latents make one tar file or folder, which one process makes at a time")
    shard: str = setting("0/1", FILES,
        help="i/n: this process makes every n-th tar file or folder from number i on; whoever is last writes "
        "the index. Under torchrun the processes share that again")
    batch_size: int = setting(1, WORK, limits=AT_LEAST_1,
        help="clips of one video that go through the model at once")
    dataloader_num_workers: int = setting(2, WORK, limits=AT_LEAST_0, help="threads that decode ahead")
    tile: str = setting("auto", WORK,
        help="auto cuts frames in tiles where they don't fit into --memory, off never does; or height x "
        "width of a tile in pixels, such as 256x256")
    memory: str = setting("auto", WORK,
        help="what the model's work may take: auto is what is free on the device; or an amount such as 4GiB")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = setting("auto", WORK,
        help="numbers of the convolutions; auto is bf16 on a GPU that has it, else fp32")
    device: str = setting("auto", WORK, help="auto, cpu, cuda, cuda:1, mps")
    # fmt: on

    def __post_init__(self) -> None:
        """Check each value by its row of the table, then the values against each other."""
        flags = flags_of(self)
        values: dict[str, object] = {**vars(self), "format": self.format_}
        for name, flag in flags.items():
            check(flag, values[name])
        tile_wish(flags["tile"], self.tile)
        memory_wish(flags["memory"], self.memory)
        shard_of(flags["shard"], self.shard)
        for name in ("clips_per_video", "batch_size"):
            if self.num_frames is None and values[name] != 1:
                refuse(flags[name], values[name], "has no effect on whole videos; give --num_frames too")
        if self.seed and self.store != "sample":
            refuse(flags["seed"], self.seed, "has no effect without --store sample; leave it out")


@dataclass(frozen=True, kw_only=True)
class DecodeSettings:
    """What `causalvae decode` is asked for."""

    # fmt: off
    latents: str = setting(REQUIRED, BASICS,
        help="the folder of `causalvae encode`, or one of its tar or safetensors files; the first word "
        "without a flag")
    checkpoint: str = setting(REQUIRED, BASICS, help="the model that made the latents")
    out: str = setting("results/decoded", BASICS, help="the folder for videos and pictures")
    overwrite: bool = setting(False, BASICS, help="make again what is in --out already")
    codec: CodecName = setting("h264", BASICS,  # noqa: RUF009 - frozen
        help="how videos are written: ffv1 (.mkv) is lossless, vp9 is .webm, the others .mp4; a latent of "
        "one frame is .png")
    any_model: bool = setting(False, BASICS, help="decode latents that other weights made, too")
    weights: Literal["ema", "live"] = setting("ema", BASICS, help="which of a checkpoint's two sets")
    model_config: str | None = setting(None, BASICS, none_word="none",
        help="a published config.json that says what names of weights can't; without, the one beside them")
    tile: str = setting("auto", WORK, help=TILE_HELP)
    memory: str = setting("auto", WORK, help=MEMORY_HELP)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = setting("auto", WORK,
        help="numbers of the convolutions; auto is bf16 on a GPU that has it, else fp32")
    device: str = setting("auto", WORK, help="auto, cpu, cuda, cuda:1, mps")
    # fmt: on

    def __post_init__(self) -> None:
        """Check each value by its row of the table."""
        flags = flags_of(self)
        for name, flag in flags.items():
            check(flag, getattr(self, name))
        tile_wish(flags["tile"], self.tile)
        memory_wish(flags["memory"], self.memory)


def with_first(argv: Sequence[str], name: str) -> list[str]:
    """The words of a command, the first one as this flag if it belongs to none."""
    if not argv or argv[0].startswith("-"):
        return list(argv)
    if len(argv) > 1 and not argv[1].startswith("-"):
        raise ConfigError(f"{argv[1]}: one place can be named before the flags; this is a second")
    return [f"--{name}={argv[0]}", *argv[1:]]


def shard_of(flag: Flag, text: str) -> tuple[int, int]:
    """What `--shard` means: number and count. ConfigError if it is not i/n with i < n."""
    match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
    if match is None or int(match[1]) >= int(match[2]):
        refuse(flag, text, "must be i/n with i from 0 to n - 1, such as 0/4")
    return int(match[1]), int(match[2])


def ranked(shard: tuple[int, int], variables: Mapping[str, str]) -> tuple[int, int]:
    """The share of one process of torchrun. variables: the environment."""
    try:
        rank, world = int(variables.get("RANK", "0")), int(variables.get("WORLD_SIZE", "1"))
    except ValueError as error:
        raise ConfigError(f"RANK and WORLD_SIZE of the environment must be numbers: {error}") from error
    return shard[0] * world + rank, shard[1] * world
