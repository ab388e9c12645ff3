"""Video VAEs of diffusers behind our protocol: theirs to the bit, and trained as ours."""

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import SETTINGS, clip_for, config_of, gradients, moved, noise_for
from torch import Tensor, nn

from causalvae import rng
from causalvae.errors import ConfigError
from causalvae.geometry import Geometry
from causalvae.losses import LossPlan, build_critic
from causalvae.models.diffusers import DiffusersVAE, build_diffusers, ignored_settings
from causalvae.models.meta import LiveBytes
from causalvae.models.stream import Stream
from causalvae.train.optim import build_optimizer
from causalvae.train.predict import blueprint
from causalvae.train.state import TrainState
from causalvae.train.step import StepResult, train_step
from causalvae.video import crop_frames, pad_frames
from causalvae.weights.diffusers_folder import save_folder

NAMES = sorted(SETTINGS)
LOSS = LossPlan(kl_weight=1e-3)
GEOMETRY = {
    "wan-2.1": Geometry(temporal=4, spatial=4, channels=4),
    "wan-2.2": Geometry(temporal=4, spatial=8, channels=4),
    "cogvideox": Geometry(temporal=4, spatial=4, channels=4, group=2),
    "hunyuan": Geometry(temporal=4, spatial=8, channels=4),
    "ltx-0.9.0": Geometry(temporal=8, spatial=8, channels=8),
    "ltx-0.9.5": Geometry(temporal=8, spatial=8, channels=8),
    "mochi": Geometry(temporal=6, spatial=8, channels=4),
    "cosmos": Geometry(temporal=8, spatial=8, channels=4),
}


@pytest.fixture(scope="module", params=NAMES)
def vae(request: pytest.FixtureRequest) -> DiffusersVAE:
    """One for all tests that do not change it, which another one checks."""
    return moved(request.param)


def theirs_of(vae: DiffusersVAE, folder: Path) -> Any:  # Any: a class of diffusers
    """The model as diffusers loads it, encoding and decoding a clip in one piece."""
    save_folder(vae, folder)
    theirs = type(vae.net).from_pretrained(folder)
    for parameter in theirs.parameters():  # out of the file, where they lie at odd addresses: other kernels
        parameter.data = parameter.data.clone()
    if hasattr(theirs, "use_framewise_encoding"):
        theirs.use_framewise_encoding = theirs.use_framewise_decoding = False
    return theirs


@torch.no_grad()
def test_latents_and_frames_have_the_sizes_that_the_geometry_says(vae: DiffusersVAE) -> None:
    assert vae.geometry in GEOMETRY.values()
    for frames in (1, 2, 5, 13, 17):
        h, w = 2 * vae.geometry.spatial, 3 * vae.geometry.spatial
        x = torch.zeros(1, 3, frames, h, w)
        padded = pad_frames(x, vae.geometry)
        latent = vae.encode(padded).mode()
        assert latent.shape[1:] == vae.geometry.latent_shape(frames, h, w)
        recon = vae.decode(latent)
        assert recon.shape == padded.shape
        assert crop_frames(recon, frames).shape == x.shape


@pytest.mark.parametrize("name", NAMES)
def test_the_geometry_follows_from_the_settings_alone(name: str) -> None:
    assert config_of(name).geometry == GEOMETRY[name]


def test_latent_frames_that_come_in_pairs_pad_a_clip_to_whole_pairs() -> None:
    pairs = Geometry(temporal=4, group=2)
    assert [pairs.padded_frames(t) for t in (1, 2, 5, 9, 10, 16)] == [1, 9, 9, 9, 17, 17]
    assert [pairs.latent_frames(t) for t in (1, 2, 9, 10, 17)] == [1, 3, 3, 5, 5]


@torch.no_grad()
@pytest.mark.parametrize("groups", [0, 2])
def test_a_pass_is_that_of_diffusers_to_the_bit(vae: DiffusersVAE, groups: int, tmp_path: Path) -> None:
    theirs, x = theirs_of(vae, tmp_path), clip_for(vae, groups=groups)
    posterior, their_posterior = vae.encode(x), theirs.encode(x).latent_dist
    assert torch.equal(posterior.mode(), their_posterior.mode())
    if not vae.certain:
        assert torch.equal(posterior.logvar, their_posterior.logvar)
    z = posterior.mode()
    arguments = (z, torch.zeros(1)) if vae.conditioned else (z,)
    recon, their_recon = vae.decode(z), theirs.decode(*arguments).sample
    if vae.wan:
        recon = recon.clamp(min=-1.0, max=1.0)
    assert torch.equal(recon, their_recon)


