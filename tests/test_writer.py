"""Films that are written: the same frames, colours, times and sound as those they were made from."""

import math
import os
import resource
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from faults import PAST_THE_END
from media import copy_packets, in_order, sound_packets, with_sound, write_film
from torch import Tensor

from causalvae.data.codings import CODECS, CodecName
from causalvae.data.films import Film, open_film, read_pieces
from causalvae.data.writer import film_writer, written_aside
from causalvae.errors import RunError, VideoError
from causalvae.fidelity import psnr

FLAT = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (200, 30, 90), (12, 200, 180)]
LOSSY = [name for name in CODECS if CODECS[name].quality]


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SVT_LOG", "1")


def rewritten(source: Path, target: Path, codec: CodecName, *, quality: int | None = None) -> Film:
    """The film written again with its own frames; what was written."""
    film = open_film(source)
    size = (film.height, film.width)
    with film_writer(target, film, size=size, coding=CODECS[codec], quality=quality) as writer:
        for piece in read_pieces(film, frames=7):
            writer.push(piece)
    return open_film(target)


def frames_of(film: Film) -> Tensor:
    return torch.cat(list(read_pieces(film, frames=16)))


def heard(path: Path) -> list[tuple[bytes, Fraction]]:
    """Packets of sound, and how many seconds after frame 0."""
    film = open_film(path)
    return [(packet, time - film.zero - film.start) for packet, time in sound_packets(path)]


@pytest.mark.parametrize("size", [(64, 80), (71, 67)], ids=["even", "odd"])
@pytest.mark.parametrize("codec", CODECS)
def test_every_codec_keeps_count_size_rate_and_pictures(
    codec: CodecName, size: tuple[int, int], tmp_path: Path
) -> None:
    rate = Fraction(30000, 1001)
    source = write_film(tmp_path / "a.mkv", codec="ffv1", pixels="bgr0", size=size, rate=rate, frames=20)
    film = rewritten(source, tmp_path / f"b{CODECS[codec].ending}", codec)
    assert (film.frames, film.height, film.width) == (20, *size)
    assert film.fps == rate
    assert film.times is None
    assert psnr(in_order(source), frames_of(film)) >= (100 if codec == "ffv1" else 25)  # half-size chroma


@pytest.mark.parametrize("codec", LOSSY)
def test_colours_come_back_as_they_were(codec: CodecName, tmp_path: Path) -> None:
    source = write_film(tmp_path / "a.mkv", codec="ffv1", pixels="bgr0", frames=len(FLAT), size=(64, 64))
    film = open_film(source)
    colours = torch.tensor(FLAT, dtype=torch.uint8)
    target = tmp_path / f"b{CODECS[codec].ending}"
    with film_writer(target, film, size=(64, 64), coding=CODECS[codec], quality=1) as writer:
        writer.push(colours[:, None, None].expand(-1, 64, 64, -1))
    found = frames_of(open_film(target)).float().mean(dim=(1, 2))
    assert (found - colours.float()).abs().max() <= 1.5  # 8 bits of luma and chroma hold no more


def test_better_quality_is_nearer_and_larger(tmp_path: Path) -> None:
    source = write_film(tmp_path / "a.mp4")
    fine, rough = (rewritten(source, tmp_path / f"{q}.mp4", "h264", quality=q) for q in (4, 40))
    assert Path(fine.path).stat().st_size > Path(rough.path).stat().st_size
    assert psnr(in_order(source), frames_of(fine)) > psnr(in_order(source), frames_of(rough))


@pytest.mark.parametrize("codec", ["h264", "ffv1"])
def test_times_of_frames_are_kept_where_they_follow_no_rate(codec: CodecName, tmp_path: Path) -> None:
    times = [0, 1, 2, 5, 6, 11, 12, 13, 30, 31]
    source = write_film(tmp_path / "a.mp4", times=times)
    film = rewritten(source, tmp_path / f"b{CODECS[codec].ending}", codec)
    assert film.times is not None
    assert [(time - film.times[0]) * film.tick for time in film.times] == [Fraction(t, 25) for t in times]


