"""Time and memory of a training step, against the plain order of work. Prints a Markdown table.

    python benchmarks/step.py [--model tiny] [--batch_size 4] [--frames 9] [--size 64] [--repeats 7]
    [--threads 2]

Plain: the autoencoder runs forward for the generator and again for the critic, the loss keeps its graph, the
adaptive weight takes two autograd calls through losses and critic, AdamW is not fused, nearest upsampling is
not folded. Both do the
same arithmetic: the table's last line is the largest difference of a weight after one step of each.
Each order of work is timed in turn within one process, so that a noisy machine disturbs both alike.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor, nn

from causalvae import rng
from causalvae.losses import LossPlan, build_critic, critic_loss, generator_loss, kl_loss
from causalvae.models.build import build
from causalvae.models.presets import PRESETS
from causalvae.train.networks import lay_out
from causalvae.train.optim import build_optimizer
from causalvae.train.state import TrainState
from causalvae.train.step import train_step
from causalvae.video import crop_frames, pad_frames

LOSS = LossPlan()
LEARNING_RATE = 1e-4


@dataclass
class Clock:
    """Seconds by phase, summed."""

    seconds: dict[str, float] = field(default_factory=dict)
    since: float = 0.0

    def start(self) -> None:
        """A phase begins."""
        self.since = time.perf_counter()

    def stop(self, phase: str) -> None:
        """It ends; the next begins."""
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self.since
        self.since = now


def new_state(model: str, *, fused: bool) -> TrainState:
    """A training from the seeded start."""
    vae = build(PRESETS[model])
    lay_out(vae)
    critic = build_critic("patchgan3d", base=1)
    if fused:
        optimizers = [
            build_optimizer(net.named_parameters(), kind="adamw", lr=LEARNING_RATE) for net in (vae, critic)
        ]
    else:
        optimizers = [plain_adamw(net) for net in (vae, critic)]
    ema = {name: p.detach().clone() for name, p in vae.named_parameters()}
    logvar = nn.Parameter(torch.zeros(()), requires_grad=False)
    return TrainState(vae, ema, critic, logvar, optimizers[0], optimizers[1])


def plain_adamw(net: nn.Module) -> torch.optim.Optimizer:
    """The same rule, one tensor after the other, as torch does by default on a CPU."""
    groups = [
        {"params": [p for p in net.parameters() if p.ndim >= 2], "weight_decay": 0.01},
        {"params": [p for p in net.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE)


def plain_step(state: TrainState, clip: Tensor, noise: Tensor, clock: Clock) -> None:
    """One update by the plain order of work."""
    vae, critic, values = state.vae, state.critic, clip[0, :, 0].numel()
    assert critic is not None
    assert state.critic_optimizer is not None
    frames = clip.shape[2]
    clock.start()
    recon, posterior = vae(pad_frames(clip, vae.geometry), noise)
    recon = crop_frames(recon, frames)
    clock.stop("forward")
    nll = (recon - clip).abs().mean()
    g = generator_loss(critic(recon))
    last = vae.last_layer.get_parameter("weight")
    nll_norm = torch.autograd.grad(nll, last, retain_graph=True)[0].norm()
    g_norm = torch.autograd.grad(g, last, retain_graph=True)[0].norm()
    weight = LOSS.disc_weight * (nll_norm / (g_norm + 1e-4)).clamp(0, 1e4 / values)
    kl = kl_loss(posterior.kl(), values_per_frame=values, num_clips=len(clip))
    clock.stop("losses")
    (nll + LOSS.kl_weight * kl + weight * g).backward()
    clock.stop("backward")
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.step += 1
    state.update_ema(0.999)
    clock.stop("update")
    critic.zero_grad()
    with torch.no_grad():
        again, _ = vae(pad_frames(clip, vae.geometry), noise)
    critic_loss(critic(clip), critic(crop_frames(again, frames)), kind="hinge").backward()
    state.critic_optimizer.step()
    state.critic_optimizer.zero_grad()
    clock.stop("critic")


def our_step(state: TrainState, clip: Tensor, noise: Tensor) -> None:
    """One update as the trainer makes it."""
    train_step(state, clip, noise, loss=LOSS, critic_loss="hinge", ema_decay=0.999)


def phases_of_ours(state: TrainState, clip: Tensor, noise: Tensor) -> dict[str, float]:
    """Seconds of one step by phase, from the profiler's marks around the functions of train.step."""
    from torch.profiler import ProfilerActivity, profile, record_function

    module = import_module("causalvae.train.step")
    names = {
        "_forward": "forward",
        "_answer": "losses",
        "_backward": "backward",
        "_update": "update",
        "_critic_update": "critic",
    }

    def marked(function: Callable[..., object], label: str) -> Callable[..., object]:
        def run(*args: object, **kwargs: object) -> object:
            with record_function(label):
                return function(*args, **kwargs)

        return run

    originals = {name: getattr(module, name) for name in names}
    for name, label in names.items():
        setattr(module, name, marked(originals[name], label))
    try:
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            our_step(state, clip, noise)
    finally:
        for name, function in originals.items():
            setattr(module, name, function)
    return {e.key: e.cpu_time_total / 1e6 for e in profiled.key_averages() if e.key in names.values()}


