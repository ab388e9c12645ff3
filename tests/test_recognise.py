"""Whose model tensors are: by names and shapes, with a config.json where these can't tell."""

import dataclasses
from typing import Any

import pytest
from fixtures import FIXTURES, fixture_json, fixture_rows, fixture_tensors
from test_published import CLASS_LEVELS, FEW, LISTS, SMALL

from causalvae.errors import WeightsError
from causalvae.models.build import shapes
from causalvae.models.presets import PRESETS, V1_0, CausalVAEConfig, OwnConfig, WFVAEConfig
from causalvae.weights.names import differences, may_be_missing, recognise
from causalvae.weights.published import published_config

OTHERS = {
    "class levels": CLASS_LEVELS,
    "fixed attention": dataclasses.replace(V1_0, mixing_attention=False),
    "faulty v1.1": dataclasses.replace(PRESETS["osp-v1.1"], mixing_attention=True),
    "other latent": CausalVAEConfig(norm="clip", temporal="joint", embed_dim=6),
    "no quant": CausalVAEConfig(norm="clip", temporal="joint", quant=False, z_channels=16),
    "three levels": CausalVAEConfig(
        norm="clip",
        hidden_size_mult=(1, 2, 3),
        num_res_blocks=1,
        spatial_levels=(0, 1),
        temporal_levels=(0,),
        flat_levels=1,
    ),
    "plain wfvae": WFVAEConfig(base_channels=32, attention=False, connect_res_blocks=2, encoder_energy=64),
}


def shapes_of(name: str) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in fixture_tensors(f"{name}/weights").items()}


def listed(name: str) -> dict[str, tuple[int, ...]]:
    lines = (FIXTURES / "keys" / f"{name}.txt").read_text().splitlines()
    rows = [line.split() for line in lines if not line.startswith("#")]
    return {row[0]: tuple(map(int, row[1].split("x"))) for row in rows}


def without_time(name: str) -> dict[str, tuple[int, ...]]:
    return {key: shape for key, shape in shapes_of(name).items() if ".time_" not in key}


@pytest.mark.parametrize("name", sorted(LISTS))
def test_a_published_file_is_recognised_by_its_list_of_names(name: str) -> None:
    found = recognise(listed(LISTS[name]))
    assert found.config == PRESETS[name]
    assert found.family == ("wfvae" if name.startswith("wfvae") else name)
    assert found.missing == ()
    assert bool(found.notes) == (name == "osp-v1.0")


@pytest.mark.parametrize("name", sorted(SMALL))
def test_a_published_config_json_agrees_with_its_weights(name: str) -> None:
    found = recognise(shapes_of(name), fixture_json(f"{name}/config"))
    assert found.config == SMALL[name]
    assert found.notes == ()


def test_v1_0_without_a_config_json_has_the_released_levels_and_says_so() -> None:
    found = recognise(shapes_of("osp_v1.0"))
    assert found.config == dataclasses.replace(V1_0, **FEW)
    assert "released" in found.notes[0]
    said = fixture_json("osp_v1.0/config")
    said["encoder_temporal_downsample"] = ["", "TimeDownsample2x", "TimeDownsample2x", ""]
    other = recognise(shapes_of("osp_v1.0"), said)
    assert other.config == dataclasses.replace(CLASS_LEVELS, **FEW)
    assert other.notes == ()


@pytest.mark.parametrize("name", sorted(SMALL))
def test_a_published_config_is_written_as_the_fixture_has_it(name: str) -> None:
    ours, theirs = published_config(SMALL[name]), fixture_json(f"{name}/config")
    assert ours is not None
    training = ("lr", "loss_type", "loss_params")  # fields that v1.0 and v1.1 have for training
    assert ours == {field: value for field, value in theirs.items() if field not in training}


@pytest.mark.parametrize("config", [*SMALL.values(), *OTHERS.values()])
def test_a_model_is_recognised_by_its_shapes_and_the_config_that_is_written_for_it(
    config: OwnConfig,
) -> None:
    assert recognise(shapes(config), published_config(config)).config == config


@pytest.mark.parametrize("name", ["causalvae-488", "swift-488"])
def test_models_of_ours_have_no_published_config(name: str) -> None:
    assert published_config(PRESETS[name]) is None


def test_published_initial_weights_may_lack_the_time_resamplers_all_or_none() -> None:
    found = recognise(without_time("osp_v1.1"))
    assert found.config == SMALL["osp_v1.1"]
    assert found.family == "osp-v1.1"
    assert "initial values" in found.notes[0]
    assert len(found.missing) == 12
    assert all(may_be_missing("osp-v1.1", name) for name in found.missing)
    assert set(found.missing) == shapes_of("osp_v1.1").keys() - without_time("osp_v1.1").keys()
    half = {k: s for k, s in shapes_of("osp_v1.1").items() if "decoder.up.2.time_upsample.conv" not in k}
    with pytest.raises(WeightsError, match=r"2 missing: decoder\.up\.2\.time_upsample\.conv"):
        recognise(half)
    assert not may_be_missing("osp-v1.1", "decoder.up.2.upsample.conv.conv.weight")
    assert not may_be_missing("osp-v1.2", found.missing[0])


def test_image_models_are_recognised_and_have_no_config_of_a_video_model() -> None:
    rows = fixture_rows("keys/autoencoder_kl")
    for kind in ("ldm", "diffusers"):
        named = {row[kind]: tuple(map(int, row[f"{kind}_shape"].split("x"))) for row in rows}
        found = recognise(named)
        assert (found.family, found.config) == (f"{kind}-image", None)


