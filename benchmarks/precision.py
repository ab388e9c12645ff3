"""Time per step and PSNR at equal steps by precision and level. Prints a Markdown table.

    python benchmarks/precision.py [--model small] [--batch_size 2] [--frames 9] [--size 64] [--steps 40]
    [--seeds 1] [--lr 5e-4] [--threads 2] [--device cpu] [--assume]

Every row trains from the same seeded start on the same bundled clips, without a critic, whose game with the
autoencoder would hide small differences of PSNR. The rate falls to 0 along a line, so that the end is not
one more step of a restless path. Steps of all rows take turns, so that a noisy machine disturbs them alike; a
time is the median after the first two steps, a PSNR that of the last weights on clips of the same set, the
mean over --seeds trainings, with the standard error of its difference from fp32. A precision that the device
lacks is named and not measured: emulated numbers say nothing about time. --assume measures it all the same
and marks the row, to compare PSNR.
"""

import argparse
import os
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from causalvae import rng
from causalvae.data.clips import ClipPlan, center_clip
from causalvae.data.sources import open_source
from causalvae.losses import LossPlan
from causalvae.machine import ASSUME_BF16, Machine, capability, home
from causalvae.models.build import build
from causalvae.models.presets import PRESETS
from causalvae.train.convolutions import check_convolutions, shapes_of_run
from causalvae.train.networks import lay_out
from causalvae.train.optim import LossScale, build_optimizer
from causalvae.train.precision import Level, Precision, PrecisionName, lower
from causalvae.train.state import TrainState
from causalvae.train.step import train_step
from causalvae.video import to_model, to_unit

ROWS: tuple[tuple[PrecisionName, Level], ...] = (
    ("fp32", "O0"), ("bf16", "O1"), ("bf16", "O2"), ("bf16", "O3"), ("fp16", "O2"),
)  # fmt: skip
UNTIMED = 2  # steps that make kernels and allocate moments


@dataclass
class Row:
    """One training and what was measured of it."""

    precision: Precision
    state: TrainState = field(init=False)  # of the seed at hand
    seconds: list[float] = field(default_factory=list)
    psnrs: list[float] = field(default_factory=list)  # of each seed
    skipped: int = 0


def training(precision: Precision, args: argparse.Namespace, clip: Tensor, *, seed: int) -> TrainState:
    """A training from a seeded start, with what the convolution check lets compute in low precision."""
    vae = build(PRESETS[args.model], seed=seed).to(args.device)
    lay_out(vae)
    keep: frozenset[str] = frozenset()
    if args.device == "cpu" and precision.name != "fp32":
        shapes = shapes_of_run(vae, None, geometry=vae.geometry, clips=clip.shape, parts=1)
        checked = check_convolutions(
            shapes,
            numbers=precision.numbers,
            cache=home(os.environ) / "convolutions.json",
            cpu=Machine.look().cpu,
            variables=os.environ,
        )
        if seed == 0:
            print(f"{precision.name} {precision.level}: {checked.message}")
        keep = frozenset(name.removeprefix("vae.") for name in checked.keep)
    masters = lower(vae, precision, keep=keep)
    logvar = nn.Parameter(torch.zeros((), device=args.device), requires_grad=False)
    optimizer = build_optimizer((masters or vae).named_parameters(), kind="adamw", lr=args.lr)
    scale = LossScale(2.0**16, 1000) if precision.name == "fp16" else None
    return TrainState(vae, {}, None, logvar, optimizer, None, masters=masters, scale=scale)


def clips_of(args: argparse.Namespace) -> Tensor:
    """Bundled clips cropped at the centre: uint8 n 3 t h w."""
    source = open_source("sample:")
    plan = ClipPlan(frames=args.frames, size=(args.size, args.size), stride=1, batch=1, seed=0)
    return torch.stack([center_clip(source[i], plan) for i in range(len(source))])


def make_step(row: Row, clip: Tensor, noise: Tensor) -> None:
    """One timed update."""
    started = time.perf_counter()
    result = train_step(row.state, clip, noise, loss=LossPlan(), critic_loss=None)
    if clip.device.type == "cuda":
        torch.cuda.synchronize()
    row.seconds.append(time.perf_counter() - started)
    row.skipped += not result.applied


@torch.no_grad()
def psnr(row: Row, x: Tensor) -> float:
    """dB over all pixels of the clips x: n 3 t h w in [-1, 1]; in [0, 1] the largest value is 1."""
    recon, _ = row.state.vae(x, None)
    return -10 * float(torch.log10((to_unit(recon) - to_unit(x)).square().mean()))


def main() -> None:
    """Train all rows side by side and print what came of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="small", choices=sorted(PRESETS))
    for name, default in (
        ("batch_size", 2),
        ("frames", 9),
        ("size", 64),
        ("steps", 40),
        ("seeds", 1),
        ("threads", 2),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--assume", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    names = tuple(dict.fromkeys(name for name, _ in ROWS if name != "fp32"))
    found = capability(args.device, {**os.environ, ASSUME_BF16: str(int(args.assume))}, names=names)
    pixels = clips_of(args).to(args.device)
    x = to_model(pixels).contiguous(memory_format=torch.channels_last_3d)
    rows: list[Row] = []
    for name, level in ROWS:
        reason = found.missing.get(name) or (None if args.assume else found.remarks.get(name))
        if reason is None:
            rows.append(Row(Precision.of(name, level, device=args.device, capability=found)))
        else:
            print(f"{name} {level}: not measured: {reason}")
    for seed in range(args.seeds):
        for row in rows:
            row.state = training(row.precision, args, x[: args.batch_size], seed=seed)
        train(rows, x, args, seed=seed)
    print_table(rows, found.remarks)


def train(rows: list[Row], x: Tensor, args: argparse.Namespace, *, seed: int) -> None:
    """All rows on the same batches with the same noise, step by step. x: n 3 t h w in [-1, 1]."""
    geometry = rows[0].state.vae.geometry
    for step in range(args.steps):
        picked = [(step * args.batch_size + i) % len(x) for i in range(args.batch_size)]
        shape = (len(picked), *geometry.latent_shape(*x.shape[2:]))
        noise = rng.normal(shape, rng.key("benchmark", seed, step)).to(args.device)
        for row in rows:
            for group in row.state.optimizer.param_groups:
                group["lr"] = args.lr * (1 - step / args.steps)
            make_step(row, x[picked].contiguous(memory_format=torch.channels_last_3d), noise)
    for row in rows:
        row.psnrs.append(psnr(row, x))


def print_table(rows: list[Row], remarks: Mapping[str, str]) -> None:
    """Milliseconds, ratio to fp32, and PSNR with its difference."""
    print("\n| precision | step, ms | of fp32 | PSNR, dB | above fp32 | skipped |\n|---|---|---|---|---|---|")
    for row in rows:
        timed = [one / two for one, two in zip(row.seconds, rows[0].seconds, strict=True)][UNTIMED:]
        name, level, quality = row.precision.name, row.precision.level, statistics.mean(row.psnrs)
        apart = [one - two for one, two in zip(row.psnrs, rows[0].psnrs, strict=True)]
        error = f" +- {statistics.stdev(apart) / len(apart) ** 0.5:.2f}" if len(apart) > 1 else ""
        mark = ", emulated" if name in remarks else ""
        print(
            f"| {name} {level}{mark} | {statistics.median(row.seconds[UNTIMED:]) * 1e3:.0f} "
            f"| {statistics.median(timed):.2f} | {quality:.2f} | {statistics.mean(apart):+.2f}{error} "
            f"| {row.skipped} |"
        )


if __name__ == "__main__":
    main()
