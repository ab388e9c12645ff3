"""The command `reconstruct`: what comes out is what the model makes, and it is whole or not there."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import PAST_THE_END
from media import broken_entries, copy_packets, in_order, sound_packets, truncated, with_sound, write_film
from runs import ENVIRONMENT
from safetensors.torch import load_file
from torch import Tensor

from causalvae import rng
from causalvae.cli import main
from causalvae.data.decode import Decoder
from causalvae.data.encode import side_by_side
from causalvae.data.films import open_film
from causalvae.fidelity import psnr, ssim
from causalvae.models.build import build
from causalvae.models.presets import CausalVAEConfig
from causalvae.video import pad_size, to_model, to_uint8
from causalvae.weights.read import own_entries
from causalvae.weights.tensorfiles import write_safetensors

SMALL = CausalVAEConfig(hidden_size=8, hidden_size_mult=(1, 1, 1, 1), num_res_blocks=1, norm="channel")
PROGRAM = [sys.executable, "-c", "from causalvae.cli import run; run()"]


def weights_file(path: Path, config: CausalVAEConfig) -> Path:
    """A model whose weights are its first ones and a little noise."""
    vae = build(config)
    shifted = {
        name: tensor + 0.002 * rng.normal(tensor.shape, rng.key("moved", name))
        for name, tensor in vae.state_dict().items()
    }
    write_safetensors(path, shifted, metadata=own_entries(vae.config))
    return path


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return weights_file(tmp_path_factory.mktemp("weights") / "small.safetensors", SMALL)


@pytest.fixture(scope="session")
def long_film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Takes longer than anybody waits here."""
    options = {"preset": "ultrafast"}
    path = tmp_path_factory.mktemp("film") / "b.mp4"
    return write_film(path, frames=1000, size=(16, 16), options=options)


@pytest.fixture
def reconstruct(weights: Path, tmp_path: Path) -> Callable[..., int]:
    """The command, into tmp_path/out."""

    def run(*words: object) -> int:
        flags = ["--checkpoint", str(weights), "--out", str(tmp_path / "out"), "--device", "cpu"]
        return main("reconstruct", [*map(str, words), *flags])

    return run


def files_in(out: Path) -> list[str]:
    """Names of all that is there, but for the lock."""
    return sorted(path.name for path in out.iterdir() if path.name != "lock")


def record(path: Path) -> dict[str, Any]:
    return json.loads(Path(f"{path}.json").read_text())


def full_pass(weights: Path, clip: Tensor) -> Tensor:
    """What the model makes of the whole clip at once. uint8 t h w 3."""
    vae = build(SMALL)
    vae.load_state_dict(load_file(weights))
    x = pad_size(to_model(clip.permute(3, 0, 1, 2)[None]), vae.geometry)
    missing = vae.geometry.padded_frames(len(clip)) - len(clip)
    x = torch.cat([x, *[x[:, :, -1:]] * missing], dim=2)
    with torch.no_grad():
        made = to_uint8(vae.decode(vae.encode(x).mode()))
    return made[0, :, : len(clip), : clip.shape[1], : clip.shape[2]].permute(1, 2, 3, 0)


def apart(one: Tensor, other: Tensor) -> int:
    """The largest difference of two uint8 tensors of one shape."""
    assert one.shape == other.shape
    return int((one.int() - other.int()).abs().max())


@pytest.mark.parametrize(("frames", "size"), [(1, (48, 64)), (2, (47, 33)), (21, (50, 40))])
def test_a_result_is_the_full_pass_and_its_record_measures_it(
    frames: int, size: tuple[int, int], reconstruct: Callable[..., int], weights: Path, tmp_path: Path
) -> None:
    source = write_film(tmp_path / "a.mkv", codec="ffv1", pixels="bgr0", frames=frames, size=size)
    assert reconstruct(source, "--codec", "ffv1", "--chunk", "8", "--side_by_side") == 0
    clip, made = in_order(source), in_order(tmp_path / "out" / "a.mkv")
    assert (
        apart(made, full_pass(weights, clip)) <= 1
    )  # a stream equals the full pass up to 1e-6: half a level
    beside = in_order(tmp_path / "out" / "a.side-by-side.mkv")
    assert torch.equal(beside, side_by_side(clip, made))
    found = record(tmp_path / "out" / "a.mkv")
    assert found["finished"]
    assert found["coding"]["exact"]
    assert found["psnr"] == pytest.approx(psnr(clip, made), rel=1e-12)
    assert found["ssim"] == pytest.approx(ssim(clip, made), rel=1e-12)
    each = [psnr(clip[i], made[i]) for i in range(frames)]
    assert found["worst_frame"] == {"number": each.index(min(each)), "psnr": min(each)}
    assert found["film"]["frames"] == frames


