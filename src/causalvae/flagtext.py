"""A settings table as text: `--help` for a terminal, Markdown for the docs, YAML for `--config`."""

import re
import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING

from causalvae.flags import SAVED, Flag, Given, MemoryBudget, Resolution, flags_of, printable, to_text

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

KINDS = {bool: "True|False", int: "N", float: "X", str: "TEXT", Resolution: "SIZE", MemoryBudget: "AMOUNT"}
PLAIN_TEXT = re.compile(r"[A-Za-z][\w./-]*", re.ASCII)  # what YAML needs no quotes for, but the words below
YAML_WORDS = ("true", "false", "yes", "no", "on", "off", "null", "y", "n")
LEFT = 30  # columns of flag and kind in --help
HELP_END = (
    "The value in [brackets] is the default. - and _ are the same in a flag's name; True may be left out; of "
    "a flag given twice the last one counts."
)
MIN_WIDTH, MAX_WIDTH = 60, 110


def value_words(flag: Flag) -> str:
    """What may stand behind the flag: `N`, `True|False`, or the choices."""
    if flag.choices:
        return "|".join(flag.choices)
    words = " ".join(KINDS[kind] for kind in flag.kinds)
    if flag.is_list:
        words += ",..."
    if flag.kind is str and flag.name.endswith(("path", "dir", "checkpoint", "config")):
        words = "PATH"
    return f"{words}|{flag.none_word}" if flag.none_word not in (None, "none") else words


def default_text(flag: Flag) -> str:
    """The default as written in a command; `required` where there is none."""
    return "required" if flag.required else to_text(flag, flag.default)


def default_texts(table: "type[DataclassInstance]") -> dict[str, str]:
    """The default of every flag, as written in a command."""
    return {name: default_text(flag) for name, flag in flags_of(table).items()}


def grouped(flags: Mapping[str, Flag]) -> dict[str, list[Flag]]:
    """The flags by group, in the order of the table."""
    groups: dict[str, list[Flag]] = {}
    for flag in flags.values():
        groups.setdefault(flag.group, []).append(flag)
    return groups


def help_text(table: "type[DataclassInstance]", *, usage: str, intro: str, width: int) -> str:
    """The help page of a command for a terminal of this width."""
    width = max(MIN_WIDTH, min(width, MAX_WIDTH))
    lines = [f"usage: {usage}", "", *textwrap.wrap(intro, width)]
    for group, flags in grouped(flags_of(table)).items():
        lines += ["", group]
        for flag in flags:
            left = f"  --{flag.name} {value_words(flag)}"
            text = f"{flag.help} [{default_text(flag)}]"
            right = textwrap.wrap(text, width - LEFT, break_on_hyphens=False)
            if len(left) < LEFT - 1:
                left, right = left.ljust(LEFT) + right[0], right[1:]
            lines += [left, *(" " * LEFT + line for line in right)]
    if flags_of(table):
        lines += ["", *textwrap.wrap(HELP_END, width)]
    return "\n".join(lines) + "\n"


def markdown(table: "type[DataclassInstance]", *, title: str) -> str:
    """The docs page of a command: a table for each group."""
    lines = [
        f"# {title}",
        "",
        "Made from the table in `src/causalvae/config.py` by `python -m causalvae.config > docs/flags.md`.",
        "Every flag may be given in a `--config` file too.",
    ]
    for group, flags in grouped(flags_of(table)).items():
        lines += ["", f"## {group}", "| flag | value | default | meaning |", "|---|---|---|---|"]
        for flag in flags:
            cells = (f"`{flag.name}`", f"`{value_words(flag)}`", f"`{default_text(flag)}`", flag.help)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def to_yaml(settings: "DataclassInstance", given: Mapping[str, Given] | None = None) -> str:
    """Every setting in force, by group, with a remark where it came from if not from the defaults.

    `--config` takes it back and gives the same settings, and what has no remark counts as not given.
    """
    lines = [SAVED]
    for group, flags in grouped(flags_of(settings)).items():
        lines += ["", f"# {group}"]
        for flag in flags:
            if flag.name == "config":
                continue  # its settings are all here
            line = f"{flag.name}: {yaml_text(flag, getattr(settings, flag.name))}"
            source = given[flag.name].source if given and flag.name in given else None
            lines.append(f"{line}  # {printable(source)}" if source else line)
    return "\n".join(lines) + "\n"


def yaml_text(flag: Flag, value: object) -> str:
    """A value as YAML: text in quotes where another reader could take it for something else."""
    text = to_text(flag, value)
    if flag.size > 1 or (flag.is_list and value is not None):
        return f"[{text.replace(',' if flag.is_list else ' ', ', ')}]"
    if not isinstance(value, str) or (PLAIN_TEXT.fullmatch(text) and text.lower() not in YAML_WORDS):
        return text
    escaped = "".join(c if c.isprintable() and c not in '"\\' else _yaml_escape(c) for c in text)
    return f'"{escaped}"'


def _yaml_escape(character: str) -> str:
    if character in '"\\':
        return "\\" + character
    return f"\\u{ord(character):04x}" if ord(character) < 0x10000 else f"\\U{ord(character):08x}"
