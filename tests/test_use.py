"""`causalvae.load` and what it gives: tensors, arrays and files in and out; and the page that shows it."""

import re
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from evalruns import moved_tiny
from media import in_order, write_film
from runs import ROOT

import causalvae
from causalvae import rng
from causalvae.cli import main
from causalvae.codec import Codec
from causalvae.errors import ConfigError, VideoError
from causalvae.models.build import build
from causalvae.models.presets import PRESETS
from causalvae.video import pad_frames, to_model, to_uint8
from causalvae.weights.load import load_model
from causalvae.weights.read import own_entries
from causalvae.weights.tensorfiles import write_safetensors


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> Codec:
    return causalvae.load(moved_tiny(tmp_path_factory.mktemp("weights") / "tiny.safetensors"), device="cpu")


def frames_of(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def test_arrays_tensors_and_files_of_the_same_frames_have_the_same_latents(
    codec: Codec, tmp_path: Path
) -> None:
    write_film(tmp_path / "a.mkv", frames=10, codec="ffv1")
    frames = in_order(tmp_path / "a.mkv")
    pixels = frames.permute(3, 0, 1, 2)[None]
    from_file = codec.encode(tmp_path / "a.mkv")
    for x in (frames.numpy(), pixels, to_model(pixels)):
        latents = codec.encode(x)
        torch.testing.assert_close(latents.mean, from_file.mean, rtol=0, atol=1e-5)
        assert (latents.frames, latents.height, latents.width) == frames.shape[:3]
    with torch.no_grad():
        whole = codec.vae.encode(pad_frames(to_model(pixels), codec.geometry))
    torch.testing.assert_close(from_file.mean, whole.mean, rtol=0, atol=1e-5)
    torch.testing.assert_close(from_file.logvar, whole.logvar, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", [(33, 47, 3), (6, 40, 24, 3), (2, 9, 16, 16, 3), (1, 1, 8, 8, 3)])
def test_an_array_comes_back_in_its_own_shape(codec: Codec, shape: tuple[int, ...]) -> None:
    frames = frames_of(*shape)
    again = codec.decode(codec.encode(frames))
    assert isinstance(again, np.ndarray)
    assert (again.shape, again.dtype) == (frames.shape, np.uint8)
    tensor = torch.from_numpy(frames.reshape(-1, *shape[-4:]) if len(shape) > 3 else frames[None, None])
    recon = codec.decode(codec.encode(tensor.permute(0, 4, 1, 2, 3)))
    assert isinstance(recon, torch.Tensor)
    assert np.array_equal(to_uint8(recon).permute(0, 2, 3, 4, 1).numpy().reshape(shape), again)


def test_latents_of_ones_own_give_all_frames_they_stand_for(codec: Codec) -> None:
    z = rng.normal((1, 16, 3, 2, 4), rng.key("z"))
    clip = codec.decode(z)
    assert clip.shape == (1, 3, 9, 16, 32)
    with torch.no_grad():
        torch.testing.assert_close(clip, codec.vae.decode(z), rtol=0, atol=1e-5)
    frames = codec.decode(z.numpy())
    assert isinstance(frames, np.ndarray)
    assert frames.shape == (1, 9, 16, 32, 3)


def test_samples_follow_the_seed(codec: Codec) -> None:
    latents = codec.encode(frames_of(2, 9, 16, 16, 3))
    assert torch.equal(latents.sample(1), latents.sample(1))
    assert not torch.equal(latents.sample(1), latents.sample(2))
    spread = (latents.sample(1) - latents.mean) / (0.5 * latents.logvar).exp()
    assert spread.std().item() == pytest.approx(1.0, abs=0.2)
    assert torch.equal(latents.mode(), latents.mean)


def test_a_model_is_saved_as_it_is_now(codec: Codec, tmp_path: Path) -> None:
    changed = causalvae.load(codec.save(tmp_path / "a.safetensors"), device="cpu")
    with torch.no_grad():
        changed.vae.last_layer.get_parameter("bias").add_(1.0)
    for name in ("b.safetensors", "b.ckpt"):
        again = load_model(changed.save(tmp_path / name)).tensors
        assert all(torch.equal(again[key], tensor) for key, tensor in changed.vae.state_dict().items())
    with pytest.raises(ConfigError, match=r"b.ckpt: is there already"):
        changed.save(tmp_path / "b.ckpt")


@pytest.mark.parametrize(
    ("x", "said"),
    [
        (np.zeros((5, 8, 8, 3), np.float32), "an array 5 x 8 x 8 x 3 of float32 is no clip"),
        (np.zeros((5, 8, 8, 4), np.uint8), "is no clip"),
        (np.zeros((0, 8, 8, 3), np.uint8), "is no clip"),
        (torch.zeros(3, 5, 8, 8), "a tensor 3 x 5 x 8 x 8 of torch.float32 is no clip"),
        (torch.zeros(1, 3, 5, 8, 8, dtype=torch.int32), "is no clip"),
    ],
)
def test_what_is_no_clip_is_told_with_what_would_be_one(
    codec: Codec, x: np.ndarray | torch.Tensor, said: str
) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        codec.encode(x)
    assert "b 3 t h w in [-1, 1]" in str(caught.value)


def test_other_mistakes_are_told(codec: Codec, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="are no latents of this model, which are b 16 k h w"):
        codec.decode(torch.zeros(1, 4, 2, 2, 2))
    (tmp_path / "a.mp4").write_bytes(b"no film")
    with pytest.raises(VideoError, match=r"a\.mp4"):
        codec.encode(tmp_path / "a.mp4")
    with pytest.raises(ConfigError, match="are not of a file"):
        codec.write(codec.encode(frames_of(5, 16, 16, 3)), tmp_path / "b.mp4")
    assert not (tmp_path / "b.mp4").exists()


def test_a_model_that_cannot_stream_codes_clips_and_says_why_it_has_no_stream(tmp_path: Path) -> None:
    config = replace(PRESETS["osp-v1.1"], hidden_size=32, num_res_blocks=1)
    vae = build(config).eval()
    write_safetensors(tmp_path / "osp.safetensors", vae.state_dict(), metadata=own_entries(config))
    codec = causalvae.load(tmp_path / "osp.safetensors", device="cpu")
    clip = torch.rand(1, 3, 9, 16, 16) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(codec.encode(clip).mean, vae.encode(clip).mean, rtol=0, atol=1e-4)
    with pytest.raises(ConfigError, match=r"this model can't stream: .*GroupNorm"):
        codec.stream()


@pytest.mark.slow
def test_every_block_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CAUSALVAE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("CAUSALVAE_OFFLINE", "1")
    write_film(tmp_path / "film.mp4", frames=12)
    flags = "--video_path sample: --model tiny --max_steps 1 --video_num_frames 5 --resolution 32"
    flags += " --exp_name first --perceptual none --dataloader_num_workers 0 --device cpu"
    assert main("train", shlex.split(flags)) == 0
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/use.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 7
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "docs/use.md", "exec"), names)
    assert in_order(tmp_path / "again.mp4").shape == in_order(tmp_path / "film.mp4").shape
