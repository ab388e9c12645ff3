"""Tables of settings of the commands that make and change files of weights. Free of torch, as `config` is."""

from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, Literal, cast

from causalvae.flags import Flag, check, closest, flags_of, refuse, setting
from causalvae.models.presets import PRESETS

FILES, WEIGHTS = "Files", "Weights"
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


def _check_preset(flag: Flag, name: str) -> None:
    if name not in PRESETS:
        guess = closest(name, list(PRESETS))
        hint = f"did you mean {guess}?" if guess else f"there are {', '.join(PRESETS)}"
        refuse(flag, name, f"there is no such preset; {hint}")


def _check_ending(flag: Flag, out: str) -> None:
    endings = (*TORCH_ENDINGS, SAFETENSORS)
    if Path(out).suffix.lower() not in endings:
        refuse(flag, out, f"what is written is told by its ending; give one of {', '.join(endings)}")
