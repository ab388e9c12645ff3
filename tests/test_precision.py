"""Laws of precision: what each level keeps in which numbers, resume, masters, and the loss scale."""

import copy
import os
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from causalvae import rng
from causalvae.critics.patchgan import CriticNorm
from causalvae.errors import ConfigError
from causalvae.losses import LossPlan, build_critic
from causalvae.machine import Capability, home
from causalvae.models.build import Model, build
from causalvae.models.presets import TINY, CausalVAEConfig, ModelConfig
from causalvae.train.convolutions import check_convolutions, convolutions, shapes_of_run
from causalvae.train.networks import lay_out
from causalvae.train.optim import LossScale, build_optimizer, optimizer_tensors
from causalvae.train.precision import Level, Precision, PrecisionName, first_loss_scale, lower
from causalvae.train.state import TrainState
from causalvae.train.step import StepResult, train_step

SMALL = replace(TINY, hidden_size=16, hidden_size_mult=(1, 1, 2))
CONV = CausalVAEConfig(hidden_size=32, hidden_size_mult=(1, 1, 1, 1), num_res_blocks=1)
CLIPS = (2, 3, 5, 16, 16)  # b 3 t h w
FULL, NONE = Capability(), Capability(missing={"bf16": "this CPU has no bf16", "fp16": "nor fp16"})
LOSS = LossPlan(kl_weight=1e-3)
LEVELS: list[tuple[PrecisionName, Level]] = [
    ("bf16", "O1"), ("bf16", "O2"), ("bf16", "O3"), ("fp16", "O1"), ("fp16", "O2"), ("fp16", "O3"),
]  # fmt: skip


def state_of(
    name: PrecisionName = "fp32",
    level: Level = "O0",
    *,
    scale: float | None = None,
    window: int = 1000,
    config: CausalVAEConfig = SMALL,
    keep: Collection[str] | None = None,
) -> TrainState:
    """A training in this precision, on a machine that is said to have all of them.

    keep: convolutions of the autoencoder that stay in fp32. None: those that this CPU gets wrong, of the
    critic too.
    """
    precision = Precision.of(name, level, device="cpu", capability=FULL)
    vae = build(config, seed=2)
    lay_out(vae)
    critic = build_critic("patchgan3d", base=5, ndf=8)
    ema = {key: p.detach().clone() for key, p in vae.named_parameters()}
    kept = wrong_here(vae, critic, precision) if keep is None else {f"vae.{each}" for each in keep}
    masters, critic_masters = (
        lower(network, precision, keep={each.removeprefix(own) for each in kept if each.startswith(own)})
        for own, network in (("vae.", vae), ("critic.", critic))
    )
    logvar = nn.Parameter(torch.zeros(()))
    trained = [*(masters or vae).named_parameters(), ("logvar", logvar)]
    judged = (critic_masters or critic).named_parameters()
    scales = [LossScale(scale, window) if scale is not None else None for _ in range(2)]
    return TrainState(
        vae=vae,
        ema=ema,
        critic=critic,
        logvar=logvar,
        optimizer=build_optimizer(trained, kind="adamw", lr=1e-3),
        critic_optimizer=build_optimizer(judged, kind="adamw", lr=1e-3),
        masters=masters,
        critic_masters=critic_masters,
        scale=scales[0],
        critic_scale=scales[1],
    )


def wrong_here(vae: Model, critic: nn.Module, precision: Precision) -> set[str]:
    """Convolutions of a step of these tests, whole or in two parts, that stay in fp32 on this CPU."""
    if precision.level == "O0":
        return set()
    found = [
        check_convolutions(
            shapes_of_run(vae, critic, geometry=vae.geometry, clips=CLIPS, parts=parts),
            numbers=precision.numbers,
            cache=home(os.environ) / "convolutions.json",
            cpu="this CPU",
            variables=os.environ,
        )
        for parts in (1, 2)
    ]
    return {name for checked in found for name in checked.keep}


def batch(cursor: int, *, config: ModelConfig = SMALL) -> tuple[Tensor, Tensor]:
    x = 0.5 * rng.normal(CLIPS, rng.key("clip", cursor))
    x = x.contiguous(memory_format=torch.channels_last_3d)
    shape = (CLIPS[0], *config.geometry.latent_shape(*CLIPS[2:]))
    return x, rng.normal(shape, rng.key("noise", cursor))


