"""The command `encode`: what is written is a function of videos, weights and flags, however it was made."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evalruns import moved_tiny
from faults import at_event, kill_self
from latentsets import CLIPS, Job, by_standard_library, clip_input, digests, encode, films, lines, model
from media import damaged, write_film
from safetensors.torch import load_file

from causalvae import rng
from causalvae.cli import main
from causalvae.encoding import Share
from causalvae.errors import RunError
from causalvae.footage import Cut
from causalvae.locks import Lock
from causalvae.models.build import Model, build
from causalvae.models.presets import CausalVAEConfig
from causalvae.moments import ChannelMoments


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return moved_tiny(tmp_path_factory.mktemp("weights") / "tiny.safetensors")


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return films(tmp_path_factory.mktemp("videos") / "films")


@pytest.fixture(scope="module")
def vae(weights: Path) -> Model:
    return model(weights)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """A forked child can't use threads that its parent started; and their number is part of the bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_latents_of_clips_are_those_of_the_model(weights: Path, videos: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    assert encode(videos, weights, out, "--num_frames", 5, "--clips_per_video", 3, "--dtype", "fp32") == 0
    vae = model(weights)
    read = list(by_standard_library(out / "latents-000000.tar"))
    assert [key for key, _, _ in read] == [each["key"] for each in lines(out / "index.jsonl")]
    for _, record, tensors in read:
        frames = range(record["start"], record["start"] + 5)
        posterior = vae.encode(clip_input(videos / record["video"], frames, vae))
        assert np.array_equal(tensors["mean"], posterior.mean[0].transpose(0, 1).numpy())
        assert (record["frames"], record["fps"]) == (5, [25, 1])
    assert len(read) == 1 + 2 + 3 + 3, "as many as fit in 8, 13, 18 and 23 frames"


def test_latents_of_whole_videos_are_those_of_the_full_pass(weights: Path, tmp_path: Path) -> None:
    film = write_film(tmp_path / "a.mp4", frames=43, size=(30, 34))
    out = tmp_path / "set"
    words = ("--store", "moments", "--dtype", "fp32", "--format", "safetensors", "--sample_rate", 2)
    assert encode(film, weights, out, *words) == 0
    vae = model(weights)
    wanted = vae.encode(clip_input(film, range(0, 43, 2), vae))
    found = load_file(out / "latents-000000" / "00000000.safetensors")
    for name, tensor in (("mean", wanted.mean), ("logvar", wanted.logvar)):
        torch.testing.assert_close(found[name].transpose(0, 1)[None], tensor, atol=1e-5, rtol=1e-5)
    (record,) = lines(out / "index.jsonl")
    assert (record["frames"], record["height"], record["width"], record["fps"]) == (22, 30, 34, [25, 2])


def test_a_model_that_cannot_stream_takes_clips_whole_and_says_where_it_blends(
    videos: Path, tmp_path: Path
) -> None:
    vae = build(CausalVAEConfig(norm="clip", hidden_size=32, hidden_size_mult=(1, 1), num_res_blocks=1,
        flat_levels=1, spatial_levels=(0,), temporal_levels=(0,)))  # fmt: skip
    cut = Cut(frames=18, per_video=2)
    clips = Job(vae=vae.eval().requires_grad_(False), dtype="fp32", container="safetensors", cut=cut)
    done = clips.encode(videos, tmp_path / "clips")
    assert (len(done.broken), done.notes) == (2, ())
    for record in lines(tmp_path / "clips" / "index.jsonl"):
        wanted = vae.encode(clip_input(videos / record["video"], range(18), vae)).mean[0].transpose(0, 1)
        found = load_file(tmp_path / "clips" / record["file"])["mean"]
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
        assert "seams" not in record
    long = write_film(tmp_path / "long.mp4", frames=60, size=(32, 32))
    done = replace(clips, cut=Cut()).encode(long, tmp_path / "whole")
    (record,) = lines(tmp_path / "whole" / "index.jsonl")
    assert record["tensors"]["mean"]["shape"][0] == vae.geometry.latent_frames(60)
    assert record["coding"]["exact"] is False
    assert record["seams"]["time"]["mean"] > 0
    assert "can't stream" in done.notes[0]


