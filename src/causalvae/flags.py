"""How a settings table becomes a command line: one field is one flag (idea 1).

`setting()` makes a field, `flags_of()` reads the fields back, `read_settings()` turns words from the
command line and from a YAML file into a checked dataclass and remembers where each value came from. Nothing
here knows a flag by name, but `config`, the file.
"""

import argparse
import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeVar, cast, get_args, get_origin

from causalvae.errors import ConfigError

if TYPE_CHECKING:
    import yaml
    from _typeshed import DataclassInstance

T = TypeVar("T")
Settings = TypeVar("Settings", bound="DataclassInstance")
COMMAND_LINE = "command line"
SAVED = "# Every setting in force; `--config` takes this file back. A remark says where a value was given."
TRUE_WORDS, FALSE_WORDS = ("true", "1", "yes"), ("false", "0", "no")
BUDGET_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Resolution:
    """Height and width of a clip in pixels."""

    height: int
    width: int

    @classmethod
    def parse(cls, text: str) -> "Resolution":
        """`256` for a square, `256x448` for height x width."""
        match = re.fullmatch(r"([0-9]{1,6})(?:[xX]([0-9]{1,6}))?", text)
        if match is None or int(match[1]) == 0 or (match[2] is not None and int(match[2]) == 0):
            raise ValueError("must be a size such as 256, or height x width such as 256x448")
        return cls(int(match[1]), int(match[2] or match[1]))

    def __str__(self) -> str:
        return str(self.height) if self.height == self.width else f"{self.height}x{self.width}"


@dataclass(frozen=True)
class MemoryBudget:
    """How much memory a step may take: a policy, or with policy `budget` a number of bytes."""

    policy: Literal["auto", "speed", "lean", "budget"] = "auto"
    num_bytes: int | None = None

    @classmethod
    def parse(cls, text: str) -> "MemoryBudget":
        """`auto`, `speed`, `lean`, or an amount such as `20GiB`."""
        match text.lower():
            case "auto" | "speed" | "lean" as policy:
                return cls(policy)
            case _:
                found = re.fullmatch(r"([0-9]{1,18})(\.[0-9]{1,9})? ?([KMG]I?B|B)", text.upper())
                whole, part, unit = found.groups() if found else ("0", None, "B")
                amount = int(whole) * BUDGET_UNITS[unit] + int(float(part or 0) * BUDGET_UNITS[unit])
        if amount == 0:
            raise ValueError("must be auto, speed, lean, or an amount such as 20GiB")
        return cls("budget", amount)

    def __str__(self) -> str:
        if self.num_bytes is None:
            return self.policy
        unit = next(unit for unit in ("GiB", "MiB", "B") if self.num_bytes % BUDGET_UNITS[unit.upper()] == 0)
        return f"{self.num_bytes // BUDGET_UNITS[unit.upper()]}{unit}"


@dataclass(frozen=True)
class Given:
    """A value that was asked for, and where: `command line` or the name of a file. Defaults are not given."""

    value: object
    source: str


@dataclass(frozen=True, kw_only=True)
class Flag:
    """One setting as the table has it. kind: its type without `| None`; none_word: the word for None."""

    name: str
    kind: Any  # Any: a type or a Literal, which have no common type
    default: object
    group: str
    help: str
    at_least: float | None
    above: float | None
    below: float | None
    none_word: str | None
    aliases: Mapping[str, str]
    on_resume: str

    @property
    def choices(self) -> tuple[str, ...]:
        """The words that a Literal allows; none for other types."""
        return get_args(self.kind) if get_origin(self.kind) is Literal else ()

    @property
    def is_list(self) -> bool:
        """Whether a value is any number of items of one kind, with commas between them: `1,9,17`."""
        return Ellipsis in get_args(self.kind)

    @property
    def size(self) -> int:
        """How many words a value has: 2 for a pair, 1 for most."""
        return len(get_args(self.kind)) if get_origin(self.kind) is tuple and not self.is_list else 1

    @property
    def kinds(self) -> tuple[type, ...]:
        """The types of a value's items: two for a pair, that of every item for a list, else one."""
        return get_args(self.kind)[: self.size] if get_origin(self.kind) is tuple else (self.kind,)

    @property
    def required(self) -> bool:
        """Whether the table has no default."""
        return self.default is MISSING


