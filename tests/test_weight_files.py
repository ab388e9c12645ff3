"""Files of weights of every format: read bit for bit, whoever wrote them; written so that they come back."""

import argparse
import datetime
import json
import os
import pathlib
import resource
import signal
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from faults import at_event, fail_io
from fixtures import FIXTURES, fixture_json, fixture_rows, fixture_tensors, under
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from causalvae.errors import RunError, WeightsError
from causalvae.models.build import build
from causalvae.models.presets import PRESETS
from causalvae.weights.diffusers import write_diffusers
from causalvae.weights.layouts import PREFIXES
from causalvae.weights.mindspore import write_mindspore
from causalvae.weights.pytorch import write_torch
from causalvae.weights.read import CONFIG_KEY, MODEL_KEY, read_tensors
from causalvae.weights.tensorfiles import write_safetensors
from causalvae.weights.writing import to_dtype

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool]
DTYPES_BY_WORD: dict[Literal["fp32", "fp16", "bf16"], torch.dtype] = {
    "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16,
}  # fmt: skip
FEW = settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
WEIGHTS = {"encoder.a.weight": torch.arange(12.0).reshape(3, 4), "decoder.b.bias": torch.ones(2)}


def equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    """The same names, types, shapes and bits."""
    return found.keys() == expected.keys() and all(
        found[name].dtype == tensor.dtype
        and found[name].shape == tensor.shape
        and found[name].numpy(force=True).tobytes() == tensor.contiguous().numpy(force=True).tobytes()
        if tensor.dtype != torch.bfloat16
        else torch.equal(found[name], tensor)
        for name, tensor in expected.items()
    )


def test_lightnings_layout_is_read_with_its_critic() -> None:
    found = read_tensors(FIXTURES / "checkpoints/osp_v1.1_training.ckpt")
    assert (found.format, found.chosen, found.origin.kind) == ("lightning", "only", "only")
    assert equal(found.tensors, fixture_tensors("osp_v1.1/weights"))
    raw = torch.load(FIXTURES / "checkpoints/osp_v1.1_training.ckpt", weights_only=True)["state_dict"]
    assert equal(found.discriminator, under(raw, "loss."))
    assert "discriminator.main.0.weight" in found.discriminator


def test_open_sora_plans_layout_has_two_sets() -> None:
    path = FIXTURES / "checkpoints/osp_v1.2_training.ckpt"
    live, averaged = read_tensors(path, "live"), read_tensors(path)
    assert (live.format, live.chosen, averaged.chosen) == ("open-sora-plan", "live", "ema")
    assert equal(live.tensors, to_dtype(fixture_tensors("osp_v1.2/weights"), "fp16"))
    raw = torch.load(path, weights_only=True)
    assert equal(averaged.tensors, under(raw["ema_state_dict"], "module."))
    assert not equal(averaged.tensors, live.tensors)
    assert equal(live.discriminator, raw["state_dict"]["dics_model"])


def test_pickles_from_before_the_zip_format_are_read() -> None:
    found = read_tensors(FIXTURES / "checkpoints/disc2d_legacy.pt")
    assert found.format == "torch-legacy"
    assert equal(found.tensors, fixture_tensors("disc2d/weights"))


def test_an_image_vae_is_read_from_diffusers_folder_and_from_ldms_file() -> None:
    folder, file = (
        read_tensors(FIXTURES / "autoencoder_kl"),
        read_tensors(FIXTURES / "autoencoder_kl/ldm.ckpt"),
    )
    assert (folder.format, file.format) == ("diffusers", "torch")
    assert folder.config == fixture_json("autoencoder_kl/config")
    assert folder.origin.path.name == "diffusion_pytorch_model.safetensors"
    for row in fixture_rows("autoencoder_kl/name_map"):
        one, other = folder.tensors[row["diffusers"]], file.tensors[row["ldm"]]
        assert torch.equal(one.flatten(), other.flatten())


def test_a_config_beside_the_file_and_its_sum_are_told() -> None:
    found = read_tensors(FIXTURES / "osp_v1.1/weights.safetensors")
    assert found.config == fixture_json("osp_v1.1/config")
    assert found.kind is None
    assert len(found.origin.sha256) == 64


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
        table[draw(st.sampled_from(["encoder.", "decoder."])) + name] = values.to(dtype).reshape(shape)
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


