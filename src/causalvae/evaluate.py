"""The command `eval`: checkpoints over a pinned set of clips, as JSON files and a table."""

import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from causalvae.bars import Track, progress_bars
from causalvae.data.decode import printable
from causalvae.data.sources import open_source
from causalvae.errors import ConfigError
from causalvae.evalflags import FRAMES, PER_VIDEO, SIZE, STRIDE
from causalvae.evalset import ClipRule, ClipSet, check_clips, choose_clips, read_manifest
from causalvae.evalwork import Job, films_of_worst, first_clip, in_words, measure, summed
from causalvae.files import disk_error, plain, write_whole
from causalvae.infer import plain_arithmetic
from causalvae.locks import held
from causalvae.machine import pick_device
from causalvae.perceptual import Shelf
from causalvae.probes import probed
from causalvae.scores import FORMAT
from causalvae.subjects import (
    DATA,
    Judges,
    Panel,
    Reading,
    Subject,
    cost_of,
    metrics_for,
    read_panel,
    read_subject,
)
from causalvae.worst import MOST, Worst, film_folder, with_films, write_films

MANIFEST = "manifest.json"
SHOWN_LEFT_OUT = 5  # videos that are named on the terminal; the files name all
Json = Mapping[str, Any]  # Any: JSON values nest


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What clips are asked for; None: what the manifest says, or else the default."""

    frames: int | None = None
    size: tuple[int, int] | None = None
    stride: int | None = None
    per_video: int | None = None

    def rule(self) -> ClipRule:
        """With the defaults for what was not asked."""
        chosen = {name: value for name, value in vars(self).items() if value is not None}
        default = ClipRule(frames=FRAMES, size=(SIZE.height, SIZE.width), stride=STRIDE, per_video=PER_VIDEO)
        return replace(default, **chosen)

    def differs(self, rule: ClipRule) -> bool:
        """Whether something else was asked for than a rule says."""
        return any(value is not None and value != getattr(rule, name) for name, value in vars(self).items())


@dataclass(frozen=True, kw_only=True)
class Work:
    """How the work is done. batch_size: clips at once. workers: threads that decode ahead, 0 for none.

    films: worst clips of which films are written.
    """

    batch_size: int = 1
    workers: int = 2
    films: int = MOST


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """What came out. results: the JSON of each checkpoint. files: where it is. text: for the terminal."""

    results: tuple[dict[str, Any], ...]  # Any: JSON
    files: tuple[Path, ...]
    text: str


def evaluate(
    checkpoints: Sequence[str],
    *,
    out: Path | str,
    video_path: str | None = None,
    manifest: Path | str | None = None,
    asked: Asked | None = None,
    judges: Judges | None = None,
    work: Work | None = None,
    how: Reading | None = None,
) -> Evaluated:
    """Evaluate checkpoints on clips of a folder or of a manifest; write manifest and results into `out`.

    checkpoints: paths, or the word `data`. how: they are read; the device may be `auto`. docs/eval.md has
    the rest. RunError if another process writes into `out`.
    """
    asked, judges, work, how = asked or Asked(), judges or Judges(), work or Work(), how or Reading()
    for each in checkpoints:
        if each != DATA and not Path(each).exists():
            raise ConfigError(f"--checkpoint {printable(each)}: there is no such file or folder")
    how = replace(how, device=pick_device(how.device))
    out, manifest = Path(out), None if manifest is None else Path(manifest)
    results: list[dict[str, Any]] = []  # Any: as above
    with held(out), progress_bars() as track, plain_arithmetic():
        clips = _settle(out, video_path, manifest=manifest, asked=asked, track=track)
        notes = in_words(clips.unreadable, most=SHOWN_LEFT_OUT)
        shelf = Shelf.of(os.environ)
        device, size = torch.device(how.device), clips.rule.size
        panel = read_panel(judges, clips=len(clips.clips), size=size, shelf=shelf, device=device)
        for each in dict.fromkeys(checkpoints):
            subject = read_subject(each, how, size=size)
            result, said = _one(subject, out, panel=panel, clips=clips, work=work, track=track)
            results.append(result)
            notes += said
    files = tuple(out / f"{result['name']}.json" for result in results)
    text = "".join(f"warning: {printable(note)}\n" for note in notes) + table(results)
    text += "".join(f"{printable(str(file))}\n" for file in files)
    return Evaluated(results=tuple(results), files=files, text=text)


def _one(
    subject: Subject, out: Path, *, panel: Panel, clips: ClipSet, work: Work, track: Track
) -> tuple[dict[str, Any], list[str]]:  # Any: JSON
    """One checkpoint: its result, which is written, and what is worth saying."""
    place, path = out / f"{subject.name}.json", out / f"{subject.name}.clips.jsonl"
    job = Job(subject=subject, panel=panel, clips=clips, metrics=metrics_for(subject, panel), path=path)
    advance, worst = track(subject.name, len(clips.clips)), Worst(work.films)
    measuring = measure(job, batch_size=work.batch_size, workers=work.workers, advance=advance, worst=worst)
    notes = [*subject.notes, *measuring]
    found = summed(job)
    if work.films and subject.vae is not None:
        names = write_films(film_folder(place), films_of_worst(job, found["clips"], worst))
        found["clips"] = with_films(found["clips"], names)
    result = _result(job, found)
    if panel.asked.probes and subject.vae is not None:
        more = probed(subject, subject.vae, clips=clips, fill=found["latents"]["mean"])
        result["metrics"] |= more["metrics"]
        result["curves"] |= more["curves"]
    if panel.asked.cost and subject.vae is not None:
        result["compute"] = cost_of(subject.vae, first_clip(clips))
    if "other_pixels" in found:
        notes.append(
            f"{found['other_pixels']} of {len(clips.clips)} clips are decoded to other pixels here than "
            "where the manifest was made, so numbers may differ in their last digits"
        )
    _write(place, result)
    return result, notes


def _result(job: Job, found: Json) -> dict[str, Any]:  # Any: JSON
    """The file of results: what was measured, on what, and the numbers."""
    subject, clips = job.subject, job.clips
    return {
        "format": FORMAT,
        "name": subject.name,
        "checkpoint": subject.facts,
        **({} if subject.step is None else {"step": subject.step}),
        "settings": clips.rule.settings(),
        "manifest": {"file": MANIFEST, "sha256": clips.digest},
        "judges": dict(job.panel.facts),
        **found,
        "unreadable": list(clips.unreadable),
    }


def _settle(
    out: Path, video_path: str | None, *, manifest: Path | None, asked: Asked, track: Track
) -> ClipSet:
    """The clips: those of the manifest that is given, else those that `out` has already, else chosen now."""
    here = out / MANIFEST
    if manifest is None and not here.exists():
        if video_path is None:
            raise ConfigError("an evaluation needs --video_path or --manifest")
        return _chosen(here, video_path, asked=asked, track=track)
    named = here if manifest is None else manifest
    clips = read_manifest(named, video_path=video_path)
    if manifest is None:
        assert video_path is not None
        _refuse_other_clips(out, clips, video_path=video_path, asked=replace(asked, **vars(asked.rule())))
    elif asked.differs(clips.rule):
        said = ", ".join(f"{name} {value}" for name, value in clips.rule.settings().items())
        raise ConfigError(f"--manifest {manifest}: its clips have {said}; leave out flags that say otherwise")
    advance = track("checking", len({clip.video.id for clip in clips.clips}))
    for _ in check_clips(clips):
        advance(1)
    if not here.exists():
        _write(here, clips.content())
    elif read_manifest(here, video_path=video_path).digest != clips.digest:
        raise ConfigError(f"--out {out}: has results of other clips; choose another folder")
    return clips


def _chosen(here: Path, video_path: str, *, asked: Asked, track: Track) -> ClipSet:
    advance = track("choosing", len(open_source(video_path)))
    clips = choose_clips(video_path, asked.rule(), advance=lambda _: advance(1))
    _write(here, clips.content())
    return clips


def _refuse_other_clips(out: Path, clips: ClipSet, *, video_path: str, asked: Asked) -> None:
    """ConfigError unless the clips in `out` are those that the rule would choose again."""
    source = open_source(video_path)
    known = {clip.video.id for clip in clips.clips} | {each["video"] for each in clips.unreadable}
    new = [source[i].id for i in range(len(source)) if source[i].id not in known]
    what = (
        f"{printable(new[0])} is new in {printable(video_path)}" if new else "the flags ask for other clips"
    )
    if new or asked.differs(clips.rule):
        raise ConfigError(
            f"--out {out}: has results of other clips: {what}; choose another --out, or give --manifest "
            f"{out / MANIFEST} for the same clips as before"
        )


def table(results: Sequence[Json]) -> str:
    """Metrics by checkpoint, with intervals, as text."""
    shown = Table(highlight=False)
    for heading in ("metric", "unit", "better"):
        shown.add_column(heading)
    for result in results:
        shown.add_column(Text(result["name"]), justify="right")
    units = {name: facts for result in results for name, facts in result["metrics"].items()}
    for name, facts in units.items():
        words = [Text(name), facts["unit"], facts["better"] or ""]
        shown.add_row(*words, *(Text(_cell(result["metrics"].get(name))) for result in results))
    counts = [str(len(result["clips"])) for result in results]
    shown.add_row("clips", "", "", *counts)
    return as_text(shown)


def as_text(shown: Table) -> str:
    """A table as lines, as wide as the terminal is and at least 100 columns."""
    file = io.StringIO()
    Console(file=file, width=max(100, Console().width), highlight=False).print(shown)
    return "".join(line.rstrip() + "\n" for line in file.getvalue().splitlines())


def _cell(facts: Json | None) -> str:
    if facts is None:
        return ""
    text = f"{facts['mean']:.4g}"
    return f"{text} [{facts['low']:.4g}, {facts['high']:.4g}]" if "low" in facts else text


def _write(path: Path, content: Json) -> None:
    try:
        write_whole(path, json.dumps(plain(content), indent=1) + "\n")
    except OSError as error:
        raise disk_error(error, path) or error from error