def setting(
    default: T,
    group: str,
    *,
    help: str,  # noqa: A002 - the word that argparse and the reader know
    limits: Mapping[str, float] | None = None,
    none_word: str | None = None,
    aliases: Mapping[str, str] | None = None,
    on_resume: Literal["refused", "free"] = "refused",
) -> T:
    """A field of a settings table. Give `dataclasses.MISSING` as the default of a flag that must be given.

    limits: `at_least`, `above`, `below`. none_word: the word for None. aliases: other words for a choice.
    on_resume: whether a run may go on with another value; `free` if it leaves the mathematics alone.
    """
    notes = {
        "group": group,
        "help": help,
        "none_word": none_word,
        "aliases": aliases or {},
        "on_resume": on_resume,
    }
    notes |= {name: (limits or {}).get(name) for name in ("at_least", "above", "below")}
    if default is MISSING:
        return dataclasses.field(metadata=notes)
    return dataclasses.field(default=default, metadata=notes)


def flags_of(table: "type[DataclassInstance] | DataclassInstance") -> dict[str, Flag]:
    """The flags of a settings table by name, in its order. A field `from_` is the flag `from`."""
    flags: dict[str, Flag] = {}
    for field in dataclasses.fields(table):
        name = field.name.removesuffix("_")  # which is there where the name is a word of Python's
        arms = [arm for arm in get_args(field.type) if arm is not type(None)]
        optional = type(None) in get_args(field.type)
        kind = arms[0] if optional else field.type
        flags[name] = Flag(name=name, kind=kind, default=field.default, **field.metadata)
    return flags


def to_text(flag: Flag, value: object) -> str:
    """A value as it is written on the command line."""
    if value is None:
        return str(flag.none_word)
    if isinstance(value, tuple):
        between = "," if flag.is_list else " "
        return between.join(str(item) for item in cast("tuple[object, ...]", value))
    return str(value)


def printable(text: str) -> str:
    """The text on one line: control characters, direction marks and undecodable bytes as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def closest(word: str, words: Sequence[str]) -> str | None:
    """The word that was probably meant."""
    return next(iter(difflib.get_close_matches(word, words, n=1, cutoff=0.6)), None)


def refuse(flag: Flag, value: object, why: str) -> NoReturn:
    """Raise the error of a bad value: the flag, the value, and what to do."""
    raise ConfigError(f"--{flag.name} {printable(to_text(flag, value))}: {why}")


def _read_bool(text: str) -> bool:
    if text.lower() in TRUE_WORDS + FALSE_WORDS:
        return text.lower() in TRUE_WORDS
    raise ValueError("must be True or False")


def _read_int(text: str) -> int:
    if re.fullmatch(r"[+-]?[0-9]{1,18}(_[0-9]{1,18})*", text) is None:
        raise ValueError("must be a whole number, such as 1000")
    return int(text)


def _read_float(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise ValueError("must be a number, such as 0.5 or 3e-5") from error


READERS: dict[type, Callable[[str], object]] = {
    bool: _read_bool,
    int: _read_int,
    float: _read_float,
    str: str,
    Resolution: Resolution.parse,
    MemoryBudget: MemoryBudget.parse,
}


def parse(flag: Flag, words: Sequence[str]) -> object:
    """The value that these words mean for this flag, checked; ConfigError says what is wrong with it."""
    shown = " ".join(words)
    if flag.none_word is not None and list(words) == [flag.none_word]:
        return None
    if flag.is_list:
        words = [part.strip() for word in words for part in word.split(",")]
    elif len(words) != flag.size:
        needed = f"{flag.size} values" if flag.size > 1 else "one value"
        refuse(flag, shown, f"takes {needed}, not {len(words)}")
    kinds = (str,) if flag.choices else flag.kinds * len(words) if flag.is_list else flag.kinds
    try:
        values = tuple(READERS[kind](word) for kind, word in zip(kinds, words, strict=True))
    except ValueError as error:
        refuse(flag, shown, str(error) + (f", or {flag.none_word}" if flag.none_word is not None else ""))
    value = values if flag.size > 1 or flag.is_list else values[0]
    if isinstance(value, str):
        value = flag.aliases.get(value, value)
    check(flag, value)
    return value


def check(flag: Flag, value: object) -> None:
    """Raise ConfigError unless the value has the flag's type and keeps to its limits."""
    if value is None and flag.none_word is not None:
        return
    if flag.choices:
        if value not in flag.choices:
            guess = closest(str(value), flag.choices)
            hint = f"; did you mean {guess}?" if guess else ""
            refuse(flag, value, f"must be one of {', '.join(flag.choices)}{hint}")
        return
    items = cast("tuple[object, ...]", value) if type(value) is tuple else (value,)
    kinds = flag.kinds * len(items) if flag.is_list else flag.kinds
    if len(items) != len(kinds) or not items:
        refuse(flag, items, f"takes {len(kinds)} values, not {len(items)}")
    for kind, item in zip(kinds, items, strict=True):
        wanted = (int, float) if kind is float else (kind,)
        if not isinstance(item, wanted) or (isinstance(item, bool) and kind is not bool):
            refuse(flag, items, f"must be {kind.__name__}, not {type(item).__name__}")
        _check_limits(flag, item, items)


