"""Programs of ONNX and of torch: they do what the model does at sizes they were not made with."""

import dataclasses
import importlib.util
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from foreign import moved
from test_cli import PROGRAM, call, refused
from test_models import trained
from torch import Tensor

from causalvae import rng
from causalvae.errors import ConfigError, RunError
from causalvae.files import sha256
from causalvae.models.build import Model
from causalvae.models.interpolation import _doubled_by_number, doubled
from causalvae.models.presets import TINY, CausalVAEConfig, OwnConfig
from causalvae.programs import Decoding, Encoding, export, largest_difference
from causalvae.train.state import model_metadata
from causalvae.weights.tensorfiles import write_safetensors

LEVELS = {"hidden_size_mult": (1, 1), "num_res_blocks": 0, "spatial_levels": (0,), "temporal_levels": (0,)}
CONFIGS: dict[str, OwnConfig] = {
    "osp-v1.1": CausalVAEConfig(hidden_size=32, norm="clip", flat_levels=1, **LEVELS),
    "shuffle": dataclasses.replace(TINY, hidden_size=8, **LEVELS),
}
SIZES = ((2, 4, 3, 5), (1, 1, 4, 2))  # clips, latent frames, height, width


def saved(name: str, folder: Path) -> tuple[Model, Path]:
    vae = trained(CONFIGS[name]).float().eval().requires_grad_(False)
    path = write_safetensors(folder / "model.safetensors", vae.state_dict(), metadata=model_metadata(vae))
    return vae, path


def clip_and_latent(vae: Model, size: tuple[int, int, int, int]) -> tuple[Tensor, Tensor]:
    b, k, h, w = size
    g = vae.geometry
    shape = (b, 3, 1 + g.temporal * (k - 1), g.spatial * h, g.spatial * w)
    return 0.5 * rng.normal(shape, rng.key("clip")), rng.normal((b, g.channels, k, h, w), rng.key("latent"))


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_an_onnx_export_does_what_the_model_does_at_any_size(name: str, tmp_path: Path) -> None:
    import onnx
    import onnxruntime

    vae, path = saved(name, tmp_path)
    done = call(*PROGRAM, "export", path, tmp_path / "out", "--to", "onnx")
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 2
    facts = json.loads((tmp_path / "out/program.json").read_text())
    assert facts["source"]["sha256"] == sha256(path)
    assert facts["pixels"] == [-1, 1]
    assert (facts["temporal_factor"], facts["spatial_factor"]) == (
        vae.geometry.temporal,
        vae.geometry.spatial,
    )
    assert ("latent_scale" in facts) == (name == "osp-v1.1")
    runs = {}
    for side, entry in facts["programs"].items():
        file = tmp_path / "out" / entry["file"]
        assert entry["sha256"] == sha256(file)
        assert [each.version for each in onnx.load(str(file)).opset_import if not each.domain] == [
            facts["opset"]
        ]
        runs[side] = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        assert [each.name for each in runs[side].get_inputs()] == entry["inputs"]
        assert [each.name for each in runs[side].get_outputs()] == entry["outputs"]
    for size in SIZES:
        clip, latent = clip_and_latent(vae, size)
        posterior = vae.encode(clip)
        found = runs["encoder"].run(None, {"clip": clip.numpy()})
        found += runs["decoder"].run(None, {"latent": latent.numpy()})
        for y, z in zip((posterior.mean, posterior.logvar, vae.decode(latent)), found, strict=True):
            torch.testing.assert_close(torch.from_numpy(z), y, rtol=1e-4, atol=1e-4)  # as the export promises


@pytest.mark.slow
@torch.no_grad()
def test_a_torch_program_gives_what_the_model_gives(tmp_path: Path) -> None:
    vae, path = saved("shuffle", tmp_path)
    export(path, tmp_path / "out", to="torch")
    encode, decode = (
        torch.export.load(tmp_path / f"out/{side}.pt2").module(check_guards=False)
        for side in ("encoder", "decoder")
    )
    for size in SIZES:
        clip, latent = clip_and_latent(vae, size)
        posterior = vae.encode(clip)
        mean, logvar = encode(clip)
        assert torch.equal(mean, posterior.mean)
        assert torch.equal(logvar, posterior.logvar)
        assert torch.equal(decode(latent), vae.decode(latent))


def test_a_program_that_is_not_the_model_is_refused(tmp_path: Path) -> None:
    vae, _ = saved("shuffle", tmp_path)
    other = trained(dataclasses.replace(TINY, hidden_size=16, **LEVELS)).float().eval()
    for side, half in (("encoder", Encoding), ("decoder", Decoding)):
        same, wrong = half(vae), half(other)
        assert largest_difference(same, partial(_listed, same), vae=vae, side=side) == 0
        with pytest.raises(RunError, match=rf"the program of the {side} does not do .* it differs by"):
            largest_difference(same, partial(_listed, wrong), vae=vae, side=side)


def _listed(half: Callable[[Tensor], Tensor | tuple[Tensor, ...]], x: Tensor) -> list[Tensor]:
    found = half(x)
    return [found] if isinstance(found, Tensor) else list(found)


@pytest.mark.parametrize("frames", [1, 2, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_frames_doubled_by_their_numbers_are_the_same(frames: int, dtype: torch.dtype) -> None:
    x = rng.normal((2, 3, frames, 2, 4), rng.key("frames")).to(dtype)
    assert torch.equal(_doubled_by_number(x), doubled(x))


def test_what_cannot_be_exported_is_refused_by_name(tmp_path: Path) -> None:
    vae = moved("wan-2.1")
    path = write_safetensors(tmp_path / "wan.safetensors", vae.state_dict(), metadata=model_metadata(vae))
    with pytest.raises(ConfigError, match=r"AutoencoderKLWan can't be exported: .* loops over its frames"):
        export(path, tmp_path / "out", to="torch")
    (tmp_path / "held").mkdir()
    (tmp_path / "held/notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is there already"):
        export(path, tmp_path / "held", to="torch")
    with pytest.raises(ConfigError, match=r"notes\.txt: is no part of an export"):
        export(path, tmp_path / "held", to="torch", overwrite=True)
    with pytest.raises(ConfigError, match="is a file, and an export is a folder"):
        export(path, path, to="torch")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["held", "wan.safetensors"]


WITHOUT_ONNX = """
import importlib.machinery, sys
class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.startswith("onnx") else super().find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Finder
from causalvae.cli import run
run()
"""


def test_without_its_packages_an_export_to_onnx_says_what_to_install(tmp_path: Path) -> None:
    assert importlib.util.find_spec("onnx") is not None
    said = refused(PROGRAM[0], "-c", WITHOUT_ONNX, "export", tmp_path / "x", tmp_path / "out")
    assert "onnx, onnxscript, onnxruntime are missing; `pip install 'causalvae[onnx]'`" in said
    assert list(tmp_path.iterdir()) == []
