"""Networks without memory, and how much their tensors would take.

On the meta device tensors have shapes and no numbers. The very code that is to be run runs there first, and
every storage that it makes is counted while it lives.
"""

import copy
import math
import weakref
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MOST_OF_OWN_KERNELS = 20480  # b c t h, from which on torch takes oneDNN: aten/native/Convolution.cpp
# Its kernels keep no matrix of scores; taken apart on the meta device, it would have two.
ATTENTION = torch.ops.aten.scaled_dot_product_attention.default

Network = TypeVar("Network", bound=nn.Module)
Form = tuple[Sequence[int], Sequence[int], torch.dtype]  # size and stride of a tensor, and its numbers


def on_meta(network: Network) -> Network:
    """The same network with weights that have shapes and no memory."""
    return copy.deepcopy(network, {id(tensor): meta_twin(tensor) for tensor in tensors_of(network)})


def tensors_of(network: nn.Module) -> list[Tensor]:
    """Parameters and buffers."""
    return [*network.parameters(), *network.buffers()]


def meta_twin(tensor: Tensor) -> Tensor:
    """A tensor of the same shape, numbers and layout without memory; a parameter for a parameter."""
    empty = torch.empty_like(tensor, device="meta", requires_grad=False)
    return (
        nn.Parameter(empty, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    )


class LiveBytes(TorchDispatchMode):
    """While it is entered, counts the bytes of tensors that are alive on the meta device, and their peak.

    A storage counts once, however many views it has, from the operation that made it until nobody holds it.
    Working out what shapes an operator makes is slow, and blocks repeat each other: each is asked once.
    scratch: bytes that an operator with these arguments takes while it runs.
    """

    # Any: an operator and what it takes
    def __init__(self, scratch: Callable[[Any, Sequence[Any]], int] | None = None) -> None:
        super().__init__()
        self.scratch = scratch
        self.bytes = 0
        self.peak = 0
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._known: dict[object, list[Form | None] | None] = {}  # by operator and `_key` of what it took

    # Any: whatever operators take and return
    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator and count what it made. Numbers that a step asks for are ones: all is finite."""
        if func is torch.ops.aten._local_scalar_dense.default:
            return args[0].dtype == torch.bool or 1.0
        if torch.is_inference_mode_enabled() and func is not ATTENTION:  # operators arrive as they are called
            with self:
                parts = func.decompose(*args, **(kwargs or {}))
            if parts is not NotImplemented:
                return parts
        result = self._result(func, args, kwargs or {})
        self.hold(result)
        if self.scratch is not None:
            self.peak = max(self.peak, self.bytes + self.scratch(func, args))
        return result

    # Any: whatever operators take and return
    def _result(self, func: Any, args: Sequence[Any], named: dict[str, Any]) -> Any:
        """What an operator returns: asked, or made again in the form that it had for such arguments."""
        if not _makes_anew(func):
            return func(*args, **named)
        key = (func, _key(args), _key([*named.items()]))
        forms = self._known.get(key)
        if forms is not None:
            return _made_again(forms[0]) if len(forms) == 1 else tuple([_made_again(form) for form in forms])
        result = func(*args, **named)
        self._known[key] = _forms(result)
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


@cache
def _makes_anew(func: Any) -> bool:  # Any: an operator
    """Whether an operator only makes new tensors: no views, and nothing that it took is changed."""
    returned = func._schema.returns
    fresh = all(each.alias_info is None and str(each.type) == "Tensor" for each in returned)
    return bool(returned) and fresh and not func._schema.is_mutable


def _key(value: Any) -> object:  # Any: whatever operators take
    """What a result on the meta device depends on. 1, 1.0 and True are equal and make other numbers."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    if isinstance(value, list | tuple):
        return tuple([_key(each) for each in value])
    return type(value), value


def _forms(result: Any) -> list[Form | None] | None:  # Any: a tensor, or a tuple of them and of None
    """How to make such tensors again; None if one is not the whole of a storage of its own."""
    made = result if isinstance(result, tuple) else (result,)
    forms: list[Form | None] = [
        None if each is None else (each.size(), each.stride(), each.dtype) for each in made
    ]
    tensors = [each for each in made if each is not None]
    again = [each for each in map(_made_again, forms) if each is not None]
    own = len({id(tensor.untyped_storage()) for tensor in tensors}) == len(tensors)
    whole = all(
        x.untyped_storage().nbytes() == y.untyped_storage().nbytes()
        for x, y in zip(tensors, again, strict=True)
    )
    return forms if own and whole and all(tensor.device.type == "meta" for tensor in tensors) else None


def _made_again(form: Form | None) -> Tensor | None:
    if form is None:
        return None
    size, stride, dtype = form
    return torch.empty_strided(size, stride, dtype=dtype, device="meta")


def cpu_scratch(func: Any, args: Sequence[Any]) -> int:  # Any: an operator and what it takes
    """Bytes that a convolution of torch 2.13 takes on a CPU beside input and output; 0 for other operators.

    Measured: oneDNN's kernels copy an input that has not its channels last. Small inputs of one clip go to
    torch's own kernels in fp32, which unfold them: every value as often as the kernel sees it.
    """
    if func is not torch.ops.aten.convolution.default or args[6]:
        return 0
    x, weight, _, stride, padding = args[:5]
    kernel, axes = weight.shape[2:], range(2, weight.dim())
    own = x.dtype == torch.float32 and len(x) == 1 and math.prod(x.shape[:4]) <= MOST_OF_OWN_KERNELS
    if not own:
        last = {4: torch.channels_last, 5: torch.channels_last_3d}[x.dim()]
        return 0 if x.is_contiguous(memory_format=last) else x.numel() * x.element_size()
    if math.prod(kernel) == 1:
        return 0
    places = math.prod(
        (x.shape[i] + 2 * pad - size) // step + 1
        for i, size, step, pad in zip(axes, kernel, stride, padding, strict=True)
    )
    return weight[0].numel() * places * x.element_size()
