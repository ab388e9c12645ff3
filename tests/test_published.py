"""Published models: names, outputs, and that they train as ours do."""

import dataclasses
from functools import cache

import pytest
import torch
from fixtures import FIXTURES, fixture_tensors
from test_fused import activations, assert_same, filled
from torch import Tensor, nn

from causalvae import rng
from causalvae.errors import ConfigError
from causalvae.losses import LossPlan, build_critic
from causalvae.machine import Capability
from causalvae.models.build import Model, build, shapes, skeleton
from causalvae.models.interpolation import doubled, pull_widened, widened
from causalvae.models.presets import (
    PARAMETERS,
    PRESETS,
    V1_0,
    CausalVAEConfig,
    OwnConfig,
    WFVAEConfig,
    check,
    config_from_dict,
)
from causalvae.models.resampling import CausalDownsample, CausalUpsample, FrameUpsample, TimePool
from causalvae.train.networks import lay_out
from causalvae.train.optim import build_optimizer
from causalvae.train.precision import Precision, lower
from causalvae.train.predict import blueprint, step_bytes
from causalvae.train.state import TrainState
from causalvae.train.step import train_step

CASES = ["t1", "t5", "t9", "t17", "t17_32x48"]
LISTS = {
    "osp-v1.0": "osp_v1.0",
    "osp-v1.1": "osp_v1.1",
    "osp-v1.2": "osp_v1.2",
    "wfvae-4": "wfvae_4",
    "wfvae-8": "wfvae_8",
    "wfvae-16": "wfvae_16_L",
}
FEW = {"hidden_size": 32, "hidden_size_mult": (1, 2, 1, 1), "num_res_blocks": 1}
CLASS_LEVELS = dataclasses.replace(V1_0, temporal_levels=(1, 2), temporal_ups=None)
# The models of the fixtures.
SMALL: dict[str, OwnConfig] = {
    "osp_v1.0": dataclasses.replace(V1_0, **FEW),
    "osp_v1.1": CausalVAEConfig(norm="clip", **FEW),
    "osp_v1.2": CausalVAEConfig(norm="clip", temporal="joint", **FEW),
    "wfvae": WFVAEConfig(
        base_channels=16,
        z_channels=8,
        encoder_energy=8,
        decoder_energy=8,
        encoder_res_blocks=1,
        decoder_res_blocks=1,
    ),
}


@cache
def published(name: str) -> Model:
    vae = build(SMALL[name])
    vae.load_state_dict(fixture_tensors(f"{name}/weights"), strict=True)
    return vae.requires_grad_(False)


@pytest.mark.parametrize("name", sorted(LISTS))
def test_a_full_size_model_has_the_names_and_shapes_of_the_published_file(name: str) -> None:
    lines = (FIXTURES / "keys" / f"{LISTS[name]}.txt").read_text().splitlines()
    rows = [line.split() for line in lines if not line.startswith("#")]
    assert shapes(PRESETS[name]) == {row[0]: tuple(map(int, row[1].split("x"))) for row in rows}


def test_every_preset_has_as_many_parameters_as_the_list_says_and_can_be_made() -> None:
    counted = {name: sum(p.numel() for p in skeleton(c).parameters()) for name, c in PRESETS.items()}
    assert counted == PARAMETERS
    for config in PRESETS.values():
        check(config)


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", sorted(SMALL))
def test_a_published_model_gives_its_published_outputs(name: str, case: str) -> None:
    vae, io = published(name), fixture_tensors(f"{name}/io")
    posterior = vae.encode(io[f"{case}.x"])
    recon = vae.decode(io[f"{case}.mean"])
    # fp32 on the CPU: the fixture promises 1e-4; 1e-5 was measured, outputs reach 3
    for ours, theirs in ((posterior.mean, "mean"), (posterior.logvar, "logvar"), (recon, "recon")):
        torch.testing.assert_close(ours, io[f"{case}.{theirs}"], rtol=0, atol=3e-5)


@torch.no_grad()
def test_both_kinds_of_v1_0_have_the_same_names_and_other_latents() -> None:
    config = dataclasses.replace(CLASS_LEVELS, **FEW)
    other = build(config)
    other.load_state_dict(fixture_tensors("osp_v1.0/weights"), strict=True)
    x = fixture_tensors("osp_v1.0/io")["t9.x"]
    one, two = published("osp_v1.0").encode(x).mean, other.encode(x).mean
    assert one.shape == two.shape
    assert not torch.allclose(one, two, atol=1e-2)
    assert other.decode(two).shape == x.shape


