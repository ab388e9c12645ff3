"""The tables of settings of `report` and `watch`, and the words of a command line that are no flags."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from causalvae.errors import ConfigError
from causalvae.flags import FALSE_WORDS, TRUE_WORDS, check, flags_of, setting

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

BASICS = "Basics"
TRUTH = (*TRUE_WORDS, *FALSE_WORDS)
LANG_HELP = "language that the page opens in; it can be switched there"


@dataclass(frozen=True, kw_only=True)
class ReportSettings:
    """What a report is asked to be. The runs stand before the flags."""

    out: str = setting("report.html", BASICS, help="the file to write")
    lang: Literal["en", "zh"] = setting("en", BASICS, help=LANG_HELP)

    def __post_init__(self) -> None:
        """Check each value by its row of the table."""
        for name, flag in flags_of(self).items():
            check(flag, getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class WatchSettings:
    """How a run is watched. The runs stand before the flags."""

    port: int = setting(
        0, BASICS, limits={"at_least": 0, "below": 65536}, help="port on 127.0.0.1; 0 takes one that is free"
    )
    every: float = setting(15.0, BASICS, limits={"at_least": 0.5}, help="seconds between looks at the run")
    lang: Literal["en", "zh"] = setting("en", BASICS, help=LANG_HELP)

    def __post_init__(self) -> None:
        """Check each value by its row of the table."""
        for name, flag in flags_of(self).items():
            check(flag, getattr(self, name))


def cut_at_command(argv: Sequence[str]) -> tuple[list[str], list[str] | None]:
    """Words of a command line before a lone `--`, and those behind it; None without one."""
    words = list(argv)
    if "--" not in words:
        return words, None
    at = words.index("--")
    return words[:at], words[at + 1 :]


def split_words(
    argv: Sequence[str], *, table: "type[DataclassInstance] | None" = None
) -> tuple[list[str], list[str]]:
    """Words of a command line -> those that stand by themselves, and flags with their values.

    Every flag is taken to have one value, behind it or after `=`; one that is true or false in the table of
    settings may have none. What follows a lone `--` is no flag.
    """
    switches = (
        {f"--{flag.name}" for flag in flags_of(table).values() if flag.kind is bool} if table else set()
    )
    alone: list[str] = []
    flags: list[str] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        if word == "--":
            alone += words
            break
        if not word.startswith("--"):
            alone.append(word)
            continue
        flags.append(word)
        if "=" in word or not words or words[0].startswith("--"):
            continue
        if word.replace("-", "_").replace("__", "--", 1) not in switches or words[0].lower() in TRUTH:
            flags.append(words.pop(0))
    return alone, flags


def paths_of(words: Sequence[str], *, command: str) -> list[Path]:
    """The runs that were named, each once. ConfigError if there is none."""
    if not words:
        raise ConfigError(f"causalvae {command}: name the folder of a run, such as results/causalvae/NAME")
    return [Path(word) for word in dict.fromkeys(words)]
