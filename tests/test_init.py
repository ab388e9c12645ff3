"""The command `init` as a user sees it: the file, what is said of it, what is refused, training from it."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures import FIXTURES, fixture_json
from foreign import config_of
from runs import ENVIRONMENT, ROOT, words
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from causalvae.cli import main
from causalvae.files import sha256
from causalvae.flags import flags_of
from causalvae.models.build import build, shapes
from causalvae.models.diffusers import build_diffusers
from causalvae.models.presets import PRESETS, CausalVAEConfig
from causalvae.weightflags import InitSettings
from causalvae.weights.diffusers_folder import save_folder
from causalvae.weights.load import load_model
from causalvae.weights.names import TIME_RESAMPLER, recognise
from causalvae.weights.published import published_config

FOLDER = FIXTURES / "autoencoder_kl"
WEIGHTS = FOLDER / "diffusion_pytorch_model.safetensors"


def init(out: Path, *flags: str, source: Path | None = FOLDER) -> int:
    given = [] if source is None else ["--from", str(source)]
    return main("init", [*given, "--out", str(out), *flags])


def refused(out: Path, *flags: str, source: Path | None = FOLDER, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a mistake leads to."""
    assert init(out, *flags, source=source) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert re.fullmatch(r"error: [^\n]+\n", said.err), said.err
    return said.err


def published_entries(path: Path) -> dict[str, Tensor]:
    """What the published loaders take: the table `state_dict` of a torch file without anything but data."""
    return torch.load(path, weights_only=True)["state_dict"]


@pytest.mark.parametrize("name", ["causalvae-488", "osp-v1.0", "osp-v1.1", "osp-v1.2"])
def test_the_file_is_as_published_loaders_take_it_and_is_known_again(name: str, tmp_path: Path) -> None:
    out = tmp_path / "pretrained" / "causal_vae_488_init.ckpt"
    assert init(out, "--model", name) == 0
    loaded = load_model(out)
    assert isinstance(loaded.config, CausalVAEConfig)
    published = published_entries(out)
    assert {key: tuple(tensor.shape) for key, tensor in published.items()} == shapes(loaded.config)
    assert all(tensor.dtype == torch.float32 for tensor in published.values())
    assert loaded.tensors.keys() == published.keys()
    assert all(torch.equal(loaded.tensors[key], published[key]) for key in published)
    assert loaded.config.widths == (32, 64, 64, 64)
    beside = out.with_suffix(".json")
    if name == "causalvae-488":
        assert [file.name for file in out.parent.iterdir()] == [out.name]
        return
    assert sorted(file.name for file in out.parent.iterdir()) == [out.name, beside.name]
    assert json.loads(beside.read_text()) == published_config(loaded.config)
    assert recognise(shapes(loaded.config), json.loads(beside.read_text())).config == loaded.config


def test_folder_file_and_ldm_checkpoint_give_the_same_weights(tmp_path: Path) -> None:
    sources = {"folder": FOLDER, "file": WEIGHTS, "ldm": FOLDER / "ldm.ckpt"}
    found: list[dict[str, Tensor]] = []
    for name, source in sources.items():
        assert init(tmp_path / f"{name}.ckpt", source=source) == 0
        found.append(published_entries(tmp_path / f"{name}.ckpt"))
    assert init(tmp_path / "out.safetensors") == 0
    found.append(load_file(tmp_path / "out.safetensors"))
    for each in found[1:]:
        assert each.keys() == found[0].keys()
        assert all(torch.equal(each[name], found[0][name]) for name in each)
    with safe_open(tmp_path / "out.safetensors", framework="pt") as file:
        assert file.metadata()["causalvae.model"] == "CausalVAEConfig"
    assert load_model(tmp_path / "out.safetensors").config == load_model(tmp_path / "folder.ckpt").config


def test_half_precision_becomes_fp32(tmp_path: Path) -> None:
    half = {name: tensor.half() for name, tensor in load_file(WEIGHTS).items()}
    save_file(half, tmp_path / "half.safetensors")
    assert init(tmp_path / "out.ckpt", source=tmp_path / "half.safetensors") == 0
    bias = published_entries(tmp_path / "out.ckpt")["decoder.conv_out.conv.bias"]
    assert torch.equal(bias, half["decoder.conv_out.bias"].float())


