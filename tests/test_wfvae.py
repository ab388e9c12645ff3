"""WF-VAE: wavelets, their bands, and that it streams."""

import math

import pytest
import torch
from fixtures import fixture_tensors
from test_models import clip, trained
from test_published import SMALL, published
from torch import Tensor

from causalvae import rng
from causalvae.models.build import Model, build
from causalvae.models.presets import CausalVAEConfig, ModelConfig, WFVAEConfig
from causalvae.models.stream import DecodeStream, EncodeStream
from causalvae.models.wavelet import BANDS_2D, BANDS_3D, SIZE_2D, SIZE_3D, Haar, InverseHaar
from causalvae.models.wfvae import WFVAE

TINY = WFVAEConfig(
    base_channels=8,
    z_channels=3,
    encoder_energy=4,
    decoder_energy=6,
    encoder_res_blocks=1,
    decoder_res_blocks=1,
)
# What the published layers make with norms that look at one position: our own models could be these.
CHUNKED: dict[str, ModelConfig] = {
    "wfvae": TINY,
    "pool": CausalVAEConfig(
        hidden_size=8,
        hidden_size_mult=(1, 1, 1, 1),
        num_res_blocks=1,
        norm="channel",
        temporal="pool",
        temporal_levels=(0, 1),
        temporal_ups=(2, 3),
        attention=False,
        flat_levels=0,
        flat_conv_in=False,
        flat_downsample=False,
    ),
    "joint": CausalVAEConfig(
        hidden_size=8, hidden_size_mult=(1, 1, 1, 1), num_res_blocks=1, temporal="joint", norm="channel"
    ),
}


def wfvae() -> WFVAE:
    vae = published("wfvae")
    assert isinstance(vae, WFVAE)
    return vae


@torch.no_grad()
def test_the_bands_that_flow_past_are_the_published_ones() -> None:
    io = fixture_tensors("wfvae/io")
    _, ours = wfvae().encode_bands(io["t17.x"])
    _, theirs = wfvae().decode_bands(io["t17.mean"])
    for bands, side in ((ours, "enc"), (theirs, "dec")):
        torch.testing.assert_close(bands.level1, io[f"t17.{side}_l1"], rtol=0, atol=3e-5)
        torch.testing.assert_close(bands.level2, io[f"t17.{side}_l2"], rtol=0, atol=3e-5)


def test_the_bands_take_a_gradient_to_every_weight_that_they_come_from() -> None:
    vae = build(SMALL["wfvae"])
    assert isinstance(vae, WFVAE)
    vae.load_state_dict(published("wfvae").state_dict())
    posterior, theirs = vae.encode_bands(fixture_tensors("wfvae/io")["t5.x"])
    _, ours = vae.decode_bands(posterior.mode())
    (ours.level1 - theirs.level1).abs().sum().add((ours.level2 - theirs.level2).abs().sum()).backward()
    moved = {name for name, p in vae.named_parameters() if p.grad is not None and bool(p.grad.any())}
    last = ("decoder.up1.", "decoder.layer.", "decoder.norm_out.", "decoder.conv_out.")
    assert moved == {name for name, _ in vae.named_parameters() if not name.startswith(last)}


@pytest.mark.parametrize("frames", [True, False])
def test_new_filters_are_those_of_the_published_file(*, frames: bool) -> None:
    stored, places = fixture_tensors("wfvae/weights"), ("in", "l2") if frames else ("l1",)
    for place in places:
        for name, tensor in Haar(frames=frames).state_dict().items():
            assert torch.equal(tensor, stored[f"encoder.wavelet_transform_{place}.{name}"])
    for place in ("out", "l2") if frames else ("l1",):
        for name, tensor in InverseHaar(frames=frames).state_dict().items():
            assert torch.equal(tensor, stored[f"decoder.inverse_wavelet_transform_{place}.{name}"])


def test_bands_have_the_signs_worked_out_by_hand() -> None:
    x = torch.zeros(1, 1, 3, 2, 2)
    x[0, 0, 2, 1, 0] = 1.0  # a single light: second frame of the second block, low row, left column
    bands = Haar(frames=True)(x)
    assert bands.shape == (1, 8, 2, 1, 1)
    assert not bool(bands[:, :, 0].any())
    signs = [(-1) ** (high[0] + high[1]) for high in BANDS_3D.values()]
    assert bands[0, :, 1].flatten().tolist() == pytest.approx([SIZE_3D * sign for sign in signs])
    flat = Haar(frames=False)(x[:, :, 2:])
    signs = [(-1) ** high[0] for high in BANDS_2D.values()]
    assert flat.flatten().tolist() == pytest.approx([SIZE_2D * sign for sign in signs])


@pytest.mark.parametrize(("frames", "gain"), [(True, 8 * SIZE_3D**2), (False, 1.0)])
def test_a_clip_comes_back_from_its_bands_times_the_published_gain(*, frames: bool, gain: float) -> None:
    x = rng.normal((2, 3, 5, 8, 6), 4).double()
    apart, together = Haar(frames=frames).double(), InverseHaar(frames=frames).double()
    for filters in (apart, together):
        filters.reset()
    torch.testing.assert_close(together(apart(x)), gain * x, rtol=0, atol=1e-12)
    assert apart(x).shape == ((2, 24, 3, 4, 3) if frames else (2, 12, 5, 4, 3))


def streamed(
    vae: Model, x: Tensor, z: Tensor, *, plans: tuple[list[int], list[int]]
) -> tuple[Tensor, Tensor]:
    """Mean and reconstruction, chunk by chunk."""
    up, down = EncodeStream(vae), DecodeStream(vae)
    latents = [up.push(piece) for piece in x.split(plans[0], dim=2)] + [up.close()]
    frames = [down.push(piece) for piece in z.split(plans[1], dim=2)] + [down.close()]
    mean = torch.cat([posterior.mean for posterior in latents if posterior is not None], dim=2)
    return mean, torch.cat([piece for piece in frames if piece is not None], dim=2)


def test_streaming_in_fp32_is_the_full_pass_up_to_rounding() -> None:
    io = fixture_tensors("wfvae/io")
    chunks = streamed(wfvae(), io["t17.x"], io["t17.mean"], plans=([1, 4, 4, 4, 4], [1, 2, 2]))
    with torch.no_grad():
        whole = wfvae().encode(io["t17.x"]).mean, wfvae().decode(io["t17.mean"])
    for piece, full, theirs in zip(chunks, whole, ("mean_chunked", "recon_chunked"), strict=True):
        torch.testing.assert_close(piece, full, rtol=0, atol=1e-5)  # 2e-6 was measured, outputs reach 3
        torch.testing.assert_close(piece, io[f"t17.{theirs}"], rtol=0, atol=1e-5)


@torch.no_grad()
def test_no_later_frame_changes_an_earlier_latent() -> None:
    vae, x = trained(TINY), clip(frames=13)
    before = vae.encode(x).mean
    for changed in (1, 4, 5, 12):
        y = x.clone()
        y[:, :, changed:] += 1.0
        first = math.ceil(changed / 4)  # the latent frame that covers the first changed frame
        after = vae.encode(y).mean
        assert torch.equal(before[:, :, :first], after[:, :, :first])
        assert not torch.equal(before[:, :, first], after[:, :, first])


@torch.no_grad()
def test_without_attention_the_middle_has_two_blocks_and_streams_alike() -> None:
    vae = build(WFVAEConfig(base_channels=8, attention=False, connect_res_blocks=2))
    assert "encoder.mid.1.conv1.conv.weight" in vae.state_dict()
    x = clip(frames=9).float()
    assert vae(x, None)[0].shape == x.shape
