"""How each codec is used: encoder, container, pixels, quality. Free of torch: the flags are checked by it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

CodecName = Literal["h264", "hevc", "vp9", "av1", "ffv1"]


@dataclass(frozen=True, kw_only=True)
class Coding:
    """One codec. encoder, container, pixels, odd_pixels, sound, options, tag: by FFmpeg's names.

    odd_pixels: for an odd height or width; half-size chroma has none in some codecs. quality: the constant
    rate factor, the default and the largest; less is better, None is lossless. least: height and width.
    sound: encoder for sound that the container does not take.
    """

    encoder: str
    ending: str = ".mp4"
    container: str = "mp4"
    pixels: str = "yuv420p"
    odd_pixels: str = "yuv420p"
    quality: tuple[int, int] | None
    least: int = 1
    sound: str = "aac"
    tag: str | None = None
    options: Mapping[str, str] = field(default_factory=dict[str, str])

    def pixels_for(self, height: int, width: int) -> str:
        """The pixel format of frames of this size."""
        return self.odd_pixels if height % 2 or width % 2 else self.pixels


CODECS: dict[CodecName, Coding] = {
    "h264": Coding(encoder="libx264", odd_pixels="yuv444p", quality=(16, 51)),
    "hevc": Coding(
        encoder="libx265",
        odd_pixels="yuv444p",
        quality=(18, 51),
        least=64,  # x265 4.2 was seen to write past its memory at widths of 34 to 48
        tag="hvc1",  # without it Apple's players show nothing
        options={"x265-params": "log-level=none"},
    ),
    "vp9": Coding(
        encoder="libvpx-vp9",
        ending=".webm",
        container="webm",
        quality=(20, 63),
        sound="libopus",
        options={"b": "0", "row-mt": "1", "deadline": "good", "cpu-used": "4"},
    ),
    "av1": Coding(encoder="libsvtav1", quality=(20, 63), least=4, options={"preset": "8"}),
    "ffv1": Coding(
        encoder="ffv1",
        ending=".mkv",
        container="matroska",
        pixels="bgr0",
        odd_pixels="bgr0",
        quality=None,
        options={"level": "3", "g": "1", "slicecrc": "1"},
    ),
}
