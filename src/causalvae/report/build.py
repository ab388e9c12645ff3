"""From the folders of runs to one HTML file that needs nothing else (`causalvae report`).

Text goes through a template that escapes it, data through JSON in which no tag can begin. The page's policy
allows the two scripts that are in it, by their checksums, and no request to anywhere.
"""

import base64
import hashlib
import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from causalvae.errors import ConfigError
from causalvae.files import disk_error, write_whole
from causalvae.report.charts import GROUPS, eval_charts, run_charts
from causalvae.report.evals import Eval, read_eval, run_evals
from causalvae.report.films import Sprites, footage_of, players
from causalvae.report.records import Run, read_run
from causalvae.report.views import differing, metric_table, run_view, title_of, worst_clips

HERE = Path(__file__).parent
LANGUAGES = ("en", "zh")
SCRIPTS = ("texts.js", "charts.js", "players.js", "page.js")
POLICY = (
    "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'; "
    "script-src {scripts}; connect-src {connect}; base-uri 'none'; form-action 'none'"
)
EXTRA = "causalvae {command} needs its extra: pip install 'causalvae[report]'"


@dataclass(frozen=True)
class Report:
    """The page as bytes, what could not be shown, and how many runs and clips are on it."""

    page: bytes
    notes: tuple[str, ...]
    runs: int
    clips: int


def build_report(
    paths: Sequence[Path],
    *,
    defaults: Mapping[str, str],
    lang: str = "en",
    every: float | None = None,
    known: Sprites | None = None,
) -> Report:
    """The page of runs and evaluation files.

    paths: folders of runs, files of `causalvae eval`. defaults: of the training's flags. every: seconds
    between looks for a newer page, or None. known: films encoded before; it is filled. RunError for a folder
    that is none of a run, ConfigError without the extra.
    """
    plotly = plotly_script("report" if every is None else "watch")
    files = [path for path in paths if path.is_file()]
    runs, notes = [read_run(path) for path in paths if path not in files], list[str]()
    by_run = [run_evals(run, index) for index, run in enumerate(runs)]
    evals = [*chain(*by_run), *(each for path in files for each in read_eval(path, notes=notes))]
    clips = players(footage_of(runs, evals), notes=notes, known=known)
    data = {
        "lang": lang,
        "texts": {name: read_texts(name) for name in LANGUAGES},
        "runs": [_run_data(run) for run in runs],
        "charts": run_charts(runs) + eval_charts(evals),
        "players": clips,
        "every": every,
    }
    context = {
        "title": title_of(runs, files),
        "runs": [run_view(run, found, defaults=defaults) for run, found in zip(runs, by_run, strict=True)],
        "differing": differing(runs),
        "metrics": metric_table(evals, runs),
        "worst": worst_clips(evals, runs),
        "notes": list(notes),
        **_presence(data, evals),
    }
    page = _render(data, context, plotly=plotly, lang=lang)
    notes += [f"{run.name}: {note}" for run in runs for note in run.notes]
    return Report(page, tuple(notes), len(runs), len(clips))


def write_report(
    paths: Sequence[Path], *, out: Path, defaults: Mapping[str, str], lang: str = "en"
) -> Report:
    """Build the page and write it, whole or not at all. RunError if the disk refuses."""
    report = build_report(paths, defaults=defaults, lang=lang)
    try:
        write_whole(out, report.page)
    except OSError as error:
        raise disk_error(error, out) or error from error
    return report


def has_extra() -> bool:
    """Whether what a page needs is installed."""
    return all(importlib.util.find_spec(name) is not None for name in ("plotly", "jinja2"))


def plotly_script(command: str) -> str:
    """The charts' library, from the package plotly, which is not imported. ConfigError if it is missing."""
    spec = importlib.util.find_spec("plotly")
    if spec is None or spec.origin is None or not has_extra():
        raise ConfigError(EXTRA.format(command=command))
    text = (Path(spec.origin).parent / "package_data" / "plotly.min.js").read_text(encoding="utf-8")
    assert "</script" not in text.lower()
    assert "<!--" not in text
    return text.replace("\r\n", "\n")


def read_texts(lang: str) -> dict[str, str]:
    """The words of the page in one language, by key."""
    return json.loads((HERE / "texts" / f"{lang}.json").read_text(encoding="utf-8"))


def json_in_html(value: object) -> str:
    """JSON that may stand in a script element: plain ASCII in which no tag, comment or entity can begin."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _presence(data: Mapping[str, Any], evals: Sequence[Eval]) -> dict[str, Any]:
    """Which sections the page has, and the groups of charts in their order."""
    groups = [*GROUPS, "other", "heldout", "latents"]
    present = {chart["group"] for chart in data["charts"]}
    return {
        "groups": [group for group in groups if group in present],
        "players": len(data["players"]),
        "evals": len(evals),
        "every": data["every"],
    }


def _run_data(run: Run) -> dict[str, Any]:
    return {
        "name": run.name,
        "events": [{"step": each.step, "kind": each.kind, "text": each.text} for each in run.events],
    }


def _render(data: Mapping[str, Any], context: Mapping[str, Any], *, plotly: str, lang: str) -> bytes:
    import jinja2

    loader = jinja2.FileSystemLoader(HERE / "page")
    jinja = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    script = "\n".join((HERE / "page" / name).read_text(encoding="utf-8") for name in SCRIPTS)
    hashes = " ".join(source_of(text) for text in (plotly, script))
    page = jinja.get_template("page.html.j2").render(
        context,
        texts=read_texts(lang),
        lang=lang,
        policy=POLICY.format(scripts=hashes, connect="'self'" if data["every"] else "'none'"),
        data=json_in_html(data),
        plotly=plotly,
        script=script,
        style=(HERE / "page" / "page.css").read_text(encoding="utf-8"),
    )
    return page.encode(errors="backslashreplace")


def source_of(script: str) -> str:
    """A script as the policy names it."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
