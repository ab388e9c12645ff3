"""The parts of a run, made from its settings: where it starts, its networks and optimisers, its plans.

Together with `train.trainer` the only reader of TrainSettings.
"""

import json
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

import causalvae
from causalvae import rng
from causalvae.config import TrainSettings, changed_mathematics, continued, warmup_steps
from causalvae.data.clips import ClipPlan
from causalvae.data.sources import ClipSource
from causalvae.errors import ConfigError, RunError
from causalvae.flags import read_settings
from causalvae.losses import LossPlan, build_critic
from causalvae.machine import Machine, available_bytes, capability, environment, home, torch_facts
from causalvae.models.build import build
from causalvae.models.causalvae import CausalVAE, set_recompute
from causalvae.models.presets import PRESETS, CausalVAEConfig
from causalvae.perceptual import Perceptual, Shelf, build_perceptual, refuse_change
from causalvae.rundir import MANIFEST, Checkpoint, RunDir, damage
from causalvae.train.convolutions import Checked, ConvShape, check_convolutions, shapes_of_run
from causalvae.train.optim import build_optimizer
from causalvae.train.plan import StepPlan, plan_step
from causalvae.train.precision import Precision, first_loss_scale, lower
from causalvae.train.replay import is_replay
from causalvae.train.stability import LevelOff
from causalvae.train.state import TrainState, read_counters
from causalvae.weights.read import Origin, find_weights, read_header, read_model


def check_start(settings: TrainSettings, path: Path) -> None:
    """Look at what a new run in `path` would start from, so that a mistake there leaves no folder behind."""
    if (path / "checkpoints").exists():
        return
    if settings.mode == 2 and settings.load_from_checkpoint is None:
        raise ConfigError(
            f"--mode 2 evaluates a checkpoint, and {path} has none; give the --exp_name and --output_dir of "
            "a run, or --load_from_checkpoint"
        )
    if settings.resume not in ("auto", "never"):
        _checkpoint_at(Path(settings.resume))
    elif settings.load_from_checkpoint is not None:
        read_header(find_weights(Path(settings.load_from_checkpoint)))


def starting_point(
    run: RunDir, settings: TrainSettings, *, source: ClipSource
) -> tuple[TrainSettings, Checkpoint | None]:
    """The settings in force and the checkpoint to go on from; records of later steps are dropped.

    Refuses changed mathematics, and a run that is not empty where --resume never was given.
    """
    if settings.resume == "never" and not run.was_empty:
        raise RunError(
            f"{run.path} is not empty and --resume never was given; choose another --exp_name, or leave "
            "--resume out to go on"
        )
    replay = replayed(settings)
    checkpoint = None if replay is not None else run.latest()
    if checkpoint is None and settings.resume not in ("auto", "never"):
        checkpoint = _checkpoint_at(Path(settings.resume))
    if checkpoint is not None:
        before = checkpoint.path.parent.parent
        settings = _continue(settings, before / "config.yaml")
        if before == run.path:
            _refuse_other_videos(run.path / "run.json", source)
        torch.set_num_threads(read_counters(checkpoint.path)["threads"])
    if settings.mode != 2 and replay is None:
        run.rewind("metrics.jsonl", checkpoint.step if checkpoint is not None else 0)
    return settings, checkpoint


def replayed(settings: TrainSettings) -> Path | None:
    """The folder of the bad step that --resume asks to repeat; None if it asks for something else."""
    if settings.resume in ("auto", "never") or not is_replay(Path(settings.resume)):
        return None
    if settings.mode != 1:
        raise ConfigError(f"--resume {settings.resume}: this is a step to repeat; add --mode 1")
    return Path(settings.resume)


def _refuse_other_videos(facts: Path, source: ClipSource) -> None:
    saved = json.loads(facts.read_text())["dataset"]
    if saved["fingerprint"] != source.fingerprint:
        raise ConfigError(
            f"--video_path {source.name}: not the videos that {facts.parent} was trained on: it had "
            f"{saved['videos']}, "
            f"now there are {len(source)}, or their sizes changed. Give those again, or start another run "
            "from this one: --exp_name NEW --resume RUN/checkpoints/step-N"
        )


