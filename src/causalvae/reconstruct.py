"""The command `reconstruct`: videos and pictures through a model and back, one after the other.

Beside every result is a record, `NAME.json`. It is there from the beginning, unfinished, and whole at the
end: so the command, given again, goes on where it was stopped, and nothing else is replaced unasked.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from causalvae.coders import CodingPlan
from causalvae.coding import plan_coding
from causalvae.data.codings import CODECS
from causalvae.data.decode import printable, stamp_of
from causalvae.data.films import Film, open_film
from causalvae.data.writer import check_encoder
from causalvae.errors import ConfigError, RunError, VideoError
from causalvae.files import disk_error, plain, write_whole
from causalvae.flags import flags_of
from causalvae.infer import Opened, open_vae, plain_arithmetic
from causalvae.locks import held
from causalvae.machine import available_bytes, hand_back_memory
from causalvae.progress import Telling, telling
from causalvae.reconstructflags import ReconstructSettings, memory_wish, tile_wish
from causalvae.reconstruction import Manner, reconstruct_film
from causalvae.targets import Target, plan_targets
from causalvae.train.signals import exit_on_sigterm

FORMAT = "causalvae reconstruct 1"
Json = Mapping[str, Any]  # Any: JSON values nest


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How videos are cut. memory: bytes the model's work may take, None for what is free on the device."""

    tile: Literal["auto", "off"] | tuple[int, int] = "auto"
    memory: int | None = None
    chunk: int | None = None


@dataclass(frozen=True, kw_only=True)
class Reconstructed:
    """What came of it. made, kept: records of what was made now and before. failed: why, by path."""

    made: tuple[Path, ...]
    kept: tuple[Path, ...]
    failed: Mapping[str, str]
    text: str

    @property
    def status(self) -> int:
        """Exit status: 1 if a video could not be reconstructed."""
        return 1 if self.failed else 0


def run_reconstruct(
    words: Sequence[str], settings: ReconstructSettings, *, say: Callable[[str], None]
) -> Reconstructed:
    """Reconstruct as the command line says. say: is given a line for each result."""
    if not words:
        raise ConfigError("causalvae reconstruct: name videos, pictures or folders of them")
    flags = flags_of(settings)
    check_encoder(CODECS[settings.codec])
    if not Path(settings.checkpoint).exists():
        raise ConfigError(f"--checkpoint {printable(settings.checkpoint)}: there is no such file or folder")
    hand_back_memory()  # what a plan predicts holds only so
    with exit_on_sigterm(), held(Path(settings.out)):
        opened = open_vae(
            Path(settings.checkpoint),
            prefer=settings.weights,
            model_config=None if settings.model_config is None else Path(settings.model_config),
            device=settings.device,
            precision=settings.precision,
        )
        return reconstruct(
            words,
            opened,
            out=Path(settings.out),
            manner=Manner(
                codec=settings.codec,
                quality=settings.quality,
                side_by_side=settings.side_by_side,
                latents=settings.latents,
                seed=settings.seed,
            ),
            cut=Cut(
                tile=tile_wish(flags["tile"], settings.tile),
                memory=memory_wish(flags["memory"], settings.memory),
                chunk=settings.chunk,
            ),
            overwrite=settings.overwrite,
            say=say,
        )


def reconstruct(
    inputs: Sequence[str],
    opened: Opened,
    *,
    out: Path,
    manner: Manner | None = None,
    cut: Cut | None = None,
    overwrite: bool = False,
    say: Callable[[str], None],
) -> Reconstructed:
    """Reconstruct files, folders and lists of videos and pictures into a folder.

    What an earlier call finished in the same way is kept; what else is there is refused, or replaced with
    `overwrite`. A video that can't be read is left out and told. say: is given a line for each
    result.
    """
    job = _Job(opened=opened, manner=manner or Manner(), cut=cut or Cut())
    ending = CODECS[job.manner.codec].ending
    targets = plan_targets(inputs, out, ending=ending, side_by_side=job.manner.side_by_side)
    kept = {target for target in targets if _is_done(target, job)}
    todo = [target for target in targets if target not in kept]
    if not overwrite:
        _refuse_taken(todo, out)
    failed: dict[str, str] = {}
    with telling(len(targets)) as tell, plain_arithmetic():
        job.tell_once(tell, opened.notes)
        for target in targets:
            if target in kept:
                tell.skip()
                continue
            try:
                say(_one(target, job, tell=tell))
            except VideoError as error:
                failed[target.path] = str(error)
                tell.say(f"error: {error}")
    made = tuple(target.record for target in todo if target.path not in failed)
    text = _summary(len(made), len(kept), len(failed), out=out)
    return Reconstructed(
        made=made, kept=tuple(t.record for t in targets if t in kept), failed=failed, text=text
    )


