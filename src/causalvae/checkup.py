"""What a machine has of all that this tool can use: looked at once, and kept as data for `doctor`.

Nothing is installed, fetched or changed. What a compiler makes goes where torch keeps such things.
"""

import os
import platform
import resource
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import av
import torch
from av.codec import Codec
from av.codec.codec import UnknownCodecError

from causalvae.machine import (
    Capability,
    Machine,
    TorchFacts,
    capability,
    free_disk_bytes,
    free_memory_bytes,
    home,
    torch_facts,
)
from causalvae.perceptual import EFFICIENTNET, EFFICIENTNET_PACKAGE, Published, Shelf
from causalvae.train.compiling import compiler_problem

DECODERS = ("h264", "hevc", "vp9", "av1", "mpeg4")
ENCODERS = ("libx264", "ffv1")
EXTRAS = {  # of pyproject.toml, and the modules that each brings
    "tensorboard": ("tensorboard",),
    "diffusers": ("diffusers",),
    "onnx": ("onnx", "onnxruntime", "onnxscript"),
    "report": ("jinja2", "plotly"),
    "adamw8bit": ("bitsandbytes",),
}
OPTIONAL = {EFFICIENTNET: (EFFICIENTNET_PACKAGE,)}  # in no extra


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One device of CUDA. Sizes in bytes."""

    name: str
    total_bytes: int
    free_bytes: int
    able: Capability


@dataclass(frozen=True, kw_only=True)
class Checkup:
    """All that `doctor` judges by. None is what the system does not tell; sizes are in bytes.

    compilers: by device, why nothing can be compiled for it. descriptors: files that a process may have open,
    and the most it may ask for. disks: free space, by place. decoders, encoders, packages, weights: what is
    missing, by extra and by network. home: where things are kept, with what keeps it from being written.
    """

    python: str
    pyav: str
    machine: Machine
    torch: TorchFacts
    cudnn: int | None
    cpu: Capability
    gpus: tuple[Gpu, ...]
    mps: bool
    free_bytes: int | None
    threads_asked: str | None
    compilers: Mapping[str, str | None]
    descriptors: tuple[int, int]
    disks: Mapping[str, int]
    decoders: tuple[str, ...]
    encoders: tuple[str, ...]
    packages: Mapping[str, tuple[str, ...]]
    weights: Mapping[str, tuple[str, ...]]
    home: str
    home_problem: str | None
    offline: bool


def examine(variables: Mapping[str, str]) -> Checkup:
    """Look at this machine. It takes some seconds: a small function is compiled, convolutions are timed.

    variables: the environment.
    """
    shelf, place = Shelf.of(variables), home(variables)
    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    return Checkup(
        python=platform.python_version(),
        pyav=av.__version__,
        machine=Machine.look(),
        torch=torch_facts(),
        cudnn=torch.backends.cudnn.version(),
        cpu=capability("cpu", variables),
        gpus=tuple(_gpu(device, variables) for device in devices[1:]),
        mps=torch.backends.mps.is_available(),
        free_bytes=free_memory_bytes(),
        threads_asked=variables.get("OMP_NUM_THREADS"),
        compilers={str(device): compiler_problem(device) for device in devices[:2]},
        descriptors=resource.getrlimit(resource.RLIMIT_NOFILE),
        disks={str(path): free_disk_bytes(path) for path in dict.fromkeys((Path.cwd(), place))},
        decoders=_missing(DECODERS, "r"),
        encoders=_missing(ENCODERS, "w"),
        packages={name: _not_installed(modules) for name, modules in (EXTRAS | OPTIONAL).items()},
        weights={f"lpips-{name}": _not_there(shelf, files) for name, files in shelf.published.items()},
        home=str(place),
        home_problem=_unwritable(place),
        offline=shelf.offline,
    )


def _gpu(device: torch.device, variables: Mapping[str, str]) -> Gpu:
    free, total = torch.cuda.mem_get_info(device)
    able = capability(str(device), variables)
    return Gpu(name=torch.cuda.get_device_name(device), total_bytes=total, free_bytes=free, able=able)


def _missing(names: Sequence[str], mode: Literal["r", "w"]) -> tuple[str, ...]:
    """Codecs that this PyAV has not. mode: r to decode, w to encode."""
    return tuple(name for name in names if not _has(name, mode))


def _has(name: str, mode: Literal["r", "w"]) -> bool:
    try:
        Codec(name, mode)
    except UnknownCodecError:
        return False
    return True


def _not_installed(modules: Sequence[str]) -> tuple[str, ...]:
    return tuple(name for name in modules if find_spec(name) is None)


def _not_there(shelf: Shelf, files: Sequence[Published]) -> tuple[str, ...]:
    """Names of the files of a network that would have to be fetched."""
    return tuple(file.file for file in files if not (shelf.home / "lpips" / file.file).is_file())


def _unwritable(place: Path) -> str | None:
    """What keeps a folder from being written, or made; None if nothing does."""
    there = next(each for each in (place.absolute(), *place.absolute().parents) if each.exists())
    if not there.is_dir():
        return f"{there} is no folder"
    return None if os.access(there, os.W_OK | os.X_OK) else f"{there} can't be written to"
