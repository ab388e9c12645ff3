"""The command `decode`: what comes back is what the model makes of the latents that are stored."""

import json
import shutil
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from evalruns import moved_tiny
from foreign import moved
from latentsets import encode, lines, model
from media import in_order, write_film
from safetensors.torch import load_file

from causalvae.cli import main
from causalvae.data.encode import write_png
from causalvae.data.films import open_film
from causalvae.models.build import build
from causalvae.models.presets import WFVAEConfig
from causalvae.video import crop_size, to_uint8
from causalvae.weights.diffusers_folder import save_folder
from causalvae.weights.load import load_model
from causalvae.weights.read import own_entries
from causalvae.weights.tensorfiles import read_safetensors_header, write_safetensors

RATE = Fraction(24000, 1001)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return moved_tiny(tmp_path_factory.mktemp("weights") / "tiny.safetensors")


@pytest.fixture(scope="module")
def encoded(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A film of odd size and rate, and a picture of the same size, as whole videos."""
    folder = tmp_path_factory.mktemp("films")
    write_film(
        folder / "a.mkv", codec="ffv1", pixels="bgr0", frames=22, size=(30, 35), rate=Fraction(24000, 1001)
    )
    write_png(folder / "b.png", in_order(folder / "a.mkv")[7])
    out = tmp_path_factory.mktemp("sets") / "set"
    assert encode(folder, weights, out, "--dtype", "fp32", "--store", "moments") == 0
    return out


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def decode(latents: Path, weights: Path, out: Path, *words: object) -> int:
    flags = ["--checkpoint", str(weights), "--out", str(out), "--device", "cpu", "--memory", "1GiB"]
    return main("decode", [str(latents), *flags, *map(str, words)])


def test_decoded_latents_are_the_reconstruction_of_the_model(
    weights: Path, encoded: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert decode(encoded, weights, out, "--codec", "ffv1") == 0
    film = open_film(out / "00000000.mkv")
    assert (film.frames, film.height, film.width, film.fps) == (22, 30, 35, RATE)
    vae = model(weights)
    found = {each["video"]: out / each["file"] for each in lines(out / "decoded.jsonl")}
    assert set(found) == {"a.mkv", "b.png"}
    assert found["b.png"].suffix == ".png"
    for record in lines(encoded / "index.jsonl"):
        tar = (encoded / record["file"]).read_bytes()
        single = tmp_path / "single.safetensors"
        single.write_bytes(tar[record["offset"] : record["offset"] + record["bytes"]])
        z = load_file(single)["mean"].transpose(0, 1)[None]
        wanted = to_uint8(crop_size(vae.decode(z), 30, 35))[0].permute(1, 2, 3, 0)
        read = in_order(found[record["video"]])
        difference = (read.int() - wanted[: len(read)].int()).abs()
        assert difference.max() <= 1, "chunks and the full pass round differently where a value is a half"
        assert (difference > 0).float().mean() < 1e-3


def test_a_single_file_of_a_set_is_enough(weights: Path, encoded: Path, tmp_path: Path) -> None:
    whole, part, one = (tmp_path / name for name in ("whole", "part", "one"))
    assert decode(encoded, weights, whole, "--codec", "ffv1") == 0
    alone = Path(shutil.copy(encoded / "latents-000000.tar", tmp_path / "some.tar"))
    assert decode(alone, weights, part, "--codec", "ffv1") == 0
    record = lines(encoded / "index.jsonl")[0]
    data = alone.read_bytes()[record["offset"] : record["offset"] + record["bytes"]]
    (tmp_path / "x.safetensors").write_bytes(data)
    assert decode(tmp_path / "x.safetensors", weights, one, "--codec", "ffv1") == 0
    film = in_order(whole / "00000000.mkv")
    assert torch.equal(in_order(part / "00000000.mkv"), film)
    assert torch.equal(in_order(one / "x.mkv"), film)
    assert (part / "00000001.png").read_bytes() == (whole / "00000001.png").read_bytes()


def test_what_is_there_is_kept_and_other_wishes_are_refused(
    weights: Path, encoded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert decode(encoded, weights, out) == 0
    (out / "00000001.png").unlink()
    assert decode(encoded, weights, out) == 0
    assert "1 decoded, 1 were there already" in capsys.readouterr().out
    assert decode(encoded, weights, out, "--codec", "ffv1") == 2
    assert "another model, precision or codec" in capsys.readouterr().err
    assert decode(encoded, weights, out, "--codec", "ffv1", "--overwrite") == 0
    assert (out / "00000000.mkv").exists()


def test_latents_of_other_weights_are_refused_unless_asked_for(
    weights: Path, encoded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main("init", ["--random", "--model", "tiny", "--out", str(tmp_path / "b.safetensors")]) == 0
    other = tmp_path / "b.safetensors"
    assert decode(encoded, other, tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert "made by weights with SHA-256" in said
    assert "--any_model True" in said
    assert decode(encoded, other, tmp_path / "out", "--any_model", "--overwrite") == 0
    wfvae = WFVAEConfig(
        base_channels=8, encoder_energy=4, decoder_energy=4, encoder_res_blocks=1, decoder_res_blocks=1
    )
    vae = build(wfvae)
    write_safetensors(tmp_path / "c.safetensors", vae.state_dict(), metadata=own_entries(vae.config))
    assert decode(encoded, tmp_path / "c.safetensors", tmp_path / "c", "--any_model") == 2
    assert f"no latents of {vae.geometry.channels} channels" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["nothing", "text", "tensors", "name", "huge header"])
def test_what_is_no_latent_is_one_line(
    kind: str, weights: Path, encoded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.safetensors"
    if kind == "text":
        path.write_text("this is no latent\n" * 20)
    elif kind == "tensors":
        write_safetensors(path, {"mean": torch.zeros(3)}, metadata={"video": '"a"'})
    elif kind == "huge header":
        path.write_bytes((1 << 40).to_bytes(8, "little") + bytes(100))
    elif kind == "name":
        record = lines(encoded / "index.jsonl")[1]
        tar = (encoded / "latents-000000.tar").read_bytes()
        path = tmp_path / "a b\n.safetensors"
        path.write_bytes(tar[record["offset"] : record["offset"] + record["bytes"]])
    assert decode(path, weights, tmp_path / "out") in (1, 2)
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert "unexpected" not in said


def statistics_of(encoded: Path, weights_sha256: str, channels: int, tmp_path: Path) -> Path:
    """A stats.json of as many channels, of weights with this checksum."""
    stats = json.loads((encoded / "stats.json").read_text())
    stats["model"]["sha256"] = weights_sha256
    for name in ("mean", "deviation"):
        stats[name] = stats[name][:channels]
    path = tmp_path / "stats.json"
    path.write_text(json.dumps(stats))
    return path


@pytest.mark.parametrize("name", ["wan-2.1", "cogvideox", "ltx-0.9.0", "hunyuan", "mochi", "cosmos"])
def test_statistics_go_where_diffusers_looks_for_them(name: str, encoded: Path, tmp_path: Path) -> None:
    vae = moved(name)
    save_folder(vae, tmp_path / "before")
    digest = sha256_of(tmp_path / "before")
    path = statistics_of(encoded, digest, vae.geometry.channels, tmp_path)
    stats = json.loads(path.read_text())
    assert main("convert", [str(tmp_path / "before"), str(tmp_path / "after"), "--stats", str(path)]) == 0
    theirs = type(vae.net).from_pretrained(tmp_path / "after")
    config = theirs.config
    if name.startswith("ltx"):
        torch.testing.assert_close(theirs.latents_mean, torch.tensor(stats["mean"]))
        torch.testing.assert_close(theirs.latents_std, torch.tensor(stats["deviation"]))
        assert config.scaling_factor == 1.0
    elif name in ("cogvideox", "hunyuan"):
        assert config.scaling_factor == stats["scaling_factor"]
    else:
        assert list(config.latents_mean) == stats["mean"]
        assert list(config.latents_std) == stats["deviation"]
        assert config.get("scaling_factor", 1.0) == 1.0
    for key, tensor in vae.net.named_parameters():
        assert torch.equal(theirs.get_parameter(key), tensor)


def sha256_of(path: Path) -> str:
    return str(load_model(path).facts()["sha256"])


def test_statistics_go_into_our_files_and_the_published_config(
    weights: Path, encoded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stats = json.loads((encoded / "stats.json").read_text())
    given = ["--stats", str(encoded / "stats.json")]
    assert main("convert", [str(weights), str(tmp_path / "b.safetensors"), *given]) == 0
    text = read_safetensors_header(tmp_path / "b.safetensors").metadata["causalvae.latents"]
    assert json.loads(text) == {name: stats[name] for name in ("mean", "deviation", "scaling_factor")}
    assert main("convert", [str(weights), str(tmp_path / "b.pt"), *given]) == 2
    assert "torch has no place for it" in capsys.readouterr().err
    assert main("convert", [str(tmp_path / "b.safetensors"), str(tmp_path / "c.safetensors"), *given]) == 2
    assert "encode with these weights" in capsys.readouterr().err
    wfvae = WFVAEConfig(
        base_channels=8, encoder_energy=4, decoder_energy=4, encoder_res_blocks=1, decoder_res_blocks=1
    )
    vae = build(wfvae)
    write_safetensors(tmp_path / "w.safetensors", vae.state_dict(), metadata=own_entries(vae.config))
    digest = sha256_of(tmp_path / "w.safetensors")
    path = statistics_of(encoded, digest, vae.geometry.channels, tmp_path)
    assert (
        main("convert", [str(tmp_path / "w.safetensors"), str(tmp_path / "vae"), "--stats", str(path)]) == 0
    )
    config = json.loads((tmp_path / "vae" / "config.json").read_text())
    channels = vae.geometry.channels
    assert config["shift"] == stats["mean"][:channels]
    assert config["scale"] == [1 / each for each in stats["deviation"][:channels]]
