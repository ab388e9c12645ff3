"""The house: who may import whom, what is torch-free, and that no flag is left unread.

The list is that of the architecture page, with the modules that were split since. A module imports only
from what stands before it.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from causalvae.config import NO_EFFECT, NOT_AVAILABLE, TrainSettings
from causalvae.flags import flags_of

SOURCE = Path(__file__).parents[1] / "src" / "causalvae"
TORCH_FROM_HERE = "-- torch from here --"
LINES = f"""
errors  texts
geometry  models.presets
data.codings
flags  flagtext  config  weightflags  reportflags  evalflags  reconstructflags  latentflags
foreignflags  explainflags  scanflags  doctorflags
files  locks  fetch  rundir  machine  commandlines  findings  asked  machinefindings  placefindings
report.records  report.evals  report.charts  report.films  report.views  report.build  report.watch
runfindings  report.scanviews  report.scanpage
{TORCH_FROM_HERE}
rng  video
models.meta  models.convolution  models.stream  models.norms  models.interpolation  models.fused
models.layers
models.resampling  models.chains  models.wavelet  models.stages  models.base  models.causalvae
models.wfvae  models.start  models.diffusers  models.build
critics.lpips  critics.efficientnet  critics.patchgan  critics.regularisers  critics.i3d
data.index  data.decode  data.shards  data.sources  data.captions  data.transforms  data.readahead
data.encode  data.films  data.sound  data.writer  data.quarantine  data.clips  data.workers  data.loader
data.survey  data.draws  data.scan
weights.published  weights.names  weights.writing  weights.tensorfiles  weights.standins  weights.pytorch
weights.mindspore  weights.layouts  weights.diffusers  weights.read  weights.diffusers_folder  weights.load
weights.inflate
losses  perceptual
train.optim  train.convolutions  train.precision
fidelity  temporal  artefacts  moments  latentmetrics  frechet  compute  metrics  scores  worst
latentfiles  latentreader  latentstats  latentexport  latentset  latentdata
tiles  windows  coders  coding  infer  bars
evalset  subjects  evalwork  probes  evaluate  compare  evalcommands  export  codec  programs
train.stability  train.compiling  train.debug
train.parallel  train.signals  train.samples  train.heldout
pipeline  progress  targets  reconstruction  reconstruct
footage  encoding  decoding  latentcommands
train.state  train.runlog  train.replay  train.step  train.predict  train.plan  train.parts  train.networks
train.loop  train.trainer
forecast  explain  scancommand  checkup  doctor  doctorcommand  demo  initialise
commands
cli
"""
DOORS = ("commands", "cli")  # free of torch at their top level
MAY_IMPORT_TORCH_LATE = ("machine",)  # inside a function; commands may import any stage there
READERS = ("train.parts", "train.networks", "train.loop", "train.trainer")  # of TrainSettings
HEAVY = ("torch", "torchvision", "tensorboard")  # packages that take torch with them


@dataclass(frozen=True)
class Import:
    """One import: who has it, what it imports, and whether it waits for the call of a function (late)."""

    module: str
    target: str
    late: bool
    line: int


def module_names() -> dict[str, Path]:
    """Every module but the empty `__init__` files of folders, by its name inside the package."""
    names: dict[str, Path] = {}
    for path in sorted(SOURCE.rglob("*.py")):
        name = ".".join(path.relative_to(SOURCE).with_suffix("").parts)
        if path.name == "__init__.py" and path.parent != SOURCE:
            assert path.read_text().strip() == "", f"{path} must be empty"
        else:
            names[name] = path
    return names


def ranks() -> dict[str, int]:
    """Place of each module in the list."""
    words = [word for line in LINES.splitlines() if line != TORCH_FROM_HERE for word in line.split()]
    return {word: place for place, word in enumerate(words)}


def imports_of(name: str, path: Path) -> Iterator[Import]:
    """What a module imports when it runs: not what stands under `if TYPE_CHECKING`."""

    def walk(node: ast.AST, late: bool) -> Iterator[Import]:  # noqa: FBT001 - local
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                continue
            if isinstance(child, ast.Import):
                yield from (Import(name, alias.name, late, child.lineno) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                if base == "causalvae":  # `from causalvae import rng`: the names are modules
                    yield from (Import(name, f"causalvae.{a.name}", late, child.lineno) for a in child.names)
                else:
                    yield Import(name, base, late, child.lineno)
            yield from walk(
                child, late or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            )

    yield from walk(ast.parse(path.read_text()), False)


MODULES = module_names()
IMPORTS = [each for name, path in MODULES.items() for each in imports_of(name, path)]


def test_every_module_has_its_place_in_the_list() -> None:
    assert MODULES.keys() - ranks().keys() - {"__init__"} == set()


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_module_imports_only_from_above_its_place(name: str) -> None:
    places = ranks()
    for each in (each for each in IMPORTS if each.module == name):
        target = each.target.removeprefix("causalvae.")
        if each.target == target or target == "__version__" or name == "__init__":
            continue
        assert target in places, f"{name}:{each.line} imports {target}, which is on no line"
        if name == "commands" and each.late:
            continue
        assert places[target] < places[name], f"{name}:{each.line} imports {target}, which is not above it"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_torch_is_imported_only_below_its_line(name: str) -> None:
    free = ["__init__", *DOORS, *LINES.split(TORCH_FROM_HERE)[0].split()]
    if name not in free:
        return
    below = set(LINES.split(TORCH_FROM_HERE)[1].split()) - set(DOORS)
    for each in (each for each in IMPORTS if each.module == name):
        heavy = each.target.split(".")[0] in HEAVY or each.target.removeprefix("causalvae.") in below
        allowed = each.late and (name in MAY_IMPORT_TORCH_LATE or name in DOORS)
        assert not heavy or allowed, f"{name}:{each.line} imports {each.target}, and it must be free of torch"


def test_no_import_is_relative_and_none_takes_all_names() -> None:
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{name}:{node.lineno}"
                assert all(alias.name != "*" for alias in node.names), f"{name}:{node.lineno}"


def test_only_the_trainer_and_the_demo_see_the_settings() -> None:
    allowed = {
        "config",
        "commands",
        "foreignflags",
        "findings",
        "asked",
        "placefindings",
        "forecast",
        "train.parts",
        "train.networks",
        "train.loop",
        "train.trainer",
        "scancommand",
        "explain",
        "doctor",
        "demo",
    }
    assert {each.module for each in IMPORTS if each.target == "causalvae.config"} <= allowed


def test_every_flag_is_read_by_the_trainer_or_answered_for() -> None:
    readers = [ast.parse(MODULES[name].read_text()) for name in READERS]
    readers += [
        n for n in ast.walk(ast.parse(MODULES["config"].read_text())) if isinstance(n, ast.FunctionDef)
    ]
    read = {
        node.attr
        for reader in readers
        for node in ast.walk(reader)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value).split(".")[-1] == "settings"
    }
    answered = {word for names, _, _ in NOT_AVAILABLE + NO_EFFECT for word in names.split()}
    assert flags_of(TrainSettings).keys() - read - answered == {"config"}
