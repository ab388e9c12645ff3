"""Streams, tiles and windows: memory and time against the full pass. Prints Markdown tables.

    python benchmarks/stream.py [--threads 1] [--only length|memory|halo]

length: peak memory and time by the number of frames, as a stream, in windows, and as a whole. memory:
predicted (`coding.coding_bytes`) and measured. halo: work that exact tiles add, from shapes. Every
measurement is a process of its own: the largest resident set while it codes, less the resident set with the
model made. Needs Linux and measures the CPU.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from causalvae import rng
from causalvae.coders import Coder, CodingPlan, decoder, encoder
from causalvae.coding import coding_bytes, extra_work, plan_coding
from causalvae.machine import hand_back_memory
from causalvae.models.build import Model, build, skeleton
from causalvae.models.meta import on_meta
from causalvae.models.presets import PRESETS, CausalVAEConfig, WFVAEConfig

TINY, CONV = PRESETS["tiny"], CausalVAEConfig(hidden_size=32)
MODELS = {
    "tiny": TINY,
    "small": PRESETS["small"],
    "conv-32": CONV,
    "conv-32-clip": replace(CONV, norm="clip"),
    "wfvae-32": WFVAEConfig(base_channels=32, encoder_energy=32, decoder_energy=32),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is measured. how: stream, windows or whole. tile: in pixels, 0 for whole frames. chunk: frames."""

    model: str
    how: str
    frames: int
    height: int
    width: int
    tile: int = 0
    chunk: int = 8

    def plan(self, vae: Model) -> CodingPlan:
        """The plan of a stream or of windows; the full pass has none."""
        tile = (self.tile, self.tile) if self.tile else "off"
        plan = plan_coding(
            vae, height=self.height, width=self.width, tile=tile, budget=None, chunk=self.chunk
        )
        windows = self.how == "windows" and plan.window is None
        return replace(plan, chunk=24, window=33, shared=9) if windows else plan


SMALL = Case(model="tiny", how="stream", frames=32, height=128, width=128, chunk=16)
LENGTHS = [
    *(replace(SMALL, frames=n) for n in (32, 256, 2048)),
    replace(SMALL, frames=256, chunk=32),
    *(replace(SMALL, how="windows", frames=n) for n in (32, 256)),
    *(replace(SMALL, how="whole", frames=n) for n in (32, 256)),
]
MEMORY = [
    Case(model="tiny", how="stream", frames=32, height=256, width=256),
    Case(model="tiny", how="stream", frames=28, height=512, width=512, tile=256),
    Case(model="tiny", how="stream", frames=28, height=512, width=512, tile=128),
    Case(model="tiny", how="stream", frames=16, height=768, width=768),
    Case(model="tiny", how="stream", frames=16, height=768, width=768, tile=256),
    Case(model="small", how="stream", frames=28, height=256, width=384),
    Case(model="conv-32", how="stream", frames=28, height=128, width=192),
    Case(model="conv-32", how="stream", frames=28, height=256, width=256, tile=128),
    Case(model="conv-32-clip", how="windows", frames=57, height=128, width=128),
    Case(model="conv-32-clip", how="windows", frames=57, height=128, width=192, tile=96),
    Case(model="wfvae-32", how="stream", frames=28, height=256, width=256),
    Case(model="wfvae-32", how="stream", frames=28, height=256, width=256, tile=128),
]


@torch.inference_mode()
def measure(case: Case) -> dict[str, float]:
    """Bytes, and seconds of CPU, of encoding and decoding. Meant for a fresh process."""
    vae = build(MODELS[case.model]).eval().requires_grad_(False)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the largest resident set starts again
    start = time.process_time()
    work(case, vae)
    return {"bytes": resident("VmHWM") - before, "seconds": time.process_time() - start}