@pytest.mark.parametrize("codec", ["h264", "ffv1"])
@pytest.mark.parametrize("late", [0.0, 0.5])
def test_sound_is_taken_over_packet_by_packet_and_in_time(
    codec: CodecName, late: float, tmp_path: Path
) -> None:
    source = with_sound(write_film(tmp_path / "a.mp4"), tmp_path / "b.mp4", late=late)
    target = tmp_path / f"c{CODECS[codec].ending}"
    film = rewritten(source, target, codec)
    assert film.has_audio
    before, after = heard(source), heard(target)
    assert [packet for packet, _ in after] == [packet for packet, _ in before]
    assert all(abs(a - b) < Fraction(1, 500) for (_, a), (_, b) in zip(before, after, strict=True))


def test_sound_keeps_its_time_in_a_film_that_does_not_start_at_zero(tmp_path: Path) -> None:
    source = with_sound(write_film(tmp_path / "a.mp4"), tmp_path / "b.ts", late=0.3)
    rewritten(source, tmp_path / "c.mp4", "h264")
    (_, before), (_, after) = heard(source)[0], heard(tmp_path / "c.mp4")[0]
    assert abs(before - after) < Fraction(1, 500)
    assert open_film(source).zero > 0


def test_sound_that_a_container_refuses_is_encoded_and_said(tmp_path: Path) -> None:
    source = with_sound(write_film(tmp_path / "a.mp4"), tmp_path / "b.mp4", seconds=1.6)
    film = open_film(source)
    with film_writer(tmp_path / "c.webm", film, size=(48, 64), coding=CODECS["vp9"], quality=None) as writer:
        writer.push(frames_of(film))
    assert writer.notes == ["its sound is encoded as libopus: webm takes no aac"]
    last = max(time for _, time in sound_packets(tmp_path / "c.webm"))
    assert math.isclose(float(last), 1.6, abs_tol=0.1)


@pytest.mark.parametrize("codec", CODECS)
def test_sound_of_an_old_codec_is_encoded_for_every_container(codec: CodecName, tmp_path: Path) -> None:
    silent = write_film(tmp_path / "a.avi", codec="mpeg4", size=(64, 64))
    source = with_sound(silent, tmp_path / "b.avi", codec="adpcm_ms", seconds=1.6)
    target = tmp_path / f"c{CODECS[codec].ending}"
    assert rewritten(source, target, codec).has_audio
    times = [time for _, time in heard(target)]
    assert math.isclose(float(times[0]), 0, abs_tol=0.03)  # what encoders put before the first sample
    assert math.isclose(float(times[-1]), 1.6, abs_tol=0.1)


def test_a_turned_film_is_written_upright(tmp_path: Path) -> None:
    source = copy_packets(write_film(tmp_path / "a.mp4"), tmp_path / "b.mp4", rotation=90)
    film = rewritten(source, tmp_path / "c.mkv", "ffv1")
    assert (film.height, film.width) == (64, 48)
    assert torch.equal(frames_of(film), frames_of(open_film(source)))
    assert torch.equal(in_order(tmp_path / "c.mkv"), frames_of(film))  # nothing is left to turn


def test_a_size_that_a_codec_can_not_write_is_an_error_of_that_film(tmp_path: Path) -> None:
    source = write_film(tmp_path / "a.mkv", codec="ffv1", pixels="bgr0", size=(8, 8))
    with pytest.raises(VideoError, match="8x8 is too small for libx265"):
        rewritten(source, tmp_path / "b.mp4", "hevc")
    assert not (tmp_path / "b.mp4").exists()


def test_a_block_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_text("before")

    def fail() -> None:
        with written_aside(tmp_path / "a.mp4") as partial:
            partial.write_text("after")
            raise RunError("in the middle")

    with pytest.raises(RunError):
        fail()
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]
    assert (tmp_path / "a.mp4").read_text() == "before"


def test_a_disk_that_refuses_is_one_error_and_leaves_nothing(tmp_path: Path) -> None:
    source = write_film(tmp_path / "a.mkv", codec="ffv1", pixels="bgr0", frames=60)
    (tmp_path / "out").mkdir()
    child = os.fork()
    if child == 0:
        status = 70
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))  # a write past it fails with EFBIG
        try:
            rewritten(source, tmp_path / "out" / "b.mkv", "ffv1")
            status = PAST_THE_END
        except RunError as error:
            status = error.status if "File too large" in str(error) else 71
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    assert list((tmp_path / "out").iterdir()) == []
