"""Mode 1: looking changes nothing, and the first bad value is found where it was made."""

import inspect
from types import ModuleType

import pytest
import torch
from test_step import CONV, LOSS, SHUFFLE, tensors_of
from torch import Tensor, nn

from causalvae import losses, rng
from causalvae.losses import build_critic
from causalvae.models import base
from causalvae.models.build import build
from causalvae.models.presets import CausalVAEConfig
from causalvae.train import optim, state
from causalvae.train.debug import TERMS, BadPlace, Watch
from causalvae.train.optim import build_optimizer, set_learning_rate
from causalvae.train.state import TrainState
from causalvae.train.step import StepResult, train_step

HUGE = 1e38  # finite in fp32, but no sum of a few of them is


def state_of(config: CausalVAEConfig = SHUFFLE) -> TrainState:
    """A training in fp32 with moved weights."""
    vae, critic = build(config, seed=2), build_critic("patchgan3d", base=5, ndf=8)
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            parameter.add_(0.02 * rng.normal(parameter.shape, rng.key("moved", name)))
    return TrainState(
        vae=vae,
        ema={name: p.detach().clone() for name, p in vae.named_parameters()},
        critic=critic,
        logvar=nn.Parameter(torch.zeros(()), requires_grad=False),
        optimizer=build_optimizer(vae.named_parameters(), kind="adamw", lr=1e-3),
        critic_optimizer=build_optimizer(critic.named_parameters(), kind="adamw", lr=1e-3),
    )


def batch_of(training: TrainState, *, clips: int = 2) -> tuple[Tensor, Tensor]:
    x = 0.5 * rng.normal((clips, 3, 5, 32, 32), 11)
    return x, rng.normal((clips, *training.vae.geometry.latent_shape(5, 32, 32)), 12)


def watched(training: TrainState, *, judging: bool = True, parts: int = 1) -> tuple[StepResult, Watch]:
    assert training.critic is not None
    x, noise = batch_of(training)
    with Watch({"vae": training.vae, "critic": training.critic}) as watch:
        result = train_step(
            training,
            x,
            noise,
            loss=LOSS,
            critic_loss="hinge" if judging else None,
            parts=parts,
            ema_decay=0.9,
        )
    return result, watch


def bad_place(training: TrainState, *, judging: bool = True, parts: int = 1) -> BadPlace:
    _, watch = watched(training, judging=judging, parts=parts)
    assert watch.first is not None
    return watch.first


@torch.no_grad()
def set_weight(network: nn.Module | None, name: str, value: float) -> None:
    assert network is not None
    network.get_parameter(name)[0] = value


@pytest.mark.parametrize(("config", "parts"), [(SHUFFLE, 1), (SHUFFLE, 2), (CONV, 1)])
def test_a_watched_step_is_bitwise_the_step_and_finds_nothing(config: CausalVAEConfig, parts: int) -> None:
    plain, looked_at = state_of(config), state_of(config)
    x, noise = batch_of(plain)
    one = train_step(plain, x, noise, loss=LOSS, critic_loss="hinge", parts=parts, ema_decay=0.9)
    two, watch = watched(looked_at, parts=parts)
    assert watch.first is None
    assert one.terms.numbers() == two.terms.numbers()
    assert (one.grad_norm, one.critic_grad_norm) == (two.grad_norm, two.critic_grad_norm)
    others = tensors_of(looked_at)
    assert [name for name, tensor in tensors_of(plain).items() if not torch.equal(tensor, others[name])] == []
    assert not any(module._forward_hooks for module in looked_at.vae.modules())


@pytest.mark.parametrize(
    ("config", "weight", "place"),
    [
        (SHUFFLE, "encoder.conv_in.conv.weight", "vae.encoder.conv_in"),
        (SHUFFLE, "decoder.up.0.block.0.conv1.conv.bias", "vae.decoder.up.0.block.0"),
        (CONV, "encoder.down.1.block.0.conv2.weight", "vae.encoder.down.1.block.0"),
        (CONV, "encoder.mid.attn_1.norm.weight", "vae.encoder.mid.attn_1"),
        (CONV, "encoder.down.2.time_downsample.conv.weight", "vae.encoder.down.2.time_downsample"),
    ],
)
@pytest.mark.parametrize("parts", [1, 2])
def test_the_first_module_that_overflows_is_named(
    config: CausalVAEConfig, weight: str, place: str, parts: int
) -> None:
    training = state_of(config)
    set_weight(training.vae, weight, HUGE)
    bad = bad_place(training, parts=parts)
    assert bad.module.startswith(place)
    assert (bad.direction, bad.term, bad.made_here) == ("forward", None, True)
    assert bad.output.num_nan + bad.output.num_inf > 0
    assert place in bad.sentence()
    assert "made there from finite input" in bad.sentence()


