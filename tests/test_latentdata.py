"""`causalvae.latents`: any latent in any process, in an order that is a function of its keys."""

import json
import pickle
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evalruns import moved_tiny
from latentsets import Job, by_standard_library, films, model
from torch.utils.data import DataLoader, Dataset

import causalvae
from causalvae.errors import ConfigError, RunError
from causalvae.latentdata import LatentStream


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    weights = moved_tiny(tmp_path_factory.mktemp("weights") / "tiny.safetensors")
    return Job(vae=model(weights), store="moments", per_shard=2)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return films(tmp_path_factory.mktemp("videos") / "films")


@pytest.fixture(scope="module")
def encoded(job: Job, videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sets") / "moments"
    job.encode(videos, out)
    return out


@pytest.fixture
def copied(encoded: Path, tmp_path: Path) -> Path:
    return shutil.copytree(encoded, tmp_path / "copy")


def keys(items: Iterator[dict[str, Any]]) -> list[str]:
    return [item["key"] for item in items]


@pytest.mark.parametrize("container", ["shards", "safetensors"])
def test_what_is_read_is_what_is_stored_normalised_by_the_statistics(
    container: str, job: Job, encoded: Path, videos: Path, tmp_path: Path
) -> None:
    stored = {key: t for tar in encoded.glob("*.tar") for key, _, t in by_standard_library(tar)}
    out = tmp_path / "set"
    replace(job, container=container).encode(videos, out)
    facts = json.loads((out / "stats.json").read_text())
    mean, deviation = (np.array(facts[name])[:, None, None, None] for name in ("mean", "deviation"))
    plain = causalvae.latents(out, normalise="none", sample=False)
    scaled = causalvae.latents(out, normalise="scale", sample=False)
    channel = causalvae.latents(out, sample=False)
    assert len(plain) == len(stored) == 7
    for number in range(7):
        item = plain[number]
        z = stored[item["key"]]["mean"].astype(np.float32).swapaxes(0, 1)
        assert item["latent"].shape == (16, 2, 4, 4)
        assert np.array_equal(item["latent"].numpy(), z)
        wanted = z * np.float32(facts["scaling_factor"])
        assert np.array_equal(scaled[number]["latent"].numpy(), wanted)
        found = channel[number]["latent"].numpy()
        np.testing.assert_allclose(found, (z - mean) / deviation, rtol=1e-5, atol=1e-5)


def test_normalised_latents_have_mean_0_and_deviation_1(encoded: Path) -> None:
    read = causalvae.latents(encoded, sample=True)
    numbers = torch.stack([item["latent"] for item in read.stream(shuffle=False)])
    assert numbers.mean(dim=(0, 2, 3, 4)).abs().max() < 0.2
    torch.testing.assert_close(numbers.double().square().mean(), torch.tensor(1.0).double(), atol=0.1, rtol=0)


def test_a_draw_is_a_function_of_seed_epoch_and_latent(encoded: Path) -> None:
    read = causalvae.latents(encoded, seed=1, epoch=2)
    mean = causalvae.latents(encoded, sample=False)
    again = causalvae.latents(encoded, seed=1).at(epoch=2)
    for number in (6, 0, 3):
        z = read[number]["latent"]
        assert torch.equal(z, again[number]["latent"])
        assert not torch.equal(z, mean[number]["latent"])
        for other in (read.at(epoch=3), causalvae.latents(encoded, seed=2, epoch=2)):
            assert not torch.equal(z, other[number]["latent"])


def test_every_epoch_has_each_latent_once_in_an_order_of_its_own(encoded: Path) -> None:
    read = causalvae.latents(encoded)
    in_order = keys(iter(read.stream(shuffle=False)))
    epochs = [keys(iter(read.at(epoch=epoch).stream())) for epoch in range(4)]
    assert all(sorted(each) == in_order for each in epochs)
    assert len({tuple(each) for each in epochs}) == 4
    assert keys(iter(read.at(epoch=2).stream())) == epochs[2]
    assert keys(read.at(epoch=2)[read.at(epoch=2).place(i)] for i in range(7)) == epochs[2]


def test_ranks_share_an_epoch_and_all_have_the_same_number(encoded: Path) -> None:
    read = causalvae.latents(encoded)
    whole = keys(iter(read.stream()))
    shares = [read.stream(rank=rank, world=3) for rank in range(3)]
    assert [len(share) for share in shares] == [2, 2, 2]
    assert [keys(iter(share)) for share in shares] == [whole[rank:6:3] for rank in range(3)]
    with pytest.raises(ConfigError, match="rank 3 of 3"):
        read.stream(rank=3, world=3)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_batches_are_the_same_for_any_number_of_workers(method: str, encoded: Path) -> None:
    read = causalvae.latents(encoded)
    read[0]  # files that are open here are not those of a worker

    def batches(workers: int, source: Dataset[Any]) -> list[dict[str, Any]]:
        context = method if workers else None
        return list(DataLoader(source, batch_size=2, num_workers=workers, multiprocessing_context=context))

    for source in (read, read.stream(batch_size=2)):
        none, some = batches(0, source), batches(2 if method == "fork" else 1, source)
        assert [each["key"] for each in some] == [each["key"] for each in none]
        assert all(torch.equal(a["latent"], b["latent"]) for a, b in zip(none, some, strict=True))


def test_a_copy_by_pickle_reads_by_itself(encoded: Path) -> None:
    read = causalvae.latents(encoded)
    first = read[0]["latent"]
    copy = pickle.loads(pickle.dumps(read))
    stream: LatentStream = pickle.loads(pickle.dumps(read.stream(shuffle=False)))
    del read
    assert torch.equal(copy[0]["latent"], first)
    assert torch.equal(next(iter(stream))["latent"], first)


def test_a_set_that_is_not_whole_says_what_to_do(job: Job, copied: Path) -> None:
    (copied / "index.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"not whole: give the encode command again"):
        causalvae.latents(copied)
    with pytest.raises(ConfigError, match=r"no latents of `causalvae encode`"):
        causalvae.latents(copied / "parts")


def test_a_damaged_index_is_told_and_made_anew(job: Job, videos: Path, encoded: Path, copied: Path) -> None:
    index = copied / "index.jsonl"
    whole = index.read_bytes()
    first, second, *rest = whole.splitlines(keepends=True)
    cut = [b"".join([first, second]), whole[:-1], whole + b"{}"]
    for data in cut:
        index.write_bytes(data)
        with pytest.raises(ConfigError, match="the set has 7 latents; give the encode command again"):
            causalvae.latents(copied)
    for line in (b"?" + second[1:], b"3\n"):
        index.write_bytes(b"".join([first, line, *rest]))
        with pytest.raises(RunError, match="line 2: damaged"):
            causalvae.latents(copied)[1]
    moved = first.replace(b'"offset": 512', b'"offset": 520')
    strange = [moved, first.replace(b'"F16"', b'"F77"'), first.replace(b'"bytes"', b'"bites"')]
    for line in strange:
        index.write_bytes(b"".join([line, second, *rest]))
        with pytest.raises(RunError, match="the index is not that of the files"):
            causalvae.latents(copied)[0]
    job.encode(videos, copied)
    assert index.read_bytes() == whole


def test_a_file_that_is_cut_or_gone_is_told_and_made_anew(
    job: Job, videos: Path, encoded: Path, copied: Path
) -> None:
    tar = copied / "latents-000001.tar"
    whole = tar.read_bytes()
    tar.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RunError, match=r"latents-000001\.tar: cut: it ends before byte"):
        causalvae.latents(copied)[6]
    job.encode(videos, copied)
    assert tar.read_bytes() == whole
    tar.unlink()
    with pytest.raises(RunError, match=r"latents-000001\.tar: can't be read"):
        causalvae.latents(copied)[6]
    job.encode(videos, copied)
    assert tar.read_bytes() == whole


def test_a_channel_that_is_the_same_everywhere_is_told(copied: Path) -> None:
    stats = json.loads((copied / "stats.json").read_text())
    stats["deviation"][3] = 0.0
    (copied / "stats.json").write_text(json.dumps(stats))
    with pytest.raises(ConfigError, match="channel 3 has the same number everywhere"):
        causalvae.latents(copied)
    assert len(causalvae.latents(copied, normalise="none")) == 7
