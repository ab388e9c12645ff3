"""The Frechet distance of video features: known answers, the network's shapes, and which files are read."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy.linalg import sqrtm
from torch import Tensor

from causalvae.critics.i3d import CLASSES, I3D, same_padding
from causalvae.errors import ConfigError, WeightsError
from causalvae.files import sha256
from causalvae.frechet import (
    LEAST_CLIPS,
    FrechetParts,
    framed,
    frechet_distance,
    frechet_parts,
    read_i3d,
)
from causalvae.moments import Moments
from causalvae.rng import integers, key, normal


def moments(mean: list[float], covariance: Tensor, *, count: int = 500) -> Moments:
    return Moments(count, torch.tensor(mean, dtype=torch.float64), covariance.double() * (count - 1))


def weights() -> dict[str, Tensor]:
    """With the names and shapes of the published table, which has no counters."""
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in I3D().state_dict().items() if "num_batches" not in name}
    made = {}
    for name, shape in shapes.items():
        noise = normal(shape, key("i3d", name))
        made[name] = noise.abs() + 0.5 if "bn" in name else noise * (2 / max(1, shape[1:].numel())) ** 0.5
    return made


@pytest.fixture(scope="module")
def table() -> dict[str, Tensor]:
    return weights()


def test_the_distance_of_two_normal_distributions_with_independent_numbers() -> None:
    a = moments([0.0, 1.0], torch.diag(torch.tensor([4.0, 9.0])))
    b = moments([3.0, 1.0], torch.diag(torch.tensor([1.0, 16.0])))
    # 3^2 for the means, (2 - 1)^2 + (3 - 4)^2 for the deviations
    assert frechet_distance(a, b) == pytest.approx(11.0, abs=1e-10)
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-10)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), abs=1e-10)


def test_the_distance_is_the_published_formula_with_scipy() -> None:
    x = normal((600, 20), key("x")).double() @ normal((20, 20), key("mix")).double()
    y = 1.3 * x + 0.2 * normal((600, 20), key("y")).double()
    cov_x, cov_y = np.cov(x.numpy(), rowvar=False), np.cov(y.numpy(), rowvar=False)
    root = np.real(np.asarray(sqrtm(cov_x @ cov_y)))
    expected = float((x.mean(0) - y.mean(0)).square().sum()) + float(np.trace(cov_x + cov_y - 2 * root))
    assert frechet_distance(Moments.of(x), Moments.of(y)) == pytest.approx(expected, rel=1e-8)


def test_fewer_clips_than_the_covariance_needs_are_refused() -> None:
    rows = normal((LEAST_CLIPS, CLASSES), key("rows")).double()
    enough = FrechetParts(Moments.of(rows), Moments.of(rows + 1.0))
    assert enough.distance() == pytest.approx(CLASSES, rel=1e-6)
    few = FrechetParts(Moments.of(rows[1:]), Moments.of(rows[1:]))
    with pytest.raises(ConfigError, match=r"needs 401 clips or more.* there are 400"):
        few.distance()
    with pytest.raises(ConfigError, match="there are 0"):
        FrechetParts.none().distance()


def test_parts_of_a_set_add_up() -> None:
    rows = normal((900, CLASSES), key("rows")).double()
    whole = FrechetParts(Moments.of(rows[:450]), Moments.of(rows[450:])).distance()
    parts = FrechetParts.none()
    for i in range(0, 450, 90):
        part = FrechetParts(Moments.of(rows[i : i + 90]), Moments.of(rows[450 + i : 540 + i]))
        parts = parts.merged(part)
    assert parts.distance() == pytest.approx(whole, rel=1e-8)


def test_both_framings_are_one_for_square_clips_and_differ_for_wide_ones() -> None:
    square = integers((2, 100, 100, 3), n=256, base=key("square")).to(torch.uint8)
    assert torch.equal(framed(square, framing="crop"), framed(square, framing="stretch"))
    wide = torch.zeros(2, 112, 336, 3, dtype=torch.uint8)
    wide[:, :, 112:224] = 255  # the middle third is white
    assert framed(wide, framing="crop").shape == framed(wide, framing="stretch").shape == (3, 2, 224, 224)
    assert (
        float(framed(wide, framing="crop")[..., 1:-1].min()) == 1.0
    )  # 112 -> 224: the middle, less a border
    assert float(framed(wide, framing="stretch").mean()) == pytest.approx(-1 / 3, abs=1e-2)


def test_the_network_has_the_published_number_of_weights() -> None:
    with torch.device("meta"):
        network = I3D()
    assert len(network.state_dict()) == 344
    assert sum(parameter.numel() for parameter in network.parameters()) == 12_697_264


def test_padding_is_that_of_tensorflow() -> None:
    # 224 by stride 2, kernel 7: 5 in all, 2 before and 3 after; the last dimension comes first
    assert same_padding((9, 224, 8), kernel=(7, 7, 3), stride=(2, 2, 2)) == [0, 1, 2, 3, 3, 3]
    assert same_padding((4, 4, 4), kernel=(1, 1, 1), stride=(2, 2, 2)) == [0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_a_table_of_weights_is_read_from_its_formats(
    kind: str, table: dict[str, Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "any name"
    if kind == "safetensors":
        save_file(table, path)
    else:
        torch.save(table, path, _use_new_zipfile_serialization=kind == "zip")
    network, digest = read_i3d(path)
    assert digest == sha256(path)
    assert not network.training
    state = network.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in table.items())
    assert not any(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.slow
def test_features_of_a_clip_do_not_depend_on_other_clips(table: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(table, tmp_path / "i3d.pt")
    network, _ = read_i3d(tmp_path / "i3d.pt")
    clips = integers((2, 9, 40, 56, 3), n=256, base=key("clips")).to(torch.uint8)
    together = network(torch.stack([framed(clip, framing="crop") for clip in clips]))
    assert together.shape == (2, CLASSES)
    parts = frechet_parts(clips[0], clips[1], network=network, framing="crop")
    assert parts.clips.count == parts.recons.count == 1
    for row, part in zip(together, (parts.clips, parts.recons), strict=True):
        torch.testing.assert_close(row.double(), part.mean, rtol=1e-4, atol=1e-4)  # fp32, 27 layers
    assert not torch.allclose(together[0], together[1], rtol=1e-2)
    with pytest.raises(ConfigError, match="needs 9 frames or more of 224x224"):
        network(torch.zeros(1, 3, 8, 224, 224))


def test_what_is_not_the_network_is_refused_by_name(table: dict[str, Tensor], tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no such file"):
        read_i3d(tmp_path / "nothing.pt")
    path = tmp_path / "i3d.pt"
    other = {**table, "logits.conv3d.weight": torch.zeros(157, 1024, 1, 1, 1)}  # of another data set
    torch.save(other, path)
    with pytest.raises(WeightsError, match=r"1 of \d+ weights are missing .*: logits.conv3d.weight"):
        read_i3d(path)
    torch.save({**table, "logits.conv3d.bias": torch.full((CLASSES,), float("nan"))}, path)
    with pytest.raises(WeightsError, match=r"logits.conv3d.bias has values that are not finite"):
        read_i3d(path)
    path.write_bytes(b"PK\x03\x04 and nothing else")
    with pytest.raises(WeightsError):
        read_i3d(path)


def test_a_program_is_refused_and_not_run(tmp_path: Path) -> None:
    path = tmp_path / "i3d_torchscript.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch would rather have torch.export
        program = torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2))
        assert isinstance(program, torch.jit.ScriptModule)
        program.save(str(path))
    with pytest.raises(WeightsError, match="TorchScript file is a program, and none is run here"):
        read_i3d(path)
