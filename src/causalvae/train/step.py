"""One training step: the reconstruction is the seam. One autoencoder forward serves generator and critic.

The autoencoder makes the reconstruction, losses and critic answer with the gradient at it, and the
autoencoder takes that gradient back. A batch split in parts is reconstructed part by part without a graph,
answered whole, and run forward again with a graph, so that the update is that of the whole batch.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from causalvae.critics.regularisers import moved_averages
from causalvae.losses import (
    Answer,
    CriticLoss,
    CriticTerms,
    LossPlan,
    LossTerms,
    answer,
    critic_backward,
    kl_loss,
)
from causalvae.models.base import Posterior
from causalvae.models.build import Model
from causalvae.train.optim import LossScale, MasterWeights, clip_gradients, drop_gradients, unscale
from causalvae.train.state import TrainState
from causalvae.video import at_least_fp32, crop_frames, pad_frames

Clipping = Callable[[Iterable[nn.Parameter]], float]  # changes the gradients of a network, returns their norm


@dataclass(frozen=True)
class StepResult:
    """What a step did. Norms are before clipping, None where nothing was computed.

    applied: False when the autoencoder's gradient was not finite and nothing of it was updated.
    loss_scale, critic_loss_scale: those that were used, not those of the next step.
    """

    terms: LossTerms
    grad_norm: float | None
    critic_grad_norm: float | None
    applied: bool
    loss_scale: float | None = None
    critic_loss_scale: float | None = None

    @property
    def critic_stands(self) -> bool:
        """Whether the critic judged, and was not updated because its gradient was not finite."""
        return self.terms.critic is not None and self.critic_grad_norm is None


@dataclass(frozen=True)
class _Forward:
    """A batch that went through the autoencoder, in parts.

    recons: b 3 t h w, each with a graph to the last layer at least.
    """

    recons: list[Tensor]
    posteriors: list[Posterior]


def train_step(
    state: TrainState,
    clip: Tensor,
    noise: Tensor,
    *,
    loss: LossPlan,
    critic_loss: CriticLoss | None,
    parts: int = 1,
    clipping: Clipping = clip_gradients,
    ema_decay: float = 0.0,
) -> StepResult:
    """One update of the autoencoder, its average and the critic from one batch, at the rates that are set.

    clip: b 3 t h w in [-1, 1], any t >= 1. noise: standard normal, as the latent of the padded clip.
    critic_loss: None leaves the critic out, as before disc_start.
    parts: the batch goes through the autoencoder in this many pieces, one after the other.
    clipping: of the gradients of each network by itself; by default they are only measured.
    Raises step and cursor of the state as the result asks for.
    """
    critic = state.critic if critic_loss is not None else None
    x = pad_frames(clip, state.vae.geometry).chunk(parts)
    z = noise.chunk(parts)
    forward = _forward(state.vae, x, z, frames=clip.shape[2], graph=parts == 1)
    recon = torch.cat([part.detach() for part in forward.recons])
    answered = _answer(state, forward, recon, clip, loss=loss, critic=critic)
    state.cursor += 1
    norm, used = None, _value(state.scale)
    if bool(torch.isfinite(answered.terms.total)):
        _backward(state, forward, x, z, answered=answered, kl_weight=loss.kl_weight, like=clip)
        norm = _update(state, ema_decay=ema_decay, clipping=clipping)
    drop_gradients(state.optimizer)
    state.skipped = 0 if norm is not None else state.skipped + 1
    _follow(state.scale, finite=norm is not None)
    result = StepResult(answered.terms, norm, None, applied=norm is not None, loss_scale=used)
    if norm is None or critic is None or critic_loss is None:
        return result
    used = _value(state.critic_scale)
    judged, norm = _critic_update(state, critic, clip, recon, kind=critic_loss, loss=loss, clipping=clipping)
    terms = replace(answered.terms, **vars(judged))
    return replace(result, terms=terms, critic_grad_norm=norm, critic_loss_scale=used)


def _value(scale: LossScale | None) -> float | None:
    return scale.value if scale is not None else None


def _follow(scale: LossScale | None, *, finite: bool) -> None:
    if scale is not None:
        scale.follow(finite=finite)


def _forward(
    vae: Model, x: Sequence[Tensor], noise: Sequence[Tensor], *, frames: int, graph: bool
) -> _Forward:
    recons: list[Tensor] = []
    posteriors: list[Posterior] = []
    with nullcontext() if graph else _only_last_layer_learning(vae):
        for part, part_noise in zip(x, noise, strict=True):
            recon, posterior = vae(part, part_noise)
            recons.append(crop_frames(recon, frames))
            posteriors.append(posterior)
    return _Forward(recons, posteriors)


@contextmanager
def _only_last_layer_learning(vae: Model) -> Iterator[None]:
    """The graph starts at the last layer: only its input is kept, and its weight's gradient can be asked."""
    learning = [parameter for parameter in vae.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    vae.last_layer.get_parameter("weight").requires_grad_(True)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


def _answer(
    state: TrainState,
    forward: _Forward,
    recon: Tensor,
    clip: Tensor,
    *,
    loss: LossPlan,
    critic: nn.Module | None,
) -> Answer:
    weight = state.vae.last_layer.get_parameter("weight")
    parts, scale = len(forward.recons), state.scale.value if state.scale is not None else 1.0

    def last_layer_grad(grad: Tensor) -> Tensor:
        pairs = zip(forward.recons, (grad * scale).chunk(parts), strict=True)
        pieces = [
            torch.autograd.grad(part, weight, piece.to(part.dtype), retain_graph=True)[0]
            for part, piece in pairs
        ]
        return torch.stack([at_least_fp32(piece) for piece in pieces]).sum(dim=0) / scale

    per_clip = torch.cat([posterior.kl().detach() for posterior in forward.posteriors])
    kl = kl_loss(per_clip, values_per_frame=clip[0, :, 0].numel(), num_clips=len(clip))
    if not bool(torch.isfinite(recon).all()):
        critic = None  # it would take the non-finite values into its running statistics
    return answer(
        recon,
        clip,
        kl=kl,
        logvar=state.logvar,
        plan=loss,
        critic=critic,
        last_layer_grad=last_layer_grad,
        scale=scale,
    )


def _backward(
    state: TrainState,
    forward: _Forward,
    x: Sequence[Tensor],
    noise: Sequence[Tensor],
    *,
    answered: Answer,
    kl_weight: float,
    like: Tensor,
) -> None:
    """Gradients of every learning parameter, times the loss scale. like: the clip b 3 t h w, for sizes."""
    scale = state.scale.value if state.scale is not None else 1.0
    values, num_clips, frames = like[0, :, 0].numel(), len(like), like.shape[2]
    pieces = (answered.recon * scale).chunk(len(x))
    if len(x) > 1:
        forward.recons.clear()  # their graphs have answered: the last layer's inputs make room for the parts
    if state.logvar.requires_grad:
        state.logvar.grad = (answered.logvar * scale).to(state.logvar.dtype)
    for i in range(len(x)):
        if len(x) > 1:
            forward_again = _forward(state.vae, x[i : i + 1], noise[i : i + 1], frames=frames, graph=True)
            recon, posterior = forward_again.recons[0], forward_again.posteriors[0]
        else:
            recon, posterior = forward.recons[0], forward.posteriors[0]
        kl = kl_weight * kl_loss(posterior.kl(), values_per_frame=values, num_clips=num_clips)
        ends = [(recon, pieces[i].to(recon.dtype)), (kl, torch.full_like(kl, scale))]
        ends = [each for each in ends if each[0].requires_grad]  # kl has no graph if the encoder rests
        torch.autograd.backward([end for end, _ in ends], [grad for _, grad in ends])
    _forget_resting(state)


def _forget_resting(state: TrainState) -> None:
    """The last layer is always asked for its gradient, by the adaptive weight, though it may not learn."""
    weight, learning = state.vae.last_layer.get_parameter("weight"), dict(state.named_parameters())
    for name, parameter in state.vae.named_parameters():
        if parameter is weight and name not in learning:
            weight.grad = None


def _update(state: TrainState, *, ema_decay: float, clipping: Clipping) -> float | None:
    """Clip and apply the autoencoder's gradients and move the average; None if they are not finite."""
    params = [parameter for _, parameter in state.named_parameters()]
    _finish_gradients(params, state.masters, state.scale)
    norm = clipping(params)
    if not math.isfinite(norm):
        return None
    state.optimizer.step()
    if state.masters is not None:
        state.masters.publish()
    state.step += 1
    state.update_ema(ema_decay)
    return norm


def _finish_gradients(
    params: Sequence[nn.Parameter], masters: MasterWeights | None, scale: LossScale | None
) -> None:
    """What the backward pass left becomes the gradient of what the optimiser updates, without the scale."""
    if masters is not None:
        masters.take_gradients()
    unscale(params, scale)


def _critic_update(
    state: TrainState,
    critic: nn.Module,
    clip: Tensor,
    recon: Tensor,
    *,
    kind: CriticLoss,
    loss: LossPlan,
    clipping: Clipping,
) -> tuple[CriticTerms, float | None]:
    assert state.critic_optimizer is not None
    scale = state.critic_scale
    judged = critic_backward(
        critic,
        clip,
        recon,
        kind=kind,
        averages=state.lecam,
        lecam_weight=loss.lecam_weight,
        r1_weight=loss.r1_weight,
        scale=scale.value if scale is not None else 1.0,
    )
    params = state.critic_parameters()
    _finish_gradients(params, state.critic_masters, scale)
    norm = clipping(params)
    finite = math.isfinite(norm)
    if finite:
        state.critic_optimizer.step()
        if state.critic_masters is not None:
            state.critic_masters.publish()
        state.lecam = moved_averages(
            state.lecam, real=judged.critic_logit_real, fake=judged.critic_logit_fake
        )
    _follow(scale, finite=finite)
    drop_gradients(state.critic_optimizer)
    return judged, norm if finite else None
