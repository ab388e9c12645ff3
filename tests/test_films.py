"""Whole videos in pieces: the frames of random reads, in order, and when they are shown."""

from fractions import Fraction
from pathlib import Path

import pytest
import torch
from media import BUNDLED, broken_entries, clips, copy_packets, in_order, truncated, write_film

from causalvae.data.decode import Decoder
from causalvae.data.films import open_film, read_pieces
from causalvae.errors import VideoError


@pytest.mark.parametrize(
    "path", [p for p in clips() if p.stat().st_size < 800_000], ids=lambda path: path.name
)
def test_pieces_are_the_frames_of_plain_decoding(path: Path) -> None:
    film, expected = open_film(path), in_order(path)
    assert (film.frames, film.height, film.width) == tuple(expected.shape[:3])
    pieces = list(read_pieces(film, frames=50))
    assert [len(piece) for piece in pieces[:-1]] == [50] * (len(pieces) - 1)
    assert torch.equal(torch.cat(pieces), expected)


def test_a_part_of_a_film_with_a_stride_is_what_a_random_read_gives(tmp_path: Path) -> None:
    path = write_film(tmp_path / "a.mp4")
    found = torch.cat(list(read_pieces(open_film(path), frames=4, start=3, stop=32, stride=3)))
    assert torch.equal(found, Decoder().read_frames(path, range(3, 32, 3)))
    assert list(read_pieces(open_film(path), frames=4, start=40)) == []


def test_a_rate_is_exact_where_times_are_rounded_to_milliseconds(tmp_path: Path) -> None:
    path = write_film(tmp_path / "a.mkv", codec="ffv1", pixels="bgr0", rate=Fraction(30000, 1001))
    film = open_film(path)
    assert film.times is None
    assert film.fps == Fraction(30000, 1001)


def test_times_that_no_rate_gives_are_kept(tmp_path: Path) -> None:
    times = [0, 1, 2, 5, 6, 11, 12, 13, 30, 31]
    film = open_film(write_film(tmp_path / "a.mp4", times=times))
    assert film.times is not None
    assert [(time - film.times[0]) * film.tick for time in film.times] == [Fraction(t, 25) for t in times]


def test_every_picture_of_a_gif_has_the_delay_that_it_was_given(tmp_path: Path) -> None:
    times = [0, 1, 2, 5, 6, 11]
    film = open_film(write_film(tmp_path / "a.gif", codec="gif", pixels="rgb8", times=times))
    assert film.times is not None
    assert [(time - film.times[0]) * film.tick for time in film.times] == [Fraction(t, 25) for t in times]


def test_a_turned_film_is_upright(tmp_path: Path) -> None:
    path = copy_packets(write_film(tmp_path / "a.mp4"), tmp_path / "b.mp4", rotation=90)
    film = open_film(path)
    assert (film.height, film.width) == (64, 48)
    assert torch.equal(next(read_pieces(film, frames=3)), Decoder().read_frames(path, [0, 1, 2]))


def test_what_is_no_film_is_an_error_that_names_it(tmp_path: Path) -> None:
    for path in broken_entries(tmp_path / "broken").values():
        with pytest.raises(VideoError, match=path.name):
            open_film(path)


def test_a_film_that_breaks_off_gives_its_first_frames_and_then_an_error(tmp_path: Path) -> None:
    path = truncated(write_film(tmp_path / "a.mp4", frames=200), tmp_path / "b.mp4", fraction=0.6)
    pieces = read_pieces(open_film(path), frames=8)
    assert torch.equal(next(pieces), Decoder().read_frames(tmp_path / "a.mp4", range(8)))
    with pytest.raises(VideoError, match=r"b\.mp4"):
        list(pieces)


def test_only_pictures_are_pictures(tmp_path: Path) -> None:
    picture = write_film(tmp_path / "a.png", codec="png", frames=1, pixels="rgb24")
    assert open_film(picture).is_image
    assert not open_film(BUNDLED / "bunny.webm").is_image
