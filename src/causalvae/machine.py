"""What this machine has: cores, memory, CPU, disk, and through torch its devices. Torch is imported late.

Limits of containers count: where a cgroup or an affinity mask gives less than the hardware has, that is told.
"""

import ctypes
import os
import platform
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from causalvae.errors import ConfigError

if TYPE_CHECKING:
    import torch

BF16_FLAGS = ("avx512_bf16", "amx_bf16", "avx_ne_convert", "bf16")  # the last is that of ARM
CPU_FLAGS = ("avx2", "avx512f", *BF16_FLAGS)  # that decide what a CPU is fast at
ASSUME_BF16 = (
    "CAUSALVAE_ASSUME_BF16"  # 1: compute in bf16 even where the probe says no, for tests and experts
)
SLOWEST = 1.25  # time of bf16 over that of fp32 above which a CPU counts as having none
CGROUP = Path("/sys/fs/cgroup")
M_MMAP_THRESHOLD = -3  # of mallopt, from malloc.h
SMALLEST_MAPPED_BYTES = 1 << 20  # blocks from here on are mapped one by one, and unmapped when freed
SHARE_OF_FREE = 0.85  # of free memory: predictions are off by up to 15 %
UNLIMITED_BYTES = 1 << 60  # cgroup v1 writes a number above this for no limit
ENVIRONMENT = (  # names of the environment that may be written into a run; nothing else of it ever is
    ASSUME_BF16, "CUDA_VISIBLE_DEVICES", "LOCAL_RANK", "MKL_NUM_THREADS", "OMP_NUM_THREADS",
    "ONEDNN_MAX_CPU_ISA", "RANK", "SLURM_JOB_ID", "SLURM_NODELIST", "WORLD_SIZE",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a process may use here. None is what this system does not tell; sizes are in bytes."""

    system: str
    cores: int
    memory_bytes: int | None
    cpu: str
    cpu_flags: tuple[str, ...]
    shm_bytes: int | None

    @classmethod
    def look(cls) -> "Machine":
        """Look at the machine, without torch."""
        name, flags = _cpu()
        shm = Path("/dev/shm")
        return cls(
            system=f"{platform.system()} {platform.release()}",
            cores=_cores(),
            memory_bytes=_memory_bytes(),
            cpu=name,
            cpu_flags=flags,
            shm_bytes=shutil.disk_usage(shm).free if shm.is_dir() else None,
        )


@dataclass(frozen=True, kw_only=True)
class TorchFacts:
    """What torch says: its version, its CPU threads and the kernels that it picks, and the GPUs it sees."""

    version: str
    threads: int
    cpu_capability: str
    gpus: tuple[str, ...]
    cuda_version: str | None


def torch_facts() -> TorchFacts:
    """Facts that need torch, which takes a second to import."""
    import torch

    gpus = tuple(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return TorchFacts(
        version=torch.__version__,
        threads=torch.get_num_threads(),
        cpu_capability=torch.backends.cpu.get_cpu_capability(),
        gpus=gpus,
        cuda_version=torch.version.cuda,
    )


@dataclass(frozen=True, kw_only=True)
class Capability:
    """What a device can do with numbers of 16 bits: for bf16 and fp16, why not, and what there is to say.

    missing: reasons, of those that it has not. remarks: of those that it has, with something against them.
    """

    missing: Mapping[str, str] = field(default_factory=dict)
    remarks: Mapping[str, str] = field(default_factory=dict)


def capability(
    device: str, variables: Mapping[str, str], *, names: Sequence[str] = ("bf16", "fp16")
) -> Capability:
    """Try what this device can do with these numbers; those not asked for count as there.

    variables: the environment, which may assume bf16.
    """
    import torch

    kind = torch.device(device).type
    missing = {name: why for name in names if (why := _why_not(name, device)) is not None}
    remarks: dict[str, str] = {}
    if "bf16" in missing and variables.get(ASSUME_BF16) == "1":
        remarks["bf16"] = f"{missing.pop('bf16')}; it is used because {ASSUME_BF16} says so, and may be slow"
    if kind == "cpu" and "fp16" in names and "fp16" not in missing:
        ratio = _time_ratio(torch.float16, side=8)  # small: without hardware it is slow
        if ratio > SLOWEST:
            remarks["fp16"] = f"fp16 takes {ratio:.1f} times as long as fp32 on this CPU"
    return Capability(missing=missing, remarks=remarks)


def _why_not(name: str, device: str) -> str | None:
    """Why a device has no bf16 or fp16, None if it has. A GPU is asked; a CPU's flags and a timing decide."""
    import torch

    kind, numbers = torch.device(device).type, {"bf16": torch.bfloat16, "fp16": torch.float16}[name]
    if kind == "cuda":
        with torch.cuda.device(device):
            has = name == "fp16" or torch.cuda.is_bf16_supported(including_emulation=False)
        return None if has else f"{torch.cuda.get_device_name(device)} has no {name} (A100 and later have)"
    if not _convolves(device, numbers):
        return f"torch {torch.__version__} can't train a 3D convolution in {name} on {kind}"
    if kind != "cpu" or name == "fp16":
        return None
    if not set(BF16_FLAGS) & set(_cpu()[1]):
        return f"this CPU has no bf16 (none of {', '.join(BF16_FLAGS)})"
    ratio = _time_ratio(numbers, side=32)
    return f"bf16 takes {ratio:.1f} times as long as fp32 on this CPU" if ratio > SLOWEST else None


def _convolves(device: str, numbers: "torch.dtype") -> bool:
    """Whether a 3D convolution and its backward pass give finite numbers.

    On a CPU without the weight's gradient, which is never asked for there: `models.convolution` says why.
    """
    import torch

    x = torch.linspace(-1, 1, 8 * 3 * 6 * 6, device=device).view(1, 8, 3, 6, 6).to(numbers).requires_grad_()
    weight = torch.linspace(-1, 1, 8 * 8 * 27, device=device).view(8, 8, 3, 3, 3).to(numbers)
    try:
        y = torch.conv3d(x, weight.requires_grad_(), padding=1)
        wanted = (x,) if y.device.type == "cpu" else (x, weight)
        grads = torch.autograd.grad(y, wanted, torch.ones_like(y))
    except RuntimeError:
        return False
    return all(bool(torch.isfinite(tensor).all()) for tensor in (y, *grads))


def _time_ratio(numbers: "torch.dtype", *, side: int) -> float:
    """Time of a convolution, its gradients and a matrix product, over that in fp32; on the CPU.

    The weight's gradient is that of a 2D convolution, as in training. side: height and width of the frames.
    """
    import torch

    def seconds(kind: torch.dtype) -> float:
        x, weight = torch.full((1, 64, 4, side, side), 0.1), torch.full((64, 64, 3, 3, 3), 0.1)
        x, weight = x.to(kind).requires_grad_(), weight.to(kind)
        square = torch.full((8 * side, 8 * side), 0.1).to(kind)
        started = time.perf_counter()
        y = torch.conv3d(x, weight, padding=1)
        torch.autograd.grad(y, x, torch.ones_like(y))
        frames, kernel = x.detach()[0].transpose(0, 1), weight[:, :, 0].requires_grad_()  # t c h w, c' c 3 3
        y = torch.conv2d(frames, kernel, padding=1)
        torch.autograd.grad(y, kernel, torch.ones_like(y))
        _ = square @ square
        return time.perf_counter() - started

    kinds = (torch.float32, numbers)
    times = [[seconds(kind) for kind in kinds] for _ in range(4)][1:]  # the first has to make its kernels
    return min(low for _, low in times) / min(full for full, _ in times)


def home(variables: Mapping[str, str]) -> Path:
    """Where things are kept between runs: CAUSALVAE_HOME, or ~/.cache/causalvae."""
    return Path(variables.get("CAUSALVAE_HOME") or Path.home() / ".cache" / "causalvae")


def pick_device(name: str) -> str:
    """The device behind `--device`: `auto` takes a GPU if there is one. ConfigError if it isn't here."""
    import torch

    present = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if name == "auto":
        return next(kind for kind in ("cuda", "mps", "cpu") if present[kind])
    kind, _, index = name.partition(":")
    if kind not in present or (index and not (index.isascii() and index.isdigit())):
        raise ConfigError(f"--device {name!r}: must be auto, cpu, cuda, cuda:1 or mps")
    if int(index or 0) >= present[kind]:
        seen = ", ".join(f"{device} ({count})" for device, count in present.items() if count)
        raise ConfigError(f"--device {name}: not on this machine; torch sees {seen}. Use --device auto")
    return name


def available_bytes(device: str) -> int | None:
    """Memory that a training may take on a device such as `cpu` or `cuda:1`; None where it is not told."""
    import torch

    place = torch.device(device)
    if place.type == "cuda":
        idle = torch.cuda.memory_reserved(place) - torch.cuda.memory_allocated(place)
        return int((torch.cuda.mem_get_info(place)[0] + idle) * SHARE_OF_FREE)
    free = free_memory_bytes() if place.type == "cpu" else None
    return None if free is None else int(free * SHARE_OF_FREE)


def amount(num_bytes: float) -> str:
    """A size for people: GiB, or MiB where there is less than one."""
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"


def free_memory_bytes() -> int | None:
    """Main memory that this process could still get: without swapping, within the limits of its cgroups."""
    facts = {line.partition(":")[0]: line.split() for line in _lines(Path("/proc/meminfo"))}
    free = [int(facts["MemAvailable"][1]) * 1024] if "MemAvailable" in facts else []
    for group in _own_groups():
        new, old = CGROUP / group, CGROUP / "memory" / group
        free += _left(
            new / "memory.max", new / "memory.current", cache=(new / "memory.stat", "inactive_file")
        )
        usage = old / "memory.usage_in_bytes"
        free += _left(
            old / "memory.limit_in_bytes", usage, cache=(old / "memory.stat", "total_inactive_file")
        )
    return max(0, min(free)) if free else None


def hand_back_memory() -> bool:
    """From now on, main memory that is freed goes back to the system at once. False where that can't be set.

    glibc learns to keep blocks of up to 32 MiB, in pieces that do not fit what comes next: steps of small
    tensors were measured to take up to twice the bytes that are alive. Page faults cost 20 to 40 % of time,
    with huge pages 5 to 20 %. It holds for the whole process.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    return bool(ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, SMALLEST_MAPPED_BYTES))


def free_disk_bytes(path: Path) -> int:
    """Free bytes where this path is or will be."""
    return shutil.disk_usage(next(each for each in (path, *path.absolute().parents) if each.exists())).free


def environment(variables: Mapping[str, str]) -> dict[str, str]:
    """The variables that may be written down, by an allow-list."""
    return {name: variables[name] for name in ENVIRONMENT if name in variables}


def _cores() -> int:
    """Cores that this process may use: its affinity, and the share of time that its cgroup has."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    new = _words(CGROUP / "cpu.max")  # version 2: quota and period
    old = [word for name in ("quota", "period") for word in _words(CGROUP / "cpu" / f"cpu.cfs_{name}_us")]
    limits = [int(pair[0]) // int(pair[1]) for pair in (new, old) if len(pair) == 2 and pair[0].isdigit()]
    return max(1, min(cores, *limits)) if limits else cores


def _memory_bytes() -> int | None:
    """The least of the machine's memory and the limits of the cgroups that this process is in."""
    limits: list[int] = []
    if "SC_PHYS_PAGES" in os.sysconf_names:
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for group in _own_groups():
        words = _words(CGROUP / group / "memory.max")
        words += _words(CGROUP / "memory" / group / "memory.limit_in_bytes")
        limits += [int(word) for word in words if word.isdigit() and int(word) < UNLIMITED_BYTES]
    return min(limits, default=None)


def _own_groups() -> list[str]:
    """The root and the cgroups that this process is in, as paths without a slash in front."""
    own = [line.split(":", 2)[2] for line in _lines(Path("/proc/self/cgroup")) if line.count(":") >= 2]
    return sorted({group.strip("/") for group in ["/", *own]})


def _left(limit: Path, usage: Path, *, cache: tuple[Path, str]) -> list[int]:
    """Bytes that a limit leaves, cached files counted as free; nothing where there is no limit."""
    numbers = [int(word) for word in (*_words(limit), *_words(usage)) if word.isdigit()]
    if len(numbers) < 2 or numbers[0] >= UNLIMITED_BYTES:
        return []
    kept = [int(line.split()[1]) for line in _lines(cache[0]) if line.split()[:1] == [cache[1]]]
    return [numbers[0] - numbers[1] + sum(kept)]


def _cpu() -> tuple[str, tuple[str, ...]]:
    """Name of the CPU and which of CPU_FLAGS it has."""
    facts: dict[str, str] = {}
    for line in _lines(Path("/proc/cpuinfo")):
        name, _, value = line.partition(":")
        facts.setdefault(name.strip(), value.strip())
    found = (facts.get("flags") or facts.get("Features", "")).split()  # Features: as ARM has it
    name = facts.get("model name") or platform.processor() or platform.machine()
    return name, tuple(flag for flag in CPU_FLAGS if flag in found)


def _lines(path: Path) -> list[str]:
    """Lines of a small file of the system; none where the system has no such file."""
    try:
        return path.read_text(errors="replace").splitlines()
    except OSError:
        return []


def _words(path: Path) -> list[str]:
    return " ".join(_lines(path)).split()
