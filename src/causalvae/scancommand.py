"""The command `data scan`: settings taken apart, a dataset read, and what came of it told in words."""

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from causalvae import __version__
from causalvae.commandlines import read_command
from causalvae.config import TrainSettings, read_settings
from causalvae.data.draws import draws
from causalvae.data.index import prepare
from causalvae.data.quarantine import Record, as_lines
from causalvae.data.scan import Progress, Reading, Scan, scan, source_name, summary
from causalvae.data.sources import open_source
from causalvae.errors import ConfigError
from causalvae.files import disk_error, plain, write_whole
from causalvae.flags import flags_of, printable, to_text
from causalvae.foreignflags import translate
from causalvae.machine import Machine, home
from causalvae.report.scanpage import need_extra, scan_page
from causalvae.report.scanviews import as_text, sections
from causalvae.scanflags import RUN_FLAGS, ScanSettings
from causalvae.texts import language, texts
from causalvae.train.parts import clip_plan

FORMAT = "causalvae scan 1"

Json = Mapping[str, Any]  # Any: JSON


def run_scan(paths: Sequence[str], settings: ScanSettings, *, command: Sequence[str] | None) -> str:
    """Scan the dataset that was named, or that of the training command; write files, return what to print.

    paths: words that are no flags. command: words of a training command.
    """
    run, notes = _run_settings(paths, settings, command=command)
    lang = language(settings.lang, os.environ)
    words = texts("scan", lang)
    if settings.out is not None:
        need_extra()
    _check_places(settings)
    source = open_source(run.video_path)
    index, warnings = prepare(home(os.environ))
    warnings = notes + warnings
    cores = Machine.look().cores
    reading = Reading(
        check=settings.decode,
        duplicates=settings.duplicates,
        refresh=settings.refresh,
        workers=cores if settings.dataloader_num_workers is None else settings.dataloader_num_workers,
        timeout=settings.clip_timeout,
    )
    began = time.monotonic()
    with _bar(words["reading"]) as progress:
        found = scan(
            source, name=source_name(run.video_path), reading=reading, index=index, progress=progress
        )
    result = _result(found, source.name, run, reading=reading, seconds=time.monotonic() - began)
    said = _write(result, found.broken(), settings, words=words, lang=lang)
    if settings.json:
        return json.dumps(plain({**result, "warnings": warnings}), indent=1) + "\n"
    text = "".join(f"warning: {printable(warning)}\n" for warning in warnings)
    return text + as_text(sections(result, words)) + "".join(f"\n{line}\n" for line in said)


def _run_settings(
    paths: Sequence[str], settings: ScanSettings, *, command: Sequence[str] | None
) -> tuple[TrainSettings, list[str]]:
    """The training that clips are drawn for: what was given of it, and defaults; and notes on its flags."""
    if len(paths) > 1:
        raise ConfigError(f"causalvae data scan: one dataset at a time, not {' and '.join(paths)}")
    given, notes = translate(() if command is None else read_command(command).flags)
    given += [f"--video_path={path}" for path in paths]
    flags = flags_of(settings)
    for name in RUN_FLAGS:
        value: object = getattr(settings, name)
        given += [f"--{name}={to_text(flags[name], value)}"] if value is not None else []
    if not any(word.split("=")[0].replace("-", "_") in ("__video_path", "__config") for word in given):
        raise ConfigError("causalvae data scan: name a dataset, as --video_path of training takes it")
    return read_settings(TrainSettings, given)[0], notes


def _result(found: Scan, name: str, run: TrainSettings, *, reading: Reading, seconds: float) -> Json:
    """The whole scan as JSON. What was not looked for is absent."""
    plan = clip_plan(run)
    whole = {name: value for name, value in summary(found).items() if value is not None}
    result: dict[str, Any] = {
        "format": FORMAT,
        "causalvae": __version__,
        "source": name,
        "video_path": run.video_path,
        "summary": whole,
        "broken": found.broken(),
        "draws": asdict(draws(found.facts, plan, videos=len(found.videos), steps=run.max_steps)),
        "reading": {
            "read": len(found.videos) - found.known,
            "known": found.known,
            "seconds": round(seconds, 3),
            "checked": all(facts.checked for facts in found.facts),
        },
    }
    if reading.duplicates:
        result["duplicates"] = found.duplicates()
    if found.changes is not None:
        result["changes"] = asdict(found.changes)
    if found.problem is not None:
        result["problem"] = found.problem
    return result


def _check_places(settings: ScanSettings) -> None:
    """ConfigError where a file that will be written can't be, before anything is read."""
    for name in ("out", "quarantine"):
        path: str | None = getattr(settings, name)
        if path is None:
            continue
        absolute = Path(path).absolute()
        parent = next(each for each in absolute.parents if each.exists())
        if absolute.is_dir() or not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            what = "is a folder" if absolute.is_dir() else f"{printable(str(parent))} can't be written to"
            raise ConfigError(f"--{name} {printable(path)}: {what}; name another file, or none")


def _write(
    result: Json, broken: Sequence[Record], settings: ScanSettings, *, words: Mapping[str, str], lang: str
) -> list[str]:
    """Write the list and the page that were asked for; what to say of them."""
    said: list[str] = []
    path = None if settings.quarantine is None else Path(settings.quarantine)
    if path is not None and (broken or path.exists()):
        _put(path, as_lines(broken))
        said += [words["quarantine"].format_map({"path": printable(str(path))})] if broken else []
    if settings.out is not None:
        _put(Path(settings.out), scan_page(result, lang=lang))
        said.append(words["page"].format_map({"path": printable(settings.out)}))
    return said


def _put(path: Path, content: str | bytes) -> None:
    try:
        write_whole(path, content)
    except OSError as error:
        raise disk_error(error, path) or error from error


@contextmanager
def _bar(label: str) -> Iterator[Progress]:
    """A bar on a terminal, nothing elsewhere; on the error stream, so that the table can be piped."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bars(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task(label, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)
