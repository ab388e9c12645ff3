"""Damaged and hostile files of weights: one line that begins with the path, nothing run, little memory."""

import ast
import io
import json
import os
import pickle
import random
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures import FIXTURES
from safetensors.torch import save_file
from torch import nn

import causalvae
from causalvae.errors import WeightsError
from causalvae.weights.read import read_tensors

GIB = 2**30
WHOLE = {"encoder.a": torch.arange(1000.0), "encoder.b": torch.ones(3)}
VICTIMS = (
    "mindspore/bf16.ckpt", "mindspore/trained_amp_crc.ckpt", "checkpoints/disc2d_legacy.pt",
    "checkpoints/osp_v1.1_training.ckpt", "checkpoints/osp_v1.2_training.ckpt", "autoencoder_kl/ldm.ckpt",
    "osp_v1.1/weights.safetensors",
)  # fmt: skip


class Calls:
    """Pickles as a call of a function."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


def header(entries: dict[str, Any] | bytes, data: bytes = b"") -> bytes:
    """A safetensors file of any header."""
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def torch_bytes(payload: object, *, legacy: bool = False) -> bytes:
    file = io.BytesIO()
    torch.save(payload, file, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


def repacked(
    change: Callable[[str, bytes], bytes], method: int = zipfile.ZIP_STORED, extra: int = 0
) -> bytes:
    """A torch file with its records changed, written by another program."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(torch_bytes(WHOLE))) as old, zipfile.ZipFile(out, "w", method) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
        for number in range(extra):
            new.writestr(f"archive/data/more{number}", b"")
    return out.getvalue()


def pickled_as(data: bytes) -> bytes:
    return repacked(lambda name, old: data if name.endswith("data.pkl") else old)


