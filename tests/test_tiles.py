"""Laws of tiles: exact ones give what the whole frame gives, blended ones mix what their neighbours say."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_models import clip, trained
from test_streams import FAMILIES, decoded, encoded, family, latent, moments, rms
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from causalvae.coders import CodingPlan, decoder, encoder
from causalvae.geometry import Geometry, cuts, overlapping_cuts
from causalvae.models.base import Posterior
from causalvae.models.build import Model
from causalvae.models.causalvae import CausalVAE
from causalvae.models.meta import on_meta
from causalvae.models.stages import Spread, Stage, Window
from causalvae.models.stream import Stream
from causalvae.models.wfvae import WFVAE
from causalvae.tiles import BlendedTiles, Disagreement, ExactTiles
from causalvae.video import pad_frames

EXACT = sorted(name for name in FAMILIES if not family(name).why_tiles_blend)


def own(name: str) -> CausalVAE | WFVAE:
    vae = family(name)
    assert isinstance(vae, CausalVAE | WFVAE)
    return vae


@settings(max_examples=3, deadline=None)
@given(
    height=st.integers(4, 7),
    width=st.integers(4, 7),
    tile=st.tuples(st.integers(4, 6), st.integers(4, 6)),
    pieces=st.lists(st.integers(1, 5), min_size=1, max_size=3),
)
@pytest.mark.parametrize("name", EXACT)
def test_exact_tiles_in_a_stream_give_the_full_pass(
    name: str, height: int, width: int, tile: tuple[int, int], pieces: list[int]
) -> None:
    vae, plan = own(name), CodingPlan(chunk=4, tile=(8 * tile[0], 8 * tile[1]))
    x = clip(frames=sum(pieces), size=(8 * height, 8 * width))
    z = latent(vae, frames=sum(pieces), size=(height, width))
    with torch.no_grad():
        whole, frames = vae.encode(pad_frames(x, vae.geometry)), vae.decode(z)
    torch.testing.assert_close(encoded(encoder(vae, plan), x, pieces), moments(whole), rtol=0, atol=1e-10)
    torch.testing.assert_close(decoded(decoder(vae, plan), z, pieces), frames, rtol=0, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("name", EXACT)
def test_exact_tiles_of_a_clip_in_fp32_are_within_1e_6_or_what_fp32_loses(name: str) -> None:
    vae, exact = trained(FAMILIES[name]).float(), family(name)
    assert isinstance(vae, CausalVAE | WFVAE)
    tiles = ExactTiles(vae, tile=(32, 48))
    x, z = clip(frames=5, size=(72, 88)).float(), latent(vae, frames=2, size=(9, 11)).float()
    for found, whole, truth in (
        (moments(tiles.encode(x)), moments(vae.encode(x)), moments(exact.encode(x.double()))),
        (tiles.decode(z), vae.decode(z), exact.decode(z.double())),
    ):
        assert rms(found - whole) <= max(1e-6 * rms(truth), rms(whole - truth))


def stages(name: str) -> list[tuple[Stage, tuple[Tensor, ...]]]:
    """Every stage of a model, with what reaches it for a clip of one frame, 256 rows high."""
    vae = own(name)
    found = []
    for parts, start in (
        (vae.encode_stages(), clip(frames=1, size=(256, 8))),
        (vae.decode_stages(), latent(vae, frames=1, size=(32, 1))),
    ):
        tensors: tuple[Tensor, ...] = (start,)
        for part in parts:
            found.append((part, tensors))
            tensors = part.run(tensors, None)
    return found


def reaches(stage: Stage, tensors: tuple[Tensor, ...], rows: range, of: slice) -> bool:
    """Whether these rows of the input have a part in those of the output: what is no number stays none."""
    broken = tuple(each.clone() for each in tensors)
    for each in broken:
        each[..., rows.start : rows.stop, :] = float("nan")
    return any(bool(each[..., of, :].isnan().any()) for each in stage.run(broken, None))


@torch.no_grad()
@pytest.mark.parametrize("name", EXACT)
def test_a_stage_sees_as_far_as_it_says_and_no_further(name: str) -> None:
    local = [each for each in stages(name) if each[0].local]
    assert len(local) >= 4  # stages of both ways, without the ones with attention
    for stage, tensors in local:
        height = stage.run(tensors, None)[0].shape[3]
        start, stop = height // 2, height // 2 + 2
        first, last = stage.needs(start, stop)
        assert 0 < first < last < tensors[0].shape[3]
        of = slice(start, stop)
        assert not reaches(stage, tensors, range(first), of)
        assert not reaches(stage, tensors, range(last, tensors[0].shape[3]), of)
        assert reaches(stage, tensors, range(first, first + stage.down), of)
        assert reaches(stage, tensors, range(last - stage.down, last), of)


def test_what_layers_see_is_worked_out_by_hand() -> None:
    assert Window(3, 1, 1).needs(4, 6) == (3, 7)
    assert Window(3, 2, 0).needs(4, 6) == (8, 13)  # zeros at the right only
    assert Window(2, 2).needs(4, 6) == (8, 12)
    assert Spread(2).needs(5, 7) == (2, 4)
    assert Spread(2, interpolates=True).needs(4, 5) == (1, 3)  # 0.25 of position 1, 0.75 of 2
    assert Spread(2, interpolates=True).needs(5, 6) == (2, 4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["shuffle", "mix", "wfvae-alone"])
def test_extra_work_is_what_the_tiles_do(name: str) -> None:
    vae = on_meta(own(name))
    tiles = ExactTiles(vae, tile=(48, 64))
    counts = []
    for each in (vae, tiles):
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            each.encode(torch.empty(1, 3, 5, 120, 200))
            each.decode(torch.empty(1, vae.geometry.channels, 2, 15, 25))
        counts.append(counter.get_total_flops())
    assert tiles.times((120, 200)) == pytest.approx(counts[1] / counts[0], rel=0.02)


class Pooling:
    """A codec that looks at nothing but 8 x 8 pixels of every fourth frame, so that tiles agree exactly.

    jitter: what the second call and later ones add to what they decode.
    """

    geometry = Geometry(temporal=4, spatial=8, channels=3)

    def __init__(self, jitter: float = 0.0) -> None:
        self.jitter, self.calls = jitter, 0

    def encode(self, x: Tensor, stream: Stream | None = None) -> Posterior:
        cells = x[:, :, ::4].unflatten(4, (-1, 8)).unflatten(3, (-1, 8))
        mean = cells.mean(dim=(4, 6))
        return Posterior(mean, torch.zeros_like(mean))

    def decode(self, z: Tensor, stream: Stream | None = None) -> Tensor:
        self.calls += 1
        frames = torch.cat([z[:, :, :1], z[:, :, 1:].repeat_interleave(4, dim=2)], dim=2)
        pixels = frames.repeat_interleave(8, dim=3).repeat_interleave(8, dim=4)
        return pixels + (self.jitter if self.calls > 1 else 0.0)


@given(height=st.integers(1, 12), width=st.integers(1, 12), tile=st.integers(4, 7), over=st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_blending_changes_nothing_where_neighbours_agree(
    height: int, width: int, tile: int, over: int
) -> None:
    codec = Pooling()
    tiles = BlendedTiles(codec, (8 * tile, 8 * tile), (8 * over, 8 * over))
    x = clip(frames=5, size=(8 * height, 8 * width))
    torch.testing.assert_close(moments(tiles.encode(x)), moments(codec.encode(x)), rtol=0, atol=1e-12)
    z = codec.encode(x).mean
    torch.testing.assert_close(tiles.decode(z), codec.decode(z), rtol=0, atol=1e-12)
    found = tiles.tally.result(unit="latent")
    assert (found is None) == (max(height, width) <= tile)
    assert found is None or found.largest < 1e-12


def test_disagreement_is_in_8_bit_levels_and_the_blend_goes_from_one_tile_to_the_other() -> None:
    codec = Pooling(jitter=0.5)
    tiles = BlendedTiles(codec, (32, 32), (16, 16))
    z = torch.full((1, 3, 1, 4, 6), 0.25)
    row = tiles.decode(z)[0, 0, 0, 0]  # two tiles: columns 0...31 and 16...47
    assert row[:16].tolist() == [0.25] * 16
    torch.testing.assert_close(row[32:], torch.full((16,), 0.75))
    assert bool((row.diff()[16:31] > 0).all())
    found = tiles.tally.result(unit="8-bit levels")
    assert found == Disagreement(mean=0.5 * 127.5, largest=0.5 * 127.5, share=2.0)


@torch.no_grad()
def test_a_model_with_norms_per_frame_is_blended_and_streams_in_its_tiles() -> None:
    vae = family("conv")
    plan = CodingPlan(chunk=4, tile=(32, 32), overlap=(16, 16))
    x = clip(frames=6, size=(40, 56))
    whole = BlendedTiles(vae, (32, 32), (16, 16)).encode(pad_frames(x, vae.geometry))
    coder = encoder(vae, plan)
    torch.testing.assert_close(encoded(coder, x, 1), moments(whole), rtol=0, atol=1e-10)
    assert coder.seams is not None
    assert coder.seams.time is None
    facts: dict[str, Any] = coder.seams.facts()
    assert facts["unit"] == "latent"
    assert 0 < facts["space"]["mean"] < facts["space"]["largest"]


@given(length=st.integers(1, 80), most=st.integers(1, 12), multiple=st.integers(1, 4))
def test_cuts_cover_a_length_once(length: int, most: int, multiple: int) -> None:
    pieces = cuts(length, most * multiple, multiple=multiple)
    assert [i for start, stop in pieces for i in range(start, stop)] == list(range(length))
    assert all(start % multiple == 0 and stop - start <= most * multiple for start, stop in pieces)


@given(length=st.integers(1, 80), most=st.integers(2, 12), over=st.integers(1, 11))
def test_overlapping_cuts_share_what_was_asked_and_are_equal(length: int, most: int, over: int) -> None:
    over = min(over, most - 1)
    pieces = overlapping_cuts(length, most, overlap=over)
    assert (pieces[0][0], pieces[-1][1]) == (0, length)
    assert {stop - start for start, stop in pieces} <= {min(length, size) for size in range(1, most + 1)}
    assert len({stop - start for start, stop in pieces}) == 1
    assert all(a[1] - b[0] >= over for a, b in pairwise(pieces))


def test_models_say_whether_tiles_are_exact() -> None:
    assert sorted(set(FAMILIES) - {"conv"}) == EXACT
    vae: Model = family("conv")
    assert vae.why_tiles_blend.startswith("its GroupNorm takes statistics over a whole frame")
