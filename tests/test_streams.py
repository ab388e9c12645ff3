"""Laws of streams: any plan of pieces gives what the whole clip gives, in constant memory, nothing twice."""

import dataclasses
import math
from functools import cache

import pytest
import torch
from foreign import moved
from hypothesis import given, settings
from hypothesis import strategies as st
from test_models import SMALL, clip, trained
from test_wfvae import CHUNKED
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from causalvae.coders import Coder, CodingPlan, decoder, encoder
from causalvae.errors import ConfigError
from causalvae.models.base import Posterior
from causalvae.models.build import Model, build
from causalvae.models.meta import LiveBytes, on_meta
from causalvae.models.presets import CausalVAEConfig, ModelConfig
from causalvae.video import crop_frames, pad_frames

# Every kind of network that streams: norms per position and per frame, and all ways to change the resolution.
FAMILIES: dict[str, ModelConfig] = {
    **SMALL,
    **CHUNKED,
    "mix": CausalVAEConfig(hidden_size=8, hidden_size_mult=(1, 2, 1, 1), num_res_blocks=1, norm="channel"),
    "wfvae-alone": dataclasses.replace(CHUNKED["wfvae"], attention=False),
}
NAMES = sorted(FAMILIES)
WHOLE = CodingPlan(chunk=8)
plans = st.lists(st.integers(1, 7), min_size=1, max_size=5)


@cache
def family(name: str) -> Model:
    return trained(FAMILIES[name])


def joined(pieces: list[Tensor | None]) -> Tensor:
    return torch.cat([piece for piece in pieces if piece is not None], dim=2)


def moments(posterior: Posterior) -> Tensor:
    return torch.cat([posterior.mean, posterior.logvar], dim=1)


def encoded(coder: Coder[Posterior], x: Tensor, plan: list[int] | int) -> Tensor:
    """Mean and log variance of a clip that is pushed in pieces."""
    made = [coder.push(piece) for piece in x.split(plan, dim=2)] + [coder.close()]
    return joined([moments(each) for each in made if each is not None])


def decoded(coder: Coder[Tensor], z: Tensor, plan: list[int] | int) -> Tensor:
    return joined([coder.push(piece) for piece in z.split(plan, dim=2)] + [coder.close()])


def latent(vae: Model, *, frames: int, size: tuple[int, int]) -> Tensor:
    """b c k h w, float64."""
    return clip(frames=frames, size=size).repeat(1, 6, 1, 1, 1)[:, : vae.geometry.channels]


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


