"""Tables of settings of the commands that read weights and write them, torch-free as `config` is."""

from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from typing import Any, Literal, cast

from causalvae.errors import ConfigError
from causalvae.flags import MemoryBudget, check, flags_of, refuse, setting

FILES, FORMAT = "Files", "Format"
REQUIRED = cast(Any, MISSING)  # Any: stands for the default of a flag of any type


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