def test_rate_and_sound_are_those_of_the_video(reconstruct: Callable[..., int], tmp_path: Path) -> None:
    film = write_film(tmp_path / "silent.mp4", rate=Fraction(30000, 1001), frames=20)
    source = with_sound(film, tmp_path / "a.mp4", seconds=0.7)
    assert reconstruct(source) == 0
    made = open_film(tmp_path / "out" / "a.mp4")
    assert (made.frames, made.fps, made.times) == (20, Fraction(30000, 1001), None)
    before, after = (sound_packets(path) for path in (source, tmp_path / "out" / "a.mp4"))
    assert [packet for packet, _ in after] == [packet for packet, _ in before]


def test_a_turned_video_comes_out_upright(
    reconstruct: Callable[..., int], weights: Path, tmp_path: Path
) -> None:
    source = copy_packets(write_film(tmp_path / "a.mp4", frames=5), tmp_path / "b.mp4", rotation=90)
    assert reconstruct(source, "--codec", "ffv1") == 0
    clip = Decoder().read_frames(source, range(5))
    assert apart(in_order(tmp_path / "out" / "b.mkv"), full_pass(weights, clip)) <= 1


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.bmp"])
def test_a_picture_becomes_a_png(
    name: str, reconstruct: Callable[..., int], weights: Path, tmp_path: Path
) -> None:
    codec, pixels = {"png": ("png", "rgb24"), "jpg": ("mjpeg", "yuvj420p"), "bmp": ("bmp", "bgr24")}[name[2:]]
    source = write_film(tmp_path / name, codec=codec, pixels=pixels, frames=1, size=(35, 51))
    assert reconstruct(source, "--side_by_side") == 0
    clip, made = Decoder().read_frames(source, [0]), in_order(tmp_path / "out" / "a.png")
    assert apart(made, full_pass(weights, clip)) <= 1
    assert torch.equal(in_order(tmp_path / "out" / "a.side-by-side.png"), side_by_side(clip, made))


def test_tiles_and_chunks_leave_the_result_of_an_exact_model_as_it_is(
    reconstruct: Callable[..., int], weights: Path, tmp_path: Path
) -> None:
    source = write_film(tmp_path / "a.mkv", codec="ffv1", pixels="bgr0", frames=9, size=(96, 64))
    assert reconstruct(source, "--codec", "ffv1", "--tile", "64x32", "--chunk", "4") == 0
    assert record(tmp_path / "out" / "a.mkv")["coding"]["tile"] == [64, 32]
    assert apart(in_order(tmp_path / "out" / "a.mkv"), full_pass(weights, in_order(source))) <= 1


