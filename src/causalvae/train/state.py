"""What a training consists of between two steps, and how a checkpoint keeps it and gives it back."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from causalvae.errors import RunError, WeightsError
from causalvae.models.build import Model
from causalvae.train.optim import (
    LossScale,
    MasterWeights,
    load_optimizer_tensors,
    named,
    optimizer_tensors,
)
from causalvae.train.stability import ROLLBACK_FACTOR, LevelOff
from causalvae.weights.read import own_entries
from causalvae.weights.tensorfiles import read_safetensors
from causalvae.weights.writing import all_finite

COUNTERS = (
    "step",
    "cursor",
    "skipped",
    "rate_factor",
    "rollbacks",
    "went_back_to",
)  # of the state, in state.json


def ema_decay_at(updates: int, limit: float) -> float:
    """Decay of the average after this many updates.

    Rises to its limit, so that short runs have a useful average.
    """
    return min(limit, (1 + updates) / (10 + updates))


@dataclass
class TrainState:
    """Networks, averages, optimisers and counters. `step` counts updates, `cursor` batches drawn.

    ema: averaged parameters by name, fp32; empty if there is no average. logvar: log variance of the pixel
    loss, 0-d. level_off: decides when the critic starts, None where a step is given. lecam: averages of the
    critic's logits, `moved_averages`, on the CPU. skipped: steps in a row that were not finite, up to now.
    rate_factor: multiplies every learning rate; 1 until a rollback. rollbacks: how many there were, the last
    of them to the step went_back_to.
    masters: what the optimisers update where networks have weights in fewer bits; checkpoints keep them.
    scale: of the gradients of each network, None for none.
    kept: how a step computes, which rounding depends on, as `train.networks` keeps it for a run that goes on.
    """

    vae: Model
    ema: dict[str, Tensor]
    critic: nn.Module | None
    logvar: nn.Parameter
    optimizer: Optimizer
    critic_optimizer: Optimizer | None
    level_off: LevelOff | None = None
    lecam: Tensor = field(default_factory=lambda: torch.zeros(3))
    step: int = 0
    cursor: int = 0
    skipped: int = 0
    rate_factor: float = 1.0
    rollbacks: int = 0
    went_back_to: int | None = None
    masters: MasterWeights | None = None
    critic_masters: MasterWeights | None = None
    scale: LossScale | None = None
    critic_scale: LossScale | None = None
    kept: dict[str, Any] = field(default_factory=dict)  # Any: JSON

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Everything that the generator's optimiser updates: masters where there are any."""
        return named(self.optimizer)

    def critic_parameters(self) -> list[nn.Parameter]:
        """Everything that the critic's optimiser updates."""
        return [] if self.critic_optimizer is None else [p for _, p in named(self.critic_optimizer)]

    @torch.no_grad()
    def update_ema(self, limit: float) -> None:
        """Move the average towards the weights. Called after `step` was raised."""
        if not self.ema:
            return
        weights = [parameter.detach() for _, parameter in (self.masters or self.vae).named_parameters()]
        share = 1.0 - ema_decay_at(self.step, limit)
        torch._foreach_lerp_(list(self.ema.values()), weights, share)  # pyright: ignore[reportPrivateImportUsage]: one call for all

    def save(self, folder: Path) -> None:
        """Write weights, averages, optimisers and counters. Refuses what is not finite."""
        config = model_metadata(self.vae)
        _write(folder / "model.safetensors", _weights(self.vae, self.masters), config)
        if self.ema:
            _write(folder / "ema.safetensors", dict(self.vae.named_buffers()) | self.ema, config)
        moments = _prefixed("vae.", optimizer_tensors(self.optimizer))
        if self.critic is not None and self.critic_optimizer is not None:
            _write(folder / "discriminator.safetensors", _weights(self.critic, self.critic_masters), {})
            moments |= _prefixed("critic.", optimizer_tensors(self.critic_optimizer))
        moments |= {"logvar": self.logvar, "lecam": self.lecam}
        _write(folder / "optimizer.safetensors", moments, {})
        counters: dict[str, Any] = {name: getattr(self, name) for name in COUNTERS}  # Any: JSON
        counters |= {"threads": torch.get_num_threads(), **self.kept}
        if self.level_off is not None:
            counters["level_off"] = self.level_off.saved()
        for name, scale in self._scales().items():
            counters[name] = {"value": scale.value, "good": scale.good}
        (folder / "state.json").write_text(json.dumps(counters, indent=1) + "\n")

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Read what `save` wrote, bit for bit. WeightsError if it is not of these networks."""
        _load(self.vae, folder / "model.safetensors", self.masters)
        buffers = {name for name, _ in self.vae.named_buffers()}  # constants
        if self.ema:
            kept = read_safetensors(folder / "ema.safetensors")
            _copy_all(self.ema, {name: t for name, t in kept.items() if name not in buffers})
        moments = read_safetensors(folder / "optimizer.safetensors")
        self.logvar.copy_(moments["logvar"])
        load_optimizer_tensors(self.optimizer, _under("vae.", moments))
        if self.critic is not None and self.critic_optimizer is not None:
            _load(self.critic, folder / "discriminator.safetensors", self.critic_masters)
            load_optimizer_tensors(self.critic_optimizer, _under("critic.", moments))
        self.lecam = moments.get("lecam", self.lecam)  # absent from the first checkpoints, as some counters
        counters = read_counters(folder)
        for name in counters.keys() & set(COUNTERS):
            setattr(self, name, counters[name])
        if self.level_off is not None:
            self.level_off.restore(counters["level_off"])
        for name, scale in self._scales().items():
            if name in counters:  # else the run had none, and goes on with the first value
                scale.value, scale.good = counters[name]["value"], counters[name]["good"]

    def _scales(self) -> dict[str, LossScale]:
        scales = {"loss_scale": self.scale, "critic_loss_scale": self.critic_scale}
        return {name: scale for name, scale in scales.items() if scale is not None}

    def roll_back(self, folder: Path) -> None:
        """Go back to a checkpoint of this run, with smaller learning rates and the data that comes next.

        The cursor stays where it is, so the batches that led here are not drawn again. The factor is that of
        now and not the checkpoint's, so a second rollback to one checkpoint halves the rates again. Nothing
        is written: a run that is killed before it saves again resumes at the checkpoint as it is, meets the
        same batches, and rolls back in the same way.
        """
        cursor, rate_factor, rollbacks = self.cursor, self.rate_factor, self.rollbacks
        self.load(folder)
        self.cursor, self.skipped = cursor, 0
        self.rate_factor, self.rollbacks = rate_factor * ROLLBACK_FACTOR, rollbacks + 1
        self.went_back_to = self.step


def read_counters(folder: Path) -> dict[str, Any]:  # Any: JSON
    """step, cursor, thread count and more of a checkpoint: what `save` wrote of plain numbers."""
    return json.loads((folder / "state.json").read_text())


def model_metadata(vae: Model) -> dict[str, str]:
    """What a file of weights says about its model, in the safetensors header."""
    return {"format": "pt", **own_entries(vae.config)}


def _weights(network: nn.Module, masters: MasterWeights | None) -> dict[str, Tensor]:
    """What a checkpoint keeps of a network: its tensors, with masters in the place of lowered weights."""
    return network.state_dict() | (masters.tensors() if masters is not None else {})


def _load(network: nn.Module, path: Path, masters: MasterWeights | None) -> None:
    tensors = read_safetensors(path)
    network.load_state_dict(tensors, strict=True)
    if masters is not None:
        masters.load(tensors)


def _write(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    on_cpu = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    for name, tensor in on_cpu.items():
        if tensor.is_floating_point() and not all_finite(tensor):
            raise RunError(
                f"{path.name}: {name} is not finite, so this state is not saved; the checkpoints before it "
                "are good. Go on from the last one with a lower --start_learning_rate or --clip_grad True",
                status=1,
            )
    save_file(on_cpu, path, metadata=metadata)


def _prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _copy_all(targets: Mapping[str, Tensor], sources: Mapping[str, Tensor]) -> None:
    if targets.keys() != sources.keys():
        different = sorted(targets.keys() ^ sources.keys())
        raise WeightsError(f"the average holds other tensors than the model: {', '.join(different[:3])}")
    for name, target in targets.items():
        target.copy_(sources[name])
