"""The command `decode`: latents of a set back to videos and pictures, in constant memory."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from causalvae.bars import progress_bars
from causalvae.coders import CodingPlan, answers, decoder
from causalvae.coding import plan_coding
from causalvae.data.codings import CODECS, CodecName
from causalvae.data.writer import FilmWriter, PictureWriter, check_encoder, picture_writer, silent_writer
from causalvae.errors import ConfigError, RunError
from causalvae.files import disk_error, write_whole
from causalvae.flags import printable
from causalvae.infer import Opened, plain_arithmetic
from causalvae.latentdata import latents
from causalvae.latentfiles import Record
from causalvae.latentreader import LatentFiles, read_samples
from causalvae.latentset import SET
from causalvae.models.build import Model
from causalvae.pipeline import Behind
from causalvae.video import crop_size, to_uint8

FORMAT = "causalvae decoded 1"
FACTS, MADE = "decoded.json", "decoded.jsonl"
KEY = re.compile(r"[A-Za-z0-9_-]{1,100}")
DECODED = ("sample", "mean")  # the tensors that are decoded


@dataclass(frozen=True, kw_only=True)
class Wish:
    """How latents are decoded. tile, budget: as `plan_coding` has them. any_model: also those of others."""

    codec: CodecName = "h264"
    tile: Literal["auto", "off"] | tuple[int, int] = "auto"
    budget: int | None = None
    any_model: bool = False
    overwrite: bool = False


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """What came of it. made, kept: files made now and before."""

    made: int
    kept: int
    notes: tuple[str, ...]


def decode_latents(path: Path, out: Path, *, opened: Opened, wish: Wish) -> Decoded:
    """Decode the latents of a set, or of one of its files, to `out`/KEY.mp4 and the like.

    ConfigError if they are another model's, or `out` has something else; RunError if they are damaged. A file
    that is there is whole, and is not made again without `overwrite`.
    """
    check_encoder(CODECS[wish.codec])
    folder, records = _records(path)
    digest = str(opened.loaded.facts()["sha256"])
    files, plans = LatentFiles(folder), dict[tuple[int, int], CodingPlan]()
    names: list[str] = []
    made = 0
    _settle(out, {"model": digest, "precision": opened.precision.name, "codec": wish.codec}, wish=wish)
    with progress_bars() as track, plain_arithmetic():
        advance = track("decoding", len(records))
        for record in records:
            _check(path, record, opened=opened, digest=digest, wish=wish)
            name = _name(record, codec=wish.codec)
            names.append(json.dumps({"key": record["key"], "video": record["video"], "file": name}) + "\n")
            if wish.overwrite or not (out / name).exists():
                plan = _plan(opened.vae, record, wish=wish, plans=plans)
                _decode(opened.vae, files, record, target=out / name, plan=plan, codec=wish.codec)
                made += 1
            advance(1)
    _write(out / MADE, "".join(names))
    notes = dict.fromkeys(note for plan in plans.values() for note in plan.notes)
    return Decoded(made=made, kept=len(names) - made, notes=tuple(notes))


class _Lines:
    """The records of a set, read one at a time."""

    def __init__(self, folder: Path) -> None:
        self._found = latents(folder, normalise="none")

    def __len__(self) -> int:
        return len(self._found)

    def __iter__(self) -> Iterator[Record]:
        return (self._found.record(number) for number in range(len(self._found)))


def _records(path: Path) -> "tuple[Path, _Lines | list[Record]]":
    """The folder of the files, and their records."""
    if path.is_dir() and (path / SET).is_file():
        return path, _Lines(path)
    if not path.is_file():
        raise ConfigError(
            f"{printable(str(path))}: neither a folder of `causalvae encode` nor one of its files"
        )
    return path.parent, read_samples(path)


def _settle(out: Path, facts: dict[str, Any], *, wish: Wish) -> None:  # Any: JSON
    """Write how things are decoded. ConfigError if what is in `out` was made in another way."""
    path = out / FACTS
    content = json.dumps({"format": FORMAT, **facts}, indent=1) + "\n"
    if not wish.overwrite and path.exists() and path.read_text(errors="replace") != content:
        raise ConfigError(
            f"--out {printable(str(out))}: has videos that another model, precision or codec made; "
            "choose another folder, or add --overwrite True"
        )
    _write(path, content)


def _check(path: Path, record: Record, *, opened: Opened, digest: str, wish: Wish) -> None:
    """ConfigError unless the model is the one that made the latent, or one that could have."""
    if record.get("model") != digest and not wish.any_model:
        raise ConfigError(
            f"{printable(str(path))}: made by weights with SHA-256 {str(record.get('model'))[:12]}..., and "
            f"--checkpoint has {digest[:12]}...; give the checkpoint that made them, or --any_model True"
        )
    names = [name for name in DECODED if name in record["tensors"]]
    channels = opened.vae.geometry.channels
    if not names or record["tensors"][names[0]]["shape"][1] != channels:
        raise ConfigError(f"{printable(str(path))}: these are no latents of {channels} channels")
    if not KEY.fullmatch(str(record["key"])):
        raise RunError(f"{path}: {printable(str(record['key']))!r} can't be the name of a file", status=1)


def _name(record: Record, *, codec: CodecName) -> str:
    """A file for what a latent shows: a picture if it is one frame."""
    return f"{record['key']}{'.png' if record['frames'] == 1 else CODECS[codec].ending}"


def _plan(vae: Model, record: Record, *, wish: Wish, plans: dict[tuple[int, int], CodingPlan]) -> CodingPlan:
    """How latents of this size are cut, decided once for each size."""
    height, width = (vae.geometry.padded_size(int(record[side])) for side in ("height", "width"))
    if (height, width) not in plans:
        plans[height, width] = plan_coding(
            vae, height=height, width=width, tile=wish.tile, budget=wish.budget
        )
    return plans[height, width]


@torch.inference_mode()
def _decode(
    vae: Model, files: LatentFiles, record: Record, *, target: Path, plan: CodingPlan, codec: CodecName
) -> None:
    """Write the frames of one latent."""
    height, width, left = (int(record[name]) for name in ("height", "width", "frames"))
    writing = picture_writer(target)
    if target.suffix != ".png":
        rate = Fraction(*map(int, record["fps"])) if "fps" in record else None
        writing = silent_writer(target, fps=rate, size=(height, width), coding=CODECS[codec])
    with writing as writer, Behind() as behind:
        for x in _frames(vae, files, record, plan=plan):
            frames = to_uint8(crop_size(x, height, width))[0].permute(1, 2, 3, 0).cpu()[:left]  # t h w 3
            left -= len(frames)
            if len(frames):
                behind.call(lambda frames=frames: _push(writer, frames))
    assert left == 0, "as many frames as the record says"


def _push(writer: FilmWriter | PictureWriter, frames: Tensor) -> None:
    writer.push(frames)


def _frames(vae: Model, files: LatentFiles, record: Record, *, plan: CodingPlan) -> Iterator[Tensor]:
    """The frames of a latent, in pieces: 1 3 t h w."""
    name = next(name for name in DECODED if name in record["tensors"])
    device = vae.last_layer.get_parameter("weight").device
    total, most = int(record["tensors"][name]["shape"][0]), max(1, plan.chunk // vae.geometry.temporal)
    latents = (
        files.frames(record, name, first=first, count=min(most, total - first))
        for first in range(0, total, most)
    )
    pieces = (latent.to(device).float().transpose(0, 1)[None] for latent in latents)  # k c h w -> 1 c k h w
    return answers(decoder(vae, plan), pieces)


def _write(path: Path, content: str) -> None:
    try:
        write_whole(path, content)
    except OSError as error:
        raise disk_error(error, path) or error from error
