"""The table of settings of `data scan`. Free of torch, as `config` is."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from causalvae.errors import ConfigError
from causalvae.flags import Resolution, check, flags_of, printable, setting

BASICS, READING, RUN = "Basics", "Reading", "What a run would draw"
AT_LEAST_1 = {"at_least": 1}
RUN_FLAGS = ("video_num_frames", "resolution", "sample_rate", "batch_size", "max_steps")


@dataclass(frozen=True, kw_only=True)
class ScanSettings:
    """What `causalvae data scan` is asked for. The dataset stands before the flags."""

    # fmt: off
    out: str | None = setting(None, BASICS, none_word="none",
        help="a HTML page to write, with pictures of how the videos are spread")
    quarantine: str | None = setting("results/scan/quarantine.jsonl", BASICS, none_word="none",
        help="the list of broken videos to write, if there are any, for `causalvae train --quarantine`")
    json: bool = setting(False, BASICS, help="print JSON and not a table")
    lang: Literal["auto", "en", "zh"] = setting("auto", BASICS,
        help="language; auto is that of the locale, English where it is neither")
    decode: bool = setting(False, READING,
        help="decode every frame, which finds damage in the middle of videos and takes long")
    duplicates: bool = setting(True, READING, help="look for videos with the same content")
    refresh: bool = setting(False, READING,
        help="read everything again, also what is known from earlier scans and trainings")
    dataloader_num_workers: int | None = setting(None, READING, limits={"at_least": 0}, none_word="auto",
        help="processes that read; auto is one for each core")
    clip_timeout: float = setting(60.0, READING, limits={"above": 0},
        help="seconds after which a video that is still being read counts as broken")
    video_num_frames: int | None = setting(None, RUN, limits=AT_LEAST_1, none_word="auto",
        help="as in training, and the next four; they win over the command that follows --")
    resolution: Resolution | None = setting(None, RUN, none_word="auto",  # noqa: RUF009 - frozen
        help="size of clips")
    sample_rate: int | None = setting(None, RUN, limits=AT_LEAST_1, none_word="auto", help="every n-th frame")
    batch_size: int | None = setting(None, RUN, limits=AT_LEAST_1, none_word="auto", help="clips per step")
    max_steps: int | None = setting(None, RUN, limits=AT_LEAST_1, none_word="auto", help="updates in all")
    # fmt: on

    def __post_init__(self) -> None:
        """Check each value by its row of the table."""
        for name, flag in flags_of(self).items():
            check(flag, getattr(self, name))


def scan_paths(words: Sequence[str]) -> list[str]:
    """What to scan: the words after `data scan`. ConfigError if `data` is followed by another word."""
    if words[:1] != ["scan"]:
        why = f"{printable(words[0])}: there is no such command" if words else "it needs a word more"
        raise ConfigError(f"causalvae data: {why}; there is `causalvae data scan PATH`")
    return [*words[1:]]
