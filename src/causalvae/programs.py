"""Encoder and decoder as programs that run without this package: ONNX, and torch.export's .pt2.

A program holds for any batch, number of frames and size. Before it gets its name it runs beside the model on
sizes that it was not made with, one frame among them; a program that differs is not left behind.
"""

import importlib.util
import json
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.fx.experimental._config as shape_rules
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from causalvae import rng
from causalvae.errors import ConfigError, RunError
from causalvae.export import in_the_place_of
from causalvae.files import sha256
from causalvae.flags import printable
from causalvae.models.build import Model, build
from causalvae.models.presets import DiffusersConfig
from causalvae.weights.layouts import Choice
from causalvae.weights.load import Loaded, load_model
from causalvae.weights.published import LATENT_SCALE, published_config
from causalvae.weights.writing import aside

Kind = Literal["onnx", "torch"]
Run = Callable[[Tensor], list[Tensor]]
Size = tuple[int, int, int, int]  # clips, latent frames, latent height and width

FACTS = "program.json"
ENDINGS = {"onnx": ".onnx", "torch": ".pt2"}
OURS = re.compile(rf"(encoder|decoder)\.(onnx|onnx\.data|pt2)|{re.escape(FACTS)}")
NEEDED = ("onnx", "onnxscript", "onnxruntime")
OPSET = 18
APART_FROM = 1_800_000_000  # bytes of weights; a file of protobuf ends at 2 GiB
TOLERANCE = 1e-4  # of the largest value, or of 1
MOST: Size = (1024, 4096, 2048, 2048)
LEAST: Size = (1, 1, 2, 2)  # one position alone takes other branches
TRACED: Size = (2, 5, 3, 7)  # sizes that are not each other's multiples, which would be taken for a rule
TRIED: tuple[Size, ...] = ((1, 2, 2, 3), (3, 3, 4, 2), (1, 1, 2, 2))
NAMES = {"encoder": (["clip"], ["latent_mean", "latent_logvar"]), "decoder": (["latent"], ["reconstruction"])}


@dataclass(frozen=True)
class Exported:
    """What was written: the folder, and its facts as they stand in program.json."""

    path: Path
    facts: dict[str, Any]  # Any: JSON
    notes: tuple[str, ...]

    @property
    def text(self) -> str:
        """What to say of it."""
        lines = [
            f"{printable(str(self.path))}/{entry['file']}: checked on {len(TRIED)} other sizes, differs "
            f"by at most {entry['largest_difference']:.1e}"
            for entry in self.facts["programs"].values()
        ]
        return "".join(f"{line}\n" for line in (*lines, *self.notes))


class Encoding(nn.Module):
    """The encoder as a function: b 3 t h w -> mean and logvar, b c k h w."""

    def __init__(self, vae: Model) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, clip: Tensor) -> tuple[Tensor, Tensor]:
        """clip: b 3 t h w in [-1, 1], t = 1 + temporal * n."""
        posterior = self.vae.encode(clip)
        return posterior.mean, posterior.logvar


class Decoding(nn.Module):
    """The decoder as a function: b c k h w -> b 3 t h w."""

    def __init__(self, vae: Model) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latent: Tensor) -> Tensor:
        """latent: b c k h w."""
        return self.vae.decode(latent)


def export(
    source: Path,
    target: Path,
    *,
    to: Kind,
    prefer: Choice = "ema",
    model_config: Path | None = None,
    overwrite: bool = False,
) -> Exported:
    """Write a folder with a program of each half of the model, fp32, and program.json.

    ConfigError if the model or the target can't be, RunError (status 1) if a program is not the model or the
    disk refuses; then nothing is left.
    """
    _refuse_target(target, overwrite=overwrite)
    if to == "onnx":
        _refuse_without_packages()
    loaded = load_model(source, prefer=prefer, model_config=model_config)
    _refuse_diffusers(loaded, source)
    vae = _model_of(loaded)
    halves = {"encoder": Encoding(vae), "decoder": Decoding(vae)}
    traced = {name: _trace(half, vae, side=name) for name, half in halves.items()}
    num_bytes = sum(p.numel() * p.element_size() for p in vae.parameters())
    with in_the_place_of(target) as folder, aside([folder], num_bytes=num_bytes) as (partial,):
        partial.mkdir()
        programs = {
            name: _written(halves[name], program, vae=vae, side=name, folder=partial, to=to)
            for name, program in traced.items()
        }
        facts = _facts(loaded, programs, to=to)
        (partial / FACTS).write_text(json.dumps(facts, indent=2) + "\n")
    return Exported(target, facts, loaded.notes)


