"""The work of an evaluation: clips decoded ahead, one subject's record of each, and what they sum up to.

Every batch's records are written before the next one is read, in the order of the clips, so that an
evaluation that was stopped goes on behind the last one. Numbers do not depend on threads or order, and on the
batch only by the last bits of the model's arithmetic.
"""

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

from causalvae import __version__
from causalvae.data.decode import Decoder
from causalvae.evalset import ClipRule, ClipSet, EvalClip, pixels_sha256, read_pixels
from causalvae.files import append_whole, disk_error, plain, write_whole
from causalvae.frechet import FrechetParts, frechet_parts
from causalvae.latentmetrics import LatentStatistics
from causalvae.metrics import Metric
from causalvae.models.base import Posterior
from causalvae.moments import Moments
from causalvae.scores import score, summary
from causalvae.subjects import Panel, Subject, reconstruct_batch
from causalvae.worst import Worst, as_film, worst_places

RECORDS = "causalvae eval clips 1"
Json = Mapping[str, Any]  # Any: JSON values nest


@dataclass(frozen=True, kw_only=True)
class Job:
    """One subject on a set of clips. path: the file of records."""

    subject: Subject
    panel: Panel
    clips: ClipSet
    metrics: Mapping[str, Metric]
    path: Path


def decoded(clips: Sequence[EvalClip], rule: ClipRule, *, workers: int) -> Iterator[tuple[EvalClip, Tensor]]:
    """Clips and their pixels, uint8 3 t H W, in order; threads keep at most 2 for each of them ready.

    VideoError where one can't be read: nothing takes its place.
    """
    spare: SimpleQueue[Decoder] = SimpleQueue()  # a decoder remembers the files that it has seen
    for _ in range(max(1, workers)):
        spare.put(Decoder())

    def read(clip: EvalClip) -> Tensor:
        decoder = spare.get()
        try:
            return read_pixels(clip, rule, decoder=decoder)
        finally:
            spare.put(decoder)

    if workers == 0:
        yield from ((clip, read(clip)) for clip in clips)
        return
    with ThreadPoolExecutor(workers, thread_name_prefix="causalvae-eval") as pool:
        waiting: deque[tuple[EvalClip, Future[Tensor]]] = deque()
        ahead = iter(clips)
        try:
            while True:
                for clip in islice(ahead, 2 * workers - len(waiting)):
                    waiting.append((clip, pool.submit(read, clip)))
                if not waiting:
                    return
                clip, pixels = waiting.popleft()
                yield clip, pixels.result()
        finally:
            for _, each in waiting:
                each.cancel()


def measure(
    job: Job, *, batch_size: int, workers: int, advance: Callable[[int], None], worst: Worst
) -> list[str]:
    """Write the records that are missing. Returns what is worth saying.

    advance: told of clips done. worst: is offered every clip that is measured now.
    """
    done, notes = _kept(job)
    advance(done)
    source = decoded(job.clips.clips[done:], job.clips.rule, workers=workers)
    while batch := list(islice(source, batch_size)):
        clips, pixels = [clip for clip, _ in batch], torch.stack([each for _, each in batch])
        recons, posteriors = reconstruct_batch(job.subject, pixels)
        records = list(_records(job, clips, pixels=pixels, recons=recons, posteriors=posteriors))
        for i, record in enumerate(records):
            worst.offer(done + i, record, clip=pixels[i], recon=recons[i])
        done += len(batch)
        lines = [json.dumps(plain(record)) + "\n" for record in records]
        try:
            append_whole(job.path, "".join(lines).encode())
        except OSError as error:
            raise disk_error(error, job.path) or error from error
        advance(len(batch))
    return notes


def films_of_worst(job: Job, records: Sequence[Json], worst: Worst) -> dict[int, Tensor]:
    """Films of the worst clips by place, uint8 t h 2w 3. Those measured before this start are made again."""
    places = worst_places(records, most=worst.most)
    films = worst.films()
    again = [place for place in places if place not in films]
    source = decoded([job.clips.clips[place] for place in again], job.clips.rule, workers=0)
    for place, (_, pixels) in zip(again, source, strict=True):
        recons, _ = reconstruct_batch(job.subject, pixels[None])
        films[place] = as_film(pixels, recons[0])
    return {place: films[place] for place in places}


def _records(
    job: Job,
    clips: Sequence[EvalClip],
    *,
    pixels: Tensor,
    recons: Tensor,
    posteriors: Sequence[Posterior],
) -> Iterator[dict[str, Any]]:  # Any: JSON
    """The record of each clip of a batch. pixels, recons: uint8 b 3 t h w."""
    for i, clip in enumerate(clips):
        record: dict[str, Any] = {"id": clip.id, "video": clip.video.id, "start": clip.start}  # Any: as above
        record |= score(pixels[i], recons[i], metrics=job.metrics)
        record["same_pixels"] = pixels_sha256(pixels[i]) == clip.pixels
        if posteriors:
            record["latents"] = _statistics(posteriors[i])
        if job.panel.i3d is not None:
            record["i3d"] = _logits(job.panel, pixels[i], recon=recons[i])
        yield record


