"""Batches of several shapes, and of images among videos: which batch has which shape, and the same clips."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from media import write_film

from causalvae.data.clips import ClipPlan
from causalvae.data.loader import ClipLoader, Clips
from causalvae.data.sources import open_source
from causalvae.errors import ConfigError

SIZES = ((24, 32), (40, 16))
PLAN = ClipPlan(frames=5, size=(24, 32), batch=2, seed=7)
BUCKETS = replace(PLAN, frame_buckets=(1, 9, 17), size_buckets=SIZES)
EVERYTHING = replace(BUCKETS, image_ratio=0.3)
RATIOS = st.integers(0, 999).map(lambda thousandths: thousandths / 1000)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two images, two films of 12 frames and two of 20 or more."""
    folder = tmp_path_factory.mktemp("mixed")
    write_film(folder / "image0.png", codec="png", pixels="rgb24", frames=1)
    write_film(folder / "image1.png", codec="png", pixels="rgb24", frames=1, size=(80, 40))
    write_film(folder / "middle0.mp4", frames=12)
    write_film(folder / "middle1.avi", codec="mpeg4", frames=12, options={"bf": "2"})
    write_film(folder / "long0.mp4", frames=20, options={"g": "6"})
    write_film(folder / "long1.webm", codec="libvpx", frames=24)
    return folder


def take(folder: Path, plan: ClipPlan, *, batches: int, **settings: Any) -> list[Clips]:
    """Batches of a loader; nothing in the folder is bad."""
    records: list[dict[str, Any]] = []
    with ClipLoader(open_source(str(folder)), plan, on_quarantine=records.append, **settings) as loader:
        taken = [next(loader) for _ in range(batches)]
    assert records == []
    return taken


def shape_of(plan: ClipPlan, cursor: int) -> tuple[int, tuple[int, int]]:
    at = plan.at(cursor)
    return at.frames, at.size


def kinds(batches: Sequence[Clips], prefix: str) -> set[int]:
    """Lengths of the clips that were cut from the films whose name begins so."""
    return {
        clips.pixels.shape[2]
        for clips in batches
        for request in clips.requests
        if request.video.id.startswith(prefix)
    }


def test_a_plan_without_buckets_is_its_own_at_every_cursor() -> None:
    assert PLAN.at(0) is PLAN
    assert PLAN.at(10**12) is PLAN
    assert PLAN.shapes() == [(5, (24, 32))]


def test_the_plan_of_one_batch_differs_from_the_whole_in_nothing_but_the_shape() -> None:
    at = EVERYTHING.at(11)
    again = replace(
        at, frames=5, size=(24, 32), frame_buckets=(1, 9, 17), size_buckets=SIZES, image_ratio=0.3
    )
    assert again == EVERYTHING
    assert at.at(12) is at


@pytest.mark.parametrize(
    "plan", [BUCKETS, replace(BUCKETS, frame_buckets=()), replace(PLAN, image_ratio=0.5)]
)
def test_the_shapes_of_a_plan_are_those_that_its_batches_have(plan: ClipPlan) -> None:
    shapes = plan.shapes()
    assert len(set(shapes)) == len(shapes)
    assert {shape_of(plan, cursor) for cursor in range(60)} == set(shapes)


def test_every_round_of_batches_takes_every_shape_once_in_an_order_of_its_own() -> None:
    rounds = [tuple(shape_of(BUCKETS, 6 * turn + i) for i in range(6)) for turn in range(20)]
    assert all(sorted(each) == sorted(BUCKETS.shapes()) for each in rounds)
    assert len(set(rounds)) > 15
    other = replace(BUCKETS, seed=8)
    assert [shape_of(other, cursor) for cursor in range(120)] != [each for turn in rounds for each in turn]


def test_a_shape_that_is_listed_twice_has_two_shares() -> None:
    plan = replace(PLAN, frame_buckets=(9, 17, 17))
    assert Counter(shape_of(plan, cursor)[0] for cursor in range(300)) == {9: 100, 17: 200}


