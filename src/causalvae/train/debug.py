"""Mode 1: every tensor of a step is looked at, and the first that is not finite is named, with its clips.

`Watch` sees each operation that torch performs between entering and leaving it, forward, backward and update,
so it depends on no layer calling another through hooks. It only looks: the numbers stay as they are. What a
bad step began with is written as a folder that repeats it (`train.replay`).
"""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

from causalvae.weights.writing import all_finite

Direction = Literal["weights", "forward", "backward", "recomputed", "update"]

PACKAGE = str(Path(__file__).parents[1])
PLACE = "causalvae.place"  # key in the metadata of a node of the graph: the module that made it
UNSET = ("empty", "new_empty", "resize")  # operations whose memory holds nothing yet
ATTENTION = "scaled_dot_product"  # its outputs after the first have room that is never written
TERMS = {  # functions of losses and steps, and the term that they compute, the innermost counts
    "pixel_loss": "pixel",
    "perceptual_loss": "perceptual",
    "kl": "kl",
    "kl_loss": "kl",
    "generator_loss": "adversarial",
    "judged": "adversarial",
    "adaptive_weight": "adaptive weight",
    "last_layer_grad": "adaptive weight",
    "verdict_loss": "critic",
    "critic_backward": "critic",
    "answer": "reconstruction",
    "clip_gradients": "gradient norm",
    "update_ema": "average of the weights",
}
WORDS: dict[Direction, str] = {
    "weights": "before the step",
    "forward": "forward",
    "backward": "backward",
    "recomputed": "forward again, during backward",
    "update": "update of the weights",
}


@dataclass(frozen=True, kw_only=True)
class TensorFacts:
    """What a tensor looks like. lowest, highest: of its finite values; None where it has none."""

    shape: tuple[int, ...]
    dtype: str
    num_nan: int
    num_inf: int
    lowest: float | None
    highest: float | None

    @classmethod
    def of(cls, x: Tensor) -> "TensorFacts":
        """Counts and range of a floating point tensor of any shape."""
        finite = x[torch.isfinite(x)]
        return cls(
            shape=tuple(x.shape),
            dtype=str(x.dtype).removeprefix("torch."),
            num_nan=int(torch.isnan(x).sum()),
            num_inf=int(torch.isinf(x).sum()),
            lowest=float(finite.min()) if finite.numel() else None,
            highest=float(finite.max()) if finite.numel() else None,
        )

    @property
    def largest(self) -> float:
        """The largest magnitude of a finite value, 0 without one."""
        return max(abs(self.lowest or 0.0), abs(self.highest or 0.0))


@dataclass(frozen=True, kw_only=True)
class BadPlace:
    """Where the first value of a step that is not finite was made.

    module: qualified name of a leaf, or of the block whose own code made it; empty outside of the networks.
    after: in a block, the part whose weights were used last before; empty where nothing is to be added.
    made_here: all inputs of the operation were finite. inputs: those with floating point values that the
    operation left as they were.
    """

    module: str
    after: str
    term: str | None
    direction: Direction
    operation: str
    made_here: bool
    output: TensorFacts
    inputs: tuple[TensorFacts, ...]

    def sentence(self) -> str:
        """The finding for a person, without a full stop."""
        if self.direction == "weights":
            return f"the weights of {self.module} are not finite already before the step ({self._counts()})"
        place = self.module or (f"the {self.term} term" if self.term else self.operation)
        place += f", after {self.after}" if self.after else ""
        term = f", {self.term} term" if self.term and self.module else ""
        largest = max((facts.largest for facts in self.inputs), default=0.0)
        origin = (
            f"made there from finite input, the largest {largest:.3g}"
            if self.made_here
            else "its input was not finite already"
        )
        return (
            f"first non-finite value in {place} ({WORDS[self.direction]}{term}), {origin}: "
            f"{self.operation} gave {self._counts()}"
        )

    def record(self) -> dict[str, Any]:  # Any: JSON
        """As a record of JSON."""
        return asdict(self)

    def _counts(self) -> str:
        facts = self.output
        shape = "x".join(map(str, facts.shape)) or "a single value"
        return f"{facts.num_nan} NaN and {facts.num_inf} infinite of {shape}"


