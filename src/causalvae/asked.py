"""What a training command asks for, read so that one mistake does not hide the rest.

`flags.read_settings` stops at the first mistake, as a run must. Here every flag that can be read is taken,
every other becomes a finding, and settings that can't be together lose the one that is refused.
"""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from causalvae.config import TrainSettings
from causalvae.errors import ConfigError
from causalvae.files import redact
from causalvae.findings import Finding, flag_of
from causalvae.flags import COMMAND_LINE, Flag, Given, asked_for, closest, flags_of, parse, yaml_pairs
from causalvae.foreignflags import Piece, in_words, pieces, turned

STAND_IN = "sample:"  # for videos that are not named, so that the rest can be explained
# What to leave out where the flag that a message names was not given itself.
PARTNERS = {"end_learning_rate": ("start_learning_rate", "lr_scheduler"), "resolution": ("model",)}


@dataclass(frozen=True)
class Asked:
    """Settings that can be, what was given, and mistakes. typed: how a flag was spelled, where otherwise."""

    settings: TrainSettings
    given: Mapping[str, Given]
    typed: Mapping[str, str]
    mistakes: tuple[Finding, ...]


def read_asked(argv: Sequence[str], *, source: str = COMMAND_LINE) -> Asked:
    """The settings of these flags, and of the file that `--config` names. source: what to call the flags'."""
    found = pieces(argv)
    notes: list[Finding] = []
    given: dict[str, Given] = {}
    typed: dict[str, str] = {}
    files = [piece for piece in found if piece.name in ("config", "c") and len(piece.words) == 1]
    if files:
        path = files[-1].words[0]
        try:
            pairs = yaml_pairs(Path(path))
        except ConfigError as error:
            notes.append(
                Finding("config-unreadable", "problem", ("config",), {"path": path, "said": str(error)})
            )
            pairs = []
        _take(_pieces_of(pairs), str(path), given=given, typed=typed, notes=notes)
        given = asked_for(given, flags_of(TrainSettings), Path(path)) if given else given
    _take(found, source, given=given, typed=typed, notes=notes)
    return _together(given, typed, notes)


def _pieces_of(pairs: Sequence[tuple[yaml.Node, yaml.Node]]) -> list[Piece]:
    """The settings of a file as flags with their words; what is no value and no list is one odd word."""
    made: list[Piece] = []
    for key, node in pairs:
        items = node.value if isinstance(node, yaml.SequenceNode) else [node]
        words = tuple(item.value if isinstance(item, yaml.ScalarNode) else "{...}" for item in items)
        name = str(key.value) if isinstance(key, yaml.ScalarNode) else "{...}"
        made.append(Piece(name, name.replace("-", "_"), words, (f"{name}:", *words)))
    return made


def _take(
    found: Sequence[Piece],
    source: str,
    *,
    given: dict[str, Given],
    typed: dict[str, str],
    notes: list[Finding],
) -> None:
    """Add what these pieces give, and what is to be said of them. Of a repeated flag the last one counts."""
    flags = flags_of(TrainSettings)
    own: dict[str, Piece] = {}
    for piece in found:
        shown = {"typed": _shown(piece)}
        ours = turned(piece.name, piece.words) if piece.name else None
        if ours is not None and ours.kind != "renamed":
            kind = "alias-dropped" if ours.kind == "dropped" else "alias-refused"
            level = "note" if ours.kind == "dropped" else "problem"
            about = (piece.name,) if piece.name in flags else ()
            notes.append(Finding(kind, level, about, {**shown, "because": ours.why}))
            continue
        name, words = (piece.name, piece.words) if ours is None else (ours.name, ours.words)
        if ours is not None:
            notes.append(Finding("alias", "note", (name,), {**shown, "ours": in_words(ours)}))
        if name not in flags:
            notes.append(_unknown(piece, flags))
            continue
        value = _value(flags[name], words, shown, notes)
        if value is MISSING:
            continue
        before = own.setdefault(name, piece)
        if before.name != piece.name and given[name].value != value:
            values = {"one": _shown(before), "other": _shown(piece), "name": name}
            notes.append(Finding("alias-differs", "problem", (name,), values))
            continue
        given[name] = Given(value, source)
        if ours is not None:
            typed[name] = piece.typed


def _value(flag: Flag, words: Sequence[str], shown: Mapping[str, str], notes: list[Finding]) -> object:
    """The value of a flag; MISSING, and a finding, if it has none that can be."""
    if not words and flag.kind is not bool:
        notes.append(Finding("value-missing", "problem", (flag.name,), shown))
        return MISSING
    try:
        return parse(flag, words or ("True",))
    except ConfigError as error:
        notes.append(Finding("value-wrong", "problem", (flag.name,), {**shown, "said": str(error)}))
        return MISSING


def _shown(piece: Piece) -> str:
    """A flag as it was typed, without what may be a secret."""
    return " ".join(redact(piece.raw))


def _unknown(piece: Piece, flags: Mapping[str, Flag]) -> Finding:
    if not piece.name:
        return Finding("stray-word", "problem", (), {"typed": _shown(piece)})
    guess = closest(piece.name, list(flags))
    if guess is None:
        return Finding("flag-unknown", "problem", (), {"typed": _shown(piece)})
    return Finding("flag-misspelt", "problem", (), {"typed": _shown(piece), "guess": guess})


def _together(given: dict[str, Given], typed: Mapping[str, str], notes: list[Finding]) -> Asked:
    """The settings, without those that the others refuse."""
    names = {field.name for field in fields(TrainSettings)}
    kept = dict(given)
    if "video_path" not in kept:
        notes.append(Finding("videos-not-named", "problem", ("video_path",)))
    while True:
        values: dict[str, Any] = {  # Any: each field checks its own
            "video_path": STAND_IN,
            **{name: item.value for name, item in kept.items() if name in names},
        }
        try:
            return Asked(TrainSettings(**values), kept, typed, tuple(notes))
        except ConfigError as error:
            name = flag_of(str(error))
            guilty = next((each for each in (name, *PARTNERS.get(name, ())) if each in kept), None)
            if guilty is None:
                raise
            notes.append(Finding("value-refused", "problem", (name,), {"said": str(error)}))
            del kept[guilty]
