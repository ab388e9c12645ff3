"""Tables of settings of the commands that make and change files of weights. Free of torch, as `config` is."""

from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, Literal, cast

from causalvae.errors import ConfigError
from causalvae.flags import Flag, MemoryBudget, check, closest, flags_of, refuse, setting
from causalvae.models.presets import PRESETS

FILES, WEIGHTS, FORMAT = "Files", "Weights", "Format"
REQUIRED = cast(Any, MISSING)  # Any: stands for the default of a flag of any type
TORCH_ENDINGS, SAFETENSORS = (".ckpt", ".pt", ".pth", ".bin"), ".safetensors"


@dataclass(frozen=True, kw_only=True)
class InitSettings:
    """What `causalvae init` is asked for. Raises ConfigError for values that can't be, alone or together."""

    # fmt: off
    from_: str | None = setting(None, FILES, none_word="none",
        help="the image VAE to start from: the folder or safetensors file of a diffusers AutoencoderKL, or "
        "the .ckpt of a latent diffusion image VAE; told apart by content")
    out: str = setting(REQUIRED, FILES,
        help="the file to write: .ckpt or .pt as torch has it, or .safetensors")
    overwrite: bool = setting(False, FILES, help="replace --out if it is there")
    model: str = setting("causalvae-488", WEIGHTS,
        help="the video VAE to make; `causalvae models` lists them. From an image VAE: causalvae-488, "
        "causalvae-488-16ch, osp-v1.0, osp-v1.1, osp-v1.2")
    method: Literal["tail", "center", "mean"] = setting("tail", WEIGHTS,
        help="where in time a kernel's weight is put: tail the frame itself, center the one before, mean all "
        "three frames that it sees")
    random: bool = setting(False, WEIGHTS, help="seeded random weights, without an image VAE")
    seed: int = setting(0, WEIGHTS, limits={"at_least": 0},
        help="of --random: the same seed gives the same weights")
    # fmt: on

    def __post_init__(self) -> None:
        """Check each value by its row of the table, then the values against each other."""
        flags = flags_of(self)
        values: dict[str, object] = {**vars(self), "from": self.from_}
        for name, flag in flags.items():
            check(flag, values[name])
        _check_preset(flags["model"], self.model)
        _check_ending(flags["out"], self.out)
        if self.random and self.from_ is not None:
            refuse(flags["from"], self.from_, "with --random there is no image VAE; give one of the two")
        if not self.random and self.from_ is None:
            refuse(flags["out"], self.out, "name an image VAE by --from, or give --random True")
        if self.random and self.method != "tail":
            refuse(flags["method"], self.method, "has no effect with --random; leave it out")
        if not self.random and self.seed != 0:
            refuse(flags["seed"], self.seed, "has no effect with --from: nothing is random; leave it out")


@dataclass(frozen=True, kw_only=True)
class ConvertSettings:
    """What a conversion is asked to do."""

    # A table is read by its rows, so it keeps its own line breaks.
    # fmt: off
    source: str = setting(REQUIRED, FILES,
        help="weights of any known format, as for --load_from_checkpoint; the first word without a flag")
    out: str = setting(REQUIRED, FILES, help="the file or folder to write; the second word without a flag")
    overwrite: bool = setting(False, FILES, help="write over what is there")
    weights: Literal["ema", "live"] = setting("ema", FILES,
        help="which weights are taken from a file that has averaged ones too")
    model_config: str | None = setting(None, FILES, none_word="none",
        help="a published config.json that says what names of weights can't; without, the one beside them")

    to: Literal["torch", "safetensors", "mindspore", "diffusers", "open-sora-plan"] | None = setting(
        None, FORMAT, none_word="auto",
        help="what to write; auto goes by --out: .safetensors, .pt .pth .bin .ckpt for torch, and a name "
        "without an ending for a folder as the model's own library has it")
    dtype: Literal["fp32", "fp16", "bf16"] | None = setting(None, FORMAT, none_word="keep",
        help="numbers to write; keep leaves them as they are")
    shard_size: str | None = setting(None, FORMAT, none_word="none",
        help="cut safetensors into files of at most this size, such as 2GB, with an index beside them")
    stats: str | None = setting(None, FORMAT, none_word="none",
        help="the stats.json of `causalvae encode` with these weights: mean and scale of latents go into the "
        "config that is written")
    # fmt: on

    def __post_init__(self) -> None:
        """Check each value by its row of the table."""
        flags = flags_of(self)
        for name, flag in flags.items():
            check(flag, getattr(self, name))
        if self.shard_size is not None and amount(self.shard_size) is None:
            refuse(flags["shard_size"], self.shard_size, "must be an amount such as 2GB or 500MiB")


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """What an export is asked to do."""

    # fmt: off
    source: str = setting(REQUIRED, FILES,
        help="weights of any known format, as for --load_from_checkpoint; the first word without a flag")
    out: str = setting(REQUIRED, FILES, help="the folder to write; the second word without a flag")
    overwrite: bool = setting(False, FILES, help="write over an earlier export")
    weights: Literal["ema", "live"] = setting("ema", FILES,
        help="which weights are taken from a file that has averaged ones too")
    model_config: str | None = setting(None, FILES, none_word="none",
        help="a published config.json that says what names of weights can't; without, the one beside them")

    to: Literal["onnx", "torch"] = setting("onnx", FORMAT,
        help="onnx for onnxruntime and others, or torch for programs of torch.export (.pt2)")
    # fmt: on

    def __post_init__(self) -> None:
        """Check each value by its row of the table."""
        for name, flag in flags_of(self).items():
            check(flag, getattr(self, name))


def amount(text: str) -> int | None:
    """Bytes of an amount such as `2GB`; None if it is none."""
    try:
        return MemoryBudget.parse(text).num_bytes
    except ValueError:
        return None


def with_places(argv: Sequence[str]) -> list[str]:
    """The words of a command with the two in front that belong to no flag as --source and --out."""
    places: list[str] = []
    for word, name in zip(argv, ("source", "out"), strict=False):
        if word.startswith("-"):
            break
        places.append(f"--{name}={word}")
    rest = list(argv[len(places) :])
    if places and rest and not rest[0].startswith("-"):
        raise ConfigError(f"{rest[0]}: there are two places, what to read and what to write; this is a third")
    return places + rest


def _check_preset(flag: Flag, name: str) -> None:
    if name not in PRESETS:
        guess = closest(name, list(PRESETS))
        hint = f"did you mean {guess}?" if guess else f"there are {', '.join(PRESETS)}"
        refuse(flag, name, f"there is no such preset; {hint}")


def _check_ending(flag: Flag, out: str) -> None:
    endings = (*TORCH_ENDINGS, SAFETENSORS)
    if Path(out).suffix.lower() not in endings:
        refuse(flag, out, f"what is written is told by its ending; give one of {', '.join(endings)}")
