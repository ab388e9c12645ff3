"""Laws of plans: they fit the memory that they may take, say what they cost, and what is not exact."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from foreign import moved
from test_streams import FAMILIES

from causalvae.coders import CodingPlan, decoder, encoder
from causalvae.coding import REST, TILES, coding_bytes, plan_coding
from causalvae.errors import ConfigError
from causalvae.models.build import Model, build, skeleton
from causalvae.models.meta import LiveBytes, cpu_scratch, on_meta
from causalvae.models.presets import PRESETS, TINY

MIB, GIB = 2**20, 2**30
FULL_HD, FOUR_K = (1080, 1920), (2160, 3840)
BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "stream.py"


def plan_of(vae: Model, size: tuple[int, int], *, budget: int | None) -> CodingPlan:
    return plan_coding(vae, height=size[0], width=size[1], tile="auto", budget=budget)


def test_without_a_limit_frames_stay_whole() -> None:
    plan = plan_of(skeleton(TINY), FOUR_K, budget=None)
    assert plan == CodingPlan(chunk=32)
    assert plan.exact
    assert plan.facts() == {"exact": True, "chunk": 32, "notes": []}


@pytest.mark.parametrize("preset", ["tiny", "causalvae-488", "osp-v1.2"])
def test_a_plan_fits_its_budget_or_says_that_none_does(preset: str) -> None:
    vae = skeleton(PRESETS[preset])
    for budget in (100 * MIB, 4 * GIB, 64 * GIB):
        plan = plan_of(vae, (480, 832), budget=budget)
        fits = plan.num_bytes is not None and plan.num_bytes <= budget
        assert fits == (not any("even in the smallest pieces" in note for note in plan.notes))
        assert plan.exact or any("blended" in note for note in plan.notes)
        json.dumps(plan.facts())


@pytest.mark.parametrize(("size", "budget"), [(FULL_HD, 3 * GIB // 2), (FOUR_K, 5 * GIB)])
def test_large_frames_are_exact_on_a_small_machine(size: tuple[int, int], budget: int) -> None:
    plan = plan_of(skeleton(TINY), size, budget=budget)
    assert plan.exact
    assert plan.tile is not None
    assert plan.extra_work is not None
    assert 0 < plan.extra_work < 0.3
    assert plan.notes == ()


def test_more_memory_never_takes_smaller_tiles() -> None:
    vae = skeleton(TINY)
    tiles = [plan_of(vae, FULL_HD, budget=budget).tile for budget in (GIB, 2 * GIB, 5 * GIB)]
    assert tiles[-1] is None
    areas = [FULL_HD[0] * FULL_HD[1] if tile is None else tile[0] * tile[1] for tile in tiles]
    assert areas == sorted(areas)


def test_what_a_stream_remembers_may_be_more_than_there_is() -> None:
    plan = plan_of(skeleton(PRESETS["swift-488"]), FULL_HD, budget=4 * GIB)
    assert not plan.exact
    assert plan.window == 17
    assert len(plan.notes) == 1
    assert plan.notes[0].startswith("streaming 1080x1920 takes 5.")
    assert "may take 4.0 GiB: videos of more than 17 frames are cut in windows" in plan.notes[0]


def test_notes_say_what_is_not_exact_and_why() -> None:
    clip_norm = skeleton(dataclasses.replace(FAMILIES["conv"], norm="clip"))
    plan = plan_coding(clip_norm, height=64, width=64, tile=(32, 32), budget=None)
    can_not, blended, attention, work = plan.notes
    assert can_not.startswith("this model can't stream: its GroupNorm takes statistics over all frames")
    assert "videos of more than 33 frames are cut in windows that share 9 frames and are blended" in can_not
    assert blended.startswith("tiles of this model are blended, as its GroupNorm takes statistics")
    assert attention == "its attention sees one tile at a time, not the frame"
    assert work == "tiles of 32x32 add 125 % of work"  # nine tiles of a quarter of the frame

    attends = skeleton(FAMILIES["mix"])
    plan = plan_coding(attends, height=512, width=512, tile=(256, 256), budget=None)
    assert plan.exact
    assert plan.notes == (
        "its attention sees whole frames at the size of the latent: that part is not tiled",
    )

    plan = plan_coding(moved("mochi"), height=64, width=64, tile="off", budget=None)
    assert plan.notes[0].startswith("this model can't stream: diffusers' code takes a clip as a whole")


def test_a_tile_as_large_as_the_frame_is_the_frame() -> None:
    vae = skeleton(TINY)
    assert plan_coding(vae, height=64, width=96, tile=(128, 96), budget=None).tile is None
    assert plan_coding(vae, height=64, width=96, tile=(128, 48), budget=None).tile == (64, 48)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"height": 65}, "frames of 65x64: this model takes multiples of 8"),
        ({"height": 0}, "frames of 0x64: this model takes multiples of 8"),
        ({"tile": (24, 64)}, "tiles of 24x64: height and width must be multiples of 8, and at least 32"),
        ({"tile": (64, 70)}, "tiles of 64x70: height and width must be multiples of 8"),
        ({"chunk": 0}, "a chunk of 0 frames: at least one is needed"),
    ],
)
def test_sizes_that_cannot_be_are_refused(asked: dict[str, int], message: str) -> None:
    wanted = {"height": 64, "width": 64, "tile": "auto", "budget": None, "chunk": None, **asked}
    with pytest.raises(ConfigError, match=message):
        plan_coding(skeleton(TINY), **wanted)


def test_chunks_are_whole_latent_frames_and_windows_longer_than_what_they_share() -> None:
    chunks = [plan_coding(skeleton(TINY), height=64, width=64, tile="off", budget=None, chunk=n).chunk
              for n in (1, 4, 5, 17)]  # fmt: skip
    assert chunks == [4, 4, 8, 20]
    windows = [plan_coding(moved("cogvideox"), height=64, width=64, tile="off", budget=None, chunk=n)
               for n in (1, 17, 24, 33)]  # fmt: skip
    assert [(each.window, each.shared) for each in windows] == [(17, 9), (17, 9), (17, 9), (33, 9)]


@pytest.mark.parametrize("name", ["shuffle", "mix", "wfvae", "conv"])
def test_one_tile_of_each_kind_predicts_the_memory_of_all(name: str) -> None:
    vae = on_meta(build(FAMILIES[name]))
    size = (128, 192)
    plan = plan_coding(vae, height=size[0], width=size[1], tile=(64, 64), budget=None, chunk=4)
    peaks = []
    for coder_of, shape in ((encoder, (3, 4, *size)), (decoder, (vae.geometry.channels, 1, 16, 24))):
        with LiveBytes(cpu_scratch) as live, torch.device("meta"):
            live.hold(*vae.parameters(), *vae.buffers())
            weights, coder = live.bytes, coder_of(vae, plan)
            for _ in range(3):
                coder.push(torch.empty(1, *shape))
        peaks.append(live.peak - weights)
    assert coding_bytes(vae, plan, size=size) - REST == pytest.approx(max(peaks), rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("tile", [0, 96])
def test_predicted_memory_is_within_a_quarter_of_what_a_process_takes(tile: int) -> None:
    case = {"model": "tiny", "how": "stream", "frames": 16, "height": 192, "width": 192, "tile": tile}
    command = [sys.executable, str(BENCHMARK), "--threads", "1", "--case", json.dumps(case)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    vae = on_meta(build(TINY))
    wish = (tile, tile) if tile else "off"
    plan = plan_coding(vae, height=192, width=192, tile=wish, budget=None, chunk=8)
    predicted = coding_bytes(vae, plan, size=(192, 192))
    assert predicted == pytest.approx(json.loads(done.stdout)["bytes"], rel=0.25)


def test_attention_is_predicted_without_a_matrix_of_scores() -> None:
    vae = on_meta(build(FAMILIES["wfvae"]))
    plan = plan_coding(vae, height=1024, width=1024, tile="off", budget=None, chunk=4)
    assert coding_bytes(vae, plan, size=(1024, 1024)) < 4 * (128 * 128) ** 2  # bytes of the scores of a frame


def test_tiles_that_are_tried_are_multiples_of_every_spatial_factor_in_use() -> None:
    assert all(edge % 32 == 0 for edge in TILES)
