"""The table of settings of `doctor`."""

from dataclasses import dataclass
from typing import Literal

from causalvae.flags import check, flags_of, setting

BASICS = "Basics"


@dataclass(frozen=True, kw_only=True)
class DoctorSettings:
    """How the machine is looked at. A training command is no flag."""

    lang: Literal["auto", "en", "zh"] = setting("auto", BASICS, help="language; auto is that of the locale")
    json: bool = setting(False, BASICS, help="print JSON")
    measure: bool = setting(
        True, BASICS, help="make a few steps of the command behind --, with made-up frames, to time them"
    )

    def __post_init__(self) -> None:
        """Check each value by its row of the table."""
        for name, flag in flags_of(self).items():
            check(flag, getattr(self, name))
