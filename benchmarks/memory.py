"""Predicted and measured memory of training steps, each in a process of its own. Prints a Markdown table.

    python benchmarks/memory.py [--threads 2] [--only conv]

Measured: the largest resident set of a fresh process that makes two steps, less its resident set after the
imports, with `machine.hand_back_memory` as in a tight run (--keep: as glibc does by itself). Predicted:
`train.predict`, from shapes alone. Needs Linux and measures the CPU; bf16 only where the CPU has it.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from causalvae import rng
from causalvae.losses import CriticKind, LossPlan, build_critic
from causalvae.machine import capability, hand_back_memory
from causalvae.models.build import build
from causalvae.models.presets import PRESETS, CausalVAEConfig
from causalvae.train.networks import lay_out
from causalvae.train.optim import build_optimizer
from causalvae.train.precision import Level, Precision, lower
from causalvae.train.predict import step_bytes
from causalvae.train.state import TrainState
from causalvae.train.step import train_step

MODELS = {
    "tiny": PRESETS["tiny"],
    "small": PRESETS["small"],
    "conv-32": CausalVAEConfig(hidden_size=32),
    "conv-clip": CausalVAEConfig(hidden_size=32, num_res_blocks=1, norm="clip"),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A step to be measured: model, critic (2d, 3d or none), clips, frames, side, parts, recomputation.

    level: O0 for fp32; the others in bf16.
    """

    model: str
    critic: str
    clips: int
    frames: int
    size: int
    parts: int = 1
    recompute: bool = False
    level: Level = "O0"

    @property
    def shape(self) -> tuple[int, ...]:
        """b 3 t h w of the batch."""
        return (self.clips, 3, self.frames, self.size, self.size)

    def __str__(self) -> str:
        numbers = "fp32" if self.level == "O0" else f"bf16 {self.level}"
        clips = f"{self.clips} x {self.frames} x {self.size} x {self.size}"
        recomputed = "blocks" if self.recompute else "none"
        return f"{self.model} | {numbers} | {self.critic} | {clips} | {self.parts} | {recomputed}"


CASES = [  # what two cores can do in minutes
    Case(model="tiny", critic="none", clips=4, frames=17, size=96),
    Case(model="tiny", critic="3d", clips=4, frames=17, size=96),
    Case(model="tiny", critic="2d", clips=2, frames=9, size=128),
    Case(model="tiny", critic="3d", clips=4, frames=17, size=96, parts=2),
    Case(model="tiny", critic="3d", clips=4, frames=17, size=96, parts=4, recompute=True),
    Case(model="tiny", critic="3d", clips=1, frames=1, size=32),
    Case(model="tiny", critic="none", clips=2, frames=17, size=128, recompute=True),
    Case(model="small", critic="3d", clips=2, frames=9, size=128),
    Case(model="small", critic="2d", clips=3, frames=5, size=64, parts=3),
    Case(model="small", critic="none", clips=4, frames=17, size=64, parts=2, recompute=True),
    Case(model="conv-32", critic="3d", clips=1, frames=9, size=64),
    Case(model="conv-32", critic="3d", clips=1, frames=17, size=96, recompute=True),
    Case(model="conv-32", critic="none", clips=2, frames=9, size=64, parts=2, recompute=True),
    Case(model="conv-32", critic="2d", clips=1, frames=1, size=128),
    Case(model="conv-clip", critic="3d", clips=2, frames=9, size=64),
    Case(model="conv-clip", critic="3d", clips=4, frames=9, size=96, parts=4, recompute=True),
    Case(model="tiny", critic="3d", clips=4, frames=17, size=96, level="O1"),
    Case(model="small", critic="3d", clips=2, frames=9, size=128, level="O2"),
    Case(model="conv-32", critic="3d", clips=1, frames=17, size=96, recompute=True, level="O2"),
    Case(model="conv-clip", critic="3d", clips=4, frames=9, size=96, parts=4, recompute=True, level="O2"),
]


def training(case: Case) -> TrainState:
    """A training as the trainer makes it."""
    vae = build(MODELS[case.model])
    lay_out(vae)
    kinds: dict[str, CriticKind] = {"2d": "patchgan2d", "3d": "patchgan3d"}
    critic = None if case.critic == "none" else build_critic(kinds[case.critic], base=1)
    ema = {name: p.detach().clone() for name, p in vae.named_parameters()}
    precision = Precision() if case.level == "O0" else Precision(name="bf16", level=case.level)
    masters = lower(vae, precision)
    critic_masters = lower(critic, precision) if critic is not None else None
    judged = (critic_masters or critic or nn.Identity()).named_parameters()
    how = {"kind": "adamw", "lr": 1e-4}
    return TrainState(
        vae=vae,
        ema=ema,
        critic=critic,
        logvar=nn.Parameter(torch.zeros(()), requires_grad=False),
        optimizer=build_optimizer((masters or vae).named_parameters(), **how),
        critic_optimizer=build_optimizer(judged, **how) if critic is not None else None,
        masters=masters,
        critic_masters=critic_masters,
    )


def measure(case: Case, *, steps: int = 2) -> int:
    """Bytes that a training of this case takes above this process before it. Meant for a fresh process."""
    before = resident("VmRSS")
    state = training(case)
    state.vae.set_recompute(on=case.recompute)
    clip = rng.normal(case.shape, 1).contiguous(memory_format=torch.channels_last_3d)
    noise = rng.normal((case.clips, *state.vae.geometry.latent_shape(*case.shape[2:])), 2)
    judge = "hinge" if state.critic is not None else None
    for _ in range(steps):
        train_step(state, clip, noise, loss=LossPlan(), critic_loss=judge, parts=case.parts)
    return resident("VmHWM") - before


def resident(name: str) -> int:
    """Bytes of this process: VmRSS now, or VmHWM at most so far (ru_maxrss would start from the parent's)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{name}:")[1].split()[0]) * 1024


def predict(case: Case) -> int:
    """Bytes from shapes alone."""
    state = training(case)
    return step_bytes(state, shape=case.shape, parts=case.parts, recompute=case.recompute).peak


def main() -> None:
    """Measure and predict every case and print the table, or measure one case and print its bytes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default="", help="cases whose line has these words")
    parser.add_argument("--keep", action="store_true", help="let glibc keep memory that is freed")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.case:
        assert args.keep or hand_back_memory(), "needs glibc"
        print(measure(Case(**json.loads(args.case))))
        return
    able = capability("cpu", os.environ, names=("bf16",))
    print(
        "| model | numbers | critic | clips | parts | recomputed | predicted, MiB | measured, MiB | error |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for case in (case for case in CASES if args.only in str(case)):
        if case.level != "O0" and "bf16" in able.missing:
            print(f"{case}: not measured: {able.missing['bf16']}")
            continue
        command = [
            sys.executable,
            __file__,
            "--threads",
            str(args.threads),
            *(["--keep"] if args.keep else []),
        ]
        command += ["--case", json.dumps(asdict(case))]
        measured = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        predicted = predict(case)
        error = predicted / measured - 1
        print(
            f"| {case} | {predicted / 2**20:.0f} | {measured / 2**20:.0f} | {100 * error:+.1f} % |",
            flush=True,
        )


if __name__ == "__main__":
    main()
