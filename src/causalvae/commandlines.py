"""A training command as people keep it: words of a shell, a script, a file of settings, or a run's folder.

Nothing is executed. Variables that a script sets are put in; what only running it would tell, such as
`$(date)`, stays as it is written and is listed.
"""

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from causalvae.errors import ConfigError
from causalvae.flags import printable

NAME = r"[A-Za-z_][A-Za-z0-9_]*"
ASSIGNMENT = re.compile(rf"({NAME})=(.*)", re.DOTALL)
ARRAY = re.compile(rf"\s*({NAME})=\((.*)\)\s*", re.DOTALL)
BEFORE = ("export", "nohup", "time", "exec", "env", "sudo", "declare", "local", "readonly")
PROCESSES = ("nproc_per_node", "num_processes", "worker_num", "num_gpus", "n", "np")  # of launchers
MAX_SCRIPT_BYTES = 1 << 20
OPEN, SPLIT, LATER = "\ue000", "\ue001", "\ue002"  # a plain $, an unquoted $, the place of `$(...)`
VARIABLE = re.compile(  # ${NAME:-value} or $NAME
    rf"[{SPLIT}$](?:\{{({NAME}|[0-9]+)(?:\[[@*]\]|:?-([^}}]*))?\}}|({NAME}|[0-9@*#?]))"
)
ENVIRONMENT = ("HOME", "PWD", "USER")  # what a script may take from outside; other variables may be secrets
EXAMPLE = "such as `causalvae explain -- causalvae train --video_path sample:`"


@dataclass(frozen=True)
class Command:
    """A training command. flags: its words after the program. source: what to call the place they are from.

    variables: set in front of it, or exported before. processes: how many a launcher starts.
    unknown: what only a shell knows. others: training commands of the script that are not this one. run: the
    folder of the run that it began.
    """

    flags: tuple[str, ...]
    source: str | None = None
    variables: Mapping[str, str] = field(default_factory=dict[str, str])
    processes: int | None = None
    unknown: tuple[str, ...] = ()
    others: int = 0
    run: Path | None = None


def find_command(
    words: Sequence[str], command: Sequence[str] | None, environment: Mapping[str, str]
) -> Command:
    """The command to explain: that behind `--`, or that of the one file or folder that is named.

    ConfigError if there is neither, or both.
    """
    if command is not None and not words:
        return read_command(command)
    if len(words) != 1 or command is not None:
        shown = printable(" ".join(words)) or "causalvae explain"
        raise ConfigError(f"{shown}: give a command behind --, {EXAMPLE}; or one script, YAML file or run")
    return read_file(Path(words[0]), environment)


def read_command(words: Sequence[str]) -> Command:
    """The command that stands behind `explain --`. ConfigError if it is none for training."""
    command = _command(words)
    if command is None:
        shown = printable(" ".join(words)) or "nothing"
        raise ConfigError(f"{shown}: not a training command; give one behind --, {EXAMPLE}")
    return command


def read_file(path: Path, environment: Mapping[str, str]) -> Command:
    """The command that a shell script, a YAML file of settings or a run's folder has. ConfigError if none."""
    shown = printable(str(path))
    if path.is_dir():
        config = path / "config.yaml"
        if not config.is_file():
            raise ConfigError(f"{shown}: not the folder of a run: it has no config.yaml")
        return Command(("--config", str(config)), run=path)
    if not path.is_file():
        raise ConfigError(f"{shown}: there is no such file; a command goes behind --, {EXAMPLE}")
    if path.suffix.lower() in (".yaml", ".yml"):
        return Command(("--config", str(path)))
    if path.stat().st_size > MAX_SCRIPT_BYTES:
        raise ConfigError(f"{shown}: too large for a shell script; a command goes behind --, {EXAMPLE}")
    return _script(path, environment)


def _script(path: Path, environment: Mapping[str, str]) -> Command:
    """The first training command of a shell script."""
    variables = {name: [environment[name]] for name in ENVIRONMENT if name in environment}
    exported: dict[str, str] = {}
    found: list[Command] = []
    for line in _lines(path.read_text(encoding="utf-8", errors="surrogateescape")):
        array = ARRAY.fullmatch(line)
        if array is not None:
            variables[array[1]] = _words(array[2], variables, [])
            continue
        unknown: list[str] = []
        for words in _commands(_words(line, variables, unknown)):
            command = _command(words)
            if command is not None and command.flags:
                around = exported | dict(command.variables)
                found.append(Command(command.flags, None, around, command.processes, (*unknown,)))
            else:
                exported |= _assigned(words) if words[:1] == ["export"] else {}
                variables |= {name: [value] for name, value in _assigned(words).items()}
    if not found:
        raise ConfigError(f"{printable(str(path))}: no training command is in this script")
    first = found[0]
    return Command(
        first.flags, str(path), first.variables, first.processes, first.unknown, others=len(found) - 1
    )


def _command(words: Sequence[str]) -> Command | None:
    """What starts a training: flags alone, a Python script, or `causalvae train`; None if nothing does."""
    variables = _assigned(words)
    rest = [word for word in words[len(variables) :] if word not in BEFORE]
    if not rest:
        return None
    if rest[0].startswith("--"):
        return Command(tuple(rest), variables=variables)
    places = [i for i, word in enumerate(rest) if word.endswith(".py") or Path(word).name == "causalvae"]
    if not places:
        return None
    at = places[0]
    launcher, flags = rest[:at], rest[at + 1 :]
    if not rest[at].endswith(".py"):
        if flags[:1] != ["train"]:
            return None
        flags = flags[1:]
    return Command(tuple(flags), variables=variables, processes=_processes(launcher))