def test_the_statistics_are_those_of_the_numbers_that_are_stored(
    weights: Path, videos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "set"
    assert encode(videos, weights, out, "--store", "moments", "--videos_per_shard", 3) == 0
    read = [t for tar in sorted(out.glob("*.tar")) for _, _, t in by_standard_library(tar)]
    mean, logvar = (
        np.concatenate(
            [each[name].astype(np.float64).swapaxes(0, 1).reshape(16, -1) for each in read], axis=1
        )
        for name in ("mean", "logvar")
    )
    variance = mean.var(axis=1) + np.exp(logvar).mean(axis=1)
    found = json.loads((out / "stats.json").read_text())
    assert found["of"] == "samples"
    np.testing.assert_allclose(found["mean"], mean.mean(axis=1), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(found["deviation"], np.sqrt(variance), rtol=1e-12)
    overall = np.sqrt(mean.var() + np.exp(logvar).mean())
    assert found["scaling_factor"] == pytest.approx(1 / overall, rel=1e-12)
    assert (found["samples"], found["numbers_per_channel"]) == (4, mean.shape[1])


def test_moments_of_parts_in_any_order_are_those_of_the_whole() -> None:
    values = 3.0 + rng.normal((5, 4000), rng.key("values")).double()
    whole = ChannelMoments.of(values)
    for turn in range(3):
        ends = sorted({0, 4000, *rng.integers((9,), n=4000, base=rng.key("cut", turn)).tolist()})
        parts = [ChannelMoments.of(values[:, a:b]) for a, b in pairwise(ends)]
        merged = ChannelMoments.none(5)
        for i in rng.normal((len(parts),), rng.key("order", turn)).argsort().tolist():
            merged = merged.merged(parts[i])
        torch.testing.assert_close(merged.mean, values.mean(dim=1), rtol=1e-12, atol=0)
        torch.testing.assert_close(merged.deviation(), values.std(dim=1, correction=0), rtol=1e-12, atol=0)
        torch.testing.assert_close(merged.squares, whole.squares, rtol=1e-12, atol=0)
    pooled = whole.pooled()
    assert pooled.deviation().item() == pytest.approx(values.std(correction=0).item(), rel=1e-12)


def test_a_sample_is_a_function_of_seed_video_and_latent_frame(
    vae: Model, videos: Path, tmp_path: Path
) -> None:
    job = Job(vae=vae, cut=Cut(), container="safetensors", store="sample", dtype="fp32", seed=3)
    job.encode(videos, tmp_path / "all")
    shutil.copytree(videos, tmp_path / "films")
    for name in ("0.mp4", "1.mp4"):
        (tmp_path / "films" / name).unlink()
    job.encode(tmp_path / "films", tmp_path / "few", workers=2)
    replace(job, seed=4).encode(tmp_path / "films", tmp_path / "other")

    def sample(out: str, number: int) -> torch.Tensor:
        return load_file(tmp_path / out / "latents-000000" / f"{number:08d}.safetensors")["sample"]

    assert torch.equal(sample("all", 3), sample("few", 1))
    posterior = vae.encode(clip_input(videos / "3.mp4", range(23), vae))
    noise = (sample("few", 1).transpose(0, 1)[None] - posterior.mean) / (0.5 * posterior.logvar).exp()
    other = (sample("other", 1).transpose(0, 1)[None] - posterior.mean) / (0.5 * posterior.logvar).exp()
    for each in (noise, other):
        assert abs(each.mean()) < 0.1
        assert abs(each.std() - 1) < 0.1
    assert abs((noise * other).mean()) < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("form", ["shards", "safetensors"])
def test_killed_anywhere_and_given_again_it_writes_the_same_bytes(
    form: str, vae: Model, videos: Path, tmp_path: Path
) -> None:
    job = Job(vae=vae, container=form, per_shard=3)
    whole, out = tmp_path / "whole", tmp_path / "set"
    job.encode(videos, whole)

    def work() -> None:
        job.encode(videos, out)

    number, killed = 1, 0
    while os.WIFSIGNALED(at_event(number, kill_self, work)):
        killed += 1
        at_event(number // 2 + 1, kill_self, work)  # and again, where that is before its end
        work()
        assert digests(out) == digests(whole)
        assert not list(out.rglob(".*"))
        shutil.rmtree(out)
        number += 7
    assert killed > 6


def test_three_processes_write_what_one_writes(vae: Model, videos: Path, tmp_path: Path) -> None:
    job = Job(vae=vae, per_shard=1)
    one, three = tmp_path / "one", tmp_path / "three"
    job.encode(videos, one, workers=3)
    for number in (2, 0):
        done = job.encode(videos, three, share=Share(number=number, of=3))
        assert done.merged is None
        assert not (three / "index.jsonl").exists()
    assert job.encode(videos, three, share=Share(number=1, of=3)).merged is not None
    assert digests(three) == digests(one)


def test_processes_of_torchrun_share_the_share(
    weights: Path, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (*CLIPS, "--videos_per_shard", 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, share, made in (
        (1, "1/2", [3]),
        (0, "0/2", [0, 3]),
        (0, "1/2", [0, 2, 3]),
        (1, "0/2", [0, 1, 2, 3]),
    ):
        monkeypatch.setenv("RANK", str(rank))
        assert encode(videos, weights, tmp_path / "set", *words, "--shard", share) == 0
        assert sorted(int(path.stem[-6:]) for path in (tmp_path / "set").glob("*.tar")) == made
    assert len(lines(tmp_path / "set" / "index.jsonl")) == 7


def test_a_part_that_another_process_makes_is_left_to_it(vae: Model, videos: Path, tmp_path: Path) -> None:
    out, job = tmp_path / "set", Job(vae=vae)
    (out / "parts").mkdir(parents=True)
    ready, done = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        with Lock(out / "parts", name=".000000.lock", instead="wait"):
            os.write(ready[1], b"x")
            os.read(done[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    with pytest.raises(RunError, match=f"in use by process {child}"):
        job.encode(videos, out)
    os.write(done[1], b"x")
    os.waitpid(child, 0)
    assert job.encode(videos, out).merged is not None


def test_broken_videos_are_set_aside_and_the_rest_goes_on(
    weights: Path, videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(videos, tmp_path / "films")
    (folder / "00.mp4").write_text("this is no film\n" * 50)
    out = tmp_path / "set"
    assert encode(folder, weights, out, "--num_frames", 13, "--resolution", 32) == 0
    said = capsys.readouterr().out
    broken = {each["video"]: each["reason"] for each in lines(out / "quarantine.jsonl")}
    assert set(broken) == {"00.mp4", "0.mp4"}
    assert "has 8 frames, and a clip reaches over 13" in broken["0.mp4"]
    assert all(reason in said for reason in broken.values())
    assert [each["video"] for each in lines(out / "index.jsonl")] == ["1.mp4", "2.mp4", "3.mp4"]
    assert encode(videos, weights, tmp_path / "none", "--num_frames", 99) == 2
    assert "no video of 4 can be encoded: 0.mp4: has 8 frames" in capsys.readouterr().err
    assert len(lines(tmp_path / "none" / "quarantine.jsonl")) == 4


def test_a_video_that_breaks_in_its_middle_leaves_no_bytes(vae: Model, tmp_path: Path) -> None:
    """Its latents are written while it is decoded; what was written is taken back."""
    folder = tmp_path / "films"
    folder.mkdir()
    damaged(write_film(tmp_path / "a.mp4", frames=60, size=(32, 32)), folder / "a.mp4", first=0.6)
    write_film(folder / "b.mp4", frames=9, size=(32, 32))
    for form, first in (("shards", "latents-000000.tar"), ("safetensors", "latents-000000")):
        out = tmp_path / form
        Job(vae=vae, cut=Cut(), container=form).encode(folder, out)
        (record,) = lines(out / "quarantine.jsonl")
        assert record["video"] == "a.mp4"
        (kept,) = lines(out / "index.jsonl")
        assert (kept["video"], kept["offset"]) == ("b.mp4", 512 if form == "shards" else 0)
        names = [path.name for path in (out / first).iterdir()] if form == "safetensors" else []
        assert names in ([], ["00000001.safetensors"])


@pytest.mark.parametrize("form", ["list.csv", "list.jsonl"])
def test_captions_of_a_list_go_with_the_latents(
    form: str, weights: Path, videos: Path, tmp_path: Path
) -> None:
    listed, out = tmp_path / form, tmp_path / "set"
    rows = [(str(videos / "1.mp4"), "a bar, \u00fcber alles"), (str(videos / "0.mp4"), "two\nlines")]
    if form == "list.csv":
        listed.write_text("video,text\n" + "".join(f'{video},"{text}"\n' for video, text in rows))
    else:
        listed.write_text("".join(json.dumps({"video": v, "text": t}) + "\n" for v, t in rows))
    assert encode(listed, weights, out, *CLIPS, "--caption_column", "text") == 0
    found = [(each["video"], each["caption"]) for each in lines(out / "index.jsonl")]
    assert found == [rows[0], rows[0], rows[1]]
    assert [r["caption"] for _, r, _ in by_standard_library(out / "latents-000000.tar")] == [
        t for _, t in found
    ]


def test_other_flags_weights_or_videos_are_refused_with_what_differs(
    weights: Path, videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "set"
    assert encode(videos, weights, out, *CLIPS) == 0
    before = digests(out)
    more = shutil.copytree(videos, tmp_path / "films")
    write_film(more / "4.mp4", frames=9)
    trials = [
        (videos, (*CLIPS, "--store", "sample"), "store is mean, not sample"),
        (videos, (*CLIPS[:1], "9", *CLIPS[2:]), "num_frames is 5, not 9"),
        (more, CLIPS, "videos is 4, not 5"),
        (videos, (*CLIPS, "--memory", "2GiB"), "memory is 1GiB, not 2GiB"),
    ]
    for place, words, said in trials:
        assert encode(place, weights, out, *words) == 2
        assert said in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    assert encode(videos, weights, tmp_path / "mine", *CLIPS) == 2
    assert "holds thesis.tex" in capsys.readouterr().err
    assert encode(videos, weights, out, *CLIPS) == 0
    assert digests(out) == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--clips_per_video", "2"], "has no effect on whole videos"),
        (["--seed", "1"], "has no effect without --store sample"),
        (["--shard", "3/3"], "must be i/n with i from 0 to n - 1"),
        (["--tile", "huge"], "must be auto, off, or height x width"),
        (["--caption_column", "text"], "no heading"),
        (["--checkpoint", "nowhere.ckpt"], "nowhere.ckpt: there is no such file"),
        (["--out", __file__], "is no folder; choose another place"),
        (["second.mp4"], "this is a second"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(
    words: list[str], said: str, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    listed = tmp_path / "list.csv"
    listed.write_text("a.mp4\n")
    where = words if words[0] == "second.mp4" else []
    flags = [] if where else words
    given = main(
        "encode", [str(listed), *where, "--checkpoint", str(weights), "--out", str(tmp_path / "o"), *flags]
    )
    assert given == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "o").exists()


def test_the_reading_example_of_the_docs_reads_what_was_written(
    weights: Path, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parents[1] / "docs" / "latents.md").read_text()
    (example,) = re.findall(r"```python\n(import json, tarfile\n.*?)```", page, re.DOTALL)
    assert encode(videos, weights, tmp_path / "latents" / "clips", *CLIPS) == 0
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(example, found)
    *_, (_, record, tensors) = by_standard_library(tmp_path / "latents" / "clips" / "latents-000000.tar")
    assert found["video"] == record["video"]
    assert np.array_equal(found["mean"], tensors["mean"])