def step(state: TrainState, *, parts: int = 1) -> StepResult:
    x, noise = batch(state.cursor, config=state.vae.config)
    return train_step(state, x, noise, loss=LOSS, critic_loss="hinge", parts=parts, ema_decay=0.9)


def tensors_of(state: TrainState) -> dict[str, Tensor]:
    """Everything that an update may change."""
    assert state.critic is not None
    assert state.critic_optimizer is not None
    found = {f"vae.{k}": v for k, v in state.vae.state_dict().items()} | {"logvar": state.logvar.detach()}
    found |= {f"ema.{k}": v for k, v in state.ema.items()}
    found |= {f"critic.{k}": v for k, v in state.critic.state_dict().items()}
    found |= {f"masters.{k}": p.detach() for k, p in state.named_parameters()}
    found |= {f"moments.{k}": v for k, v in optimizer_tensors(state.optimizer).items()}
    found |= {f"critic_moments.{k}": v for k, v in optimizer_tensors(state.critic_optimizer).items()}
    return {name: tensor.clone() for name, tensor in found.items()}


def differences(one: TrainState, two: TrainState, *, statistics: bool = True) -> list[str]:
    """Names of what is not bitwise equal. statistics: those that a critic keeps of what it has seen, too."""
    a, b = tensors_of(one), tensors_of(two)
    assert a.keys() == b.keys()
    return [
        name
        for name in a
        if (statistics or not ("running" in name or "num_batches" in name))
        and not (a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]))
    ]


@pytest.mark.parametrize(("name", "level"), LEVELS)
def test_every_level_trains_and_a_resumed_training_is_the_uninterrupted_one(
    name: PrecisionName, level: Level, tmp_path: Path
) -> None:
    scale = 512.0 if name == "fp16" else None
    state = state_of(name, level, scale=scale, window=2)
    result = step(state)
    assert result.applied
    assert result.loss_scale == scale
    state.save(tmp_path)
    other = state_of(name, level, scale=scale, window=2)
    other.load(tmp_path)
    assert differences(state, other) == []
    results = [step(each) for each in (state, other)]
    assert all(result.applied and result.critic_grad_norm is not None for result in results)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors_of(state).values())
    assert differences(state, other) == []
    assert (state.scale, state.critic_scale) == (other.scale, other.critic_scale)
    if name == "fp16":
        assert other.scale == LossScale(1024.0, 2)  # doubled after one good step before and one after


@pytest.mark.parametrize(("name", "level"), LEVELS)
def test_each_level_keeps_what_its_table_says(name: PrecisionName, level: Level, tmp_path: Path) -> None:
    state = state_of(name, level, keep=("decoder.conv_out.conv",))
    low = {"bf16": torch.bfloat16, "fp16": torch.float16}[name]
    convs = convolutions(state.vae)
    kept = convs.pop("decoder.conv_out.conv")
    assert {conv.arithmetic for conv in convs.values()} == {low}
    assert (kept.arithmetic or kept.weight.dtype) == torch.float32
    assert {conv.weight.dtype for conv in convs.values()} == {torch.float32 if level == "O1" else low}
    in_convs = {f"{key}.{own}" for key, conv in convs.items() for own, _ in conv.named_parameters()}
    others = {p.dtype for key, p in state.vae.named_parameters() if key not in in_convs}
    assert others == {low if level == "O3" else torch.float32}
    assert {p.dtype for _, p in state.named_parameters()} == {torch.float32}
    assert {tensor.dtype for tensor in state.ema.values()} == {torch.float32}
    step(state)
    state.save(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {low if level == "O3" else torch.float32}
    moments = load_file(tmp_path / "optimizer.safetensors")
    assert {tensor.dtype for tensor in moments.values()} == {torch.float32}


@pytest.mark.parametrize("level", ["O1", "O2", "O3"])
def test_the_published_layers_have_nearly_the_gradients_of_fp32_at_every_level(level: Level) -> None:
    exact, low = state_of(config=CONV), state_of("bf16", level, config=CONV)
    norms = [step(state).grad_norm for state in (exact, low)]
    assert norms[1] == pytest.approx(norms[0], rel=0.02)  # 0.006 was measured
    assert step(low).applied


def test_masters_remember_updates_that_the_weights_have_no_digits_for(tmp_path: Path) -> None:
    state = state_of("bf16", "O2")
    assert state.masters is not None
    step(state)  # the last layer begins at 0
    for group in state.optimizer.param_groups:
        group["lr"] = 1e-7  # far below 2 ** -9 of a weight
    name = "decoder.conv_out.conv.weight"
    weight, master = state.vae.get_parameter(name), dict(state.masters.named_parameters())[name]
    before = weight.detach().clone(), master.detach().clone()
    step(state)
    assert float((weight != before[0]).float().mean()) < 0.1
    assert float((master != before[1]).float().mean()) > 0.9
    assert torch.equal(weight, master.to(torch.bfloat16))
    state.save(tmp_path)
    assert torch.equal(load_file(tmp_path / "model.safetensors")[name], master.detach())
    plain = build(SMALL, seed=9)
    plain.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)  # loads anywhere, in fp32


