"""Optimisers follow their formulas, their state survives a file, learning rates equal the published ones."""

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures import fixture_rows
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from causalvae.errors import ConfigError, RunError
from causalvae.losses import build_critic
from causalvae.rng import key, normal
from causalvae.train.networks import lay_out
from causalvae.train.optim import (
    OptimizerKind,
    build_optimizer,
    clip_gradients,
    learning_rate,
    load_optimizer_tensors,
    optimizer_tensors,
    set_learning_rate,
)

KINDS = ["adamw", "adam", "sgd", "lion", "adamw8bit"]


def network() -> nn.Module:
    # Weights laid out as the trainer has them: a state restored in another layout goes on wrongly.
    critic = build_critic("patchgan3d", base=1, ndf=8)
    lay_out(critic)
    return critic


def give_gradients(module: nn.Module, step: int) -> None:
    for name, p in module.named_parameters():
        p.grad = normal(p.shape, key("gradient", step, name))


def updated(module: nn.Module, optimizer: Optimizer, steps: range) -> nn.Module:
    for step in steps:
        give_gradients(module, step)
        optimizer.step()
    return module


def one_weight(value: float, kind: OptimizerKind, **settings: Any) -> tuple[nn.Parameter, Optimizer]:
    """A weight of two axes, so that it is decayed, in float64."""
    weight = nn.Parameter(torch.tensor([[value]], dtype=torch.float64))
    return weight, build_optimizer([("weight", weight)], kind=kind, **settings)


def after(gradients: list[float], kind: OptimizerKind, **settings: Any) -> float:
    """Value of a weight that starts at 2 after these gradients."""
    weight, optimizer = one_weight(2.0, kind, **settings)
    for gradient in gradients:
        weight.grad = torch.tensor([[gradient]], dtype=torch.float64)
        optimizer.step()
    return weight.item()


@pytest.mark.parametrize("kind", ["adamw", "adam"])
def test_adam_decays_beside_its_update_and_corrects_its_bias(kind: OptimizerKind) -> None:
    x, m, v = 2.0, 0.0, 0.0
    for i, g in enumerate([0.5, -0.25, 1.0], start=1):
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
        x -= 0.1 * 0.2 * x
        x -= 0.1 * (m / (1 - 0.9**i)) / (math.sqrt(v / (1 - 0.99**i)) + 1e-8)
    found = after([0.5, -0.25, 1.0], kind, lr=0.1, betas=(0.9, 0.99), weight_decay=0.2)
    assert found == pytest.approx(x, rel=1e-12)


def test_lion_steps_by_the_sign_of_the_mixed_momentum() -> None:
    x, m = 2.0, 0.0
    for g in [0.5, -0.01, -1.0]:
        mixed = 0.9 * m + 0.1 * g
        x -= 0.1 * (math.copysign(1.0, mixed) + 0.2 * x)
        m = 0.99 * m + 0.01 * g
    assert after([0.5, -0.01, -1.0], "lion", lr=0.1, betas=(0.9, 0.99), weight_decay=0.2) == pytest.approx(x)


def test_sgd_keeps_decay_out_of_its_momentum() -> None:
    x, v = 2.0, 0.0
    for g in [0.5, -0.25, 1.0]:
        v = 0.9 * v + g
        x -= 0.1 * (v + 0.2 * x)
    assert after([0.5, -0.25, 1.0], "sgd", lr=0.1, betas=(0.9, 0.99), weight_decay=0.2) == pytest.approx(x)


@pytest.mark.parametrize("kind", KINDS)
def test_biases_norms_and_scalars_are_not_decayed(kind: OptimizerKind) -> None:
    module = network()
    logvar = nn.Parameter(torch.tensor(1.0))
    named = [*module.named_parameters(), ("logvar", logvar)]
    optimizer = build_optimizer(named, kind=kind, lr=0.1, weight_decay=0.5)
    before = {name: p.detach().clone() for name, p in named}
    for _, p in named:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in named:
        factor = 0.95 if p.ndim > 1 else 1.0
        torch.testing.assert_close(p.detach(), factor * before[name], rtol=1e-6, atol=0.0)


