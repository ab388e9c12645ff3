"""Critics equal the published ones, and their first weights depend on the key alone."""

import pytest
import torch
from fixtures import fixture_json, fixture_tensors, under

from causalvae.critics.patchgan import CriticNorm, PatchGAN2d, PatchGAN3d, reset
from causalvae.errors import ConfigError
from causalvae.losses import CriticKind, build_critic
from causalvae.rng import normal

FOLDERS = ["disc2d", "disc3d", "disc3d_n4"]
TOLERANCE = 1e-5  # fp32 on the CPU, logits are of order 1


def published(folder: str) -> PatchGAN2d | PatchGAN3d:
    config = fixture_json(f"{folder}/config")
    network = {"2d": PatchGAN2d, "3d": PatchGAN3d}[config["kind"]]
    critic = network(ndf=config["ndf"], n_layers=config["n_layers"])
    critic.load_state_dict(fixture_tensors(f"{folder}/weights"), strict=True)
    return critic


def as_clips(x: torch.Tensor) -> torch.Tensor:
    """Images of the 2D fixture as clips of one frame."""
    return x.unsqueeze(2) if x.ndim == 4 else x


@pytest.mark.parametrize("folder", FOLDERS)
def test_published_critic_weights_give_published_logits(folder: str) -> None:
    critic, io = published(folder), fixture_tensors(f"{folder}/io")
    clip = as_clips(io["x"])
    with torch.no_grad():
        torch.testing.assert_close(critic.eval()(clip), io["logits_eval"], rtol=0.0, atol=TOLERANCE)
        torch.testing.assert_close(critic.train()(clip), io["logits_train"], rtol=0.0, atol=TOLERANCE)


@pytest.mark.parametrize("folder", FOLDERS)
def test_running_statistics_after_a_training_forward_equal_the_published_ones(folder: str) -> None:
    critic, io = published(folder), fixture_tensors(f"{folder}/io")
    critic.train()(as_clips(io["x"]))
    after = under(io, "after.")
    assert after
    state = critic.state_dict()
    for name, expected in after.items():
        torch.testing.assert_close(state[name], expected, rtol=0.0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("kind", "n_layers", "trainable", "stored"),
    [
        ("patchgan2d", 3, 2_765_633, 2_767_428),
        ("patchgan3d", 3, 4_665_729, 4_667_524),
        ("patchgan3d", 4, 11_744_641, 11_747_461),
    ],
)
def test_full_size_critics_have_the_published_number_of_values(
    kind: CriticKind, n_layers: int, trainable: int, stored: int
) -> None:
    critic = build_critic(kind, base=0, n_layers=n_layers)
    assert sum(p.numel() for p in critic.parameters()) == trainable
    assert sum(tensor.numel() for tensor in critic.state_dict().values()) == stored


def test_frames_are_judged_one_by_one_by_the_2d_critic() -> None:
    critic = build_critic("patchgan2d", base=0, norm="group", ndf=8)
    clip = normal((2, 3, 3, 32, 32), 1)
    frame = critic(clip[1:, :, 2:])
    torch.testing.assert_close(critic(clip)[-1:], frame, rtol=0.0, atol=TOLERANCE)


def test_group_norm_judges_a_clip_the_same_beside_any_neighbour() -> None:
    critic = build_critic("patchgan3d", base=0, norm="group", ndf=8)
    clip = normal((2, 3, 5, 32, 32), 1)
    torch.testing.assert_close(critic(clip)[:1], critic(clip[:1]), rtol=0.0, atol=TOLERANCE)


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
@pytest.mark.parametrize("kind", ["patchgan2d", "patchgan3d"])
def test_convolutions_sit_at_the_same_keys_whatever_the_norm(kind: CriticKind, norm: CriticNorm) -> None:
    critic = build_critic(kind, base=0, norm=norm, ndf=8)
    kernels = {name for name, p in critic.named_parameters() if p.ndim > 1}
    assert kernels == {f"main.{i}.weight" for i in (0, 2, 5, 8, 11)}
    biased = {name for name in critic.state_dict() if name.endswith(".bias")}
    norms = {"batch": (3, 6, 9), "group": (3, 6, 9), "none": (2, 5, 8)}[norm]
    assert biased == {f"main.{i}.bias" for i in (0, *norms, 11)}


def test_first_weights_depend_on_the_key_and_on_nothing_drawn_before() -> None:
    one = build_critic("patchgan3d", base=7, ndf=8).state_dict()
    state = torch.get_rng_state()
    two = build_critic("patchgan3d", base=7, ndf=8).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    other = build_critic("patchgan3d", base=8, ndf=8).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["main.0.weight"], other["main.0.weight"])


def test_first_weights_have_the_published_spread_and_no_bias() -> None:
    critic = build_critic("patchgan2d", base=0)
    for name, p in critic.named_parameters():
        if name.endswith(".bias"):
            assert not p.any()
        else:
            assert p.mean().item() == pytest.approx(1.0 if p.ndim == 1 else 0.0, abs=0.01)
            assert p.std().item() == pytest.approx(0.02, rel=0.15)


def test_reset_forgets_running_statistics() -> None:
    critic = build_critic("patchgan3d", base=3, ndf=8)
    fresh = {name: tensor.clone() for name, tensor in critic.state_dict().items()}
    critic(normal((1, 3, 5, 32, 32), 1))
    assert not torch.equal(fresh["main.3.running_mean"], critic.state_dict()["main.3.running_mean"])
    reset(critic, 3)
    assert all(torch.equal(fresh[name], tensor) for name, tensor in critic.state_dict().items())


def test_images_and_odd_clips_are_judged_by_the_3d_critic() -> None:
    critic = build_critic("patchgan3d", base=0, ndf=8)
    assert critic(normal((2, 3, 1, 24, 40), 1)).shape == (2, 1, 1, 3, 5)
    assert critic(normal((1, 3, 17, 32, 32), 1)).shape == (1, 1, 5, 4, 4)


def test_smallest_frame_of_the_2d_critic_works_and_a_smaller_one_is_refused() -> None:
    critic = build_critic("patchgan2d", base=0, norm="none", ndf=8)
    assert critic(normal((1, 3, 2, 24, 24), 1)).shape == (2, 1, 1, 1)
    with pytest.raises(ConfigError, match="16x64 are too small for the 2D critic, which needs 24x24"):
        critic(normal((1, 3, 1, 16, 64), 1))


def test_a_new_critic_is_in_training_mode() -> None:
    assert all(module.training for module in build_critic("patchgan3d", base=0, ndf=8).modules())
