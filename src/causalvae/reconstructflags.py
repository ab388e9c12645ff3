"""The table of settings of `reconstruct`, and the flags that cut videos. Free of torch, as `config` is."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from typing import Any, Literal, cast

from causalvae.data.codings import CODECS, CodecName
from causalvae.flags import Flag, Resolution, check, flags_of, refuse, setting
from causalvae.weightflags import amount

BASICS, FILMS, WORK = "Basics", "Videos", "Work"
REQUIRED = cast(Any, MISSING)  # Any: stands for the default of a flag of any type
QUALITIES = ", ".join(f"{each.quality[0]} for {name}" for name, each in CODECS.items() if each.quality)
TILE_HELP = (
    "auto cuts frames in tiles where they don't fit into --memory, off never does; or height x width of a "
    "tile in pixels, such as 256x256"
)
MEMORY_HELP = "what the model's work may take: auto is what is free on the device; or an amount such as 4GiB"
CHUNK_HELP = "frames that go through the model at a time; auto goes by --memory"


@dataclass(frozen=True, kw_only=True)
class ReconstructSettings:
    """What `causalvae reconstruct` is asked for. The videos stand before the flags."""

    # fmt: off
    checkpoint: str = setting(REQUIRED, BASICS,
        help="a checkpoint or run of this tool, or anybody's weights that training can start from")
    out: str = setting("results/reconstruct", BASICS,
        help="the folder for what is made; given again, it goes on there")
    weights: Literal["ema", "live"] = setting("ema", BASICS, help="which of a checkpoint's two sets")
    model_config: str | None = setting(None, BASICS, none_word="none",
        help="a published config.json that says what names of weights can't; without, the one beside them")
    overwrite: bool = setting(False, BASICS,
        help="replace what is in --out and was made in another way, or by something else")
    codec: CodecName = setting("h264", FILMS,  # noqa: RUF009 - frozen
        help="how videos are written: ffv1 (.mkv) is lossless, vp9 is .webm, the others .mp4; pictures are "
        ".png")
    quality: int | None = setting(None, FILMS, none_word="auto", limits={"at_least": 0},
        help=f"constant rate factor of the codec: less is better and larger; auto is {QUALITIES}")
    side_by_side: bool = setting(False, FILMS,
        help="write a second file too, with the original on the left and the reconstruction on the right")
    latents: Literal["mode", "sample"] = setting("mode", FILMS,
        help="what is decoded: the posterior's most likely latent, or one drawn from it")
    seed: int = setting(0, FILMS, limits={"at_least": 0}, help="of --latents sample")
    tile: str = setting("auto", WORK, help=TILE_HELP)
    memory: str = setting("auto", WORK, help=MEMORY_HELP)
    chunk: int | None = setting(None, WORK, none_word="auto", limits={"at_least": 1}, help=CHUNK_HELP)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = setting("auto", WORK,
        help="numbers of the convolutions; auto is bf16 on a GPU that has it, else fp32")
    device: str = setting("auto", WORK, help="auto, cpu, cuda, cuda:1, mps")
    # fmt: on

    def __post_init__(self) -> None:
        """Check each value by its row of the table, then the values against each other."""
        flags = flags_of(self)
        for name, flag in flags.items():
            check(flag, getattr(self, name))
        tile_wish(flags["tile"], self.tile)
        memory_wish(flags["memory"], self.memory)
        _check_quality(flags, self.quality, codec=self.codec)
        if self.seed and self.latents == "mode":
            refuse(flags["seed"], self.seed, "has no effect without --latents sample; leave it out")


def tile_wish(flag: Flag, text: str) -> Literal["auto", "off"] | tuple[int, int]:
    """What `--tile` means: auto, off, or height and width. ConfigError if it is none of them."""
    match text.lower():
        case "auto" | "off" as word:
            return word
        case _:
            try:
                size = Resolution.parse(text)
            except ValueError:
                refuse(flag, text, "must be auto, off, or height x width in pixels such as 256x256")
            return size.height, size.width


def memory_wish(flag: Flag, text: str) -> int | None:
    """What `--memory` means in bytes, None for auto. ConfigError if it is neither."""
    found = amount(text)
    if found is None and text.lower() != "auto":
        refuse(flag, text, "must be auto, or an amount such as 4GiB")
    return found


def _check_quality(flags: Mapping[str, Flag], quality: int | None, *, codec: CodecName) -> None:
    limits = CODECS[codec].quality
    if quality is None:
        return
    if limits is None:
        refuse(flags["quality"], quality, f"has no effect with --codec {codec}: it is lossless; leave it out")
    if quality > limits[1]:
        refuse(flags["quality"], quality, f"--codec {codec} has 0 (best) to {limits[1]}")
