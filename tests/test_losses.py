"""Loss terms, adaptive weight and gradients equal those of the published trainers, divided by 3 * h * w."""

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from fixtures import fixture_tensors, loss_cases, under
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.grad import conv3d_weight

from causalvae.critics.patchgan import PatchGAN2d, PatchGAN3d
from causalvae.losses import (
    Answer,
    LossPlan,
    adaptive_weight,
    answer,
    build_critic,
    critic_backward,
    critic_loss,
    generator_loss,
    kl_loss,
    pixel_loss,
    reconstruction_nll,
)
from causalvae.models.base import Posterior
from causalvae.rng import normal

VERSIONS = ["v1.0", "v1.1", "v1.2", "wfvae"]
ADAPTIVE = {"wfvae": (1e6, 1e-6)}  # clamp and eps where they are not ours, 1e4 and 1e-4
ZERO = torch.tensor(0.0)
P = 3 * 32 * 32  # values per frame of the fixtures
TIGHT = 1e-5  # relative, fp32; measured 2e-6
WEIGHT = 1e-4  # relative, of the adaptive weight; measured 1e-6


@dataclass(frozen=True)
class Scene:
    """One published case with what it was computed from."""

    version: str
    case: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def values(self) -> dict[str, Any]:
        return self.case["values"]

    @property
    def active(self) -> bool:
        return self.case["global_step"] >= self.case["init"]["disc_start"]

    @property
    def recon(self) -> Tensor:
        weight, bias = self.tensors["last_layer.weight"], self.tensors["last_layer.bias"]
        return functional.conv3d(self.tensors["features"], weight, bias)

    def last_layer_grad(self, grad: Tensor) -> Tensor:
        shape = self.tensors["last_layer.weight"].shape
        return conv3d_weight(self.tensors["features"], shape, grad)

    def plan(self) -> LossPlan:
        init = self.case["init"]
        weight = init["perceptual_weight"]
        return LossPlan(
            kind=init.get("loss_type", "l1"),
            perceptual=squared_difference if weight else None,
            perceptual_weight=weight,
            kl_weight=init["kl_weight"],
            disc_weight=init["disc_weight"],
        )

    def critic(self) -> nn.Module:
        name = self.case["discriminator"]
        weights = under(self.tensors, f"{name}.")
        network = {"disc2d": PatchGAN2d, "disc3d": PatchGAN3d}[name](ndf=8)
        if self.version == "wfvae":
            weights = without_dropout(weights)
        network.load_state_dict(weights, strict=True)
        return network

    def answer(self) -> Answer:
        kl = Posterior.of_moments(self.tensors["moments"]).kl()
        return answer(
            self.recon,
            self.tensors["inputs"],
            kl=kl_loss(kl, values_per_frame=P, num_clips=2),
            logvar=torch.tensor(self.case["init"]["logvar_init"]),
            plan=self.plan(),
            critic=self.critic() if self.active else None,
            last_layer_grad=self.last_layer_grad,
        )


def squared_difference(a: Tensor, b: Tensor) -> Tensor:
    """The perceptual metric of the fixtures: (b t) 3 h w -> (b t) 1 1 1."""
    return (a - b).square().mean(dim=(1, 2, 3), keepdim=True)


