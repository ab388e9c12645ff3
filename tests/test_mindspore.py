"""MindSpore's checkpoints: what MindSpore wrote is read bit for bit, and written again byte for byte."""

import zlib
from pathlib import Path

import pytest
import torch
from fixtures import FIXTURES, fixture_tensors
from torch import Tensor

from causalvae.errors import WeightsError
from causalvae.weights.mindspore import (
    TYPES,
    read_mindspore,
    to_mindspore_names,
    to_torch_names,
    write_mindspore,
    write_records,
)
from causalvae.weights.read import read_tensors

FILES = ("converted", "trained_amp_crc", "bf16")


def varint(number: int) -> bytes:
    parts = []
    while number > 127:
        parts.append(number % 128 + 128)
        number //= 128
    return bytes([*parts, number])


def field(number: int, content: bytes) -> bytes:
    return varint(8 * number + 2) + varint(len(content)) + content


def record(tag: str, content: bytes, *, dims: tuple[int, ...], kind: str = "Float32") -> bytes:
    """One record, as the published layout has it, written here by its description."""
    shape = b"".join(b"\x08" + varint(size) for size in dims)
    tensor = shape + field(2, kind.encode()) + field(3, content)
    return field(1, field(1, tag.encode()) + field(2, tensor))


def floats(*values: float) -> bytes:
    return torch.tensor(values, dtype=torch.float32).numpy().tobytes()


@pytest.mark.parametrize("name", ["converted", "trained_amp_crc"])
def test_what_mindspore_wrote_is_read_bit_for_bit(name: str) -> None:
    found = read_tensors(FIXTURES / f"mindspore/{name}.ckpt")
    expected = fixture_tensors("osp_v1.1/weights")
    assert (found.format, found.chosen, found.discriminator) == ("mindspore", "only", {})
    assert found.tensors.keys() == expected.keys()
    assert all(torch.equal(found.tensors[key], tensor) for key, tensor in expected.items())


def test_what_mindspore_rounded_to_bf16_is_read_bit_for_bit() -> None:
    found = read_tensors(FIXTURES / "mindspore/bf16.ckpt").tensors
    expected = {key: tensor.bfloat16() for key, tensor in fixture_tensors("osp_v1.1/weights").items()}
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


@pytest.mark.parametrize("name", FILES)
def test_what_is_read_is_written_again_byte_for_byte(name: str, tmp_path: Path) -> None:
    original = FIXTURES / f"mindspore/{name}.ckpt"
    found = read_mindspore(original)
    assert found.crc == (name == "trained_amp_crc")
    write_records(tmp_path / "records", found.tensors, crc=found.crc)
    assert (tmp_path / "records").read_bytes() == original.read_bytes()
    write_mindspore(tmp_path / "named", to_torch_names(found.tensors), crc=found.crc)
    assert (tmp_path / "named").read_bytes() == original.read_bytes()


def test_every_number_type_and_shape_comes_back(tmp_path: Path) -> None:
    tensors = {kind: torch.arange(6).reshape(2, 3).to(dtype) for kind, dtype in TYPES.items()}
    tensors |= {"scalar": torch.tensor(3.5), "none": torch.empty(0), "hollow": torch.empty(2, 0, 3)}
    write_records(tmp_path / "all", tensors, crc=True)
    found = read_mindspore(tmp_path / "all").tensors
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("piece_bytes", [4, 7, 100, 4096])
def test_tensors_that_were_cut_are_joined(piece_bytes: int, tmp_path: Path) -> None:
    tensors = {"a": torch.arange(700.0).reshape(7, 100), "b": torch.arange(3.0), "c": torch.tensor(1.0)}
    write_records(tmp_path / "cut", tensors, crc=False, piece_bytes=piece_bytes)
    found = read_mindspore(tmp_path / "cut").tensors
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert (tmp_path / "cut").read_bytes().count(b"Float32") >= 700 * 4 // piece_bytes


def test_pieces_may_be_cut_anywhere_and_differ_in_size(tmp_path: Path) -> None:
    content = floats(1, 2, 3, 4, 5, 6)
    cut = [record("w", part, dims=(3, 2)) for part in (content[:5], content[5:6], content[6:])]
    (tmp_path / "w").write_bytes(b"".join(cut))
    assert read_mindspore(tmp_path / "w").tensors["w"].tolist() == [[1, 2], [3, 4], [5, 6]]