def bomb() -> bytes:
    return repacked(
        lambda name, old: bytes(GIB // 16) if name.endswith("data/0") else old, zipfile.ZIP_DEFLATED
    )


def huge_storage() -> bytes:
    """The table claims 2^40 values of a record of 1000."""
    whole = repacked(lambda name, old: old)
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        table = archive.read(name)
    assert table.count(b"M\xe8\x03") >= 2
    return pickled_as(table.replace(b"M\xe8\x03", b"\x8a\x06" + (2**40).to_bytes(6, "little")))


def far_stride() -> bytes:
    """The table places values outside their record: an offset of 999 before 1000 values."""
    with zipfile.ZipFile(io.BytesIO(torch_bytes(WHOLE))) as archive:
        table = archive.read("archive/data.pkl")
    assert b"QK\x00M\xe8\x03\x85" in table
    return pickled_as(table.replace(b"QK\x00M\xe8\x03\x85", b"QM\xe7\x03M\xe8\x03\x85", 1))


def overlapping() -> bytes:
    """Two entries of the archive's table of contents for one record."""
    data = bytearray(repacked(lambda name, old: old))
    end = data.rindex(b"PK\x05\x06")
    (count,) = struct.unpack_from("<H", data, end + 10)
    size, start = struct.unpack_from("<II", data, end + 12)
    first = data[start : start + 46 + struct.unpack_from("<H", data, start + 28)[0]]
    twin = first.replace(b"data.pkl", b"date.pkl")
    struct.pack_into("<HHII", data, end + 8, count + 1, count + 1, size + len(twin), start)
    data[end:end] = twin
    return bytes(data)


NOT_SPARSE = torch.ones(3).as_strided((2**20, 2**20), (0, 0))
DEEP = b"\x80\x02" + b"(" * 200_000 + b"t" * 200_000 + b"."
LONG = b"\x80\x02" + b"N0" * 4_000_000 + b"N."
BAD: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "text": lambda: b"my weights\n" * 100,
    "blank lines": lambda: b"\n" * 100,
    "page": lambda: b"<!DOCTYPE html><html>404: Not Found</html>",
    "JSON": lambda: b'{"a": 1}',
    "JSON list of shards": lambda: b'{"weight_map": [1, 2]}',
    "deep JSON": lambda: b'{"a": ' + b"[" * 200_000,
    "pointer of a large file store": lambda: b"version https://git-lfs.github.com/spec/v1\nsize 12\n",
    "noise": lambda: random.Random(0).randbytes(100_000),
    "zeros": lambda: bytes(100_000),
    "picture": lambda: b"\x89PNG\r\n\x1a\n" + bytes(100),
    "tar": lambda: b"a".ljust(257, b"\0") + b"ustar" + bytes(2000),
    "arrays of numpy": lambda: b"\x93NUMPY" + bytes(100),
    "other zip": lambda: zip_of({"word/document.xml": b"<w/>"}),
    "TorchScript": lambda: zip_of({"x/data.pkl": b"\x80\x02}.", "x/constants.pkl": b"\x80\x02)."}),
    "two tables": lambda: zip_of({"x/data.pkl": b"\x80\x02}.", "y/data.pkl": b"\x80\x02}."}),
    "zip head only": lambda: b"PK\x03\x04",
    "packed": lambda: repacked(lambda name, old: old, zipfile.ZIP_DEFLATED),
    "bomb": bomb,
    "many records": lambda: repacked(lambda name, old: old, extra=2000).replace(
        b"PK\x05\x06", b"PK\x05\x06" + bytes(8) + (2**25).to_bytes(4, "little")
    ),
    "overlapping records": overlapping,
    "storage beyond its record": huge_storage,
    "values outside the record": far_stride,
    "2^40 values of one": lambda: torch_bytes({"encoder.a": NOT_SPARSE}),
    "many views of one": lambda: torch_bytes({f"encoder.{n}": WHOLE["encoder.a"] for n in range(50_000)}),
    "sparse tensor": lambda: torch_bytes({"encoder.a": torch.eye(3).to_sparse()}),
    "meta tensor": lambda: torch_bytes({"encoder.a": torch.empty(2**20, 2**20, device="meta")}),
    "no weights": lambda: torch_bytes({"lr": 1.0, "note": "hello"}),
    "critic only": lambda: torch_bytes({"loss.discriminator.main.0.weight": torch.ones(3)}),
    "list": lambda: torch_bytes([torch.ones(3)]),
    "tensor": lambda: torch_bytes(torch.ones(3)),
    "whole module": lambda: torch_bytes(nn.Linear(2, 2)),
    "protocol 4": lambda: pickle.dumps({"a": 1}, protocol=4),
    "protocol 4 in a zip": lambda: pickled_as(pickle.dumps({"a": 1}, protocol=4)),
    "protocol 2": lambda: pickle.dumps({"a": 1}, protocol=2),
    "memory by a call": lambda: torch_bytes({"a": Calls(bytearray, 20 * GIB)}),
    "deep pickle": lambda: pickled_as(DEEP),
    "long pickle": lambda: pickled_as(LONG),
    "huge text in a pickle": lambda: pickled_as(b"\x80\x02X\xff\xff\xff\xff."),
    "many objects": lambda: pickled_as(b"\x80\x02" + b"cargparse\nNamespace\n0" * 100_001 + b"}."),
    "methods hung over": lambda: pickled_as(
        b"\x80\x02ccollections\nOrderedDict\n)R}(X\x05\x00\x00\x00itemsK\x01X\x03\x00\x00\x00getK\x01ub."
    ),
    "legacy with 2^40 values": lambda: torch_bytes(WHOLE, legacy=True).replace(
        b"M\xe8\x03N", b"\x8a\x06" + (2**40).to_bytes(6, "little") + b"N"
    ),
    "NaN": lambda: torch_bytes({"encoder.a": torch.ones(2), "encoder.b": torch.tensor([1.0, float("nan")])}),
    "infinite": lambda: torch_bytes({"state_dict": {"encoder.b": torch.tensor([float("inf")])}}),
    "header of 2^63": lambda: struct.pack("<Q", 2**63) + b"{" + bytes(100),
    "header of 78 MB": lambda: header(b"{}".ljust(78_000_000)),
    "many brackets": lambda: header(b'{"a":[' + b"[]," * 500_000 + b"[]]}"),
    "many tensors": lambda: header(b"{%s}" % b",".join(b'"%d":{}' % n for n in range(100_001))),
    "name twice": lambda: header(
        b'{"encoder.a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        b'"encoder.a":{"dtype":"I32","shape":[1],"data_offsets":[0,4]}}', bytes(4)
    ),
    "shape beyond the data": lambda: header({"encoder.a": entry([2**20, 2**20], 0, 4)}, bytes(4)),
    "shape that overflows": lambda: header({"encoder.a": entry([2**40, 2**40], 0, 4)}, bytes(4)),
    "gap": lambda: header({"encoder.a": entry([1], 4, 8)}, bytes(8)),
    "unknown type": lambda: header({"encoder.a": entry([1], 0, 4, "F33")}, bytes(4)),
    "deep header": lambda: header(b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"),
    "metadata of lists": lambda: header({"__metadata__": {"a": [1]}}),
    "NaN in safetensors": lambda: header({"encoder.a": entry([1], 0, 4)}, struct.pack("<f", float("nan"))),
    "empty name": lambda: header({"\n<script>": entry([2], 0, 4)}, bytes(4)),
}  # fmt: skip