def test_a_model_that_can_not_stream_says_so_and_tells_its_seams(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blind = weights_file(tmp_path / "clip.safetensors", replace(SMALL, norm="clip", hidden_size=32))
    source = write_film(tmp_path / "a.mp4", frames=40, size=(16, 16))
    words = ["--checkpoint", str(blind), "--out", str(tmp_path / "out"), "--chunk", "17", "--device", "cpu"]
    assert main("reconstruct", [str(source), *words]) == 0
    found = record(tmp_path / "out" / "a.mp4")
    assert not found["coding"]["exact"]
    assert found["seams"]["decoder"]["time"]["mean"] > 0
    assert "warning: this model can't stream" in capsys.readouterr().err


def test_samples_depend_on_their_seed_and_not_on_chunks(
    reconstruct: Callable[..., int], tmp_path: Path
) -> None:
    source = write_film(tmp_path / "a.mkv", codec="ffv1", pixels="bgr0", frames=13)
    made: list[Tensor] = []
    for words in (("--chunk", 4), ("--chunk", 12), ("--seed", 7)):
        flags = ("--codec", "ffv1", "--latents", "sample", "--overwrite", *words)
        assert reconstruct(source, *flags) == 0
        made.append(in_order(tmp_path / "out" / "a.mkv"))
    assert apart(made[0], made[1]) <= 1
    assert apart(made[0], made[2]) > 1


def test_what_is_done_is_kept_and_what_changed_is_made_again_if_asked(
    reconstruct: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a", "b"):
        write_film(folder / f"{name}.mp4", frames=3)
    assert reconstruct(folder) == 0
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.*")}
    assert reconstruct(folder) == 0
    assert "0 reconstructed, 2 were there already" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.*")} == before

    write_film(folder / "b.mp4", frames=4)
    assert reconstruct(folder) == 2
    assert "b.mp4 is there already, and was made in another way" in capsys.readouterr().err
    assert reconstruct(folder, "--overwrite") == 0
    assert "1 reconstructed, 1 were there already" in capsys.readouterr().out
    assert open_film(tmp_path / "out" / "b.mp4").frames == 4
    assert reconstruct(folder, "--quality", 30) == 2


def test_a_file_of_somebody_else_is_not_replaced_unasked(
    reconstruct: Callable[..., int], tmp_path: Path
) -> None:
    source = write_film(tmp_path / "a.mp4", frames=3)
    (tmp_path / "out").mkdir()
    for name in ("a.mp4", "a.mp4.json"):
        (tmp_path / "out" / name).write_text("{}")
        assert reconstruct(source) == 2
        assert (tmp_path / "out" / name).read_text() == "{}"
        (tmp_path / "out" / name).unlink()


def test_broken_videos_are_a_line_each_and_the_others_are_made(
    reconstruct: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "in"
    count = len([path for path in broken_entries(folder).values() if os.path.lexists(path)])
    truncated(write_film(tmp_path / "long.mp4", frames=200), folder / "half.mp4", fraction=0.6)
    write_film(folder / "new\nline %03d.mp4", frames=3)
    assert reconstruct(folder) == 1
    told = capsys.readouterr()
    assert len([line for line in told.err.splitlines() if line.startswith("error: ")]) == count + 1
    assert f"1 reconstructed, {count + 1} can't be read" in told.out
    assert files_in(tmp_path / "out") == [
        "new\nline %03d.mp4",
        "new\nline %03d.mp4.json",
    ]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--tile", "big"), "--tile big: must be auto, off, or height x width"),
        (("--tile", "33x64"), "multiples of 8"),
        (("--memory", "lots"), "--memory lots: must be auto, or an amount"),
        (("--codec", "h265"), "--codec h265: must be one of"),
        (("--codec", "ffv1", "--quality", "3"), "it is lossless"),
        (("--quality", "52"), "--codec h264 has 0 (best) to 51"),
        (("--seed", "1"), "has no effect without --latents sample"),
        (("--side_by_sid", "True"), "did you mean --side_by_side"),
        (("--checkpoint", "nothing.pt"), "there is no such file or folder"),
        (("nothing.mp4",), "nothing.mp4: there is no such file or folder"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    words: tuple[str, ...], says: str, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_film(tmp_path / "a.mp4", frames=2)
    flags = ["--checkpoint", str(weights), "--out", str(tmp_path / "out"), *words]
    if words[0] != "nothing.mp4":
        flags = [str(source), *flags]
    assert main("reconstruct", flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line
    assert not (tmp_path / "out").exists() or files_in(tmp_path / "out") == []


def test_a_disk_that_refuses_is_one_line_and_leaves_no_half_file(
    reconstruct: Callable[..., int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = write_film(tmp_path / "a.mp4", frames=40)
    child = os.fork()
    if child == 0:
        status = PAST_THE_END
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))  # a write past it fails with EFBIG
        try:
            status = reconstruct(source, "--codec", "ffv1")
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    assert "can't be written: File too large" in capfd.readouterr().err
    assert files_in(tmp_path / "out") == []


def started(weights: Path, *words: object) -> subprocess.Popen[str]:
    """The command as a process of its own, stopped while it is writing a video."""
    flags = ["--checkpoint", str(weights), "--device", "cpu"]
    out = Path(str(words[-1]))
    process = subprocess.Popen(
        [*PROGRAM, "reconstruct", *map(str, words[:-1]), "--out", str(out), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    while True:
        while process.poll() is None and not list(out.glob(".*.partial")):
            time.sleep(0.001)
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        if list(out.glob(".*.partial")):
            return process
        process.send_signal(signal.SIGCONT)  # it was just done with one
        assert process.poll() is None, process.communicate()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_no_half_file(
    number: int, status: int, weights: Path, long_film: Path, tmp_path: Path
) -> None:
    process = started(weights, long_film, tmp_path / "out")
    process.send_signal(number)
    process.send_signal(signal.SIGCONT)
    _, errors = process.communicate()
    assert process.returncode == status, errors
    assert "Traceback" not in errors
    assert files_in(tmp_path / "out") == []


def test_a_folder_in_use_is_refused_and_after_a_kill_the_same_command_finishes(
    weights: Path,
    long_film: Path,
    reconstruct: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    write_film(folder / "a.mp4", frames=3)
    shutil.copy(long_film, folder / "b.mp4")
    assert reconstruct(folder / "a.mp4") == 0
    process = started(weights, folder, tmp_path / "out")
    assert reconstruct(folder) == 2
    assert f"in use by process {process.pid}" in capsys.readouterr().err
    process.kill()
    process.communicate()
    assert list((tmp_path / "out").glob(".*.partial"))
    assert reconstruct(folder) == 0
    assert "1 reconstructed, 1 were there already" in capsys.readouterr().out
    assert open_film(tmp_path / "out" / "b.mp4").frames == 1000
    assert files_in(tmp_path / "out") == [f"{name}.mp4{end}" for name in "ab" for end in ("", ".json")]


PEAK = """
import resource, sys
from causalvae.cli import main
status = main("reconstruct", sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
sys.exit(status)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_length_of_a_video(weights: Path, tmp_path: Path) -> None:
    peaks: list[int] = []
    for frames in (100, 800):
        source = write_film(tmp_path / f"{frames}.mp4", frames=frames, size=(32, 32))
        flags = ["--checkpoint", str(weights), "--out", str(tmp_path / "out"), "--device", "cpu"]
        done = subprocess.run(
            [sys.executable, "-c", PEAK, str(source), *flags, "--chunk", "16"],
            capture_output=True,
            text=True,
            check=True,
            env=ENVIRONMENT,
        )
        peaks.append(int(done.stdout.splitlines()[-1]))
        assert record(tmp_path / "out" / f"{frames}.mp4")["film"]["frames"] == frames
    assert peaks[1] < peaks[0] * 1.05