@settings(max_examples=5, deadline=None)
@given(frame_plan=plans, latent_plan=plans, chunk=st.sampled_from([4, 8, 16]))
@pytest.mark.parametrize("name", NAMES)
def test_any_plan_of_pieces_gives_the_full_pass(
    name: str, frame_plan: list[int], latent_plan: list[int], chunk: int
) -> None:
    vae, plan = family(name), CodingPlan(chunk=chunk)
    x = clip(frames=sum(frame_plan), size=(16, 16))
    z = latent(vae, frames=sum(latent_plan), size=(2, 3))
    with torch.no_grad():
        whole, frames = vae.encode(pad_frames(x, vae.geometry)), vae.decode(z)
    torch.testing.assert_close(encoded(encoder(vae, plan), x, frame_plan), moments(whole), rtol=0, atol=1e-10)
    torch.testing.assert_close(decoded(decoder(vae, plan), z, latent_plan), frames, rtol=0, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_a_stream_in_fp32_is_within_1e_6_of_the_full_pass_or_of_what_fp32_loses(name: str) -> None:
    exact = family(name)
    vae = trained(FAMILIES[name]).float()
    x = clip(frames=11, size=(32, 40)).float()
    whole, truth = (
        moments(each.encode(pad_frames(x.to(kind), vae.geometry)))
        for each, kind in ((vae, torch.float32), (exact, torch.float64))
    )
    allowed = max(1e-6 * rms(truth), rms(whole - truth))  # GroupNorm loses up to 2e-6
    assert rms(encoded(encoder(vae, WHOLE), x, [3, 1, 7]) - whole) <= allowed
    z = latent(vae, frames=4, size=(4, 5))
    whole, truth = vae.decode(z.float()), exact.decode(z)
    allowed = max(1e-6 * rms(truth), rms(whole - truth))
    assert rms(decoded(decoder(vae, WHOLE), z.float(), [1, 2, 1]) - whole) <= allowed


@torch.no_grad()
@pytest.mark.parametrize("name", ["shuffle", "mix", "wfvae"])
def test_every_number_of_frames_is_filled_with_its_last_and_cropped_again(name: str) -> None:
    vae = family(name)
    for frames in range(1, 21):
        x = clip(frames=frames, size=(8, 8))
        recon, _ = vae(pad_frames(x, vae.geometry), None)
        stream = vae.stream()
        found = [stream.encode(piece) for piece in x.split(3, dim=2)] + [stream.finish_encoding()]
        means = [each.mean for each in found if each is not None]
        made = joined([*(stream.decode(mean) for mean in means), stream.finish_decoding()])
        assert made.shape == recon.shape
        torch.testing.assert_close(crop_frames(made, frames), crop_frames(recon, frames), rtol=0, atol=1e-10)


def test_a_picture_is_a_stream_of_one_frame() -> None:
    vae = family("shuffle")
    x = clip(frames=1)
    stream = vae.stream()
    posterior = stream.encode(x)
    assert posterior is not None
    assert stream.finish_encoding() is None
    assert stream.decode(posterior.mean) is None  # held back: only now it is known to be the last
    frame = stream.finish_decoding()
    with torch.no_grad():
        torch.testing.assert_close(frame, vae(x, None)[0], rtol=0, atol=1e-12)


def test_nothing_in_is_nothing_out() -> None:
    stream = family("shuffle").stream()
    assert stream.finish_encoding() is None
    assert stream.finish_decoding() is None


def test_a_stream_takes_nothing_after_its_end_and_directions_end_apart() -> None:
    vae = family("shuffle")
    stream = vae.stream()
    stream.encode(clip(frames=2))
    stream.finish_encoding()
    with pytest.raises(ConfigError, match="this stream was closed"):
        stream.encode(clip(frames=1))
    stream.decode(latent(vae, frames=1, size=(2, 2)))  # still open


def test_a_model_that_cannot_stream_says_why() -> None:
    clip_norm = build(dataclasses.replace(FAMILIES["conv"], norm="clip"))
    with pytest.raises(ConfigError, match="can't stream: its GroupNorm takes statistics over all frames"):
        clip_norm.stream()
    with pytest.raises(ConfigError, match="can't stream: diffusers' code takes a clip as a whole"):
        moved("wan-2.1").stream()


@pytest.mark.parametrize("name", NAMES)
def test_memory_does_not_grow_with_the_number_of_frames(name: str) -> None:
    vae = on_meta(family(name))

    def peak(pushes: int) -> int:
        with LiveBytes() as live, torch.device("meta"):
            there, back = encoder(vae, WHOLE), decoder(vae, WHOLE)
            for _ in range(pushes):
                there.push(torch.empty(1, 3, 8, 16, 16))
                back.push(torch.empty(1, vae.geometry.channels, 2, 2, 2))
        return live.peak

    assert peak(4) == peak(12)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_a_stream_does_no_work_twice(name: str) -> None:
    vae = on_meta(family(name))
    with torch.device("meta"), FlopCounterMode(display=False) as whole:
        vae.encode(torch.empty(1, 3, 33, 16, 16))
        vae.decode(torch.empty(1, vae.geometry.channels, 9, 2, 2))
    with torch.device("meta"), FlopCounterMode(display=False) as streamed:
        there, back = encoder(vae, WHOLE), decoder(vae, WHOLE)
        for _ in range(11):
            there.push(torch.empty(1, 3, 3, 16, 16))
        for _ in range(3):
            back.push(torch.empty(1, vae.geometry.channels, 3, 2, 2))
        there.close()
        back.close()
    assert math.isclose(streamed.get_total_flops(), whole.get_total_flops(), rel_tol=0.01)
