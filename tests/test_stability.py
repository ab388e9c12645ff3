"""The stability kit: clipping by unit, the critic's statistics and regularisers, level-off."""

import json
import math
from typing import Any

import pytest
import torch
from test_step import SHUFFLE, batch, state_of
from torch import Tensor, nn

from causalvae import rng
from causalvae.critics.regularisers import gradient_penalty, lecam_distance, moved_averages
from causalvae.losses import (
    CriticKind,
    CriticTerms,
    LossPlan,
    adaptive_weight,
    build_critic,
    critic_backward,
)
from causalvae.models.convolution import Conv
from causalvae.train.networks import lay_out
from causalvae.train.optim import clip_by_unit, clip_gradients
from causalvae.train.stability import LevelOff
from causalvae.train.step import train_step

KIT = LossPlan(kl_weight=1e-3, lecam_weight=0.1, r1_weight=0.5)


def weight_with(values: list[Any] | float, grad: list[Any] | float) -> nn.Parameter:
    parameter = nn.Parameter(torch.tensor(values, dtype=torch.float64))
    parameter.grad = torch.tensor(grad, dtype=torch.float64)
    return parameter


def grad_of(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


# --- clipping by unit


def test_units_are_clipped_by_themselves_as_worked_out_by_hand() -> None:
    matrix = weight_with([[3.0, 4.0], [0.6, 0.8], [0.0, 0.0]], [[0.3, 0.4], [0.006, 0.0], [3.0, 4.0]])
    bias = weight_with([0.0, 2.0], [0.0, 1.0])
    scalar = weight_with(-2.0, 4.0)
    norm = clip_by_unit([matrix, bias, scalar], 0.01)
    # Rows: norm 5 allows 0.05 of 0.5, norm 1 allows 0.01 of 0.006, norm 0 counts as 1e-3: 1e-5 of 5.
    expected = [[0.03, 0.04], [0.006, 0.0], [6e-6, 8e-6]]
    torch.testing.assert_close(grad_of(matrix), torch.tensor(expected, dtype=torch.float64))
    assert grad_of(bias).tolist() == pytest.approx([0.0, 0.02])
    assert grad_of(scalar).item() == pytest.approx(0.02)
    assert norm == pytest.approx(math.sqrt(0.25 + 0.006**2 + 25.0 + 1.0 + 16.0))


def network(scale: float) -> nn.Module:
    """A critic with gradients of this size, laid out as the trainer has it."""
    critic = build_critic("patchgan3d", base=3, ndf=8)
    lay_out(critic)
    for name, p in critic.named_parameters():
        noise = torch.empty_like(p).copy_(rng.normal(p.shape, rng.key("gradient", name)))
        p.grad = scale * noise
    return critic


def test_small_gradients_are_left_alone_bit_for_bit() -> None:
    critic = network(1e-7)
    before = [grad_of(p).clone() for p in critic.parameters()]
    clip_by_unit(critic.parameters(), 0.01)
    assert all(torch.equal(grad_of(p), old) for p, old in zip(critic.parameters(), before, strict=True))


def test_large_gradients_keep_direction_and_layout_and_get_the_norm_of_the_bound() -> None:
    critic = network(100.0)
    before = {name: grad_of(p).clone() for name, p in critic.named_parameters()}
    clip_by_unit(critic.parameters(), 0.01)
    for name, p in critic.named_parameters():
        grad, old = grad_of(p), before[name]
        assert grad.stride() == old.stride(), name
        rows = (1, -1) if p.ndim < 2 else (len(p), -1)
        bound = 0.01 * p.detach().reshape(rows).norm(dim=1).clamp(min=1e-3)
        torch.testing.assert_close(grad.reshape(rows).norm(dim=1), bound, rtol=1e-5, atol=0.0, msg=name)
        along = torch.cosine_similarity(grad.reshape(rows), old.reshape(rows), dim=1, eps=1e-12)
        torch.testing.assert_close(along, torch.ones_like(along), rtol=1e-5, atol=0.0, msg=name)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_the_norm_is_that_of_measuring_and_one_that_is_not_finite_changes_nothing(poison: float) -> None:
    critic = network(1.0)
    measured = clip_gradients(critic.parameters())
    assert clip_by_unit(critic.parameters(), 1e9) == pytest.approx(measured, rel=1e-6)
    grad_of(critic.get_parameter("main.0.weight"))[0, 0, 0, 0, 0] = poison
    before = [grad_of(p).clone() for p in critic.parameters()]
    assert not math.isfinite(clip_by_unit(critic.parameters(), 1e-6))
    for p, old in zip(critic.parameters(), before, strict=True):
        torch.testing.assert_close(grad_of(p), old, rtol=0.0, atol=0.0, equal_nan=True)
    assert clip_by_unit([nn.Parameter(torch.ones(2))], 0.01) == 0.0  # no gradient, nothing to do


# --- the critic's statistics and regularisers


def plain_critic(weight: Tensor) -> nn.Sequential:
    """D(clip) = <weight, patch>, a linear critic. weight: 3 t h w, the patch."""
    conv = Conv(3, 1, kernel=weight.shape[1:], bias=False).to(weight.dtype)
    with torch.no_grad():
        conv.weight.copy_(weight[None])
    return nn.Sequential(conv)


def gray(values: list[float]) -> Tensor:
    """One clip of one frame of one row, equal in its three channels: 1 3 1 1 w."""
    return torch.tensor(values).double().view(1, 1, 1, 1, -1).repeat(1, 3, 1, 1, 1)


def report_of(critic: nn.Module, clip: Tensor, recon: Tensor, **options: Any) -> CriticTerms:
    critic.zero_grad(set_to_none=True)
    return critic_backward(critic, clip, recon, kind="hinge", **options)


def test_statistics_are_those_of_known_logits() -> None:
    critic = plain_critic(torch.ones(3, 1, 1, 1).double() / 3)  # a logit is the value of its pixel
    said = report_of(critic, gray([2.0, 0.5, 0.0, -0.5]), gray([-1.0, -2.0, -3.0, 2.0]))
    assert said.critic_accuracy_real.item() == 0.5  # a logit of 0 is no answer
    assert said.critic_accuracy_fake.item() == 0.75
    assert said.critic_logit_real.item() == pytest.approx(0.5)
    assert said.critic_logit_fake.item() == pytest.approx(-1.0)
    assert said.critic.item() == pytest.approx(0.5 * (0.0 + 0.5 + 1.0 + 1.5) / 4 + 0.5 * 3.0 / 4)
    assert said.critic_lecam is None
    assert said.critic_r1 is None


def test_a_step_with_the_critic_reports_its_statistics_by_name() -> None:
    state = state_of(SHUFFLE)
    x, noise = batch(state, clips=2)
    first = train_step(state, x, noise, loss=KIT, critic_loss="hinge").terms.numbers()
    names = {"critic", *(f"critic_{a}_{b}" for a in ("accuracy", "logit") for b in ("real", "fake"))}
    assert {name for name in first if name.startswith("critic")} == names | {"critic_r1"}
    second = train_step(state, x, noise, loss=KIT, critic_loss="hinge").terms.numbers()
    assert second.keys() == first.keys() | {"critic_lecam"}  # it needs the averages of an update before
    without = train_step(state, x, noise, loss=KIT, critic_loss=None).terms.numbers()
    assert not any(name.startswith("critic") for name in without)


def test_lecam_is_the_square_distance_to_the_average_of_the_other_kind() -> None:
    assert lecam_distance(torch.tensor([1.0, 3.0]), torch.tensor(-1.0)).item() == 10.0
    averages = torch.zeros(3)
    for real, fake in ((1.0, -2.0), (3.0, -1.0)):
        averages = moved_averages(averages, real=torch.tensor(real), fake=torch.tensor(fake))
    weight = 0.99 * 0.01 + 0.01  # what the zeros at the beginning do not have
    of_real, of_fake = (0.0099 * 1 + 0.01 * 3) / weight, (0.0099 * -2 + 0.01 * -1) / weight
    assert (averages[:2] / averages[2]).tolist() == pytest.approx([of_real, of_fake], rel=1e-6)
    critic = plain_critic(torch.ones(3, 1, 1, 1).double() / 3)
    clip, recon = gray([2.0, 0.5]), gray([-1.0, 2.0])
    said = report_of(critic, clip, recon, averages=averages.double(), lecam_weight=0.25)
    real = ((2.0 - of_fake) ** 2 + (0.5 - of_fake) ** 2) / 2
    fake = ((-1.0 - of_real) ** 2 + (2.0 - of_real) ** 2) / 2
    assert said.critic_lecam is not None
    assert said.critic_lecam.item() == pytest.approx(real + fake, rel=1e-6)


def test_lecam_adds_its_weighted_gradient_to_the_critic_and_not_to_the_term() -> None:
    critic = build_critic("patchgan3d", base=1, norm="group", ndf=8).double()
    x, y = rng.normal((2, 3, 5, 16, 16), 1).double(), rng.normal((2, 3, 5, 16, 16), 2).double()
    averages = torch.tensor([0.2, -0.1, 0.5], dtype=torch.float64)
    plain = report_of(critic, x, y, averages=averages).critic
    before = [grad_of(p).clone() for p in critic.parameters()]
    assert report_of(critic, x, y, averages=averages, lecam_weight=3.0).critic == plain
    added = [grad_of(p) - old for p, old in zip(critic.parameters(), before, strict=True)]
    lecam = (critic(x) + 0.2).square().mean() + (critic(y) - 0.4).square().mean()
    expected = torch.autograd.grad(3.0 * lecam, list(critic.parameters()))
    for one, other in zip(added, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("patch", [(5, 8, 8), (1, 1, 1), (3, 4, 2)], ids=str)
def test_r1_of_a_linear_critic_is_that_of_its_weight(patch: tuple[int, int, int]) -> None:
    weight = rng.normal((3, *patch), 4).double()
    critic = plain_critic(weight)
    clip = rng.normal((2, 3, 5, 8, 8), 5).double()
    places = [full - side + 1 for full, side in zip((5, 8, 8), patch, strict=True)]
    gradient = torch.zeros(3, 5, 8, 8, dtype=torch.float64)
    for i in range(places[0]):  # D is the mean over places, so its gradient is the mean of moved weights
        for j in range(places[1]):
            for k in range(places[2]):
                gradient[:, i : i + patch[0], j : j + patch[1], k : k + patch[2]] += weight
    expected = (gradient / math.prod(places)).square().sum()
    said = report_of(critic, clip, clip, r1_weight=2.0)
    assert said.critic_r1 is not None
    assert said.critic_r1.item() == pytest.approx(expected.item(), rel=1e-10)


def test_r1_has_half_of_its_weight_in_the_loss_of_the_critic() -> None:
    weight = rng.normal((3, 5, 8, 8), 4).double()  # one logit per clip: R1 is |weight|^2
    critic, clip = plain_critic(weight), rng.normal((2, 3, 5, 8, 8), 5).double()
    kernel = critic.get_parameter("0.weight")
    report_of(critic, clip, clip)
    before = grad_of(kernel).clone()
    report_of(critic, clip, clip, r1_weight=7.0)
    added = grad_of(kernel) - before
    torch.testing.assert_close(added[0], 7.0 * weight, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["patchgan3d", "patchgan2d"])
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_the_gradient_of_r1_is_that_of_finite_differences(kind: CriticKind, norm: Any) -> None:
    critic = build_critic(kind, base=2, norm=norm, ndf=2, n_layers=2).double()
    names = [name for name, p in critic.named_parameters() if p.ndim > 1]
    weights = [10.0 * critic.get_parameter(name).detach() for name in names]  # gradients of a common size
    clip = rng.normal((2, 3, 3, 16, 16), 6).double()

    def penalty(*values: Tensor) -> Tensor:
        x = clip.clone().requires_grad_()
        logits = torch.func.functional_call(critic, dict(zip(names, values, strict=True)), (x,))
        return gradient_penalty(logits, x)

    inputs = tuple(weight.requires_grad_() for weight in weights)
    assert torch.autograd.gradcheck(penalty, inputs, fast_mode=True, eps=1e-7, atol=1e-5, rtol=1e-4)


def test_r1_is_computed_in_fp32_whatever_the_convolutions_compute_in() -> None:
    one, other = (build_critic("patchgan3d", base=1, ndf=8) for _ in range(2))
    for module in other.modules():
        if isinstance(module, Conv):
            module.arithmetic = torch.bfloat16
    clip = rng.normal((2, 3, 5, 16, 16), 1)
    said = [report_of(critic, clip, clip, r1_weight=1.0).critic_r1 for critic in (one, other)]
    assert said[0] is not None
    assert said[1] is not None
    assert torch.equal(said[0], said[1])
    assert all(m.arithmetic == torch.bfloat16 for m in other.modules() if isinstance(m, Conv))


@pytest.mark.parametrize("size", [0.0, 1e-30, 1.0, 1e18])
@pytest.mark.parametrize("pull", [0.0, 1e-30, 1.0, 1e18])
def test_the_adaptive_weight_never_leaves_its_range(size: float, pull: float) -> None:
    weight = adaptive_weight(torch.tensor([size]), torch.tensor([pull]), limit=30.0)
    assert 0.0 <= weight.item() <= 30.0


# --- when the critic starts


def first_level(level: LevelOff, values: list[float]) -> int | None:
    """The update, from 1, at which it says so."""
    said = [i for i, value in enumerate(values, start=1) if level.update(value)]
    assert len(said) <= 1
    assert level.done == bool(said)
    return said[0] if said else None


def noise(i: int) -> float:
    return float(rng.normal((1,), rng.key("level", i))[0])


def test_a_falling_loss_has_not_levelled_off_and_a_flat_one_has() -> None:
    falling = [0.5 * 0.98 ** (i / 10) for i in range(400)]
    assert first_level(LevelOff(window=10), falling) is None
    assert first_level(LevelOff(window=10), [*falling, *[falling[-1] / 2] * 100]) == 420
    assert first_level(LevelOff(window=10), [0.3] * 19) is None
    assert first_level(LevelOff(window=10), [0.3] * 40) == 20
    assert first_level(LevelOff(window=10, skip=15), [0.3] * 40) == 35


def test_the_warm_up_and_the_noise_of_batches_are_not_taken_for_a_level() -> None:
    warming = [0.5] * 50  # the rate is too small to move the loss
    curve = [0.1 + 0.4 * 0.995**i for i in range(1500)]
    noisy = [value * (1.0 + 0.2 * noise(i)) for i, value in enumerate(warming + curve)]
    found = first_level(LevelOff(window=100, skip=50), noisy)
    assert found is not None
    left = curve[found - 50 - 1] - 0.1
    assert left < 0.01  # of 0.4


def test_a_loss_that_rises_again_has_levelled_off() -> None:
    assert first_level(LevelOff(window=10), [0.5] * 10 + [0.3] * 10 + [0.6] * 10) == 30


@pytest.mark.parametrize("cut", [0, 1, 7, 29, 30, 31, 55, 60, 79])
def test_a_level_that_went_through_a_file_goes_on_as_the_one_that_did_not(cut: int) -> None:
    values = [0.1 + 0.4 * 0.9**i * (1.0 + 0.1 * noise(i)) for i in range(80)]
    whole = LevelOff(window=10, skip=3)
    at = first_level(whole, values)
    assert at is not None
    before, after = LevelOff(window=10, skip=3), LevelOff(window=10, skip=3)
    said = [before.update(value) for value in values[:cut]]
    after.restore(json.loads(json.dumps(before.saved())))
    said += [after.update(value) for value in values[cut:]]
    assert said.index(True) + 1 == at
    assert after == whole
