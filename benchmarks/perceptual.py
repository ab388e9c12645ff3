"""Time and memory of a perceptual loss, forward and backward at the reconstruction. Prints a Markdown table.

    python benchmarks/perceptual.py [--networks lpips-vgg efficientnet-lite0] [--frames 8] [--sizes 64 256]
    [--at_once 8] [--repeats 5] [--threads 2]

LPIPS runs with weights of the right shapes that were never trained: they cost the same. Each case is a
process of its own, so that its peak of memory is its own; growth is the peak less what stood before the loss.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from causalvae import rng
from causalvae.critics.lpips import LPIPS, STAGES
from causalvae.losses import perceptual_loss
from causalvae.perceptual import Shelf, build_perceptual

MIB = 1024  # in KiB, the unit of ru_maxrss


def network(name: str) -> nn.Module:
    """A network by its name."""
    for backbone in STAGES:
        if name == f"lpips-{backbone}":
            made = LPIPS(backbone)
            for key, weight in made.state_dict().items():
                weight.copy_(rng.normal(weight.shape, rng.key(key)) * (2 / max(1, weight[0].numel())) ** 0.5)
            return made
    found, _ = build_perceptual(name, size=(64, 64), shelf=Shelf(home=Path("nowhere"), offline=True))
    assert found is not None
    return found.module


def measure(name: str, *, frames: int, size: int, at_once: int, repeats: int) -> tuple[float, float]:
    """Median milliseconds of forward and backward, and MiB of memory on top of what stood before."""
    metric = network(name)
    recon = (0.3 * rng.normal((1, 3, frames, size, size), 1)).requires_grad_()
    clip = 0.3 * rng.normal((1, 3, frames, size, size), 2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times = [once(recon, clip, metric=metric, at_once=at_once) for _ in range(repeats + 1)]
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return 1000 * statistics.median(times[1:]), (after - before) / MIB


def once(recon: Tensor, clip: Tensor, *, metric: nn.Module, at_once: int) -> float:
    """Seconds of one loss and its gradient. recon, clip: 1 3 t h w."""
    start = time.perf_counter()
    loss = perceptual_loss(recon, clip, metric=metric, frames_at_once=at_once)
    torch.autograd.grad(loss, recon)
    return time.perf_counter() - start


def main() -> None:
    """Measure each network at each size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--networks", nargs="+", default=["lpips-vgg", "lpips-alex", "lpips-squeeze", "efficientnet-lite0"]
    )
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--at_once", type=int, nargs="+", default=[8])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cases = [(n, s, a) for n in args.networks for s in args.sizes for a in args.at_once]
    if len(cases) == 1:
        name, size, at_once = cases[0]
        ms, mib = measure(name, frames=args.frames, size=size, at_once=at_once, repeats=args.repeats)
        sys.stdout.write(f"| {name} | {size}x{size} | {at_once} | {ms:.0f} | {mib:.0f} |\n")
        return
    sys.stdout.write(
        f"| network | {args.frames} frames of | at once | forward + backward, ms | memory, MiB |\n"
        "|---|---|---|---|---|\n"
    )
    sys.stdout.flush()
    for name, size, at_once in cases:
        common = [
            "--frames",
            str(args.frames),
            "--repeats",
            str(args.repeats),
            "--threads",
            str(args.threads),
        ]
        one = ["--networks", name, "--sizes", str(size), "--at_once", str(at_once)]
        subprocess.run([sys.executable, __file__, *common, *one], check=True)


if __name__ == "__main__":
    main()
