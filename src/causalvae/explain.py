"""`causalvae explain`: a training command taken apart, flag by flag, and what is to be known of it.

An Explanation is data; `as_text` and `as_json` say it in a language. Sentences about flags are in
`lang/flags.*.yaml`, those of findings in `lang/explain.*.yaml`.
"""

import json
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

from causalvae.asked import Asked, read_asked
from causalvae.commandlines import Command
from causalvae.config import TrainSettings
from causalvae.findings import LEVELS, Case, Finding, Place, of_settings
from causalvae.flags import COMMAND_LINE, Flag, flags_of, printable, to_text
from causalvae.flagtext import grouped
from causalvae.forecast import look
from causalvae.machinefindings import of_machine, of_model
from causalvae.placefindings import disk_bytes, of_command, of_paths
from causalvae.runfindings import as_it_ran
from causalvae.texts import Language, texts

FIRST = ("batch_size", "video_path", "max_steps")  # the flags to change first
# Defaults that decide much and are worth a line where they are not given.
MATTER = (
    *FIRST, "precision", "memory", "keep_checkpoints", "resume", "video_num_frames", "resolution", "model",
    "start_learning_rate", "lr_warmup_steps", "use_ema", "perceptual", "disc_type", "disc_start",
)  # fmt: skip
# Marks that begin no line, and marks that end none.
CLOSING = ",.;:!?)]}\u3001\u3002\u300b\u300d\u300f\uff01\uff09\uff0c\uff1a\uff1b\uff1f"
OPENING = "([{\u300a\u300c\u300e\uff08"


@dataclass(frozen=True)
class Explanation:
    """What a command asks for, what surrounds it, and what was found, the worst first."""

    command: Command
    asked: Asked
    case: Case
    findings: tuple[Finding, ...]


def explain(command: Command, *, place: Place | None = None, measure: bool = False) -> Explanation:
    """Read a command and look at what it would meet. Nothing is started.

    place: the machine as data; without, the one this runs on. measure: make some steps to time them.
    """
    asked = read_asked(command.flags, source=command.source or COMMAND_LINE)
    run: list[Finding] = []
    if command.run is not None:
        asked, run = as_it_ran(command.run, asked)
    case, seen = look(asked.settings, asked.given, place=place, measure=measure)
    model = of_model(case.model) if case.model is not None else ()
    found = [
        *chain(run, asked.mistakes, of_command(command), seen, of_settings(case), of_paths(case), model),
        *of_machine(case),
    ]
    return Explanation(command, asked, case, tuple(sorted(found, key=lambda each: LEVELS.index(each.level))))


@dataclass(frozen=True)
class _Voice:
    """The sentences of a language: of findings and headings, of flags, and reasons about foreign flags."""

    says: Mapping[str, str]
    plain: Mapping[str, str]
    exact: Mapping[str, str]
    foreign: Mapping[str, str]

    def sentence(self, finding: Finding, key: str) -> str:
        """A sentence of a finding with its values in their places, each on one line and fit to be shown."""
        values = {name: printable(value).rstrip(".") for name, value in finding.values.items()}
        if "because" in values:
            values["because"] = self.foreign[values["because"]]
        return self.says[key].format_map(values)


def _voice(lang: Language) -> _Voice:
    """The exact meaning in English is the help of the table itself."""
    helps = {flag.name: f"{flag.help}." for flag in flags_of(TrainSettings).values()}
    exact = helps if lang == "en" else {name: f"{text}。" for name, text in texts("exact", lang).items()}
    return _Voice(texts("explain", lang), texts("flags", lang), exact, texts("foreign", lang))


def as_json(explanation: Explanation, lang: Language) -> str:
    """The explanation as one JSON object."""
    voice, asked, case = _voice(lang), explanation.asked, explanation.case
    rows = [
        {
            "name": flag.name,
            "group": flag.group,
            "value": to_text(flag, getattr(asked.settings, flag.name)),
            "source": asked.given[flag.name].source if flag.name in asked.given else None,
            "typed": asked.typed.get(flag.name),
            "plain": voice.plain[flag.name],
            "exact": voice.exact[flag.name],
        }
        for flag in flags_of(TrainSettings).values()
    ]
    found = [
        {
            "id": each.id,
            "level": each.level,
            "flags": [*each.flags],
            "values": dict(each.values),
            "why": voice.sentence(each, each.id),
            "do": voice.sentence(each, f"{each.id}.do"),
        }
        for each in explanation.findings
    ]
    whole = {"flags": rows, "findings": found, "numbers": _numbers(case), "first": [*FIRST]}
    return json.dumps(whole, indent=1) + "\n"