def test_what_was_done_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "init.ckpt"
    assert init(out, "--method", "center") == 0
    said = capsys.readouterr().out
    assert said.startswith(f"Wrote {out}\n")
    assert f"{WEIGHTS} (diffusers image VAE, 180 tensors, SHA-256 {sha256(WEIGHTS)})" in said
    assert "the layers of causalvae-488 in the sizes of the image VAE: 32 64 64 64 channels" in said
    assert "180 tensors, 45 of them kernels that got time (center)" in said
    assert "new       12 tensors for halving and doubling time; they start as the identity" in said
    assert "pictures and still videos come out exactly as from the image VAE" in said
    assert f"{sum(tensor.numel() for tensor in published_entries(out).values()):,} parameters" in said
    assert f"SHA-256   {sha256(out)}\n" in said
    assert said.splitlines()[-1].startswith(f"  causalvae train --load_from_checkpoint {out} ")


def test_random_weights_follow_from_the_seed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, seed in (("one", 3), ("same", 3), ("other", 4)):
        flags = ("--random", "--seed", str(seed), "--model", "tiny")
        assert init(tmp_path / f"{name}.ckpt", *flags, source=None) == 0
    assert "random numbers that follow from --seed 3" in capsys.readouterr().out
    one, same, other = ((tmp_path / f"{name}.ckpt") for name in ("one", "same", "other"))
    assert one.read_bytes() == same.read_bytes() != other.read_bytes()
    loaded, built = load_model(one), build(PRESETS["tiny"], seed=3).state_dict()
    assert loaded.config == PRESETS["tiny"]
    assert loaded.tensors.keys() == built.keys()
    assert all(torch.equal(loaded.tensors[name], built[name]) for name in built)


def test_nothing_is_overwritten_unless_it_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, beside = tmp_path / "init.ckpt", tmp_path / "init.json"
    out.write_text("mine")
    assert "is there already and stays as it is" in refused(out, capsys=capsys)
    assert out.read_text() == "mine"
    out.unlink()
    beside.write_text("mine")
    assert f"{beside} is there already" in refused(out, "--model", "osp-v1.1", capsys=capsys)
    assert init(out) == 0  # for this model nothing is written beside it
    assert beside.read_text() == "mine"
    assert init(out, "--overwrite", "True", "--model", "osp-v1.1") == 0
    assert json.loads(beside.read_text())["_class_name"] == "CausalVAEModel"
    assert sorted(file.name for file in tmp_path.iterdir()) == [out.name, beside.name]


