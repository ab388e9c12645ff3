"""Evaluations as the page shows them: those of `causalvae eval`, and those that a training wrote.

A training's older files have one PSNR per clip and its mean; newer ones have what `causalvae eval` writes,
for the averaged and the live weights side by side. All become one record here.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from causalvae.report.records import Json, Run, number, read_json

STEP_FILE = re.compile(r"step-([0-9]{8,})\.json")
FILM_FILE = re.compile(r"clip[0-9]{6,}\.mp4")


@dataclass
class Eval:
    """One evaluation. metrics: by name, with mean, low, high, clips, unit, better as far as known.

    clips: worst first. curves: by name, with x, y, unit and x_label. run: place among the runs, if of one.
    films: of clips that have one, by the clip's name, worst first.
    """

    label: str
    run: int | None
    step: int | None
    weights: str | None
    metrics: dict[str, Json] = field(default_factory=dict)
    curves: dict[str, Json] = field(default_factory=dict)
    latents: dict[str, list[float]] = field(default_factory=dict)
    compute: dict[str, str] = field(default_factory=dict)
    clips: list[Json] = field(default_factory=list)
    unreadable: list[Json] = field(default_factory=list)
    settings: Json = field(default_factory=dict)
    facts: Json = field(default_factory=dict)
    films: dict[str, Path] = field(default_factory=dict)


def run_evals(run: Run, index: int) -> list[Eval]:
    """The evaluations in eval/ of a run, by step."""
    folder = run.path / "eval"
    found: list[Eval] = []
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else []:
        named = STEP_FILE.fullmatch(path.name)
        found += read_eval(path, notes=run.notes, run=index, step=int(named[1]) if named else None)
    return sorted(found, key=lambda each: (each.step or 0, each.weights or ""))


def read_eval(path: Path, *, notes: list[str], run: int | None = None, step: int | None = None) -> list[Eval]:
    """The evaluations of one file, several where weights stand side by side; a note if there is none."""
    root = read_json(path, notes)
    if not isinstance(root, dict):
        return []
    facts = cast(Json, root)
    at = number(facts.get("step"))
    step = int(at) if at is not None else step
    sides = facts.get("weights")
    if isinstance(sides, dict):
        named = cast("dict[str, Any]", sides)
        found = [
            _one({**facts, **cast(Json, each)}, name, run=run, step=step)
            for name, each in named.items()
            if isinstance(each, dict)
        ]
        for each in found:
            each.films = _films(each, path)
        return found
    weights = sides if isinstance(sides, str) else _set_name(facts)
    found = _one(facts, weights, run=run, step=step)
    found.label = _file_label(path, facts) if run is None else found.label
    found.films = _films(found, path)
    if not found.metrics:
        notes.append(f"{path.name}: holds no metrics")
        return []
    return [found]


def _films(found: Eval, path: Path) -> dict[str, Path]:
    """Films beside the file, of names that an evaluation gives, and no links."""
    folder = path.with_suffix(".films")
    named = {clip["name"]: folder / clip["film"] for clip in found.clips if clip["film"]}
    return {
        name: film
        for name, film in named.items()
        if not folder.is_symlink() and film.is_file() and not film.is_symlink()
    }


def _set_name(facts: Json) -> str | None:
    name = _dict(facts.get("checkpoint")).get("set")
    return name if isinstance(name, str) else None


def _file_label(path: Path, facts: Json) -> str:
    """What an evaluation that belongs to no run is called: by its own name, or its checkpoint's."""
    name = facts.get("name")
    if isinstance(name, str) and name:
        return name
    file = _dict(facts.get("checkpoint")).get("file")
    return Path(file).name if isinstance(file, str) and Path(file).name else path.stem


def _one(facts: Json, weights: str | None, *, run: int | None, step: int | None) -> Eval:
    clips = [_clip(each) for each in _list(facts.get("clips")) if isinstance(each, dict)]
    metrics = {name: _dict(each) for name, each in _dict(facts.get("metrics")).items()}
    metrics = {name: each for name, each in metrics.items() if number(each.get("mean")) is not None}
    mean = number(facts.get("psnr"))
    if not metrics and mean is not None:
        metrics["psnr"] = {"mean": mean, "clips": len(clips), "unit": "dB", "better": "higher"}
    return Eval(
        label=" · ".join(filter(None, (f"step {step:,}" if step is not None else None, weights))),
        run=run,
        step=step,
        weights=weights,
        metrics=metrics,
        curves=_curves(facts),
        latents=_latents(facts),
        compute={name: _text(value) for name, value in _dict(facts.get("compute")).items()},
        clips=_worst_first(clips, metrics),
        unreadable=[_dict(each) for each in _list(facts.get("unreadable")) if isinstance(each, dict)],
        settings=_dict(facts.get("settings")),
        facts={name: _dict(facts.get(name)) for name in ("checkpoint", "manifest")},
    )


def _clip(record: Json) -> Json:
    metrics = {name: number(value) for name, value in _dict(record.get("metrics")).items()}
    if not metrics:
        metrics = {"psnr": number(record.get("psnr"))}
    curve = [number(value) for value in _list(record.get("psnr_by_frame"))]
    film = record.get("film")
    return {
        "film": film if isinstance(film, str) and FILM_FILE.fullmatch(film) else "",
        "name": str(record.get("id", record.get("video", "?"))),
        "metrics": {name: value for name, value in metrics.items() if value is not None},
        "psnr_by_frame": curve if curve and None not in curve else [],
    }


def _worst_first(clips: list[Json], metrics: dict[str, Json]) -> list[Json]:
    """By PSNR, or by the first metric that says which way is better."""
    by = next((name for name in metrics if name == "psnr"), None) or next(
        (name for name, facts in metrics.items() if facts.get("better") in ("higher", "lower")), None
    )
    sign = -1.0 if by is not None and metrics[by].get("better") == "lower" else 1.0
    return sorted(clips, key=lambda clip: sign * clip["metrics"].get(by, float("inf") * sign))


def _curves(facts: Json) -> dict[str, Json]:
    found: dict[str, Json] = {}
    for name, each in _dict(facts.get("curves")).items():
        curve = _dict(each)
        x, y = _list(curve.get("x")), [number(value) for value in _list(curve.get("y"))]
        xs = [value if isinstance(value, str) else number(value) for value in x]
        if len(xs) == len(y) and any(value is not None for value in y):
            words = {key: str(curve.get(key) or "") for key in ("unit", "x_label")}
            found[name] = {"x": xs, "y": y, **words}
    return found


def _latents(facts: Json) -> dict[str, list[float]]:
    """The lists of numbers among what is known of the latents, such as each channel's mean."""
    found: dict[str, list[float]] = {}
    for name, value in _dict(facts.get("latents")).items():
        numbers = [number(item) for item in _list(value)]
        kept = [item for item in numbers if item is not None]
        if kept and len(kept) == len(numbers):
            found[name] = kept
    return found


def _text(value: object) -> str:
    measured = number(value)
    return f"{measured:,.4g}" if isinstance(value, float) and measured is not None else str(value)


def _dict(value: object) -> Json:
    return cast(Json, value) if isinstance(value, dict) else {}


def _list(value: object) -> list[Any]:  # Any: JSON values nest
    return cast("list[Any]", value) if isinstance(value, list) else []
