"""Where the linear path of a `shuffle` model starts: at the best linear code of a simple picture of the
world.

The picture is a first-order Markov field: neighbouring pixels and frames correlate by a fixed factor, and so
do colours. Its Karhunen-Loeve transform is built stage by stage, as the layers can hold it, and its inverse
is put into the decoder. Training then starts from a blurred reconstruction and not from noise; no data is
needed.
"""

import torch
from torch import Tensor

from causalvae.models.causalvae import CausalVAE
from causalvae.models.layers import Kernel, ShuffleDown, ShuffleUp

# Correlation of neighbours along time, height and width: three different values, so that no two directions
# tie.
NEIGHBOURS = (0.98, 0.955, 0.96)
COLOURS = ((1.0, 0.95, 0.88), (0.95, 1.0, 0.94), (0.88, 0.94, 1.0))  # between red, green and blue
LOGVAR_START = -7.0  # the noise of the first samples is then 3 % of a latent's deviation


@torch.no_grad()
def start_linear(vae: CausalVAE) -> None:
    """Set the linear path of a `shuffle` model, in place.

    A code is the block of pixels that each channel weighs: c t h w 3, float64. Stages are orthonormal;
    latents have unit variance for the picture.
    """
    encoder, decoder, stem = vae.encoder, vae.decoder, vae.config.stem
    code = _spread(torch.eye(3, dtype=torch.float64).view(3, 1, 1, 1, 3), (1, stem, stem))
    deviations = torch.ones(len(code), dtype=torch.float64)
    stages = [(encoder.conv_in.get_parameter("conv.weight"), decoder.conv_out.conv.weight, (1, 1, 1))]
    for level, level_above in zip(encoder.down, list(decoder.up)[1:], strict=False):
        down, up = level.get_submodule("downsample"), level_above.get_submodule("upsample")
        assert isinstance(down, ShuffleDown)
        assert isinstance(up, ShuffleUp)
        stages.append(
            (down.get_parameter("proj.conv.weight"), up.get_parameter("proj.conv.weight"), down.factor)
        )
    for there, back, factor in stages:
        code, basis, deviations = _reduce(_spread(code, factor), len(there))
        _start(there, basis)
        _start(back, basis.T)
    channels = vae.config.z_channels
    for weight, scale in (
        (encoder.conv_out.conv.weight, 1 / deviations),
        (decoder.conv_in.conv.weight, deviations),
    ):
        weight.zero_()
        _start(weight, torch.diag(scale[:channels]))
    encoder.conv_out.get_parameter("conv.bias")[channels:] = LOGVAR_START


def _spread(code: Tensor, factor: Kernel) -> Tensor:
    """The code after space_to_depth.

    c t h w 3 -> (p q r c) (p t) (q h) (r w) 3, zero outside each channel's part.
    """
    c, t, h, w, _ = code.shape
    p, q, r = factor
    out = code.new_zeros(p, q, r, c, p, t, q, h, r, w, 3)
    for i in range(p):
        for j in range(q):
            for k in range(r):
                out[i, j, k, :, i, :, j, :, k] = code
    return out.reshape(p * q * r * c, p * t, q * h, r * w, 3)


def _reduce(code: Tensor, channels: int) -> tuple[Tensor, Tensor, Tensor]:
    """The code's strongest directions: new code, basis (at most channels) x c, deviations.

    Channels beyond the rank of the code weigh no pixel.
    """
    rows = code.flatten(1)
    values, vectors = torch.linalg.eigh(rows @ _covariance(code.shape[1:4]) @ rows.T)
    order = values.argsort(descending=True)[:channels]
    basis = vectors[:, order].T
    largest = basis.gather(1, basis.abs().argmax(dim=1, keepdim=True))
    basis = basis * largest.sign()  # the sign of an eigenvector is the library's choice; this one is ours
    strongest = rows.new_zeros(channels, rows.shape[1])
    strongest[: len(order)] = basis @ rows
    return strongest.view(channels, *code.shape[1:]), basis, values[order].sqrt()


def _covariance(block: torch.Size) -> Tensor:
    """Covariance of the pixels of a block t h w 3, flattened in this order."""
    total = torch.ones(1, 1, dtype=torch.float64)
    for size, neighbour in zip(block, NEIGHBOURS, strict=True):
        steps = torch.arange(size, dtype=torch.float64)
        total = torch.kron(total, neighbour ** (steps[:, None] - steps[None, :]).abs())
    return torch.kron(total, torch.tensor(COLOURS, dtype=torch.float64))


def _start(weight: Tensor, matrix: Tensor) -> None:
    """Put a matrix into the tap of a causal kernel that sees the present position.

    The kernel's first rows hold the matrix and nothing else; rows below it keep their random weights.
    """
    rows, columns = matrix.shape
    _, _, _, h, w = weight.shape
    weight[:rows] = 0
    weight[:rows, :columns, -1, h // 2, w // 2] = matrix.to(weight.dtype)