def test_a_master_has_the_layout_of_its_weight() -> None:
    state = state_of("bf16", "O2")
    masters = dict(state.named_parameters())
    for name, weight in state.vae.named_parameters():
        assert masters[name].stride() == weight.stride(), name


def test_training_with_masters_stays_near_training_in_fp32() -> None:
    exact, low = state_of(), state_of("bf16", "O2")
    results = [[step(state) for _ in range(8)] for state in (exact, low)]
    losses = [[float(result.terms.pixel) for result in each] for each in results]
    assert losses[1] == pytest.approx(losses[0], rel=0.004)  # 0.0009 was measured


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
@pytest.mark.parametrize("level", ["O2", "O3"])
def test_critics_with_every_norm_train_with_a_convolution_kept_in_fp32(
    norm: CriticNorm, level: Level
) -> None:
    critic = build_critic("patchgan3d", base=5, norm=norm, ndf=8)
    precision = Precision.of("bf16", level, device="cpu", capability=FULL)
    masters = lower(critic, precision, keep=("main.2",))
    logits = critic(batch(0)[0])
    logits.float().sum().backward()
    assert masters is not None
    masters.take_gradients()
    grads = [parameter.grad for _, parameter in masters.named_parameters()]
    assert all(grad is not None and grad.dtype == torch.float32 for grad in grads)
    assert all(
        parameter.grad is None or parameter.dtype == torch.float32 for parameter in critic.parameters()
    )


def test_a_batch_in_parts_gives_nearly_the_update_of_the_whole_in_low_precision() -> None:
    whole, split = state_of("bf16", "O2"), state_of("bf16", "O2")
    one, other = step(whole), step(split, parts=2)
    assert other.grad_norm == pytest.approx(one.grad_norm, rel=0.02)


@pytest.mark.parametrize("scale", [2.0**-10, 1.0, 2.0**16])
def test_scaling_the_loss_changes_no_bit_in_fp32(scale: float) -> None:
    plain, scaled = state_of(), state_of(scale=scale)
    for _ in range(2):
        step(plain)
        step(scaled)
    assert differences(plain, scaled) == []


def test_scaling_by_what_is_no_power_of_two_changes_nothing_but_rounding() -> None:
    plain, scaled = state_of(), state_of(scale=1000.0)
    one, other = step(plain), step(scaled)
    assert other.grad_norm == pytest.approx(one.grad_norm, rel=1e-5)
    assert other.critic_grad_norm == pytest.approx(one.critic_grad_norm, rel=1e-5)


@pytest.mark.parametrize(("name", "level"), [("fp32", "O0"), ("fp16", "O2")])
def test_an_overflow_skips_one_update_of_the_autoencoder_and_halves_its_scale(
    name: PrecisionName, level: Level
) -> None:
    state = state_of(name, level, scale=512.0)
    step(state)
    before, counters = copy.deepcopy(state), (state.step, state.cursor)
    assert state.scale is not None
    state.scale.value = 2.0**127 if name == "fp32" else 2.0**45  # times a gradient: beyond the largest number
    used = state.scale.value
    result = step(state)
    assert (result.applied, result.loss_scale, result.critic_loss_scale) == (False, used, None)
    assert (state.step, state.cursor) == (counters[0], counters[1] + 1)
    assert state.scale.value == used / 2
    assert state.critic_scale == before.critic_scale
    assert differences(state, before, statistics=False) == []
    state.scale.value = 512.0
    assert step(state).applied


