"""Laws of the training step.

Split = whole, one forward = the published order of work, skipped steps change nothing.
"""

import dataclasses
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from causalvae import rng
from causalvae.critics.patchgan import CriticNorm
from causalvae.losses import LossPlan, build_critic, critic_loss, generator_loss, kl_loss
from causalvae.models.build import build
from causalvae.models.presets import TINY, CausalVAEConfig
from causalvae.train.optim import build_optimizer, clip_gradients
from causalvae.train.state import TrainState, ema_decay_at
from causalvae.train.step import train_step
from causalvae.video import crop_frames, pad_frames

SHUFFLE = dataclasses.replace(TINY, hidden_size=16, hidden_size_mult=(1, 1, 2))
CONV = CausalVAEConfig(hidden_size=32, hidden_size_mult=(1, 1, 1, 1), num_res_blocks=1)
CLIPPING = partial(clip_gradients, max_norm=1.0)
LOSS = LossPlan(kl_weight=1e-3)


def state_of(config: CausalVAEConfig, *, critic: bool = True, norm: CriticNorm = "batch") -> TrainState:
    """A training in float64 with moved weights, so that every branch has a gradient."""
    vae = build(config, seed=2).double()
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            parameter.add_(0.02 * rng.normal(parameter.shape, rng.key("moved", name)).double())
    judge = build_critic("patchgan3d", base=5, norm=norm, ndf=8).double() if critic else None
    logvar = nn.Parameter(torch.zeros((), dtype=torch.float64))
    how = {"kind": "adamw", "lr": 1e-3}
    return TrainState(
        vae=vae,
        ema={name: p.detach().clone() for name, p in vae.named_parameters()},
        critic=judge,
        logvar=logvar,
        optimizer=build_optimizer([*vae.named_parameters(), ("logvar", logvar)], **how),
        critic_optimizer=build_optimizer(judge.named_parameters(), **how) if judge is not None else None,
    )


def batch(state: TrainState, *, clips: int = 4, frames: int = 8, size: int = 32) -> tuple[Tensor, Tensor]:
    x = (0.5 * rng.normal((clips, 3, frames, size, size), 11)).double()
    shape = state.vae.geometry.latent_shape(frames, size, size)
    return x, rng.normal((clips, *shape), 12).double()


def tensors_of(state: TrainState) -> dict[str, Tensor]:
    found = {f"vae.{k}": v for k, v in state.vae.state_dict().items()}
    found |= {f"ema.{k}": v for k, v in state.ema.items()} | {"logvar": state.logvar.detach()}
    if state.critic is not None:
        found |= {f"critic.{k}": v for k, v in state.critic.state_dict().items()}
    return {name: tensor.clone() for name, tensor in found.items()}


@pytest.mark.parametrize(
    ("config", "parts"), [(SHUFFLE, 2), (SHUFFLE, 4), (CONV, 2)], ids=["shuffle-2", "shuffle-4", "conv-2"]
)
def test_a_batch_split_in_parts_gives_the_update_of_the_whole_batch(
    config: CausalVAEConfig, parts: int
) -> None:
    whole, split = state_of(config), state_of(config)
    x, noise = batch(whole, clips=parts, size=16)
    one = other = None
    for _ in range(2):
        one = train_step(whole, x, noise, loss=LOSS, critic_loss="hinge", clipping=CLIPPING, ema_decay=0.9)
        other = train_step(
            split, x, noise, loss=LOSS, critic_loss="hinge", parts=parts, clipping=CLIPPING, ema_decay=0.9
        )
    assert one is not None
    assert other is not None
    assert one.terms.numbers() == pytest.approx(other.terms.numbers(), rel=1e-9)
    assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-9)
    # AdamW divides by the root of a second moment, which lifts rounding of tiny gradients: 1e-8 was measured
    for name, tensor in tensors_of(whole).items():
        torch.testing.assert_close(tensors_of(split)[name], tensor, rtol=0, atol=1e-7, msg=name)


def published_order(state: TrainState, x: Tensor, noise: Tensor, *, disc_weight: float) -> dict[str, Tensor]:
    """Gradients by the published order of work.

    Losses on the graph, weights by two autograd calls, two forwards.
    """
    vae, critic, values = state.vae, state.critic, x[0, :, 0].numel()
    assert critic is not None
    frames = x.shape[2]
    recon, posterior = vae(pad_frames(x, vae.geometry), noise)
    recon = crop_frames(recon, frames)
    nll = (recon - x).abs().mean() * torch.exp(-state.logvar) + state.logvar
    g = generator_loss(critic(recon))
    last = vae.last_layer.get_parameter("weight")
    nll_norm = torch.autograd.grad(nll, last, retain_graph=True)[0].norm()
    g_norm = torch.autograd.grad(g, last, retain_graph=True)[0].norm()
    weight = disc_weight * (nll_norm / (g_norm + 1e-4)).clamp(0, 1e4 / values)
    kl = kl_loss(posterior.kl(), values_per_frame=values, num_clips=len(x))
    (nll + LOSS.kl_weight * kl + weight.detach() * g).backward()
    grads = {f"vae.{name}": p.grad.clone() for name, p in vae.named_parameters() if p.grad is not None}
    assert state.logvar.grad is not None
    grads["logvar"] = state.logvar.grad.clone()
    critic.zero_grad()
    with torch.no_grad():
        again, _ = vae(pad_frames(x, vae.geometry), noise)
    critic_loss(critic(x), critic(crop_frames(again, frames)), kind="hinge").backward()
    judged = {f"critic.{n}": p.grad.clone() for n, p in critic.named_parameters() if p.grad is not None}
    return grads | judged


