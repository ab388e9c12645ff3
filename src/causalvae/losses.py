"""What the reconstruction is worth, as a gradient at the reconstruction: the seam of a training step.

The autoencoder makes the reconstruction, `answer` returns d loss / d reconstruction and the terms, and the
trainer sends that gradient back through the autoencoder. Nothing here sees the autoencoder, so one forward
serves generator and critic, and a batch split in parts gets the update of the whole batch.

Scale: with P = 3 * h * w values per frame, the published total (a sum over a frame's values, mean over
frames) is P times ours, term by term:

    total = (pixel + perceptual_weight * perceptual) / exp(logvar) + logvar
            + kl_weight * kl + adaptive_weight * adversarial

kl, adaptive_weight and total are the published values divided by P; pixel, perceptual, adversarial and critic
are means there too, and equal.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, fields
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from causalvae.critics.patchgan import CriticNorm, PatchGAN2d, PatchGAN3d, reset
from causalvae.critics.regularisers import full_precision, gradient_penalty, lecam_anchors, lecam_distance
from causalvae.video import at_least_fp32

PixelKind = Literal["l1", "l2", "huber"]
CriticLoss = Literal["hinge", "vanilla"]
CriticKind = Literal["patchgan2d", "patchgan3d"]

ADAPTIVE_LIMIT = 1e4  # of the adaptive weight on the published scale, before disc_weight
ADAPTIVE_EPS = 1e-4  # added to the norm it divides by, as published

CRITICS = {"patchgan2d": PatchGAN2d, "patchgan3d": PatchGAN3d}


@dataclass(frozen=True, kw_only=True)
class LossPlan:
    """What the answer is made of; weights have their published meaning.

    perceptual: (recon, clip), each n 3 h w in [-1, 1] -> one value per frame, n 1 1 1.
    perceptual_frames: how many frames it is given at once, which bounds its memory.
    lecam_weight, r1_weight: of the critic's own regularisers, `critic_backward`.
    """

    kind: PixelKind = "l1"
    perceptual: Callable[[Tensor, Tensor], Tensor] | None = None
    perceptual_weight: float = 1.0
    perceptual_frames: int = 8
    kl_weight: float = 1e-6
    disc_weight: float = 0.5
    lecam_weight: float = 0.0
    r1_weight: float = 0.0


@dataclass(frozen=True, kw_only=True)
class LossTerms:
    """The terms of one step over the whole batch: detached scalars, fp32 or finer; None where not computed.

    kl, perceptual and adversarial are unweighted; adaptive_weight has disc_weight in it and multiplies
    adversarial in total. critic is the critic's own loss and no part of total; what begins with critic_ is
    from the same update, see CriticTerms.
    """

    pixel: Tensor
    kl: Tensor
    logvar: Tensor
    total: Tensor
    perceptual: Tensor | None = None
    adversarial: Tensor | None = None
    adaptive_weight: Tensor | None = None
    critic: Tensor | None = None
    critic_accuracy_real: Tensor | None = None
    critic_accuracy_fake: Tensor | None = None
    critic_logit_real: Tensor | None = None
    critic_logit_fake: Tensor | None = None
    critic_lecam: Tensor | None = None
    critic_r1: Tensor | None = None

    def numbers(self) -> dict[str, float]:
        """The terms that were computed, by name, for the log."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: float(value) for name, value in values.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class CriticTerms:
    """What the critic said in its own update, over the whole batch: detached scalars, named as in LossTerms.

    critic: its published loss, without regularisers. accuracy: share of logits on the right side of 0, which
    itself is wrong. logit: mean. lecam, r1: regularisers without their weights, None where not computed.
    """

    critic: Tensor
    critic_accuracy_real: Tensor
    critic_accuracy_fake: Tensor
    critic_logit_real: Tensor
    critic_logit_fake: Tensor
    critic_lecam: Tensor | None = None
    critic_r1: Tensor | None = None


@dataclass(frozen=True)
class Answer:
    """What the losses say to a reconstruction.

    recon: d total / d reconstruction, b 3 t h w, fp32 or finer. logvar: d total / d logvar, scalar.
    The kl term is in the total but not in these gradients: it goes back through the posterior (`kl_loss`).
    """

    recon: Tensor
    logvar: Tensor
    terms: LossTerms


