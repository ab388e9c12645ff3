"""The table of settings of `explain`."""

from dataclasses import dataclass
from typing import Literal

from causalvae.flags import check, flags_of, setting

BASICS = "Basics"


@dataclass(frozen=True, kw_only=True)
class ExplainSettings:
    """How a command is explained. The command, or the file that has it, is no flag."""

    lang: Literal["auto", "en", "zh"] = setting("auto", BASICS, help="language; auto is that of the locale")
    json: bool = setting(False, BASICS, help="print JSON")
    all: bool = setting(False, BASICS, help="every flag, those that keep their defaults too")
    measure: bool = setting(
        False, BASICS, help="make a few steps here, with made-up frames, to tell how long the run takes"
    )

    def __post_init__(self) -> None:
        """Check each value by its row of the table."""
        for name, flag in flags_of(self).items():
            check(flag, getattr(self, name))