@dataclass
class _Job:
    """What all videos have in common."""

    opened: Opened
    manner: Manner
    cut: Cut
    plans: dict[tuple[int, int], CodingPlan] = field(default_factory=dict[tuple[int, int], CodingPlan])
    told: set[str] = field(default_factory=set[str])

    def plan(self, film: Film) -> CodingPlan:
        """How films of this size are cut, decided once for each size."""
        geometry = self.opened.vae.geometry
        size = geometry.padded_size(film.height), geometry.padded_size(film.width)
        if size not in self.plans:
            budget = self.cut.memory or available_bytes(str(self.opened.device))
            self.plans[size] = plan_coding(
                self.opened.vae,
                height=size[0],
                width=size[1],
                tile=self.cut.tile,
                budget=budget,
                chunk=self.cut.chunk,
            )
        return self.plans[size]

    def tell_once(self, tell: Telling, notes: Sequence[str]) -> None:
        """Warnings, each the first time."""
        for note in notes:
            if note not in self.told:
                tell.say(f"warning: {note}")
            self.told.add(note)

    def asked(self, target: Target) -> dict[str, Any]:  # Any: JSON
        """What a result depends on: with all of it the same, it need not be made again."""
        facts = self.opened.loaded.facts()
        num_bytes, changed, _ = stamp_of(target.path)
        return {
            "video": {"id": target.id, "bytes": num_bytes, "changed_ns": changed},
            "checkpoint": {"sha256": facts["sha256"], "set": facts["set"]},
            "settings": {**vars(self.manner), **vars(self.cut), "precision": self.opened.precision.name},
        }


def _one(target: Target, job: _Job, *, tell: Telling) -> str:
    """Reconstruct one video, write its record, and give the line about it."""
    film = open_film(target.path)
    if target.is_picture and film.frames > 1:
        raise VideoError(f"{printable(target.path)}: has {film.frames} frames and the name of a picture")
    plan = job.plan(film)
    job.tell_once(tell, plan.notes)
    record = {"format": FORMAT, "finished": False, "asked": job.asked(target)}
    _write(target.record, record)
    begun = time.monotonic()
    try:
        advance = tell.film(target.id, frames=film.frames)
        found = reconstruct_film(
            film, target, vae=job.opened.vae, plan=plan, manner=job.manner, advance=advance
        )
        seconds = time.monotonic() - begun
        job.tell_once(tell, [f"{target.id}: {note}" for note in found["notes"]])
        facts = {"checkpoint": job.opened.loaded.facts(), "film": _film_facts(film), "coding": plan.facts()}
        speed = {"seconds": seconds, "frames_per_second": film.frames / seconds}
        where = {"device": str(job.opened.device), "precision": job.opened.precision.name}
        _write(target.record, {**record, "finished": True, **found, **facts, **speed, **where})
    except torch.OutOfMemoryError as error:
        raise RunError(
            f"{printable(target.path)}: the device has not enough memory; give a smaller --memory, or --tile "
            "256x256",
            status=1,
        ) from error
    finally:
        if not _there(target):
            target.record.unlink(missing_ok=True)
    return _line(target, found, frames=film.frames, seconds=seconds)


def _there(target: Target) -> list[Path]:
    """Those of a target's files that exist."""
    return [path for path in (target.file, target.side) if path is not None and path.exists()]


def _record(target: Target) -> dict[str, Any] | None:  # Any: JSON
    """What is written of a target; None if nothing is, or not by this command."""
    try:
        found = json.loads(target.record.read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found.get("format") == FORMAT else None


def _is_done(target: Target, job: _Job) -> bool:
    """Whether a target was finished before, from the same video in the same way."""
    record = _record(target)
    if record is None or not record["finished"] or len(_there(target)) < 1 + job.manner.side_by_side:
        return False
    try:
        return record["asked"] == json.loads(json.dumps(plain(job.asked(target))))
    except VideoError:
        return False


def _refuse_taken(targets: Sequence[Target], out: Path) -> None:
    """ConfigError if something is in the place of a target that was not left there unfinished."""
    for target in targets:
        record = _record(target)
        if record is None:
            there = [*_there(target), *([target.record] if target.record.exists() else [])]
        else:
            there = _there(target) if record["finished"] else []
        if there:
            raise ConfigError(
                f"--out {printable(out)}: {printable(there[0])} is there already, and was made in another "
                "way; give --overwrite to replace what is there, or another --out"
            )


def _film_facts(film: Film) -> dict[str, Any]:  # Any: JSON
    rate = {} if film.fps is None or film.is_image else {"fps": float(film.fps), "exact_fps": str(film.fps)}
    return {"frames": film.frames, "height": film.height, "width": film.width, **rate}


def _write(path: Path, content: Json) -> None:
    try:
        write_whole(path, json.dumps(plain(content), indent=1) + "\n")
    except OSError as error:
        raise disk_error(error, path) or error from error


def _line(target: Target, found: Json, *, frames: int, seconds: float) -> str:
    """What is told of a result."""
    similarity = f", SSIM {found['ssim']:.4f}" if "ssim" in found else ""
    speed = "" if target.is_picture else f", {frames:,} frames, {frames / seconds:.1f} frames/s"
    return f"{printable(target.file)}: PSNR {found['psnr']:.2f} dB{similarity}{speed}\n"


def _summary(made: int, kept: int, failed: int, *, out: Path) -> str:
    parts = [f"{made} reconstructed"]
    parts += [f"{kept} were there already"] if kept else []
    parts += [f"{failed} can't be read"] if failed else []
    return f"{printable(out)}: {', '.join(parts)}\n"
