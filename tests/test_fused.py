"""Laws of layers that keep their input only: the numbers of the plain order of work, and what is kept."""

import copy
import dataclasses
import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from causalvae import rng
from causalvae.losses import LossPlan, build_critic
from causalvae.models.build import build
from causalvae.models.causalvae import CausalVAE
from causalvae.models.chains import run_in_chains
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
from causalvae.models.presets import TINY, CausalVAEConfig, Norm
from causalvae.models.stream import Stream
from causalvae.train.networks import lay_out
from causalvae.train.optim import build_optimizer
from causalvae.train.state import TrainState
from causalvae.train.step import train_step

PUBLISHED = 15_100  # bytes of activations per input value that the published code keeps, fp32
SMALL = {
    "conv": CausalVAEConfig(hidden_size=32, hidden_size_mult=(1, 2, 1, 1), num_res_blocks=1),
    "shuffle": dataclasses.replace(TINY, hidden_size=16, hidden_size_mult=(1, 1, 2)),
}
NORMS: tuple[NormKind, ...] = ("channel", "layer", "frame", "clip")
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


@pytest.mark.parametrize("norm", NORMS)
def test_half_precision_stays_within_the_rounding_of_the_plain_order(norm: NormKind) -> None:
    module, x = block(norm).bfloat16(), activations().bfloat16().requires_grad_()
    y, (expected, wanted) = module(x), plain_gradients(module, x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expected)
    exact = plain_gradients(copy.deepcopy(module).double(), x.detach().double())[1]
    for name, gradient in gradients(module, x, y).items():
        assert gradient.dtype == torch.bfloat16, name
        size = exact[name].norm()
        ours, theirs = (float((g.double() - exact[name]).norm() / size) for g in (gradient, wanted[name]))
        assert ours <= max(1.5 * theirs, 2**-7), name  # bf16 has 8 bits


def test_without_a_gradient_a_block_gives_the_same_bits() -> None:
    for norm in NORMS:
        module, x = block(norm).float(), activations().float()
        with torch.no_grad():
            assert torch.equal(module(x), module(x, whole_clip()))
        assert torch.equal(module(x), module(x, whole_clip()))


def training(config: CausalVAEConfig, *, recompute: bool) -> TrainState:
    """A training whose every branch has a gradient."""
    vae = build(config, seed=2)
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            parameter.add_(0.02 * rng.normal(parameter.shape, rng.key("moved", name)))
    lay_out(vae)
    vae.set_recompute(on=recompute)
    critic = build_critic("patchgan3d", base=5, ndf=8)
    optimizers = [build_optimizer(net.named_parameters(), kind="adamw", lr=1e-3) for net in (vae, critic)]
    logvar = nn.Parameter(torch.zeros(()), requires_grad=False)
    return TrainState(vae, {}, critic, logvar, optimizers[0], optimizers[1])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "parts"), [("conv", 1), ("shuffle", 1), ("shuffle", 2)])
def test_a_training_that_recomputes_gives_the_same_bits(name: str, parts: int) -> None:
    clip = 0.5 * rng.normal((2, 3, 8, 16, 16), 11)
    weights: list[dict[str, Tensor]] = []
    for recompute in (False, True):
        state = training(SMALL[name], recompute=recompute)
        noise = rng.normal((2, *state.vae.geometry.latent_shape(8, 16, 16)), 12)
        done = train_step(state, clip, noise, loss=LossPlan(), critic_loss="hinge", parts=parts)
        assert done.applied
        weights.append(state.vae.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("recompute", [False, True])
def test_the_gradient_of_the_last_layer_reads_nothing_that_other_layers_kept(*, recompute: bool) -> None:
    vae = training(SMALL["conv"], recompute=recompute).vae
    read: list[torch.Size] = []

    def unpack(tensor: Tensor) -> Tensor:
        read.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, unpack):
        recon, _ = vae(rng.normal((1, 3, 5, 16, 16), 3), None)
    for _ in range(2):
        read.clear()
        torch.autograd.grad(recon, vae.last_layer.get_parameter("weight"), recon, retain_graph=True)
        assert read.count(torch.Size([1, 32, 7, 16, 16])) == 1  # the window of the last layer
        assert len(read) <= 2


def kept_bytes(vae: CausalVAE, run: Callable[[], object]) -> int:
    """What autograd saves, each storage once, weights left out."""
    weights = {p.untyped_storage()._cdata for p in vae.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        held = run()
    total = sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in weights)
    del held
    return total


@pytest.mark.parametrize("norm", ["channel", "frame", "clip"])
def test_the_published_layout_keeps_a_small_share_of_the_published_bytes(norm: Norm) -> None:
    with torch.device("meta"):
        vae = CausalVAE(CausalVAEConfig(norm=norm))
        x = torch.empty(1, 3, 17, 256, 256).contiguous(memory_format=torch.channels_last_3d)
        noise = torch.empty(1, *vae.geometry.latent_shape(17, 256, 256))
        for recompute, share in ((False, 0.27), (True, 0.10)):
            vae.set_recompute(on=recompute)
            assert kept_bytes(vae, lambda: vae(x, noise)) / x.numel() < share * PUBLISHED


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # torch.compile warns about the way it traces functions of autograd
def test_a_compiled_block_gives_the_gradients_of_the_eager_one() -> None:
    eager = block("frame").float()
    compiled = copy.deepcopy(eager)
    compiled.compile(fullgraph=True)
    x = activations(batch=1, frames=3).float().requires_grad_()
    expected, y = gradients(eager, x, eager(x)), compiled(x)
    for name, gradient in gradients(compiled, x, y).items():
        scale = max(1.0, float(expected[name].abs().max()))
        assert float((gradient - expected[name]).abs().max()) < 1e-5 * scale, name


@pytest.mark.parametrize("norm", NORMS)
def test_a_lone_frame_trains_whatever_its_layout_in_memory(norm: NormKind) -> None:
    module = filled(block(norm, flat=norm == "frame"))
    x = rng.normal((1, 32, 1, 16, 16), 3).double()
    grads = []
    for frames in (x, x.contiguous(memory_format=torch.channels_last_3d), x.expand(2, -1, -1, -1, -1)[:1]):
        module.zero_grad()
        module(frames.requires_grad_(False)).square().sum().backward()
        grads.append([p.grad.clone() for p in module.parameters() if p.grad is not None])
    lone = rng.normal((1, 9, 16, 16, 32), 4).double().movedim(-1, 1)[:, :, :1]  # strides of the longer clip
    for each in grads[1:]:
        torch.testing.assert_close(each, grads[0], rtol=0, atol=1e-10)
    module(lone).square().sum().backward()


@pytest.mark.parametrize("norm", NORMS)
def test_pictures_train(norm: NormKind) -> None:
    config = dataclasses.replace(SMALL["conv"], norm=norm)
    vae = build(config)
    lay_out(vae)
    x = rng.normal((1, 3, 1, 32, 32), 5).contiguous(memory_format=torch.channels_last_3d)
    recon, posterior = vae(x, None)
    (recon.square().mean() + posterior.kl().mean()).backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in vae.parameters())