def answer(
    recon: Tensor,
    clip: Tensor,
    *,
    kl: Tensor,
    logvar: Tensor,
    plan: LossPlan,
    critic: nn.Module | None,
    last_layer_grad: Callable[[Tensor], Tensor],
) -> Answer:
    """Terms of the whole batch and their gradient at the reconstruction.

    recon, clip: b 3 t h w in [-1, 1], real frames only. kl: `kl_loss` of the whole batch. logvar: scalar, log
    of the scale of an error. critic: None before disc_start or without one; its weights get no gradient here.
    last_layer_grad: maps a gradient at recon to that of the last layer's weight, averaged over ranks; asked
    only with a critic. No argument is changed, but for the running statistics of the critic.
    """
    leaf = at_least_fp32(recon.detach()).requires_grad_()
    clip, logvar, kl = at_least_fp32(clip), logvar.detach().clone(), kl.detach()
    error, pixel, perceptual = reconstruction_error(leaf, clip, plan=plan)
    nll = reconstruction_nll(error, logvar=logvar)
    (grad,) = torch.autograd.grad(nll, leaf)
    total = nll.detach() + plan.kl_weight * kl
    adversarial = weight = None
    if critic is not None:
        adversarial, adv_grad = judged(leaf, critic)
        pulls = last_layer_grad(grad), last_layer_grad(adv_grad)
        weight = plan.disc_weight * adaptive_weight(*pulls, limit=ADAPTIVE_LIMIT / clip[0, :, 0].numel())
        grad = grad + weight * adv_grad
        total = total + weight * adversarial
    terms = LossTerms(
        pixel=pixel,
        perceptual=perceptual,
        kl=kl,
        adversarial=adversarial,
        adaptive_weight=weight,
        logvar=logvar,
        total=total,
    )
    return Answer(recon=grad, logvar=1.0 - error.detach() * torch.exp(-logvar), terms=terms)


