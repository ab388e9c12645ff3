"""In which numbers a run computes, and what that makes of its networks: `--precision` times `--amp_level`.

There is no autocast. Every convolution knows the numbers it computes in, norms compute in those of their
weights, losses and the posterior in fp32, so a level is a few attributes and casts, made once:

    level  convolutions   their weights           norms, mixing factors   the optimiser updates
    O0     fp32           fp32                    fp32                    the weights
    O1     `precision`    fp32                    fp32                    the weights
    O2     `precision`    `precision`             fp32                    fp32 masters, which are saved
    O3     `precision`    `precision`             `precision`             in fp32, then rounded to the weights

Convolutions that a CPU gets wrong (`train.convolutions`) compute in fp32 at every level, and have fp32
weights up to O2.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from causalvae.errors import ConfigError
from causalvae.machine import Capability
from causalvae.models.diffusers import DiffusersVAE
from causalvae.train.convolutions import convolutions
from causalvae.train.optim import LossScale, MasterWeights

NUMBERS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

PrecisionName = Literal["fp32", "bf16", "fp16"]
Level = Literal["O0", "O1", "O2", "O3"]
TorchNorm = nn.BatchNorm2d | nn.BatchNorm3d | nn.GroupNorm


@dataclass(frozen=True, kw_only=True)
class Precision:
    """What is in force: name and level, fp32 and O0 going together; and what there is to warn of."""

    name: PrecisionName = "fp32"
    level: Level = "O0"
    warnings: tuple[str, ...] = ()

    @property
    def numbers(self) -> torch.dtype:
        """What convolutions compute in."""
        return NUMBERS[self.name]

    @staticmethod
    def of(
        name: PrecisionName | Literal["auto"],
        level: Level,
        *,
        device: str,
        capability: Capability,
        saved: tuple[PrecisionName, Level] | None = None,
    ) -> "Precision":
        """What comes of --precision and --amp_level on this device.

        saved: what was in force where the run is going on from. It stays: other numbers would be another run.
        Raises ConfigError where this device has not got them.
        """
        fresh = _fresh(name, level, device=device, capability=capability)
        if saved is None or saved == (fresh.name, fresh.level):
            return fresh
        return _as_saved(*saved, fresh=fresh, capability=capability)

    def facts(self) -> dict[str, Any]:  # Any: JSON
        """For run.json."""
        return {"precision": self.name, "amp_level": self.level}


def _fresh(
    name: PrecisionName | Literal["auto"], level: Level, *, device: str, capability: Capability
) -> Precision:
    """What comes of the flags where nothing was before."""
    chosen = _automatic(device, capability) if name == "auto" else name
    if chosen == "fp32":
        return Precision()
    if level == "O0":
        said = f"--amp_level O0 computes everything in fp32, so --precision {name} has no effect"
        return Precision(warnings=() if name == "auto" else (said,))
    if chosen in capability.missing:
        said = f"--precision {name}: {capability.missing[chosen]}; the run computes in fp32 (amp_level O0)"
        return Precision(warnings=(said,))
    return Precision(name=chosen, level=level, warnings=_remarks(chosen, capability))


def _automatic(device: str, capability: Capability) -> PrecisionName:
    """bf16 on a GPU that has it, else fp32."""
    return "bf16" if device.startswith("cuda") and "bf16" not in capability.missing else "fp32"


def _remarks(name: str, capability: Capability) -> tuple[str, ...]:
    return (f"--precision {name}: {capability.remarks[name]}",) if name in capability.remarks else ()


def _as_saved(name: PrecisionName, level: Level, *, fresh: Precision, capability: Capability) -> Precision:
    """What was in force when the run was saved, in the place of what would be now."""
    if name in capability.missing:
        raise ConfigError(
            f"this run computes in {name} ({level}), and here: {capability.missing[name]}. Go on where it "
            "began, or start another run from its weights: --exp_name NEW --load_from_checkpoint RUN "
            "--precision fp32"
        )
    said = (
        f"this run began in {name} ({level}) and goes on in it, to stay the same run; one that began here "
        f"would compute in {fresh.name} ({fresh.level})"
    )
    return Precision(name=name, level=level, warnings=(said, *_remarks(name, capability)))


def lower(network: nn.Module, precision: Precision, *, keep: Collection[str] = ()) -> MasterWeights | None:
    """Make a network in fp32 compute as the precision says. The masters are what an optimiser updates.

    keep: names of convolutions that compute in fp32. None: the optimiser updates the network's own weights.
    Freeze parameters and copy them for an average before.
    """
    if precision.level == "O0":
        return None
    if isinstance(network, DiffusersVAE):
        network.arithmetic = precision.numbers
        return None
    everything = precision.level == "O3"
    low = _lower_convolutions(network, precision, keep=keep)
    if everything:
        low = [name for name, _ in network.named_parameters()]
        for module in network.modules():
            _lower_statistics(module, precision.numbers)
    for module in network.modules():
        if isinstance(module, TorchNorm):
            module.register_forward_pre_hook(_in_its_numbers)
    if precision.level == "O1":
        return None
    return MasterWeights(network, names=low, numbers=precision.numbers, remember=not everything)


def _lower_convolutions(network: nn.Module, precision: Precision, *, keep: Collection[str]) -> list[str]:
    """Have convolutions compute in fewer bits; names of the parameters of those that do."""
    low: list[str] = []
    for name, module in convolutions(network).items():
        if name not in keep:
            module.arithmetic = precision.numbers
            low += [f"{name}.{own}" for own, _ in module.named_parameters(recurse=False)]
        elif precision.level == "O3":
            module.arithmetic = torch.float32
    return low


def _lower_statistics(module: nn.Module, numbers: torch.dtype) -> None:
    """Running statistics of a norm go with its weights: torch refuses to mix them."""
    for name, buffer in module.named_buffers(recurse=False):
        if buffer.is_floating_point():
            setattr(module, name, buffer.to(numbers))


def _in_its_numbers(norm: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    """What goes into a norm of torch, in the numbers of its weights.

    BatchNorm with fp32 weights takes fewer bits as they are, and sums them in fp32.
    """
    (x,) = inputs
    weight = norm.get_parameter("weight")
    takes_both = isinstance(norm, nn.BatchNorm2d | nn.BatchNorm3d) and weight.dtype == torch.float32
    return (x if takes_both else x.to(weight.dtype),)


def first_loss_scale(precision: Precision, *, value: float, window: int, given: bool) -> LossScale | None:
    """The loss scale that a network's training begins with: for fp16, and for bf16 where it was asked for."""
    used = precision.name == "fp16" or (precision.name == "bf16" and given)
    return LossScale(value, window) if used else None
