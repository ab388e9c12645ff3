"""How much memory a training step will take, from shapes alone.

The very step that trains (`train.step`) runs once on the meta device, where tensors have shapes and no
memory, and every storage that it makes is counted while it lives. So saved activations, temporaries of the
backward pass, the critic's turn and split batches are all in the figure, whatever the model is.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from causalvae.losses import LossPlan
from causalvae.models.build import Model
from causalvae.models.meta import LiveBytes, meta_twin, on_meta, tensors_of
from causalvae.train.optim import ADD_PARAM_GROUP, MasterWeights, OptimizerKind, named
from causalvae.train.state import TrainState
from causalvae.train.step import train_step

MOMENTS: dict[OptimizerKind, float] = {
    "adamw": 2.0,
    "adam": 2.0,
    "adamw8bit": 0.5,
    "sgd": 1.0,
    "lion": 1.0,
}  # fp32 values per weight
LIBRARIES = 84 * 2**20  # bytes: code that torch loads or makes at the first step, measured on a CPU

PLAIN = LossPlan()


@dataclass(frozen=True)
class StepBytes:
    """Predicted memory of a training in bytes, the bare process not counted.

    at_rest: what is there between steps: weights, averages, moments. peak: the most during a step, with all
    of at_rest in it.
    """

    at_rest: int
    peak: int


def step_bytes(
    state: TrainState,
    *,
    shape: Sequence[int],
    parts: int = 1,
    recompute: bool = False,
    loss: LossPlan = PLAIN,
    optimizer: OptimizerKind = "adamw",
) -> StepBytes:
    """Memory of a step on a batch of this shape, with the networks as they are: numbers, layout, masters.

    state: on any device; it is not touched and its weights are not copied. A critic is taken to judge.
    shape: b 3 t h w of the whole batch. parts, recompute: as the step would be made. loss: its perceptual
    term is a module on any device, or a function that takes the meta device. optimizer: kind of both.
    """
    with LiveBytes() as live:
        twin = _twin(state, moments=MOMENTS[optimizer])
        twin.vae.set_recompute(on=recompute)
        if isinstance(loss.perceptual, nn.Module):
            loss = replace(loss, perceptual=on_meta(loss.perceptual))
        at_rest = live.bytes
        b, _, t, h, w = shape
        pixels = torch.empty(tuple(shape), dtype=torch.uint8, device="meta")  # held while the step is made
        clip = torch.empty(tuple(shape), device="meta").contiguous(memory_format=torch.channels_last_3d)
        noise = torch.empty((b, *twin.vae.geometry.latent_shape(t, h, w)), device="meta")
        judge = "hinge" if twin.critic is not None else None
        train_step(twin, clip, noise, loss=loss, critic_loss=judge, parts=parts)
        del pixels
    return StepBytes(at_rest=at_rest + LIBRARIES, peak=live.peak + LIBRARIES)


def blueprint(
    vae: Model,
    critic: nn.Module | None,
    *,
    ema: bool = True,
    lowered: Callable[[nn.Module], MasterWeights | None] | None = None,
) -> TrainState:
    """A training on the meta device to predict from, of networks that are on any device and are not touched.

    lowered: makes a network compute in fewer bits and returns its masters, as `precision.lower` does.
    """
    vae = on_meta(vae)
    average = {name: torch.empty_like(p, device="meta") for name, p in vae.named_parameters()} if ema else {}
    critic = None if critic is None else on_meta(critic)
    masters = lowered(vae) if lowered is not None else None
    critic_masters = lowered(critic) if lowered is not None and critic is not None else None
    judging = critic_masters or critic
    return TrainState(
        vae=vae,
        ema=average,
        critic=critic,
        logvar=nn.Parameter(torch.zeros((), device="meta"), requires_grad=False),
        optimizer=_Moments((masters or vae).named_parameters(), moments=0),
        critic_optimizer=None if judging is None else _Moments(judging.named_parameters(), moments=0),
        lecam=torch.zeros(3, device="meta"),
        masters=masters,
        critic_masters=critic_masters,
    )


def _twin(state: TrainState, *, moments: float) -> TrainState:
    """The same training on the meta device, with moments as after its first update."""
    networks = [network for network in (state.vae, state.critic) if network is not None]
    optimizers = [each for each in (state.optimizer, state.critic_optimizer) if each is not None]
    tensors = [*state.ema.values(), state.logvar, state.lecam]
    tensors += [tensor for network in networks for tensor in tensors_of(network)]
    tensors += [param for each in optimizers for _, param in named(each)]
    known: dict[int, Any] = {
        id(tensor): meta_twin(tensor) for tensor in tensors
    }  # Any: what deepcopy has done
    for each in optimizers:
        twins = [(name, known[id(param)]) for name, param in named(each)]
        known[id(each)] = _Moments(twins, moments=moments)
    return copy.deepcopy(state, known)


class _Moments(Optimizer):
    """Holds as much as an optimiser holds, and updates nothing: the fused kernels make no temporaries."""

    add_param_group = ADD_PARAM_GROUP

    def __init__(self, named_parameters: Iterable[tuple[str, nn.Parameter]], *, moments: float) -> None:
        super().__init__(named_parameters, {})
        for _, param in named(self):
            values = int(moments * param.numel())
            self.state[param] = {"held": torch.empty(values, dtype=torch.float32, device="meta")}

    def step(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]: no closure, no loss
        """Nothing to do without numbers."""
