"""A bad step of mode 1 as a folder that repeats it: the state before it, its clips, and what was found.

The folder is a full checkpoint with two files more, `clips.safetensors` and `report.json`, so whatever reads
a checkpoint reads it too. Noise needs no file: it is a function of (seed, cursor).
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from causalvae.data.clips import ClipRequest
from causalvae.data.loader import Clips
from causalvae.data.sources import VideoRef
from causalvae.errors import RunError
from causalvae.files import disk_error, plain, remove, sync, write_whole
from causalvae.rundir import damage, seal
from causalvae.train.debug import BadPlace
from causalvae.train.state import TrainState

CLIPS, REPORT = "clips.safetensors", "report.json"


@dataclass(frozen=True)
class Replay:
    """A bad step to repeat. step: the update that it was; report: what report.json says."""

    clips: Clips
    step: int
    report: dict[str, Any]  # Any: JSON


def write_replay(
    folder: Path,
    before: TrainState,
    *,
    clips: Clips,
    bad: BadPlace,
    terms: Mapping[str, float],
    settings: Mapping[str, Any],  # Any: JSON
) -> Path:
    """Write `folder/step-N-cursor-C`, whole or not at all, and return it; one that is there is kept.

    before: a copy of the state as it was before the step (copy.deepcopy). terms: the losses' terms by name.
    settings: those that matter for the step, for a person to read. If the state before the step can't be
    saved, because it is not finite itself, the folder says why and holds only clips and report.
    RunError if the disk refuses.
    """
    final = folder / f"step-{before.step + 1:08d}-cursor-{before.cursor:08d}"
    if final.exists():
        return final
    partial = folder / f".{final.name}.partial"
    try:
        remove(partial)
        partial.mkdir(parents=True)
        refused = _save_state(before, partial)
        save_file({"pixels": clips.pixels.cpu().contiguous()}, partial / CLIPS)
        report = {
            **_report(before, clips=clips, bad=bad),
            "terms": dict(terms),
            "settings": dict(settings),
            "state": refused or "as before the step",
        }
        write_whole(partial / REPORT, json.dumps(plain(report), indent=1) + "\n")
        seal(partial, before.step)
        os.rename(partial, final)
        sync(folder)
    except (OSError, SafetensorError) as error:
        raise disk_error(error, partial) or error from error
    return final


def _report(before: TrainState, *, clips: Clips, bad: BadPlace) -> dict[str, Any]:  # Any: JSON
    return {
        "step": before.step + 1,
        "cursor": before.cursor,
        "finding": bad.sentence(),
        "first_bad": bad.record(),
        "clips": [asdict(request) for request in clips.requests],
    }


def _save_state(before: TrainState, folder: Path) -> str | None:
    """Save the state; None, or why it is not to be had, and then no file of it stays."""
    try:
        before.save(folder)
    except RunError as error:
        for path in folder.iterdir():
            remove(path)
        return f"not saved: {error}"
    return None


def is_replay(folder: Path) -> bool:
    """Whether a folder was written by `write_replay`."""
    return os.path.isfile(folder / CLIPS) and os.path.isfile(folder / REPORT)


def read_replay(folder: Path) -> Replay:
    """Clips and findings of a bad step; `TrainState.load` reads the state from the same folder.

    RunError if the folder is damaged, or holds no state.
    """
    reason = damage(folder)
    if reason is not None:
        raise RunError(f"--resume {folder}: this replay is damaged: {reason}")
    report = json.loads((folder / REPORT).read_text())
    if not (folder / "state.json").is_file():
        raise RunError(
            f"--resume {folder}: it holds clips and no state ({report['state']}); resume the checkpoint "
            "before it with --mode 1, which comes to the same step"
        )
    requests = tuple(_request(each) for each in report["clips"])
    clips = Clips(load_file(folder / CLIPS)["pixels"], requests, report["cursor"])
    return Replay(clips, report["step"], report)


def _request(record: Mapping[str, Any]) -> ClipRequest:  # Any: JSON
    crop = record["crop"]
    return ClipRequest(
        video=VideoRef(record["video"]["id"], record["video"]["path"]),
        start=record["start"],
        stride=record["stride"],
        crop=None if crop is None else (crop[0], crop[1]),
        flip=record["flip"],
        cursor=record["cursor"],
        sample=record["sample"],
        attempt=record["attempt"],
    )


def explain_bad_step(bad: BadPlace, folder: Path, *, step: int, clips: Clips) -> str:
    """The finding for the person who trains. folder: what `write_replay` returned."""
    names = ", ".join(dict.fromkeys(request.video.id for request in clips.requests))
    again = (
        f"repeat it with the same command and --resume {folder} --mode 1"
        if (folder / "state.json").is_file()
        else "the state before it was not finite either, so resume an earlier checkpoint with --mode 1"
    )
    return f"step {step}: {bad.sentence()}; clips: {names}; written to {folder}; {again}"