def peak_mib(arguments: list[str]) -> float:
    """Peak resident memory of a fresh process that makes two steps in one order of work."""
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def main() -> None:
    """Time both orders of work in turn, then measure the memory of each in a process of its own."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny", choices=sorted(PRESETS))
    for name, default in (("batch_size", 4), ("frames", 9), ("size", 64), ("repeats", 7), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--memory_of", choices=("ours", "plain"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    states = {"plain": new_state(args.model, fused=False), "ours": new_state(args.model, fused=True)}
    vae = states["ours"].vae
    clip = 0.5 * rng.normal((args.batch_size, 3, args.frames, args.size, args.size), 1)
    clip = clip.contiguous(memory_format=torch.channels_last_3d)
    noise = rng.normal((args.batch_size, *vae.geometry.latent_shape(args.frames, args.size, args.size)), 2)
    if args.memory_of:
        for _ in range(2):
            if args.memory_of == "ours":
                our_step(states["ours"], clip, noise)
            else:
                plain_step(states["plain"], clip, noise, Clock())
        status = Path(
            "/proc/self/status"
        ).read_text()  # ru_maxrss would be that of the parent, if it was higher
        print(int(status.split("VmHWM:")[1].split()[0]) / 1024)
        return
    plain_step(states["plain"], clip, noise, Clock())
    our_step(states["ours"], clip, noise)
    pairs = zip(states["plain"].vae.parameters(), states["ours"].vae.parameters(), strict=True)
    difference = max(float((a - b).detach().abs().max()) for a, b in pairs)
    times: dict[str, list[float]] = {"plain": [], "ours": []}
    clock = Clock()
    for _ in range(args.repeats):
        started = time.perf_counter()
        plain_step(states["plain"], clip, noise, clock)
        middle = time.perf_counter()
        our_step(states["ours"], clip, noise)
        times["plain"].append(middle - started)
        times["ours"].append(time.perf_counter() - middle)
    ours = phases_of_ours(states["ours"], clip, noise)
    given = sys.argv[1:]
    memory = {name: peak_mib([*given, "--memory_of", name]) for name in times}
    print_table(times, {k: v / args.repeats for k, v in clock.seconds.items()}, ours, memory, difference)


def print_table(
    times: dict[str, list[float]],
    plain: dict[str, float],
    ours: dict[str, float],
    memory: dict[str, float],
    difference: float,
) -> None:
    """Milliseconds by phase, the ratio of medians, memory and the difference of the results."""
    print("| | plain order | ours |\n|---|---|---|")
    for phase in ("forward", "losses", "backward", "update", "critic"):
        print(f"| {phase}, ms | {plain[phase] * 1e3:.0f} | {ours.get(phase, 0.0) * 1e3:.0f} |")
    middle = {name: statistics.median(values) for name, values in times.items()}
    ratio = statistics.median(b / a for a, b in zip(times["plain"], times["ours"], strict=True))
    print(f"| **step, ms** (median) | {middle['plain'] * 1e3:.0f} | {middle['ours'] * 1e3:.0f} |")
    print(f"| **ratio** (median of pairs) | 1 | {ratio:.2f} |")
    print(f"| peak memory, MiB | {memory['plain']:.0f} | {memory['ours']:.0f} |")
    print(f"| largest difference of a weight after one step | 0 | {difference:.1e} |")


if __name__ == "__main__":
    main()
