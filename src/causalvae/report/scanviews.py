"""What a scan of a dataset says, in words: the same lines and tables for the terminal and for the page.

They are made from the JSON of the scan, as plain text: who shows them escapes them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.cells import cell_len

from causalvae.flags import printable

LISTED = 10  # broken videos and groups of copies on the terminal
SIZES = ("B", "kB", "MB", "GB", "TB", "PB")
SPREADS = ("lengths", "durations", "short_sides")
COUNTS = ("shapes", "rates", "codecs", "containers")
QUANTILES = ("min", "p5", "median", "p95", "max")
HEADS = ("least", "p5", "median", "p95", "most")

Json = Mapping[str, Any]  # Any: JSON
Words = Mapping[str, str]
Row = tuple[str, ...]


@dataclass(frozen=True)
class Section:
    """A heading, lines under it, and a table with or without a first row of headings.

    more: how many rows of the table a terminal does not show, in words.
    """

    heading: str
    lines: tuple[str, ...] = ()
    head: Row = ()
    rows: tuple[Row, ...] = ()
    more: str = ""


def sections(result: Json, words: Words) -> list[Section]:
    """All that a scan says but for the pictures. words: of the topic `scan`."""
    return [
        _whole(result, words),
        _spreads(result, words),
        _counts(result, words),
        _broken(result, words),
        _copies(result, words),
        _draws(result, words),
    ]


def as_text(parts: Sequence[Section]) -> str:
    """Sections for a terminal; of long tables the first rows."""
    blocks: list[str] = []
    for part in parts:
        rows = part.rows[:LISTED] if part.more else part.rows
        lines = [part.heading, *(f"  {line}" for line in part.lines)]
        lines += [f"  {line}" for line in _table(([part.head] if part.head else []) + list(rows))]
        lines += [f"  {part.more}"] if part.more else []
        blocks.append("\n".join(lines) + "\n")
    return "\n".join(blocks)


def size(num_bytes: float) -> str:
    """An amount of bytes: `1.5 GB`."""
    step = 0
    while num_bytes >= 1000 and step < len(SIZES) - 1:
        num_bytes, step = num_bytes / 1000, step + 1
    return f"{num_bytes:.1f} {SIZES[step]}" if step else f"{num_bytes:.0f} B"


def clock(seconds: float) -> str:
    """A stretch of time in any language: `12:05:09`, `0:03.2`."""
    if seconds < 60:
        return f"0:{seconds:04.1f}"
    whole = round(seconds)
    minutes, left = divmod(whole, 60)
    return f"{minutes}:{left:02}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02}:{left:02}"


def figure(value: float) -> str:
    """A number with as many digits as one looks at."""
    return f"{value:,.0f}" if value >= 100 or value == round(value) else f"{value:.3g}"


def _whole(result: Json, words: Words) -> Section:
    whole, broken = result["summary"], sum(each["whole"] for each in result["broken"])
    lines = [words["holds"].format_map({**whole, "broken": broken})]
    shown = {"duration": clock(whole["seconds"]), "size": size(whole["bytes"])}
    lines.append(words["total"].format_map({"frames": whole["frames"], **shown}))
    lines.append(
        words["read"].format_map({**result["reading"], "seconds": clock(result["reading"]["seconds"])})
    )
    changes = result.get("changes")
    if changes is not None:
        lines.append(words["changes"].format_map(changes) if any(changes.values()) else words["no_changes"])
    if "problem" in result:
        lines.append(words["fewer"].format_map({"problem": printable(result["problem"])}))
    return Section(words["title"].format_map({"name": printable(result["source"])}), tuple(lines))


def _spreads(result: Json, words: Words) -> Section:
    rows: list[Row] = []
    for name in SPREADS:
        found = result["summary"].get(name)
        if found is not None:
            label = words["frames" if name == "lengths" else name]
            rows.append((label, *(figure(found["quantiles"][each]) for each in QUANTILES)))
    return Section(words["spread"], head=("", *(words[name] for name in HEADS)), rows=tuple(rows))


def _counts(result: Json, words: Words) -> Section:
    rows: list[Row] = []
    for name in COUNTS:
        for number, (what, count) in enumerate(result["summary"][name].items()):
            told = words["other"] if what == "other" else printable(what)
            rows.append(("" if number else words[name], told, f"{count:,}"))
    return Section(words["counts"], rows=tuple(rows))


def _broken(result: Json, words: Words) -> Section:
    records = result["broken"]
    lines = [] if result["reading"]["checked"] else [words["unchecked"]]
    if not records:
        return Section(words["broken"], (words["nothing_broken"], *lines))
    damaged = sum(not each["whole"] for each in records)
    lines += [words["damaged"].format_map({"count": damaged})] if damaged else []
    rows = tuple((printable(each["video"]), printable(each["reason"])) for each in records)
    return Section(words["broken"], tuple(lines), rows=rows, more=_more(len(rows), words))


def _copies(result: Json, words: Words) -> Section:
    groups = result.get("duplicates")
    if not groups:
        return Section(words["same"], (words["not_looked" if groups is None else "nothing_same"],))
    videos = sum(len(group["videos"]) for group in groups)
    spare = sum(group["bytes"] * (len(group["videos"]) - 1) for group in groups)
    line = words["same_count"].format_map({"groups": len(groups), "videos": videos, "size": size(spare)})
    rows = tuple((size(g["bytes"]), ", ".join(printable(video) for video in g["videos"][:4])) for g in groups)
    return Section(words["same"], (line,), rows=rows, more=_more(len(rows), words))


def _draws(result: Json, words: Words) -> Section:
    run = result["draws"]
    if not run["usable"]:
        return Section(words["draws"], (words["nothing_usable"],))
    key = "run" if run["passes"] >= 1 else "run_once"
    lines = [words[key].format_map({**run, "passes": figure(run["passes"])})]
    broken = run["videos"] - run["usable"]
    lines += [words["replaced"].format_map({"broken": broken})] if broken else []
    for shape in run["shapes"]:
        lines.append(words["clip"].format_map(shape))
        if shape["starts"]:
            lines.append(words["starts"].format_map(shape))
        lines.append(words[_short(run, shape)].format_map(shape))
        lines += [words["upscaled"].format_map(shape)] if shape["upscaled"] else []
    return Section(words["draws"], tuple(lines))


def _short(run: Json, shape: Json) -> str:
    """The text about videos that are too short for a shape."""
    if not shape["short"]:
        return "none_short"
    if shape["short"] == run["usable"]:
        return "short_all_skip" if run["short_videos"] == "skip" else "short_all"
    return f"short_{run['short_videos']}"


def _more(rows: int, words: Words) -> str:
    return words["and_more"].format_map({"count": rows - LISTED}) if rows > LISTED else ""


def _table(rows: Sequence[Row]) -> list[str]:
    """Rows as lines whose cells stand under each other, in any script."""
    if not rows:
        return []
    widths = [max(cell_len(row[i]) for row in rows) for i in range(len(rows[0]))]
    padded = ([cell + " " * (widths[i] - cell_len(cell)) for i, cell in enumerate(row)] for row in rows)
    return ["  ".join(row).rstrip() for row in padded]
