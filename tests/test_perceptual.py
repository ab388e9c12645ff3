"""Perceptual networks: known answers, and laws of their distances and gradients."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from networks import BACKBONES, efficientnet, film, frames, network_of, weights_of
from torch import Tensor
from torch.nn import functional

from causalvae.critics.efficientnet import EfficientNetLite0
from causalvae.critics.lpips import FeatureDistance, LpipsBackbone
from causalvae.errors import ConfigError
from causalvae.losses import perceptual_loss
from causalvae.perceptual import Perceptual
from causalvae.rng import key, normal

LAW = 1e-12  # float64, relative


@pytest.fixture(scope="module")
def judge() -> Perceptual:
    return efficientnet()


def vgg_by_hand(x: Tensor, w: dict[str, Tensor]) -> list[Tensor]:
    found: list[Tensor] = []
    for i in (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28):
        if i in (5, 10, 17, 24):
            x = functional.max_pool2d(x, 2)
        x = functional.conv2d(x, w[f"features.{i}.weight"], w[f"features.{i}.bias"], padding=1).clamp(min=0)
        if i in (2, 7, 14, 21, 28):
            found.append(x)
    return found


def alex_by_hand(x: Tensor, w: dict[str, Tensor]) -> list[Tensor]:
    found: list[Tensor] = []
    for i, stride, padding in ((0, 4, 2), (3, 1, 2), (6, 1, 1), (8, 1, 1), (10, 1, 1)):
        if i in (3, 6):
            x = functional.max_pool2d(x, 3, 2)
        x = functional.conv2d(x, w[f"features.{i}.weight"], w[f"features.{i}.bias"], stride, padding).clamp(
            min=0
        )
        found.append(x)
    return found


def squeeze_by_hand(x: Tensor, w: dict[str, Tensor]) -> list[Tensor]:
    def conv(x: Tensor, name: str, *, stride: int = 1, padding: int = 0) -> Tensor:
        return functional.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], stride, padding).clamp(min=0)

    x = conv(x, "features.0", stride=2)
    found = [x]
    for i in (3, 4, 6, 7, 9, 10, 11, 12):
        if i in (3, 6, 9):
            x = functional.max_pool2d(x, 3, 2, ceil_mode=True)
        x = conv(x, f"features.{i}.squeeze")
        halves = conv(x, f"features.{i}.expand1x1"), conv(x, f"features.{i}.expand3x3", padding=1)
        x = torch.cat(halves, dim=1)
        if i in (4, 7, 9, 10, 11, 12):
            found.append(x)
    return found


BY_HAND: dict[LpipsBackbone, Callable[[Tensor, dict[str, Tensor]], list[Tensor]]] = {
    "vgg": vgg_by_hand, "alex": alex_by_hand, "squeeze": squeeze_by_hand
}  # fmt: skip


def lpips_by_hand(a: Tensor, b: Tensor, backbone: LpipsBackbone) -> np.ndarray:
    """The published formula in its order: weights, then mean over positions, then sum over stages."""
    w = {name: t.double() for name, t in weights_of(backbone).items()}
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    maps = [
        BY_HAND[backbone]((x - shift.view(3, 1, 1)) / scale.view(3, 1, 1), w) for x in (a, b)
    ]  # the constants of the published module are fp32
    total = np.zeros(len(a))
    for i, (f, g) in enumerate(zip(*maps, strict=True)):
        units = [m.numpy() / (np.sqrt((m.numpy() ** 2).sum(1, keepdims=True)) + 1e-10) for m in (f, g)]
        weight = w[f"lin{i}.model.1.weight"].numpy()[0]  # c 1 1
        total += ((units[0] - units[1]) ** 2 * weight).sum(1).mean((1, 2))
    return total


@pytest.mark.parametrize("backbone", BACKBONES)
def test_lpips_is_the_published_formula(backbone: LpipsBackbone) -> None:
    a, b = frames(2, size=(33, 40)), frames(2, size=(33, 40), seed=1)
    found = network_of(backbone)(a, b)
    assert found.shape == (2, 1, 1, 1)
    np.testing.assert_allclose(found.flatten(), lpips_by_hand(a, b, backbone), rtol=1e-10)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_lpips_is_zero_for_the_same_symmetric_and_looks_at_each_frame_alone(backbone: LpipsBackbone) -> None:
    network, a, b = network_of(backbone), frames(3), frames(3, seed=1)
    assert torch.equal(network(a, a), torch.zeros(3, 1, 1, 1, dtype=torch.float64))
    torch.testing.assert_close(network(a, b), network(b, a), rtol=LAW, atol=0)
    torch.testing.assert_close(network(a.flip(0), b.flip(0)), network(a, b).flip(0), rtol=LAW, atol=0)
    assert network(a, b).min() > 0


@pytest.mark.parametrize("backbone", BACKBONES)
def test_frames_may_be_as_small_as_is_said_and_not_smaller(backbone: LpipsBackbone) -> None:
    network = network_of(backbone)
    side = network.smallest_side
    assert network(frames(1, size=(side, side)), frames(1, size=(side, side), seed=1)).item() > 0
    with pytest.raises(ConfigError, match=f"needs {side}x{side}; use a larger --resolution"):
        network(frames(1, size=(side - 1, 40)), frames(1, size=(side - 1, 40)))


def test_the_gradient_of_lpips_is_its_derivative() -> None:
    network, a, b = network_of("alex"), frames(1, size=(31, 33)), frames(1, size=(31, 33), seed=1)
    assert torch.autograd.gradcheck(lambda x: network(x, b), a.requires_grad_(), fast_mode=True)


def test_flat_frames_have_finite_gradients_and_weights_have_none(judge: Perceptual) -> None:
    dark = torch.full((1, 3, 32, 32), -1.0)
    for network in (network_of("vgg", torch.float32), judge.module):
        for recon in (
            dark.clone(),
            torch.zeros(1, 3, 32, 32),
            dark + 1e-3 * frames(1, size=(32, 32)).float(),
        ):
            network(recon.requires_grad_(), dark).sum().backward()
            assert recon.grad is not None
            assert bool(torch.isfinite(recon.grad).all())
        assert all(p.grad is None and not p.requires_grad for p in network.parameters())


def test_the_clip_gets_no_graph(judge: Perceptual) -> None:
    recon, clip = frames(1).float().requires_grad_(), frames(1, seed=1).float().requires_grad_()
    for network in (network_of("squeeze", torch.float32), judge.module):
        grads = torch.autograd.grad(network(recon, clip).sum(), (recon, clip), allow_unused=True)
        assert grads[0].abs().sum() > 0
        assert grads[1] is None


@pytest.mark.parametrize("at_once", [1, 2, 4, 5, 6, 100])
def test_slices_of_any_size_give_the_loss_and_gradient_of_the_whole(at_once: int) -> None:
    network = network_of("alex")
    recon, clip = (x.unflatten(0, (2, 3)).transpose(1, 2) for x in (frames(6), frames(6, seed=1)))
    recon.requires_grad_()
    whole = network(*(x.transpose(1, 2).flatten(0, 1) for x in (recon, clip))).mean()
    loss = perceptual_loss(recon, clip, metric=network, frames_at_once=at_once)
    torch.testing.assert_close(loss, whole, rtol=LAW, atol=0)
    wanted, found = (torch.autograd.grad(3 * value, recon)[0] for value in (whole, loss))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=LAW * float(wanted.abs().max()))
    unasked = perceptual_loss(recon.detach(), clip, metric=network, frames_at_once=at_once)
    assert torch.equal(unasked, loss)
    assert not unasked.requires_grad


def test_efficientnet_feels_noise_and_blur_in_their_order(judge: Perceptual) -> None:
    clip = film(numbers=range(1), size=96)
    noise = normal(clip.shape, key("noise"))
    noisy = [clip + sd * noise for sd in (0.0, 0.02, 0.05, 0.1, 0.2)]
    blurred = [functional.avg_pool2d(clip, k, 1, k // 2, count_include_pad=False) for k in (1, 3, 5, 9, 15)]
    for worse in (noisy, blurred):
        distances = [judge.module(recon, clip).item() for recon in worse]
        assert distances[0] == 0
        assert all(b > 1.2 * a for a, b in itertools.pairwise(distances)), distances


def test_efficientnet_is_given_the_range_that_it_was_trained_on(judge: Perceptual) -> None:
    """The stem's statistics on real frames are near those of the training, and not in the other range."""
    network = judge.module
    assert isinstance(network, FeatureDistance)
    stem, norm = network.backbone.get_submodule("_conv_stem"), network.backbone.get_submodule("_bn0")
    clip = film(numbers=range(1), size=224)
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
    spread = [
        (stem(x).var((0, 2, 3)) / norm.get_buffer("running_var")).log().abs().median().item()
        for x in (clip, (clip * 0.5 + 0.5 - mean) / std)
    ]
    assert spread[0] < 0.5 < 1.0 < spread[1]


def test_efficientnet_pads_as_the_framework_it_was_trained_in() -> None:
    network = EfficientNetLite0()
    network.load_state_dict({n: torch.zeros_like(t) for n, t in network.state_dict().items()})
    sizes = [tuple(h.shape[1:]) for h in network(torch.zeros(1, 3, 65, 32))]
    assert sizes == [(24, 17, 8), (40, 9, 4), (112, 5, 2), (320, 3, 1)]
    stem = network.get_submodule("_conv_stem")
    stem.get_parameter("weight").fill_(1.0)
    assert torch.equal(stem(torch.ones(1, 3, 4, 4))[0, 0], torch.tensor([[27.0, 18.0], [18.0, 12.0]]))
