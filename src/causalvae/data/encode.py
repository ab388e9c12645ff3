"""Frames to files: films that any player shows, and pictures."""

from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import av
import torch
from torch import Tensor

CRF = "16"  # x264 quality: differences from the frames are below what an eye sees


def write_video(path: Path, frames: Tensor, *, fps: float = 8.0) -> None:
    """frames: uint8 t h w 3 -> H.264 in the container that the name asks for.

    Odd sizes lose their last row or column.
    """
    height, width = frames.shape[1] // 2 * 2, frames.shape[2] // 2 * 2
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"crf": CRF}
        for picture in frames[:, :height, :width]:
            frame = av.VideoFrame.from_ndarray(picture.contiguous().numpy(), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def write_png(path: Path, picture: Tensor) -> None:
    """picture: uint8 h w 3, exactly as it is."""
    with av.open(str(path), "w", format="image2", options={"update": "1"}) as container:
        stream = container.add_stream("png", rate=1)
        stream.height, stream.width = picture.shape[0], picture.shape[1]
        stream.pix_fmt = "rgb24"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture.contiguous().numpy(), format="rgb24")))
        container.mux(stream.encode())


def side_by_side(left: Tensor, right: Tensor) -> Tensor:
    """Two films t h w 3 of one size -> t h 2w 3."""
    return torch.cat([left, right], dim=2)


def contact_sheet(films: Iterable[Tensor], *, columns: int = 5) -> Tensor:
    """Films t h w 3 -> one picture: a row for each film, evenly chosen frames from the first to the last."""
    rows = []
    for film in films:
        chosen = torch.linspace(0, len(film) - 1, min(columns, len(film))).round().long()
        rows.append(torch.cat(list(film[chosen]), dim=1))  # h (n w) 3
    return torch.cat(rows, dim=0)
