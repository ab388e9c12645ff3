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
MOST_BARS = 12  # of a picture of counts
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
        pictures={name: _pictures(result, words[name]) for name in LANGUAGES},
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


def _pictures(result: Json, words: Mapping[str, str]) -> list[View]:
    """Histograms, then counts; none where there is nothing to draw."""
    whole = result["summary"]
    found = [
        _histogram(whole[name], words["frames" if name == "lengths" else name])
        for name in SPREADS
        if name in whole
    ]
    return found + [_columns(whole[name], words[name], words) for name in COUNTS if whole[name]]


def _histogram(spread: Json, title: str) -> View:
    edges, counts = spread["edges"], spread["counts"]
    places = [(figure(low), figure(high)) for low, high in pairwise(edges)]
    labels = [low if low == high else f"{low} \N{EN DASH} {high}" for low, high in places]
    return _picture(title, counts, labels, ends=(figure(edges[0]), figure(edges[-1])))


def _columns(counts: Mapping[str, int], title: str, words: Mapping[str, str]) -> View:
    names = [words["other"] if name == "other" else name for name in counts][:MOST_BARS]
    return _picture(title, list(counts.values())[:MOST_BARS], names, ends=None)


def _picture(
    title: str, counts: Sequence[int], labels: Sequence[str], *, ends: tuple[str, str] | None
) -> View:
    """Bars side by side, each with its label and count. ends: what to write at both ends of the axis."""
    across = WIDTH / len(counts)
    most = max(counts)
    bars = [
        {
            "x": f"{number * across:.2f}",
            "y": f"{HEIGHT - count / most * HEIGHT:.2f}",
            "width": f"{max(across - 1.5, 0.5):.2f}",
            "height": f"{count / most * HEIGHT:.2f}",
            "label": labels[number],
            "count": f"{count:,}",
        }
        for number, count in enumerate(counts)
    ]
    return {"title": title, "bars": bars, "ends": ends, "most": f"{most:,}"}