@torch.no_grad()
def test_pixels_are_not_clamped(vae: DiffusersVAE) -> None:
    z = 30 * noise_for(vae, clip_for(vae, groups=1))
    assert vae.decode(z).abs().max() > 1.0


def test_gradients_reach_every_parameter_and_recomputing_does_not_change_them(vae: DiffusersVAE) -> None:
    x = clip_for(vae, groups=1)
    noise = noise_for(vae, x)

    def loss() -> Tensor:
        recon, posterior = vae(x, noise)
        return recon.square().mean() + 1e-3 * posterior.kl().sum()

    kept = gradients(vae, loss)
    vae.set_recompute(on=True)
    recomputed = gradients(vae, loss)
    vae.set_recompute(on=False)
    for name, grad in kept.items():
        again = recomputed[name]
        assert grad is not None, name
        assert again is not None, name
        assert torch.equal(grad, again), name
        assert torch.isfinite(grad).all(), name
    # The time that LTX-0.9.5's decoder is told is 0, so what multiplies it has no pull.
    still = {name for name, grad in kept.items() if grad is not None and not grad.any()}
    assert still <= {"net.decoder.timestep_scale_multiplier"}


@torch.no_grad()
def test_a_clip_depends_neither_on_the_one_before_nor_on_its_neighbour(vae: DiffusersVAE) -> None:
    x, y = clip_for(vae, groups=2), clip_for(vae, groups=2, base=1)
    alone = vae(x, None)[0]
    vae(y, None)
    with pytest.raises(RuntimeError):
        vae.encode(x[:, :2])  # a pass that ends in its middle
    assert torch.equal(vae(x, None)[0], alone)
    # In float64, as kernels add in another order for a larger batch; Wan upsamples in fp32 even so.
    exact, x, y = copy.deepcopy(vae).double(), x.double(), y.double()
    both = exact(torch.cat([x, y]), None)[0]
    torch.testing.assert_close(both[:1], exact(x, None)[0], rtol=0, atol=1e-6 if vae.wan else 1e-10)


def test_the_last_layer_makes_the_pixels(vae: DiffusersVAE) -> None:
    weight = vae.last_layer.get_parameter("weight")
    z = noise_for(vae, clip_for(vae, groups=0))
    with torch.no_grad():
        before = vae.decode(z)
        bias = vae.last_layer.get_parameter("bias").detach()
        kept, kept_bias = weight.clone(), bias.clone()
        weight.zero_()
        bias.zero_()
        blank = vae.decode(z)
        weight.copy_(kept)
        bias.copy_(kept_bias)
    assert before.any()
    assert not blank.any()


def test_an_encoder_that_is_certain_has_no_divergence_and_its_sample_is_the_latent() -> None:
    vae = moved("cosmos")
    x = clip_for(vae, groups=1)
    posterior = vae.encode(x)
    assert torch.equal(posterior.sample(noise_for(vae, x)), posterior.mean)
    assert not posterior.kl().any()
    assert posterior.kl().shape == (1,)


