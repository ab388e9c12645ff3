"""Writers of weights: what they write comes back bit for bit, and appears whole or not at all."""

import json
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from faults import at_event, fail_io
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor
from weight_tables import FEW, WEIGHTS, equal

from causalvae.errors import RunError, WeightsError
from causalvae.weights.diffusers import write_diffusers
from causalvae.weights.mindspore import write_mindspore
from causalvae.weights.pytorch import write_torch
from causalvae.weights.read import read_tensors
from causalvae.weights.tensorfiles import write_safetensors
from causalvae.weights.writing import all_finite, to_dtype

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool]
DTYPES_BY_WORD: dict[Literal["fp32", "fp16", "bf16"], torch.dtype] = {
    "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16,
}  # fmt: skip


SHAPES = st.lists(st.integers(0, 4), max_size=4)
NAMES = st.lists(st.text("abcxyz01", min_size=1, max_size=5), min_size=1, max_size=4).map(".".join)


@st.composite
def tables(draw: st.DrawFn) -> dict[str, Tensor]:
    """Weights under names of an autoencoder, of any type and shape."""
    table: dict[str, Tensor] = {}
    for name in draw(st.sets(NAMES, min_size=1, max_size=6)):
        shape, dtype = draw(SHAPES), draw(st.sampled_from(DTYPES))
        count = int(np.prod(shape))
        values = torch.tensor(draw(st.lists(st.integers(0, 100), min_size=count, max_size=count)))
        first = draw(st.sampled_from(["encoder.", "decoder."]))
        last = draw(st.sampled_from(["", ".weight", ".bias", ".running_mean"]))
        table[first + name + last] = values.to(dtype).reshape(shape)
    return table