@given(ratio=RATIOS, seed=st.integers(0, 2**64), first=st.integers(0, 10**12), batches=st.integers(1, 300))
def test_in_any_stretch_the_batches_of_images_are_the_share_asked_for(
    ratio: float, seed: int, first: int, batches: int
) -> None:
    plan = replace(PLAN, image_ratio=ratio, seed=seed)
    images = sum(plan.at(first + i).frames == 1 for i in range(batches))
    assert abs(images - batches * Fraction(str(ratio))) < 1


def test_a_share_of_a_fifth_is_every_fifth_batch_and_the_seed_says_which() -> None:
    begins = set()
    for seed in range(40):
        plan = replace(PLAN, image_ratio=0.2, seed=seed)
        images = [cursor for cursor in range(500) if plan.at(cursor).frames == 1]
        assert images == list(range(images[0], 500, 5))
        begins.add(images[0])
    assert begins == {0, 1, 2, 3, 4}


def test_batches_of_images_and_of_videos_have_their_sizes_in_equal_shares() -> None:
    plan = replace(PLAN, frame_buckets=(9, 17), size_buckets=SIZES, image_ratio=0.2)
    counted = Counter(shape_of(plan, cursor) for cursor in range(1000))
    assert counted == {
        **{(1, size): 100 for size in SIZES},
        **{(frames, size): 200 for size in SIZES for frames in (9, 17)},
    }


@pytest.mark.parametrize("workers", [0, 2])
def test_every_batch_has_the_one_shape_of_its_cursor(workers: int, folder: Path) -> None:
    for clips in take(folder, EVERYTHING, batches=20, workers=workers):
        frames, size = shape_of(EVERYTHING, clips.cursor)
        assert clips.pixels.shape == (2, 3, frames, *size)
        assert len(clips.requests) == 2


def test_workers_do_not_change_clips_of_several_shapes(folder: Path) -> None:
    plain, shared = (take(folder, EVERYTHING, batches=30, workers=workers) for workers in (0, 2))
    for one, other in zip(plain, shared, strict=True):
        assert one.requests == other.requests
        assert torch.equal(one.pixels, other.pixels)


@pytest.mark.parametrize("first", range(1, 9))
def test_any_cursor_goes_on_with_the_shapes_of_the_stream_from_its_start(first: int, folder: Path) -> None:
    whole = take(folder, EVERYTHING, batches=10)
    for one, other in zip(
        take(folder, EVERYTHING, batches=10 - first, cursor=first), whole[first:], strict=True
    ):
        assert (one.cursor, one.requests) == (other.cursor, other.requests)
        assert torch.equal(one.pixels, other.pixels)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_film_is_used_in_the_batches_that_it_is_long_enough_for(workers: int, folder: Path) -> None:
    batches = take(folder, replace(BUCKETS, image_ratio=0.2), batches=60, workers=workers)
    assert kinds(batches, "image") == {1}
    assert kinds(batches, "middle") == {1, 9}
    assert kinds(batches, "long") == {1, 9, 17}


def test_an_epoch_of_image_batches_takes_one_frame_of_every_film_and_image(folder: Path) -> None:
    batches = take(folder, replace(PLAN, frame_buckets=(1,)), batches=3)
    assert sorted(request.video.id for clips in batches for request in clips.requests) == sorted(
        path.name for path in folder.iterdir()
    )
    frames = {
        request.start
        for clips in take(folder, replace(PLAN, frames=1), batches=20)
        for request in clips.requests
    }
    assert len(frames) > 8  # from anywhere in a film


def test_where_there_are_only_images_a_batch_of_videos_repeats_them_or_says_so(tmp_path: Path) -> None:
    write_film(tmp_path / "image.png", codec="png", pixels="rgb24", frames=1)
    plan = replace(PLAN, image_ratio=0.5)
    for clips in take(tmp_path, plan, batches=4):
        assert torch.equal(clips.pixels, clips.pixels[:, :, :1].expand_as(clips.pixels))
    with pytest.raises(ConfigError, match=r"can be used for clips of 5 frames.*image.png has 1 frames"):
        take(tmp_path, replace(plan, short_videos="skip"), batches=2)
