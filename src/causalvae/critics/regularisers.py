"""What keeps a critic in bounds: LeCam, by its opinions of earlier batches, and R1, by its slope at clips.

Both are added to the critic's own loss, none to what the autoencoder pays. Weights are applied by the caller.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from causalvae.models.convolution import Conv

LECAM_DECAY = 0.99  # of the critic's averages, as published


def lecam_distance(logits: Tensor, anchor: Tensor) -> Tensor:
    """Half of LeCam: mean square of logits of one kind around the average logit of the other kind.

    lecam = E[(D(clip) - average of fakes)^2] + E[(D(recon) - average of reals)^2]. Tseng et al., Regularizing
    GANs under Limited Data (2021); their code has a relu around each difference, the paper has none.
    """
    return (logits - anchor).square().mean()


def moved_averages(averages: Tensor, *, real: Tensor, fake: Tensor) -> Tensor:
    """Averages after one more update of the critic. real, fake: its mean logits, scalars.

    averages: 3 numbers: of real logits, of fake logits, and of ones. They begin at 0, and the first two
    divided by the third are averages without a bias towards that beginning. LeCam uses those of earlier
    batches.
    """
    seen = torch.stack([real, fake, torch.ones_like(real)]).to(averages)
    return torch.lerp(averages, seen, 1.0 - LECAM_DECAY)


def lecam_anchors(averages: Tensor | None) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Average logits of clips and of reconstructions, if there are any yet."""
    if averages is None or float(averages[2]) == 0.0:
        return None, None
    return averages[0] / averages[2], averages[1] / averages[2]


def gradient_penalty(logits: Tensor, x: Tensor) -> Tensor:
    """R1 without its weight gamma / 2: squared norm of the gradient of D at a clip, mean over clips.

    Mescheder et al., Which Training Methods for GANs do actually Converge? (2018), eq. 9. The norm is a sum
    over all 3 * t * h * w values of a clip, as published. D(x) is the mean of the logits of one clip, as in
    the losses; so the penalty falls as one over the number of patches, and gammas that were published for
    one logit per image are small here. x: b 3 t h w, leaf of the graph of logits.
    """
    verdicts = logits.reshape(len(x), -1).mean(dim=1)  # b 1 t' h' w' or (b t) 1 h' w' -> b
    (grad,) = torch.autograd.grad(verdicts.sum(), x, create_graph=True)
    return grad.flatten(1).square().sum(dim=1).mean()


@contextmanager
def full_precision(critic: nn.Module) -> Iterator[None]:
    """The critic's convolutions compute in fp32 or finer: what a gradient of a gradient needs."""
    before = [(module, module.arithmetic) for module in critic.modules() if isinstance(module, Conv)]
    for module, _ in before:
        module.arithmetic = torch.promote_types(module.weight.dtype, torch.float32)
    try:
        yield
    finally:
        for module, numbers in before:
            module.arithmetic = numbers
