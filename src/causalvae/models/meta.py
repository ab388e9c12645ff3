"""Networks without memory, and how much their tensors would take.

On the meta device tensors have shapes and no numbers. The very code that is to be run runs there first, and
every storage that it makes is counted while it lives.
"""

import copy
import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MOST_OF_OWN_KERNELS = 20480  # b c t h, from which on torch takes oneDNN: aten/native/Convolution.cpp
# Its kernels keep no matrix of scores; taken apart on the meta device, it would have two.
ATTENTION = torch.ops.aten.scaled_dot_product_attention.default

Network = TypeVar("Network", bound=nn.Module)


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
    scratch: bytes that an operator with these arguments takes while it runs.
    """

    # Any: an operator and what it takes
    def __init__(self, scratch: Callable[[Any, Sequence[Any]], int] | None = None) -> None:
        super().__init__()
        self.scratch = scratch
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
        if torch.is_inference_mode_enabled() and func is not ATTENTION:  # operators arrive as they are called
            with self:
                parts = func.decompose(*args, **(kwargs or {}))
            if parts is not NotImplemented:
                return parts
        result = func(*args, **(kwargs or {}))
        self.hold(result)
        if self.scratch is not None:
            self.peak = max(self.peak, self.bytes + self.scratch(func, args))
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
