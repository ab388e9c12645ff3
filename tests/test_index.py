"""What is known of videos is kept between runs: it changes no clip, and belongs to files as they are now."""

import os
import signal
import sqlite3
import subprocess
import sys
import tarfile
import time
from array import array
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from media import BUNDLED, write_film
from runs import ENVIRONMENT, assert_same_state, start

from causalvae.data.clips import ClipPlan
from causalvae.data.decode import Decoder, stamp_of
from causalvae.data.index import FILE, Entry, FrameIndex, IndexFile, prepare
from causalvae.data.loader import ClipLoader, Clips
from causalvae.data.sources import open_source
from causalvae.errors import VideoError

PLAN = ClipPlan(frames=5, size=(24, 32), batch=3, seed=7)
NONE = array("q")
SOME = FrameIndex((1, 2, 3), 3, NONE, NONE, NONE, by_position=False, lead=1)
NUMBERS = st.lists(st.integers(-(2**63), 2**63 - 1), max_size=20).map(lambda x: array("q", x))


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Films whose frames are found by time, by position, and only by counting; one inside a tar file."""
    folder = tmp_path_factory.mktemp("films")
    write_film(folder / "a.mp4", frames=30, options={"g": "6"})
    write_film(folder / "b.avi", codec="mpeg4", frames=24, options={"g": "6", "bf": "2"})
    write_film(folder / "c.gif", codec="gif", pixels="rgb8", frames=12)
    (folder / "d.webm").write_bytes((BUNDLED / "bunny.webm").read_bytes())
    with tarfile.open(folder.parent / "shard.tar", "w") as shard:
        for film in sorted(folder.iterdir()):
            shard.add(film, film.name)
    for path in (*folder.iterdir(), folder.parent / "shard.tar"):
        make_old(path)
    return folder


def make_old(path: Path) -> None:
    """As if the file had been there for a while."""
    hour_ago = time.time_ns() - 3600 * 10**9
    os.utime(path, ns=(hour_ago, hour_ago))


def spoil(path: Path) -> None:
    """Other bytes in the same file: its size, time and inode stay."""
    before = path.stat()
    with path.open("r+b") as file:
        file.write(bytes(before.st_size))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def made(home: Path) -> Path:
    path, warnings = prepare(home)
    assert path is not None
    assert warnings == []
    return path


def take(video_path: Path, *, index: Path | None, workers: int = 0) -> list[Clips]:
    with ClipLoader(open_source(str(video_path)), PLAN, workers=workers, index=index) as loader:
        return [next(loader) for _ in range(6)]


def assert_same(ours: list[Clips], theirs: list[Clips]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert one.requests == other.requests
        assert torch.equal(one.pixels, other.pixels)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("form", ["folder", "shard"])
def test_clips_are_the_same_with_an_index_a_full_one_and_none(
    form: str, workers: int, films: Path, tmp_path: Path
) -> None:
    path, index = {"folder": films, "shard": films.parent / "shard.tar"}[form], made(tmp_path)
    plain = take(path, index=None)
    assert_same(take(path, index=index, workers=workers), plain)
    source = open_source(str(path))
    kept = IndexFile(index)
    for number in range(len(source)):
        name = source[number].path
        entry = kept.get(name, stamp_of(name))
        assert entry is not None
        assert entry.frames == Decoder().index(name)
    kept.close()
    assert_same(take(path, index=index, workers=workers), plain)


def test_a_file_that_is_known_is_not_read_for_its_index_again(tmp_path: Path) -> None:
    film, index = write_film(tmp_path / "a.mp4", frames=30), made(tmp_path)
    make_old(film)
    first = Decoder(IndexFile(index))
    assert first.num_frames(film) == 30
    first.close()
    spoil(film)
    second = Decoder(IndexFile(index))
    assert second.num_frames(film) == 30
    with pytest.raises(VideoError):
        second.read_frames(film, [3])  # and what is read of it now is an error, not another frame
    second.close()
    with pytest.raises(VideoError):
        Decoder().num_frames(film)


def rewrite(film: Path) -> None:
    write_film(film, frames=20)


def touch(film: Path) -> None:
    os.utime(film, ns=(0, film.stat().st_mtime_ns + 10**9))


def replace(film: Path) -> None:
    times = film.stat().st_atime_ns, film.stat().st_mtime_ns
    other = film.with_name("other")
    other.write_bytes(film.read_bytes())
    os.utime(other, ns=times)
    other.rename(film)


@pytest.mark.parametrize("change", [rewrite, touch, replace])
def test_a_file_that_was_changed_is_read_again(change: Callable[[Path], None], tmp_path: Path) -> None:
    film, index = write_film(tmp_path / "a.mp4", frames=30), made(tmp_path)
    make_old(film)
    decoder = Decoder(IndexFile(index))
    assert decoder.num_frames(film) == 30
    change(film)
    kept = IndexFile(index)
    assert kept.get(str(film), stamp_of(str(film))) is None
    assert kept.has_other(str(film), stamp_of(str(film)))
    kept.close()
    assert decoder.num_frames(film) == Decoder().num_frames(film)
    decoder.close()


def test_a_file_changed_within_the_last_two_seconds_is_not_kept(tmp_path: Path) -> None:
    film, index = write_film(tmp_path / "a.mp4", frames=30), made(tmp_path)
    for name in ("now", "tomorrow"):
        later = time.time_ns() + (86400 * 10**9 if name == "tomorrow" else 0)
        os.utime(film, ns=(later, later))
        decoder = Decoder(IndexFile(index))
        assert decoder.num_frames(film) == 30
        decoder.close()
        kept = IndexFile(index)
        assert kept.get(str(film), stamp_of(str(film))) is None
        kept.close()


def test_a_file_changed_while_it_was_read_is_not_kept(tmp_path: Path) -> None:
    kept = IndexFile(made(tmp_path))
    kept.keep("a", Entry((1, 2, 3), SOME), stamp_now=(1, 2, 4))
    assert kept.get("a", (1, 2, 3)) is None
    kept.close()


@settings(max_examples=30)
@given(labels=NUMBERS, keys=NUMBERS, frames=st.integers(0, 2**40), lead=st.integers(0, 1))
def test_what_is_kept_comes_back(
    labels: "array[int]", keys: "array[int]", frames: int, lead: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    index, by = made(tmp_path_factory.mktemp("home")), frames % 2 == 0
    stamp = (2**63 + 5, 7, 2**64 - 1)  # inodes of some file systems fill 64 bits
    entry = Entry(
        stamp,
        FrameIndex(stamp, frames, labels, keys, array("q", reversed(keys)), by_position=by, lead=lead),
        {"codec": "\u00e9"},
        "ab" * 32,
    )
    name = os.fsdecode(b"/caf\xe9\xff\n")
    writer, reader = IndexFile(index), IndexFile(index)
    writer.keep(name, entry, stamp_now=stamp)
    writer.close()
    assert reader.get(name, stamp) == entry
    assert reader.get(name, (2**63 + 5, 8, 2**64 - 1)) is None
    reader.close()


@pytest.mark.parametrize("change", ["frames = x'00'", "made_by = 'another'", "sha256 = 'c'", "stamp = 'x'"])
def test_an_entry_that_is_damaged_or_of_other_libraries_is_not_there(change: str, tmp_path: Path) -> None:
    index = made(tmp_path)
    kept = IndexFile(index)
    kept.keep("a", Entry(SOME.stamp, SOME, {"frames": 3}, "ab"), stamp_now=SOME.stamp)
    assert kept.get("a", SOME.stamp) == Entry(SOME.stamp, SOME, {"frames": 3}, "ab")
    kept.close()
    connection = sqlite3.connect(index)
    with connection:
        connection.execute(f"UPDATE videos SET {change}")
    connection.close()
    again = IndexFile(index)
    assert again.get("a", SOME.stamp) is None
    again.close()


WRITE_MANY = """
import sys
from array import array
from pathlib import Path
from causalvae.data.index import Entry, FrameIndex, IndexFile
some = FrameIndex((1, 2, 3), 3, array("q"), array("q"), array("q"), by_position=False, lead=1)
kept = IndexFile(Path(sys.argv[1]))
for number in range(int(sys.argv[3])):
    kept.keep(f"{sys.argv[2]} {number}", Entry(some.stamp, some), stamp_now=some.stamp)
    print(number, flush=True)