@FEW
@given(table=tables(), shard_size=st.sampled_from([None, 1, 100]))
def test_what_any_writer_writes_comes_back(
    table: dict[str, Tensor], shard_size: int | None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    place = tmp_path_factory.mktemp("out")
    for layout in ("plain", "state_dict", "open-sora-plan"):
        write_torch(place / layout, table, layout=layout)
        assert equal(read_tensors(place / layout).tensors, table)
    named = write_safetensors(place / "w.safetensors", table, metadata={}, shard_size=shard_size)
    assert equal(read_tensors(named).tensors, table)
    for crc in (False, True):
        write_mindspore(place / "m.ckpt", table, crc=crc)
        back = read_tensors(place / "m.ckpt").tensors
        assert equal(back, table)
    write_diffusers(place / "folder", {"_class_name": "X"}, table, metadata={}, shard_size=shard_size)
    found = read_tensors(place / "folder")
    assert equal(found.tensors, table)
    assert found.config == {"_class_name": "X"}
    assert not list(place.rglob(".*"))


def test_shards_are_named_as_the_hub_does_and_lie_beside_their_index(tmp_path: Path) -> None:
    table = {f"encoder.{number}": torch.full((100,), float(number)) for number in range(5)}
    named = write_safetensors(tmp_path / "d.safetensors", table, metadata={"a": "b"}, shard_size=900)
    assert named.name == "d.safetensors.index.json"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "d-00001-of-00003.safetensors", "d-00002-of-00003.safetensors", "d-00003-of-00003.safetensors",
        "d.safetensors.index.json",
    ]  # fmt: skip
    index = json.loads(named.read_text())
    assert index["metadata"]["total_size"] == 2000
    found = read_tensors(named)
    assert (found.format, equal(found.tensors, table)) == ("safetensors-sharded", True)
    assert equal(
        read_tensors(tmp_path / "d-00001-of-00003.safetensors").tensors,
        {n: table[n] for n in list(table)[:2]},
    )
    (tmp_path / "d-00002-of-00003.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"d-00002-of-00003\.safetensors: this shard of .* is missing"):
        read_tensors(named)


@pytest.mark.parametrize("shard", ["../up.safetensors", "/etc/passwd", "a/b", "..", "", "a\\b", 3])
def test_shards_elsewhere_are_refused(shard: object, tmp_path: Path) -> None:
    save_file({"w": torch.ones(1)}, tmp_path / "up.safetensors")
    (tmp_path / "in").mkdir()
    (tmp_path / "in/x.json").write_text(json.dumps({"weight_map": {"w": shard}}))
    with pytest.raises(WeightsError, match="shards must lie beside it"):
        read_tensors(tmp_path / "in/x.json")


def test_casting_leaves_integers_and_statistics_as_they_are() -> None:
    table = {"a": torch.ones(2), "n.running_var": torch.ones(2), "n.num_batches_tracked": torch.tensor(3)}
    for word, dtype in DTYPES_BY_WORD.items():
        cast = to_dtype(table, word)
        assert [tensor.dtype for tensor in cast.values()] == [dtype, torch.float32, torch.int64]
    with pytest.raises(WeightsError, match="a: has values beyond 65504"):
        to_dtype({"a": torch.tensor([1e6])}, "fp16")


WRITERS = {
    "torch": lambda place: write_torch(place / "out", WEIGHTS, layout="plain"),
    "safetensors": lambda place: write_safetensors(place / "out", WEIGHTS, metadata={}),
    "shards": lambda place: write_safetensors(place / "out", WEIGHTS, metadata={}, shard_size=1),
    "mindspore": lambda place: write_mindspore(place / "out", WEIGHTS, crc=True),
    "diffusers": lambda place: write_diffusers(place / "out", {}, WEIGHTS, metadata={}),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_write_that_fails_anywhere_leaves_nothing_half_done(kind: str, tmp_path: Path) -> None:
    number = 0
    while True:
        number += 1
        place = tmp_path / str(number)
        place.mkdir()
        at_event(number, fail_io, lambda place=place: WRITERS[kind](place))
        left = sorted(path.name for path in place.iterdir() if not path.name.startswith("out-"))
        if not left:
            continue
        assert left in (["out"], ["out.index.json"])
        assert equal(read_tensors(place / left[0]).tensors, WEIGHTS)
        if number > 40:
            break


def told_where_files_end_early(write: Callable[[Path], object], place: Path) -> str:
    """What a writer says in a child whose files can have no more than ten bytes."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))
        try:
            write(place)
        except RunError as error:
            os.write(writer, str(error).encode())
        finally:
            os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with os.fdopen(reader) as said:
        return said.read()


@pytest.mark.parametrize("kind", WRITERS)
def test_a_disk_that_refuses_is_one_line_and_leaves_nothing(kind: str, tmp_path: Path) -> None:
    said = told_where_files_end_early(WRITERS[kind], tmp_path)
    assert said.startswith(f"{tmp_path}/out")
    assert "can't be written: " in said
    assert "\n" not in said
    assert list(tmp_path.iterdir()) == []


def test_files_can_be_read_by_whom_the_umask_lets(tmp_path: Path) -> None:
    (tmp_path / "new").touch()
    write_safetensors(tmp_path / "x", WEIGHTS, metadata={})
    assert (tmp_path / "x").stat().st_mode == (tmp_path / "new").stat().st_mode


def test_a_torch_file_has_the_same_bytes_under_any_name(tmp_path: Path) -> None:
    for name in ("a.ckpt", "b.pt"):
        write_torch(tmp_path / name, WEIGHTS, layout="state_dict")
    assert (tmp_path / "a.ckpt").read_bytes() == (tmp_path / "b.pt").read_bytes()


def test_a_folder_that_is_not_empty_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(WeightsError, match="is there already"):
        write_diffusers(tmp_path, {}, WEIGHTS, metadata={})
    assert (tmp_path / "mine").read_text() == "mine"


@pytest.mark.parametrize("dtype", [*DTYPES[:4], torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_is_seen_wherever_it_is(value: float, dtype: torch.dtype) -> None:
    tensor = torch.linspace(-2, 2, 41).to(dtype)
    assert all_finite(tensor)
    assert all_finite(tensor[:0])
    for place in (0, 17, 40):
        broken = tensor.clone()
        broken[place] = value
        assert not all_finite(broken)
