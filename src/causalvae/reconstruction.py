"""One video through a model and back: decoding, model and writing overlap, in memory that does not grow."""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from causalvae import rng
from causalvae.coders import Coder, CodingPlan, decoder, encoder
from causalvae.data.codings import CODECS, CodecName
from causalvae.data.encode import side_by_side
from causalvae.data.films import Film, read_pieces
from causalvae.data.writer import FilmWriter, PictureWriter, film_writer, picture_writer
from causalvae.fidelity import psnr_of_mse, squared_errors, ssim
from causalvae.models.base import Posterior
from causalvae.models.build import Model
from causalvae.pipeline import Behind, ahead
from causalvae.targets import Target
from causalvae.video import crop_size, pad_size, to_model, to_uint8


@dataclass(frozen=True, kw_only=True)
class Manner:
    """How videos are reconstructed and written. quality: None for the codec's own. seed: of samples."""

    codec: CodecName = "h264"
    quality: int | None = None
    side_by_side: bool = False
    latents: Literal["mode", "sample"] = "mode"
    seed: int = 0


@dataclass
class Fidelity:
    """How near a reconstruction is to its video, by sums that grow with every piece."""

    error: int = 0
    values: int = 0
    similarity: float = 0.0
    frames: int = 0
    worst: tuple[float, int] = field(default=(float("inf"), 0))
    measurable: bool = True

    def add(self, clip: Tensor, recon: Tensor) -> None:
        """The next frames of both, uint8 t h w 3."""
        for error in squared_errors(clip, recon):
            self.error += error
            self.worst = min(self.worst, (psnr_of_mse(error / clip[0].numel()), self.frames))
            self.frames += 1
        self.values += clip.numel()
        found = ssim(clip, recon)
        self.measurable = found is not None
        self.similarity += (found or 0.0) * len(clip)

    def facts(self) -> dict[str, Any]:  # Any: JSON
        """PSNR and SSIM as `causalvae eval` has them, over all frames, and the worst frame."""
        facts: dict[str, Any] = {"psnr": psnr_of_mse(self.error / self.values)}  # Any: as above
        if self.measurable:
            facts["ssim"] = self.similarity / self.frames
        return facts | {"worst_frame": {"number": self.worst[1], "psnr": self.worst[0]}}


@torch.inference_mode()
def reconstruct_film(
    film: Film,
    target: Target,
    *,
    vae: Model,
    plan: CodingPlan,
    manner: Manner,
    advance: Callable[[int], None],
) -> dict[str, Any]:  # Any: JSON
    """Write the reconstruction of a film, and tell how near it is. advance: told of frames that are done.

    VideoError if the film breaks in the middle, RunError if the disk refuses: no file is left then.
    """
    fidelity, coders = Fidelity(), (encoder(vae, plan), decoder(vae, plan))
    originals: deque[Tensor] = deque()
    with ExitStack() as stack:
        outputs = _outputs(stack, film, target, manner=manner)
        behind = stack.enter_context(Behind())
        read = stack.enter_context(closing(ahead(read_pieces(film, frames=plan.chunk))))
        pieces = _remembered(read, originals)
        for made in _coded(pieces, vae, coders=coders, noise=_noise(target.id, manner)):
            recon = to_uint8(crop_size(made, film.height, film.width))[0].permute(1, 2, 3, 0).cpu()
            left = sum(map(len, originals))
            recon = recon[:left]  # the last latent frame is filled up by repeating the last frame
            if len(recon):
                clip = _take(originals, len(recon))
                behind.call(lambda clip=clip, recon=recon: _write(outputs, fidelity, clip=clip, recon=recon))
                advance(len(recon))
    assert fidelity.frames == film.frames
    seams = {name: coder.seams for name, coder in zip(("encoder", "decoder"), coders, strict=True)}
    return {
        **fidelity.facts(),
        "seams": {name: found.facts() for name, found in seams.items() if found is not None},
        "notes": [note for output in outputs for note in output.notes],
    }


@dataclass(frozen=True)
class _Output:
    """A file that is being written. beside: it shows the original too."""

    writer: FilmWriter | PictureWriter
    beside: bool

    @property
    def notes(self) -> list[str]:
        return [] if self.beside else self.writer.notes


def _outputs(stack: ExitStack, film: Film, target: Target, *, manner: Manner) -> list[_Output]:
    """The files to write."""
    coding = CODECS[manner.codec]

    def open_one(path: Path, *, beside: bool) -> _Output:
        if target.is_picture:
            return _Output(stack.enter_context(picture_writer(path)), beside)
        size = (film.height, film.width * 2 if beside else film.width)
        opened = film_writer(path, film, size=size, coding=coding, quality=manner.quality)
        return _Output(stack.enter_context(opened), beside)

    outputs = [open_one(target.file, beside=False)]
    return outputs if target.side is None else [*outputs, open_one(target.side, beside=True)]


def _write(outputs: list[_Output], fidelity: Fidelity, *, clip: Tensor, recon: Tensor) -> None:
    """Measure and write the next frames, uint8 t h w 3."""
    fidelity.add(clip, recon)
    for output in outputs:
        output.writer.push(side_by_side(clip, recon) if output.beside else recon)


def _remembered(pieces: Iterator[Tensor], originals: deque[Tensor]) -> Iterator[Tensor]:
    """The pieces, which are kept until their reconstruction is there."""
    for piece in pieces:
        originals.append(piece)
        yield piece


def _take(originals: deque[Tensor], frames: int) -> Tensor:
    """The next frames of the originals, t h w 3, which are then forgotten."""
    taken: list[Tensor] = []
    while frames:
        piece = originals.popleft()
        taken.append(piece[:frames])
        if len(piece) > frames:
            originals.appendleft(piece[frames:])
        frames -= len(taken[-1])
    return torch.cat(taken)


def _coded(
    pieces: Iterator[Tensor],
    vae: Model,
    *,
    coders: tuple[Coder[Posterior], Coder[Tensor]],
    noise: Callable[[Posterior, int], Tensor | None],
) -> Iterator[Tensor]:
    """Pieces uint8 t h w 3 -> reconstructions 1 3 t h w as they become certain."""
    encodes, decodes = coders
    device = vae.last_layer.get_parameter("weight").device
    count = 0
    for piece in chain(pieces, [None]):
        if piece is None:
            posterior = encodes.close()
        else:
            x = to_model(piece.to(device).permute(3, 0, 1, 2)[None].contiguous())
            posterior = encodes.push(pad_size(x, vae.geometry))
        if posterior is not None:
            made = decodes.push(posterior.latent(noise(posterior, count)))
            count += posterior.mean.shape[2]
            if made is not None:
                yield made
    made = decodes.close()
    if made is not None:
        yield made


def _noise(video: str, manner: Manner) -> Callable[[Posterior, int], Tensor | None]:
    """What a posterior is sampled with, by the number of its first latent frame; None for its mode.

    Each latent frame has a key of its own, so that noise does not depend on how the video is cut.
    """

    def draw(posterior: Posterior, start: int) -> Tensor | None:
        if manner.latents == "mode":
            return None
        _, c, k, h, w = posterior.mean.shape
        keys = [rng.key("reconstruct", manner.seed, video, start + i) for i in range(k)]
        noise = torch.stack([rng.normal((c, h, w), key) for key in keys], dim=1)  # c k h w
        return noise[None].to(posterior.mean)

    return draw