def _checkpoint_at(path: Path) -> Checkpoint:
    if not (path / "state.json").is_file():
        raise ConfigError(
            f"--resume {path}: no checkpoint is there; name a folder such as RUN/checkpoints/step-00001000 "
            "that holds state.json"
        )
    reason = damage(path)
    if reason is not None:
        raise RunError(f"--resume {path}: this checkpoint is damaged: {reason}; name an earlier one")
    return Checkpoint(read_counters(path)["step"], path, full=True)


def _continue(settings: TrainSettings, config: Path) -> TrainSettings:
    saved, _ = read_settings(TrainSettings, ["--config", str(config)])
    changed = changed_mathematics(saved, settings)
    if changed:
        listed = "; ".join(f"--{name}: {old} -> {new}" for name, old, new in changed)
        raise ConfigError(
            f"{config.parent} was trained with other settings, and with these it would not be the same "
            f"run: {listed}. Give the old values, or choose another --exp_name"
        )
    return continued(saved, settings)


@dataclass(frozen=True)
class Built:
    """What a run is made of. notes: lines for the log; warnings: what to warn of."""

    state: TrainState
    origin: Origin | None
    plan: StepPlan
    notes: list[str]
    warnings: list[str]


def build_state(
    settings: TrainSettings,
    device: torch.device,
    *,
    start: Checkpoint | None,
    precision: Precision,
    loss: LossPlan,
    scaled: bool,
) -> Built:
    """Networks, averages and optimisers, from the start or as the checkpoint has them.

    scaled: a loss scale was asked for.
    """
    config, tensors, origin = PRESETS[settings.model], None, None
    if start is not None:
        config, origin = _model_of(start)
    elif settings.load_from_checkpoint is not None:
        config, tensors, origin = read_model(Path(settings.load_from_checkpoint))
    vae = build(config, seed=settings.seed)
    if tensors is not None:
        vae.load_state_dict(tensors, strict=True)
    vae, critic = vae.to(device), _critic(settings, device)
    lay_out(vae)
    plan = _step_plan(settings, vae, critic, loss=loss, device=device)
    set_recompute(vae, on=plan.recompute)
    ema = {name: p.detach().clone() for name, p in vae.named_parameters()} if settings.use_ema else {}
    names = _learning(vae, settings.train_parts)
    checked = _check_convolutions(settings, vae, critic, precision=precision, parts=plan.parts)
    state = _trained(settings, vae, critic, ema=ema, names=names, precision=precision, keep=checked.keep)
    if settings.mode != 2:
        how = {"value": settings.init_loss_scale, "window": settings.loss_scale_window, "given": scaled}
        state.scale = first_loss_scale(precision, **how)
        state.critic_scale = first_loss_scale(precision, **how) if critic is not None else None
    if start is not None:
        state.load(start.path)
    said = [line for line in (plan.sentence(), checked.message) if line]
    warnings = list(checked.notes)
    if scaled and precision.level == "O0":
        warnings.append(
            "--init_loss_scale has no effect: the run computes in fp32, which needs no loss scale"
        )
    return Built(state, origin, plan, said, warnings)


def _trained(
    settings: TrainSettings,
    vae: CausalVAE,
    critic: nn.Module | None,
    *,
    ema: dict[str, Tensor],
    names: set[str],
    precision: Precision,
    keep: frozenset[str],
) -> TrainState:
    """Networks in their numbers, with their optimisers. names: parameters of the autoencoder that learn."""
    logvar = nn.Parameter(
        torch.tensor(settings.logvar_init, device=vae.last_layer.get_parameter("weight").device),
        requires_grad=settings.learn_logvar,
    )
    masters = lower(vae, precision, keep=_under("vae.", keep))
    learned = [(name, p) for name, p in (masters or vae).named_parameters() if name in names]
    how = {
        "kind": settings.optim,
        "lr": settings.start_learning_rate,
        "betas": settings.betas,
        "weight_decay": settings.weight_decay,
    }
    state = TrainState(
        vae=vae,
        ema=ema,
        critic=critic,
        logvar=logvar,
        optimizer=build_optimizer([*learned, ("logvar", logvar)], **how),
        critic_optimizer=None,
        level_off=LevelOff(skip=warmup_steps(settings)) if settings.disc_start is None and critic else None,
        masters=masters,
    )
    if critic is not None:
        state.critic_masters = lower(critic, precision, keep=_under("critic.", keep))
        judged = (state.critic_masters or critic).named_parameters()
        state.critic_optimizer = build_optimizer(judged, **how)
    return state


