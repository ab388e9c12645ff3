"""What the tables of a page say: overview, settings, metrics, dataset, environment, as rows of plain text.

The templates write these rows, and escape them; nothing here is HTML.
"""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from causalvae.files import redact
from causalvae.flags import printable
from causalvae.report.charts import latest
from causalvae.report.evals import Eval
from causalvae.report.records import Run, number

MAX_ROWS = 200  # of the list of broken videos
WORST = 20  # clips of an evaluation that are listed
DATA_SETTINGS = (
    "video_path", "video_num_frames", "resolution", "frames", "resolutions", "sample_rate", "crop", "flip",
    "image_ratio", "short_videos", "batch_size", "gradient_accumulation_steps",
)  # fmt: skip
NOT_ENVIRONMENT = ("command", "warnings", "dataset", "weights", "perceptual")
SPARK = (120.0, 24.0)  # width and height of the small curve of a clip

View = dict[str, Any]  # Any: rows of several shapes
Rows = list[tuple[str, str]]


def run_view(run: Run, evals: Sequence[Eval], *, defaults: Mapping[str, str]) -> View:
    """Everything that the page says in words about one run. defaults: of the flags, as text."""
    rows = [_setting_row(row.name, row.value, row.source, defaults) for row in run.settings]
    command = run.facts.get("command")
    words = [str(word) for word in cast("list[object]", command)] if isinstance(command, list) else []
    return {
        "name": run.name,
        "path": printable(str(run.path)),
        "command": shlex.join(redact(words)),
        "tiles": _tiles(run, evals),
        "settings": rows,
        "changed": [row for row in rows if row["changed"]],
        "dataset": _dataset(run),
        "fingerprints": flat({name: run.facts.get(name) for name in ("weights", "perceptual")}),
        "environment": flat({k: v for k, v in run.facts.items() if k not in NOT_ENVIRONMENT}),
        "warnings": run.warnings,
        "quarantine": [_broken(row) for row in run.quarantine[:MAX_ROWS]],
        "quarantined": len(run.quarantine),
        "notes": run.notes,
    }


def differing(runs: Sequence[Run]) -> list[View]:
    """Settings in which the runs are not alike, with the value of each."""
    names = dict.fromkeys(row.name for run in runs for row in run.settings)
    rows = [{"name": name, "values": [run.setting(name) or "" for run in runs]} for name in names]
    return [row for row in rows if len(set(cast("list[str]", row["values"]))) > 1]


def metric_table(evals: Sequence[Eval], runs: Sequence[Run]) -> View:
    """A row for each metric, a column for each line's last evaluation; cells with mean and interval."""
    columns = latest(evals)
    names = dict.fromkeys(name for each in columns for name in each.metrics)
    heads = [
        {"run": each.run, "name": runs[each.run].name if each.run is not None else "", "label": each.label}
        for each in columns
    ]
    rows = [
        {
            "name": name,
            **_direction(columns, name),
            "cells": [_cell(each.metrics.get(name)) for each in columns],
        }
        for name in names
    ]
    return {"heads": heads, "rows": rows}


def worst_clips(evals: Sequence[Eval], runs: Sequence[Run]) -> list[View]:
    """For each line's last evaluation: its worst clips, every metric, and PSNR by frame as a small curve."""
    tables: list[View] = []
    for each in latest(evals):
        if not each.clips:
            continue
        names = [*dict.fromkeys(name for clip in each.clips[:WORST] for name in clip["metrics"])][:8]
        rows = [
            {
                "name": clip["name"],
                "cells": [figure(clip["metrics"].get(name)) for name in names],
                "spark": _spark(clip["psnr_by_frame"]),
            }
            for clip in each.clips[:WORST]
        ]
        tables.append(
            {
                "run": runs[each.run].name if each.run is not None else "",
                "label": each.label,
                "names": names,
                "rows": rows,
                "clips": len(each.clips),
                "curves": any(row["spark"] for row in rows),
                "unreadable": [
                    (str(bad.get("video", "")), str(bad.get("reason", ""))) for bad in each.unreadable
                ],
                "facts": [*flat({**each.settings, **each.facts}), *each.compute.items()],
            }
        )
    return tables


def flat(value: Mapping[str, Any], prefix: str = "") -> Rows:
    """Nested facts as rows, names joined by points; what is not there is left out."""
    rows: Rows = []
    for name, item in value.items():
        if isinstance(item, dict):
            rows += flat(cast("dict[str, Any]", item), f"{prefix}{name}.")
        elif isinstance(item, list):
            parts = [str(part) for part in cast("list[object]", item)]
            rows += [(prefix + name, ", ".join(parts))] if parts else []
        elif item is not None:
            rows.append((prefix + name, f"{item:,}" if type(item) is int else str(item)))
    return rows


