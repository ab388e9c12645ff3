"""Where perceptual networks come from: files, folders, publishers, programs of the user."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from media import BUNDLED
from networks import BACKBONES, SIZE, efficientnet, frames, network_of, weights_of, write_files
from safetensors.torch import save_file
from servers import Site, closed_address, serve
from torch import Tensor, nn
from torch.nn import functional

from causalvae.critics.lpips import FeatureDistance, LpipsBackbone
from causalvae.data.decode import read_frames
from causalvae.errors import ConfigError, WeightsError
from causalvae.losses import LossPlan, perceptual_loss
from causalvae.models.build import build
from causalvae.models.presets import PRESETS
from causalvae.perceptual import Published, Shelf, build_perceptual, refuse_change
from causalvae.rng import below, key, normal
from causalvae.train.optim import build_optimizer, clip_gradients, set_learning_rate
from causalvae.train.state import TrainState
from causalvae.train.step import train_step
from causalvae.video import to_model


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("kind", ["torch", "old-torch", "safetensors"])
def test_a_folder_is_lpips_by_what_is_in_it(tmp_path: Path, backbone: LpipsBackbone, kind: str) -> None:
    if kind == "torch" and backbone == "vgg":
        pytest.skip("the largest is tried in the format it is published in")
    if kind == "safetensors":
        save_file(weights_of(backbone), tmp_path / "all.safetensors")
    else:
        write_files(tmp_path, backbone, zipped=kind == "torch")
    (tmp_path / "README.md").write_text("no weights")
    made, warnings = build_perceptual(str(tmp_path), size=SIZE, shelf=Shelf(home=tmp_path))
    assert made is not None
    assert (made.name, warnings) == (f"lpips-{backbone}", [])
    assert made.sha256 == {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(tmp_path.iterdir())
        if path.name != "README.md"
    }
    a, b = frames(1).float(), frames(1, seed=1).float()
    torch.testing.assert_close(
        made.module(a, b), network_of(backbone, torch.float32)(a, b), rtol=1e-6, atol=0
    )
    assert json.loads(json.dumps(made.facts())) == made.facts()


def shelf_with(folder: Path, files: Sequence[Path], *, mirror: str, offline: bool = False) -> Shelf:
    """A shelf whose squeeze is published as these files; the others are as published."""
    trunk, lin = (
        Published(f"http://nowhere.invalid/{path.name}", hashlib.sha256(path.read_bytes()).hexdigest())
        for path in files
    )
    return Shelf(
        home=folder / "home",
        mirror=mirror,
        offline=offline,
        published=dict.fromkeys(BACKBONES, (trunk, lin)),
    )


def test_a_named_lpips_is_fetched_once_and_then_needs_no_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    files = write_files(tmp_path / "files", "squeeze")
    with serve(Site({f"/m/{path.name}": path.read_bytes() for path in files})) as site:
        shelf = shelf_with(tmp_path, files, mirror=f"{site.url}/m/")
        first, _ = build_perceptual("lpips-squeeze", size=SIZE, shelf=shelf)
    assert len(site.requests) == 2
    second, _ = build_perceptual(
        "lpips-squeeze", size=SIZE, shelf=shelf_with(tmp_path, files, mirror=closed_address(), offline=True)
    )
    assert first is not None
    assert second is not None
    assert first.name == "lpips-squeeze"
    assert first.facts() == second.facts()
    (tmp_path / "home" / "lpips" / "second.pth").write_bytes(b"another file")
    with pytest.raises(WeightsError, match=r"not the published file.*remove it"):
        build_perceptual("lpips-squeeze", size=SIZE, shelf=shelf)


@pytest.mark.parametrize("offline", [True, False])
def test_auto_without_its_files_warns_and_a_named_one_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, offline: bool
) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    shelf = Shelf(home=tmp_path, offline=offline, mirror=closed_address())
    made, warnings = build_perceptual("auto", size=SIZE, shelf=shelf)
    assert made is None
    assert len(warnings) == 1
    assert warnings[0].startswith("the run trains without a perceptual term: LPIPS needs vgg16-397923af.pth")
    assert "\n" not in warnings[0]
    with pytest.raises(ConfigError) as caught:
        build_perceptual("lpips-vgg", size=SIZE, shelf=shelf)
    wanted = f"put the file from {shelf.mirror}/vgg16-397923af.pth at {tmp_path}/lpips/vgg16-397923af.pth"
    assert str(caught.value).endswith(wanted)
    assert ("CAUSALVAE_OFFLINE" if offline else "can't be reached") in str(caught.value)


def test_none_is_none_and_frames_that_are_too_small_are_refused(tmp_path: Path) -> None:
    shelf = Shelf(home=tmp_path, offline=True)
    assert build_perceptual("none", size=(8, 8), shelf=shelf) == (None, [])
    with pytest.raises(ConfigError, match=r"frames of 24x64 are too small .* needs 32x32"):
        build_perceptual("efficientnet-lite0", size=(24, 64), shelf=shelf)


def test_the_shelf_is_where_the_environment_says() -> None:
    assert Shelf.of({}) == Shelf(home=Path.home() / ".cache" / "causalvae")
    told = {"CAUSALVAE_HOME": "/a", "CAUSALVAE_OFFLINE": "1", "CAUSALVAE_MIRROR": "http://b"}
    assert Shelf.of(told) == Shelf(home=Path("/a"), offline=True, mirror="http://b")
    assert not Shelf.of({"CAUSALVAE_OFFLINE": "0"}).offline


class Small(nn.Module):
    """A user's network: two stages, batch norm, and the number of frames in the batch left open."""

    def __init__(self, *, maps: int = 2) -> None:
        super().__init__()
        self.maps = maps
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.second = nn.Conv2d(8, 16, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, ...] | Tensor:
        h = self.first(x)
        found = (h, self.second(h))
        return found[: self.maps] if self.maps else h.mean()


