"""What jit_level costs and gains: seconds to compile, and time per step against eager, as a Markdown table.

    python benchmarks/compile.py [--levels O1 O2] [--cases tiny block] [--repeats 7] [--threads 2]

tiny: a whole step of the preset `tiny` with critic, 4 clips. block: forward and backward of one residual
block of the published kind, norm over frames. Nothing is taken from a cache. Compiled and eager steps take
turns within one process, so that a noisy machine disturbs both alike.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache

from causalvae import rng
from causalvae.losses import LossPlan, build_critic
from causalvae.models.build import build
from causalvae.models.layers import ResnetBlock
from causalvae.models.presets import PRESETS
from causalvae.train.compiling import JitLevel, compile_blocks
from causalvae.train.networks import lay_out
from causalvae.train.optim import build_optimizer
from causalvae.train.state import TrainState
from causalvae.train.step import train_step

Network = tuple[nn.Module, Callable[[], Tensor]]  # and its step, which returns a result to compare


@dataclass(frozen=True)
class Measured:
    """Seconds, and the largest difference of the first result relative to its largest value."""

    first: float
    compiled: list[float]
    eager: list[float]
    difference: float


def tiny_step() -> Network:
    """A training of the preset tiny from its seeded start."""
    vae = build(PRESETS["tiny"])
    lay_out(vae)
    critic = build_critic("patchgan3d", base=1)
    optimizers = [build_optimizer(net.named_parameters(), kind="adamw", lr=1e-4) for net in (vae, critic)]
    ema = {name: p.detach().clone() for name, p in vae.named_parameters()}
    logvar = nn.Parameter(torch.zeros(()), requires_grad=False)
    state = TrainState(vae, ema, critic, logvar, optimizers[0], optimizers[1])
    clip = 0.5 * rng.normal((4, 3, 9, 64, 64), 1)
    clip = clip.contiguous(memory_format=torch.channels_last_3d)
    noise = rng.normal((4, *vae.geometry.latent_shape(9, 64, 64)), 2)

    def step() -> Tensor:
        train_step(state, clip, noise, loss=LossPlan(), critic_loss="hinge", ema_decay=0.999)
        return torch.cat([p.detach().flatten() for p in vae.parameters()])

    return vae, step


def block_step() -> Network:
    """A residual block of 128 channels on 1 clip of 5 x 32 x 32."""
    block = ResnetBlock(128, 128, norm="frame")
    with torch.no_grad():
        for i, parameter in enumerate(block.parameters()):
            parameter.copy_(0.02 * rng.normal(parameter.shape, i) + (1.0 if parameter.ndim == 1 else 0.0))
    lay_out(block)
    x = rng.normal((1, 128, 5, 32, 32), 1).contiguous(memory_format=torch.channels_last_3d)
    x.requires_grad_()

    def step() -> Tensor:
        block.zero_grad()
        y = block(x)
        y.square().mean().backward()
        return y.detach()

    return nn.Sequential(block), step


CASES = {"tiny": tiny_step, "block": block_step}


def measure(case: str, level: JitLevel, *, repeats: int) -> Measured:
    """First and later steps of a compiled network and an eager one in turn."""
    eager_net, eager_step = CASES[case]()
    net, step = CASES[case]()
    with fresh_cache():
        for warning in compile_blocks(net, level):
            raise SystemExit(warning)
        started = time.perf_counter()
        result = step()
        first = time.perf_counter() - started
        expected = eager_step()
        difference = float((result - expected).abs().max() / expected.abs().max())
        compiled, eager = [], []
        for _ in range(repeats):
            started = time.perf_counter()
            step()
            middle = time.perf_counter()
            eager_step()
            compiled.append(middle - started)
            eager.append(time.perf_counter() - middle)
    del eager_net
    return Measured(first, compiled, eager, difference)


def main() -> None:
    """Measure every case at every level."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--levels", nargs="+", default=["O1", "O2"], choices=("O1", "O2"))
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=sorted(CASES))
    for name, default in (("repeats", 7), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print("| case | level | compile, s | eager step, ms | compiled, ms | ratio | pays after | difference |")
    print("|---|---|---|---|---|---|---|---|")
    for case in args.cases:
        for level in args.levels:
            print_row(case, level, measure(case, level, repeats=args.repeats))


def print_row(case: str, level: str, measured: Measured) -> None:
    """One line of the table. Ratio: median of pairs."""
    eager, compiled = statistics.median(measured.eager), statistics.median(measured.compiled)
    ratio = statistics.median(c / e for c, e in zip(measured.compiled, measured.eager, strict=True))
    compiling = measured.first - compiled
    pays = f"{compiling / (eager - compiled):,.0f}" if ratio < 1 and compiled < eager else "never"
    print(
        f"| {case} | {level} | {compiling:.0f} | {eager * 1e3:.0f} | {compiled * 1e3:.0f} | {ratio:.2f} "
        f"| {pays} | {measured.difference:.0e} |"
    )


if __name__ == "__main__":
    main()
