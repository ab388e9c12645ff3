"""What the folder of a run says, as plain records: read leniently, and made safe to be shown.

A report is made of runs that are going on, were killed or came from elsewhere. A file that is missing or
damaged leaves a gap and a note. Names come from anywhere: control characters and direction marks in them
become escapes here, for every text of a page.
"""

import json
import math
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import yaml

from causalvae.errors import RunError
from causalvae.flags import printable
from causalvae.rundir import STEP_FOLDER

MAX_NAMES = 80  # curves of a run; more than ours have by far
MAX_TEXT = 4000  # characters of one text on a page
MAX_EVENTS = 2000  # marks of a run
NOT_CURVES = ("step", "time", "cursor", "skipped", "frames", "height", "width")
ASIDE = re.compile(r"(step-([0-9]{8,}))\.(?:broken|diverged)-[0-9]+")
LOG_STEP = re.compile(r"step ([0-9]{1,12})[/:]")
LOG_WARNING = re.compile(r"^[0-9-]{10} [0-9:,]{8,12} warning: (.*)$")

Json = dict[str, Any]  # Any: JSON values nest


@dataclass(frozen=True)
class Event:
    """Something that happened at a step and is marked on the axis."""

    step: int
    kind: Literal["checkpoint", "warning", "skipped", "aside"]
    text: str


@dataclass(frozen=True)
class Setting:
    """A row of config.yaml: the value as text, and where it was given, None for a default."""

    name: str
    value: str
    source: str | None


@dataclass
class Run:
    """One run. curves: by name, steps and values, None where a value was not finite."""

    path: Path
    name: str
    facts: Json = field(default_factory=dict)
    settings: list[Setting] = field(default_factory=list)
    curves: dict[str, tuple[list[int], list[float | None]]] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    quarantine: list[Json] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    first_time: float | None = None
    last_time: float | None = None
    last_step: int = 0

    def setting(self, name: str) -> str | None:
        """The value in force, as text."""
        return next((row.value for row in self.settings if row.name == name), None)

    @property
    def warnings(self) -> list[str]:
        """What run.json warns of."""
        found = self.facts.get("warnings")
        return [str(text) for text in cast("list[object]", found)] if isinstance(found, list) else []


def read_run(path: Path) -> Run:
    """Everything but films and evaluations. RunError if the folder is none of a run."""
    if not path.is_dir():
        raise RunError(f"{printable(str(path))}: there is no such folder; name the folder of a run")
    known = [name for name in ("run.json", "config.yaml", "metrics.jsonl") if (path / name).exists()]
    if not known:
        raise RunError(
            f"{printable(str(path))}: not the folder of a run: no run.json, config.yaml or metrics.jsonl"
        )
    run = Run(path, printable(path.resolve().name))
    facts = read_json(path / "run.json", run.notes)
    run.facts = facts if isinstance(facts, dict) else {}
    run.settings = _read_settings(path / "config.yaml", run.notes)
    run.name = run.setting("exp_name") or run.name
    _read_metrics(run, _raw_lines(path / "metrics.jsonl", run.notes))
    run.events += _checkpoints(path) + _log_warnings(path / "log.txt")
    run.events = sorted(run.events, key=lambda event: event.step)[-MAX_EVENTS:]
    run.quarantine = [row for row in read_lines(path / "quarantine.jsonl", run.notes) if "video" in row]
    return run


def safe(value: Any) -> Any:  # Any: JSON values nest
    """The value with every text fit to be shown, names of fields too, and numbers that are none left out."""
    if isinstance(value, str):
        return printable(value[:MAX_TEXT])
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        items = cast("Mapping[object, Any]", value).items()
        return {printable(str(name)[:MAX_TEXT]): safe(item) for name, item in items}
    if isinstance(value, list | tuple):
        return [safe(item) for item in cast("Sequence[Any]", value)]
    return value


def number(value: object) -> float | None:
    """A finite number, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # a whole number of hundreds of digits
        return None


def read_bytes(path: Path, notes: list[str]) -> bytes:
    """A regular file's content; nothing, and a note unless it is missing, if it can't be read."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            notes.append(f"{printable(path.name)}: not a file")
            return b""
        return path.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        notes.append(f"{printable(path.name)}: can't be read: {error.strerror}")
        return b""


