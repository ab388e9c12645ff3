"""What this machine has: cores, memory, CPU, disk, and through torch its devices. Torch is imported late.

Limits of containers count: where a cgroup or an affinity mask gives less than the hardware has, that is told.
"""

import os
import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from causalvae.errors import ConfigError

CPU_FLAGS = (
    "avx2",
    "avx512f",
    "avx512_bf16",
    "amx_bf16",
)  # that decide what a CPU is fast at
CGROUP = Path("/sys/fs/cgroup")
UNLIMITED_BYTES = 1 << 60  # cgroup v1 writes a number above this for no limit
ENVIRONMENT = (  # names of the environment that may be written into a run; nothing else of it ever is
    "CUDA_VISIBLE_DEVICES", "LOCAL_RANK", "MKL_NUM_THREADS", "OMP_NUM_THREADS", "ONEDNN_MAX_CPU_ISA", "RANK",
    "SLURM_JOB_ID", "SLURM_NODELIST", "WORLD_SIZE",
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
    own = [line.split(":", 2)[2] for line in _lines(Path("/proc/self/cgroup")) if line.count(":") >= 2]
    for group in (group.strip("/") for group in ["/", *own]):
        words = _words(CGROUP / group / "memory.max")
        words += _words(CGROUP / "memory" / group / "memory.limit_in_bytes")
        limits += [int(word) for word in words if word.isdigit() and int(word) < UNLIMITED_BYTES]
    return min(limits, default=None)


def _cpu() -> tuple[str, tuple[str, ...]]:
    """Name of the CPU and which of CPU_FLAGS it has."""
    facts: dict[str, str] = {}
    for line in _lines(Path("/proc/cpuinfo")):
        name, _, value = line.partition(":")
        facts.setdefault(name.strip(), value.strip())
    found = facts.get("flags", "").split()
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