@pytest.mark.parametrize(("source", "flags", "message"), [
    ("no/such/folder", (), "--from no/such/folder: there is no such file or folder. Name an image VAE"),
    ("checkpoints/osp_v1.1_training.ckpt", (), r"holds a video VAE \(osp-v1.1\) and no image VAE; training"),
    ("wfvae/weights.safetensors", (), r"holds a video VAE \(wfvae\) and no image VAE"),
    ("disc2d/weights.safetensors", (), "no model that is known here has tensors of these names"),
    ("lr_schedules.csv", (), "a text file, no weights"),
    ("autoencoder_kl", ("--model", "swift-488"), "changes the resolution by space-to-depth, and an image"),
    ("autoencoder_kl", ("--model", "wfvae-8"), "works on wavelets of a clip, and an image VAE on pixels"),
    ("autoencoder_kl", ("--model", "osp-v1.4"), "there is no such preset; did you mean osp-v1"),
    ("autoencoder_kl", ("--method", "tails"), "did you mean tail"),
    ("autoencoder_kl", ("--random",), "--from .*: with --random there is no image VAE; give one of the two"),
    ("autoencoder_kl", ("--seed", "3"), "--seed 3: has no effect with --from"),
    ("", ("--random", "--method", "mean"), "--method mean: has no effect with --random"),
    ("", (), "name an image VAE by --from, or give --random True"),
])  # fmt: skip
def test_what_can_not_be_is_one_line_and_leaves_nothing(
    source: str, flags: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = FIXTURES / source if (FIXTURES / source).exists() else Path(source)
    said = refused(tmp_path / "out" / "x.ckpt", *flags, source=path if source else None, capsys=capsys)
    assert re.search(message, said), said
    assert list(tmp_path.iterdir()) == []


def test_a_video_vae_of_ours_or_of_diffusers_is_no_image_vae(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert init(tmp_path / "first.ckpt") == 0
    capsys.readouterr()
    said = refused(tmp_path / "second.ckpt", source=tmp_path / "first.ckpt", capsys=capsys)
    assert "holds a video VAE (CausalVAEConfig) and no image VAE" in said
    save_folder(build_diffusers(config_of("wan-2.1")), tmp_path / "wan")
    said = refused(tmp_path / "second.ckpt", source=tmp_path / "wan", capsys=capsys)
    assert "holds a video VAE (AutoencoderKLWan) and no image VAE" in said


def test_an_image_vae_of_other_channels_or_norms_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = load_file(WEIGHTS)
    wide = {**tensors, "encoder.conv_in.weight": torch.zeros(32, 4, 3, 3)}
    save_file(wide, tmp_path / "wide.safetensors")
    said = refused(tmp_path / "out.ckpt", source=tmp_path / "wide.safetensors", capsys=capsys)
    assert "encoder.conv_in.weight is 32x4x3x3, not 32x3x3x3" in said
    folder = tmp_path / "grouped"
    folder.mkdir()
    save_file(tensors, folder / WEIGHTS.name)
    config = fixture_json("autoencoder_kl/config") | {"norm_num_groups": 16}
    (folder / "config.json").write_text(json.dumps(config))
    said = refused(tmp_path / "out.ckpt", source=folder, capsys=capsys)
    assert "its norms have 16 groups, and those of the video VAEs 32" in said


def test_a_place_that_can_not_be_written_is_a_mistake(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.ckpt").mkdir()
    assert "file is no folder; choose another place" in refused(tmp_path / "file/x.ckpt", capsys=capsys)
    assert "is a folder; name a file" in refused(tmp_path / "folder.ckpt", capsys=capsys)
    assert "give one of .ckpt, .pt" in refused(tmp_path / "x.zip", capsys=capsys)
    assert main("init", ["--from", str(FOLDER)]) == 2
    assert "--out is missing" in capsys.readouterr().err


def test_every_flag_is_in_the_docs() -> None:
    page = (ROOT / "docs" / "init.md").read_text()
    assert all(f"`--{name}`" in page for name in flags_of(InitSettings))


def test_help_and_mistakes_do_not_import_torch() -> None:
    code = (
        "import sys\nfrom causalvae.cli import main\nmain('init', sys.argv[1:])\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'yaml')))"
    )
    for flags in (["--help"], ["--from", "x"], ["--out", "x.zip", "--random"]):
        words = [sys.executable, "-c", code, *flags]
        assert subprocess.run(words, capture_output=True, check=False).returncode == 0


def trained(folder: Path, checkpoint: Path, **changes: object) -> Any:
    """run.json (Any: JSON) of one step from these weights."""
    flags = words(folder, load_from_checkpoint=checkpoint, model=None, batch_size=1, max_steps=1, **changes)
    assert main("train", flags[2:]) == 0
    return json.loads((folder / "run" / "run.json").read_text())


@pytest.fixture
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CAUSALVAE_OFFLINE", "CAUSALVAE_HOME"):
        monkeypatch.setenv(name, ENVIRONMENT[name])


@pytest.mark.usefixtures("_offline")
def test_training_starts_from_the_file(tmp_path: Path) -> None:
    out = tmp_path / "init.ckpt"
    assert init(out) == 0
    run = trained(tmp_path, out, start_learning_rate="1e-9", end_learning_rate="1e-9")
    assert run["weights"]["sha256"] == sha256(out)
    saved = load_model(tmp_path / "run", prefer="live")
    assert saved.config == load_model(out).config
    first = published_entries(out)
    assert all(torch.allclose(saved.tensors[name], first[name], rtol=0, atol=1e-8) for name in first)


@pytest.mark.usefixtures("_offline")
def test_training_starts_from_a_published_initial_file_without_entries_for_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert init(tmp_path / "init.ckpt", "--model", "osp-v1.1") == 0
    entries = published_entries(tmp_path / "init.ckpt")
    bare = {name: tensor for name, tensor in entries.items() if not TIME_RESAMPLER.match(name)}
    assert len(entries) - len(bare) == 12
    torch.save({"state_dict": bare}, tmp_path / "bare.ckpt")
    run = trained(tmp_path, tmp_path / "bare.ckpt")
    assert run["weights"]["model"] == "osp-v1.1"
    assert "no entries for the time resamplers" in capsys.readouterr().out