class Watch(TorchDispatchMode):
    """Looks at the result of every operation of a step until one is not finite. A context manager, once.

    networks: what takes part, under the names that stand in front of their modules'. first: the first bad
    place, None as long as everything was finite.
    """

    def __init__(self, networks: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.first: BadPlace | None = None
        self._modules = {
            module: f"{name}.{path}".rstrip(".")
            for name, network in networks.items()
            for path, module in network.named_modules()
        }
        self._owners = {
            _storage(tensor): name
            for module, name in self._modules.items()
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
        }
        self._latest = ""  # owner of the weights that an operation used last
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        for module, name in self._modules.items():
            bad = _not_finite((*module.parameters(recurse=False), *module.buffers(recurse=False)))
            if bad is not None and self.first is None:
                self.first = _bad_weights(name, bad)
            self._hooks.append(module.register_forward_hook(self._mark))
        return super().__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        for hook in self._hooks:
            hook.remove()

    def _mark(self, module: nn.Module, inputs: Any, output: Any) -> None:  # Any: what modules take and give
        """Write the module's name on the nodes of the graph between its inputs and its output.

        A module ends after those inside it, so the innermost name stays.
        """
        waiting = [x.grad_fn for x in _tensors(output)]
        before = {x.grad_fn for x in _tensors(inputs)} - set(waiting)
        while waiting:
            node = waiting.pop()
            if node is not None and node not in before and PLACE not in _notes(node):
                _notes(node)[PLACE] = self._modules[module]
                waiting += [each for each, _ in node.next_functions]

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: Any,  # Any: torch's protocol
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Perform the operation, and look at what it wrote."""
        named = kwargs or {}
        name = func.overloadpacket.__name__
        if self.first is not None or func.is_view or name.startswith(UNSET):
            return func(*args, **named)
        changed = _changed(func, args, named)
        stale = _not_finite(changed) is not None
        result = func(*args, **named)
        results = list(_tensors(result))
        bad = _not_finite([*(results[:1] if ATTENTION in name else results), *changed])
        if bad is not None:
            kept = [x for x in _tensors((args, named)) if all(x is not each for each in changed)]
            self.first = self._bad_place(name, bad, kept=kept, stale=stale)
        self._latest = self._owner_of((args, named)) or self._latest
        return result

    def _bad_place(self, operation: str, bad: Tensor, *, kept: list[Tensor], stale: bool) -> BadPlace:
        """kept: inputs that the operation did not change. stale: one that it changed was bad before."""
        node = torch._C._current_autograd_node()
        frames = list(_frames())
        update = any(isinstance(frame.f_locals.get("self"), Optimizer) for frame in frames)
        running = (self._modules.get(each) for each in map(_self_of, frames) if each is not None)
        module = next((name for name in running if name is not None), "")
        direction: Direction = "update" if update else "forward" if node is None else "backward"
        if node is not None and module:
            direction = "recomputed"
        elif node is not None:
            module = _notes(node).get(PLACE, "")
        owner = self._owner_of(bad if update else kept, inside=module)
        followed = bool(module) and not owner and self._latest.startswith(f"{module}.")
        inputs = tuple(TensorFacts.of(x) for x in kept if x.is_floating_point())
        return BadPlace(
            module=owner or module,
            after=self._latest if followed else "",
            term=_term(frames, outside=not (owner or module) and direction == "backward"),
            direction=direction,
            operation=operation,
            made_here=not stale and all(facts.num_nan + facts.num_inf == 0 for facts in inputs),
            output=TensorFacts.of(bad),
            inputs=inputs,
        )

    def _owner_of(self, values: Any, *, inside: str = "") -> str:  # Any: as _tensors
        """The module of the first tensor that is a weight of it or of what is in it; empty if none is."""
        owners = (self._owners.get(_storage(x), "") for x in _tensors(values))
        return next((name for name in owners if name and name.startswith(inside)), "")


def _bad_weights(name: str, bad: Tensor) -> BadPlace:
    return BadPlace(
        module=name,
        after="",
        term=None,
        direction="weights",
        operation="",
        made_here=False,
        output=TensorFacts.of(bad.detach()),
        inputs=(),
    )


def _term(frames: list[FrameType], *, outside: bool) -> str | None:
    """The term whose function is innermost. outside: a gradient that belongs to no module."""
    ours = [f.f_code.co_name for f in frames if f.f_code.co_filename.startswith(PACKAGE)]
    found = next((TERMS[name] for name in ours if name in TERMS), None)
    # Between the modules and the answer only the divergence has a graph of its own (train.step).
    return "kl" if found is None and outside else found


def _frames() -> Iterator[FrameType]:
    """The calls under way, innermost first, but for those of this file."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_filename != __file__:
            yield frame
        frame = frame.f_back


def _self_of(frame: FrameType) -> nn.Module | None:
    """The module whose code a frame runs."""
    owner = frame.f_locals.get("self")
    return owner if isinstance(owner, nn.Module) else None


def _notes(node: Any) -> dict[str, str]:  # Any: in torch's stubs the metadata of a node is a method
    """What can be written on a node of the graph, and read when it runs backward."""
    return node.metadata


def _tensors(values: Any) -> Iterator[Tensor]:  # Any: arguments and results nest
    """The tensors in tuples, lists and the values of dicts."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, tuple | list):
        for value in values:
            yield from _tensors(value)
    elif isinstance(values, dict):
        yield from _tensors(list(values.values()))


def _changed(func: torch._ops.OpOverload, args: tuple[Any, ...], named: dict[str, Any]) -> list[Tensor]:
    """The arguments that an operation writes into."""
    if not func._schema.is_mutable:
        return []
    written = [
        args[i] if i < len(args) else named.get(argument.name)
        for i, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    return list(_tensors(written))


def _not_finite(tensors: Any) -> Tensor | None:  # Any: as _tensors
    """The first tensor with a value that is not finite, where it can have one."""
    for x in _tensors(tensors):
        if x.is_floating_point() and not all_finite(x.detach()):
            return x
    return None


def _storage(x: Tensor) -> int:
    """What tells weights and their views from other tensors: where the numbers are."""
    return x.untyped_storage().data_ptr()