def figure(value: object) -> str:
    """A number as a table has it; nothing for none."""
    measured = number(value)
    if measured is None:
        return ""
    return f"{measured:.2f}" if 10 <= abs(measured) < 10000 else f"{measured:.4g}"


def _setting_row(name: str, value: str, source: str | None, defaults: Mapping[str, str]) -> View:
    default = defaults.get(name)
    same = value in (default, (default or "").replace(",", " ")) or _same_number(value, default)
    return {
        "name": name,
        "value": value,
        "default": default or "",
        "source": source or "",
        "changed": not same if default is not None else source is not None,
    }


def _same_number(value: str, default: str | None) -> bool:
    try:
        return default is not None and float(value) == float(default)
    except ValueError:
        return False


def _tiles(run: Run, evals: Sequence[Eval]) -> Rows:
    """The few numbers that are looked at first: the key of a text, and the number; none that is unknown."""
    asked = run.setting("max_steps")
    skipped = sum(event.kind == "skipped" for event in run.events)
    saved = sum(event.kind == "checkpoint" for event in run.events)
    steps = f"{run.last_step:,}" + (f" / {int(asked):,}" if asked is not None and asked.isdecimal() else "")
    tiles: Rows = [("tile.steps", steps)]
    measured = [each for each in evals if "psnr" in each.metrics]
    if measured:
        tiles.append(("tile.psnr", f"{figure(measured[-1].metrics['psnr']['mean'])} dB"))
    for name in ("total", "pixel"):
        values = [value for value in run.curves.get(name, ((), ()))[1] if value is not None]
        tiles += [(f"tile.{name}", figure(values[-1]))] if values else []
    if run.first_time is not None and run.last_time is not None and run.last_time > run.first_time:
        tiles.append(("tile.time", duration(run.last_time - run.first_time)))
    speeds = [value for value in run.curves.get("clips_per_second", ((), ()))[1] if value is not None]
    if speeds:
        tiles.append(("tile.speed", figure(sorted(speeds)[len(speeds) // 2])))
    tiles.append(("tile.checkpoints", f"{saved:,}"))
    tiles.append(("tile.warnings", f"{len(run.warnings):,}"))
    tiles += [("tile.skipped", f"{skipped:,}")] if skipped else []
    tiles += [("tile.quarantined", f"{len(run.quarantine):,}")] if run.quarantine else []
    return tiles


def duration(seconds: float) -> str:
    """A stretch of time for a reader: `3 d 04 h`, `2 h 05 min`, `4 min 10 s`, `12 s`."""
    whole = int(seconds)
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days} d {hours:02} h"
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {whole % 60:02} s" if minutes else f"{whole} s"


def _dataset(run: Run) -> Rows:
    facts = run.facts.get("dataset")
    rows = flat(cast("dict[str, Any]", facts)) if isinstance(facts, dict) else []
    given = [(name, run.setting(name)) for name in DATA_SETTINGS]
    return rows + [(name, value) for name, value in given if value not in (None, "none")]


def _broken(row: Mapping[str, Any]) -> View:
    return {"video": str(row.get("video", "")), "reason": str(row.get("reason", ""))}


def _direction(columns: Sequence[Eval], name: str) -> View:
    facts = next(each.metrics[name] for each in columns if name in each.metrics)
    arrow = {"higher": "\N{UPWARDS ARROW}", "lower": "\N{DOWNWARDS ARROW}"}.get(str(facts.get("better")), "")
    return {"unit": str(facts.get("unit") or ""), "arrow": arrow}


def _cell(facts: Mapping[str, Any] | None) -> View:
    facts = facts or {}
    low, high = figure(facts.get("low")), figure(facts.get("high"))
    clips = number(facts.get("clips"))
    return {
        "mean": figure(facts.get("mean")),
        "interval": f"{low} \N{EN DASH} {high}" if low and high else "",
        "clips": f"n = {int(clips):,}" if clips is not None else "",
    }


def _spark(values: Sequence[float]) -> str:
    """PSNR by frame as the points of an SVG line; nothing for fewer than two frames."""
    if len(values) < 2:
        return ""
    low, high = min(values), max(values)
    width, height = SPARK
    across = (width - 4) / (len(values) - 1)
    up = (height - 4) / ((high - low) or 1)
    return " ".join(f"{2 + i * across:.1f},{height - 2 - (v - low) * up:.1f}" for i, v in enumerate(values))


def title_of(runs: Sequence[Run], evals: Sequence[Path]) -> str:
    """What the page is about: the names of the runs."""
    return ", ".join([run.name for run in runs] + [printable(path.stem) for path in evals])
