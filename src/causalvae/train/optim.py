"""Optimisers, their saved state, master weights, loss scale, learning rate by step, and gradient norms.

Weight decay is decoupled for every optimiser: weights shrink by lr * weight_decay beside the update. The
state is exported as flat tensors named `parameter.exp_avg`, and comes back bit for bit.
"""

import inspect
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from causalvae.errors import ConfigError, RunError

OptimizerKind = Literal["adamw", "adam", "sgd", "lion", "adamw8bit"]
Schedule = Literal["constant", "cosine", "cosine_decay", "linear"]

AGC_FACTOR = 0.01  # largest ratio of gradient to weight norm, as published for large batches
AGC_FLOOR = 1e-3  # smallest weight norm that counts, as published
SMALLEST_SCALE = 1.0  # below, gradients that overflow are at fault and not the scale
LARGEST_SCALE = 2.0**24  # above, it would rise only to overflow again

# These methods of torch's optimisers import its compiler when they are first called, to have it leave them
# alone, which takes 0.9 s. What they wrap does the same without it.
ADD_PARAM_GROUP = inspect.unwrap(Optimizer.add_param_group)
ADAMW_STEP = inspect.unwrap(AdamW.step)


def build_optimizer(
    named_params: Iterable[tuple[str, nn.Parameter]],
    *,
    kind: OptimizerKind,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 0.01,
) -> Optimizer:
    """An optimiser of two groups, with and without weight decay, in the order of named_params.

    Not decayed: biases, weights of norms, mixing factors, logvar: what has fewer than two axes. `adam` is
    `adamw`: they would differ only in a decay that is not decoupled. `sgd` has momentum betas[0] and no use
    for betas[1]. Parameters without requires_grad are left out.
    """
    trainable = [(name, p) for name, p in named_params if p.requires_grad]
    decayed = [(name, p) for name, p in trainable if p.ndim >= 2]
    plain = [(name, p) for name, p in trainable if p.ndim < 2]
    groups: list[dict[str, Any]] = [  # a group maps words to numbers, flags and lists of parameters
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ConfigError("there is nothing to train: no parameter requires a gradient")
    if kind == "sgd":
        return DecoupledSGD(groups, lr=lr, momentum=betas[0])
    if kind == "lion":
        return Lion(groups, lr=lr, betas=betas)
    if kind == "adamw8bit":
        return adamw8bit(groups, lr=lr, betas=betas)
    return FusedAdamW(groups, lr=lr, betas=betas, fused=True)


def drop_gradients(optimizer: Optimizer) -> None:
    """Leave no gradient to any parameter of an optimiser."""
    for _, param in named(optimizer):
        param.grad = None


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    """Use this learning rate from the next update on, in every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def learning_rate(step: int, *, peak: float, end: float, kind: Schedule, warmup: int, decay: int) -> float:
    """Learning rate of update number `step`, from 0.

    Step i of the warmup has peak * (i + 1) / warmup. Then `cosine` (`cosine_decay` is the same) and `linear`
    go from peak to end in `decay` steps and stay there; `constant` stays at peak.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    if kind == "constant":
        return peak
    done = min((step - warmup) / decay, 1.0) if decay > 0 else 1.0
    if kind == "linear":
        return peak + (end - peak) * done
    return end + 0.5 * (peak - end) * (1.0 + math.cos(math.pi * done))


def clip_gradients(params: Iterable[nn.Parameter], max_norm: float | None = None) -> float:
    """Scale gradients down in place so that their joint norm is at most max_norm; return the norm before.

    None: only measure. A norm that is not finite is returned and nothing is changed.
    """
    with_grad = [p for p in params if p.grad is not None]
    grads = [p.grad for p in with_grad if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads)
    value = float(norm)
    if max_norm is not None and math.isfinite(value):
        torch.nn.utils.clip_grads_with_norm_(with_grad, max_norm, norm)
    return value


def clip_by_unit(params: Iterable[nn.Parameter], factor: float = AGC_FACTOR) -> float:
    """Scale the gradient of each unit in place to at most factor * its weight norm; the joint norm before.

    A unit is one output of a convolution or linear layer, with all its incoming weights; biases, norms and
    scalars are one unit as a whole. The weight norm counts as AGC_FLOOR at least, so that weights that begin
    at 0 can leave it. Brock et al., High-Performance Large-Scale Image Recognition (2021), eq. 3. They leave
    out the last linear layer, a classifier's; the last layers here are convolutions like the others, and are
    clipped. A joint norm that is not finite is returned and nothing is changed.
    """
    with_grad = [p for p in params if p.grad is not None]
    grads = [p.grad for p in with_grad if p.grad is not None]
    if not grads:
        return 0.0
    norms = [unit_norms(grad) for grad in grads]
    flat = torch.cat([norm.flatten() for norm in norms])
    value = float(torch.linalg.vector_norm(flat))
    if math.isfinite(value):
        weights = torch.cat([unit_norms(p.detach()).flatten() for p in with_grad])
        most = factor * weights.clamp(min=AGC_FLOOR)
        scales = torch.where(flat > most, most / flat, 1.0).split([norm.numel() for norm in norms])
        for grad, norm, scale in zip(grads, norms, scales, strict=True):
            grad.mul_(scale.view_as(norm))  # in the gradient's own memory layout
    return value


def unit_norms(tensor: Tensor) -> Tensor:
    """Norm of each unit, at least fp32: of each index of the first axis, shape n 1 1 ...; 0-d of a vector."""
    dims = tuple(range(1, tensor.ndim)) if tensor.ndim > 1 else None
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    return torch.linalg.vector_norm(tensor, dim=dims, keepdim=tensor.ndim > 1, dtype=dtype)


@dataclass
class LossScale:
    """What a loss is multiplied by before its backward pass, so that small gradients survive in few bits.

    value: in force. window: updates in a row after which it doubles. good: those so far.
    """

    value: float
    window: int
    good: int = 0

    def follow(self, *, finite: bool) -> None:
        """Halve after gradients that were not finite, double after `window` steps that were.

        Stays in [1, 2 ** 24], or on its side of that range if it began outside.
        """
        self.good = self.good + 1 if finite else 0
        if not finite:
            self.value = max(self.value / 2, min(self.value, SMALLEST_SCALE))
        elif self.good == self.window:
            self.value, self.good = min(self.value * 2, max(self.value, LARGEST_SCALE)), 0


@torch.no_grad()
def unscale(params: Iterable[nn.Parameter], scale: LossScale | None) -> None:
    """Take the loss scale out of the gradients, in place."""
    grads = [p.grad for p in params if p.grad is not None]
    if scale is not None and grads:
        torch._foreach_div_(grads, scale.value)  # pyright: ignore[reportPrivateImportUsage]: one call for all


class MasterWeights:
    """fp32 weights that an optimiser updates, behind those of fewer bits that a network computes with.

    Made of a network in fp32, whose parameters `names` become `numbers`; the others are their own masters.
    remember: masters keep the digits that the weights have not. False: only the update is in fp32, and what
    is left of it in `numbers` counts (level O3). Freeze parameters before: a master learns as its weight
    does.
    """

    def __init__(
        self, network: nn.Module, *, names: Collection[str], numbers: torch.dtype, remember: bool = True
    ) -> None:
        self.remember = remember
        self._all: dict[str, nn.Parameter] = dict(network.named_parameters())
        self._lowered: dict[str, nn.Parameter] = {}  # the network's own, of those that have another master
        for name in names:
            weight = self._all[name]
            before = weight.detach()
            weight.data = before.to(numbers)
            master = before.clone() if remember else weight.detach().to(before.dtype)
            self._all[name] = nn.Parameter(master, requires_grad=weight.requires_grad)
            self._lowered[name] = weight

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The masters by the names of the network's parameters, in its order."""
        return list(self._all.items())

    @torch.no_grad()
    def take_gradients(self) -> None:
        """Move the weights' gradients to their masters, as fp32. Call it once per update."""
        for name, weight in self._lowered.items():
            master = self._all[name]
            master.grad = None if weight.grad is None else weight.grad.to(master.dtype)
            weight.grad = None

    @torch.no_grad()
    def publish(self) -> None:
        """Give the network the masters' values, rounded to its numbers."""
        masters = [self._all[name].detach() for name in self._lowered]
        weights = [weight.detach() for weight in self._lowered.values()]
        if masters:
            torch._foreach_copy_(weights, masters)  # pyright: ignore[reportPrivateImportUsage]: one call
        if masters and not self.remember:
            torch._foreach_copy_(masters, weights)  # pyright: ignore[reportPrivateImportUsage]: one call

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps in place of the network's weights, by name: masters with memory."""
        return {name: self._all[name].detach() for name in self._lowered} if self.remember else {}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the weights of a checkpoint, and give them to the network."""
        for name in self._lowered:
            self._all[name].copy_(tensors[name])
        self.publish()


def optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """The state as tensors named `parameter.exp_avg`: copies on the CPU that share no storage.

    A tensor without axes is a scalar of the optimiser; integers that are not tensors become int64.
    """
    tensors: dict[str, Tensor] = {}
    for name, param in named(optimizer):
        for entry, value in optimizer.state.get(param, {}).items():
            stored = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.int64)
            tensors[f"{name}.{entry}"] = stored.detach().to("cpu", copy=True).contiguous()
    return tensors


def load_optimizer_tensors(optimizer: Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` took, bit for bit, on the device of each parameter.

    RunError if a tensor belongs to no parameter. A parameter that never had a gradient has no tensors.
    """
    params = dict(named(optimizer))
    states: dict[str, dict[str, Tensor | int]] = {}
    for key, tensor in tensors.items():
        name, _, entry = key.rpartition(".")
        if name not in params:
            raise RunError(
                f"the saved optimiser state has {key}, which belongs to no parameter of this model"
            )
        states.setdefault(name, {})[entry] = restored(tensor, params[name])
    optimizer.state.clear()
    for name, state in states.items():
        optimizer.state[params[name]] = state


def restored(tensor: Tensor, param: nn.Parameter) -> Tensor | int:
    """One entry of a parameter's state as the optimiser keeps it: int64 without axes is a Python integer.

    A tensor of the parameter's shape gets its memory layout too: fused kernels walk both in the order of
    memory.
    """
    if tensor.ndim == 0 and tensor.dtype == torch.int64:
        return int(tensor)
    if tensor.shape == param.shape:
        return torch.empty_like(param, dtype=tensor.dtype, requires_grad=False).copy_(tensor)
    return tensor.to(param.device, copy=True)


def named(optimizer: Optimizer) -> list[tuple[str, nn.Parameter]]:
    """Names and parameters, in the order of the optimiser's groups."""
    pairs: list[tuple[str, nn.Parameter]] = []
    for group in optimizer.param_groups:
        pairs += zip(group["param_names"], group["params"], strict=True)
    return pairs


class FusedAdamW(AdamW):
    """torch's AdamW in one kernel for all parameters, without torch's compiler."""

    add_param_group = ADD_PARAM_GROUP
    step = torch.no_grad()(ADAMW_STEP)


class Lion(Optimizer):
    """Steps of one size in the direction of a sign. Chen et al., Symbolic Discovery of Optimization (2023).

    The sign is that of the momentum mixed with the gradient at betas[0]; the momentum follows at betas[1].
    """

    add_param_group = ADD_PARAM_GROUP

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float]) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]: no closure, no loss
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            near, far = group["betas"]
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if not state:
                    state["exp_avg"] = torch.zeros_like(param)
                direction = torch.lerp(param.grad, state["exp_avg"], near).sign_()
                param.mul_(1.0 - group["lr"] * group["weight_decay"])
                param.add_(direction, alpha=-group["lr"])
                state["exp_avg"].lerp_(param.grad, 1.0 - far)