@pytest.mark.parametrize("memory", ["speed", "lean"])
def test_in_a_block_or_chain_of_blocks_the_layer_before_is_named_too(memory: str) -> None:
    training = state_of()
    training.vae.set_recompute(on=memory == "lean")
    set_weight(training.vae, "decoder.up.0.block.0.conv1.conv.bias", HUGE)  # the norm after it squares it
    bad = bad_place(training)
    assert bad.module == ("vae.decoder" if memory == "lean" else "vae.decoder.up.0.block.0")
    assert bad.after == "vae.decoder.up.0.block.0.conv1.conv"
    assert f"in {bad.module}, after {bad.after} (forward)" in bad.sentence()


@pytest.mark.parametrize(
    ("weight", "place", "term"),
    [
        ("main.0.weight", "critic.main.0", "adversarial"),
        ("main.6.weight", "critic.main.6", "adversarial"),
        ("main.11.bias", "", "adversarial"),
    ],
)
def test_a_critic_that_overflows_is_named_with_its_term(weight: str, place: str, term: str) -> None:
    training = state_of()
    set_weight(training.critic, weight, HUGE)
    bad = bad_place(training)
    assert (bad.module, bad.term, bad.direction) == (place, term, "forward")
    assert f"{term} term" in bad.sentence()


def test_a_pixel_error_that_overflows_is_named_as_the_term() -> None:
    training = state_of()
    set_weight(training.vae, "decoder.conv_out.conv.bias", 3e38)
    bad = bad_place(training)
    assert (bad.module, bad.term, bad.direction) == ("", "pixel", "forward")
    assert "the pixel term" in bad.sentence()


@pytest.mark.parametrize("parts", [1, 2])
def test_a_gradient_that_overflows_is_named_with_the_module_of_its_weight(parts: int) -> None:
    training = state_of()
    with torch.no_grad():  # large values on a path where forward they are made small again
        for name, factor in (("up.1.upsample.proj.conv", 1e-13), ("conv_out.conv", 1e18)):
            for parameter in training.vae.get_submodule(f"decoder.{name}").parameters():
                parameter.mul_(factor)
        training.vae.get_parameter("decoder.up.1.block.0.conv2.conv.bias").fill_(1e27)
    bad = bad_place(training, judging=False, parts=parts)
    assert bad.module.startswith("vae.decoder.up.1.upsample")
    assert (bad.direction, bad.made_here) == ("backward", True)
    assert "(backward" in bad.sentence()


def test_a_gradient_norm_that_overflows_is_named_as_such() -> None:
    training = state_of()
    with torch.no_grad():
        training.vae.last_layer.get_parameter("weight").mul_(1e25)
    bad = bad_place(training, judging=False)
    assert (bad.module, bad.term, bad.made_here) == ("", "gradient norm", True)


def test_an_update_that_overflows_is_named_with_its_weight() -> None:
    training = state_of()
    set_learning_rate(training.optimizer, 1e39)
    bad = bad_place(training)
    assert bad.direction == "update"
    assert bad.module.startswith("vae.encoder")
    assert "update of the weights" in bad.sentence()


def test_weights_that_are_bad_before_the_step_are_said_to_be() -> None:
    training = state_of()
    set_weight(training.vae, "decoder.mid.block_1.norm1.weight", float("nan"))
    bad = bad_place(training)
    assert (bad.module, bad.direction) == ("vae.decoder.mid.block_1.norm1", "weights")
    assert "not finite already before the step (1 NaN and 0 infinite" in bad.sentence()


def test_input_that_is_bad_is_not_blamed_on_the_module_that_meets_it() -> None:
    training = state_of()
    x, noise = batch_of(training)
    x[0, 0, 0, 0, 0] = float("inf")
    with Watch({"vae": training.vae}) as watch:
        training.vae(x, noise)
    assert watch.first is not None
    assert not watch.first.made_here
    assert "its input was not finite already" in watch.first.sentence()


def test_every_function_that_stands_for_a_term_exists() -> None:
    def names(module: ModuleType) -> set[str]:
        source = inspect.getsource(module)
        return {name for name in TERMS if f"def {name}(" in source}

    assert set().union(*(names(each) for each in (losses, base, optim, state))) | {"last_layer_grad"} == set(
        TERMS
    )