@pytest.mark.parametrize("config", [SHUFFLE, CONV], ids=["shuffle", "conv"])
def test_the_step_has_the_gradients_of_the_published_order_of_work(config: CausalVAEConfig) -> None:
    ours, theirs = state_of(config), state_of(config)
    x, noise = batch(ours, clips=2, size=16)
    expected = published_order(theirs, x, noise, disc_weight=LOSS.disc_weight)
    for optimizer in (ours.optimizer, ours.critic_optimizer):
        assert optimizer is not None
        for group in optimizer.param_groups:
            group["lr"], group["weight_decay"] = 0.0, 0.0
    seen: dict[str, Tensor] = {}
    named = {"logvar": ours.logvar} | {f"vae.{n}": p for n, p in ours.vae.named_parameters()}
    assert ours.critic is not None
    named |= {f"critic.{n}": p for n, p in ours.critic.named_parameters()}
    for name, parameter in named.items():
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: seen.update({name: p.grad.clone()}))
    train_step(ours, x, noise, loss=LOSS, critic_loss="hinge")
    for name, grad in expected.items():
        if name != "logvar":  # its gradient is set, not accumulated: the optimiser's moment shows it
            torch.testing.assert_close(seen[name], grad, rtol=1e-9, atol=1e-14, msg=name)
    moment = ours.optimizer.state[ours.logvar]["exp_avg"]
    torch.testing.assert_close(moment, 0.1 * expected["logvar"], rtol=1e-9, atol=1e-14)


def test_padded_frames_have_no_part_in_the_loss() -> None:
    state = state_of(SHUFFLE, critic=False)
    x, noise = batch(state, frames=6)
    recon, _ = state.vae(pad_frames(x, state.vae.geometry), noise)
    expected = (recon[:, :, :6] - x).abs().mean()
    result = train_step(state, x, noise, loss=LOSS, critic_loss=None)
    assert float(result.terms.pixel) == pytest.approx(float(expected.detach()), rel=1e-12)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_moves_the_cursor_and_nothing_else(poison: float) -> None:
    state = state_of(SHUFFLE)
    x, noise = batch(state)
    train_step(state, x, noise, loss=LOSS, critic_loss="hinge", ema_decay=0.9)
    before = tensors_of(state)
    moments = {p: s["exp_avg"].clone() for p, s in state.optimizer.state.items()}
    x[0, 0, 0, 0, 0] = poison
    result = train_step(state, x, noise, loss=LOSS, critic_loss="hinge", ema_decay=0.9)
    assert not result.applied
    assert (state.step, state.cursor) == (1, 2)
    after = tensors_of(state)
    assert all(torch.equal(after[name], before[name]) for name in before if "running" not in name)
    assert all(torch.equal(state.optimizer.state[p]["exp_avg"], m) for p, m in moments.items())
    assert all(bool(torch.isfinite(tensor).all()) for tensor in after.values())


def test_before_the_critic_starts_it_is_left_alone() -> None:
    state = state_of(SHUFFLE)
    x, noise = batch(state)
    before = tensors_of(state)
    result = train_step(state, x, noise, loss=LOSS, critic_loss=None)
    assert result.terms.critic is None
    assert result.critic_grad_norm is None
    after = tensors_of(state)
    assert all(torch.equal(after[name], before[name]) for name in before if name.startswith("critic."))


def test_the_average_rises_to_its_decay_and_follows_the_formula() -> None:
    assert ema_decay_at(1, 0.999) == pytest.approx(2 / 11)
    assert ema_decay_at(10**6, 0.999) == 0.999
    state = state_of(SHUFFLE, critic=False)
    x, noise = batch(state)
    name = "decoder.conv_out.conv.weight"
    start = state.ema[name].clone()
    train_step(state, x, noise, loss=LOSS, critic_loss=None, ema_decay=0.999)
    weight = state.vae.get_parameter(name).detach()
    torch.testing.assert_close(state.ema[name], start * 2 / 11 + weight * 9 / 11)
