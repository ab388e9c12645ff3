"""Films for tests: those of the package, the shared ones where they are, and some made on the spot."""

import os
import wave
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from av.audio.resampler import AudioResampler
from torch import Tensor

from causalvae.data.decode import ACCURATE

BUNDLED = Path(__file__).parents[1] / "src" / "causalvae" / "clips"
SHARED = Path(__file__).parents[2] / "shared" / "clips"  # beside the repository; not everywhere
ENDINGS = {".avi", ".mp4", ".mpg", ".webm"}


def clips() -> list[Path]:
    """Every real film there is."""
    folders = [folder for folder in (BUNDLED, SHARED) if folder.is_dir()]
    return [path for folder in folders for path in sorted(folder.iterdir()) if path.suffix in ENDINGS]


def in_order(path: Path) -> Tensor:
    """All frames by plain decoding from the start, with nothing of ours: uint8 t h w 3, not turned."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        pictures = [
            frame.reformat(format="rgb24", interpolation=ACCURATE).to_ndarray()
            for frame in container.decode(stream)
        ]
    return torch.from_numpy(np.stack(pictures))


def moving_picture(number: int, *, height: int = 48, width: int = 64) -> np.ndarray:
    """Frame `number` of a film in which every frame differs: a bright bar over a gradient. uint8 h w 3."""
    picture = np.zeros((height, width, 3), np.uint8)
    picture[..., 0] = np.arange(width) * 2
    picture[..., 1] = np.arange(height)[:, None] * 3
    at = number * 5 % width
    picture[:, at : at + 6] = (255, 40 + number % 8 * 20, 255 - number % 16 * 12)
    return picture


def write_film(
    path: Path,
    *,
    codec: str = "libx264",
    frames: int = 40,
    times: Iterable[int] | None = None,
    options: dict[str, str] | None = None,
    pixels: str = "yuv420p",
    size: tuple[int, int] = (48, 64),
    rate: Fraction = Fraction(25),
) -> Path:
    """A film of moving pictures. times: when each frame is shown, in 1 / rate s. options: of the codec."""
    with av.open(
        str(path), "w", options={"movflags": "+faststart"} if path.suffix == ".mp4" else {}
    ) as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width = size
        stream.pix_fmt = pixels
        stream.time_base = 1 / rate
        for number, time in enumerate(times or range(frames)):
            picture = moving_picture(number, height=size[0], width=size[1])
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = time, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def with_sound(
    source: Path, target: Path, *, codec: str = "aac", seconds: float = 2.0, late: float = 0.0
) -> Path:
    """The film with a tone, without encoding its frames anew. late: seconds before the tone starts."""
    with av.open(str(source)) as inside, av.open(str(target), "w") as outside:
        film = outside.add_stream_from_template(inside.streams.video[0])
        tone = outside.add_stream(codec, rate=48000)
        assert isinstance(tone, av.AudioStream)
        tone.layout = "mono"
        for packet in inside.demux(inside.streams.video[0]):
            if packet.dts is not None:
                packet.stream = film
                outside.mux(packet)
        for start in range(0, int(seconds * 48000), 960):
            wave_form = np.sin(np.arange(start, start + 960) * 0.05).astype(np.float32)
            made = AudioResampler(format=tone.format, layout="mono", rate=48000).resample(
                _tone(wave_form, start=start + round(late * 48000))
            )
            for frame in made:
                outside.mux(tone.encode(frame))
        outside.mux(tone.encode())
    return target


def _tone(samples: np.ndarray, *, start: int) -> av.AudioFrame:
    frame = av.AudioFrame.from_ndarray(samples[None], format="flt", layout="mono")
    frame.sample_rate, frame.pts, frame.time_base = 48000, start, Fraction(1, 48000)
    return frame


def sound_packets(path: Path) -> list[tuple[bytes, Fraction]]:
    """Content and time in seconds of every packet of the first stream of sound."""
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(container.streams.audio[0]) if packet.size]
        return [(bytes(p), p.pts * p.time_base) for p in packets if p.pts is not None and p.time_base]


def copy_packets(source: Path, target: Path, *, from_key: int = 0, rotation: int | None = None) -> Path:
    """The film without decoding it, from its keyframe number `from_key` on, or marked as turned."""
    with av.open(str(source)) as inside, av.open(str(target), "w") as outside:
        stream = inside.streams.video[0]
        copy = outside.add_stream_from_template(stream)
        assert isinstance(copy, av.VideoStream)
        if rotation is not None:
            copy.set_display_rotation(rotation)
        keys = -1
        for packet in inside.demux(stream):
            keys += packet.is_keyframe and packet.dts is not None
            if packet.dts is not None and keys >= from_key:
                packet.stream = copy
                outside.mux(packet)
    return target


def damaged(source: Path, target: Path, *, first: float, last: float = 1.0, flips: int = 400) -> Path:
    """A copy with bytes flipped between two fractions of its length, the same ones every time."""
    data = bytearray(source.read_bytes())
    places = torch.randint(
        int(len(data) * first),
        int(len(data) * last),
        (flips,),
        generator=torch.Generator().manual_seed(len(data)),
    )
    for place in places.tolist():
        data[place] ^= 0xA5
    target.write_bytes(data)
    return target


def truncated(source: Path, target: Path, *, fraction: float) -> Path:
    """A copy that ends early."""
    data = source.read_bytes()
    target.write_bytes(data[: int(len(data) * fraction)])
    return target


def broken_entries(folder: Path) -> dict[str, Path]:
    """Things named like films that are none, by what they are."""
    folder.mkdir(exist_ok=True)
    made = {name: folder / f"{name}.mp4" for name in ("text", "empty", "zeros", "noise", "fifo", "missing")}
    made["text"].write_text("this is no film\n" * 50)
    made["empty"].write_bytes(b"")
    made["zeros"].write_bytes(bytes(4096))
    noise = torch.randint(0, 256, (4096,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    made["noise"].write_bytes(bytes(noise.tolist()))
    os.mkfifo(made["fifo"])
    made["link to nothing"] = folder / "nowhere.mp4"
    made["link to nothing"].symlink_to(folder / "not there")
    made["sound only"] = folder / "sound.avi"
    with wave.open(str(folder / "sound.avi"), "wb") as sound:
        sound.setparams((1, 2, 8000, 800, "NONE", "none"))
        sound.writeframes(bytes(1600))
    made["cut before its index"] = truncated(BUNDLED / "bunny.webm", folder / "cut.webm", fraction=0.0002)
    return made
