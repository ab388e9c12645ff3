"""The command `compare`: paired differences, clips that got worse, and an exit status for CI."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from causalvae.cli import main
from causalvae.compare import as_measured, compare, read_measured
from causalvae.errors import ConfigError
from causalvae.evalflags import FailRule
from causalvae.models.build import build
from causalvae.models.presets import PRESETS
from causalvae.scores import FORMAT
from causalvae.weights.read import own_entries
from causalvae.weights.tensorfiles import write_safetensors

SETTINGS = {"frames": 5, "resolution": "32x32", "sample_rate": 1, "clips_per_video": 1}
UNITS = {"psnr": ("dB", "higher"), "flicker": ("levels", "lower"), "first_frame_gain": ("dB", None)}


def results(values: dict[str, list[float]], **changes: Any) -> dict[str, Any]:
    """A file of results with these metrics, a value for each clip."""
    count = len(next(iter(values.values())))
    clips = [
        {"id": f"{i}.mp4#0", "metrics": {name: each[i] for name, each in values.items()}}
        for i in range(count)
    ]
    metrics = {
        name: {"mean": sum(each) / count, "clips": count, "unit": UNITS[name][0], "better": UNITS[name][1]}
        for name, each in values.items()
    }
    whole = {"format": FORMAT, "settings": SETTINGS, "manifest": {"sha256": "x"}, "metrics": metrics}
    return whole | {"clips": clips} | changes


def write(path: Path, content: dict[str, Any]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return str(path)


def test_differences_are_those_of_the_same_clip() -> None:
    a = results({"psnr": [30.0, 20.0, 10.0], "flicker": [1.0, 1.0, 1.0], "first_frame_gain": [0.0, 0.0, 1.0]})
    b = results({"psnr": [31.0, 19.0, 9.5], "flicker": [0.5, 2.0, 1.0], "first_frame_gain": [1.0, 0.0, 0.0]})
    b["clips"].reverse()  # the order of clips says nothing
    found = compare(as_measured(a, name="a"), as_measured(b, name="b")).differences
    assert found["psnr"].mean == pytest.approx(-0.5 / 3)
    assert found["psnr"].worse == (("1.mp4#0", -1.0), ("2.mp4#0", -0.5))
    assert found["flicker"].worse == (("1.mp4#0", 1.0),)
    assert found["first_frame_gain"].worse == ()
    assert found["psnr"].bounds["low"] <= found["psnr"].mean <= found["psnr"].bounds["high"]


def test_pairs_tell_a_small_difference_that_means_apart_do_not() -> None:
    a = [20.0 + i for i in range(12)]
    b = [value + 0.2 + 0.01 * (i % 3) for i, value in enumerate(a)]
    found = compare(as_measured(results({"psnr": a}), name="a"), as_measured(results({"psnr": b}), name="b"))
    bounds = found.differences["psnr"].bounds
    assert 0.2 <= bounds["low"] <= bounds["high"] <= 0.22


@pytest.mark.parametrize(
    ("rule", "status"), [("psnr<-0.1", 1), ("psnr<-0.6", 0), ("flicker>0.2", 1), ("psnr<-9,flicker>9", 0)]
)
def test_the_exit_status_is_that_of_the_rules(
    rule: str, status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = write(tmp_path / "a.json", results({"psnr": [30.0, 20.0], "flicker": [1.0, 1.0]}))
    b = write(tmp_path / "b.json", results({"psnr": [29.0, 20.0], "flicker": [1.0, 1.5]}))
    assert main("compare", [a, b, "--fail-if", rule]) == status
    said = capsys.readouterr().out
    assert ("failed: " in said) == bool(status)
    assert "0.mp4#0  -1.000 dB" in said
    assert main("compare", [a, a, "--fail_if", "psnr<0"]) == 2


@pytest.mark.parametrize(("changes", "said"), [
    ({"settings": SETTINGS | {"frames": 9}}, "not measured on the same clips"),
    ({"manifest": {"sha256": "y"}}, "not measured on the same clips"),
    ({"clips": []}, r"0\.mp4#0 is in one of them"),
    ({"clips": [{}]}, "damaged"),
])  # fmt: skip
def test_what_can_not_be_compared_is_refused(changes: dict[str, Any], said: str) -> None:
    a = as_measured(results({"psnr": [30.0]}), name="a")
    with pytest.raises(ConfigError, match=said):
        compare(a, as_measured(results({"psnr": [30.0]}, **changes), name="b"))


def test_other_judges_of_one_name_are_refused() -> None:
    sides = [as_measured(results({"psnr": [1.0]}, judges={"i3d": {"sha256": s}}), name=s) for s in "ab"]
    with pytest.raises(ConfigError, match="measured with different files for i3d"):
        compare(*sides)


def test_a_rule_about_what_was_not_measured_is_a_mistake() -> None:
    side = as_measured(results({"psnr": [1.0]}), name="a")
    with pytest.raises(ConfigError, match="lpips-vgg was not measured"):
        compare(side, side, rules=[FailRule.parse("lpips-vgg>0.1")])


@given(bound=st.floats(-1e6, 1e6), sign=st.sampled_from("<>"))
def test_a_rule_is_read_back_from_its_text(bound: float, sign: str) -> None:
    rule = FailRule.parse(f" psnr {sign} {bound!r} ")
    assert (rule.metric, rule.sign, rule.bound) == ("psnr", sign, bound)
    assert rule.fails(bound) is False
    assert rule.fails(bound + (-1.0 if sign == "<" else 1.0))


@pytest.mark.parametrize("text", ["psnr", "psnr<", "<1", "psnr=1", "psnr<1e999", "psnr<..", "psnr<1<2"])
def test_what_is_no_rule_is_a_mistake(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("compare", ["a.json", "b.json", "--fail_if", text]) == 2
    assert capsys.readouterr().err.startswith(f"error: --fail_if {text}")


def test_a_run_stands_for_its_newest_evaluation(tmp_path: Path) -> None:
    for step, value in ((90, 10.0), (100, 20.0)):
        sides = {name: results({"psnr": [value + more]}) for name, more in (("ema", 1.0), ("live", 0.0))}
        content = {"format": FORMAT, "step": step, "settings": SETTINGS, "weights": sides}
        write(tmp_path / f"run/eval/step-{step:08d}.json", content)
    assert read_measured(tmp_path / "run", side="ema").clips == {"0.mp4#0": {"psnr": 21.0}}
    assert read_measured(tmp_path / "run", side="live").clips == {"0.mp4#0": {"psnr": 20.0}}
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="has no evaluation; add --video_path"):
        read_measured(tmp_path / "empty", side="ema")


@pytest.mark.parametrize(("name", "text", "said"), [
    ("a.json", "{", "not JSON"),
    ("a.json", '{"format": "other"}', "no results of `causalvae eval`"),
    ("a.ckpt", "", "add --video_path or --manifest"),
    ("none.json", None, "can't be read"),
])  # fmt: skip
def test_what_is_no_evaluation_is_told_so(tmp_path: Path, name: str, text: str | None, said: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=said):
        read_measured(tmp_path / name, side="ema")


def test_two_checkpoints_are_evaluated_on_the_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vae = build(PRESETS["tiny"])
    path = tmp_path / "first.safetensors"
    write_safetensors(path, dict(vae.state_dict()), metadata=own_entries(vae.config))
    words = ["data", str(path), "--video_path", "sample:heldout", "--num_frames", "5", "--resolution", "32"]
    words += ["--out", str(tmp_path / "out"), "--device", "cpu"]
    assert main("compare", [*words, "--fail_if", "psnr<-1"]) == 1
    assert "failed: psnr<-1" in capsys.readouterr().out
    assert main("compare", words) == 0
    assert main("compare", ["data", "data", *words[2:]]) == 2
    assert "one and the same" in capsys.readouterr().err
