"""Laws of the models: causal, independent of neighbours. Streams: test_streams.py."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from causalvae import rng
from causalvae.models.base import Posterior
from causalvae.models.build import Model, build
from causalvae.models.layers import depth_to_space, space_to_depth
from causalvae.models.presets import TINY, CausalVAEConfig, ModelConfig

# The kinds of network there are, small: the published layers with norms per frame, and space-to-depth.
SMALL = {
    "conv": CausalVAEConfig(hidden_size=32, hidden_size_mult=(1, 2, 1, 1), num_res_blocks=1),
    "shuffle": dataclasses.replace(TINY, hidden_size=16, hidden_size_mult=(1, 1, 2)),
}


def trained(config: ModelConfig) -> Model:
    """A model in float64 whose every weight was moved, so that nothing is zero or one by its start."""
    vae = build(config, seed=1).double()
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            scale = 0.5 / math.sqrt(max(1, parameter[0].numel()))
            parameter.add_(scale * rng.normal(parameter.shape, rng.key("moved", name)).double())
    return vae


@pytest.fixture(scope="module", params=sorted(SMALL))
def vae(request: pytest.FixtureRequest) -> Model:
    return trained(SMALL[request.param])


def clip(*, frames: int, size: tuple[int, int] = (16, 24), batch: int = 1, base: int = 0) -> Tensor:
    """b 3 t h w in about [-1, 1], float64."""
    return (0.5 * rng.normal((batch, 3, frames, *size), rng.key("clip", base))).double()


@torch.no_grad()
def test_no_later_frame_changes_an_earlier_latent(vae: Model) -> None:
    x = clip(frames=13)
    for changed in (1, 4, 5, 12):
        y = x.clone()
        y[:, :, changed:] += 1.0
        first = (
            vae.geometry.latent_frames(changed + 1) - 1
        )  # the latent frame that covers the first changed frame
        before, after = vae.encode(x), vae.encode(y)
        assert torch.equal(before.mean[:, :, :first], after.mean[:, :, :first])
        assert torch.equal(before.logvar[:, :, :first], after.logvar[:, :, :first])
        assert not torch.equal(before.mean[:, :, first], after.mean[:, :, first])


@torch.no_grad()
def test_one_frame_alone_gives_the_first_latent_of_its_clip(vae: Model) -> None:
    x = clip(frames=9)
    alone, whole = vae.encode(x[:, :, :1]).mean, vae.encode(x).mean[:, :, :1]
    torch.testing.assert_close(alone, whole, rtol=0, atol=1e-12)


@torch.no_grad()
def test_a_clip_does_not_depend_on_its_neighbours_in_the_batch(vae: Model) -> None:
    x = clip(frames=5, batch=3)
    together, _ = vae(x, None)
    for i in range(3):
        alone, _ = vae(x[i : i + 1], None)
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 5, 9, 17])
def test_reconstruction_has_the_shape_of_the_clip(vae: Model, frames: int) -> None:
    x = clip(frames=frames)
    recon, posterior = vae(x, None)
    assert recon.shape == x.shape
    assert posterior.mean.shape[1:] == vae.geometry.latent_shape(frames, 16, 24)


def test_initial_weights_are_a_function_of_config_and_seed() -> None:
    config = SMALL["shuffle"]
    first, again, other = (build(config, seed=seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@torch.no_grad()
def test_a_shuffle_model_starts_as_a_low_pass_of_its_clip() -> None:
    ramp = torch.linspace(-0.6, 0.6, 32)
    x = (ramp[:, None] * 0.5 + ramp[None, :] * 0.5).expand(1, 3, 9, 32, 32)
    recon, posterior = build(TINY)(x, None)
    assert (recon - x).square().mean() < 1e-3  # a smooth picture goes through; white would be 0.12
    assert bool((posterior.logvar < -6).all())


@given(t=st.integers(1, 2), h=st.integers(1, 3), w=st.integers(1, 3), p=st.integers(1, 2))
@settings(max_examples=20, deadline=None)
def test_depth_to_space_undoes_space_to_depth(t: int, h: int, w: int, p: int) -> None:
    x = torch.arange(2 * 3 * t * p * h * 2 * w * 2, dtype=torch.float32).view(2, 3, t * p, h * 2, w * 2)
    assert torch.equal(depth_to_space(space_to_depth(x, (p, 2, 2)), (p, 2, 2)), x)


def test_kl_of_a_posterior_is_the_formula_worked_out_by_hand() -> None:
    mean = torch.tensor([[1.0, 2.0]]).view(1, 2, 1, 1, 1)
    logvar = torch.tensor([[0.0, math.log(4.0)]]).view(1, 2, 1, 1, 1)
    # 0.5 * (1 + 1 - 1 - 0) + 0.5 * (4 + 4 - 1 - log 4)
    expected = 0.5 + 0.5 * (7 - math.log(4.0))
    assert Posterior(mean, logvar).kl().item() == pytest.approx(expected, rel=1e-6)