def test_weights_are_a_function_of_config_and_seed_and_no_generator_is_touched() -> None:
    state = torch.get_rng_state()
    one, same, other = (build_diffusers(config_of("wan-2.1"), seed=seed) for seed in (3, 3, 4))
    assert torch.equal(state, torch.get_rng_state())
    weights = [torch.cat([p.flatten() for p in each.parameters()]) for each in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_setting_that_diffusers_does_not_know_is_told_of() -> None:
    assert ignored_settings(config_of("wan-2.2")) == ("clip_output",)
    assert ignored_settings(config_of("wan-2.1")) == ()


def test_a_stream_is_refused_with_the_reason() -> None:
    vae = moved("wan-2.1")
    assert not vae.streamable
    with pytest.raises(ConfigError, match=vae.why_not_streamable):
        vae.encode(clip_for(vae, groups=0), Stream())


@pytest.mark.parametrize("name", ["wan-2.1", "cogvideox", "hunyuan"])
def test_autocast_computes_in_fewer_bits_and_keeps_weights_and_posterior_in_fp32(name: str) -> None:
    vae = moved(name)
    x = clip_for(vae, groups=1)
    exact = vae(x, None)[0]
    vae.arithmetic = torch.bfloat16
    recon, posterior = vae(x, None)
    recon.float().square().mean().backward()
    assert recon.dtype == torch.bfloat16
    assert posterior.mean.dtype == torch.float32
    assert {p.dtype for p in vae.parameters()} == {torch.float32}
    assert all(p.grad is not None and p.grad.isfinite().all() for p in vae.parameters())
    # bf16 has 8 bits; norms over few values make more of an error: up to 10 % was measured.
    assert torch.linalg.vector_norm(recon - exact) < 0.2 * torch.linalg.vector_norm(exact)


def state_of(vae: DiffusersVAE) -> TrainState:
    critic = build_critic("patchgan3d", base=5, norm="group", ndf=8)
    logvar = nn.Parameter(torch.zeros(()))
    return TrainState(
        vae=vae,
        ema={name: p.detach().clone() for name, p in vae.named_parameters()},
        critic=critic,
        logvar=logvar,
        optimizer=build_optimizer([*vae.named_parameters(), ("logvar", logvar)], kind="adamw", lr=1e-4),
        critic_optimizer=build_optimizer(critic.named_parameters(), kind="adamw", lr=1e-4),
    )


def step(state: TrainState, x: Tensor, *, parts: int = 1) -> StepResult:
    noise = rng.normal((len(x), *state.vae.geometry.latent_shape(*x.shape[2:])), 12)
    return train_step(state, x, noise, loss=LOSS, critic_loss="hinge", parts=parts, ema_decay=0.9)


def batch_of(*, clips: int = 1) -> Tensor:
    """b 3 8 32 32: frames that have to be padded, and enough pixels for the critic."""
    return 0.5 * rng.normal((clips, 3, 8, 32, 32), 11)


@pytest.mark.parametrize("name", NAMES)
def test_a_training_goes_on_bitwise_from_what_it_saved(name: str, tmp_path: Path) -> None:
    state = state_of(moved(name))
    x = batch_of()
    for _ in range(2):
        assert step(state, x).applied
    state.save(tmp_path)
    other = state_of(moved(name, seed=2))
    other.load(tmp_path)
    assert other.step == 2
    for each in (state, other):
        assert step(each, x).applied
    ours, theirs = state.vae.state_dict(), other.vae.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert all(torch.equal(state.ema[key], other.ema[key]) for key in state.ema)
    assert state.ema.keys() == ours.keys()  # an average alone is a whole model


@pytest.mark.parametrize("name", ["wan-2.1", "cogvideox"])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_a_batch_in_parts_gives_the_update_of_the_whole(name: str, recompute: bool) -> None:  # noqa: FBT001
    x = batch_of(clips=2)
    norms: list[float] = []
    for parts in (1, 2):
        vae = moved(name)
        vae.set_recompute(on=recompute)
        result = step(state_of(vae), x, parts=parts)
        assert result.grad_norm is not None
        norms.append(result.grad_norm)
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)  # fp32 sums in another order


@pytest.mark.parametrize("name", ["wan-2.2", "ltx-0.9.5", "cosmos"])
def test_a_step_can_be_made_without_memory_to_predict_what_it_takes(name: str) -> None:
    vae = moved(name)
    with LiveBytes() as live:
        twin = blueprint(vae, None)
        x = torch.empty(2, 3, 8, 32, 32, device="meta")
        noise = torch.empty(2, *vae.geometry.latent_shape(8, 32, 32), device="meta")
        train_step(twin, x, noise, loss=LOSS, critic_loss=None)
    assert live.peak > 4 * sum(p.numel() for p in vae.parameters())


def test_without_the_extra_the_message_names_it() -> None:
    code = (
        "import sys; sys.modules['diffusers'] = None\n"
        "from causalvae.errors import ConfigError\n"
        "from causalvae.models.diffusers import diffusers_config\n"
        "try: diffusers_config('AutoencoderKLWan', {})\n"
        "except ConfigError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'causalvae[diffusers]'" in done.stdout
