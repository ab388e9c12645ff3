"""The page of a scan: one HTML file that needs nothing else, in two languages, with pictures drawn here.

Text goes through a template that escapes it. The page's policy allows the one script in it by its checksum.
"""

import importlib.util
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from causalvae.errors import ConfigError
from causalvae.report.build import EXTRA, HERE, LANGUAGES, POLICY, source_of
from causalvae.report.scanviews import COUNTS, SPREADS, Section, figure, sections
from causalvae.texts import texts

WIDTH, HEIGHT = 480.0, 140.0  # of a picture, in its own units
MOST_ROWS = 500  # of a table on the page

Json = Mapping[str, Any]  # Any: JSON
View = dict[str, Any]  # Any: what a template reads


def need_extra() -> None:
    """ConfigError unless pages can be made here."""
    if importlib.util.find_spec("jinja2") is None:
        raise ConfigError(EXTRA.format(command="data scan --out"))


def scan_page(result: Json, *, lang: str) -> bytes:
    """The page about a scan. result: its JSON. lang: the language that it opens in."""
    import jinja2

    loader = jinja2.FileSystemLoader(HERE / "page")
    jinja = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    words = {name: texts("scan", name) for name in LANGUAGES}
    script = (HERE / "page" / "scan.js").read_text(encoding="utf-8")
    page = jinja.get_template("scan.html.j2").render(
        lang=lang,
        words=words,
        sections={name: _views(sections(result, words[name]), words[name]) for name in LANGUAGES},
        histograms={name: _histograms(result, words[name]) for name in LANGUAGES},
        counts={name: _counts(result, words[name]) for name in LANGUAGES},
        policy=POLICY.format(scripts=source_of(script), connect="'none'"),
        script=script,
        style=(HERE / "page" / "page.css").read_text(encoding="utf-8"),
    )
    return page.encode(errors="backslashreplace")


def _views(parts: Sequence[Section], words: Mapping[str, str]) -> list[View]:
    views: list[View] = []
    for part in parts:
        left = len(part.rows) - MOST_ROWS
        more = words["and_more"].format_map({"count": left}) if left > 0 else ""
        views.append({**vars(part), "rows": part.rows[:MOST_ROWS], "more": more})
    return views


def _histograms(result: Json, words: Mapping[str, str]) -> list[View]:
    """Bars side by side for each number that there is, each with its range and count."""
    titles = {**words, "lengths": words["frames"]}
    return [
        _histogram(result["summary"][name], titles[name]) for name in SPREADS if name in result["summary"]
    ]


def _histogram(spread: Json, title: str) -> View:
    edges, counts = [figure(edge) for edge in spread["edges"]], spread["counts"]
    across, most = WIDTH / len(counts), max(counts)
    bars = [
        {
            "x": f"{number * across:.2f}",
            "y": f"{HEIGHT - count / most * HEIGHT:.2f}",
            "width": f"{max(across - 1.5, 0.5):.2f}",
            "height": f"{count / most * HEIGHT:.2f}",
            "label": low if low == high else f"{low} \N{EN DASH} {high}",
            "count": f"{count:,}",
        }
        for number, (count, (low, high)) in enumerate(zip(counts, pairwise(edges), strict=True))
    ]
    return {"title": title, "bars": bars, "ends": (edges[0], edges[-1]), "most": f"{most:,}"}


def _counts(result: Json, words: Mapping[str, str]) -> list[View]:
    """A bar across for each word that is counted."""
    found: list[View] = []
    for name in COUNTS:
        counts: Mapping[str, int] = result["summary"][name]
        most = max(counts.values(), default=1)
        rows = [
            {
                "name": words["other"] if what == "other" else what,
                "width": f"{count / most * WIDTH:.2f}",
                "count": f"{count:,}",
            }
            for what, count in counts.items()
        ]
        found += [{"title": words[name], "rows": rows[:MOST_ROWS]}] if rows else []
    return found
