"""The networks of a run and their optimisers: their weights, numbers, memory and average."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from causalvae import rng
from causalvae.config import TrainSettings, warmup_steps
from causalvae.losses import LossPlan, build_critic
from causalvae.machine import Machine, available_bytes, hand_back_memory, home
from causalvae.models.build import Model, build, skeleton
from causalvae.models.diffusers import DiffusersVAE
from causalvae.models.presets import PRESETS, ModelConfig
from causalvae.rundir import MANIFEST, Checkpoint
from causalvae.train.convolutions import (
    Checked,
    ConvShape,
    check_convolutions,
    kernels,
    shapes_of_run,
)
from causalvae.train.optim import build_optimizer
from causalvae.train.parts import clip_plan, load_start
from causalvae.train.plan import StepPlan, plan_step
from causalvae.train.precision import Precision, first_loss_scale, lower
from causalvae.train.predict import blueprint
from causalvae.train.stability import LevelOff
from causalvae.train.state import TrainState, read_counters
from causalvae.weights.load import Loaded, own_config
from causalvae.weights.names import differences
from causalvae.weights.read import find_weights


@dataclass(frozen=True)
class Built:
    """What a run is made of. weights: what was loaded, for run.json (Any: JSON). precision: what is in force.
    notes: lines for the log; warnings: what to warn of.
    """

    state: TrainState
    precision: Precision
    weights: dict[str, Any] | None
    plan: StepPlan
    notes: list[str]
    warnings: list[str]


@dataclass(frozen=True)
class _First:
    """An autoencoder with its first weights. facts: what was loaded (Any: JSON). critic: its tensors."""

    vae: Model
    facts: dict[str, Any] | None
    critic: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    notes: tuple[str, ...] = ()


def build_state(
    settings: TrainSettings,
    device: torch.device,
    *,
    start: Checkpoint | None,
    loaded: Loaded | None,
    precision: Precision,
    loss: LossPlan,
    scaled: Sequence[str],
) -> Built:
    """Networks, averages and optimisers, from the start or as the checkpoint has them.

    loaded: first weights of a new run, if they were read. scaled: flags of the loss scale that were given.
    """
    first = _autoencoder(settings, start=start, loaded=loaded)
    precision = _precision_of_model(first.vae, precision, device)
    vae, critic = first.vae.to(device), _critic(settings, device)
    notes = [*first.notes, *_judge(critic, first.critic, settings.load_from_checkpoint)]
    lay_out(vae)
    names = _learning(vae, settings.train_parts)
    kept = read_counters(start.path) if start is not None else {}
    known = {"loss": loss, "available": available_bytes(str(device)), "kept": kept}
    plan = step_plan(settings, (vae, critic), precision=precision, **known)
    if plan.tight:
        hand_back_memory()
    vae.set_recompute(on=plan.recompute)
    ema = {name: p.detach().clone() for name, p in vae.named_parameters()} if settings.use_ema else {}
    marks = {"parts": plan.parts, "recompute": plan.recompute, "batches": batch_shapes(settings)}
    checked = _check_convolutions(settings, vae, critic, precision=precision, parts=plan.parts, kept=kept)
    state = _trained(settings, vae, critic, ema=ema, names=names, precision=precision, keep=checked.keep)
    state.kept = {**marks, "kernels": checked.kernels, "in_fp32": sorted(checked.keep)}
    if settings.mode != 2:
        how = {"value": settings.init_loss_scale, "window": settings.loss_scale_window, "given": bool(scaled)}
        state.scale = first_loss_scale(precision, **how)
        state.critic_scale = first_loss_scale(precision, **how) if critic is not None else None
    if start is not None:
        state.load(start.path)
    said = [line for line in (*notes, plan.sentence(), checked.message) if line]
    warned = [*checked.notes, *_limits(settings, vae, precision=precision, scaled=scaled)]
    return Built(state, precision, first.facts, plan, said, warned)


def _precision_of_model(vae: Model, precision: Precision, device: torch.device) -> Precision:
    """What this model computes in; warnings are of the model alone.

    Convolutions of diffusers are no `Conv`: they can't be kept from what a CPU gets wrong in fewer bits.
    """
    if not isinstance(vae, DiffusersVAE) or device.type != "cpu" or precision.level == "O0":
        return replace(precision, warnings=())
    said = (
        f"--precision {precision.name}: on a CPU diffusers' models compute in fp32 (amp_level O0); its "
        f"kernels for gradients in {precision.name} are wrong for some convolutions"
    )
    return Precision(warnings=(said,))


def _autoencoder(settings: TrainSettings, *, start: Checkpoint | None, loaded: Loaded | None) -> _First:
    """The model with its first weights, and whose they are; those of a checkpoint are read with its state."""
    if start is not None:
        file = find_weights(start.path)
        kind, config = own_config(file)
        manifest = json.loads((start.path / MANIFEST).read_text())
        facts = {"file": str(file), "sha256": manifest["files"][file.name]["sha256"], "model": kind}
        return _First(build(config, seed=settings.seed), facts)
    loaded = loaded or load_start(settings)
    if loaded is None:
        return _First(build(PRESETS[settings.model], seed=settings.seed), None)
    vae = build(loaded.config, seed=settings.seed)
    vae.load_state_dict(vae.state_dict() | loaded.tensors, strict=True)
    return _First(vae, loaded.facts(), loaded.critic, loaded.notes)


def _judge(critic: nn.Module | None, found: Mapping[str, Tensor], given: str | None) -> tuple[str, ...]:
    """Give the critic the weights that the file has for it, if they fit; a note of what became of them."""
    if not found or critic is None:
        return ()
    own = critic.state_dict()
    counts = {name for name in own if name.endswith("num_batches_tracked")}  # MindSpore has none
    shapes = {name: tuple(t.shape) for name, t in found.items()}
    text = differences({n: tuple(t.shape) for n, t in own.items() if n in found or n not in counts}, shapes)
    if text:
        return (f"the critic in {given} is another than this run's, so it begins anew: {text}",)
    critic.load_state_dict(own | dict(found), strict=True)
    return (f"the critic's weights are those of {given} too",)


def _trained(
    settings: TrainSettings,
    vae: Model,
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


def batch_shapes(settings: TrainSettings) -> list[tuple[int, ...]]:
    """b 3 t h w of every kind of batch."""
    plan = clip_plan(settings)
    return [(plan.batch, 3, frames, *size) for frames, size in plan.shapes()]


def _limits(settings: TrainSettings, vae: Model, *, precision: Precision, scaled: Sequence[str]) -> list[str]:
    """What is done otherwise than was asked for, in these numbers and with this model."""
    said = list(precision.warnings)
    if precision.level == "O0":
        said += [f"--{n} has no effect: the run computes in fp32, which needs no loss scale" for n in scaled]
    if not isinstance(vae, DiffusersVAE):
        return said
    if precision.level in ("O2", "O3"):
        said.append(f"--amp_level {precision.level} is O1 here: diffusers' models keep their weights in fp32")
    if settings.jit_level != "O0":
        said.append(f"--jit_level {settings.jit_level} has no effect: diffusers' models run eager")
    return said


def sketch(settings: TrainSettings, config: ModelConfig) -> tuple[Model, nn.Module | None]:
    """The networks of a run on the meta device: what its step is planned from, without their memory."""
    vae, critic = skeleton(config), _critic(settings, torch.device("meta"))
    lay_out(vae)
    _learning(vae, settings.train_parts)
    return vae, critic


def step_plan(
    settings: TrainSettings,
    networks: tuple[Model, nn.Module | None],
    *,
    precision: Precision,
    loss: LossPlan,
    available: int | None,
    kept: Mapping[str, Any],  # Any: JSON
) -> StepPlan:
    """Parts and recomputation. Convolutions that a check will keep in fp32 are planned in fewer bits.

    networks: autoencoder and critic, on any device. available: bytes that a step may take, None if unknown.
    kept: of the checkpoint. What `auto` found then is taken again, whatever memory is free now, since the
    number of parts decides how sums are rounded.
    """
    least = settings.gradient_accumulation_steps
    if settings.mode == 2:
        return StepPlan(least)
    if settings.memory.policy == "auto" and _as_now(kept, settings) and kept["parts"] >= least:
        return StepPlan(kept["parts"], recompute=kept["recompute"])
    return plan_step(
        on_paper(settings, networks, precision=precision),
        shapes=batch_shapes(settings),
        parts=settings.gradient_accumulation_steps,
        memory=settings.memory,
        available_bytes=available,
        loss=loss,
        optimizer=settings.optim,
    )


def on_paper(
    settings: TrainSettings, networks: tuple[Model, nn.Module | None], *, precision: Precision
) -> TrainState:
    """The training of these networks on the meta device, in the numbers of the run."""
    lowered = partial(lower, precision=precision)
    return blueprint(*networks, ema=settings.use_ema, lowered=lowered)


def _as_now(kept: Mapping[str, Any], settings: TrainSettings) -> bool:
    """Whether a checkpoint was made with batches of these sizes."""
    return kept.get("batches") == [list(shape) for shape in batch_shapes(settings)]


def _check_convolutions(
    settings: TrainSettings,
    vae: Model,
    critic: nn.Module | None,
    *,
    precision: Precision,
    parts: int,
    kept: Mapping[str, Any],  # Any: JSON
) -> Checked:
    """Which convolutions stay in fp32: on a CPU those whose kernels are wrong in fewer bits.

    kept: of the checkpoint; what was found then holds for the same batches, parts and kernels.
    """
    on_cpu = vae.last_layer.get_parameter("weight").device.type == "cpu"
    if not on_cpu or precision.level == "O0" or settings.mode == 2:
        return Checked(frozenset(), "")
    machine = Machine.look()
    same = kernels(precision.numbers, cpu=machine.cpu, variables=os.environ)
    if kept.get("kernels") == same and kept["parts"] == parts and _as_now(kept, settings):
        return Checked(frozenset(kept["in_fp32"]), "", kernels=same)
    shapes: dict[str, frozenset[ConvShape]] = {}
    for clips in batch_shapes(settings):
        pieces = min(parts, clips[0])
        found = shapes_of_run(vae, critic, geometry=vae.geometry, clips=clips, parts=pieces)
        shapes = {name: shapes.get(name, frozenset()) | each for name, each in found.items()}
    return check_convolutions(
        shapes,
        numbers=precision.numbers,
        cache=home(os.environ) / "convolutions.json",
        cpu=machine.cpu,
        variables=os.environ,
    )


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


def _learning(vae: Model, parts: Literal["all", "decoder", "encoder"]) -> set[str]:
    """Names of the parameters that learn; the others are frozen.

    The last layer keeps its gradient: the adaptive weight is measured at it.
    """
    frozen = {"all": (), "decoder": ("encoder.", "quant_conv."), "encoder": ("decoder.", "post_quant_conv.")}
    own = {name: name.removeprefix("net.") for name, _ in vae.named_parameters()}
    names = {name for name, inner in own.items() if not inner.startswith(frozen[parts])}
    for name, parameter in vae.named_parameters():
        parameter.requires_grad_(name in names)
    vae.last_layer.get_parameter("weight").requires_grad_(True)
    return names