def reconstruction_error(
    leaf: Tensor, clip: Tensor, *, plan: LossPlan
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Mean error per value with its graph, and what it is made of, detached: pixel and perceptual terms."""
    pixel = pixel_loss(leaf, clip, kind=plan.kind)
    if plan.perceptual is None:
        return pixel, pixel.detach(), None
    perceptual = perceptual_loss(leaf, clip, metric=plan.perceptual, frames_at_once=plan.perceptual_frames)
    return pixel + plan.perceptual_weight * perceptual, pixel.detach(), perceptual.detach()


def judged(leaf: Tensor, critic: nn.Module) -> tuple[Tensor, Tensor]:
    """The adversarial term and its gradient at the reconstruction: a detached scalar, and b 3 t h w."""
    adversarial = generator_loss(critic(leaf))
    (grad,) = torch.autograd.grad(adversarial, leaf)  # at the leaf only: the critic's weights get none
    return adversarial.detach(), grad


def critic_backward(
    critic: nn.Module,
    clip: Tensor,
    recon: Tensor,
    *,
    kind: CriticLoss,
    averages: Tensor | None = None,
    lecam_weight: float = 0.0,
    r1_weight: float = 0.0,
) -> CriticTerms:
    """What the critic says of the whole batch; the gradient of its loss is added to that of its weights.

    clip, recon: b 3 t h w in [-1, 1]. Real and reconstruction are judged one after the other, as published,
    so that each has its own batch statistics; the graph of the first is gone before the second begins.
    averages: what `moved_averages` made of earlier batches; without any, LeCam has no anchors and no term.
    """
    of_real, of_fake = lecam_anchors(averages) if lecam_weight > 0 else (None, None)
    judge = partial(_judge, critic, kind=kind, lecam_weight=lecam_weight)
    real = judge(clip, real=True, anchor=of_fake, r1_weight=r1_weight)
    fake = judge(recon, real=False, anchor=of_real, r1_weight=0.0)
    return CriticTerms(
        critic=real.loss + fake.loss,
        critic_accuracy_real=real.accuracy,
        critic_accuracy_fake=fake.accuracy,
        critic_logit_real=real.logit,
        critic_logit_fake=fake.logit,
        critic_lecam=None if real.lecam is None or fake.lecam is None else real.lecam + fake.lecam,
        critic_r1=real.r1,
    )


@dataclass(frozen=True)
class _Verdict:
    """Half of CriticTerms: of clips, or of reconstructions."""

    loss: Tensor
    accuracy: Tensor
    logit: Tensor
    lecam: Tensor | None
    r1: Tensor | None


def _judge(
    critic: nn.Module,
    x: Tensor,
    *,
    kind: CriticLoss,
    real: bool,
    anchor: Tensor | None,
    lecam_weight: float,
    r1_weight: float,
) -> _Verdict:
    """One forward and backward of the critic. x: b 3 t h w. anchor: the average logit of the other kind."""
    x = at_least_fp32(x.detach()).requires_grad_(r1_weight > 0)
    with full_precision(critic) if r1_weight > 0 else nullcontext():
        logits = at_least_fp32(critic(x))
    objective = loss = verdict_loss(logits, kind=kind, real=real)
    lecam = r1 = None
    if anchor is not None:
        lecam = lecam_distance(logits, anchor)
        objective = objective + lecam_weight * lecam
    if r1_weight > 0:
        r1 = gradient_penalty(logits, x)
        objective = objective + 0.5 * r1_weight * r1
    objective.backward()
    said = logits.detach()
    return _Verdict(
        loss=loss.detach(),
        accuracy=((said > 0) if real else (said < 0)).to(said.dtype).mean(),
        logit=said.mean(),
        lecam=None if lecam is None else lecam.detach(),
        r1=None if r1 is None else r1.detach(),
    )


def build_critic(
    kind: CriticKind, *, base: int, norm: CriticNorm = "batch", ndf: int = 64, n_layers: int = 3
) -> PatchGAN2d | PatchGAN3d:
    """A critic in training mode on the CPU, with the initial weights of the key `base`."""
    with torch.device("meta"):
        critic = CRITICS[kind](ndf=ndf, n_layers=n_layers, norm=norm)
    critic = critic.to_empty(device="cpu")
    reset(critic, base)
    return critic.train()


def pixel_loss(recon: Tensor, clip: Tensor, *, kind: PixelKind) -> Tensor:
    """Mean error per value. recon, clip: b 3 t h w in [-1, 1]. huber: square / 2 below 1, linear above."""
    measures = {"l1": functional.l1_loss, "l2": functional.mse_loss, "huber": functional.huber_loss}
    return measures[kind](recon, clip)


def perceptual_loss(
    recon: Tensor, clip: Tensor, *, metric: Callable[[Tensor, Tensor], Tensor], frames_at_once: int
) -> Tensor:
    """Mean over frames of a perceptual metric. recon, clip: b 3 t h w in [-1, 1].

    The published code adds a frame's metric to the error of each of its values, so the means add up too.
    The metric judges each frame by itself, so its gradient is taken slice by slice and one slice's graph is
    alive at a time. The result has a first derivative at recon, and no second one.
    """
    pieces = [x.transpose(1, 2).flatten(0, 1).split(frames_at_once) for x in (recon.detach(), clip)]
    num_frames = recon.shape[0] * recon.shape[2]
    total, grads = recon.new_zeros(()), []
    for a, b in zip(*pieces, strict=True):  # n c h w
        if not recon.requires_grad:
            total = total + metric(a, b).sum() / num_frames
            continue
        a.requires_grad_()
        value = metric(a, b).sum() / num_frames
        grads.append(torch.autograd.grad(value, a)[0])
        total = total + value.detach()
    if not grads:
        return total
    grad = torch.cat(grads).unflatten(0, (recon.shape[0], -1)).transpose(1, 2)  # (b t) c h w -> b c t h w
    return total + (grad * (recon - recon.detach())).sum()  # adds 0, with the gradient that was found


def reconstruction_nll(error: Tensor, *, logvar: Tensor) -> Tensor:
    """Negative log likelihood per value of a mean error, up to a constant: error / exp(logvar) + logvar."""
    return error * torch.exp(-logvar) + logvar


def kl_loss(kl: Tensor, *, values_per_frame: int, num_clips: int) -> Tensor:
    """Mean over clips of the divergence per clip, divided by 3 * h * w as every published sum.

    kl: nats per clip, shape b, the clips of one part; num_clips: clips in the whole batch, so parts add up.
    """
    return kl.sum() / (num_clips * values_per_frame)


def generator_loss(logits_fake: Tensor) -> Tensor:
    """What the autoencoder pays for the critic's opinion of its reconstruction: minus the mean logit."""
    return -at_least_fp32(logits_fake).mean()


def critic_loss(logits_real: Tensor, logits_fake: Tensor, *, kind: CriticLoss) -> Tensor:
    """What the critic pays for mistakes.

    Hinge with margin 1, or vanilla (cross entropy), mean over patches.
    """
    return verdict_loss(logits_real, kind=kind, real=True) + verdict_loss(logits_fake, kind=kind, real=False)


def verdict_loss(logits: Tensor, *, kind: CriticLoss, real: bool) -> Tensor:
    """The half of critic_loss that comes from clips, or from reconstructions."""
    right = at_least_fp32(logits if real else -logits)
    return 0.5 * (torch.relu(1.0 - right) if kind == "hinge" else functional.softplus(-right)).mean()


def adaptive_weight(
    rec_grad: Tensor, adv_grad: Tensor, *, limit: float = ADAPTIVE_LIMIT, eps: float = ADAPTIVE_EPS
) -> Tensor:
    """Weight of the adversarial term that gives both terms an equal pull on the last layer.

    rec_grad, adv_grad: gradients of each term for the last layer's weight, whole batch, fp32.
    Returns a scalar in [0, limit], detached. Esser et al., Taming Transformers (2021), eq. 7.
    """
    rec_norm = torch.linalg.vector_norm(rec_grad.detach())
    adv_norm = torch.linalg.vector_norm(adv_grad.detach())
    return (rec_norm / (adv_norm + eps)).clamp(0.0, limit)
