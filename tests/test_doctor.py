"""The doctor judges machines that are given as data, says it in two languages, and changes nothing."""

import json
import re
import string
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from runs import ENVIRONMENT

from causalvae.checkup import DECODERS, EXTRAS, OPTIONAL, Checkup, Gpu, examine
from causalvae.cli import main
from causalvae.doctor import LEAST_TORCH, as_text, doctor, in_words
from causalvae.findings import Finding
from causalvae.machine import Capability, Machine, TorchFacts
from causalvae.texts import texts

ROOT = Path(__file__).parents[1]
GIB = 2**30
# torch.compile warns about parts of torch, and uses one that warns when it is imported.
COMPILES = pytest.mark.filterwarnings(
    "default", "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"
)
H100 = Gpu(name="H100", total_bytes=80 * GIB, free_bytes=79 * GIB, able=Capability())
T4 = Gpu(
    name="T4", total_bytes=16 * GIB, free_bytes=15 * GIB, able=Capability(missing={"bf16": "T4 has no bf16"})
)
WHOLE = Checkup(
    python="3.11.7",
    pyav="18.1.0",
    machine=Machine(
        system="Linux 6.1",
        cores=16,
        memory_bytes=128 * GIB,
        cpu="EPYC",
        cpu_flags=("avx2", "avx512_bf16"),
        shm_bytes=64 * GIB,
    ),
    torch=TorchFacts(
        version="2.13.0", threads=16, cpu_capability="AVX512", gpus=("H100",), cuda_version="12.8"
    ),
    cudnn=92100,
    cpu=Capability(),
    gpus=(H100,),
    mps=False,
    free_bytes=100 * GIB,
    threads_asked=None,
    compilers={"cpu": None, "cuda:0": None},
    descriptors=(65536, 65536),
    disks={"/data": 500 * GIB},
    decoders=(),
    encoders=(),
    packages=dict.fromkeys(EXTRAS | OPTIONAL, ()),
    weights={"lpips-vgg": ()},
    home="/home/a/.cache/causalvae",
    home_problem=None,
    offline=False,
)
REPORT, BITS = "pip install 'causalvae[report]'", "pip install 'causalvae[adamw8bit]'"
CPU_TORCH = replace(WHOLE.torch, gpus=(), cuda_version=None)
AMX = replace(WHOLE.machine, cpu_flags=("amx_bf16",))
WORST = replace(
    WHOLE,
    torch=replace(WHOLE.torch, version="2.9.1", threads=32),
    cudnn=91002,
    cpu=Capability(missing={"bf16": "this CPU has no bf16"}, remarks={"fp16": "it is slow"}),
    gpus=(replace(T4, free_bytes=GIB), T4),
    free_bytes=GIB,
    machine=replace(WHOLE.machine, shm_bytes=64 * 2**20),
    compilers={"cpu": "no g++"},
    descriptors=(64, 1024),
    disks={"/data": GIB // 2},
    decoders=DECODERS,
    encoders=("libx264",),
    packages={"report": ("plotly",), "adamw8bit": ("bitsandbytes",)},
    weights={"lpips-vgg": ("vgg.pth",)},
    home_problem="/home can't be written to",
)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, without a compiler, which takes long, and without a network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CXX", "no such compiler")
    monkeypatch.setenv("CAUSALVAE_OFFLINE", "1")
    return tmp_path


def found(seen: Checkup) -> dict[str, Finding]:
    return {each.id: each for each in doctor(seen)}


def test_a_machine_that_has_everything_has_no_findings_but_ok() -> None:
    assert {each.level for each in doctor(WHOLE)} == {"ok"}
    assert {"gpu", "bits", "compiler", "weights", "extra"} <= found(WHOLE).keys()


@pytest.mark.parametrize(
    ("changes", "id_", "level", "values"),
    [
        ({"gpus": (), "torch": CPU_TORCH}, "gpu-not-built", "note", {}),
        ({"gpus": ()}, "gpu-none", "note", {}),
        ({"gpus": (), "mps": True}, "mps", "ok", {}),
        ({"gpus": (replace(H100, free_bytes=3 * GIB),)}, "gpu-used", "note", {"free": "3.0 GiB"}),
        ({"gpus": (T4,)}, "bits-missing", "note", {"device": "cuda:0", "name": "bf16"}),
        ({"cpu": Capability(remarks={"fp16": "slow"})}, "bits-remark", "note", {"why": "slow"}),
        ({"machine": AMX}, "amx", "note", {}),
        ({"cudnn": 91400}, "cudnn-old", "problem", {"cudnn": "9.14.0", "cuda": "12"}),
        ({"torch": replace(WHOLE.torch, version="2.9.1+cu128")}, "torch-old", "problem", {"least": "2.10"}),
        ({"torch": replace(WHOLE.torch, threads=64)}, "threads-many", "note", {"cores": "16"}),
        (
            {"torch": replace(WHOLE.torch, threads=1), "threads_asked": "1"},
            "threads-few", "note", {"threads": "1"},
        ),
        ({"free_bytes": GIB}, "memory-low", "problem", {"free": "1.0 GiB"}),
        ({"free_bytes": None}, "memory-unknown", "note", {}),
        ({"compilers": {"cpu": "no g++"}}, "compiler-missing", "note", {"why": "no g++"}),
        ({"descriptors": (512, 4096)}, "descriptors-low", "note", {"better": "4096"}),
        ({"descriptors": (64, -1)}, "descriptors-low", "problem", {"better": "65536"}),
        ({"descriptors": (-1, -1)}, "descriptors", "ok", {}),
        ({"disks": {"/a": 5 * GIB}}, "disk-low", "note", {"path": "/a"}),
        ({"disks": {"/a": GIB // 2}}, "disk-low", "problem", {"free": "512 MiB"}),
        ({"decoders": ("av1",)}, "decoders-missing", "problem", {"names": "av1"}),
        ({"encoders": ("libx264",)}, "encoders-missing", "problem", {"names": "libx264"}),
        ({"packages": {"report": ("plotly",)}}, "extra-missing", "note", {"install": REPORT}),
        ({"packages": {"adamw8bit": ("bitsandbytes",)}}, "extra-missing", "note", {"install": BITS}),
        ({"weights": {"lpips-vgg": ("vgg.pth",)}}, "weights-missing", "note", {"missing": "vgg.pth"}),
        ({"weights": {"lpips-vgg": ("vgg.pth",)}, "offline": True}, "weights-offline", "note", {}),
        ({"home_problem": "/x is no folder"}, "home-unwritable", "note", {"why": "/x is no folder"}),
    ],
)  # fmt: skip
def test_what_is_missing_or_bad_is_found(
    changes: dict[str, Any], id_: str, level: str, values: dict[str, str]
) -> None:
    finding = found(replace(WHOLE, **changes))[id_]
    assert finding.level == level
    assert values.items() <= finding.values.items()
    assert id_ not in found(WHOLE) or level == "ok"


def test_shared_memory_matters_to_several_gpus_only() -> None:
    small = replace(WHOLE, machine=replace(WHOLE.machine, shm_bytes=64 * 2**20))
    assert found(small)["shared"].level == "ok"
    assert found(replace(small, gpus=(H100, H100)))["shared-low"].level == "note"


def test_an_old_cudnn_matters_from_the_torch_that_avoids_it_and_on_gpus_only() -> None:
    old = replace(WHOLE, cudnn=91002)
    assert "cudnn-old" in found(old)
    assert "cudnn-old" not in found(replace(old, gpus=()))
    assert "cudnn-old" not in found(replace(old, torch=replace(WHOLE.torch, version="2.8.0")))


def test_wrong_gradients_are_those_of_one_torch_on_cpus_with_amx() -> None:
    amx = replace(WHOLE, machine=AMX)
    assert "amx" not in found(replace(amx, torch=replace(WHOLE.torch, version="2.14.0")))
    assert "amx" not in found(replace(amx, cpu=Capability(missing={"bf16": "none"})))


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_every_finding_has_its_words_and_nothing_is_left_open(lang: Any) -> None:
    count = texts("doctor", lang)["ui.count"]
    extremes = [WHOLE, WORST, replace(WORST, gpus=(), torch=CPU_TORCH, free_bytes=None, offline=True)]
    for seen in [*extremes, replace(WHOLE, gpus=(), mps=True), replace(WHOLE, machine=AMX)]:
        lines = in_words(doctor(seen), lang)
        text, levels = as_text({"machine": lines}, lang), [line.level for line in lines]
        assert all(line.level == "ok" or line.remedy for line in lines)
        assert re.search(r"[{}]|None", text) is None
        assert count.format(problems=levels.count("problem"), notes=levels.count("note")) in text
        assert any("\u4e00" <= c <= "\u9fff" for c in text) == (lang == "zh")


def test_both_languages_have_the_same_texts_with_the_same_places() -> None:
    def places(lang: Any) -> dict[str, set[str]]:
        parse, says = string.Formatter().parse, texts("doctor", lang)
        return {key: {name for _, name, _, _ in parse(text) if name} for key, text in says.items()}

    assert places("en") == places("zh")


def test_names_of_devices_and_folders_are_text() -> None:
    gpu = replace(H100, name="a\x1b[31m\n{why}")
    (line,) = [line for line in in_words(doctor(replace(WHOLE, gpus=(gpu,))), "en") if line.id == "gpu"]
    assert r"a\x1b[31m\n{why}" in line.what


def test_extras_and_the_least_torch_are_those_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = {k: v for k, v in project["optional-dependencies"].items() if k not in ("test", "lint")}
    assert optional.keys() == EXTRAS.keys()
    for name, packages in optional.items():
        assert {re.split(r"[=><]", package)[0] for package in packages} == set(EXTRAS[name])
    assert f"torch>={'.'.join(map(str, LEAST_TORCH))}" in project["dependencies"]


@COMPILES
def test_looking_at_this_machine_changes_nothing(elsewhere: Path) -> None:
    home = elsewhere / "home"
    seen = examine({**ENVIRONMENT, "CAUSALVAE_HOME": str(home)})
    assert list(elsewhere.iterdir()) == []
    assert (seen.home, seen.home_problem) == (str(home), None)
    assert (seen.decoders, seen.encoders) == ((), ())
    assert seen.weights["lpips-vgg"] == ("vgg16-397923af.pth", "vgg.pth")
    assert seen.offline
    assert "cpu" in seen.compilers
    ids = {each.id for each in doctor(seen)}
    assert {"versions", "cpu", "memory", "disk", "decoders", "weights-offline", "home"} <= ids
    blocked = examine({**ENVIRONMENT, "CAUSALVAE_HOME": "/dev/null/x"})
    assert blocked.home_problem == "/dev/null is no folder"


TINY = "--video_path sample: --model tiny --resolution 32 --video_num_frames 5 --perceptual none"


@pytest.mark.parametrize(
    ("flags", "status", "fits"),
    [(TINY, 0, "ok"), (f"{TINY} --memory 1MiB", 1, None), (TINY.replace("sample:", "no"), 1, "ok")],
)
@COMPILES
def test_a_command_that_does_not_fit_or_lacks_videos_is_a_problem(
    flags: str, status: int, fits: str | None, elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--json", "--measure", "False", "--lang", "en", "--", "causalvae", "train", *flags.split()]
    assert main("doctor", words) == status
    whole = json.loads(capsys.readouterr().out)
    levels = {line["id"]: line["level"] for line in whole["command"]}
    assert ("problem" in levels.values()) == (status == 1)
    assert levels.get("memory-fits") == fits
    assert whole["machine"]
    assert "rate-batch" not in levels  # what follows from the flags alone is for `explain`
    assert list(elsewhere.iterdir()) == []


@pytest.mark.slow
@COMPILES
def test_a_step_of_the_command_is_timed(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("doctor", ["--lang", "zh", "--", *TINY.split()]) == 0
    assert texts("doctor", "zh")["ui.command"] in capsys.readouterr().out
    assert list(elsewhere.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--", "ls"], "ls: not a training command"),
        (["--"], "not a training command"),
        (["now"], "now: not a flag"),
        (["--jsno"], "did you mean --json?"),
        (["--lang", "fr"], "--lang fr: must be one of auto, en, zh"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("doctor", words) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"error: [^\n]+\n", error), error
    assert said in error