def work(case: Case, vae: Model) -> None:
    """Encode the clip, and decode a latent of its size."""
    geometry = vae.geometry
    if case.how == "whole":
        x = torch.cat(list(pieces(case, geometry.padded_frames(case.frames))), dim=2)
        mean = vae.encode(x).mean
        del x
        vae.decode(mean)
        return
    plan = case.plan(vae)
    run(encoder(vae, plan), pieces(case, case.frames))
    count = geometry.latent_frames(case.frames)
    latent = rng.normal((1, *geometry.latent_shape(case.frames, case.height, case.width)), 2)
    step = case.chunk // geometry.temporal
    run(decoder(vae, plan), (latent[:, :, i : i + step] for i in range(0, count, step)))


def run(coder: Coder[object], clip: Iterator[Tensor]) -> None:
    """Everything through a coder, of which nothing is kept."""
    for piece in clip:
        coder.push(piece)
    coder.close()


def pieces(case: Case, frames: int) -> Iterator[Tensor]:
    """The clip, made as it is asked for."""
    for start in range(0, frames, case.chunk):
        yield rng.normal((1, 3, min(case.chunk, frames - start), case.height, case.width), start)


def resident(name: str) -> int:
    """Bytes of this process: VmRSS now, or VmHWM at most since it was cleared."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{name}:")[1].split()[0]) * 1024


def apart(case: Case, *, threads: int) -> dict[str, float]:
    """A measurement in a process of its own."""
    command = [sys.executable, __file__, "--threads", str(threads), "--case", json.dumps(asdict(case))]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def length_table(*, threads: int) -> None:
    """Memory and time by the number of frames."""
    print("| way | chunk | frames | peak, MiB | CPU, s | frames per s of it |\n|---|---|---|---|---|---|")
    for case in LENGTHS:
        found = apart(case, threads=threads)
        speed = case.frames / found["seconds"]
        peak, seconds = found["bytes"] / 2**20, found["seconds"]
        chunk = {"stream": str(case.chunk), "windows": "33"}.get(case.how, "all")
        print(
            f"| {case.how} | {chunk} | {case.frames} | {peak:.1f} | {seconds:.1f} | {speed:.1f} |", flush=True
        )


def memory_table(*, threads: int) -> None:
    """Predicted and measured memory."""
    print("| model | way | frame | tile | predicted, MiB | measured, MiB | error |")
    print("|---|---|---|---|---|---|---|")
    for case in MEMORY:
        twin = on_meta(build(MODELS[case.model]))
        predicted = coding_bytes(twin, case.plan(twin), size=(case.height, case.width))
        measured = apart(case, threads=threads)["bytes"]
        print(
            f"| {case.model} | {case.how} | {case.height}x{case.width} | {case.tile or 'none'} | "
            f"{predicted / 2**20:.0f} | {measured / 2**20:.0f} | {100 * (predicted / measured - 1):+.0f} % |",
            flush=True,
        )


def halo_table() -> None:
    """Work that exact tiles add, in percent of that of whole frames."""
    tiles, sizes = (128, 256, 512, 1024), ((1080, 1920), (2160, 3840))
    print(f"| model | frame | {' | '.join(f'tiles of {t}' for t in tiles)} |\n|---|---|{'---|' * len(tiles)}")
    for name in ("tiny", "small", "swift-488", "wfvae-8"):
        twin = skeleton(PRESETS[name])
        for size in sizes:
            plans = (CodingPlan(chunk=4, tile=(tile, tile)) for tile in tiles)
            added = [extra_work(twin, plan, size=size) or 0.0 for plan in plans]
            print(f"| {name} | {size[0]}x{size[1]} | {' | '.join(f'{100 * a:.1f} %' for a in added)} |")


def main() -> None:
    """Print the tables, or measure one case and print it as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=("length", "memory", "halo"))
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.case:
        assert hand_back_memory(), "needs glibc"
        print(json.dumps(measure(Case(**json.loads(args.case)))))
        return
    if args.only in (None, "length"):
        length_table(threads=args.threads)
    if args.only in (None, "memory"):
        memory_table(threads=args.threads)
    if args.only in (None, "halo"):
        halo_table()


if __name__ == "__main__":
    main()