def zip_of(records: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    return out.getvalue()


def refused(path: Path) -> str:
    """The one line that a path is refused with, in less than five seconds."""
    started = time.monotonic()
    with pytest.raises(WeightsError) as raised:
        read_tensors(path)
    assert time.monotonic() - started < 5
    said = str(raised.value)
    assert said.startswith(f"{path}: ")
    assert "\n" not in said
    assert len(said) < 700
    assert "weights_only" not in said
    assert raised.value.status == 2
    return said


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_is_refused_in_one_line(kind: str, tmp_path: Path) -> None:
    (tmp_path / "x.ckpt").write_bytes(BAD[kind]())
    refused(tmp_path / "x.ckpt")


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("empty", "the file is empty"),
        ("text", "a text file"),
        ("other zip", "a zip archive, but none of torch weights"),
        ("bomb", "'archive/data.pkl' is packed"),
        ("overlapping records", "overlaps another record"),
        ("whole module", "'torch.nn.modules.linear.Linear', which is neither a weight nor plain data"),
        ("memory by a call", "'builtins.bytearray'"),
        ("2^40 values of one", "'encoder.a' claims 1,099,511,627,776 values and has fewer"),
        ("many views of one", "more than the file can hold"),
        ("NaN", "encoder.b holds values that are not numbers"),
        ("name twice", "'encoder.a' is in it twice"),
        ("deep pickle", "holds tuple and no table"),
        ("many brackets", "more parts than that of any model"),
        ("no weights", "its entries are 'lr', 'note'"),
        ("protocol 4 in a zip", "a pickle of protocol 4"),
        ("header of 2^63", "its header claims 9,223,372,036,854,775,808 bytes"),
    ],
)
def test_the_line_says_what_is_wrong(kind: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "x.ckpt").write_bytes(BAD[kind]())
    assert said in refused(tmp_path / "x.ckpt")


@pytest.mark.slow
def test_all_bad_files_together_take_little_memory(tmp_path: Path) -> None:
    for number, make in enumerate(BAD.values()):
        (tmp_path / f"{number}.ckpt").write_bytes(make())
    with (tmp_path / "sparse.safetensors").open("wb") as file:
        file.write(header({"encoder.a": entry([2**29], 0, 2**31)}))
        file.truncate(file.tell() + 2**31)
    script = (
        "import sys, resource, pathlib\n"
        "from causalvae.errors import WeightsError\n"
        "from causalvae.weights.read import read_tensors\n"
        "for path in pathlib.Path(sys.argv[1]).iterdir():\n"
        "    try:\n"
        "        read_tensors(path)\n"
        "        print('read', path)\n"
        "    except WeightsError:\n"
        "        continue\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, env=dict(os.environ)
    )
    assert done.stderr == ""
    assert int(done.stdout) < 1.5 * GIB


CANARIES = {
    "os.system": lambda path: Calls(os.system, f"touch {path}"),
    "open": lambda path: Calls(open, path, "w"),
    "exec": lambda path: Calls(exec, f"open({path!r}, 'w')"),
    "eval": lambda path: Calls(eval, f"open({path!r}, 'w')"),
    "getattr": lambda path: Calls(getattr, path, "upper"),
    "Popen": lambda path: Calls(subprocess.Popen, ["touch", path]),
    "mkdir": lambda path: Calls(os.mkdir, path),
    "Path.touch": lambda path: Calls(Path.touch, Path(path)),
    "torch.load": lambda path: Calls(torch.load, path),
    "torch.save": lambda path: Calls(torch.save, 1, path),
    "write_bytes": lambda path: Calls(Path.write_bytes, Path(path), b"x"),
    "from_file": lambda path: Calls(torch.UntypedStorage.from_file, path, True, 8),
    "by a nested call": lambda path: Calls(Calls, exec, f"open({path!r}, 'w')"),
}