def export(path: Path, network: nn.Module, *, fixed: bool = False) -> Path:
    """The network as a program, for frames of any size or of one size."""
    size = torch.export.Dim.DYNAMIC
    shapes = None if fixed else ({0: size, 2: size, 3: size},)
    path.parent.mkdir(exist_ok=True)
    program = torch.export.export(network.eval(), (torch.zeros(2, 3, 64, 64),), dynamic_shapes=shapes)
    torch.export.save(program, path)
    return path


def test_a_users_program_judges_under_its_own_name(tmp_path: Path) -> None:
    network = Small()
    program = export(tmp_path / "mine" / "backbone.pt2", network)
    for choice in (program.parent, program):
        made, warnings = build_perceptual(str(choice), size=SIZE, shelf=Shelf(home=tmp_path))
        assert made is not None
        assert made.name == "mine"
        assert made.sha256 == {"backbone.pt2": hashlib.sha256(program.read_bytes()).hexdigest()}
        assert len(warnings) == 1
        assert "runs with your rights" in warnings[0]
    assert made is not None
    module = made.module.double().eval()
    recon, clip = frames(3).requires_grad_(), frames(3, seed=1)
    wanted = torch.zeros(3, dtype=torch.float64)
    for h in zip(network.double()(recon), network(clip), strict=True):
        a, b = (x / x.norm(dim=1, keepdim=True).clamp(min=1e-12) for x in h)
        wanted = wanted + 0.5 * (a - b).square().sum(dim=1).mean(dim=(1, 2))
    found = module(recon, clip).flatten()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=0)  # the divisor has 1e-6 added
    assert bool(torch.autograd.grad(found.sum(), recon)[0].abs().sum() > 0)
    (tmp_path / "mine" / "config.json").write_text('{"name": "my-network", "smallest_side": 16}')
    named, _ = build_perceptual(str(program.parent), size=(16, 20), shelf=Shelf(home=tmp_path))
    assert named is not None
    assert (named.name, named.module.smallest_side) == ("my-network", 16)
    assert sorted(named.sha256) == ["backbone.pt2", "config.json"]


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ('{"name": "LPIPS-mine"}', "is not LPIPS"),
        ('{"name": "a\\nb"}', "name must be a line"),
        ('{"smallest_side": 0}', "smallest_side must be"),
        ("[1]", "must be a table"),
        ("{", "not JSON"),
    ],
)
def test_what_a_user_says_of_a_program_is_checked(tmp_path: Path, facts: str, said: str) -> None:
    (tmp_path / "backbone.pt2").write_bytes(b"is read later")
    (tmp_path / "config.json").write_text(facts)
    with pytest.raises(ConfigError, match=said):
        build_perceptual(str(tmp_path), size=SIZE, shelf=Shelf(home=tmp_path))


