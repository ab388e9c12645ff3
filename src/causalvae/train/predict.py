"""How much memory a training step will take, from shapes alone.

The very step that trains (`train.step`) runs once on the meta device, where tensors have shapes and no
memory, and every storage that it makes is counted while it lives. So saved activations, temporaries of the
backward pass, the critic's turn and split batches are all in the figure, whatever the model is.
"""

import copy
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from causalvae.losses import LossPlan
from causalvae.models.causalvae import CausalVAE, set_recompute
from causalvae.train.state import TrainState
from causalvae.train.step import train_step

MOMENTS = {"adamw": 2.0, "adam": 2.0, "adamw8bit": 0.5, "sgd": 1.0, "lion": 1.0}  # fp32 values per weight
LIBRARIES = 96 * 2**20  # bytes: code that torch loads at the first step, and the allocator's small change

PLAIN = LossPlan()

Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class StepBytes:
    """Predicted memory of a training in bytes, the bare process not counted.

    at_rest: what is there between steps: weights, averages, moments. peak: the most during a step, with all
    of at_rest in it.
    """

    at_rest: int
    peak: int


def step_bytes(  # noqa: PLR0913  as many things as memory depends on
    vae: CausalVAE,
    critic: nn.Module | None,
    *,
    shape: Sequence[int],
    parts: int = 1,
    ema: bool = True,
    optimizer: str = "adamw",
    masters: bool = False,
    loss: LossPlan = PLAIN,
    recompute: bool = False,
) -> StepBytes:
    """Memory of a step of this shape with these networks, as they are: their numbers, layout, recomputation.

    vae, critic: on any device, the meta device too; they are not touched, and their weights are not copied.
    shape: b 3 t h w of the whole batch, padded or not. loss: its perceptual term is a module on any device,
    or a function that takes the meta device. optimizer: as --optim. masters: weights below fp32 have masters
    in fp32.
    """
    with LiveBytes() as live:
        state = _twin(vae, critic, ema=ema, moments=MOMENTS[optimizer], masters=masters)
        set_recompute(state.vae, on=recompute)
        metric = loss.perceptual
        loss = replace(loss, perceptual=on_meta(metric) if isinstance(metric, nn.Module) else metric)
        at_rest = live.bytes
        b, _, t, h, w = shape
        live.count(torch.empty(tuple(shape), dtype=torch.uint8, device="meta"))  # as the loader gives it
        clip = torch.empty(tuple(shape), device="meta").contiguous(memory_format=torch.channels_last_3d)
        noise = torch.empty((b, *vae.geometry.latent_shape(t, h, w)), device="meta")
        judge = "hinge" if critic is not None else None
        train_step(state, clip, noise, loss=loss, critic_loss=judge, parts=parts)
    return StepBytes(at_rest=at_rest + LIBRARIES, peak=live.peak + LIBRARIES)


def on_meta(network: Network) -> Network:
    """The same network with weights that have shapes and no memory."""
    tensors = [*network.parameters(), *network.buffers()]
    return copy.deepcopy(network, {id(tensor): _meta(tensor) for tensor in tensors})


def _meta(tensor: Tensor) -> Tensor:
    """A tensor of the same shape, numbers and layout without memory; a parameter for a parameter."""
    empty = torch.empty_like(tensor, device="meta", requires_grad=False)
    return (
        nn.Parameter(empty, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    )


def _twin(
    vae: CausalVAE, critic: nn.Module | None, *, ema: bool, moments: float, masters: bool
) -> TrainState:
    """A training of these networks on the meta device, with moments as after its first update."""
    vae = on_meta(vae)
    critic = on_meta(critic) if critic is not None else None
    return TrainState(
        vae=vae,
        ema={name: _fp32(p.shape) for name, p in vae.named_parameters()} if ema else {},
        critic=critic,
        logvar=nn.Parameter(torch.zeros((), device="meta"), requires_grad=False),
        optimizer=_Moments(vae, moments, masters=masters),
        critic_optimizer=_Moments(critic, moments, masters=masters) if critic is not None else None,
        lecam=torch.zeros(3, device="meta"),
    )


def _fp32(shape: Sequence[int]) -> Tensor:
    return torch.empty(tuple(shape), device="meta", dtype=torch.float32)


class _Moments(Optimizer):
    """Holds what an optimiser holds, and updates nothing: the fused kernels make no temporaries."""

    def __init__(self, network: nn.Module, moments: float, *, masters: bool) -> None:
        super().__init__(network.named_parameters(), {})
        for param in (param for param in network.parameters() if param.requires_grad):
            values = moments * param.numel()
            if masters and param.dtype.itemsize < torch.float32.itemsize:
                values += 2 * param.numel()  # the master and its gradient
            self.state[param] = {"held": _fp32((int(values),))}

    def step(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]: no closure, no loss
        """Nothing to do without numbers."""


class LiveBytes(TorchDispatchMode):
    """While it is entered, counts the bytes of tensors that are alive on the meta device, and their peak.

    A storage counts once, however many views it has, from the operation that made it until nobody holds it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.peak = 0
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    # Any: whatever operators take and return
    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator and count what it made. Numbers that a step asks for are ones: all is finite."""
        if func is torch.ops.aten._local_scalar_dense.default:
            return args[0].dtype == torch.bool or 1.0
        result = func(*args, **(kwargs or {}))
        self.hold(result)
        return result

    def hold(self, *found: Any) -> None:  # Any: trees of tensors
        """Count every tensor in these trees that was not counted yet."""
        for leaf in tree_leaves(found):
            if isinstance(leaf, Tensor):
                self.count(leaf)

    def count(self, tensor: Tensor) -> None:
        """Count a tensor until it is gone."""
        storage = tensor.untyped_storage()
        name, size = id(storage), storage.nbytes()
        if tensor.device.type != "meta" or name in self._alive:
            return

        def gone(_: weakref.ref[torch.UntypedStorage]) -> None:
            del self._alive[name]
            self.bytes -= size

        self._alive[name] = weakref.ref(storage, gone)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