def test_parameters_keep_their_order_and_frozen_ones_are_left_out() -> None:
    module = network()
    names = [name for name, _ in module.named_parameters()]
    module.get_parameter("main.0.weight").requires_grad_(False)
    optimizer = build_optimizer(module.named_parameters(), kind="adamw", lr=0.1)
    held = [name for group in optimizer.param_groups for name in group["param_names"]]
    kernels = [name for name in names if name in {f"main.{i}.weight" for i in (2, 5, 8, 11)}]
    assert held == kernels + [n for n in names if n not in kernels and n != "main.0.weight"]


def test_nothing_to_train_is_refused() -> None:
    frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)
    with pytest.raises(ConfigError, match="nothing to train"):
        build_optimizer([("weight", frozen)], kind="adamw", lr=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_state_through_a_file_continues_bit_for_bit(kind: OptimizerKind, tmp_path: Path) -> None:
    straight, cut = network(), network()
    optimizer = build_optimizer(straight.named_parameters(), kind=kind, lr=1e-2)
    updated(straight, optimizer, range(5))

    first = build_optimizer(cut.named_parameters(), kind=kind, lr=1e-2)
    updated(cut, first, range(3))
    save_file(optimizer_tensors(first), tmp_path / "optimizer.safetensors")
    second = build_optimizer(cut.named_parameters(), kind=kind, lr=1e-2)
    load_optimizer_tensors(second, load_file(tmp_path / "optimizer.safetensors"))
    updated(cut, second, range(3, 5))

    for one, two in zip(straight.parameters(), cut.parameters(), strict=True):
        assert torch.equal(one, two)
    saved, expected = optimizer_tensors(second), optimizer_tensors(optimizer)
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in saved)


def test_state_is_named_by_parameter_and_copied() -> None:
    module = network()
    optimizer = build_optimizer(module.named_parameters(), kind="adamw", lr=1e-2)
    assert optimizer_tensors(optimizer) == {}
    updated(module, optimizer, range(1))
    tensors = optimizer_tensors(optimizer)
    entries = ("step", "exp_avg", "exp_avg_sq")
    assert set(tensors) == {f"{name}.{e}" for name, _ in module.named_parameters() for e in entries}
    assert tensors["main.0.bias.step"].ndim == 0
    before = tensors["main.0.bias.exp_avg"].clone()
    updated(module, optimizer, range(1, 2))
    assert torch.equal(tensors["main.0.bias.exp_avg"], before)


def test_state_of_a_parameter_without_gradients_is_absent_and_stays_so() -> None:
    used, unused = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    named = [("used", used), ("unused", unused)]
    optimizer = build_optimizer(named, kind="adamw", lr=0.1)
    used.grad = torch.ones(2, 2)
    optimizer.step()
    tensors = optimizer_tensors(optimizer)
    assert {name.split(".")[0] for name in tensors} == {"used"}
    again = build_optimizer(named, kind="adamw", lr=0.1)
    load_optimizer_tensors(again, tensors)
    assert optimizer_tensors(again).keys() == tensors.keys()


def test_loading_forgets_the_state_that_was_there() -> None:
    module = network()
    optimizer = build_optimizer(module.named_parameters(), kind="adamw", lr=0.1)
    updated(module, optimizer, range(2))
    load_optimizer_tensors(optimizer, {})
    assert optimizer_tensors(optimizer) == {}


def test_state_of_an_unknown_parameter_is_refused_by_name() -> None:
    optimizer = build_optimizer(network().named_parameters(), kind="adamw", lr=0.1)
    with pytest.raises(RunError, match=r"encoder\.conv\.exp_avg, which belongs to no parameter"):
        load_optimizer_tensors(optimizer, {"encoder.conv.exp_avg": torch.zeros(3)})


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_leaves_weights_in_their_layout(kind: OptimizerKind) -> None:
    module = network()
    before = {name: p.stride() for name, p in module.named_parameters()}
    assert any(not p.is_contiguous() for p in module.parameters())
    optimizer = build_optimizer(module.named_parameters(), kind=kind, lr=0.1)
    updated(module, optimizer, range(2))
    assert {name: p.stride() for name, p in module.named_parameters()} == before


