"""Folders of runs in the formats that a training writes, without training: long ones and hostile ones."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from causalvae.config import TrainSettings, to_yaml
from causalvae.data.clips import ClipPlan, center_clip
from causalvae.data.encode import side_by_side, write_video
from causalvae.data.sources import open_source
from causalvae.flags import Given

SCRIPT = "<img src=x onerror=window.__pwned=1>"
CLOSE = "</script><script>window.__pwned=1</script>"
LINK = "<a href='javascript:window.__pwned=1'>press</a> {{7*7}} %{x} $`\u202eabc\x1b[31m"


def bundled_clip(number: int, *, frames: int, size: int) -> Tensor:
    """A clip of the package, uint8 t h w 3."""
    source = open_source("sample:")
    return center_clip(source[number % len(source)], ClipPlan(frames=frames, size=(size, size))).permute(
        1, 2, 3, 0
    )


def noisy(film: Tensor, *, deviation: float, seed: int) -> Tensor:
    """A film t h w 3 with noise that grows from its first frame to its last: its PSNR falls."""
    generator = torch.Generator().manual_seed(seed)
    growth = torch.linspace(0.5, 1.5, len(film)).view(-1, 1, 1, 1)
    noise = torch.randn(film.shape, generator=generator) * deviation * growth
    return (film.float() + noise).round().clamp(0, 255).to(torch.uint8)


def write_films(
    folder: Path, *, steps: list[int], clips: int = 2, frames: int = 9, size: int = 64, distinct: int = 4
) -> None:
    """samples/ as a training leaves it; of the steps only `distinct` differ, so that it is quick."""
    samples = folder / "samples"
    samples.mkdir(parents=True, exist_ok=True)
    for clip in range(clips):
        film = bundled_clip(clip, frames=frames, size=size)
        made: list[Path] = []
        for number, step in enumerate(steps):
            path = samples / f"step-{step:08d}-clip{clip}.mp4"
            if len(made) < distinct:
                recon = noisy(film, deviation=24.0 / (1 + len(made)), seed=clip)
                write_video(path, side_by_side(film, recon))
                made.append(path)
            else:
                shutil.copy(made[number * distinct // len(steps)], path)


def write_run(folder: Path, *, max_steps: int, log_steps: int = 10, saves: int = 5, **given: Any) -> Path:
    """Settings, facts, numbers, checkpoints' folders, log and evaluations of a run of some thousand steps."""
    folder.mkdir(parents=True)
    chosen = {"exp_name": folder.name, "video_path": "sample:", "max_steps": max_steps, **given}
    settings = TrainSettings(**chosen)
    (folder / "config.yaml").write_text(
        to_yaml(settings, {k: Given(v, "command line") for k, v in chosen.items()})
    )
    facts = {
        "command": ["causalvae", "train", "--max_steps", str(max_steps)],
        "device": "cpu",
        "torch": {"version": "2.13.0", "threads": 1, "gpus": []},
        "weights": {"file": "start.ckpt", "sha256": "ab" * 32},
        "dataset": {"name": "sample:", "videos": 2, "fingerprint": "cd" * 32},
        "warnings": ["8 workers on 2 cores; 2 would do"],
    }
    (folder / "run.json").write_text(json.dumps(facts))
    steps = [max_steps * (n + 1) // saves for n in range(saves)]
    for step in steps:
        (folder / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(metric_lines(max_steps, log_steps)))
    log = [f"2026-01-01 00:00:00,000 step {step}/{max_steps}  loss 0.1\n" for step in steps]
    log.insert(2, "2026-01-01 00:00:00,000 warning: the disk is nearly full\n")
    (folder / "log.txt").write_text("".join(log))
    for number, step in enumerate(steps):
        write_eval(folder / "eval" / f"step-{step:08d}.json", step=step, psnr=24.0 + number)
    return folder


def metric_lines(max_steps: int, log_steps: int) -> list[str]:
    """Lines of metrics.jsonl: falling losses with noise, one spike, one step that was skipped."""
    steps = torch.arange(log_steps, max_steps + 1, log_steps)
    noise = torch.randn(len(steps), 6, generator=torch.Generator().manual_seed(0))
    lines: list[str] = []
    for row, step in enumerate(steps.tolist()):
        part, n = step / max_steps, noise[row].tolist()
        loss = 0.04 + 0.2 / (1 + 30 * part) + 0.01 * n[0]
        record = {"step": step, "time": 1.79e9 + step * 0.4, "cursor": step}
        record |= {
            "total": loss,
            "pixel": loss * 0.7,
            "kl": 0.8 + 0.02 * n[1],
            "learning_rate": 1e-4 * (1 - part),
        }
        record |= {
            "grad_norm": abs(1.5 + n[2]),
            "critic": 1 + 0.1 * n[3],
            "critic_accuracy_real": 0.6 + 0.05 * n[4],
        }
        record |= {
            "loss_scale": 512.0,
            "clips_per_second": 9 + 0.3 * n[5],
            "data_wait": 0.02,
            "memory_gib": 21.5,
        }
        if row == len(steps) // 2:
            record["total"] = 9.75  # the spike
        if row == len(steps) // 3:
            record = {
                "step": step,
                "time": record["time"],
                "cursor": step + 1,
                "loss_scale": 256.0,
                "skipped": 1,
            }
        lines.append(json.dumps(record) + "\n")
    return lines


def write_eval(path: Path, *, step: int, psnr: float, **more: Any) -> Path:
    """A file of `causalvae eval`: three clips, PSNR and SSIM with intervals, PSNR by frame."""
    path.parent.mkdir(parents=True, exist_ok=True)
    by_frame = [psnr - 0.1 * frame for frame in range(9)]
    clips = [
        {
            "id": f"clip {n}.mp4#0",
            "video": f"clip {n}.mp4",
            "start": 0,
            "metrics": {"psnr": psnr + (2, -3, 1)[n], "ssim": 0.8 + 0.01 * n},
            "psnr_by_frame": [value + (2, -3, 1)[n] for value in by_frame],
        }
        for n in range(3)
    ]
    record = {
        "format": "causalvae eval 1",
        "checkpoint": {"file": "model.safetensors", "sha256": "ef" * 32, "set": "ema"},
        "step": step,
        "settings": {"frames": 9, "resolution": "64x64", "sample_rate": 1, "clips_per_video": 1},
        "metrics": {
            "psnr": {
                "mean": psnr,
                "low": psnr - 0.5,
                "high": psnr + 0.5,
                "clips": 3,
                "unit": "dB",
                "better": "higher",
            },
            "ssim": {"mean": 0.81, "low": 0.8, "high": 0.82, "clips": 3, "unit": "", "better": "higher"},
        },
        "curves": {"psnr_by_frame": {"x": [*range(9)], "y": by_frame, "unit": "dB", "x_label": "frame"}},
        "latents": {"deviation": [0.9, 1.1, 1.0, 0.02]},
        "compute": {"encode_clips_per_second": 12.5, "parameters": 6_200_000},
        "clips": clips,
        "unreadable": [],
        **more,
    }
    path.write_text(json.dumps(record))
    return path


def write_hostile_run(parent: Path) -> Path:
    """A run in which every name that can come from elsewhere tries to be a script."""
    folder = write_run(parent / SCRIPT.replace("/", ""), max_steps=200, saves=4)
    config = (folder / "config.yaml").read_text().splitlines()
    kept = [line for line in config if not line.startswith(("exp_name", "video_path"))]
    texts = {"exp_name": SCRIPT + LINK, "video_path": CLOSE, CLOSE: LINK}
    kept += [f"{json.dumps(name)}: {json.dumps(value)}  # {SCRIPT}" for name, value in texts.items()]
    (folder / "config.yaml").write_text("\n".join(kept) + "\n")
    facts = json.loads((folder / "run.json").read_text())
    facts |= {"command": ["causalvae", CLOSE, SCRIPT], "warnings": [CLOSE, LINK], SCRIPT: {CLOSE: SCRIPT}}
    facts["dataset"] = {"name": CLOSE, LINK: SCRIPT}
    (folder / "run.json").write_text(json.dumps(facts))
    with (folder / "metrics.jsonl").open("a") as file:
        for step in (201, 202):
            file.write(
                json.dumps({"step": step, SCRIPT: 1.0, CLOSE: 2.0, LINK: "nan", "__proto__": 3.0}) + "\n"
            )
    with (folder / "log.txt").open("a") as file:
        file.write(f"2026-01-01 00:00:00,000 warning: {SCRIPT}{CLOSE}\n")
    with (folder / "quarantine.jsonl").open("a") as file:
        file.write(json.dumps({"video": SCRIPT, "path": "x", "reason": CLOSE + "\udcff"}) + "\n")
    curves = {CLOSE: {"x": [SCRIPT, LINK], "y": [1.0, 2.0], "unit": SCRIPT, "x_label": CLOSE}}
    clips = [{"id": SCRIPT, "metrics": {CLOSE: 1.0, "psnr": 3.0}, "psnr_by_frame": [1.0, 2.0]}]
    facts = {"curves": curves, "clips": clips, "latents": {SCRIPT: [1.0, 2.0]}, "compute": {CLOSE: LINK}}
    write_eval(
        folder / "eval" / "step-00000200.json", step=200, psnr=20.0, **facts, unreadable=[{"video": SCRIPT}]
    )
    write_films(folder, steps=[100, 200], clips=1)
    (folder / "samples" / f"{SCRIPT}.mp4").write_bytes(b"no film")
    return folder