def test_an_overflow_of_the_critic_halves_only_its_own_scale() -> None:
    state = state_of("fp16", "O2", scale=512.0)
    assert state.critic_scale is not None
    state.critic_scale.value = 2.0**40
    before = {k: v for k, v in tensors_of(state).items() if k.startswith("critic.") and "weight" in k}
    result = step(state)
    assert (result.applied, result.critic_grad_norm, result.critic_loss_scale) == (True, None, 2.0**40)
    assert state.critic_scale.value == 2.0**39
    assert state.scale is not None
    assert (state.scale.value, state.scale.good) == (512.0, 1)
    after = tensors_of(state)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert state.critic_optimizer is not None
    assert optimizer_tensors(state.critic_optimizer) == {}


def test_the_scale_doubles_after_its_window_and_stays_in_its_range() -> None:
    scale = LossScale(4.0, 3)
    for finite in (True, True, False, True, True, True):
        scale.follow(finite=finite)
    assert (scale.value, scale.good) == (4.0, 0)
    for _ in range(9):
        scale.follow(finite=False)
    assert scale.value == 1.0
    top = LossScale(2.0**24, 1)
    top.follow(finite=True)
    assert top.value == 2.0**24
    outside = LossScale(0.25, 1)
    outside.follow(finite=False)
    assert outside.value == 0.25


def test_the_scale_is_for_fp16_and_for_bf16_where_it_is_asked_for() -> None:
    made = {
        (name, given): first_loss_scale(
            Precision.of(name, "O1", device="cpu", capability=FULL), value=8.0, window=5, given=given
        )
        for name in ("fp32", "bf16", "fp16")
        for given in (False, True)
    }
    assert {key for key, scale in made.items() if scale == LossScale(8.0, 5)} == {
        ("bf16", True), ("fp16", False), ("fp16", True),
    }  # fmt: skip


@pytest.mark.parametrize("level", ["O0", "O1", "O2", "O3"])
def test_hardware_without_low_precision_gets_fp32_and_a_warning(level: Level) -> None:
    for name in ("bf16", "fp16"):
        precision = Precision.of(name, level, device="cpu", capability=NONE)
        assert precision.facts() == {"precision": "fp32", "amp_level": "O0"}
        (warning,) = precision.warnings
        assert f"--precision {name}" in warning
        assert ("no effect" if level == "O0" else NONE.missing[name]) in warning


def test_auto_is_bf16_only_on_a_gpu_that_has_it() -> None:
    said = [
        Precision.of("auto", "O2", device=device, capability=can).facts()
        for device, can in (("cuda:1", FULL), ("cuda", NONE), ("cpu", FULL), ("mps", FULL))
    ]
    fp32 = {"precision": "fp32", "amp_level": "O0"}
    assert said == [{"precision": "bf16", "amp_level": "O2"}, fp32, fp32, fp32]
    assert Precision.of("auto", "O2", device="cpu", capability=NONE).warnings == ()
    assert Precision.of("fp32", "O3", device="cpu", capability=FULL) == Precision()


def test_a_run_goes_on_in_the_numbers_that_it_began_in() -> None:
    on = Precision.of("bf16", "O2", device="cpu", capability=FULL, saved=("fp32", "O0"))
    assert on.facts() == {"precision": "fp32", "amp_level": "O0"}
    assert "began in fp32" in on.warnings[0]
    same = Precision.of("bf16", "O2", device="cpu", capability=FULL, saved=("bf16", "O2"))
    assert same == Precision(name="bf16", level="O2")
    auto = Precision.of("auto", "O1", device="cpu", capability=FULL, saved=("bf16", "O1"))
    assert auto.facts() == {"precision": "bf16", "amp_level": "O1"}
    with pytest.raises(ConfigError, match="computes in bf16"):
        Precision.of("bf16", "O2", device="cpu", capability=NONE, saved=("bf16", "O2"))
    again = Precision.of("bf16", "O2", device="cpu", capability=NONE, saved=("fp32", "O0"))
    assert "no bf16" in again.warnings[0]
