"""The check of convolutions in few bits: what it tries, what it finds, and what it remembers."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any  # of autograd's context and of what it returns

import pytest
import torch
from torch import Tensor

from causalvae.critics.patchgan import PatchGAN2d
from causalvae.losses import build_critic
from causalvae.models.build import build
from causalvae.models.presets import PRESETS, CausalVAEConfig
from causalvae.train.convolutions import (
    MOST_MACS,
    MOST_VALUES,
    Convolve,
    ConvShape,
    check_convolutions,
    convolutions,
    error_of,
    shapes_of,
    shapes_of_run,
)
from causalvae.train.networks import lay_out

BF16 = torch.bfloat16
SHAPE = ConvShape(
    x=(2, 8, 4, 8, 8),
    weight=(8, 8, 3, 3, 3),
    stride=(1, 1, 1),
    padding=(0, 1, 1),
    bias=True,
    x_last=True,
    weight_last=True,
)
CONV = CausalVAEConfig(hidden_size=32, hidden_size_mult=(1, 1, 1, 1), num_res_blocks=1)


class Wrong(torch.autograd.Function):
    """A convolution whose output and input gradient are right and whose weight gradient is not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, factor: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.factor = factor
        return torch.conv3d(x, weight, None, SHAPE.stride, SHAPE.padding)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        with torch.enable_grad():
            leaves = x.detach().requires_grad_(), weight.detach().requires_grad_()
            y = torch.conv3d(leaves[0], leaves[1], None, SHAPE.stride, SHAPE.padding)
        dx, dweight = torch.autograd.grad(y, leaves, grad)
        return dx, dweight * ctx.factor, None


def with_wrong_gradient(factor: float) -> Convolve:
    def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, shape: ConvShape) -> Tensor:
        assert bias is not None
        assert shape == SHAPE
        return Wrong.apply(x, weight, factor) + bias.view(-1, 1, 1, 1)

    return convolve


def test_a_right_convolution_differs_by_rounding_only() -> None:
    assert error_of(SHAPE, numbers=torch.float32) < 1e-6
    assert error_of(SHAPE, numbers=torch.float64) < 1e-5
    assert error_of(SHAPE, numbers=BF16, by=with_wrong_gradient(1.0)) < 0.01


@pytest.mark.parametrize("factor", [1.17, 0.98, math.nan, math.inf])
def test_a_wrong_weight_gradient_is_found_though_the_output_is_right(factor: float) -> None:
    error = error_of(SHAPE, numbers=BF16, by=with_wrong_gradient(factor))
    assert not error <= 0.01
    if math.isfinite(factor):
        assert error == pytest.approx(abs(factor - 1), rel=0.2)
    else:
        assert not math.isfinite(error)


@pytest.mark.parametrize("block", [slice(0, 16), slice(496, 512), slice(0, 0)])
def test_a_wrong_block_of_many_channels_is_found_in_their_sums(block: slice) -> None:
    shape = replace(SHAPE, x=(1, 40, 3, 6, 6), weight=(512, 40, 3, 3, 3), padding=(0, 0, 0))

    def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, shape: ConvShape) -> Tensor:
        assert bias is not None
        wrong = weight.clone()
        wrong[block] = wrong[block].detach()  # as kernels were seen to leave the last block of channels out
        return torch.conv3d(x.float(), wrong.float(), bias.float()).to(x.dtype)

    error = error_of(shape, numbers=BF16, by=convolve)
    share = (block.stop - block.start) / 512
    assert error == pytest.approx(share**0.5, rel=0.3) if share else error < 0.004