@torch.no_grad()
def test_the_attention_of_v1_0_is_that_of_the_others_on_one_frame_and_mixes_more() -> None:
    mixing = build(SMALL["osp_v1.0"])
    plain = build(dataclasses.replace(mixing.config, mixing_attention=False))
    for vae in (mixing, plain):
        vae.load_state_dict(published("osp_v1.0").state_dict())
    x = fixture_tensors("osp_v1.0/io")["t9.x"]
    one, two = (vae.encode(x[:, :, :1]).mean for vae in (mixing, plain))
    torch.testing.assert_close(one, two, rtol=0, atol=1e-5)
    assert not torch.allclose(mixing.encode(x).mean, plain.encode(x).mean, atol=1e-2)


@pytest.mark.parametrize("name", ["osp-v1.0", "osp-v1.1", "osp-v1.2"])
def test_a_model_that_looks_across_time_says_why_it_does_not_stream(name: str) -> None:
    vae = skeleton(PRESETS[name])
    assert not vae.streamable
    assert "GroupNorm" in vae.why_not_streamable
    assert "attention" in CausalVAEConfig(mixing_attention=True).why_not_streamable


def test_interpolation_in_space_is_that_of_torch_and_its_gradient_too() -> None:
    for x in (activations(4, 3), activations(4, 3).contiguous()):
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        y = nn.functional.interpolate(leaf, scale_factor=(1, 2, 2), mode="trilinear")
        torch.testing.assert_close(widened(x), y, rtol=0, atol=1e-14)
        grad = rng.normal(y.shape, 3).double()
        pulled = torch.autograd.grad(y, leaf, grad)[0]
        torch.testing.assert_close(pull_widened(grad), pulled, rtol=0, atol=1e-13)
    known = activations(4, 6)
    y = nn.functional.interpolate(known[:, :, 1:], scale_factor=(2, 2, 2), mode="trilinear")
    torch.testing.assert_close(widened(doubled(known))[:, :, 1:], y, rtol=0, atol=1e-14)


@pytest.mark.parametrize("frames", [1, 3, 5])
@pytest.mark.parametrize(
    "module", [CausalDownsample(8, temporal=False), CausalDownsample(8, temporal=True), CausalUpsample(8)]
)
def test_a_resampler_equals_its_plain_order_of_work(module: nn.Module, frames: int) -> None:
    assert_same(filled(module), activations(8, frames).requires_grad_())


def test_nearest_upsampling_with_a_convolution_of_frames_is_that_of_torch() -> None:
    module, x = filled(FrameUpsample(8)), activations(8)
    near = x.repeat_interleave(2, dim=3).repeat_interleave(2, dim=4)
    assert isinstance(module, FrameUpsample)
    torch.testing.assert_close(module(x), module.conv(near), rtol=0, atol=1e-12)


def test_pooling_takes_means_of_three_frames_and_the_first_one_as_it_is() -> None:
    x = torch.tensor([6.0, 0.0, 3.0, 12.0, 9.0]).view(1, 1, 5, 1, 1)
    assert TimePool()(x).flatten().tolist() == [6.0, 3.0, 8.0]


def training(name: str, *, recompute: bool = False) -> TrainState:
    """A training whose every branch has a gradient: the weights are those of the fixture."""
    vae = build(SMALL[name])
    vae.load_state_dict(published(name).state_dict())
    lay_out(vae)
    vae.set_recompute(on=recompute)
    critic = build_critic("patchgan3d", base=5, ndf=8)
    optimizers = [build_optimizer(net.named_parameters(), kind="adamw", lr=1e-3) for net in (vae, critic)]
    logvar = nn.Parameter(torch.zeros(()), requires_grad=False)
    return TrainState(vae, {}, critic, logvar, optimizers[0], optimizers[1])


def step(state: TrainState, *, parts: int = 1) -> None:
    clip = 0.5 * rng.normal((2, 3, 8, 16, 16), 11)
    noise = rng.normal((2, *state.vae.geometry.latent_shape(8, 16, 16)), 12)
    done = train_step(state, clip, noise, loss=LossPlan(), critic_loss="hinge", parts=parts)
    assert done.applied


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(SMALL))
def test_a_training_that_recomputes_gives_the_same_bits_and_moves_every_weight(name: str) -> None:
    weights: list[dict[str, Tensor]] = []
    for recompute in (False, True):
        state = training(name, recompute=recompute)
        step(state, parts=2)
        weights.append(state.vae.state_dict())
    before = published(name).state_dict()
    learned = {n for n, _ in published(name).named_parameters()}
    for key, tensor in before.items():
        assert torch.equal(weights[0][key], weights[1][key]), key
        assert torch.equal(weights[0][key], tensor) == (key not in learned), key


@pytest.mark.parametrize("name", sorted(SMALL))
def test_a_published_model_computes_in_bf16_with_norms_in_fp32(name: str) -> None:
    exact = published(name)
    vae = build(SMALL[name])
    vae.load_state_dict(exact.state_dict())
    lower(vae, Precision.of("bf16", "O2", device="cpu", capability=Capability()))
    x = fixture_tensors(f"{name}/io")["t1.x"]
    recon, posterior = vae(x, None)
    recon.float().sum().backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in vae.parameters() if p.grad is not None)
    wanted, _ = exact(x, None)
    assert posterior.mean.dtype == torch.float32
    # bf16 has 8 bits and the networks some forty convolutions: 0.015 (wfvae) to 0.084 (v1.0) was measured
    assert (recon.float() - wanted).norm() < 0.15 * wanted.norm()


