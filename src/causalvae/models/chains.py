"""Layers in a row: one after the other, or as chains of which little more than the inputs are kept."""

from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from causalvae.models.fused import chain
from causalvae.models.layers import (
    CausalConv3d,
    FrameConv,
    FrameDownsample,
    ResnetBlock,
    SpatialUpsample,
    TimeDownsample,
    TimeUpsample,
    keeps_nothing,
)
from causalvae.models.resampling import CausalDownsample, CausalUpsample, FrameUpsample
from causalvae.models.stream import Stream

CHAINED = (
    CausalConv3d,
    FrameConv,
    ResnetBlock,
    FrameDownsample,
    CausalDownsample,
    SpatialUpsample,
    FrameUpsample,
    CausalUpsample,
    TimeDownsample,
    TimeUpsample,
)
# To run again, for what their output would take.
CHEAP = (CausalConv3d, FrameConv, SpatialUpsample, FrameUpsample)


def run_in_order(
    modules: Iterable[nn.Module], x: Tensor, *, stream: Stream | None, recompute: bool
) -> Tensor:
    """The modules one after the other, in chains if recompute is on and a gradient can be asked for."""
    if recompute and not keeps_nothing(stream):
        return run_in_chains(list(modules), x)
    for module in modules:
        x = module(x, stream)
    return x


def run_in_chains(modules: Sequence[nn.Module], x: Tensor) -> Tensor:
    """The modules one after the other, of which little more than the input of each chain is kept."""
    for group in _groups(modules):
        links = [module.link() for module in group if isinstance(module, CHAINED)]
        x = chain(x, *links) if links else group[0](x)
    return x


def _groups(modules: Sequence[nn.Module]) -> list[list[nn.Module]]:
    """Neighbours that make a chain. What is cheap to run again goes with its successor."""
    groups: list[list[nn.Module]] = []
    for module in modules:
        before = groups[-1][-1] if groups else None
        cheap = isinstance(before, CHEAP) or (isinstance(before, ResnetBlock) and before.flat)
        if cheap and isinstance(module, CHAINED):
            groups[-1].append(module)
        else:
            groups.append([module])
    return groups