@pytest.mark.parametrize("format_", ["zip", "legacy"])
@pytest.mark.parametrize("call", CANARIES)
def test_nothing_that_a_pickle_would_call_is_called(call: str, format_: str, tmp_path: Path) -> None:
    canary = str(tmp_path / "canary")
    payload = {"state_dict": WHOLE, "hyper_parameters": CANARIES[call](canary)}
    (tmp_path / "x.ckpt").write_bytes(torch_bytes(payload, legacy=format_ == "legacy"))
    said = refused(tmp_path / "x.ckpt")
    assert "nothing in it was run" in said
    assert not Path(canary).exists()


def test_stand_ins_do_nothing_with_what_they_are_given(tmp_path: Path) -> None:
    """A name that is allowed as data leads to no object of that kind, and to no call."""
    table = b"\x80\x02}(X\x01\x00\x00\x00acpathlib\nPosixPath\nX\x01\x00\x00\x00/\x85Ru."
    (tmp_path / "x.ckpt").write_bytes(pickled_as(table))
    assert "holds no weights" in refused(tmp_path / "x.ckpt")


def test_folders_without_weights_are_refused(tmp_path: Path) -> None:
    assert "the folder holds no weights" in refused(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert "the folder holds no weights" in refused(tmp_path)
    for name in ("a.safetensors", "b.safetensors"):
        save_file({"encoder.a": torch.ones(1)}, tmp_path / name)
    assert "holds 2 files that may be weights" in refused(tmp_path)
    assert "No such file" in refused(tmp_path / "none")
    os.mkfifo(tmp_path / "pipe")
    assert "neither a file nor a folder" in refused(tmp_path / "pipe")


def test_a_config_that_can_not_be_read_is_named(tmp_path: Path) -> None:
    save_file({"encoder.a": torch.ones(1)}, tmp_path / "a.safetensors")
    for text in ("{", "[]", '{"a": 1, "a": 2}', "[" * 100_000):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(WeightsError, match=f"{tmp_path}/config.json: "):
            read_tensors(tmp_path / "a.safetensors")


@pytest.mark.parametrize("victim", VICTIMS)
def test_a_truncated_file_is_refused_wherever_it_ends(victim: str, tmp_path: Path) -> None:
    whole = (FIXTURES / victim).read_bytes()
    path, chance = tmp_path / "x.ckpt", random.Random(victim)
    places = [
        *range(1, 40),
        *(chance.randrange(len(whole)) for _ in range(15)),
        *range(len(whole) - 20, len(whole)),
    ]
    for place in places:
        path.write_bytes(whole[:place])
        try:
            found = read_tensors(path)
        except WeightsError:
            continue
        assert victim.startswith("mindspore"), place  # has no end of its own: cut between two records
        assert found.tensors


@pytest.mark.parametrize("victim", VICTIMS)
def test_flipped_bits_lead_to_nothing_but_an_error_or_a_read(victim: str, tmp_path: Path) -> None:
    whole = (FIXTURES / victim).read_bytes()
    path, chance = tmp_path / "x.ckpt", random.Random(victim)
    ends = 3000
    said: set[str] = set()
    for _ in range(40):
        data = bytearray(whole)
        for _ in range(chance.choice([1, 1, 3])):
            place = chance.choice(
                [chance.randrange(ends), len(data) - 1 - chance.randrange(ends), chance.randrange(len(data))]
            )
            data[place] ^= 1 << chance.randrange(8)
        path.write_bytes(data)
        try:
            read_tensors(path)
        except WeightsError as error:
            said.add(str(error)[: len(str(path)) + 2])
    assert said <= {f"{path}: "}


def test_a_flipped_bit_in_the_weights_of_a_zip_is_found(tmp_path: Path) -> None:
    data = bytearray(torch_bytes(WHOLE))
    data[data.index(WHOLE["encoder.a"].numpy().tobytes()) + 100] ^= 1
    (tmp_path / "x.ckpt").write_bytes(data)
    assert "the check sum of 'archive/data/0' does not hold" in refused(tmp_path / "x.ckpt")


def test_no_code_asks_torch_for_more_than_weights() -> None:
    sources = Path(causalvae.__file__).parent.rglob("*.py")
    loads = [
        call
        for path in sources
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call) and ast.unparse(call.func) in ("torch.load", "load", "pickle.load")
    ]
    assert loads
    assert all("weights_only=True" in ast.unparse(call) for call in loads)
