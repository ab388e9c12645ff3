"""Networks without memory, and how much their tensors would take.

On the meta device tensors have shapes and no numbers. The very code that is to be run runs there first, and
every storage that it makes is counted while it lives.
"""

import copy
import weakref
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

LIBRARIES = 120 * 2**20  # bytes: code that torch loads or makes at the first pass, measured on a CPU
# The second under torch.inference_mode.
ASK_FOR_A_NUMBER = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.item.default)

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
        if func in ASK_FOR_A_NUMBER:
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
