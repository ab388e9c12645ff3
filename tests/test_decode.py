"""Exact frames: any read equals decoding from the start; and files that are no films say so."""

import os
from pathlib import Path
from typing import Any

import av
import pytest
import torch
from media import (
    BUNDLED,
    SHARED,
    broken_entries,
    clips,
    copy_packets,
    damaged,
    in_order,
    truncated,
    write_film,
)

from causalvae.data.decode import Decoder, printable, probe, read_frames
from causalvae.errors import VideoError

FILMS: dict[str, dict[str, Any]] = {  # what a codec and a container can do to the order of frames
    "h264.mp4": {"options": {"g": "8", "bf": "3"}},
    "open.mkv": {"options": {"g": "8", "bf": "3", "x264-params": "open-gop=1:log-level=none"}},
    "refresh.ts": {"options": {"g": "8", "x264-params": "intra-refresh=1:log-level=none"}},
    "h264.avi": {"options": {"g": "8", "bf": "3"}},
    "h264.flv": {"options": {"g": "8", "bf": "2"}},
    "uneven.mp4": {"times": [i + i // 3 * 4 for i in range(40)], "options": {"g": "8", "bf": "2"}},
    "b_frames.avi": {"codec": "mpeg4", "options": {"g": "8", "bf": "2"}},
    "plain.avi": {"codec": "mpeg4", "options": {"g": "8"}},
    "mpeg2.mpg": {"codec": "mpeg2video", "options": {"g": "8", "bf": "2"}},
    "mpeg2.ts": {"codec": "mpeg2video", "options": {"g": "8", "bf": "2"}},
    "hidden.webm": {"codec": "libvpx", "options": {"g": "16", "auto-alt-ref": "1", "lag-in-frames": "12"}},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"g": "16", "lag-in-frames": "12", "cpu-used": "8"}},
    "motion.avi": {"codec": "mjpeg", "pixels": "yuvj420p"},
    "animation.gif": {"codec": "gif", "pixels": "rgb8"},
    "odd.mkv": {"codec": "ffv1", "pixels": "yuv444p", "size": (47, 63), "options": {"g": "5"}},
    "one.mp4": {"frames": 1},
}


def assert_every_start_is_exact(path: Path, *, length: int = 3, step: int = 1) -> None:
    truth = in_order(path)
    decoder = Decoder()
    assert decoder.num_frames(path) == len(truth)
    assert torch.equal(decoder.read_frames(path, range(len(truth))), truth)
    for start in range(0, len(truth), step):
        numbers = range(start, min(start + length, len(truth)))
        assert torch.equal(decoder.read_frames(path, numbers), truth[start : start + length]), start


@pytest.mark.slow
@pytest.mark.parametrize("path", clips(), ids=lambda path: path.name)
def test_every_start_of_a_real_film_equals_decoding_from_its_start(path: Path) -> None:
    # 132 frames of 720p with one keyframe: every read goes the same way, from the start, and costs 0.2 s
    step = 6 if path.name == "bigbuckbunny.mp4" else 1
    assert_every_start_is_exact(path, length=1 if path.stat().st_size > 1 << 20 else 3, step=step)


@pytest.mark.parametrize("name", FILMS)
def test_every_start_equals_decoding_from_the_start_in_any_container(name: str, tmp_path: Path) -> None:
    assert_every_start_is_exact(write_film(tmp_path / name, **FILMS[name]))


@pytest.mark.parametrize("name", ["h264.mp4", "mpeg2.ts", "b_frames.avi", "vp9.webm"])
def test_a_film_cut_without_decoding_is_exact_from_its_first_sound_frame(name: str, tmp_path: Path) -> None:
    film = write_film(tmp_path / name, **FILMS[name])
    cut = copy_packets(film, tmp_path / f"cut{film.suffix}", from_key=1)
    frames, whole = read_frames(cut, range(8, 16)), in_order(film)
    starts = [i for i in range(len(whole) - 7) if torch.equal(frames, whole[i : i + 8])]
    assert len(starts) == 1


def test_frames_come_in_the_order_asked_for() -> None:
    path = BUNDLED / "city_towers.avi"
    truth = in_order(path)
    for numbers in ([30, 29, 60], [5, 5, 5], [0, 113], list(range(2, 100, 9))):
        assert torch.equal(read_frames(path, numbers), truth[numbers])


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared clips are not beside the repository")
@pytest.mark.parametrize(
    ("name", "frames"),
    [("tree.avi", 68), ("earth_mpeg4.avi", 150), ("city_xvid_320x240.avi", 148), ("cityCC0.mpg", 190)],
)
def test_the_count_is_of_frames_that_decode_and_not_the_headers(name: str, frames: int) -> None:
    assert probe(SHARED / name).frames == frames


def test_a_frame_past_the_end_is_refused_with_the_number_there_are() -> None:
    with pytest.raises(VideoError, match=r"frame 74 was asked for, it has 74"):
        read_frames(BUNDLED / "city_spire.mp4", [73, 74])
    with pytest.raises(VideoError, match="start at 0"):
        read_frames(BUNDLED / "city_spire.mp4", [-1])


def test_probe_tells_size_and_rate() -> None:
    info = probe(BUNDLED / "bunny.webm")
    assert (info.frames, info.height, info.width, info.fps) == (132, 240, 426, 25.0)


