"""The same clips from any cursor, with any workers, whatever breaks; and every broken film recorded once."""

import contextlib
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pytest
import torch
from media import BUNDLED, broken_entries, damaged, in_order, truncated, write_film

from causalvae.data.clips import ClipPlan, center_clip, choose, draw, read_clip
from causalvae.data.decode import Decoder
from causalvae.data.loader import ClipLoader, Clips
from causalvae.data.sources import ClipSource, VideoRef, open_source
from causalvae.errors import ConfigError, RunError

PLAN = ClipPlan(frames=5, size=(24, 32), batch=3, seed=7)


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six sound films, two of them with B-frames in an AVI."""
    folder = tmp_path_factory.mktemp("films")
    for number in range(4):
        write_film(folder / f"{number}.mp4", frames=12 + 3 * number, options={"g": "6"})
    for number in range(2):
        write_film(
            folder / f"b{number}.avi", codec="mpeg4", frames=14 + number, options={"g": "6", "bf": "2"}
        )
    return folder


@pytest.fixture
def mixed(films: Path, tmp_path: Path) -> Path:
    """Sound films among broken, cut, damaged and strangely named ones."""
    folder = tmp_path / "mixed"
    broken_entries(folder)
    for film in films.iterdir():
        (folder / film.name).write_bytes(film.read_bytes())
    truncated(films / "1.mp4", folder / "cut.mp4", fraction=0.7)
    damaged(BUNDLED / "city_spire.mp4", folder / "half.mp4", first=0.6)
    for name in (b"two words.mp4", b"line\nbreak.mp4", b"caf\xe9\xff.mp4", b"http:x.mp4", b'it\'s "so".mp4'):
        (folder / os.fsdecode(name)).write_bytes((films / "2.mp4").read_bytes())
    return folder


def take(
    source: ClipSource, plan: ClipPlan = PLAN, *, batches: int = 8, **settings: Any
) -> tuple[list[Clips], list[dict[str, Any]]]:
    """The first batches of a loader, and what it put in quarantine."""
    records: list[dict[str, Any]] = []
    with ClipLoader(source, plan, on_quarantine=records.append, **settings) as loader:
        return [next(loader) for _ in range(batches)], records


def assert_same(ours: list[Clips], theirs: list[Clips]) -> None:
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert one.cursor == other.cursor
        assert one.requests == other.requests
        assert torch.equal(one.pixels, other.pixels)


def workers() -> list[int]:
    return [child.pid for child in multiprocessing.active_children() if child.pid is not None]


def test_every_epoch_takes_every_film_once_in_an_order_of_its_own() -> None:
    orders = []
    for epoch in range(4):
        places = [divmod(7 * epoch + i, PLAN.batch) for i in range(7)]
        orders.append([choose(PLAN, num_videos=7, cursor=c, sample=s, attempt=0) for c, s in places])
    assert all(sorted(order) == list(range(7)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4


def test_the_substitutes_of_a_place_are_all_the_films() -> None:
    substitutes = [choose(PLAN, num_videos=9, cursor=4, sample=1, attempt=k) for k in range(1, 10)]
    assert sorted(substitutes) == list(range(9))


def test_draws_reach_every_start_and_nothing_past_the_end() -> None:
    plan = replace(PLAN, frames=4, stride=3)
    video = VideoRef("a", "a")
    drawn = [draw(video, num_frames=14, plan=plan, cursor=c, sample=0) for c in range(400)]
    starts = Counter(request.start for request in drawn)
    assert sorted(starts) == [0, 1, 2, 3, 4]
    assert min(starts.values()) > 50
    assert 150 < sum(request.flip for request in drawn) < 250
    places = [place for request in drawn if request.crop for place in request.crop]
    assert len(places) == 800
    assert min(places) < 0.02
    assert 0.98 < max(places) < 1


def test_a_draw_is_a_function_of_its_place_and_of_nothing_else() -> None:
    video = VideoRef("a", "a")
    place: dict[str, Any] = {"num_frames": 500, "plan": PLAN, "cursor": 3, "sample": 1}
    assert draw(video, **place) == draw(video, **place)
    changes: list[dict[str, Any]] = [{"cursor": 4}, {"sample": 2}, {"plan": replace(PLAN, seed=8)}]
    for change in changes:
        assert draw(video, **{**place, **change}).crop != draw(video, **place).crop
    still = draw(video, num_frames=500, plan=replace(PLAN, crop="center", flip=False), cursor=3, sample=1)
    assert (still.crop, still.flip) == (None, False)


def test_a_clip_holds_the_frames_that_its_request_names() -> None:
    video = VideoRef("towers", str(BUNDLED / "city_towers.avi"))
    plan = ClipPlan(frames=4, size=(240, 426), stride=9)
    request = draw(video, num_frames=114, plan=plan, cursor=5, sample=0)
    frames = in_order(BUNDLED / "city_towers.avi")[request.start :: 9][:4].permute(3, 0, 1, 2)
    clip = read_clip(request, plan, decoder=Decoder())
    assert torch.equal(clip, frames.flip(3) if request.flip else frames)
    assert torch.equal(
        center_clip(video, plan), in_order(BUNDLED / "city_towers.avi")[0:36:9].permute(3, 0, 1, 2)
    )


@pytest.mark.parametrize("number", [1, 3])
def test_workers_do_not_change_the_clips(number: int, films: Path) -> None:
    source = open_source(str(films))
    assert_same(take(source, workers=number)[0], take(source, workers=0)[0])


@pytest.mark.parametrize("number", [0, 2])
def test_any_cursor_goes_on_as_if_never_interrupted(number: int, films: Path) -> None:
    source = open_source(str(films))
    whole, _ = take(source, batches=9)
    assert_same(take(source, batches=4, cursor=5, workers=number)[0], whole[5:])


def test_broken_films_are_replaced_alike_and_recorded_once_with_any_workers(mixed: Path) -> None:
    source = open_source(str(mixed))
    plain, records = take(source, batches=25)
    shared, shared_records = take(source, batches=25, workers=2)
    assert_same(shared, plain)
    assert shared_records == records
    names = [record["video"] for record in records]
    assert len(set(names)) == len(names)
    assert {"text.mp4", "empty.mp4", "zeros.mp4", "noise.mp4", "fifo.mp4", "nowhere.mp4"} <= set(names)
    assert {"sound.avi", "cut.webm", "cut.mp4", "half.mp4"} <= set(names)
    assert not {"http:x.mp4", "two words.mp4", "line\nbreak.mp4", "0.mp4"} & set(names)
    assert all(record["reason"] and "\n" not in record["reason"] for record in records)
    assert [record["whole"] for record in records if record["video"] in ("half.mp4", "text.mp4")] in (
        [True, False],
        [False, True],
    )
    used = {request.video.id for clips in plain for request in clips.requests}
    assert "half.mp4" in used  # where it is sound


@pytest.mark.parametrize("number", [0, 2])
def test_what_a_run_knows_of_broken_films_does_not_change_its_clips(number: int, mixed: Path) -> None:
    source = open_source(str(mixed))
    whole, records = take(source, batches=20)
    known = {record["video"] for record in records}
    unreadable = {record["video"]: record["reason"] for record in records if record["whole"]}
    settings: list[dict[str, Any]] = [
        {},
        {"known": dict.fromkeys(known)},
        {"known": dict.fromkeys(known) | unreadable},
    ]
    for setting in settings:
        again, news = take(source, batches=10, cursor=10, workers=number, **setting)
        assert_same(again, whole[10:])
        assert {record["video"] for record in news} <= known
        assert not news or not setting


def test_a_short_film_is_used_only_if_nothing_longer_is_there(films: Path, tmp_path: Path) -> None:
    for film in films.iterdir():
        (tmp_path / film.name).symlink_to(film)
    for number in range(6):
        write_film(tmp_path / f"short{number}.mp4", frames=3)
    batches, records = take(open_source(str(tmp_path)))
    assert not any("short" in request.video.id for clips in batches for request in clips.requests)
    assert records == []
    batches, _ = take(open_source(str(tmp_path)), replace(PLAN, short_videos="repeat"))
    assert any("short" in request.video.id for clips in batches for request in clips.requests)


@pytest.mark.parametrize("number", [0, 2])
def test_where_all_films_are_short_their_last_frame_is_repeated(number: int, tmp_path: Path) -> None:
    for name in range(3):
        write_film(tmp_path / f"{name}.mp4", frames=3)
    source = open_source(str(tmp_path))
    batches, records = take(source, replace(PLAN, flip=False), workers=number)
    for clips in batches:
        assert torch.equal(clips.pixels[:, :, 3:], clips.pixels[:, :, 2:3].expand(-1, -1, 2, -1, -1))
        assert not torch.equal(clips.pixels[:, :, 1], clips.pixels[:, :, 2])
    assert records == []
    with pytest.raises(ConfigError, match=r"none of the 3 videos tried.*has 3 frames"):
        take(source, replace(PLAN, short_videos="skip"), workers=number)


def test_an_image_is_a_clip_of_one_frame(tmp_path: Path) -> None:
    write_film(tmp_path / "image.png", codec="png", pixels="rgb24", frames=1)
    batches, _ = take(open_source(str(tmp_path)), replace(PLAN, frames=1), batches=2)
    assert batches[0].pixels.shape == (3, 3, 1, 24, 32)


@pytest.mark.parametrize("number", [0, 2])
def test_nothing_usable_is_a_mistake_with_the_first_reasons(number: int, tmp_path: Path) -> None:
    broken_entries(tmp_path / "broken")
    records: list[dict[str, Any]] = []
    with ClipLoader(
        open_source(str(tmp_path / "broken")), PLAN, workers=number, on_quarantine=records.append
    ) as loader:
        with pytest.raises(ConfigError, match="none of the 8 videos tried can be used") as caught:
            next(loader)
        assert caught.value.status == 2
        assert str(caught.value).count(str(tmp_path)) == 3
        with pytest.raises(RunError):
            next(loader)
    assert len(records) == 8


def test_killed_workers_are_replaced_and_nothing_else_changes(films: Path) -> None:
    source = open_source(str(films))
    plain, _ = take(source, batches=42)
    taken, records = [], []
    with ClipLoader(source, PLAN, workers=2, on_quarantine=records.append) as loader:
        for number in range(42):
            taken.append(next(loader))
            if number % 6 == 0:  # further apart than the loader reads ahead: no clip is hit twice
                os.kill(workers()[0], signal.SIGKILL)
    assert_same(taken, plain)
    assert records == []
    assert workers() == []


def test_a_stopped_worker_is_given_up_with_its_film(films: Path) -> None:
    source = open_source(str(films))
    records: list[dict[str, Any]] = []
    # one worker: after the first batch it is known to have started
    with ClipLoader(source, PLAN, workers=1, on_quarantine=records.append, clip_timeout=1.0) as loader:
        next(loader)
        (stopped,) = workers()
        os.kill(stopped, signal.SIGSTOP)
        batches = [next(loader) for _ in range(8)]
        assert stopped not in workers()
    assert [clips.cursor for clips in batches] == list(range(1, 9))
    assert records[0]["whole"]
    assert "longer than 1 s" in records[0]["reason"]


def test_leaving_a_loader_does_not_wait_for_a_stopped_worker(films: Path) -> None:
    with ClipLoader(open_source(str(films)), PLAN, workers=2) as loader:
        next(loader)
        for worker in workers():
            os.kill(worker, signal.SIGSTOP)
    assert workers() == []


def test_a_film_that_kills_its_readers_is_given_up_after_two(films: Path, tmp_path: Path) -> None:
    for film in films.iterdir():
        (tmp_path / film.name).symlink_to(film)
    deadly = write_film(tmp_path / "deadly.avi", codec="mpeg4", frames=3000, options={"bf": "2"})
    killing = threading.Event()

    def kill_readers() -> None:
        while not killing.is_set():
            for reader in readers(deadly):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(reader, signal.SIGKILL)

    thread = threading.Thread(target=kill_readers)
    thread.start()
    try:
        batches, records = take(open_source(str(tmp_path)), batches=12, workers=2)
    finally:
        killing.set()
        thread.join()
    assert [record["video"] for record in records] == ["deadly.avi"]
    assert "died 2 times (signal 9)" in records[0]["reason"]
    assert not any(request.video.id == "deadly.avi" for clips in batches for request in clips.requests)


def readers(path: Path) -> list[int]:
    """Other processes that have this file open."""
    found = []
    for process in [int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) != os.getpid()]:
        try:
            files = [os.readlink(f"/proc/{process}/fd/{fd}") for fd in os.listdir(f"/proc/{process}/fd")]
        except OSError:
            continue  # it has ended, or closed one meanwhile
        if str(path) in files:
            found.append(process)
    return found


def test_the_wait_is_that_since_it_was_last_asked(films: Path) -> None:
    with ClipLoader(open_source(str(films)), PLAN) as loader:
        next(loader)
        assert loader.take_wait() > 0
        assert loader.take_wait() == 0


def test_a_closed_loader_says_so(films: Path) -> None:
    loader = ClipLoader(open_source(str(films)), PLAN, workers=1)
    next(loader)
    loader.close()
    loader.close()
    with pytest.raises(RunError, match="ended"):
        list(loader)  # what was read ahead, then the end


SCRIPT = """
import os, signal, sys
from causalvae.data.clips import ClipPlan
from causalvae.data.loader import ClipLoader
from causalvae.data.sources import open_source