def test_text_counters_and_moments_are_no_weights(tmp_path: Path) -> None:
    extras = ("epoch_num", "loss_scale", "moment1.encoder.a.weight", "swap.encoder.a.weight", "global_step")
    content = b"".join(record(name, floats(1), dims=(1,)) for name in extras)
    content += record("note", "x".encode("utf-32-le"), dims=(0,), kind="str")
    content += record("step", floats(7), dims=(0,))  # a scalar of an older version
    content += record("autoencoder.encoder.a.weight", floats(2), dims=(1,))
    content += record("autoencoder._backbone.encoder.b.gamma", floats(3), dims=(1,))
    (tmp_path / "x.ckpt").write_bytes(content)
    assert read_mindspore(tmp_path / "x.ckpt").tensors["step"].shape == ()
    (tmp_path / "x.ckpt").write_bytes(content.replace(record("step", floats(7), dims=(0,)), b""))
    found = read_tensors(tmp_path / "x.ckpt").tensors
    assert list(found) == ["encoder.a.weight", "_backbone.encoder.b.weight"]  # not before all names: kept


def test_averages_beside_the_weights_are_preferred_and_moments_are_not_taken_for_them(tmp_path: Path) -> None:
    names = ("encoder.a.weight", "ema.encoder.a.weight", "moment2.encoder.a.weight")
    content = b"".join(record(name, floats(number), dims=(1,)) for number, name in enumerate(names))
    (tmp_path / "x.ckpt").write_bytes(content)
    assert read_tensors(tmp_path / "x.ckpt").tensors["encoder.a.weight"].tolist() == [1.0]
    assert read_tensors(tmp_path / "x.ckpt", prefer="live").tensors["encoder.a.weight"].tolist() == [0.0]


def test_names_of_norms_are_translated_both_ways() -> None:
    critic: dict[str, Tensor] = fixture_tensors("disc2d/weights")
    named = to_mindspore_names(critic)
    assert {"main.3.gamma", "main.3.beta", "main.3.moving_mean", "main.3.moving_variance"} <= named.keys()
    assert {"main.0.weight", "main.0.bias", "main.2.weight"} <= named.keys()
    counters = {name for name in critic if name.endswith("num_batches_tracked")}
    assert to_torch_names(named).keys() == critic.keys() - counters


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (record("w", floats(1, 2), dims=(3,)), "do not fit each other"),
        (record("w", floats(1), dims=(2**40, 2**22)), "do not fit each other"),
        (record("w", floats(1), dims=(1,)) * 2, "is it there twice"),
        (record("w", floats(1), dims=(1,), kind="Quaternion"), "'Quaternion', which is not known"),
        (
            b"".join(record(name, floats(1), dims=(1,)) for name in "wvw"),
            "'w' is in it twice",
        ),
        (record("w", floats(1), dims=(2,)) + record("w", b"1", dims=(3,)), "pieces of 'w' differ"),
        (record("w", floats(1), dims=(1,))[:-1], "ends behind the end of the file"),
        (record("w", floats(1), dims=(1,)) + b"\x0a", "has no end"),
        (record("w", floats(1), dims=(1,)) + b"more", "no record can begin"),
        (record("w", b"", dims=(1,)) * 100_001, "more than 100,000 records"),
    ],
    ids=range(10),
)  # fmt: skip
def test_records_that_do_not_fit_are_refused(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "x.ckpt").write_bytes(content)
    with pytest.raises(WeightsError, match="not a whole MindSpore checkpoint") as raised:
        read_tensors(tmp_path / "x.ckpt")
    assert str(raised.value).startswith(f"{tmp_path}/x.ckpt: ")
    assert said in str(raised.value)


def test_a_check_sum_that_does_not_hold_is_damage(tmp_path: Path) -> None:
    whole = record("encoder.a.weight", floats(1, 2), dims=(2,))
    good = whole + b"crc_num" + zlib.crc32(whole).to_bytes(10, "big")
    (tmp_path / "x.ckpt").write_bytes(good)
    assert read_tensors(tmp_path / "x.ckpt").tensors["encoder.a.weight"].tolist() == [1.0, 2.0]
    for place in range(len(good) - 17):
        broken = bytearray(good)
        broken[place] ^= 0x10
        (tmp_path / "x.ckpt").write_bytes(broken)
        with pytest.raises(WeightsError):
            read_tensors(tmp_path / "x.ckpt")


def test_a_type_that_mindspore_lacks_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"a is torch\.complex64"):
        write_mindspore(tmp_path / "x.ckpt", {"a": torch.zeros(1, dtype=torch.complex64)}, crc=False)
    assert list(tmp_path.iterdir()) == []
