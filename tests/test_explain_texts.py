"""The sentences of `explain`: every flag and finding has one in each language, and none is left over."""

import ast
import re
import string
from pathlib import Path

import pytest

from causalvae.config import TrainSettings
from causalvae.explain import FIRST, MATTER
from causalvae.findings import LEVELS
from causalvae.flags import flags_of
from causalvae.flagtext import grouped
from causalvae.texts import LANGUAGES, texts

SOURCE = Path(__file__).parents[1] / "src" / "causalvae"
FLAGS = flags_of(TrainSettings)
MODULES = ("asked", "findings", "machinefindings", "placefindings", "runfindings", "forecast", "explain")
ID = re.compile(r"[a-z0-9]+(?:-[a-z0-9]+)*")
HAN = re.compile(r"[\u4e00-\u9fff]")
# A half-width mark behind a Chinese character; a colon may belong to `sample:` and stands behind Latin ones.
HALF_WIDTH = re.compile(r"[\u4e00-\u9fff][,;!?:.]")


def strings(name: str) -> set[str]:
    """Every string that a module has in its code."""
    nodes = ast.walk(ast.parse((SOURCE / f"{name}.py").read_text()))
    return {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def places(sentence: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(sentence) if name is not None}


def test_every_flag_has_a_sentence_in_each_language_and_no_sentence_is_of_another() -> None:
    assert list(texts("flags", "en")) == list(texts("flags", "zh")) == list(FLAGS)
    assert list(texts("exact", "zh")) == list(FLAGS)  # in English it is the help of the table


@pytest.mark.parametrize("topic", ["explain", "flags", "foreign"])
def test_both_languages_have_the_same_keys_and_places(topic: str) -> None:
    en, zh = (texts(topic, lang) for lang in LANGUAGES)
    assert list(en) == list(zh)
    assert {key: places(text) for key, text in en.items()} == {key: places(text) for key, text in zh.items()}


def test_every_finding_has_a_reason_and_a_remedy_and_none_is_unused() -> None:
    keys = texts("explain", "en").keys()
    ids = {key for key in keys if not key.startswith(("ui.", "group.")) and not key.endswith(".do")}
    assert {key.removesuffix(".do") for key in keys if key.endswith(".do")} == ids
    used = set().union(*map(strings, MODULES))
    assert ids - used == set()
    calls = [
        node
        for name in MODULES
        for node in ast.walk(ast.parse((SOURCE / f"{name}.py").read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "Finding"
    ]
    named = {node.args[0].value for node in calls if isinstance(node.args[0], ast.Constant)}
    assert named <= ids


def test_every_heading_is_used_and_there() -> None:
    keys = {key for key in texts("explain", "en") if key.startswith(("ui.", "group."))}
    used = {word for word in strings("explain") if word.startswith("ui.") and word != "ui."}
    used |= {f"ui.{level}" for level in LEVELS} | {f"ui.first.{name}" for name in FIRST}
    assert keys == {*used, *(f"group.{group}" for group in grouped(FLAGS))} - {"ui.first."}
    assert set(MATTER) <= FLAGS.keys()


@pytest.mark.parametrize("topic", ["explain", "flags", "foreign"])
def test_sentences_name_only_flags_that_exist(topic: str) -> None:
    others = {"all", "measure", "from", "out", "random", "help", "shm"}  # of explain, init, docker
    for lang in LANGUAGES:
        for text in texts(topic, lang).values():
            assert set(re.findall(r"--([a-z_]+)", text)) <= FLAGS.keys() | others, text


def test_chinese_is_chinese_and_its_marks_are_full_width() -> None:
    for topic in ("explain", "flags", "exact", "foreign"):
        for key, text in texts(topic, "zh").items():
            assert HAN.search(text) or key in ("ui.remedy", "ui.between"), (topic, key)
            assert not HALF_WIDTH.search(text), (topic, key, text)


def test_english_is_plain_ascii() -> None:
    for topic in ("explain", "flags", "foreign"):
        assert all(text.isascii() for text in texts(topic, "en").values())