def test_adamw8bit_without_its_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim.adamw", None)
    with pytest.raises(ConfigError, match=r"pip install 'causalvae\[adamw8bit\]'"):
        build_optimizer(network().named_parameters(), kind="adamw8bit", lr=0.1)


def test_learning_rate_can_be_set_for_all_groups() -> None:
    module = network()
    optimizer = build_optimizer(module.named_parameters(), kind="sgd", lr=1.0)
    set_learning_rate(optimizer, 0.0)
    before = {name: tensor.clone() for name, tensor in module.named_parameters()}
    updated(module, optimizer, range(1))
    assert all(torch.equal(before[name], p) for name, p in module.named_parameters())


def rate(row: dict[str, str], step: int) -> float:
    return learning_rate(
        step,
        peak=float(row["start_learning_rate"]),
        end=float(row["end_learning_rate"]),
        kind=row["lr_scheduler"],  # pyright: ignore[reportArgumentType]: a word of the file
        warmup=int(row["lr_warmup_steps"]),
        decay=int(row["lr_decay_steps"]),
    )


def test_learning_rates_are_the_published_ones_and_warm_up_one_step_earlier() -> None:
    rows = fixture_rows("lr_schedules")
    assert {row["lr_scheduler"] for row in rows} == {"constant", "cosine", "linear"}
    for row in rows:
        step, expected = int(row["step"]), float(row["lr"])
        warmup = int(row["lr_warmup_steps"])
        if step >= warmup:
            assert rate(row, step) == pytest.approx(expected, rel=1e-9)
        elif step > 0:  # theirs is peak * step / warmup
            assert rate(row, step - 1) == pytest.approx(expected, rel=1e-9)


def test_cosine_decay_is_cosine() -> None:
    for step in range(12):
        rates = [
            learning_rate(step, peak=1.0, end=0.1, kind=kind, warmup=2, decay=8)
            for kind in ("cosine", "cosine_decay")
        ]
        assert rates[0] == rates[1]


def test_warmup_rises_from_a_share_of_the_peak_to_the_peak() -> None:
    rates = [learning_rate(i, peak=1.0, end=0.0, kind="linear", warmup=4, decay=4) for i in range(10)]
    assert rates == [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]


def test_no_steps_to_decay_in_means_the_end_value_after_warmup() -> None:
    assert learning_rate(3, peak=1.0, end=0.1, kind="cosine", warmup=3, decay=0) == pytest.approx(0.1)


def gradients_of(*values: list[float]) -> list[nn.Parameter]:
    params: list[nn.Parameter] = []
    for value in values:
        params.append(nn.Parameter(torch.zeros(len(value))))
        params[-1].grad = torch.tensor(value)
    return params


def grads(params: list[nn.Parameter]) -> list[Tensor]:
    return [p.grad for p in params if p.grad is not None]


def test_gradients_are_clipped_at_their_joint_norm() -> None:
    params = gradients_of([3.0, 0.0], [4.0])
    assert clip_gradients(params, 1.0) == pytest.approx(5.0)
    assert torch.cat(grads(params)).tolist() == pytest.approx([0.6, 0.0, 0.8], rel=1e-5)


@pytest.mark.parametrize("max_norm", [None, 5.1])
def test_gradients_within_the_limit_or_without_one_stay_bit_for_bit(max_norm: float | None) -> None:
    params = gradients_of([3.0, 0.0], [4.0])
    assert clip_gradients([*params, nn.Parameter(torch.ones(2))], max_norm) == pytest.approx(5.0)
    assert torch.cat(grads(params)).tolist() == [3.0, 0.0, 4.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_norm_that_is_not_finite_is_reported_and_clips_nothing(bad: float) -> None:
    params = gradients_of([3.0, bad], [4.0])
    assert not math.isfinite(clip_gradients(params, 1.0))
    assert params[1].grad is not None
    assert params[1].grad.item() == 4.0
