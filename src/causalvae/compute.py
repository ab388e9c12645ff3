"""What a network costs: parameters, operations, time and memory, measured by running it."""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

PROCESS = Path("/proc/self")  # of Linux
FORGET_PEAK = "5"  # written to clear_refs, sets the peak of resident memory to what is resident now


@dataclass(frozen=True)
class Cost:
    """Of one call. seconds: median over repeats. peak_bytes: None where it can't be measured.

    On a GPU peak_bytes is what torch had allocated at once; on the CPU of Linux it is the largest resident
    memory of the whole process during the calls, libraries included. Both include the weights.
    """

    seconds: float
    clips_per_second: float
    peak_bytes: int | None


def num_parameters(network: nn.Module) -> int:
    """Values of all parameters, shared ones once."""
    return sum(parameter.numel() for parameter in network.parameters())


@torch.no_grad()
def flops(call: Callable[[], object]) -> int:
    """Operations of a call: of convolutions, matrix products and attention, 2 per multiply-add.

    What torch.utils.flop_counter counts; norms, activations and resampling are not in it.
    """
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@torch.no_grad()
def cost(call: Callable[[], Tensor], *, clips: int, device: torch.device, repeats: int = 3) -> Cost:
    """Time and memory of a call on some clips, after one call that is not counted."""
    wait(device, result=call())
    measurable = _forget_peak(device)
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        wait(device, result=call())
        seconds.append(time.perf_counter() - begin)
    median = sorted(seconds)[len(seconds) // 2]
    peak = _peak_bytes(device) if measurable else None
    return Cost(seconds=median, clips_per_second=clips / median, peak_bytes=peak)


def wait(device: torch.device, *, result: Tensor) -> None:
    """Until a result is there: work on accelerators is only started by a call."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type != "cpu":
        result.sum().item()


def _forget_peak(device: torch.device) -> bool:
    """Start measuring the peak of memory. False where it can't be measured."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    if device.type != "cpu" or not sys.platform.startswith("linux"):
        return False
    try:
        (PROCESS / "clear_refs").write_text(FORGET_PEAK)
    except OSError:  # not allowed in some containers
        return False
    return True


def _peak_bytes(device: torch.device) -> int | None:
    """The peak since it was forgotten; on the CPU by the process's status file, which has kB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    for line in (PROCESS / "status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None