def _written(
    half: nn.Module, program: ExportedProgram, *, vae: Model, side: str, folder: Path, to: Kind
) -> dict[str, Any]:  # Any: JSON
    """Write one program, compare it with the model, and give its facts."""
    file = folder / f"{side}{ENDINGS[to]}"
    run = (_write_onnx if to == "onnx" else _write_torch)(program, file, side=side)
    return _entry(file, vae, side=side, worst=largest_difference(half, run, vae=vae, side=side))


def _refuse_target(target: Path, *, overwrite: bool) -> None:
    if target.exists() and not target.is_dir():
        raise ConfigError(f"{target}: is a file, and an export is a folder; name another")
    held = sorted(target.iterdir()) if target.is_dir() else []
    if held and not overwrite:
        raise ConfigError(f"{target}: is there already; name another, or add --overwrite True")
    other = next((each for each in held if not OURS.fullmatch(each.name)), None)
    if other is not None:
        raise ConfigError(f"{other}: is no part of an export, so the folder is not written over")


def _refuse_diffusers(loaded: Loaded, source: Path) -> None:
    if isinstance(loaded.config, DiffusersConfig):
        raise ConfigError(
            f"{source}: {loaded.config.class_name} can't be exported: the code of diffusers takes a clip "
            "apart by loops over its frames, so that a program would hold for one number of frames only; use "
            "the model through diffusers, which `causalvae convert --to diffusers` writes for"
        )


def _refuse_without_packages() -> None:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"--to onnx: the Python packages {', '.join(missing)} are missing; `pip install "
            "'causalvae[onnx]'` installs them"
        )


def _model_of(loaded: Loaded) -> Model:
    """The model, fp32 on the CPU, without anything to learn."""
    vae = build(loaded.config)
    weights = {name: tensor.float() for name, tensor in loaded.tensors.items()}
    vae.load_state_dict(vae.state_dict() | weights, strict=True)
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def _trace(half: nn.Module, vae: Model, *, side: str) -> ExportedProgram:
    """The half as torch sees it at sizes that it does not know."""
    counts = tuple(
        Dim(name, min=least, max=most)
        for name, least, most in zip(("b", "k", "h", "w"), LEAST, MOST, strict=True)
    )
    shapes: dict[int, Any] = {0: counts[0]}  # Any: Dim, and sums of it, which have no common public type
    if side == "encoder":
        g = vae.geometry
        frames = g.temporal * counts[1] - (g.temporal - 1)  # 1 + temporal * n; torch wants roots from 1
        shapes |= {2: frames, 3: g.spatial * counts[2], 4: g.spatial * counts[3]}
    else:
        shapes |= {2: counts[1], 3: counts[2], 4: counts[3]}
    example = _example(vae, TRACED, side=side)
    # One frame or position is not taken for a rule of its own.
    rules = shape_rules.patch(backed_size_oblivious=True)  # pyright: ignore[reportAttributeAccessIssue]: given by torch to each module of settings
    with _without_warnings(), rules:
        return torch.export.export(half, (example,), dynamic_shapes=(shapes,), strict=False)


def _example(vae: Model, size: Size, *, side: str) -> Tensor:
    """A clip b 3 t h w, or a latent b c k h w, of this size in latent positions."""
    g = vae.geometry
    b, k, h, w = size
    shape = (b, g.channels, k, h, w)
    if side == "encoder":
        shape = (b, 3, 1 + g.temporal * (k - 1), g.spatial * h, g.spatial * w)
    return rng.normal(shape, rng.key("export", side, *size)) * (0.5 if side == "encoder" else 1.0)


