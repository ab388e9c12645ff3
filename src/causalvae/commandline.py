"""A training command inside another command: `causalvae doctor -- python .../train_causalvae.py FLAGS`."""

from collections.abc import Sequence
from pathlib import PurePath

from causalvae.errors import ConfigError
from causalvae.flags import printable

DOOR = "train_causalvae.py"


def split_command(argv: Sequence[str]) -> tuple[list[str], list[str] | None]:
    """Words of a command line -> those before a lone `--`, and those after it; None if there is none."""
    words = list(argv)
    if "--" not in words:
        return words, None
    place = words.index("--")
    return words[:place], words[place + 1 :]


def training_flags(command: Sequence[str]) -> list[str]:
    """The flags of a training command: what follows `causalvae train` or train_causalvae.py, or all of it."""
    words = list(command)
    if not words or words[0].startswith("-"):
        return words
    names = [PurePath(word).name for word in words]
    doors = [place + 1 for place, name in enumerate(names) if name == DOOR]
    doors += [
        place + 2 for place in range(len(names) - 1) if names[place : place + 2] == ["causalvae", "train"]
    ]
    if not doors:
        raise ConfigError(
            f"-- {printable(words[0])}: what follows -- must be a training command: `causalvae train FLAGS`, "
            f"`python .../{DOOR} FLAGS`, or its flags"
        )
    return words[min(doors) :]