def _numbers(case: Case) -> dict[str, Any]:  # Any: JSON
    """What was worked out, for programs; what is not known is left out."""
    plan, model, precision = case.plan, case.model, case.precision
    found: dict[str, Any] = {  # Any: as above
        "clips": case.settings.max_steps * case.clips_per_step,
        "videos": case.videos,
        "parameters": None if model is None else model.parameters,
        "frames": None if model is None else model.geometry.padded_frames(case.settings.video_num_frames),
        "precision": None if precision is None else precision.name,
        "amp_level": None if precision is None else precision.level,
        "parts": None if plan is None else plan.parts,
        "recompute": None if plan is None else plan.recompute,
        "step_bytes": case.peak_bytes,
        "seconds_per_step": case.seconds,
    }
    if model is not None:
        found |= {f"checkpoint_{name}_bytes": size for name, size in disk_bytes(case.settings, model).items()}
    return {name: value for name, value in found.items() if value is not None}


def as_text(explanation: Explanation, lang: Language, *, width: int, everything: bool = False) -> str:
    """The explanation for a terminal of this width. everything: flags that keep their defaults too."""
    voice = _voice(lang)
    says = voice.says
    lines = [says["ui.title"]]
    for group, flags in grouped(flags_of(TrainSettings)).items():
        lines += ["", says[f"group.{group}"]]
        rest: list[str] = []
        for flag in flags:
            if everything or flag.name in explanation.asked.given or flag.name in MATTER:
                lines += _flag_lines(explanation, flag, voice, width=width)
            else:
                rest.append(f"--{flag.name} {to_text(flag, flag.default)}")
        if rest:
            lines += _wrapped(says["ui.rest"].format(flags=says["ui.between"].join(rest)), width, indent=2)
    lines += _finding_lines(explanation, voice, width=width)
    lines += ["", says["ui.first"]]
    for name in FIRST:
        lines += _wrapped(f"--{name}: {says[f'ui.first.{name}']}", width, indent=2)
    return "\n".join(lines) + "\n"


def _flag_lines(explanation: Explanation, flag: Flag, voice: _Voice, *, width: int) -> list[str]:
    """A flag: its value and source, what it means in plain words, and exactly."""
    asked, says = explanation.asked, voice.says
    value = printable(to_text(flag, getattr(asked.settings, flag.name)))
    source = says["ui.default"]
    if flag.name in asked.given:
        source = asked.given[flag.name].source
        source = says["ui.given"].format(
            source=says["ui.command-line"] if source == COMMAND_LINE else printable(source)
        )
    if flag.name in asked.typed:
        source += ", " + says["ui.typed"].format(typed=printable(asked.typed[flag.name]))
    if flag.name == "video_path" and flag.name not in asked.given:
        value = "-"
    head = _wrapped(f"--{flag.name} {value}  ({source})", width, indent=2)
    plain = _wrapped(voice.plain[flag.name], width, indent=6, hang=0)
    exact = f"{says['ui.exact']}{voice.exact[flag.name]}"
    return [*head, *plain, *_wrapped(exact, width, indent=6, hang=0)]


def _finding_lines(explanation: Explanation, voice: _Voice, *, width: int) -> list[str]:
    """Every finding with its remedy, and how many there are."""
    says = voice.says
    lines = ["", says["ui.findings"]]
    for each in explanation.findings:
        head = f"{says[f'ui.{each.level}']}{voice.sentence(each, each.id)}"
        remedy = voice.sentence(each, f"{each.id}.do")
        lines += _wrapped(head, width, indent=2)
        if remedy != says["ui.nothing"]:
            lines += _wrapped(says["ui.remedy"] + remedy, width, indent=6)
    counts = {f"{level}s": str(sum(each.level == level for each in explanation.findings)) for level in LEVELS}
    return [*lines, *_wrapped(says["ui.count"].format_map(counts), width, indent=2)]


def _wrapped(text: str, width: int, *, indent: int, hang: int = 2) -> list[str]:
    """Lines of at most this many columns, the first indented by `indent` and the others by `hang` more.

    A Chinese character takes two columns, and a line may end after it unless a closing mark follows.
    """
    lines: list[str] = []
    line, used = " " * indent, indent
    for piece in _unbroken(text):
        columns = sum(map(_columns, piece))
        if used + sum(map(_columns, piece.rstrip())) > width and line.strip():
            lines.append(line.rstrip())
            line, used = " " * (indent + hang), indent + hang
        line, used = line + piece, used + columns
    return [*lines, line.rstrip()]


def _unbroken(text: str) -> Iterator[str]:
    """Pieces between which a line may end: words with the spaces behind them, and wide characters."""
    piece = ""
    for character in text:
        may_end = piece.endswith(" ") or (piece and (_is_wide(piece[-1]) or _is_wide(character)))
        if may_end and character != " " and character not in CLOSING and piece[-1] not in OPENING:
            yield piece
            piece = ""
        piece += character
    if piece:
        yield piece


def _is_wide(character: str) -> bool:
    return unicodedata.east_asian_width(character) in ("W", "F")


def _columns(character: str) -> int:
    """Columns of a terminal that a character takes."""
    return 2 if _is_wide(character) else 0 if unicodedata.combining(character) else 1
