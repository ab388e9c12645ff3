"""Curves of a page: which there are, in which group, and thinned so that 50,000 steps stay small.

Thinning keeps what the eye looks for: of every stretch of steps its lowest and its highest value, each at
its own step, and beside them the mean, which smoothing goes by.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from causalvae.report.evals import Eval
from causalvae.report.records import Run, number

STRETCHES = 700  # of a thinned curve, each with two points: about the pixels that a chart is wide
DIGITS = 5  # significant ones
GROUPS = {  # the order on the page; names not listed come last, under `other`
    "losses": ("total", "pixel", "perceptual", "kl", "wavelet", "adversarial", "adaptive_weight", "logvar"),
    "optimiser": (
        "learning_rate", "grad_norm", "critic_grad_norm", "loss_scale", "critic_loss_scale",
    ),
    "critic": (
        "critic", "critic_accuracy_real", "critic_accuracy_fake", "critic_logit_real", "critic_logit_fake",
        "critic_lecam", "critic_r1",
    ),
    "speed": ("clips_per_second", "data_wait", "memory_gib"),
}  # fmt: skip

Series = dict[str, Any]  # Any: JSON


def run_charts(runs: Sequence[Run]) -> list[Series]:
    """A chart for each number that was logged, with a curve for each run that has it."""
    names = dict.fromkeys(name for run in runs for name in run.curves)
    placed = {name: group for group, members in GROUPS.items() for name in members}
    order = [*(name for name in placed if name in names), *(name for name in names if name not in placed)]
    return [
        {
            "name": name,
            "group": placed.get(name, "other"),
            "x": "step",
            "unit": "",
            "series": [
                {"run": index, "label": "", **thin(*run.curves[name])}
                for index, run in enumerate(runs)
                if name in run.curves
            ],
        }
        for name in order
    ]


def eval_charts(evals: Sequence[Eval]) -> list[Series]:
    """Charts of what was measured on held-out clips over the steps, and of the curves of the last ones."""
    return _over_steps(evals) + _last_curves(evals)


def _over_steps(evals: Sequence[Eval]) -> list[Series]:
    """One chart for each metric that a run has at two steps or more."""
    charts: list[Series] = []
    for name in dict.fromkeys(name for each in evals for name in each.metrics):
        series: list[Series] = []
        lines = dict.fromkeys((each.run, each.weights) for each in evals if each.run is not None)
        for run, weights in lines:
            points = [
                each for each in evals
                if (each.run, each.weights) == (run, weights)
                and name in each.metrics and each.step is not None
            ]  # fmt: skip
            if len(points) > 1:
                series.append(_metric_line(points, name) | {"run": run, "label": weights or ""})
        if series:
            unit = next(str(each.metrics[name].get("unit") or "") for each in evals if name in each.metrics)
            charts.append({"name": name, "group": "heldout", "x": "step", "unit": unit, "series": series})
    return charts


def _metric_line(points: Sequence[Eval], name: str) -> Series:
    line: Series = {
        "x": [each.step for each in points],
        "y": [short(number(each.metrics[name]["mean"])) for each in points],
    }
    low, high = ([number(each.metrics[name].get(end)) for each in points] for end in ("low", "high"))
    if None not in low and None not in high:
        line |= {"low": [short(value) for value in low], "high": [short(value) for value in high]}
    return line


def _last_curves(evals: Sequence[Eval]) -> list[Series]:
    """Curves over frames or frequencies, and numbers by latent channel, of each line's last evaluation."""
    last = latest(evals)
    charts: list[Series] = []
    for name in dict.fromkeys(name for each in last for name in each.curves):
        having = [each for each in last if name in each.curves]
        first = having[0].curves[name]
        charts.append(
            {
                "name": name,
                "group": "heldout",
                "x": first["x_label"] or "x",
                "unit": first["unit"],
                "series": [
                    {"run": each.run, "label": each.label, "x": each.curves[name]["x"]}
                    | {"y": [short(value) for value in each.curves[name]["y"]]}
                    for each in having
                ],
            }
        )
    for name in dict.fromkeys(name for each in last for name in each.latents):
        series = [
            {"run": each.run, "label": each.label, "x": [*range(len(each.latents[name]))]}
            | {"y": [short(value) for value in each.latents[name]]}
            for each in last
            if name in each.latents
        ]
        charts.append({"name": name, "group": "latents", "x": "channel", "unit": "", "series": series})
    return charts


def latest(evals: Sequence[Eval]) -> list[Eval]:
    """The last evaluation of every run and kind of weights, and every one that belongs to no run."""
    found: dict[object, Eval] = {}
    for number_, each in enumerate(evals):
        found[number_ if each.run is None else (each.run, each.weights)] = each
    return list(found.values())


def thin(steps: Sequence[int], values: Sequence[float | None]) -> Series:
    """x, y with lowest and highest of each stretch in the order of their steps; mx, my: its middle and mean.

    A short curve stays as it is, with its gaps, and has no mx and my.
    """
    if len(steps) <= 2 * STRETCHES:
        return {"x": list(steps), "y": [short(value) for value in values]}
    y = np.array([np.nan if value is None else value for value in values], dtype=np.float64)
    x = np.asarray(steps, dtype=np.float64)
    kept = np.isfinite(y)
    x, y = x[kept], y[kept]
    edges = np.linspace(0, len(y), STRETCHES + 1).astype(int)
    thinned: Series = {"x": [], "y": [], "mx": [], "my": []}
    for start, end in pairwise(edges.tolist()):
        if start == end:
            continue
        part = y[start:end]
        for place in sorted({start + int(part.argmin()), start + int(part.argmax())}):
            thinned["x"].append(int(x[place]))
            thinned["y"].append(short(float(y[place])))
        thinned["mx"].append(int(x[(start + end - 1) // 2]))
        thinned["my"].append(short(float(part.mean())))
    return thinned


def short(value: float | None) -> float | None:
    """The number with as many digits as a chart can show."""
    return None if value is None else float(f"{value:.{DIGITS}g}")
