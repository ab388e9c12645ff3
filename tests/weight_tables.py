"""Small tables of weights for the tests of files, and how two of them are compared."""

import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

FEW = settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
WEIGHTS = {"encoder.a.weight": torch.arange(12.0).reshape(3, 4), "decoder.b.bias": torch.ones(2)}


def equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    """The same names, types, shapes and bits."""
    return found.keys() == expected.keys() and all(
        (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        and torch.equal(bits(found[name]), bits(tensor))
        for name, tensor in expected.items()
    )


def bits(tensor: Tensor) -> Tensor:
    """Bytes of all values, in C order."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