class Unwritten(torch.autograd.Function):
    """A convolution whose weight gradient has sums in it that begin with what memory happens to hold."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        return Wrong.forward(ctx, x, weight, 1.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        unwritten = torch.empty_like(ctx.saved_tensors[1])
        dx, dweight, _ = Wrong.backward(ctx, grad)
        return dx, dweight + unwritten.clamp(0, 0)  # NaN stays NaN


def test_a_gradient_that_reads_memory_nobody_wrote_is_found_whatever_was_there() -> None:
    def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, shape: ConvShape) -> Tensor:
        assert bias is not None
        return Unwritten.apply(x, weight) + bias.view(-1, 1, 1, 1)

    assert math.isnan(error_of(SHAPE, numbers=BF16, by=convolve))


@pytest.mark.parametrize("config", [PRESETS["tiny"], CONV], ids=["shuffle", "conv"])
def test_the_shapes_are_those_of_a_real_forward_pass(config: CausalVAEConfig) -> None:
    vae = build(config)
    lay_out(vae)
    x = torch.zeros(1, 3, 5, 32, 32).contiguous(memory_format=torch.channels_last_3d)
    noise = torch.zeros(1, *vae.geometry.latent_shape(5, 32, 32))
    shapes, (recon, _) = shapes_of(vae, x.to("meta"), noise.to("meta"))
    assert shapes.keys() == convolutions(vae).keys()
    assert recon.shape == x.shape
    for name, conv in convolutions(vae).items():
        (shape,) = shapes[name]
        assert math.prod(shape.weight) == conv.weight.numel(), name
        assert shape.bias == (conv.bias is not None)
    (last,) = shapes["decoder.conv_out.conv"]
    assert last.out[0] == 1
    assert last.out[2] == 5


def test_a_run_has_the_shapes_of_autoencoder_parts_and_of_the_critic_on_the_whole_batch() -> None:
    vae, critic = build(PRESETS["tiny"]), build_critic("patchgan3d", base=1)
    found = shapes_of_run(vae, critic, geometry=vae.geometry, clips=(4, 3, 6, 32, 32), parts=2)
    (first,) = found["vae.encoder.conv_in.conv"]
    assert (first.x[0], first.x[2]) == (2, 2 + 9)  # half of the batch, 6 frames as 9, 2 in front
    looks = found["critic.main.0"]
    assert {shape.x for shape in looks} == {(4, 3, 6, 32, 32)}
    assert all(found.values())


def test_a_critic_of_frames_has_convolutions_with_two_axes() -> None:
    shapes, _ = shapes_of(PatchGAN2d(ndf=8), torch.zeros(2, 3, 5, 32, 32, device="meta"))
    (first,) = shapes["main.0"]
    assert first.x == (10, 3, 32, 32)
    assert error_of(first, numbers=BF16) < 0.01


def test_what_is_too_large_is_tried_on_fewer_clips_and_frames_and_on_whole_frames() -> None:
    big = replace(SHAPE, x=(4, 512, 19, 128, 128), weight=(512, 512, 3, 3, 3))
    small = big.affordable()
    assert small.x[3:] == big.x[3:]
    assert small.x[0] == 1
    assert 3 <= small.x[2] < 19
    assert small.weight == big.weight
    assert math.prod(small.x) <= MOST_VALUES
    assert SHAPE.affordable() == SHAPE
    assert math.prod(SHAPE.out) * 8 * 27 < MOST_MACS


def names(**shapes: ConvShape) -> dict[str, frozenset[ConvShape]]:
    return {name: frozenset([shape]) for name, shape in shapes.items()}


def test_verdicts_are_remembered_and_believed(tmp_path: Path) -> None:
    cache = tmp_path / "home" / "convolutions.json"
    how = {
        "numbers": torch.float64,
        "cache": cache,
        "cpu": "a CPU",
        "variables": {},
    }  # float64 is never wrong
    first = check_convolutions({**names(a=SHAPE), "unreached": frozenset()}, **how)
    assert first.keep == {"unreached"}
    assert "1 of 2 convolutions compute in float64; of 1 shapes 1 were tried" in first.message
    assert first.notes == ()
    written = json.loads(cache.read_text())
    ((where, errors),) = written.items()
    assert "a CPU" in where
    for wrong in (0.17, None):
        cache.write_text(json.dumps({where: {SHAPE.text: wrong}, "other": {}}))
        again = check_convolutions(names(a=SHAPE), **how)
        assert again.keep == {"a"}
        assert "of 1 shapes 0 were tried" in again.message
    assert errors.keys() == {SHAPE.text}
    elsewhere = check_convolutions(names(a=SHAPE), **{**how, "cpu": "another CPU"})
    assert elsewhere.keep == frozenset()
    assert json.loads(cache.read_text()).keys() >= {where, "other"}


@pytest.mark.parametrize("broken", ["{", "[1, 2]", '{"where": {"shape": "fine"}}', "\x00\xff"])
def test_a_broken_memory_is_said_and_written_anew(broken: str, tmp_path: Path) -> None:
    cache = tmp_path / "convolutions.json"
    cache.write_bytes(broken.encode("latin-1"))
    how = {"numbers": torch.float64, "cache": cache, "cpu": "a CPU", "variables": {}}
    checked = check_convolutions(names(a=SHAPE), **how)
    assert checked.keep == frozenset()
    assert "tried again" in checked.notes[0]
    assert check_convolutions(names(a=SHAPE), **how).notes == ()


def test_a_memory_that_can_not_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = tmp_path / "file" / "convolutions.json"
    how = {"numbers": torch.float64, "cache": cache, "cpu": "a CPU", "variables": {}}
    checked = check_convolutions(names(a=SHAPE), **how)
    assert checked.keep == frozenset()
    assert any("can't be written" in note for note in checked.notes)


def test_the_check_leaves_the_networks_as_they_were() -> None:
    vae = build(PRESETS["tiny"])
    before = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    critic = build_critic("patchgan3d", base=1)
    statistics = {name: tensor.clone() for name, tensor in critic.state_dict().items()}
    shapes_of_run(vae, critic, geometry=vae.geometry, clips=(1, 3, 5, 32, 32), parts=1)
    assert all(torch.equal(vae.state_dict()[name], tensor) for name, tensor in before.items())
    assert all(torch.equal(critic.state_dict()[name], tensor) for name, tensor in statistics.items())