kept.close()
"""


def test_several_writers_of_which_some_are_killed_leave_a_sound_file(tmp_path: Path) -> None:
    index = made(tmp_path)
    words = [sys.executable, "-c", WRITE_MANY, str(index)]
    writers = [
        subprocess.Popen([*words, str(name), "100"], stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
        for name in range(4)
    ]
    for writer in writers[:2]:
        assert writer.stdout is not None
        for _ in range(20):
            writer.stdout.readline()
        writer.send_signal(signal.SIGKILL)
    for writer in writers:
        writer.communicate()
    assert prepare(tmp_path) == (index, [])
    kept = IndexFile(index)
    for name, number in [(2, 100), (3, 100), (0, 20), (1, 20)]:
        found = [kept.get(f"{name} {each}", SOME.stamp) for each in range(number)]
        assert found == [Entry(SOME.stamp, SOME)] * number
    kept.close()


def foreign(index: Path) -> None:
    index.write_text("this is no database\n" * 400)


def of_another_program(index: Path) -> None:
    index.unlink()
    connection = sqlite3.connect(index)
    connection.execute("CREATE TABLE passwords (word TEXT)")
    connection.close()


def damaged_inside(index: Path) -> None:
    data = bytearray(index.read_bytes())
    data[4096:] = b"\xa5" * (len(data) - 4096)
    index.write_bytes(data)


def cut(index: Path) -> None:
    index.write_bytes(index.read_bytes()[:6000])


@pytest.mark.parametrize("spoiled", [foreign, of_another_program, damaged_inside, cut])
def test_a_file_that_is_damaged_or_anothers_is_set_aside(
    spoiled: Callable[[Path], None], films: Path, tmp_path: Path
) -> None:
    index = made(tmp_path)
    take(films, index=index)
    spoiled(index)
    content = index.read_bytes()
    path, (warning,) = prepare(tmp_path)
    assert path == index
    assert warning.startswith(f"{index}: ")
    assert warning.endswith(f"it is now {FILE}.broken-1, and another one is made")
    assert index.with_name(f"{FILE}.broken-1").read_bytes() == content
    assert prepare(tmp_path) == (index, [])


@pytest.mark.parametrize("spoiled", [foreign, damaged_inside, cut])
def test_a_file_that_is_damaged_while_it_is_used_changes_no_clip(
    spoiled: Callable[[Path], None], films: Path, tmp_path: Path
) -> None:
    index = made(tmp_path)
    plain = take(films, index=index)
    spoiled(index)
    assert_same(take(films, index=index, workers=1), plain)


@pytest.mark.slow
def test_a_run_is_the_same_where_nothing_can_be_kept_and_says_so(tmp_path: Path) -> None:
    homes = {"none": "/dev/null/home", "empty": str(tmp_path / "home"), "full": str(tmp_path / "home")}
    for name, home in homes.items():
        process = start(tmp_path / name, env={"CAUSALVAE_HOME": home}, max_steps=2, disc_type="none")
        said = "".join(process.communicate())
        assert process.returncode == 0
        warned = "warning: /dev/null/home: Not a directory; videos are indexed anew in every run" in said
        assert warned == (name == "none")
    for name in ("empty", "full"):
        assert_same_state(tmp_path / "none", tmp_path / name, step=2)
    assert (tmp_path / "home" / FILE).exists()