def _assigned(words: Sequence[str]) -> dict[str, str]:
    """The variables that are set in front of a command."""
    found: dict[str, str] = {}
    for word in words:
        match = ASSIGNMENT.fullmatch(word)
        if match is not None:
            found[match[1]] = match[2]
        elif word not in BEFORE:
            break
    return found


def _processes(launcher: Sequence[str]) -> int | None:
    """How many processes torchrun, accelerate, mpirun or msrun would start; None if it does not say."""
    for i, word in enumerate(launcher):
        name, _, value = word.lstrip("-").partition("=")
        value = value or next(iter(launcher[i + 1 : i + 2]), "")
        if (
            word.startswith("-")
            and name.replace("-", "_") in PROCESSES
            and value.isascii()
            and value.isdigit()
        ):
            return int(value)
    return None


def _lines(text: str) -> Iterator[str]:
    """Lines of a script as a shell sees them: continued by a backslash, by an open quote or bracket."""
    pending = ""
    for line in text.replace("\r\n", "\n").replace("\\\n", " ").split("\n"):
        pending += line + "\n"
        if _is_whole(pending):
            yield pending.strip()
            pending = ""
    if pending.strip():
        yield pending.strip()


def _is_whole(text: str) -> bool:
    """Whether quotes and the bracket of an array are closed."""
    try:
        words = shlex.split(text, comments=True)
    except ValueError:
        return False
    opened = re.match(rf"\s*{NAME}=\(", text) is not None
    return not opened or any(word.endswith(")") for word in words)


def _words(line: str, variables: Mapping[str, Sequence[str]], unknown: list[str]) -> list[str]:
    """The words of a line, variables put in. What can't be known is added to `unknown`."""
    marked, later = _marked(line)
    lexer = shlex.shlex(marked, posix=True, punctuation_chars="();<>|&")
    lexer.whitespace_split = True
    try:
        tokens = list(lexer)
    except ValueError:
        return []  # a quote that is never closed: a shell would refuse the line too
    found: list[str] = []
    for token in tokens:
        found += _expanded(token, variables, unknown, later)
    return found


def _marked(line: str) -> tuple[str, list[str]]:
    """The line with marks for `$`, by the quotes it stands in, and for what would have to be executed."""
    later: list[str] = []
    text, quote, i = "", "", 0
    while i < len(line):
        here = line[i]
        ends = _substitution(line, i) if quote != "'" else 0
        if ends:
            text += f"{LATER}{len(later)}{LATER}"
            later.append(line[i:ends])
            i = ends
            continue
        if here == "\\" and quote != "'" and i + 1 < len(line):
            text += OPEN if line[i + 1] == "$" else line[i : i + 2]
            i += 2
            continue
        if here in "'\"" and quote in ("", here):
            quote = "" if quote else here
        text += {"'": OPEN, "": SPLIT}.get(quote, here) if here == "$" else here
        i += 1
    return text, later


def _substitution(line: str, start: int) -> int:
    """Where `$(...)` or a pair of backticks that begins here ends; 0 if none does."""
    if line[start] == "`":
        return line.find("`", start + 1) + 1
    if not line.startswith("$(", start):
        return 0
    depth = 0
    for i in range(start + 1, len(line)):
        depth += {"(": 1, ")": -1}.get(line[i], 0)
        if depth == 0:
            return i + 1
    return 0


def _expanded(
    token: str, variables: Mapping[str, Sequence[str]], unknown: list[str], later: Sequence[str]
) -> list[str]:
    """The words that a token stands for: none, one, or several where a variable is split at its spaces."""
    whole = re.fullmatch(rf"[{SPLIT}$]\{{?({NAME})(?:\[[@*]\])?\}}?", token)
    if whole is not None and whole[1] in variables:
        values = variables[whole[1]]
        return [word for value in values for word in value.split()] if token[0] == SPLIT else [*values]

    def known(match: re.Match[str]) -> str:
        name, fallback = match[1] or match[3], match[2]
        if name in variables:
            return " ".join(variables[name])
        if fallback is not None:
            return fallback
        text = match[0].replace(SPLIT, "$")
        unknown.append(text)
        return text

    text = VARIABLE.sub(known, token)
    for i, each in enumerate(later):
        mark = f"{LATER}{i}{LATER}"
        if mark in text:
            unknown.append(each)
            text = text.replace(mark, each)
    return [text.replace(OPEN, "$").replace(SPLIT, "$")]


def _commands(words: Sequence[str]) -> Iterator[list[str]]:
    """The commands of a line, without what their output is sent to."""
    command: list[str] = []
    skip = False
    for i, word in enumerate(words):
        if re.fullmatch(r"[();|&]+", word):
            yield command
            command = []
        elif re.fullmatch(r"[<>&]+", word):
            skip = True
        elif skip:
            skip = False
        elif word.isdigit() and re.fullmatch(r"[<>]&?", next(iter(words[i + 1 : i + 2]), "")):
            continue  # the number of a stream, as in 2>&1
        else:
            command.append(word)
    yield command