def _check_limits(flag: Flag, item: object, value: object) -> None:
    if isinstance(item, str):
        if not item.strip():
            refuse(flag, value, "is empty; give a value or leave the flag out")
        if "\0" in item:
            refuse(flag, value, "has a NUL character, which no name or path can have")
    if isinstance(item, bool) or not isinstance(item, int | float):
        return
    if not math.isfinite(item):
        refuse(flag, value, "must be a finite number")
    if flag.at_least is not None and item < flag.at_least:
        refuse(flag, value, f"must be at least {flag.at_least:g}")
    if flag.above is not None and item <= flag.above:
        refuse(flag, value, f"must be more than {flag.above:g}")
    if flag.below is not None and item >= flag.below:
        refuse(flag, value, f"must be less than {flag.below:g}")


def read_settings(table: type[Settings], argv: Sequence[str]) -> tuple[Settings, dict[str, Given]]:
    """Settings from defaults, then the file of `--config`, then the command line; and what was given.

    Raises ConfigError for anything that is not a flag or not a value of it.
    """
    flags = flags_of(table)
    words = parse_words(flags, argv)
    given: dict[str, Given] = {}
    if "config" in words:
        path = str(parse(flags["config"], words["config"]))
        given |= read_file(flags, Path(path))
    given |= {name: Given(parse(flags[name], each), COMMAND_LINE) for name, each in words.items()}
    missing = next((flag for flag in flags.values() if flag.required and flag.name not in given), None)
    if missing is not None:
        raise ConfigError(f"--{missing.name} is missing. It is {missing.help}")
    fields = {field.name.removesuffix("_"): field.name for field in dataclasses.fields(table)}
    values: dict[str, Any] = {
        fields[name]: item.value for name, item in given.items()
    }  # Any: each field checks its own
    return table(**values), given