@pytest.mark.parametrize("name", ["osp-v1.2", "wfvae-8"])
def test_memory_of_a_step_is_predicted_and_less_with_recomputation(name: str) -> None:
    vae = skeleton(PRESETS[name])
    plain, lean = (
        step_bytes(blueprint(vae, None), shape=(1, 3, 17, 256, 256), recompute=on) for on in (False, True)
    )
    assert lean.at_rest == plain.at_rest > 16 * PARAMETERS[name]  # weights, averages, two moments
    assert lean.peak - lean.at_rest < 0.8 * (plain.peak - plain.at_rest)


@torch.no_grad()
@pytest.mark.parametrize("name", sorted(SMALL))
def test_seeded_weights_are_a_function_of_the_seed_and_keep_the_size_of_a_clip(name: str) -> None:
    vae, again, other = (build(SMALL[name], seed=seed) for seed in (3, 3, 4))
    first, second, third = (each.state_dict() for each in (vae, again, other))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(not torch.equal(first[key], third[key]) for key in first)
    x = fixture_tensors("wfvae/io")["t5.x"]
    recon, posterior = vae(x, None)
    assert recon.shape == x.shape
    assert 0.05 < float(posterior.mean.std()) < 5
    assert 0.05 < float(recon.std()) < 5


@pytest.mark.parametrize("config", [*PRESETS.values(), CLASS_LEVELS])
def test_a_config_comes_back_from_its_fields(config: OwnConfig) -> None:
    assert config_from_dict(type(config).__name__, dataclasses.asdict(config)) == config


def test_fields_that_older_files_lack_have_the_values_they_had() -> None:
    old = {
        "hidden_size": 128, "hidden_size_mult": [1, 2, 4, 4], "num_res_blocks": 2, "z_channels": 4,
        "spatial_levels": [0, 1, 2], "temporal_levels": [1, 2], "norm": "frame", "resampling": "conv",
        "stem": 1, "attention": True,
    }  # fmt: skip
    assert config_from_dict("CausalVAEConfig", old) == PRESETS["causalvae-488"]


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        ("AutoencoderKL", {}, "no kind of model"),
        ("CausalVAEConfig", {"width": 3}, "no field 'width'"),
        ("CausalVAEConfig", {"hidden_size": 10**9}, "hidden_size 1000000000"),
        ("CausalVAEConfig", {"hidden_size": -32}, "hidden_size -32"),
        ("CausalVAEConfig", {"hidden_size": 48}, "multiples of 32"),
        ("CausalVAEConfig", {"hidden_size": 32.0}, "can't be 32.0"),
        ("CausalVAEConfig", {"hidden_size": True}, "can't be True"),
        ("CausalVAEConfig", {"norm": "batch"}, "can't be 'batch'"),
        ("CausalVAEConfig", {"norm": ["clip"]}, "can't be"),
        ("CausalVAEConfig", {"attention": None}, "can't be None"),
        ("CausalVAEConfig", {"hidden_size_mult": [1] * 40}, "40 levels"),
        ("CausalVAEConfig", {"hidden_size_mult": [1, 2, 10**9]}, "channels"),
        ("CausalVAEConfig", {"hidden_size_mult": [1, "2"]}, "can't be"),
        ("CausalVAEConfig", {"spatial_levels": [0, 7]}, "between two levels"),
        ("CausalVAEConfig", {"temporal_ups": [1]}, "counterpart"),
        ("CausalVAEConfig", {"temporal": "joint", "spatial_levels": [0]}, "levels of space"),
        ("CausalVAEConfig", {"embed_dim": 8, "quant": False}, "embed_dim"),
        ("WFVAEConfig", {"encoder_res_blocks": 10**6}, "encoder_res_blocks 1000000"),
        ("WFVAEConfig", {"base_channels": 0}, "base_channels 0"),
    ],
)
def test_a_config_of_no_network_is_refused(kind: str, values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_from_dict(kind, values)


@torch.no_grad()
def test_latents_can_have_other_channels_than_the_encoder_and_no_quant_layers() -> None:
    x = fixture_tensors("wfvae/io")["t5.x"]
    plain = CausalVAEConfig(norm="clip", temporal="joint", **FEW)
    for config in (dataclasses.replace(plain, embed_dim=6), dataclasses.replace(plain, quant=False)):
        vae = build(config)
        recon, posterior = vae(x, None)
        assert posterior.mean.shape[1] == vae.geometry.channels == (config.embed_dim or 4)
        assert recon.shape == x.shape
        assert ("quant_conv.conv.weight" in vae.state_dict()) == config.quant