if __name__ == "__main__" or len(sys.argv) > 2:
    plan = ClipPlan(frames=5, size=(24, 32), batch=3, seed=7)
    loader = ClipLoader(open_source(sys.argv[1]), plan, workers=1)
    {during}
"""


def script(during: str, *arguments: str, folder: Path, **settings: Any) -> "subprocess.Popen[str]":
    """A process that has a loader with a worker and does something with it."""
    program = folder / "script.py"
    program.write_text(SCRIPT.format(during=during))
    source = str(Path(__file__).parents[1] / "src")
    return subprocess.Popen(
        [sys.executable, str(program), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": source},
        **settings,
    )


def test_no_worker_outlives_a_killed_trainer_even_if_it_is_stopped(films: Path, tmp_path: Path) -> None:
    during = (
        "import multiprocessing; next(loader); (worker,) = multiprocessing.active_children();"
        "os.kill(worker.pid, signal.SIGSTOP); print(worker.pid, flush=True); signal.pause()"
    )
    left_before = os.listdir("/dev/shm")
    with script(during, str(films), folder=tmp_path) as trainer:
        assert trainer.stdout is not None
        worker = os.pidfd_open(int(trainer.stdout.readline()))
        trainer.kill()
    wait([worker])  # until it has ended; for ever, if nothing ends it
    os.close(worker)
    assert os.listdir("/dev/shm") == left_before


@pytest.mark.parametrize(
    ("limit", "arguments"),
    [(lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (12, 12)), ()), (None, ("without a guard",))],
    ids=["few descriptors", "no main guard"],
)
def test_where_no_worker_can_start_the_trainer_reads_the_same_clips_and_says_so(
    limit: Callable[[], None] | None, arguments: tuple[str, ...], films: Path, tmp_path: Path
) -> None:
    during = "print(next(loader).pixels.long().sum().item())"
    with script(during, str(films), *arguments, folder=tmp_path, preexec_fn=limit) as trainer:
        out, err = trainer.communicate()
    plain, _ = take(open_source(str(films)), batches=1)
    assert out.split()[-1:] == [str(plain[0].pixels.long().sum().item())], err
    assert "--dataloader_num_workers: a process can't be started" in err