def without_dropout(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """WF-VAE's critic under the indices of one without dropout: each dropout layer moves the next by one."""
    layers = {0: 0, 2: 2, 3: 3, 6: 5, 7: 6, 10: 8, 11: 9, 14: 11}
    moved: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        main, index, rest = name.split(".", 2)
        moved[f"{main}.{layers[int(index)]}.{rest}"] = tensor
    return moved


def scenes(*, optimizer_idx: int) -> list[Any]:
    params: list[Any] = []
    for version in VERSIONS:
        tensors = fixture_tensors(f"losses/{version}")
        for case in loss_cases(version):
            if case["optimizer_idx"] == optimizer_idx:
                params.append(pytest.param(Scene(version, case, tensors), id=f"{version}-{case['name']}"))
    return params


@pytest.mark.parametrize("scene", scenes(optimizer_idx=0))
def test_every_term_of_the_generator_is_the_published_one_over_values_per_frame(scene: Scene) -> None:
    terms, values = scene.answer().terms.numbers(), scene.values
    perceptual = scene.case["init"]["perceptual_weight"] * terms.get("perceptual", 0.0)
    error = terms["pixel"] + perceptual
    nll = error / math.exp(terms["logvar"]) + terms["logvar"]
    rec = nll * P if scene.version == "wfvae" else error  # what it logs as rec_loss
    total_tolerance = 1e-4 if scene.version in ADAPTIVE else TIGHT  # their eps changes it by 8e-5
    assert terms["total"] * P == pytest.approx(values["total_loss"], rel=total_tolerance)
    assert terms["kl"] * P == pytest.approx(values["kl_loss"], rel=TIGHT)
    assert nll * P == pytest.approx(values["nll_loss"], rel=TIGHT)
    assert rec == pytest.approx(values["rec_loss"], rel=TIGHT)
    assert terms["logvar"] == pytest.approx(values["logvar"], rel=TIGHT)
    assert ("adversarial" in terms) == scene.active
    if scene.active:
        assert terms["adversarial"] == pytest.approx(values["g_loss"], rel=TIGHT)


@pytest.mark.parametrize("scene", scenes(optimizer_idx=0))
def test_adaptive_weight_is_the_published_one_over_values_per_frame(scene: Scene) -> None:
    terms = scene.answer().terms
    if not scene.active:
        assert terms.adaptive_weight is None
        return
    nll_grad, adv_grad = separate_gradients(scene)
    limit, eps = ADAPTIVE.get(scene.version, (1e4, 1e-4))
    pulls = scene.last_layer_grad(nll_grad), scene.last_layer_grad(adv_grad)
    weight = scene.plan().disc_weight * adaptive_weight(*pulls, limit=limit, eps=eps)
    assert weight.item() == pytest.approx(scene.values["d_weight"], rel=WEIGHT)
    assert terms.adaptive_weight is not None
    if scene.version not in ADAPTIVE:
        assert terms.adaptive_weight.item() * P == pytest.approx(scene.values["d_weight"], rel=WEIGHT)


@pytest.mark.parametrize("scene", scenes(optimizer_idx=0))
def test_gradient_at_the_reconstruction_is_the_published_one_over_values_per_frame(scene: Scene) -> None:
    """Their `.grad` also holds what two calls for the adaptive weight left there: fixtures/README.md."""
    tolerance = 1e-3 if scene.version in ADAPTIVE else TIGHT  # their eps changes the weight by 6e-4
    expected = scene.tensors[f"{scene.case['name']}.grad_recon"]
    if scene.active or scene.version in ("v1.0", "v1.1"):
        nll_grad, adv_grad = separate_gradients(scene)
        expected = expected - nll_grad - adv_grad
    ours = scene.answer().recon
    assert (ours * P - expected).norm() < tolerance * expected.norm()
    norm = scene.last_layer_grad(ours).norm().item()
    assert norm * P == pytest.approx(scene.values["grad_last_layer_norm"], rel=tolerance)


def separate_gradients(scene: Scene) -> tuple[Tensor, Tensor]:
    """Gradients at the reconstruction of the published nll (summed over a frame) and adversarial term."""
    leaf, clip, plan = scene.recon.requires_grad_(), scene.tensors["inputs"], scene.plan()
    error = pixel_loss(leaf, clip, kind=plan.kind)
    if plan.perceptual is not None:
        error = error + plan.perceptual_weight * squared_difference(leaf, clip).mean()
    logvar = torch.tensor(scene.case["init"]["logvar_init"])
    nll = P * reconstruction_nll(error, logvar=logvar)
    adversarial = generator_loss(scene.critic()(leaf))
    return torch.autograd.grad(nll, leaf)[0], torch.autograd.grad(adversarial, leaf)[0]


@pytest.mark.parametrize("scene", scenes(optimizer_idx=1))
def test_critic_loss_and_its_gradient_are_the_published_ones(scene: Scene) -> None:
    if not scene.active:  # published: computed and multiplied by 0; ours: the critic is not asked
        assert scene.values["disc_loss"] == 0.0
        return
    critic = scene.critic()
    kind = scene.case["init"].get("disc_loss", "hinge")
    loss = critic_backward(critic, scene.tensors["inputs"], scene.recon, kind=kind).critic
    assert loss.item() == pytest.approx(scene.values["disc_loss"], rel=TIGHT)
    grads = [p.grad for p in critic.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads).item()
    assert norm == pytest.approx(scene.values["grad_disc_norm"], rel=TIGHT)


def tiny(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, nn.Module, nn.Conv3d]:
    """Features b 4 t h w, clip b 3 t h w, a critic and a last layer."""
    last = nn.Conv3d(4, 3, 3, padding=1, bias=False).to(dtype)
    with torch.no_grad():
        last.weight.copy_(0.2 * normal(last.weight.shape, 3))
    critic = build_critic("patchgan3d", base=1, ndf=8).to(dtype)
    with torch.no_grad():
        for p in critic.parameters():  # larger than first weights, for gradients of a common size
            p.mul_(5.0 if p.ndim > 1 else 1.0)
    return normal((2, 4, 5, 16, 16), 1).to(dtype), normal((2, 3, 5, 16, 16), 2).to(dtype), critic, last


def test_answer_sent_back_equals_the_gradient_of_the_whole_loss_written_plainly() -> None:
    features, clip, critic, last = tiny()
    plan = LossPlan(kind="l2", perceptual=squared_difference, perceptual_weight=0.5, disc_weight=0.8)
    logvar = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    recon = last(features)
    frame = clip[0, :, 0].numel()
    error = (recon - clip).square().mean() + 0.5 * squared_difference(recon, clip).mean()
    nll = error / logvar.exp() + logvar
    adversarial = -critic(recon).mean()
    pulls = [torch.autograd.grad(term, last.weight, retain_graph=True)[0] for term in (nll, adversarial)]
    weight = 0.8 * (frame * pulls[0]).norm() / (pulls[1].norm() + 1e-4) / frame
    total = nll + weight.detach() * adversarial
    expected, expected_logvar = torch.autograd.grad(total, [last.weight, logvar])

    def last_layer_grad(grad: Tensor) -> Tensor:
        return conv3d_weight(features, last.weight.shape, grad, padding=1)

    ours = answer(
        last(features),
        clip,
        kl=torch.tensor(0.0, dtype=torch.float64),
        logvar=logvar,
        plan=plan,
        critic=critic,
        last_layer_grad=last_layer_grad,
    )
    torch.testing.assert_close(last_layer_grad(ours.recon), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(ours.logvar, expected_logvar, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(ours.terms.total, total.detach(), rtol=1e-10, atol=1e-12)


def plain_answer(
    recon: Tensor, clip: Tensor, *, critic: nn.Module | None = None, logvar: Tensor = ZERO
) -> Answer:
    """Answer with default weights and the reconstruction itself as the last layer."""
    return answer(
        recon,
        clip,
        kl=ZERO,
        logvar=logvar,
        plan=LossPlan(),
        critic=critic,
        last_layer_grad=lambda grad: grad,
    )


def test_answer_leaves_arguments_and_gradients_of_the_critic_alone() -> None:
    features, clip, critic, last = tiny(torch.float32)
    recon = last(features)
    before = recon.detach().clone(), clip.clone()
    ours = plain_answer(recon, clip, critic=critic)
    assert torch.equal(recon, before[0])
    assert torch.equal(clip, before[1])
    assert recon.requires_grad
    assert not ours.recon.requires_grad
    assert all(p.grad is None and p.requires_grad for p in critic.parameters())
    assert last.weight.grad is None
    terms = ours.terms
    scalars = [terms.pixel, terms.kl, terms.logvar, terms.total, terms.adversarial, terms.adaptive_weight]
    assert all(x is not None and not x.requires_grad and x.ndim == 0 for x in scalars)


def test_terms_keep_the_logvar_of_their_step() -> None:
    _, clip, _, _ = tiny(torch.float32)
    logvar = nn.Parameter(torch.tensor(0.25))
    terms = plain_answer(clip * 0.5, clip, logvar=logvar).terms
    logvar.data.add_(1.0)
    assert terms.numbers()["logvar"] == 0.25


def test_terms_that_were_not_computed_are_absent() -> None:
    _, clip, _, _ = tiny(torch.float32)
    assert set(plain_answer(clip * 0.5, clip).terms.numbers()) == {"pixel", "kl", "logvar", "total"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_reconstructions_are_answered_in_fp32(dtype: torch.dtype) -> None:
    _, clip, _, _ = tiny(torch.float32)
    ours = plain_answer((0.5 * clip).to(dtype), clip)
    assert ours.recon.dtype == ours.terms.total.dtype == torch.float32


def test_kl_of_parts_adds_up_to_the_kl_of_the_batch() -> None:
    kl = normal((6,), 1).double().square()
    parts = sum(kl_loss(part, values_per_frame=P, num_clips=6) for part in kl.split(2))
    whole = kl_loss(kl, values_per_frame=P, num_clips=6)
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(whole, kl.mean() / P, rtol=1e-12, atol=0.0)


def test_pixel_losses_of_a_known_difference() -> None:
    clip = torch.zeros(1, 3, 1, 2, 2)
    small, large = torch.full_like(clip, 0.5), torch.full_like(clip, -1.5)
    assert pixel_loss(small, clip, kind="l1").item() == 0.5
    assert pixel_loss(small, clip, kind="l2").item() == 0.25
    assert pixel_loss(small, clip, kind="huber").item() == 0.125
    assert pixel_loss(large, clip, kind="huber").item() == 1.0


def test_critic_losses_of_known_logits() -> None:
    real, fake = torch.tensor([2.0, 0.0]), torch.tensor([-2.0, 1.0])
    assert critic_loss(real, fake, kind="hinge").item() == 0.5 * (0.5 + 1.0)
    undecided = torch.zeros(3)
    assert critic_loss(undecided, undecided, kind="hinge").item() == 1.0
    assert critic_loss(undecided, undecided, kind="vanilla").item() == pytest.approx(math.log(2.0))
    assert generator_loss(torch.tensor([1.0, -3.0])).item() == 1.0


def test_adaptive_weight_is_a_ratio_of_norms_within_its_limit() -> None:
    three, four = torch.tensor([3.0]), torch.tensor([0.0, 4.0])
    assert adaptive_weight(four, three, eps=0.0).item() == pytest.approx(4 / 3)
    assert adaptive_weight(four, torch.zeros(2)).item() == 1e4
    assert adaptive_weight(torch.zeros(2), four).item() == 0.0
    assert adaptive_weight(four, three, limit=0.5).item() == 0.5


def test_limit_of_the_adaptive_weight_is_on_the_published_scale() -> None:
    _, clip, critic, _ = tiny()
    for p in critic.parameters():
        p.data.mul_(0.0 if p.ndim > 1 else 1.0)  # a critic that does not care: the ratio reaches its limit
    terms = plain_answer(clip * 0.5, clip, critic=critic).terms
    assert terms.adaptive_weight is not None
    assert terms.adaptive_weight.item() == pytest.approx(0.5 * 1e4 / (3 * 16 * 16))


def test_a_reconstruction_that_is_not_finite_gives_an_answer_that_is_not() -> None:
    _, clip, critic, _ = tiny(torch.float32)
    recon = clip.clone()
    recon[0, 0, 0, 0, 0] = torch.nan
    ours = plain_answer(recon, clip, critic=critic)
    assert not ours.terms.total.isfinite()
    assert not ours.recon.isfinite().all()