@pytest.mark.parametrize(
    ("name", "field", "value", "message"),
    [
        ("osp_v1.1", "hidden_size", 128, "hidden_size is 128 there, 32"),
        ("osp_v1.1", "z_channels", 8, "z_channels is 8"),
        ("osp_v1.1", "encoder_conv_in", "CausalConv3d", "encoder_conv_in is 'CausalConv3d'"),
        ("osp_v1.1", "attn_resolutions", [32], r"attn_resolutions is \[32\]"),
        ("osp_v1.1", "double_z", False, "double_z is False"),
        ("osp_v1.1", "encoder_attention", ["AttnBlock3D"], "different attention"),
        ("osp_v1.2", "use_quant_layer", False, "use_quant_layer is False"),
        ("osp_v1.0", "encoder_temporal_downsample", ["TimeDownsample2x"] * 4, "levels"),
        ("osp_v1.0", "encoder_temporal_downsample", "none", "encoder_temporal_downsample is 'none'"),
        ("osp_v1.0", "decoder_attention", "AttnBlock3DFix", "different attention"),
        ("osp_v1.0", "decoder_attention", "TemporalAttnBlock", "'TemporalAttnBlock'. No published"),
        ("osp_v1.0", "encoder_spatial_downsample", ["Spatial2x3DDownsample"], "'Spatial2x3DDownsample'"),
        ("osp_v1.1", "encoder_temporal_downsample", ["", "TimeDownsampleResAdv2x"], "TimeDownsampleResAdv2x"),
        ("wfvae", "t_interpolation", "nearest", "t_interpolation is 'nearest'"),
        ("wfvae", "norm_type", "groupnorm", "norm_type is 'groupnorm'"),
        ("wfvae", "latent_dim", 16, "latent_dim is 16"),
        ("wfvae", "l1_dowmsample_block", "Spatial2xTime2x3DDownsample", "l1_dowmsample_block"),
    ],
)
def test_a_config_json_of_another_model_is_refused(name: str, field: str, value: Any, message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        recognise(shapes_of(name), {**fixture_json(f"{name}/config"), field: value})


def test_fields_that_decide_nothing_are_ignored() -> None:
    more = {"lr": "fast", "in_channels": 3, "dropout": 0.5, "scale": [1.0], "_name_or_path": "/somewhere"}
    for name, config in SMALL.items():
        assert recognise(shapes_of(name), {**fixture_json(f"{name}/config"), **more}).config == config


def test_relatives_that_are_not_built_here_are_refused_by_name() -> None:
    names = shapes_of("wfvae")
    with pytest.raises(WeightsError, match=r"v1\.5"):
        recognise(names | {"encoder.wavelet_transform_l1.h_conv.conv.weight": (1, 1, 2, 2, 2)})
    with pytest.raises(WeightsError, match="nearest is wfvae-8"):
        recognise({name: shape for name, shape in names.items() if "connect_l1" not in name})
    group = {name.replace(".norm.weight", ".weight"): shape for name, shape in names.items()}
    with pytest.raises(WeightsError, match="groupnorm"):
        recognise(group)


def test_other_tensors_are_refused_with_the_nearest_model_and_what_differs() -> None:
    names = shapes_of("osp_v1.2")
    with pytest.raises(WeightsError, match=r"nearest to those of osp-v1\.2.*1 missing: decoder\.conv_out"):
        recognise({name: shape for name, shape in names.items() if name != "decoder.conv_out.conv.bias"})
    with pytest.raises(WeightsError, match=r"1 unexpected: decoder\.extra"):
        recognise(names | {"decoder.extra": (3,)})
    with pytest.raises(WeightsError, match=r"1 of another shape: decoder\.conv_out\.conv\.bias is 4, not 3"):
        recognise(names | {"decoder.conv_out.conv.bias": (4,)})
    with pytest.raises(WeightsError, match=r"The nearest is tiny, .* 76 names; the names are its own"):
        recognise(shapes(PRESETS["tiny"]))
    prefixed = {name.replace("encoder.conv_in", "encoder.first"): shape for name, shape in names.items()}
    with pytest.raises(WeightsError, match=r"The nearest is osp-v1\.2"):
        recognise(prefixed)
    with pytest.raises(WeightsError, match=r"no model that is known here .* names: layer\.0"):
        recognise({"layer.0.weight": (3, 3)})
    with pytest.raises(WeightsError, match="there are none"):
        recognise({})


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("encoder.conv_in.weight", ()),
        ("encoder.conv_in.weight", (0, 3, 3, 3)),
        ("encoder.conv_in.weight", (2**40, 3, 3, 3)),
        ("post_quant_conv.conv.weight", (2**40, 4, 1, 1, 1)),
        ("post_quant_conv.conv.weight", (4,)),
        (f"encoder.down.{'9' * 5000}.downsample.conv.conv.weight", (32, 32, 3, 3, 3)),
        ("encoder.down.7.block.0.conv1.weight", (32, 32, 3, 3)),
    ],
)
def test_absurd_shapes_and_numbers_are_refused(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(WeightsError):
        recognise(shapes_of("osp_v1.1") | {name: shape})


def test_equal_names_and_shapes_have_no_differences() -> None:
    names = shapes_of("wfvae")
    assert differences(names, dict(reversed(names.items()))) == ""
    assert differences({"a": (), "b": (1,)}, {"a": (2, 3)}) == (
        "1 missing: b; 1 of another shape: a is 2x3, not a single value"
    )
    many = differences({str(i): (1,) for i in range(5)}, {})
    assert many == "5 missing: 0, 1, 2, ..."
