"""What the program says in more than one language: `lang/TOPIC.en.yaml` and `.zh.yaml`, keys to sentences.

A sentence has places such as `{frames}`, which `str.format_map` fills.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

import yaml

Language = Literal["en", "zh"]
LANGUAGES: tuple[Language, ...] = get_args(Language)
FOLDER = Path(__file__).parent / "lang"
LOCALE = ("LC_ALL", "LC_MESSAGES", "LANG")  # the first that is set and not empty decides, as POSIX has it


def language(choice: Literal["auto", "en", "zh"], variables: Mapping[str, str]) -> Language:
    """The language that was chosen; auto: that of the locale, English where it is neither.

    variables: the environment.
    """
    if choice != "auto":
        return choice
    locale = next((variables[name] for name in LOCALE if variables.get(name)), "")
    return "zh" if locale.lower().startswith("zh") else "en"


def texts(topic: str, lang: Language) -> dict[str, str]:
    """The sentences of a topic, such as `doctor`, by their keys."""
    return yaml.safe_load((FOLDER / f"{topic}.{lang}.yaml").read_text(encoding="utf-8"))
