"""Memory and frames per second of `causalvae reconstruct` by the length of a video, and what overlap saves.

    python benchmarks/reconstruct.py [--minutes 1 10 60] [--threads 1]

First table: a test picture of 48x48 at 25 frames a second, with a tone, through a very small model, each
length in a process of its own: the peak is of everything, from Python to the encoder. Second table: the parts
of the work one after the other and all at once, for a real clip and the preset `tiny`.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import av.error
import torch
from av.filter import Graph

from causalvae.coders import CodingPlan, decoder, encoder
from causalvae.data.codings import CODECS
from causalvae.data.films import open_film, read_pieces
from causalvae.data.sources import CLIPS
from causalvae.data.writer import film_writer
from causalvae.models.build import Model, build
from causalvae.models.presets import PRESETS, CausalVAEConfig
from causalvae.reconstruction import Fidelity, Manner, reconstruct_film
from causalvae.targets import Target
from causalvae.video import pad_size, to_model
from causalvae.weights.read import own_entries
from causalvae.weights.tensorfiles import write_safetensors

SIZE, RATE = 48, 25
SMALL = CausalVAEConfig(
    hidden_size=16,
    hidden_size_mult=(1, 1, 1),
    num_res_blocks=1,
    norm="channel",
    stem=4,
    spatial_levels=(0,),
    temporal_levels=(0, 1),
    attention=False,
)
CHUNK = 16


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Memory and speed of reconstruct.")
    parser.add_argument("--minutes", nargs="*", type=int, default=[1, 10, 60])
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    vae = build(SMALL)
    print(f"{os.cpu_count()} cores, {asked.threads} threads of torch, PyAV {av.__version__}\n")
    print("| minutes | frames | peak, MiB | frames/s |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "small.safetensors"
        write_safetensors(weights, vae.state_dict(), metadata=own_entries(vae.config))
        for minutes in asked.minutes:
            source = _test_film(Path(folder) / f"{minutes}.mp4", seconds=minutes * 60)
            peak, seconds = _in_a_process(source, weights, threads=asked.threads)
            frames = open_film(source).frames
            cells = [str(minutes), f"{frames:,}", f"{peak / 2**20:.0f}", f"{frames / seconds:.0f}"]
            print("| " + " | ".join(cells) + " |", flush=True)
        _overlap(Path(folder))


def _test_film(path: Path, *, seconds: int) -> Path:
    """FFmpeg's test picture, in which a clock runs, with a tone. Made frame by frame."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"preset": "ultrafast", "g": "50"})
        tone = container.add_stream("aac", rate=16000)
        assert isinstance(stream, av.VideoStream)
        assert isinstance(tone, av.AudioStream)
        stream.height = stream.width = SIZE
        tone.layout = "mono"
        sounds = _pulled("sine", f"r=16000:d={seconds}", sink="abuffersink")
        for picture in _pulled("testsrc", f"s={SIZE}x{SIZE}:r={RATE}:d={seconds}", sink="buffersink"):
            assert isinstance(picture, av.VideoFrame)
            container.mux(stream.encode(picture.reformat(format="yuv420p")))
            for sound in sounds:
                assert isinstance(sound, av.AudioFrame)
                container.mux(tone.encode(sound))
                if (sound.time or 0.0) >= (picture.time or 0.0):
                    break
        container.mux(stream.encode())
        container.mux(tone.encode())
    return path


def _pulled(source: str, options: str, *, sink: str) -> Iterator[object]:
    """What a source of FFmpeg's filters makes."""
    graph = Graph()
    made, end = graph.add(source, options), graph.add(sink)
    made.link_to(end)
    graph.configure()
    while True:
        try:
            yield graph.pull()
        except av.error.EOFError:
            return


def _in_a_process(source: Path, weights: Path, *, threads: int) -> tuple[int, float]:
    """Peak in bytes and seconds of the command."""
    words = [sys.executable, "-c", "from causalvae.cli import run; run()", "reconstruct", str(source)]
    words += ["--checkpoint", str(weights), "--out", str(source.parent / "out"), "--device", "cpu"]
    begun = time.monotonic()
    quiet = (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)
    variables = os.environ | {"OMP_NUM_THREADS": str(threads)}
    child = os.posix_spawn(sys.executable, words, variables, file_actions=[quiet])
    _, status, usage = os.wait4(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    return usage.ru_maxrss * 1024, time.monotonic() - begun


def _overlap(folder: Path) -> None:
    """The parts of the work by themselves, and together."""
    vae, film = build(PRESETS["tiny"]).eval(), open_film(CLIPS / "bunny.webm")
    plan = CodingPlan(chunk=CHUNK)
    target = Target(
        id="bunny",
        path=film.path,
        file=folder / "b.mp4",
        side=None,
        record=folder / "b.json",
        is_picture=False,
    )
    pieces = list(read_pieces(film, frames=CHUNK))

    def write() -> None:
        size, fidelity = (film.height, film.width), Fidelity()
        with film_writer(target.file, film, size=size, coding=CODECS["h264"], quality=None) as writer:
            for piece in pieces:
                fidelity.add(piece, piece)
                writer.push(piece)

    def together() -> None:
        reconstruct_film(film, target, vae=vae, plan=plan, manner=Manner(), advance=lambda more: None)  # noqa: ARG005

    print("\n| part | seconds | of a core |\n|---|---|---|")
    seconds = {
        "decoding": _seconds(lambda: list(read_pieces(film, frames=CHUNK))),
        "the model": _seconds(lambda: _model_alone(vae, plan, pieces)),
        "measuring and writing": _seconds(write),
    }
    seconds["one after the other"] = tuple(sum(each) for each in zip(*seconds.values(), strict=True))
    seconds["at once, as it is done"] = _seconds(together)
    for name, each in seconds.items():
        print(f"| {name} | {each[0]:.1f} | {each[1]:.1f} |", flush=True)


@torch.inference_mode()
def _model_alone(vae: Model, plan: CodingPlan, pieces: list[torch.Tensor]) -> None:
    encodes, decodes = encoder(vae, plan), decoder(vae, plan)
    for piece in pieces:
        x = to_model(piece.permute(3, 0, 1, 2)[None].contiguous())
        posterior = encodes.push(pad_size(x, vae.geometry))
        if posterior is not None:
            decodes.push(posterior.mode())
    posterior = encodes.close()
    if posterior is not None:
        decodes.push(posterior.mode())
    decodes.close()


def _seconds(work: Callable[[], object]) -> tuple[float, ...]:
    """On the clock, and of processor time."""
    clock, processor = time.monotonic(), time.process_time()
    work()
    return time.monotonic() - clock, time.process_time() - processor


if __name__ == "__main__":
    main()