@pytest.mark.parametrize("degrees", [90, 180, -90])
def test_a_film_marked_as_turned_comes_upright(degrees: int, tmp_path: Path) -> None:
    film = write_film(tmp_path / "film.mp4")
    turned = copy_packets(film, tmp_path / "turned.mp4", rotation=degrees)
    with av.open(str(turned)) as container:
        assert next(container.decode(video=0)).rotation % 360 == degrees % 360  # counter-clockwise
    assert torch.equal(read_frames(turned, [7]), torch.rot90(in_order(film)[7:8], degrees // 90, dims=(1, 2)))
    assert probe(turned).height == (48 if degrees == 180 else 64)


@pytest.mark.parametrize("ending", ["png", "bmp", "ppm", "tiff"])
def test_an_image_is_a_film_of_one_frame_with_its_exact_pixels(ending: str, tmp_path: Path) -> None:
    codec = {"ppm": "ppm", "tiff": "tiff"}.get(ending, ending)
    pixels = "bgr24" if ending == "bmp" else "rgb24"
    image = tmp_path / f"image.{ending}"
    with av.open(str(image), "w", format="image2", options={"update": "1"}) as container:
        stream = container.add_stream(codec, rate=1)
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width, stream.pix_fmt = 48, 64, pixels
        picture = torch.randint(0, 256, (48, 64, 3), dtype=torch.uint8)
        frame = av.VideoFrame.from_ndarray(picture.numpy(), format="rgb24")
        container.mux(stream.encode(frame.reformat(format=pixels)))
        container.mux(stream.encode())
    assert probe(image).frames == 1
    assert torch.equal(read_frames(image, [0])[0], picture)


def test_colours_are_those_of_the_formula(tmp_path: Path) -> None:
    path = tmp_path / "grey.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.height, stream.width, stream.pix_fmt = 16, 256, "yuv420p"
        frame = av.VideoFrame(256, 16, "yuv420p")
        luma = torch.arange(256, dtype=torch.uint8).repeat(16, 1).clamp(16, 235)
        for plane, values in zip(
            frame.planes, (luma, torch.full((8, 128), 128), torch.full((8, 128), 128)), strict=True
        ):
            padded = torch.zeros(plane.height, plane.line_size, dtype=torch.uint8)
            padded[:, : values.shape[1]] = values
            plane.update(padded.numpy().tobytes())
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    exact = (luma.double() - 16) * 255 / 219  # ITU-R BT.601, limited range
    off = read_frames(path, [0])[0].double() - exact[..., None]
    assert off.abs().max() <= 1.0
    assert off.mean().abs() < 0.1  # the default conversion is a whole level too dark


def test_entries_that_are_no_films_say_so_and_leave_nothing_open(tmp_path: Path) -> None:
    entries = broken_entries(tmp_path / "broken") | {"folder": tmp_path}
    decoder = Decoder()
    open_before = len(os.listdir("/proc/self/fd"))
    for name, path in entries.items():
        with pytest.raises(VideoError) as caught:
            decoder.read_frames(path, [0])
        assert str(path) in str(caught.value), name
        assert "\n" not in str(caught.value)
    assert len(os.listdir("/proc/self/fd")) == open_before


@pytest.mark.parametrize("name", ["city_towers.avi", "city_spire.mp4", "bunny.webm"])
def test_a_damaged_film_gives_its_true_frames_or_an_error(name: str, tmp_path: Path) -> None:
    truth = in_order(BUNDLED / name)
    copies = [truncated(BUNDLED / name, tmp_path / f"cut{f}-{name}", fraction=f) for f in (0.05, 0.5, 0.95)]
    if name != "bunny.webm":  # nothing in VP9 tells flipped bits from others
        for f in (0.3, 0.6, 0.85):
            copies.append(damaged(BUNDLED / name, tmp_path / f"{f}-{name}", first=f, last=f + 0.1))
    decoder = Decoder()
    refused = wrong = 0
    for copy in copies:
        for start in range(0, len(truth) - 4, 8):
            try:
                frames = decoder.read_frames(copy, range(start, start + 4))
            except VideoError:
                refused += 1
            else:
                wrong += not torch.equal(frames, truth[start : start + 4])
    assert refused > 0
    assert wrong == 0


def test_a_film_damaged_in_its_middle_is_sound_before_it(tmp_path: Path) -> None:
    copy = damaged(BUNDLED / "city_spire.mp4", tmp_path / "film.mp4", first=0.6)
    decoder = Decoder()
    assert torch.equal(decoder.read_frames(copy, [0, 1]), in_order(BUNDLED / "city_spire.mp4")[:2])
    with pytest.raises(VideoError):
        decoder.read_frames(copy, range(50, 74))


@pytest.mark.parametrize(
    "name",
    [b"two words.mp4", b"it's \"so\".mp4", b"line\nbreak.mp4", b"caf\xe9\xff.mp4", b"http:x.mp4",
     b"file:x.mp4", b"-i.mp4", b"%d.mp4", b"concat:a|b.mp4", b"\xe2\x80\xaereversed.mp4"],
)  # fmt: skip
def test_a_film_can_have_any_name(name: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    film = (BUNDLED / "city_spire.mp4").read_bytes()
    (tmp_path / os.fsdecode(name)).write_bytes(film)
    monkeypatch.chdir(tmp_path)
    assert read_frames(os.fsdecode(name), [0]).shape == (1, 240, 426, 3)


def test_a_name_in_a_message_can_do_no_harm() -> None:
    shown = printable("a\x1b[2Jb\nc\u202ed\udcffe.mp4")
    assert shown == "a\\x1b[2Jb\\nc\\u202ed\\udcffe.mp4"


def test_a_file_that_changed_is_looked_at_again(tmp_path: Path) -> None:
    path = write_film(tmp_path / "film.mp4", frames=10)
    decoder = Decoder()
    assert decoder.num_frames(path) == 10
    write_film(path, frames=20)
    assert decoder.num_frames(path) == 20
