"""The command `doctor`: looks, judges, and puts it into words; on a terminal it says what takes so long."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from causalvae.checkup import examine
from causalvae.doctor import Line, as_object, as_text, doctor, in_words, of_training
from causalvae.doctorflags import DoctorSettings
from causalvae.texts import language, texts


@dataclass(frozen=True)
class Seen:
    """What to print, and the exit status: 1 if there is a problem."""

    text: str
    status: int


def run_doctor(settings: DoctorSettings, *, command: Sequence[str] | None) -> Seen:
    """Look at this machine, and at a training command if there is one. ConfigError if it is none."""
    lang = language(settings.lang, os.environ)
    says, console = texts("doctor", lang), Console(stderr=True)
    numbers: Any = None  # Any: JSON
    parts: dict[str, list[Line]] = {}
    with console.status(says["ui.looking"]) as status:
        if command is not None:
            status.update(says["ui.measuring"])
            parts["command"], numbers = of_training(command, lang, measure=settings.measure)
            status.update(says["ui.looking"])
        parts = {"machine": in_words(doctor(examine(os.environ)), lang), **parts}
    failed = any(line.level == "problem" for lines in parts.values() for line in lines)
    text = as_text(parts, lang)
    if settings.json:
        whole = as_object(parts) | ({} if numbers is None else {"numbers": numbers})
        text = json.dumps(whole, indent=1) + "\n"
    return Seen(text, int(failed))
