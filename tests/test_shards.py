"""Videos in tar files are read where they lie, and are the videos that were put in."""

import io
import os
import tarfile
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from media import BUNDLED, truncated, write_film

from causalvae.data.captions import caption_record
from causalvae.data.clips import ClipPlan
from causalvae.data.decode import Decoder, probe, read_frames
from causalvae.data.loader import ClipLoader
from causalvae.data.sources import VideoRef, open_source
from causalvae.errors import ConfigError, VideoError


def pack(shard: Path, files: Iterable[Path], *, form: int = tarfile.PAX_FORMAT, mode: str = "w") -> Path:
    """A tar file of these, by their names."""
    shard.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(shard, mode, format=form) as archive:  # type: ignore[call-overload]
        for file in files:
            archive.add(file, file.name)
    return shard


def references(pattern: str | Path) -> list[VideoRef]:
    source = open_source(str(pattern))
    return [source[i] for i in range(len(source))]


def ids(pattern: str | Path) -> list[str]:
    return [video.id for video in references(pattern)]


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Films of every kind that is found by a seek, pictures, and what is no video."""
    folder = tmp_path_factory.mktemp("films")
    label = folder / "0.json"
    label.write_text('{"caption": "a bar"}')
    return [
        label,
        write_film(folder / "0.mp4", options={"g": "6"}),
        write_film(folder / "1.avi", codec="mpeg4", options={"g": "6", "bf": "2"}),
        write_film(folder / "2.webm", codec="libvpx"),
        write_film(folder / "3.png", codec="png", pixels="rgb24", frames=1),
        write_film(folder / "4.jpg", codec="mjpeg", pixels="yuvj420p", frames=1),
        write_film(folder / "5.tiff", codec="tiff", pixels="rgb24", frames=1),
        write_film(folder / "6.bmp", codec="bmp", pixels="bgr24", frames=1),
        BUNDLED / "city_towers.avi",
    ]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_frames_from_a_tar_file_are_those_of_the_files_in_it(
    form: int, films: list[Path], tmp_path: Path
) -> None:
    shard = pack(tmp_path / os.fsdecode(b"a,b :\xff{1}.tar"), films, form=form)
    videos = references(shard)
    assert [Path(video.id).name for video in videos] == [film.name for film in films[1:]]
    decoder = Decoder()
    for video, film in zip(videos, films[1:], strict=True):
        info, expected = probe(video.path), probe(film)
        assert (info.frames, info.height, info.width) == (expected.frames, expected.height, expected.width)
        numbers = sorted({0, info.frames // 2, info.frames - 1})
        assert torch.equal(decoder.read_frames(video.path, numbers), read_frames(film, numbers))


@pytest.mark.parametrize("workers", [0, 2])
def test_clips_from_tar_files_are_those_of_a_folder_of_the_same_videos(
    workers: int, films: list[Path], tmp_path: Path
) -> None:
    pack(tmp_path / "all-0.tar", films[:4])
    pack(tmp_path / "all-1.tar", films[4:])
    (tmp_path / "list.txt").write_text("".join(f"{film}\n" for film in films[1:]))
    plan = ClipPlan(frames=9, size=(24, 32), batch=3, frame_buckets=(1, 9), image_ratio=0.25)
    taken = []
    for path in ("all-{0..1}.tar", "list.txt"):
        with ClipLoader(open_source(str(tmp_path / path)), plan, workers=workers) as loader:
            taken.append([next(loader) for _ in range(8)])
    for packed, plain in zip(*taken, strict=True):
        assert torch.equal(packed.pixels, plain.pixels)


def test_a_pattern_names_shards_in_its_own_order_or_by_name(films: list[Path], tmp_path: Path) -> None:
    for name in ("x-08", "x-09", "x-10", "y/z"):
        pack(tmp_path / f"{name}.tar", films[1:2])
    assert ids(tmp_path / "x-08.tar") == ["x-08.tar/0.mp4"]
    assert ids(tmp_path / "x-{08..10}.tar") == ["x-08.tar/0.mp4", "x-09.tar/0.mp4", "x-10.tar/0.mp4"]
    assert ids(tmp_path / "{y/z,x-10}.tar") == ["y/z.tar/0.mp4", "x-10.tar/0.mp4"]
    assert ids(tmp_path / "x-*.tar") == ids(tmp_path / "x-{08..10}.tar")
    assert ids(tmp_path / "**" / "*{z,8}.tar") == ["y/z.tar/0.mp4", "x-08.tar/0.mp4"]
    assert ids(tmp_path / "x-{09,*}.tar") == ["x-09.tar/0.mp4", "x-08.tar/0.mp4", "x-10.tar/0.mp4"]


def test_the_fingerprint_of_shards_follows_names_and_sizes_of_the_videos(
    films: list[Path], tmp_path: Path
) -> None:
    one = open_source(str(pack(tmp_path / "a" / "s.tar", films[:3])))
    same = open_source(str(pack(tmp_path / "b" / "s.tar", films[1:3])))
    other = open_source(str(pack(tmp_path / "c" / "s.tar", films[1:4])))
    assert one.fingerprint == same.fingerprint != other.fingerprint
    longer = write_film(tmp_path / "1.avi", codec="mpeg4", frames=50)
    assert open_source(str(pack(tmp_path / "d" / "s.tar", [films[1], longer]))).fingerprint != one.fingerprint


def test_of_two_members_of_one_name_the_later_counts_and_links_are_left_out(
    films: list[Path], tmp_path: Path
) -> None:
    newer = write_film(tmp_path / "0.mp4", frames=7)
    (tmp_path / "link.mp4").symlink_to("0.mp4")
    videos = references(pack(tmp_path / "s.tar", [films[1], newer, tmp_path / "link.mp4"]))
    assert [(video.id, probe(video.path).frames) for video in videos] == [("s.tar/0.mp4", 7)]


def test_a_broken_member_is_named_with_its_place_and_spoils_no_other(
    films: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "bad.mp4").write_text("this is no film" * 50)
    shard = pack(tmp_path / "s.tar", [tmp_path / "bad.mp4", tmp_path / "empty.mp4", films[1]])
    records = []
    plan = ClipPlan(frames=9, size=(24, 32))
    with ClipLoader(open_source(str(shard)), plan, on_quarantine=records.append) as loader:
        used = {next(loader).requests[0].video.id for _ in range(6)}
    assert used == {"s.tar/0.mp4"}
    assert sorted(record["video"] for record in records) == ["s.tar/bad.mp4", "s.tar/empty.mp4"]
    assert all(f"{shard} (bytes " in record["reason"] for record in records)
    (_, _, sound) = references(shard)
    shard.unlink()
    with pytest.raises(VideoError, match=r"bytes \d+ to \d+\): can't be opened: No such file"):
        probe(sound.path)


def test_what_is_wrong_with_shards_is_said_in_one_line(films: list[Path], tmp_path: Path) -> None:
    whole = pack(tmp_path / "x-0.tar", films)
    truncated(whole, tmp_path / "cut.tar", fraction=0.5)
    (tmp_path / "text.tar").write_text("this is no tar file\n" * 100)
    (tmp_path / "none.tar").touch()
    pack(tmp_path / "zipped.tar", films, mode="w:gz")
    pack(tmp_path / "labels.tar", films[:1])
    mistakes = {
        "cut.tar": "cut.tar can't be read as a tar file (unexpected end of data)",
        "text.tar": "text.tar can't be read as a tar file",
        "none.tar": "none.tar can't be read as a tar file (empty file)",
        "zipped.tar": "whole and not compressed",
        "labels.tar": "no video or image in 1 tar files",
        "x-{0..999999999}.tar": f"there is no file {tmp_path}/x-1.tar",
        "y-*.tar": f"there is no file {tmp_path}/y-*.tar",
        "absent.tar": f"there is no file {tmp_path}/absent.tar",
    }
    for name, words in mistakes.items():
        with pytest.raises(ConfigError) as caught:
            open_source(str(tmp_path / name))
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)
        assert "--video_path" in str(caught.value)


def with_texts(shard: Path, texts: dict[str, str]) -> Path:
    """A tar file of members with these contents."""
    with tarfile.open(shard, "w") as archive:
        for name, text in texts.items():
            member = tarfile.TarInfo(name)
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
    return shard


def test_texts_of_the_same_key_are_captions(tmp_path: Path) -> None:
    texts = {
        "d/a.mp4": "x",
        "d/a.txt": " a cat\n",
        "d/a.json": '{"text": "two", "n": [1]}',
        "d/b.seen.mp4": "x",
    }
    first, second = references(with_texts(tmp_path / "s.tar", texts | {"d/b.txt": "b", "d/c.txt": "c"}))
    assert caption_record(first, column=None) == {"caption": "a cat", "source": {"text": "two", "n": [1]}}
    assert caption_record(first, column="text")["caption"] == "two"
    assert caption_record(first, column="other") == {"source": {"text": "two", "n": [1]}}
    assert caption_record(second, column=None) == {"caption": "b"}


@pytest.mark.parametrize("text", ["{", "[1]", "[" * 100_000])
def test_a_text_that_is_not_what_its_name_says_is_an_error_of_its_video(text: str, tmp_path: Path) -> None:
    (video,) = references(with_texts(tmp_path / "s.tar", {"a.mp4": "x", "a.json": text}))
    with pytest.raises(VideoError, match=r"a\.mp4: the \.json beside it"):
        caption_record(video, column=None)
