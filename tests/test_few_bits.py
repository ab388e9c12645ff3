"""3D convolutions in few bits on a CPU, whose weight gradients are made of 2D convolutions."""

import pytest
import torch
from torch import Tensor

from causalvae import rng
from causalvae.losses import build_critic, critic_backward
from causalvae.machine import Capability
from causalvae.models.convolution import convolution_gradients, convolve
from causalvae.train.precision import Precision, lower

CASES = [  # c, c', t, kernel, stride, padding
    (8, 16, 6, (3, 3, 3), (1, 1, 1), (0, 1, 1)),  # as the autoencoders have them
    (16, 8, 7, (3, 3, 3), (2, 1, 1), (0, 1, 1)),
    (8, 8, 3, (1, 3, 3), (1, 2, 2), (0, 0, 0)),
    (12, 4, 5, (1, 1, 1), (1, 1, 1), (0, 0, 0)),
    (3, 8, 9, (3, 3, 3), (2, 2, 2), (1, 1, 1)),  # as the critics have them
    (8, 16, 4, (3, 3, 3), (1, 2, 2), (1, 1, 1)),
    (8, 1, 1, (3, 3, 3), (1, 1, 1), (1, 1, 1)),  # one frame: two of the kernel's see nothing
    (4, 8, 2, (5, 3, 3), (2, 1, 1), (2, 1, 1)),
]


def values(shape: tuple[int, ...], name: str, *, last: bool) -> Tensor:
    """Numbers that bf16 has."""
    drawn = rng.normal(shape, rng.key("few bits", name)).bfloat16()
    return drawn.contiguous(memory_format=torch.channels_last_3d) if last else drawn


def apart(one: Tensor, other: Tensor) -> float:
    """Relative difference of two tensors, by norm."""
    assert one.shape == other.shape
    return float((one.double() - other.double()).norm() / other.double().norm())


@pytest.mark.parametrize("layout", ["channels last", "plain"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_in_bf16_are_those_of_float64_but_for_rounding(
    case: tuple[int, int, int, tuple[int, ...], tuple[int, ...], tuple[int, ...]], layout: str
) -> None:
    c, out, frames, kernel, stride, padding = case
    last = layout == "channels last"
    x, weight = values((2, c, frames, 9, 10), "x", last=last), values((out, c, *kernel), "weight", last=last)
    bias, how = values((out,), "bias", last=False), {"stride": stride, "padding": padding}
    leaves = [each.double().requires_grad_() for each in (x, weight, bias)]
    y = torch.conv3d(leaves[0], leaves[1], leaves[2], stride, padding)
    pull = values(tuple(y.shape), "pull", last=last)
    exact = torch.autograd.grad(y, leaves, pull.double())
    own = convolution_gradients(pull, x, weight, **how, needs=(True, True, True))
    leaves = [each.clone().requires_grad_() for each in (x, weight, bias)]
    made = convolve(leaves[0], leaves[1], leaves[2], **how)
    assert apart(made.detach(), y.detach()) < 0.004  # 2 ** -9 is 0.002
    for found in (own, torch.autograd.grad(made, leaves, pull)):
        for low, right in zip(found, exact, strict=True):
            assert low is not None
            assert low.dtype == torch.bfloat16
            assert apart(low, right) < 0.004
    assert convolution_gradients(pull, x, weight, **how, needs=(False, True, False))[::2] == (None, None)


def test_a_penalty_on_gradients_has_nearly_the_gradient_of_fp32() -> None:
    def gradients(name: str) -> list[Tensor]:
        critic = build_critic("patchgan3d", base=3, norm="none", ndf=8)
        if name == "bf16":
            lower(critic, Precision.of("bf16", "O1", device="cpu", capability=Capability()))
        clips = [0.5 * rng.normal((2, 3, 5, 16, 16), rng.key(each)) for each in ("real", "fake")]
        critic_backward(critic, *clips, kind="hinge", averages=torch.zeros(3), lecam_weight=0.0,
                        r1_weight=100.0, scale=1.0)  # fmt: skip
        return [parameter.grad for parameter in critic.parameters() if parameter.grad is not None]

    for low, exact in zip(gradients("bf16"), gradients("fp32"), strict=True):
        if float(exact.norm()) > 1e-6:
            assert apart(low, exact) < 0.08  # 0.04 was measured