@FEW
@given(prefixes=st.lists(st.sampled_from(PREFIXES), max_size=4))
def test_prefixes_that_all_names_have_are_taken_off(
    prefixes: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("p") / "x.pt"
    torch.save({"".join(prefixes) + name: tensor for name, tensor in WEIGHTS.items()}, path)
    assert equal(read_tensors(path).tensors, WEIGHTS)


@pytest.mark.parametrize(
    ("payload", "chosen"),
    [
        (WEIGHTS, "only"),
        ({"state_dict": WEIGHTS, "epoch": 3, "optimizer_states": [{"state": {0: torch.ones(5)}}]}, "only"),
        ({"state_dict": {"vae": WEIGHTS}}, "only"),
        ({"state_dict": {"gen_model": {"x": torch.zeros(1)}, "ema": {"x": torch.ones(1)}}}, "ema"),
        ({"state_dict": WEIGHTS, "ema_state_dict": {}}, "only"),
        ({"ema": WEIGHTS}, "only"),
        ({"model": OrderedDict(WEIGHTS)}, "only"),
        (nn.ParameterDict({"a": nn.Parameter(torch.ones(2))}).state_dict(), "only"),
    ],
    ids=range(8),
)  # fmt: skip
def test_the_tables_of_trainers_are_found(payload: dict[str, Any], chosen: str, tmp_path: Path) -> None:
    torch.save(payload, tmp_path / "x.pt")
    found = read_tensors(tmp_path / "x.pt")
    assert found.chosen == chosen
    if "encoder.a.weight" in found.tensors:
        assert equal(found.tensors, WEIGHTS)
    elif "x" in found.tensors:
        assert found.tensors["x"].item() == 1.0


def test_averages_have_no_buffers_and_get_those_of_the_live_weights(tmp_path: Path) -> None:
    live = {"encoder.a": torch.zeros(2), "encoder.buffer": torch.full((1,), 7.0)}
    torch.save(
        {"state_dict": {"gen_model": live}, "ema_state_dict": {"module.encoder.a": torch.ones(2)}},
        tmp_path / "x",
    )
    assert read_tensors(tmp_path / "x").tensors["encoder.a"].tolist() == [1.0, 1.0]
    assert read_tensors(tmp_path / "x").tensors["encoder.buffer"].tolist() == [7.0]
    assert read_tensors(tmp_path / "x", "live").tensors["encoder.a"].tolist() == [0.0, 0.0]


def test_averages_whose_names_have_no_dots_are_found(tmp_path: Path) -> None:
    table = WEIGHTS | {"model_ema." + name.replace(".", ""): tensor + 1 for name, tensor in WEIGHTS.items()}
    table |= {"model_ema.decay": torch.tensor(0.9), "model_ema.num_updates": torch.tensor(4)}
    torch.save({"state_dict": table}, tmp_path / "x")
    found = read_tensors(tmp_path / "x")
    assert found.chosen == "ema"
    assert equal(found.tensors, {name: tensor + 1 for name, tensor in WEIGHTS.items()})


def test_averages_of_another_model_are_not_used_and_it_is_said(tmp_path: Path) -> None:
    torch.save({"state_dict": WEIGHTS, "ema_state_dict": {"encoder.other": torch.ones(1)}}, tmp_path / "x")
    found = read_tensors(tmp_path / "x")
    assert (found.chosen, equal(found.tensors, WEIGHTS)) == ("only", True)
    assert "encoder.other" in found.notes[0]


def test_the_autoencoder_is_taken_out_of_a_whole_system(tmp_path: Path) -> None:
    system = {"first_stage_model." + name: tensor for name, tensor in WEIGHTS.items()}
    system |= {"model.diffusion_model.w": torch.ones(1), "cond_stage_model.w": torch.ones(1)}
    torch.save({"state_dict": system}, tmp_path / "sd.ckpt")
    found = read_tensors(tmp_path / "sd.ckpt")
    assert equal(found.tensors, WEIGHTS)
    assert found.notes == ("2 tensors outside first_stage_model were left out",)


def allowed_now() -> list[Any]:
    return sorted(torch.serialization.get_safe_globals(), key=str)


class Settings(argparse.Namespace):
    """A type of data that no list names."""


@pytest.mark.parametrize("format_", ["zip", "legacy"])
def test_data_that_trainers_save_beside_weights_is_read_as_nothing(format_: str, tmp_path: Path) -> None:
    beside = {
        "args": argparse.Namespace(lr=1e-5, path=Path("x"), inner=argparse.Namespace(a=[1, {2}])),
        "path": pathlib.PurePosixPath("a/b"),
        "numpy": [np.float32(1.5), np.int64(3), np.ones(3), np.dtype("float32"), np.bool_(True)],
        "tables": [defaultdict(list, a=[1]), defaultdict(dict), deque([1, 2]), OrderedDict(a=1)],
        "time": [datetime.datetime(2024, 1, 1), datetime.timedelta(seconds=3)],
        "kinds": [dict, list, int, float, complex(1, 2), frozenset({1}), slice(1, 2), torch.float32],
        "device": torch.device("cpu"), "size": torch.Size([2]), "version": torch.__version__,
    }  # fmt: skip
    before = allowed_now()
    payload = {"hyper_parameters": beside, "state_dict": WEIGHTS}
    torch.save(payload, tmp_path / "x.ckpt", _use_new_zipfile_serialization=format_ == "zip")
    found = read_tensors(tmp_path / "x.ckpt")
    assert equal(found.tensors, WEIGHTS)
    assert found.format == {"zip": "torch", "legacy": "torch-legacy"}[format_]
    assert allowed_now() == before


def test_a_type_on_no_list_is_refused_by_name(tmp_path: Path) -> None:
    torch.save({"state_dict": WEIGHTS, "args": Settings()}, tmp_path / "x.ckpt")
    with pytest.raises(WeightsError, match=r"test_weight_files\.Settings") as raised:
        read_tensors(tmp_path / "x.ckpt")
    assert "nothing in it was run" in str(raised.value)


def test_tied_weights_come_back_apart_and_views_without_the_rest(tmp_path: Path) -> None:
    whole = torch.arange(10.0)
    torch.save({"encoder.a": whole, "encoder.b": whole, "encoder.c": whole[2:4]}, tmp_path / "x")
    found = read_tensors(tmp_path / "x").tensors
    assert equal(found, {"encoder.a": whole, "encoder.b": whole, "encoder.c": whole[2:4]})
    assert len({tensor.untyped_storage().data_ptr() for tensor in found.values()}) == 3
    assert found["encoder.c"].untyped_storage().nbytes() == 8
    write_safetensors(tmp_path / "y", {"encoder.a": whole, "encoder.b": whole}, metadata={})


def test_files_written_without_check_sums_are_read_and_it_is_said(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(WEIGHTS, tmp_path / "x")
    finally:
        torch.serialization.set_crc32_options(True)
    found = read_tensors(tmp_path / "x")
    assert equal(found.tensors, WEIGHTS)
    assert "without check sums" in found.notes[0]


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


def test_a_name_says_nothing_about_the_format(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "x.ckpt", WEIGHTS, metadata={})
    write_mindspore(tmp_path / "x.safetensors", WEIGHTS, crc=False)
    write_torch(tmp_path / "x.json", WEIGHTS, layout="plain")
    assert [read_tensors(tmp_path / name).format for name in ("x.ckpt", "x.safetensors", "x.json")] == [
        "safetensors", "mindspore", "torch",
    ]  # fmt: skip


def test_a_run_and_its_checkpoint_stand_for_their_weights(tmp_path: Path) -> None:
    vae = build(PRESETS["tiny"], seed=0)
    header = {MODEL_KEY: type(vae.config).__name__, CONFIG_KEY: json.dumps(asdict(vae.config))}
    live, averaged = vae.state_dict(), {name: p + 1 for name, p in vae.named_parameters()}
    for step in (3, 12):
        folder = tmp_path / f"checkpoints/step-{step:08d}"
        write_safetensors(
            folder / "model.safetensors", {n: t * step for n, t in live.items()}, metadata=header
        )
        write_safetensors(folder / "ema.safetensors", averaged, metadata=header)
        write_safetensors(folder / "discriminator.safetensors", {"main.0.bias": torch.ones(1)}, metadata={})
    (tmp_path / "checkpoints/step-00000012.broken-1").mkdir()
    run, checkpoint = read_tensors(tmp_path), read_tensors(tmp_path / "checkpoints/step-00000003", "live")
    assert (run.format, run.chosen, run.kind) == ("causalvae run", "ema", "CausalVAEConfig")
    assert "step-00000012" in run.notes[0]
    assert equal(run.tensors, live | {name: tensor.detach() for name, tensor in averaged.items()})
    assert list(run.discriminator) == ["discriminator.main.0.bias"]
    assert run.config == json.loads(header[CONFIG_KEY])
    assert (checkpoint.format, checkpoint.chosen) == ("causalvae checkpoint", "live")
    assert equal(checkpoint.tensors, {name: tensor * 3 for name, tensor in live.items()})


def test_a_folder_of_open_sora_plan_and_one_of_a_pipeline_are_read(tmp_path: Path) -> None:
    (tmp_path / "osp").mkdir()
    (tmp_path / "osp/config.json").write_text('{"hidden_size": 32}')
    for name in ("b.ckpt", "a.ckpt"):
        write_torch(tmp_path / "osp" / name, WEIGHTS, layout="open-sora-plan")
    found = read_tensors(tmp_path / "osp")
    assert (found.format, found.config, found.origin.path.name) == (
        "open-sora-plan",
        {"hidden_size": 32},
        "a.ckpt",
    )
    write_diffusers(tmp_path / "pipeline/vae", {"a": 1}, WEIGHTS, metadata={})
    assert read_tensors(tmp_path / "pipeline").format == "diffusers"


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


def test_a_folder_that_is_not_empty_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(WeightsError, match="is there already"):
        write_diffusers(tmp_path, {}, WEIGHTS, metadata={})
    assert (tmp_path / "mine").read_text() == "mine"