def _write_torch(program: ExportedProgram, file: Path, *, side: str) -> Run:
    """Write a .pt2, and how it is run: read again."""
    del side
    with _without_warnings():
        torch.export.save(program, file)
        module = torch.export.load(file).module(check_guards=False)
    return lambda x: _listed(module(x))


def _write_onnx(program: ExportedProgram, file: Path, *, side: str) -> Run:
    """Write an .onnx, and how it is run: by onnxruntime."""
    import onnxruntime

    inputs, outputs = NAMES[side]
    num_bytes = sum(t.numel() * t.element_size() for t in program.state_dict.values())
    with _without_warnings():
        made = torch.onnx.export(
            program,
            dynamo=True,
            input_names=inputs,
            output_names=outputs,
            opset_version=OPSET,
            verbose=False,
        )
        assert made is not None
        made.save(str(file), external_data=num_bytes > APART_FROM)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])

    def run(x: Tensor) -> list[Tensor]:
        return [torch.from_numpy(y) for y in cast(Any, session.run(None, {inputs[0]: x.numpy()}))]

    return run


@torch.no_grad()
def largest_difference(half: nn.Module, run: Run, *, vae: Model, side: str) -> float:
    """Largest difference of program and model over all sizes tried. RunError if it is too large."""
    worst = 0.0
    for size in TRIED:
        x = _example(vae, size, side=side)
        expected = _listed(half(x))
        for y, z in zip(expected, run(x), strict=True):
            if y.shape != z.shape:
                raise RunError(_not_the_model(side, x, f"{tuple(z.shape)} for {tuple(y.shape)}"), status=1)
            difference = float((y - z).abs().max())
            if not difference <= TOLERANCE * max(1.0, float(y.abs().max())):
                raise RunError(_not_the_model(side, x, f"it differs by {difference:.1e}"), status=1)
            worst = max(worst, difference)
    return worst


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Of the exporters, which are about their own insides."""
    before = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)


def _not_the_model(side: str, x: Tensor, why: str) -> str:
    return (
        f"the program of the {side} does not do what the model does for {tuple(x.shape)}: {why}; nothing was "
        "written. This is a bug here or in the exporter"
    )


def _listed(found: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else list(found)


def _entry(file: Path, vae: Model, *, side: str, worst: float) -> dict[str, Any]:  # Any: JSON
    """Facts of one program."""
    inputs, outputs = NAMES[side]
    g = vae.geometry
    axes = {
        "encoder": f"b 3 t h w; t = 1 + {g.temporal} n; h, w multiples of {g.spatial} from {2 * g.spatial}",
        "decoder": f"b {g.channels} k h w; h, w from 2",
    }[side]
    beside = file.with_name(file.name + ".data")
    entry = {
        "file": file.name,
        "sha256": sha256(file),
        "inputs": inputs,
        "outputs": outputs,
        "input_axes": axes,
        "largest_difference": worst,
    }
    return entry | ({"data": {"file": beside.name, "sha256": sha256(beside)}} if beside.is_file() else {})


def _facts(loaded: Loaded, programs: dict[str, Any], *, to: Kind) -> dict[str, Any]:  # Any: JSON
    """What a reader of the programs has to know."""
    assert not isinstance(loaded.config, DiffusersConfig)
    g = loaded.config.geometry
    facts = {
        "format": to,
        "model": loaded.family,
        "config": {"class": type(loaded.config).__name__, **asdict(loaded.config)},
        "source": loaded.facts(),
        "numbers": "fp32",
        "pixels": [-1.0, 1.0],
        "temporal_factor": g.temporal,
        "spatial_factor": g.spatial,
        "latent_channels": g.channels,
        "programs": programs,
        "torch": torch.__version__,
    }
    if published_config(loaded.config) is not None:
        facts["latent_scale"] = LATENT_SCALE
    return facts | ({"opset": OPSET} if to == "onnx" else {})