def parse_words(flags: Mapping[str, Flag], argv: Sequence[str]) -> dict[str, list[str]]:
    """The words given to each flag on the command line; the last one counts where a flag is repeated."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for flag in flags.values():
        spellings = dict.fromkeys((f"--{flag.name}", f"--{flag.name.replace('_', '-')}"))
        several = "+" if flag.size > 1 or flag.is_list else None
        nargs, const = ("?", "True") if flag.kind is bool else (several, None)
        parser.add_argument(*spellings, dest=flag.name, nargs=nargs, const=const, default=argparse.SUPPRESS)
    try:
        found, rest = parser.parse_known_args(_join_negative_numbers(argv))
    except argparse.ArgumentError as error:
        name = str(error.argument_name).split("/")[0]
        raise ConfigError(f"{name}: its value is missing") from error
    if rest:
        _refuse_unknown(next((word for word in rest if word.startswith("-")), rest[0]), flags)
    values: dict[str, str | list[str]] = vars(found)
    return {name: [value] if isinstance(value, str) else value for name, value in values.items()}


def _join_negative_numbers(argv: Sequence[str]) -> list[str]:
    """`--logvar_init -1e-3` as `--logvar_init=-1e-3`: argparse takes -1e-3 for a flag."""
    joined: list[str] = []
    for word in argv:
        number = re.fullmatch(r"-[0-9._]+(?:[eE][+-]?[0-9]+)?|-inf|-nan", word)
        if number and joined and re.fullmatch(r"--[\w-]+", joined[-1]):
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def _refuse_unknown(word: str, flags: Mapping[str, Flag]) -> NoReturn:
    name = word.split("=")[0].lstrip("-").replace("-", "_")
    guess = closest(name, [*flags, "help"])
    if not word.startswith("-"):
        raise ConfigError(
            f"{printable(word)}: not a flag; flags start with --, and a value with spaces needs quotes"
        )
    hint = f"did you mean --{guess}?" if guess else "--help lists the flags"
    raise ConfigError(f"{printable(word.split('=')[0])}: there is no such flag; {hint}")


def read_file(flags: Mapping[str, Flag], path: Path) -> dict[str, Given]:
    """Settings from a YAML file. Every scalar is text that goes through the parser of the command line."""
    import yaml

    found: dict[str, Given] = {}
    for key, node in yaml_pairs(path):
        place = f"{printable(str(path))} line {key.start_mark.line + 1}"
        name = str(key.value).replace("-", "_")
        if name not in flags or name == "config":
            guess = closest(name, list(flags))
            hint = f"; did you mean {guess}?" if guess else ""
            raise ConfigError(f"{place}: there is no setting {printable(name)}{hint}")
        if name in found:
            raise ConfigError(f"{place}: {name} is set twice; keep one of the two")
        items = node.value if isinstance(node, yaml.SequenceNode) else [node]
        if not all(isinstance(item, yaml.ScalarNode) for item in items):
            raise ConfigError(f"{place}: {name} must be a value or a list of values")
        try:
            found[name] = Given(parse(flags[name], [str(item.value) for item in items]), str(path))
        except ConfigError as error:
            raise ConfigError(f"{place}: {error}") from error
    return asked_for(found, flags, path)


def asked_for(found: Mapping[str, Given], flags: Mapping[str, Flag], path: Path) -> dict[str, Given]:
    """What was asked for of what a file says: a run's own file names defaults too, without a remark."""
    lines = path.read_text("utf-8", errors="replace").splitlines() if path.is_file() else []  # no pipe twice
    ours = lines if lines[:1] == [SAVED] else []
    named = {line.split(":")[0] for line in ours if "  # " not in line}
    return {n: item for n, item in found.items() if n not in named or item.value != flags[n].default}


def yaml_pairs(path: Path) -> list[tuple["yaml.Node", "yaml.Node"]]:
    """Keys and values of a YAML mapping as nodes, which have their text and their line.

    ConfigError if the file can't be read, or is none.
    """
    import yaml  # 20 ms that a command without a file does not pay

    shown = f"--config {printable(str(path))}"
    try:
        root = yaml.SafeLoader(path.read_bytes()).get_single_node()
    except OSError as error:
        raise ConfigError(f"{shown}: can't be read: {error.strerror}") from error
    except (yaml.YAMLError, RecursionError, UnicodeDecodeError) as error:
        raise ConfigError(f"{shown}: not a YAML file: {printable(' '.join(str(error).split()))}") from error
    if root is None:
        return []
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{shown}: must be lines of the form `flag: value`")
    return root.value
