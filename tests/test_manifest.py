"""Which clips an evaluation measures: the rule, and the manifest that gives them again or an error."""

import json
import shutil
import tarfile
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from media import BUNDLED, in_order, write_film

from causalvae.data.decode import Decoder
from causalvae.data.transforms import resize_crop
from causalvae.errors import ConfigError, VideoError
from causalvae.evalset import ClipRule, ClipSet, check_clips, choose_clips, read_manifest, read_pixels
from causalvae.files import sha256

RULE = ClipRule(frames=5, size=(32, 32), stride=2, per_video=3)


def manifest_of(chosen: ClipSet, folder: Path) -> Path:
    path = folder / "manifest.json"
    path.write_text(json.dumps(chosen.content()))
    return path


@given(
    num_frames=st.integers(0, 500),
    frames=st.integers(1, 33),
    stride=st.integers(1, 4),
    per_video=st.integers(1, 9),
)
def test_clips_of_a_video_are_spread_over_it_and_never_overlap(
    num_frames: int, frames: int, stride: int, per_video: int
) -> None:
    rule = ClipRule(frames=frames, size=(8, 8), stride=stride, per_video=per_video)
    starts = rule.starts(num_frames)
    assert len(starts) == min(per_video, num_frames // rule.span)
    assert all(b - a >= rule.span for a, b in pairwise(starts))
    if starts:
        assert starts[0] == 0
        assert starts[-1] == (num_frames - rule.span if len(starts) > 1 else 0)


def test_the_rule_gives_these_clips_of_these_films(tmp_path: Path) -> None:
    write_film(tmp_path / "b.mp4", frames=40)
    write_film(tmp_path / "a.mp4", frames=20)
    write_film(tmp_path / "short.mp4", frames=8)
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    chosen = choose_clips(str(tmp_path), RULE)
    ids = [clip.id for clip in chosen.clips]
    assert ids == ["a.mp4#0", "a.mp4#11", "b.mp4#0", "b.mp4#15", "b.mp4#31"]
    assert [each["video"] for each in chosen.unreadable] == ["broken.mp4", "short.mp4"]
    assert chosen.unreadable[1]["reason"] == "short.mp4: has 8 frames, and a clip reaches over 9"
    film = in_order(tmp_path / "b.mp4")
    wanted = resize_crop(film[15:24:2], size=(32, 32))
    assert torch.equal(read_pixels(chosen.clips[3], RULE, decoder=Decoder()), wanted)


def test_a_manifest_says_what_was_measured_and_finds_it_in_another_folder(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there" / "deeper"
    (here / "below").mkdir(parents=True)
    write_film(here / "below" / "a.mp4", frames=30)
    chosen = choose_clips(str(here), RULE)
    path = manifest_of(chosen, tmp_path)
    entry = json.loads(path.read_text())["clips"][1]
    assert entry["video"] == "below/a.mp4"
    assert entry["video_sha256"] == sha256(here / "below/a.mp4")
    assert (entry["start"], entry["end"], entry["num_frames"]) == (10, 18, 30)
    assert (entry["height"], entry["width"]) == (48, 64)
    assert read_manifest(path) == chosen
    shutil.copytree(here, there)
    shutil.rmtree(here)
    with pytest.raises(ConfigError, match="no such file or folder"):
        read_manifest(path)
    moved = read_manifest(path, video_path=str(there))
    assert moved.digest == chosen.digest
    assert [*check_clips(moved)] == ["below/a.mp4"]


def test_a_changed_or_missing_video_is_an_error_and_never_a_substitute(tmp_path: Path) -> None:
    films = tmp_path / "films"
    films.mkdir()
    for name in ("a.mp4", "b.mp4"):
        write_film(films / name, frames=30)
    path = manifest_of(choose_clips(str(films), RULE), tmp_path)
    chosen = read_manifest(path)
    whole = (films / "b.mp4").read_bytes()
    (films / "b.mp4").write_bytes(whole + b"\0")
    with pytest.raises(ConfigError, match=r"b\.mp4: the manifest was made with another file of this name"):
        list(check_clips(chosen))
    write_film(films / "b.mp4", frames=31)
    with pytest.raises(VideoError, match=r"b\.mp4: has 31 frames, and had 30"):
        read_pixels(chosen.clips[-1], RULE, decoder=Decoder())
    (films / "b.mp4").unlink()
    with pytest.raises(ConfigError, match=r"b\.mp4: .*needs it"):
        list(check_clips(chosen))
    with pytest.raises(ConfigError, match=r"b\.mp4: the manifest names it, and it is not in .*1 of 2 videos"):
        read_manifest(path)


def test_a_video_in_a_tar_file_has_the_checksum_of_its_own_bytes(tmp_path: Path) -> None:
    film = BUNDLED / "city_spire.mp4"
    with tarfile.open(tmp_path / "shard.tar", "w") as shard:
        shard.add(film, "x/city.mp4")
    chosen = choose_clips(str(tmp_path / "shard.tar"), RULE)
    assert {clip.video_sha256 for clip in chosen.clips} == {sha256(film)}
    assert {clip.video.id for clip in chosen.clips} == {"shard.tar/x/city.mp4"}


def test_a_video_that_a_list_names_twice_counts_once(tmp_path: Path) -> None:
    write_film(tmp_path / "a.mp4", frames=9)
    (tmp_path / "list.txt").write_text("a.mp4\na.mp4\n")
    assert [clip.id for clip in choose_clips(str(tmp_path / "list.txt"), RULE).clips] == ["a.mp4#0"]


def test_the_digest_follows_what_was_measured_and_not_where(tmp_path: Path) -> None:
    write_film(tmp_path / "a.mp4", frames=30)
    one = choose_clips(str(tmp_path), RULE)
    fewer = choose_clips(str(tmp_path), ClipRule(frames=5, size=(32, 32), stride=2, per_video=2))
    larger = choose_clips(str(tmp_path), ClipRule(frames=5, size=(32, 40), stride=2, per_video=3))
    assert len({one.digest, fewer.digest, larger.digest}) == 3
    content = one.content() | {"place": "elsewhere"}
    assert "elsewhere" not in one.content().values()
    assert content["clips"] == one.content()["clips"]


@pytest.mark.parametrize(("text", "said"), [
    ("[]", "not a manifest.json"),
    ("{", "not JSON"),
    ('{"format": "causalvae manifest 1"}', "damaged"),
    ('{"format": "causalvae manifest 1", "place": "sample:", "settings": {"frames": 5, "resolution": "8x8", '
     '"sample_rate": 1, "clips_per_video": 1}, "clips": [], "unreadable": []}', "names no clip"),
])  # fmt: skip
def test_what_is_no_manifest_is_told_so(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "manifest.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said):
        read_manifest(path)


def test_a_folder_without_a_usable_video_is_an_error_with_reasons(tmp_path: Path) -> None:
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    with pytest.raises(ConfigError, match=r"no clip can be taken: .*broken\.mp4"):
        choose_clips(str(tmp_path), RULE)
