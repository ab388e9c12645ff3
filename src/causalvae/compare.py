"""The command `compare`: what changed between two evaluations, clip by clip, and whether it may."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from rich.table import Table
from rich.text import Text

from causalvae.data.decode import printable
from causalvae.errors import ConfigError
from causalvae.evalflags import FailRule
from causalvae.evaluate import as_text
from causalvae.metrics import mean
from causalvae.scores import FORMAT, interval

STEP_FILE = re.compile(r"step-[0-9]{8,}\.json")
MOST_WORSE = 10  # clips that are named
Side = Literal["ema", "live"]
Json = Mapping[str, Any]  # Any: JSON values nest


@dataclass(frozen=True, kw_only=True)
class Measured:
    """An evaluation to compare. clips: metrics by id of the clip. identity: which clips they are."""

    name: str
    metrics: Mapping[str, Json]
    clips: Mapping[str, Mapping[str, float]]
    settings: Json
    identity: str | None
    judges: Json


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Of one metric, second minus first. low, high: 95 % interval of the mean; absent for a single clip.

    worse: ids of clips that got worse, the worst first, with their differences; none where no way is better.
    """

    metric: str
    unit: str
    better: str | None
    mean: float
    bounds: Mapping[str, float]
    clips: int
    worse: tuple[tuple[str, float], ...]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Differences by metric, the rules that failed, and all of it as text."""

    differences: Mapping[str, Difference]
    failed: tuple[FailRule, ...]
    text: str

    @property
    def status(self) -> int:
        """Exit status: 1 where a rule failed."""
        return 1 if self.failed else 0


def read_measured(path: Path, *, side: Side) -> Measured:
    """The evaluation in a file, or the newest one of a run. ConfigError if there is none.

    side: which weights, where a training measured both.
    """
    file = path
    if path.is_file() and path.suffix != ".json":
        raise ConfigError(f"{path}: no JSON file; to compare weights, add --video_path or --manifest")
    if path.is_dir():
        steps = (each for each in (path / "eval").glob("*.json") if STEP_FILE.fullmatch(each.name))
        newest = max(steps, default=None, key=lambda each: int(each.stem.removeprefix("step-")))
        if newest is None:
            raise ConfigError(f"{path}: this run has no evaluation; add --video_path to evaluate it now")
        file = newest
    name = path.resolve().name if path.is_dir() else path.stem
    return as_measured(_read(file), name=printable(name), side=side)


def _read(file: Path) -> Json:
    try:
        content = json.loads(file.read_bytes())
    except OSError as error:
        raise ConfigError(f"{file}: can't be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{file}: not JSON, so no results of `causalvae eval`") from error
    if not isinstance(content, dict) or cast(Json, content).get("format") != FORMAT:
        raise ConfigError(f"{file}: no results of `causalvae eval`, whose format is {FORMAT!r}")
    return cast(Json, content)


def as_measured(content: Json, *, name: str, side: Side = "ema") -> Measured:
    """Results as they are compared. ConfigError where parts are missing."""
    try:
        numbers: Json = content
        if "weights" in content:
            sides = content["weights"]
            numbers = sides[side] if side in sides else sides["live"]
        clips = {str(each["id"]): dict(each["metrics"]) for each in numbers["clips"]}
        digest = content["manifest"]["sha256"] if "manifest" in content else None
        return Measured(
            name=name,
            metrics=dict(numbers["metrics"]),
            clips=clips,
            settings=dict(content["settings"]),
            identity=digest,
            judges=dict(content.get("judges", {})),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{name}: its results are damaged: {error!r}") from error


def compare(first: Measured, second: Measured, *, rules: Sequence[FailRule] = ()) -> Comparison:
    """Second minus first on the same clips. ConfigError where the clips or the judges are not the same."""
    _refuse_others(first, second)
    differences = {
        name: _difference(name, first, second=second)
        for name, facts in first.metrics.items()
        if name in second.metrics and any(name in numbers for numbers in first.clips.values())
        if facts.get("unit") == second.metrics[name].get("unit")
    }
    for rule in rules:
        if rule.metric not in differences:
            raise ConfigError(
                f"--fail_if {rule}: {rule.metric} was not measured of the clips of both; there are "
                f"{', '.join(differences)}"
            )
    failed = tuple(rule for rule in rules if rule.fails(differences[rule.metric].mean))
    text = _text(first, second, differences=differences, failed=failed)
    return Comparison(differences=differences, failed=failed, text=text)


def _refuse_others(first: Measured, second: Measured) -> None:
    same = first.clips.keys() == second.clips.keys() and first.settings == second.settings
    known = {each.identity for each in (first, second)} - {None}
    if not same or len(known) > 1:
        only = sorted(first.clips.keys() ^ second.clips.keys())
        detail = f"{printable(only[0])} is in one of them" if only else "other files, sizes or frames"
        raise ConfigError(
            f"{first.name} and {second.name}: not measured on the same clips ({detail}); evaluate both with "
            "the --manifest of one of them"
        )
    for name in first.judges.keys() & second.judges.keys():
        if first.judges[name] != second.judges[name]:
            raise ConfigError(f"{first.name} and {second.name}: measured with different files for {name}")


def _difference(name: str, first: Measured, *, second: Measured) -> Difference:
    pairs = {
        clip: numbers[name] - first.clips[clip][name]
        for clip, numbers in second.clips.items()
        if name in numbers and name in first.clips[clip]
    }
    facts = first.metrics[name]
    sign = {"higher": 1.0, "lower": -1.0}.get(str(facts.get("better")), 0.0)
    worse = sorted((sign * value, clip) for clip, value in pairs.items() if sign * value < 0.0)
    values = list(pairs.values())
    return Difference(
        metric=name,
        unit=str(facts.get("unit") or ""),
        better=facts.get("better"),
        mean=mean(values),
        bounds=interval(values),
        clips=len(values),
        worse=tuple((clip, sign * value) for value, clip in worse),
    )


def _text(
    first: Measured,
    second: Measured,
    *,
    differences: Mapping[str, Difference],
    failed: Sequence[FailRule],
) -> str:
    """A table of the differences, the clips that got worse, and the rules that failed."""
    shown = Table(highlight=False)
    for heading in ("metric", "unit", "better"):
        shown.add_column(heading)
    for heading in (f"A: {first.name}", f"B: {second.name}", "B - A", "worse clips"):
        shown.add_column(Text(heading), justify="right")
    for name, each in differences.items():
        means = [f"{side.metrics[name]['mean']:.4g}" for side in (first, second)]
        span = f" [{each.bounds['low']:+.3g}, {each.bounds['high']:+.3g}]" if each.bounds else ""
        count = f"{len(each.worse)} of {each.clips}" if each.better else ""
        words = [name, each.unit, each.better or "", *means, f"{each.mean:+.3g}{span}", count]
        shown.add_row(*(Text(word) for word in words))
    text = as_text(shown)
    psnr = differences.get("psnr")
    if psnr is not None and psnr.worse:
        text += "clips whose PSNR fell most:\n"
        text += "".join(f"  {printable(clip)}  {value:+.3f} dB\n" for clip, value in psnr.worse[:MOST_WORSE])
    for rule in failed:
        text += f"failed: {rule}: the mean difference is {differences[rule.metric].mean:+.4g}\n"
    return text