def read_json(path: Path, notes: list[str]) -> Any:  # Any: JSON values nest
    """What a JSON file holds, safe to be shown; None, and a note, if it is no JSON."""
    data = read_bytes(path, notes)
    if not data:
        return None
    try:
        return safe(json.loads(data))
    except (ValueError, RecursionError):
        notes.append(f"{printable(path.name)}: not JSON")
        return None


def read_lines(path: Path, notes: list[str]) -> list[Json]:
    """The whole records of a file of JSON lines, safe to be shown."""
    return [safe(record) for record in _raw_lines(path, notes)]


def _raw_lines(path: Path, notes: list[str]) -> list[Json]:
    """The whole records of a file of JSON lines, as they are."""
    found: list[Json] = []
    torn = 0
    for line in read_bytes(path, notes).splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            torn += 1
            continue
        if isinstance(record, dict):
            found.append(cast(Json, record))
    if torn > 1:  # a kill cuts off one
        notes.append(f"{printable(path.name)}: {torn} lines are not JSON")
    return found


def _read_settings(path: Path, notes: list[str]) -> list[Setting]:
    """config.yaml: names, values as text, and the remarks behind them that say where a value was given."""
    data = read_bytes(path, notes)
    try:
        root = yaml.SafeLoader(data).get_single_node() if data else None
    except (yaml.YAMLError, RecursionError, UnicodeDecodeError):
        notes.append(f"{path.name}: not YAML")
        return []
    lines = data.decode(errors="replace").splitlines()
    rows: list[Setting] = []
    for key, node in root.value if isinstance(root, yaml.MappingNode) else []:
        items = node.value if isinstance(node, yaml.SequenceNode) else [node]
        text = " ".join(str(item.value) for item in items if isinstance(item, yaml.ScalarNode))
        end = node.end_mark
        rest = lines[end.line][end.column :].strip() if end.line < len(lines) else ""
        source = safe(rest.removeprefix("#").strip()) if rest.startswith("#") else None
        rows.append(Setting(safe(str(key.value)), safe(text), source or None))
    return rows


def _read_metrics(run: Run, records: Sequence[Json]) -> None:
    """Fill in curves, times and the steps that were skipped. records: as they are, for there are many."""
    curves: dict[str, tuple[list[int], list[float | None]]] = {}
    for record in records:
        step = number(record.get("step"))
        if step is None:
            continue
        at = int(step)
        run.last_step = max(run.last_step, at)
        time = number(record.get("time"))
        if time is not None:
            run.first_time = time if run.first_time is None else run.first_time
            run.last_time = time
        if skipped := number(record.get("skipped")):
            run.events.append(Event(at, "skipped", f"{skipped:g}"))
        for name, value in record.items():
            if name in NOT_CURVES or isinstance(value, dict | list | bool):
                continue
            if name not in curves and len(curves) >= MAX_NAMES:
                continue
            steps, values = curves.setdefault(name, ([], []))
            steps.append(at)
            values.append(number(value))
    run.curves = {safe(name): curve for name, curve in curves.items() if any(v is not None for v in curve[1])}


def _checkpoints(path: Path) -> list[Event]:
    folder = path / "checkpoints"
    events: list[Event] = []
    for item in sorted(folder.iterdir()) if folder.is_dir() else []:
        if saved := STEP_FOLDER.fullmatch(item.name):
            events.append(Event(int(saved[1]), "checkpoint", item.name))
        elif aside := ASIDE.fullmatch(item.name):
            events.append(Event(int(aside[2]), "aside", item.name))
    return events


def _log_warnings(path: Path) -> list[Event]:
    """Warnings of log.txt, each at the last step that was named before it or in it."""
    events: list[Event] = []
    step = 0
    for line in read_bytes(path, []).decode(errors="backslashreplace").splitlines():
        if named := LOG_STEP.search(line):
            step = int(named[1])
        if warned := LOG_WARNING.match(line):
            events.append(Event(step, "warning", safe(warned[1])))
    return events
