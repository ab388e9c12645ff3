"""Laws of layers that keep their input only: the values and gradients of the plain order of work."""

import copy
import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from causalvae import rng
from causalvae.models.causalvae import run_in_chains
from causalvae.models.convolution import Conv
from causalvae.models.layers import (
    FrameConv,
    FrameDownsample,
    ResnetBlock,
    SpatialUpsample,
    TimeDownsample,
    TimeUpsample,
)
from causalvae.models.norms import NormKind
from causalvae.models.stream import Stream

NORMS: tuple[NormKind, ...] = ("channel", "frame", "clip")
RESAMPLERS = {
    "frame_down": FrameDownsample,
    "space_up": SpatialUpsample,
    "time_down": TimeDownsample,
    "time_up": TimeUpsample,
}


def filled(module: nn.Module) -> nn.Module:
    """The module in float64 with weights that none of the published starts has."""
    module.double()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            scale = 1 / math.sqrt(parameter[0].numel())
            parameter.copy_(scale * rng.normal(parameter.shape, rng.key("fused", name)))
            if name.endswith("mix_factor"):
                parameter.add_(1.0)
    return module


def block(norm: NormKind, *, flat: bool = False, c_out: int = 64) -> ResnetBlock:
    made = filled(ResnetBlock(32, c_out, norm=norm, flat=flat))
    assert isinstance(made, ResnetBlock)
    return made


def activations(channels: int = 32, frames: int = 5, *, batch: int = 2) -> Tensor:
    """b c t h w, float64, channels last in memory as in training."""
    x = rng.normal((batch, channels, frames, 6, 4), rng.key("x")).double()
    return x.contiguous(memory_format=torch.channels_last_3d)


def whole_clip() -> Stream:
    """With a stream a layer runs its plain order of work; this one holds one clip."""
    stream = Stream()
    stream.last = True
    return stream


def plain(module: nn.Module, x: Tensor) -> Tensor:
    """The same layer by autograd, from operations of torch."""
    if isinstance(module, FrameDownsample):
        return module.conv(nn.functional.pad(x, (0, 1, 0, 1)))
    if isinstance(module, SpatialUpsample):
        return module.conv(x.repeat_interleave(2, dim=3).repeat_interleave(2, dim=4))
    return module(x, whole_clip())


def gradients(module: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Of a fixed weighted sum of y, for x and every learning parameter."""
    named: dict[str, Tensor] = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if x.requires_grad:
        named["x"] = x
    weights = rng.normal(y.shape, rng.key("weights")).to(y.dtype)
    return dict(zip(named, torch.autograd.grad(y, list(named.values()), weights), strict=True))


def plain_gradients(module: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and gradients for everything: with some left out, torch's own group norm crashes on CPUs."""
    whole, leaf = copy.deepcopy(module).requires_grad_(), x.detach().requires_grad_()
    y = plain(whole, leaf)
    return y, gradients(whole, leaf, y)


def assert_same(
    module: nn.Module, x: Tensor, *, rtol: float = 1e-10, atol: float = 1e-12, recompute: bool = False
) -> None:
    """Values within atol, gradients within rtol of their largest value or of 1."""
    y = run_in_chains([module], x) if recompute else module(x)
    expected, wanted = plain_gradients(module, x)
    assert y.dtype == expected.dtype
    torch.testing.assert_close(y, expected, rtol=0, atol=atol)
    for name, gradient in gradients(module, x, y).items():
        assert gradient.dtype == wanted[name].dtype, name
        scale = max(1.0, float(wanted[name].abs().max()))
        assert float((gradient - wanted[name]).abs().max()) <= rtol * scale, name


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_a_block_equals_its_plain_order_of_work(norm: NormKind, *, flat: bool, recompute: bool) -> None:
    for c_out in (32, 64):
        module = block(norm, flat=flat, c_out=c_out)
        assert_same(module, activations().requires_grad_(), recompute=recompute)
        assert_same(module, activations().contiguous().requires_grad_(), recompute=recompute)


@pytest.mark.parametrize("frames", [1, 2, 3, 5])
@pytest.mark.parametrize("name", RESAMPLERS)
def test_a_resampler_equals_its_plain_order_of_work(name: str, frames: int) -> None:
    if name == "time_down" and frames == 2:
        return  # it takes an odd number
    assert_same(filled(RESAMPLERS[name](8)), activations(8, frames).requires_grad_())


@pytest.mark.parametrize("recompute", [False, True])
def test_any_subset_of_frozen_weights_gets_the_other_gradients(*, recompute: bool) -> None:
    module = block("frame")
    parameters, x = dict(module.named_parameters()), activations(batch=1, frames=3).requires_grad_()
    kinds = ("norm1", "conv1", "norm2", "conv2", "nin_shortcut")
    for frozen in itertools.chain.from_iterable(itertools.combinations(kinds, n) for n in (1, 4)):
        for name, parameter in parameters.items():
            parameter.requires_grad_(name.split(".")[0] not in frozen)
        assert_same(module, x if len(frozen) == 1 else x.detach(), recompute=recompute)
    for name, parameter in parameters.items():
        parameter.requires_grad_(name.endswith("bias"))
    assert_same(module, x.detach(), recompute=recompute)
    module.requires_grad_(False)
    assert_same(module, x, recompute=recompute)


@pytest.mark.parametrize("name", RESAMPLERS)
def test_a_resampler_with_frozen_weights_gets_the_other_gradients(name: str) -> None:
    module = filled(RESAMPLERS[name](8))
    for frozen, parameter in module.named_parameters():
        parameter.requires_grad_(False)
        assert_same(module, activations(8).requires_grad_())
        if any(p.requires_grad for p in module.parameters()):
            assert_same(module, activations(8))
        parameter.requires_grad_(frozen.endswith("mix_factor"))


@pytest.mark.parametrize("norm", NORMS)
def test_gradients_are_those_of_finite_differences(norm: NormKind) -> None:
    module = block(norm, c_out=32)
    x = rng.normal((1, 32, 2, 2, 1), rng.key("tiny")).double().requires_grad_()
    assert torch.autograd.gradcheck(module, (x,), fast_mode=True)
    assert torch.autograd.gradcheck(lambda x: run_in_chains([module], x), (x,), fast_mode=True)


def test_a_second_derivative_is_refused() -> None:
    module_input = activations().requires_grad_()
    y = block("frame")(module_input).sum()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(y, module_input, create_graph=True)


@pytest.mark.parametrize("norm", NORMS)
def test_fp32_gradients_are_those_of_the_plain_order_within_rounding(norm: NormKind) -> None:
    module = block(norm).float()
    # measured 1e-6 of the largest gradient
    assert_same(module, activations().float().requires_grad_(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("numbers", [torch.float64, torch.float32])
def test_convolutions_compute_in_their_numbers_and_norms_in_those_of_their_weights(
    norm: NormKind, numbers: torch.dtype
) -> None:
    module = block(norm).float()
    for each in module.modules():
        if isinstance(each, Conv | FrameConv):
            each.arithmetic = numbers
    module.norm2.double()
    assert module(activations().float()).dtype == numbers
    assert_same(module, activations().float().requires_grad_(), rtol=2e-5, atol=1e-5)