def _under(prefix: str, names: frozenset[str]) -> set[str]:
    return {name.removeprefix(prefix) for name in names if name.startswith(prefix)}


def _batch_shapes(settings: TrainSettings) -> list[tuple[int, ...]]:
    """b 3 t h w of every kind of batch."""
    plan = clip_plan(settings)
    return [(plan.batch, 3, frames, *size) for frames, size in plan.shapes()]


def _step_plan(
    settings: TrainSettings, vae: CausalVAE, critic: nn.Module | None, *, loss: LossPlan, device: torch.device
) -> StepPlan:
    return plan_step(
        vae,
        critic,
        shapes=_batch_shapes(settings),
        parts=settings.gradient_accumulation_steps,
        memory=settings.memory,
        available_bytes=available_bytes(str(device)),
        loss=loss,
        optimizer=settings.optim,
    )


def _check_convolutions(
    settings: TrainSettings, vae: CausalVAE, critic: nn.Module | None, *, precision: Precision, parts: int
) -> Checked:
    """Which convolutions stay in fp32: on a CPU those whose kernels are wrong in fewer bits."""
    on_cpu = vae.last_layer.get_parameter("weight").device.type == "cpu"
    if not on_cpu or precision.level == "O0" or settings.mode == 2:
        return Checked(frozenset(), "")
    shapes: dict[str, frozenset[ConvShape]] = {}
    for clips in _batch_shapes(settings):
        pieces = min(parts, clips[0])
        found = shapes_of_run(vae, critic, geometry=vae.geometry, clips=clips, parts=pieces)
        shapes = {name: shapes.get(name, frozenset()) | each for name, each in found.items()}
    return check_convolutions(
        shapes,
        numbers=precision.numbers,
        cache=home(os.environ) / "convolutions.json",
        cpu=Machine.look().cpu,
        variables=os.environ,
    )


def choose_precision(settings: TrainSettings, path: Path, device: torch.device) -> Precision:
    """What the run in `path` computes in here; a run that goes on keeps to what it began with."""
    began = _facts_before(settings, path)
    saved = None if began is None else (began["precision"], began["amp_level"])
    wanted = {settings.precision, *([saved[0]] if saved is not None else [])} & {"bf16", "fp16"}
    if settings.precision == "auto" and device.type == "cuda":
        wanted.add("bf16")
    able = capability(str(device), os.environ, names=sorted(wanted))
    return Precision.of(
        settings.precision, settings.amp_level, device=str(device), capability=able, saved=saved
    )


def _learning(vae: CausalVAE, parts: Literal["all", "decoder", "encoder"]) -> set[str]:
    """Names of the parameters that learn; the others are frozen.

    The last layer keeps its gradient: the adaptive weight is measured at it.
    """
    frozen = {"all": (), "decoder": ("encoder.", "quant_conv."), "encoder": ("decoder.", "post_quant_conv.")}
    names = {name for name, _ in vae.named_parameters() if not name.startswith(frozen[parts])}
    for name, parameter in vae.named_parameters():
        parameter.requires_grad_(name in names)
    vae.last_layer.get_parameter("weight").requires_grad_(True)
    return names


def _model_of(start: Checkpoint) -> tuple[CausalVAEConfig, Origin]:
    """Config and origin of a checkpoint's weights by header and manifest; TrainState reads the tensors."""
    file = find_weights(start.path)
    manifest = json.loads((start.path / MANIFEST).read_text())
    return read_header(file), Origin(file, manifest["files"][file.name]["sha256"], file.stem)


