"""WebDataset shards: which tar files a pattern names, and where in them the videos lie.

A shard's headers are read once, when the source is opened. After that a member is read like a file of its
own, in any order, by its place in the shard; nothing is unpacked.
"""

import glob
import os
import re
import tarfile
from collections.abc import Iterator
from itertools import chain

from causalvae.data.decode import printable
from causalvae.errors import ConfigError

WILD = "*?["  # of a pattern that is matched with the names there are
BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")


def is_shard_pattern(video_path: str) -> bool:
    """Whether this names tar files: `shard.tar`, `shard-{000..012}.tar`, `shards/*.tar`."""
    return video_path.lower().endswith(".tar") or bool(BRACES.search(video_path) and ".tar" in video_path)


def shards(pattern: str) -> list[str]:
    """Absolute paths of the tar files that a pattern names, in its order, each once.

    ConfigError if one that is named is not there, or if wild cards match nothing.
    """
    if os.path.exists(pattern):
        return [os.path.abspath(pattern)]
    return list(dict.fromkeys(os.path.abspath(path) for path in _existing(pattern)))


def members(shard: str) -> Iterator[tuple[str, int, int]]:
    """Name, first byte and bytes of every regular file in a shard, in its order.

    ConfigError if the shard is no tar file, is compressed, or is cut.
    """
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                if member.isreg() and not member.issparse():
                    yield member.name, member.offset_data, member.size
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ConfigError(
            f"--video_path: {printable(shard)} can't be read as a tar file ({error}). It must be whole and "
            "not compressed; fetch it again, or leave it out"
        ) from error


def _existing(pattern: str) -> Iterator[str]:
    for path in _expanded(pattern):
        matches = [path]
        if any(mark in path for mark in WILD):
            matches = sorted(glob.glob(path, recursive=True), key=os.fsencode)
        if not matches or not os.path.isfile(matches[0]):
            raise ConfigError(f"--video_path {printable(pattern)}: there is no file {printable(path)}")
        yield from matches


def _expanded(pattern: str) -> Iterator[str]:
    """The pattern with its braces written out: `{08..10}` is 08, 09, 10 and `{a,b}` is a, b."""
    found = BRACES.search(pattern)
    if found is None:
        yield pattern
        return
    first, last, words = found.groups()
    if words is not None:
        choices: Iterator[str] = iter(words.split(","))
    else:
        choices = (str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))
    before, after = pattern[: found.start()], pattern[found.end() :]
    yield from chain.from_iterable(_expanded(before + choice + after) for choice in choices)
