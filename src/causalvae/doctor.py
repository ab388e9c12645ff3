"""`causalvae doctor`: what this machine can do, as findings with remedies, and whether a command would fit.

A Checkup is data, and `doctor` judges it; sentences are in `lang/doctor.*.yaml`. What is said of a training
command is what `explain` finds where the command meets the machine.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from causalvae.checkup import DECODERS, ENCODERS, EXTRAS, OPTIONAL, Checkup
from causalvae.commandlines import read_command
from causalvae.explain import as_json, explain
from causalvae.findings import Finding, of_settings
from causalvae.flags import printable
from causalvae.machine import Capability, amount
from causalvae.machinefindings import GIB
from causalvae.texts import Language, texts

LEAST_TORCH = (2, 10)  # as pyproject.toml has it
AVOIDS_CUDNN, GOOD_CUDNN = (2, 9), 91500  # from 2.9 on, torch goes round cuDNN before 9.15: its issue 166643
WRONG_TORCH_ON_AMX = (2, 13)  # train.convolutions has what was seen
LOW_MEMORY, LOW_DISK, FULL_DISK = 2 * GIB, 10 * GIB, GIB
LOW_SHARED = GIB
FEW_FILES, TOO_FEW_FILES, FILES = 1024, 128, 65536
WIDTH = 8  # columns of the level

Json = Mapping[str, Any]  # Any: JSON


@dataclass(frozen=True)
class Line:
    """One finding in words. level: ok, note or problem."""

    id: str
    level: str
    what: str
    remedy: str | None


def doctor(seen: Checkup) -> list[Finding]:
    """What a machine can do: programs, cores, memory, devices, compiler, disk, videos, extras."""
    return [
        *chain(_programs(seen), _cores(seen), _memory(seen), _devices(seen), _numbers(seen)),
        *chain(_compilers(seen), _system(seen), _videos(seen), _extras(seen), _kept(seen)),
    ]


def in_words(findings: Sequence[Finding], lang: Language) -> list[Line]:
    """Findings as sentences, each on one line and fit to be shown."""
    says = texts("doctor", lang)
    lines: list[Line] = []
    for each in findings:
        values = {name: printable(value) for name, value in each.values.items()}
        if "gives" in values:
            values["gives"] = says[f"gives.{values['gives']}"]
        remedy = says.get(f"{each.id}.do")
        told = None if remedy is None else remedy.format_map(values)
        lines.append(Line(each.id, each.level, says[each.id].format_map(values), told))
    return lines


def of_training(command: Sequence[str], lang: Language, *, measure: bool) -> tuple[list[Line], Json]:
    """Whether a training command would fit here, how it would be planned, and how fast it would be.

    The words are those of `explain`, without what follows from the flags alone and is no problem. measure: as
    there. Returns its numbers too. ConfigError if it is no training command.
    """
    explanation = explain(read_command(command), measure=measure)
    whole: Json = json.loads(as_json(explanation, lang))
    alone = {each.id for each in of_settings(explanation.case) if each.level != "problem"}
    nothing = texts("explain", lang)["ui.nothing"]
    lines = [
        Line(
            id=each["id"],
            level=_level(each),
            what=each["why"],
            remedy=None if each["do"] == nothing else each["do"],
        )
        for each in whole["findings"]
        if each["id"] not in alone
    ]
    return lines, whole["numbers"]


def _level(finding: Json) -> str:
    """A level of `explain` as one of ours: what fits is OK."""
    if finding["id"] == "memory-fits":
        return "ok"
    return "problem" if finding["level"] == "problem" else "note"


def as_text(parts: Mapping[str, Sequence[Line]], lang: Language) -> str:
    """Lines under their headings for a terminal. parts: by `machine` and `command`."""
    says = texts("doctor", lang)
    blocks: list[str] = []
    for name, lines in parts.items():
        rows = [says[f"ui.{name}"]]
        for line in lines:
            rows.append(f"  {_padded(says[f'ui.{line.level}'])} {line.what}")
            rows += [] if line.remedy is None or line.level == "ok" else [f"  {' ' * WIDTH} -> {line.remedy}"]
        blocks.append("\n".join(rows) + "\n")
    every = [line.level for lines in parts.values() for line in lines]
    counts = {f"{level}s": every.count(level) for level in ("problem", "note")}
    return "\n".join(blocks) + "\n" + says["ui.count"].format_map(counts) + "\n"


def as_object(parts: Mapping[str, Sequence[Line]]) -> dict[str, list[Json]]:
    """The lines as JSON, by `machine` and `command`; what has no remedy has none."""
    return {
        name: [{k: v for k, v in vars(line).items() if v is not None} for line in lines]
        for name, lines in parts.items()
    }


def _padded(word: str) -> str:
    """The word as wide as every level; a Chinese character has two columns."""
    return word + " " * (WIDTH - sum(1 if c.isascii() else 2 for c in word))


def _ok(name: str, values: Mapping[str, object]) -> Finding:
    return Finding(name, "ok", (), {key: str(value) for key, value in values.items()})


def _note(name: str, values: Mapping[str, object]) -> Finding:
    return Finding(name, "note", (), {key: str(value) for key, value in values.items()})


def _problem(name: str, values: Mapping[str, object]) -> Finding:
    return Finding(name, "problem", (), {key: str(value) for key, value in values.items()})


def _version(text: str) -> tuple[int, ...]:
    """The first two numbers of a version such as 2.13.0+cpu."""
    return tuple(int(number) for number in re.findall(r"[0-9]+", text)[:2])


def _programs(seen: Checkup) -> Iterator[Finding]:
    values = {"python": seen.python, "torch": seen.torch.version, "pyav": seen.pyav}
    yield _ok("versions", {**values, "system": seen.machine.system})
    if _version(seen.torch.version) < LEAST_TORCH:
        yield _problem("torch-old", {**values, "least": ".".join(map(str, LEAST_TORCH))})


def _cores(seen: Checkup) -> Iterator[Finding]:
    cores, threads = seen.machine.cores, seen.torch.threads
    values = {"cpu": seen.machine.cpu, "cores": cores, "threads": threads, "asked": seen.threads_asked}
    yield _ok("cpu", values)
    if threads > cores:
        yield _note("threads-many", values)
    elif 2 * threads <= cores and seen.threads_asked is not None:
        yield _note("threads-few", values)


def _memory(seen: Checkup) -> Iterator[Finding]:
    free, total = seen.free_bytes, seen.machine.memory_bytes
    if free is None:
        yield _note("memory-unknown", {})
        return
    values = {"free": amount(free), "total": amount(total or free)}
    yield _problem("memory-low", values) if free < LOW_MEMORY else _ok("memory", values)


def _devices(seen: Checkup) -> Iterator[Finding]:
    for number, gpu in enumerate(seen.gpus):
        values = {"device": f"cuda:{number}", "name": gpu.name}
        values |= {"free": amount(gpu.free_bytes), "total": amount(gpu.total_bytes)}
        yield _note("gpu-used", values) if 2 * gpu.free_bytes < gpu.total_bytes else _ok("gpu", values)
    if seen.mps:
        yield _ok("mps", {})
    elif not seen.gpus:
        yield _note("gpu-not-built" if seen.torch.cuda_version is None else "gpu-none", {})
    if (
        seen.gpus
        and seen.cudnn is not None
        and seen.cudnn < GOOD_CUDNN
        and _version(seen.torch.version) >= (2, 9)
    ):
        number = seen.cudnn
        version = f"{number // 10000}.{number // 100 % 100}.{number % 100}"
        cuda = (seen.torch.cuda_version or "").split(".")[0]
        yield _problem("cudnn-old", {"cudnn": version, "torch": seen.torch.version, "cuda": cuda})


def _numbers(seen: Checkup) -> Iterator[Finding]:
    """bf16 and fp16 of every device, by the probes of `machine.capability`."""
    yield from _bits("cpu", seen.cpu)
    for number, gpu in enumerate(seen.gpus):
        yield from _bits(f"cuda:{number}", gpu.able)
    amx = "amx_bf16" in seen.machine.cpu_flags and _version(seen.torch.version) == WRONG_TORCH_ON_AMX
    if amx and "bf16" not in seen.cpu.missing:
        yield _note("amx", {})


def _bits(device: str, able: Capability) -> Iterator[Finding]:
    plain = [name for name in ("bf16", "fp16") if name not in {**able.missing, **able.remarks}]
    if plain:
        yield _ok("bits", {"device": device, "names": ", ".join(plain)})
    for name, why in able.missing.items():
        yield _note("bits-missing", {"device": device, "name": name, "why": why})
    for name, why in able.remarks.items():
        yield _note("bits-remark", {"device": device, "name": name, "why": why})


def _compilers(seen: Checkup) -> Iterator[Finding]:
    for device, why in seen.compilers.items():
        values = {"device": device, "why": why}
        yield _ok("compiler", values) if why is None else _note("compiler-missing", values)


def _system(seen: Checkup) -> Iterator[Finding]:
    """Shared memory, open files and disks."""
    shared = seen.machine.shm_bytes
    if shared is not None:
        low = shared < LOW_SHARED and len(seen.gpus) > 1
        values = {"size": amount(shared)}
        yield _note("shared-low", values) if low else _ok("shared", values)
    soft, hard = seen.descriptors
    better = FILES if hard < 0 else min(hard, FILES)  # below zero: without limit
    files = {"soft": soft, "better": better}
    if 0 <= soft < FEW_FILES:
        yield _problem("descriptors-low", files) if soft < TOO_FEW_FILES else _note("descriptors-low", files)
    else:
        yield _ok("descriptors", {"soft": "-" if soft < 0 else soft})
    for path, free in seen.disks.items():
        values = {"path": path, "free": amount(free)}
        if free < LOW_DISK:
            yield _problem("disk-low", values) if free < FULL_DISK else _note("disk-low", values)
        else:
            yield _ok("disk", values)


def _videos(seen: Checkup) -> Iterator[Finding]:
    for kind, names, missing in (
        ("decoders", DECODERS, seen.decoders),
        ("encoders", ENCODERS, seen.encoders),
    ):
        there = [name for name in names if name not in missing]
        if there:
            yield _ok(kind, {"names": ", ".join(there)})
        if missing:
            yield _problem(f"{kind}-missing", {"names": ", ".join(missing)})


def _extras(seen: Checkup) -> Iterator[Finding]:
    for name, missing in seen.packages.items():
        packages = " ".join(module.replace("_", "-") for module in OPTIONAL.get(name, ()))
        install = f"pip install {packages}" if name not in EXTRAS else f"pip install 'causalvae[{name}]'"
        values = {"name": name, "missing": ", ".join(missing), "gives": name, "install": install}
        yield _note("extra-missing", values) if missing else _ok("extra", values)


def _kept(seen: Checkup) -> Iterator[Finding]:
    """What is kept between runs: its folder, and the weights of networks that judge."""
    values = {"path": seen.home, "why": seen.home_problem}
    yield _ok("home", values) if seen.home_problem is None else _note("home-unwritable", values)
    there = [name for name, files in seen.weights.items() if not files]
    gone = {name: files for name, files in seen.weights.items() if files}
    if there:
        yield _ok("weights", {"names": ", ".join(there)})
    if gone:
        missing = ", ".join(chain.from_iterable(gone.values()))
        files = {"names": ", ".join(gone), "missing": missing, "folder": f"{seen.home}/lpips"}
        yield _note("weights-offline" if seen.offline else "weights-missing", files)