def test_a_program_that_is_no_backbone_is_refused_in_one_line(tmp_path: Path) -> None:
    programs = [
        export(tmp_path / "a.pt2", Small(), fixed=True),
        export(tmp_path / "b.pt2", Small(maps=0)),
        tmp_path / "c.pt2",
    ]
    programs[2].write_bytes(b"no program" * 100)
    for path in programs:
        with pytest.raises(WeightsError, match="not a program that maps frames") as caught:
            build_perceptual(str(path), size=SIZE, shelf=Shelf(home=tmp_path))
        assert "\n" not in str(caught.value)


def test_files_that_are_no_network_are_refused_in_one_line(tmp_path: Path) -> None:
    trunk, lin = write_files(tmp_path / "whole", "squeeze")
    data = trunk.read_bytes()
    tensors = weights_of("squeeze")
    folders = {name: tmp_path / name for name in ("empty", "half", "cut", "noise", "object", "twice", "nan")}
    for folder in folders.values():
        folder.mkdir()
    (folders["half"] / "a.pth").write_bytes(data)
    (folders["cut"] / "a.pth").write_bytes(data[: len(data) // 2])
    (folders["noise"] / "a.pth").write_bytes(b"\x80\x02" + data[100:400])
    torch.save({"weights": Path("an object")}, folders["object"] / "a.pth")
    for name in ("a.pth", "b.pth"):
        (folders["twice"] / name).write_bytes(data)
    tensors["features.0.weight"][0] = torch.nan
    save_file(tensors, folders["nan"] / "a.safetensors")
    for path in [*folders.values(), lin, trunk]:
        with pytest.raises(WeightsError) as caught:
            build_perceptual(str(path), size=SIZE, shelf=Shelf(home=tmp_path))
        assert str(caught.value).startswith(f"--perceptual {path}")
        assert "\n" not in str(caught.value)
        assert "weights_only" not in str(caught.value)  # torch's advice to run what is in the file


@pytest.mark.parametrize("choice", ["vgg", "lpips", "", "/nowhere/at/all"])
def test_a_name_that_is_none_gets_the_list_of_names(tmp_path: Path, choice: str) -> None:
    with pytest.raises(ConfigError, match="lpips-vgg, lpips-alex, lpips-squeeze, efficientnet-lite0"):
        build_perceptual(choice, size=SIZE, shelf=Shelf(home=tmp_path))


def test_a_run_goes_on_with_the_network_it_was_trained_with_and_no_other(tmp_path: Path) -> None:
    now = efficientnet()
    saved = json.loads(json.dumps(now.facts()))
    refuse_change(saved, now, run=tmp_path)
    refuse_change(None, None, run=tmp_path)
    for before, after in ((saved, None), (None, now), ({**saved, "sha256": {}}, now)):
        with pytest.raises(ConfigError, match=r"--perceptual: .* was trained with"):
            refuse_change(before, after, run=tmp_path)


def test_efficientnet_is_found_by_name_by_file_and_by_folder(tmp_path: Path) -> None:
    named = efficientnet()
    network = named.module
    assert isinstance(network, FeatureDistance)
    torch.save(dict(network.backbone.state_dict()), tmp_path / "other name.pth")
    for choice in (tmp_path, tmp_path / "other name.pth"):
        made, warnings = build_perceptual(str(choice), size=SIZE, shelf=Shelf(home=tmp_path))
        assert made is not None
        assert (made.name, warnings) == ("efficientnet-lite0", [])
        a, b = frames(1).float(), frames(1, seed=1).float()
        assert torch.equal(made.module(a, b), named.module(a, b))


def crops(base: int, *, count: int, numbers: range, frames: int) -> Tensor:
    """Clips of 32x32 from anywhere in half-size films: count 3 t 32 32."""
    films = [read_frames(path, numbers).permute(3, 0, 1, 2) for path in sorted(BUNDLED.glob("[bc]*.*"))]
    small = [functional.avg_pool2d(to_model(pixels), 2) for pixels in films]  # 3 t h w
    found: list[Tensor] = []
    for i in range(count):
        x = small[below(key(base, i, "film"), len(small))]
        room = (len(numbers) - frames + 1, x.shape[2] - 31, x.shape[3] - 31)
        t, top, left = (below(key(base, i, axis), n) for axis, n in enumerate(room))
        found.append(x[:, t : t + frames, top : top + 32, left : left + 32])
    return torch.stack(found)


def trained(judge: nn.Module, clips: Sequence[Tensor], *, weight: float, lr: float) -> nn.Module:
    """A small model after one step on each of the clips b 3 t h w; the rate rises shortly and falls to 0."""
    vae = build(replace(PRESETS["tiny"], hidden_size=16, hidden_size_mult=(1, 1, 2)), seed=0)
    state = TrainState(
        vae=vae,
        ema={},
        critic=None,
        logvar=nn.Parameter(torch.zeros(()), requires_grad=False),
        optimizer=build_optimizer(vae.named_parameters(), kind="adamw", lr=lr),
        critic_optimizer=None,
    )
    plan = LossPlan(perceptual=judge if weight else None, perceptual_weight=weight)
    clipping = partial(clip_gradients, max_norm=1.0)
    for step, clip in enumerate(clips):
        set_learning_rate(state.optimizer, lr * min(1, (step + 1) / 10) * (1 - step / len(clips)))
        shape = vae.geometry.latent_shape(clip.shape[2], 32, 32)
        noise = normal((len(clip), *shape), key("noise", step))
        assert train_step(state, clip, noise, loss=plan, critic_loss=None, clipping=clipping).applied
    return vae


@torch.no_grad()
def distance(judge: nn.Module, vae: nn.Module, clip: Tensor) -> float:
    return perceptual_loss(vae(clip, None)[0], clip, metric=judge, frames_at_once=8).item()


@pytest.mark.slow
def test_a_network_pulls_the_training_towards_what_it_sees() -> None:
    judge, clip = efficientnet().module, crops(1, count=2, numbers=range(8), frames=5)
    start, without, with_it = (
        distance(judge, trained(judge, [clip] * steps, weight=weight, lr=1e-3), clip)
        for weight, steps in ((0.0, 0), (0.0, 30), (1.0, 30))
    )
    assert with_it < 0.8 * without
    assert with_it < 0.6 * start


@pytest.mark.slow
def test_training_with_a_network_lowers_its_distance_on_frames_that_were_held_out() -> None:
    """To 0.90 of the start when it was written, where the error per pixel was still as at the start."""
    judge, held_out = efficientnet().module, crops(1, count=32, numbers=range(40, 48), frames=1)
    clips = crops(2, count=8 * 150, numbers=range(40), frames=1).split(8)
    start, end = (
        distance(judge, trained(judge, seen, weight=0.3, lr=2e-3), held_out) for seen in ((), clips)
    )
    assert end < 0.95 * start