def lay_out(module: nn.Module) -> None:
    """Lay out the weights of 3D convolutions with channels last, where their kernels are fastest.

    By hand: Module.to(memory_format=...) refuses a module that has 2D convolutions as well.
    """
    for parameter in module.parameters():
        if parameter.ndim == 5:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last_3d)


def _critic(settings: TrainSettings, device: torch.device) -> nn.Module | None:
    if settings.disc_type == "none":
        return None
    base = rng.key("critic", settings.seed)
    return build_critic(settings.disc_type, base=base, norm=settings.disc_norm).to(device)


def clip_plan(settings: TrainSettings) -> ClipPlan:
    """How clips are cut; the batch holds all that one update sees."""
    sizes = settings.resolutions or (settings.resolution,)
    frames = settings.frames or (settings.video_num_frames,)
    return ClipPlan(
        frames=max(frames),
        size=(sizes[0].height, sizes[0].width),
        frame_buckets=settings.frames or (),
        size_buckets=tuple((size.height, size.width) for size in settings.resolutions or ()),
        image_ratio=settings.image_ratio,
        stride=settings.sample_rate,
        batch=settings.batch_size * settings.gradient_accumulation_steps,
        seed=settings.seed,
        crop=settings.crop,
        flip=settings.flip,
        short_videos=settings.short_videos,
    )


def find_perceptual(settings: TrainSettings, path: Path) -> tuple[Perceptual | None, list[str]]:
    """The network of the perceptual term for the run in `path`, and what to warn of.

    A run keeps to what it was begun with: ConfigError if that is another network now.
    """
    began = _facts_before(settings, path)
    choice, warnings = settings.perceptual, list[str]()
    if settings.mode == 2:
        return None, []
    if began is not None and choice == "auto" and began["perceptual"] is None:
        choice, warnings = "none", ["this run was begun without a perceptual term and goes on without"]
    smallest = min((min(size), size) for _, size in clip_plan(settings).shapes())[1]
    found, more = build_perceptual(choice, size=smallest, shelf=Shelf.of(os.environ), progress=True)
    if began is not None:
        refuse_change(began["perceptual"], found, run=path)
    return found, warnings + more


def _facts_before(settings: TrainSettings, path: Path) -> dict[str, Any] | None:  # Any: JSON
    """run.json of the run that goes on, or whose checkpoint --resume names; None at a beginning."""
    if settings.resume not in ("auto", "never") and not (path / "checkpoints").exists():
        path = Path(settings.resume).absolute().parent.parent
    file = path / "run.json"
    return json.loads(file.read_text()) if (path / "checkpoints").exists() and file.exists() else None


def loss_plan(settings: TrainSettings, perceptual: Perceptual | None) -> LossPlan:
    """What the reconstruction pays for."""
    return LossPlan(
        kind=settings.loss_type,
        perceptual=None if perceptual is None else perceptual.module,
        perceptual_weight=settings.perceptual_weight,
        kl_weight=settings.kl_weight,
        disc_weight=settings.disc_weight,
        lecam_weight=settings.lecam_weight,
        r1_weight=settings.r1_weight,
    )


def run_facts(
    source: ClipSource, origin: Origin | None, *, perceptual: Perceptual | None, precision: Precision
) -> dict[str, Any]:  # Any: JSON
    """What a run stands on: versions, machine, data and weights."""
    return {
        "causalvae": causalvae.__version__,
        "python": platform.python_version(),
        "torch": asdict(torch_facts()),
        "machine": asdict(Machine.look()),
        "environment": environment(os.environ),
        **precision.facts(),
        "jit_level": "O0",
        "deterministic": True,
        "weights": None if origin is None else {"file": str(origin.path), "sha256": origin.sha256},
        "perceptual": None if perceptual is None else perceptual.facts(),
        "dataset": {"name": source.name, "videos": len(source), "fingerprint": source.fingerprint},
    }