class DecoupledSGD(Optimizer):
    """Gradient descent with momentum: v = momentum * v + grad, weight -= lr * (v + weight_decay * weight)."""

    add_param_group = ADD_PARAM_GROUP

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, momentum: float) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]: no closure, no loss
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(param)
                velocity = state["momentum_buffer"].mul_(group["momentum"]).add_(param.grad)
                param.mul_(1.0 - group["lr"] * group["weight_decay"])
                param.add_(velocity, alpha=-group["lr"])


def adamw8bit(groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float]) -> Optimizer:
    """AdamW with moments in 8 bits, of the bitsandbytes library. ConfigError where that is not installed.

    Its step leaves weights in plain layout, whatever theirs was: they get it back, so that a resumed run,
    whose weights are laid out anew, takes the same kernels.
    """
    try:
        from bitsandbytes.optim.adamw import AdamW8bit
    except ImportError as error:
        extra = "pip install 'causalvae[adamw8bit]'"
        message = f"--optim adamw8bit: its library is not installed: {extra}, or use --optim adamw"
        raise ConfigError(message) from error
    optimizer: Optimizer = AdamW8bit(groups, lr=lr, betas=betas)
    strides = [(param, param.stride()) for group in optimizer.param_groups for param in group["params"]]

    def lay_out_again(*_: object) -> None:
        for param, stride in strides:
            if param.stride() != stride:
                plain = param.data
                param.data = torch.empty_strided(
                    plain.shape, stride, dtype=plain.dtype, device=plain.device
                ).copy_(plain)

    optimizer.register_step_post_hook(lay_out_again)
    return optimizer