def _statistics(posterior: Posterior) -> dict[str, Any]:  # Any: JSON
    return {name: t.tolist() for name, t in LatentStatistics.of(posterior).tensors().items()}


def _logits(panel: Panel, clip: Tensor, *, recon: Tensor) -> list[list[float]]:
    """Of the clip and of its reconstruction, uint8 3 t h w each: 400 numbers each."""
    assert panel.i3d is not None
    films = clip.permute(1, 2, 3, 0), recon.permute(1, 2, 3, 0)
    parts = frechet_parts(films[0], films[1], network=panel.i3d, framing=panel.asked.framing)
    return [parts.clips.mean.tolist(), parts.recons.mean.tolist()]


def _header(job: Job) -> dict[str, Any]:  # Any: JSON
    """What records belong to: with another one, none of them counts."""
    facts = job.subject.facts
    return {
        "format": RECORDS,
        "checkpoint": facts["sha256"],
        "set": facts["set"],
        "precision": facts["precision"],
        "manifest": job.clips.digest,
        "metrics": list(job.metrics),
        "judges": plain(job.panel.facts),
        "made_by": [__version__, torch.__version__, facts["device"]],
    }


def _kept(job: Job) -> tuple[int, list[str]]:
    """How many records are there already, after what a kill cut off is removed; and what to say of it."""
    head = (json.dumps(_header(job)) + "\n").encode()
    whole, num_bytes, same = 0, 0, False
    there = job.path.exists() and job.path.stat().st_size > 0
    with job.path.open("ab+") as file:
        file.seek(0)
        for line in file:  # a record of many channels is long, and a set has many
            same = line == head if whole == 0 else same
            if not same or not line.endswith(b"\n"):
                break
            whole, num_bytes = whole + 1, num_bytes + len(line)
        if same:
            file.truncate(num_bytes)
    if same:
        return whole - 1, []
    write_whole(job.path, head)
    return 0, [f"{job.path}: began anew, its records were made in another way"] if there else []


def stored(path: Path) -> Iterator[dict[str, Any]]:  # Any: JSON
    """The records of a file, one at a time."""
    with path.open(encoding="ascii") as file:
        next(file)
        for line in file:
            yield json.loads(line)


def summed(job: Job) -> dict[str, Any]:  # Any: JSON
    """Metrics, curves, latents and clips of a file with a record for every clip."""
    clips: list[dict[str, Any]] = []  # Any: as above
    latents: LatentStatistics | None = None
    distance = FrechetParts.none()
    other_pixels = 0
    for record in stored(job.path):
        statistics, logits = record.pop("latents", None), record.pop("i3d", None)
        other_pixels += not record.pop("same_pixels")
        if statistics is not None:
            more = LatentStatistics.of_tensors(_tensors(statistics))
            latents = more if latents is None else latents.merged(more)
        if logits is not None:
            rows = [torch.tensor([each], dtype=torch.float64) for each in logits]
            distance = distance.merged(FrechetParts(Moments.of(rows[0]), Moments.of(rows[1])))
        clips.append(record)
    found = summary(clips, metrics=job.metrics)
    if job.panel.i3d is not None:
        facts = {"clips": distance.clips.count, "unit": "", "better": "lower"}
        found["metrics"]["rfvd"] = {"mean": distance.distance(), **facts}
    if latents is not None:
        found["latents"] = latents.summary()
        found["curves"]["latent_spectrum"] = _spectrum(found["latents"].pop("spectrum"))
    return {**found, "clips": clips, **({"other_pixels": other_pixels} if other_pixels else {})}


def _tensors(saved: Json) -> dict[str, Tensor]:
    exact = {"count": torch.int64, "certain": torch.bool}
    return {name: torch.tensor(value, dtype=exact.get(name, torch.float64)) for name, value in saved.items()}


def _spectrum(found: Json) -> dict[str, Any]:  # Any: JSON
    words = {"unit": "", "x_label": "cycles per latent position"}
    return {"x": found["frequency"], "y": found["power"], **words}


def first_clip(clips: ClipSet) -> Tensor:
    """uint8 1 3 t h w: what costs are measured with."""
    return read_pixels(clips.clips[0], clips.rule, decoder=Decoder())[None]


def in_words(clips: Iterable[Json], *, most: int) -> list[str]:
    """Videos that were left out, the first ones by name."""
    found = list(clips)
    said = [f"{each['video']} is left out: {each['reason']}" for each in found[:most]]
    more = len(found) - len(said)
    return said + ([f"{more} more videos are left out; the results list them"] if more else [])
