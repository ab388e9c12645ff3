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

    On a GPU peak_bytes is what torch had allocated at once, weights included; on the CPU of Linux it is how
    far the process's resident memory rose during the calls, which is coarse under some tens of MiB.
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
    start_bytes = _forget_peak(device)
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        wait(device, result=call())
        seconds.append(time.perf_counter() - begin)
    median = sorted(seconds)[len(seconds) // 2]
    peak = _peak_bytes(device)
    measured = None if peak is None or start_bytes is None else max(0, peak - start_bytes)
    return Cost(seconds=median, clips_per_second=clips / median, peak_bytes=measured)


def wait(device: torch.device, *, result: Tensor) -> None:
    """Until a result is there: work on accelerators is only started by a call."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type != "cpu":
        result.sum().item()


def _forget_peak(device: torch.device) -> int | None:
    """Start measuring the peak of memory. What to subtract from it; None where it can't be measured."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return 0
    if device.type != "cpu" or not sys.platform.startswith("linux"):
        return None
    try:
        (PROCESS / "clear_refs").write_text(FORGET_PEAK)
    except OSError:  # not allowed in some containers
        return None
    return _status_bytes("VmRSS")


def _peak_bytes(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type != "cpu" or not sys.platform.startswith("linux"):
        return None
    return _status_bytes("VmHWM")


def _status_bytes(name: str) -> int | None:
    """A number of the process's status file, which has kB."""
    for line in (PROCESS / "status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    return None
