"""Laws of windows: what models that can't stream give where windows agree, and how disagreement is told."""

import dataclasses

import pytest
import torch
from foreign import moved
from hypothesis import given, settings
from hypothesis import strategies as st
from test_models import SMALL, clip, trained
from test_streams import decoded, encoded, latent, moments
from test_tiles import Pooling
from torch import Tensor

from causalvae.coders import decoder, encoder
from causalvae.coding import plan_coding
from causalvae.models.build import Model
from causalvae.tiles import Disagreement
from causalvae.video import crop_frames, pad_frames
from causalvae.windows import Windows


def windows(codec: Pooling, *, encodes: bool, latents: int, overlap: int, group: int) -> Windows[Tensor]:
    return Windows(
        run=(lambda x: codec.encode(x).mean) if encodes else codec.decode,
        wrap=lambda x: x,
        each_in=4 if encodes else 1,
        each_out=1 if encodes else 4,
        judged=3,
        latents=latents,
        overlap=overlap,
        group=group,
    )


def passed(coder: Windows[Tensor], x: Tensor, plan: list[int]) -> Tensor:
    made = [coder.push(piece) for piece in x.split(plan, dim=2)] + [coder.close()]
    return torch.cat([each for each in made if each is not None], dim=2)


@given(
    plan=st.lists(st.integers(1, 30), min_size=1, max_size=5),
    latents=st.integers(2, 5),
    overlap=st.integers(1, 3),
    group=st.integers(1, 2),
)
@settings(max_examples=40, deadline=None)
def test_windows_change_nothing_where_they_agree(
    plan: list[int], latents: int, overlap: int, group: int
) -> None:
    sizes = {"latents": 1 + group * latents, "overlap": 1 + group * min(overlap, latents - 1), "group": group}
    codec, x = Pooling(), clip(frames=sum(plan), size=(8, 8))
    geometry = dataclasses.replace(codec.geometry, group=group)
    coder = windows(codec, encodes=True, **sizes)
    z = passed(coder, x, plan)
    torch.testing.assert_close(z, codec.encode(pad_frames(x, geometry)).mean, rtol=0, atol=1e-12)
    back = windows(codec, encodes=False, **sizes)
    z = clip(frames=sum(plan), size=(1, 1))
    torch.testing.assert_close(passed(back, z, plan), codec.decode(z), rtol=0, atol=1e-12)
    found = back.tally.result(unit="latent")
    assert found is None or found.largest < 1e-12


def test_disagreement_of_windows_is_told_and_the_start_of_a_window_has_no_weight() -> None:
    coder = windows(Pooling(jitter=0.5), encodes=False, latents=3, overlap=2, group=1)
    x = passed(coder, torch.full((1, 3, 4, 1, 1), 0.25), [4])  # two windows, of latents 0...2 and 1...3
    expected = [0.25] * 5 + [0.25 + 0.5 * i / 5 for i in range(1, 5)] + [0.75] * 4
    torch.testing.assert_close(x[0, 0, :, 0, 0], torch.tensor(expected))
    assert coder.tally.result(unit="8-bit levels") == Disagreement(mean=63.75, largest=63.75, share=2.0)


@torch.no_grad()
@pytest.mark.parametrize("name", ["clip norm", "cogvideox", "ltx-0.9.0", "wan-2.1"])
def test_what_fits_into_one_window_is_the_full_pass_and_longer_clips_have_seams(name: str) -> None:
    config = dataclasses.replace(SMALL["conv"], norm="clip")
    vae: Model = trained(config).float() if name == "clip norm" else moved(name)
    geometry = vae.geometry
    size = (2 * geometry.spatial, 2 * geometry.spatial)
    plan = plan_coding(vae, height=size[0], width=size[1], tile="off", budget=None, chunk=1)  # the smallest
    assert plan.window is not None
    assert not plan.exact
    for frames in (plan.window - 1, plan.window + 2):
        x = clip(frames=frames, size=size).float()
        there, back = encoder(vae, plan), decoder(vae, plan)
        found = encoded(there, x, 3)
        assert found.shape[2] == geometry.latent_frames(frames)
        recon = decoded(back, found[:, : geometry.channels], 2)
        assert recon.shape[2] == geometry.padded_frames(frames)
        if frames < plan.window:
            whole = vae.encode(pad_frames(x, geometry))
            torch.testing.assert_close(found, moments(whole), rtol=0, atol=1e-5)
            full = vae.decode(whole.mean)
            torch.testing.assert_close(crop_frames(recon, frames), full[:, :, :frames], rtol=0, atol=1e-4)
        seams = [there.seams, back.seams]
        assert [each is None for each in seams] == [frames < plan.window] * 2


def test_an_even_number_of_latent_frames_is_cropped_where_a_model_takes_groups() -> None:
    vae = moved("cogvideox")
    plan = plan_coding(vae, height=8, width=8, tile="off", budget=None, chunk=1)
    z = latent(vae, frames=8, size=(2, 2)).float()
    assert decoded(decoder(vae, plan), z, 3).shape[2] == 1 + 4 * 7
