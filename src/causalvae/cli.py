"""The command line: one function per command, each of which imports its stage when it is called.

Errors of the four kinds end here as one line and an exit status; so does a bug, with its traceback in a file.
"""

import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING

from causalvae import __version__
from causalvae.commands import COMMANDS, show
from causalvae.errors import CausalVAEError, ConfigError, exit_status
from causalvae.flags import closest, printable
from causalvae.flagtext import help_text
from causalvae.reportflags import cut_at_command

if TYPE_CHECKING:
    pass

INTERRUPTED, BROKEN_PIPE = 130, 141  # 128 + the number of SIGINT, of SIGPIPE, as shells have it


def run() -> None:
    """The program `causalvae`: the first word is the command."""
    words = sys.argv[1:]
    sys.exit(main(words[0] if words else "--help", words[1:]))


def main(command: str, argv: Sequence[str]) -> int:
    """Run one command. Exit status: 0 done, 1 failed while working, 2 a mistake in what was asked."""
    try:
        status = _dispatch(command, argv)
        sys.stdout.flush()
    except CausalVAEError as error:
        return _fail(str(error), status=exit_status(error))
    except KeyboardInterrupt:
        return _fail("interrupted", status=INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return BROKEN_PIPE
    except ModuleNotFoundError as error:
        return _fail(_missing(error), status=1)
    except Exception as error:  # noqa: BLE001 - the one place where a bug becomes a line
        return _fail(_bug(error), status=1)
    return status


def _dispatch(command: str, argv: Sequence[str]) -> int:
    """Answer what is about the program itself, and hand the rest to the command."""
    if command in ("--help", "-h", "help"):
        return show(_overview())
    if command == "--version":
        return show(f"causalvae {__version__}\n")
    if command.startswith("-"):
        raise ConfigError(f"{command}: a command comes first, such as `causalvae train`")
    if command not in COMMANDS:
        guess = closest(command, list(COMMANDS))
        hint = f"did you mean {guess}?" if guess else f"there are {', '.join(COMMANDS)}"
        raise ConfigError(f"{command}: there is no such command; {hint}")
    entry = COMMANDS[command]
    own, _ = cut_at_command(argv)
    if "--help" in own or "-h" in own:
        usage, intro = f"causalvae {command} {entry.words}[FLAGS]", f"{entry.does}. {entry.more}"
        width = shutil.get_terminal_size().columns
        return show(help_text(entry.table, usage=usage, intro=intro, width=width))
    return entry.call(argv)


def _overview() -> str:
    """The help page of the program."""
    commands = "".join(f"  {name:11} {command.does}\n" for name, command in COMMANDS.items())
    more = "`causalvae COMMAND --help` lists the flags of a command, `causalvae --version` the version."
    return f"usage: causalvae COMMAND [FLAGS]\n\n{commands}\n{more}\n"


def _fail(message: str, *, status: int) -> int:
    """Print one error; a list in it, whose lines are indented by two, stays a list."""
    print("error: " + "\n  ".join(printable(line) for line in message.split("\n  ")), file=sys.stderr)
    return status


def _missing(error: ModuleNotFoundError) -> str:
    """What to say where a package is not installed."""
    if str(error.name).split(".")[0] == "causalvae":
        return _bug(error)
    return f"the Python package {error.name} is missing; `pip install -r requirements.txt` installs it"


def _bug(error: Exception) -> str:
    """What to say about an error that nobody foresaw; its traceback goes to a file."""
    descriptor, path = tempfile.mkstemp(prefix="causalvae-", suffix=".txt")
    with open(descriptor, "w", errors="replace") as file:
        file.writelines(traceback.format_exception(error))
    return f"unexpected {type(error).__name__}: {error}. This is a bug; its traceback is in {path}"
