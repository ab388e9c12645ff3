"""How a step is made to fit into memory: blocks recomputed, the batch in parts, and the same result."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from causalvae.errors import ConfigError
from causalvae.flags import MemoryBudget
from causalvae.losses import LossPlan
from causalvae.models.causalvae import CausalVAE
from causalvae.train.predict import StepBytes, step_bytes

GIB = 2**30
# More than any model here keeps of a value of the clip, in bytes: what is surely small is not counted.
CERTAIN_BYTES_PER_VALUE = 40_000
CERTAIN_BYTES_PER_WEIGHT = 40


@dataclass(frozen=True)
class StepPlan:
    """parts: pieces of a batch. recompute: whether blocks run again in backward.

    peak_bytes: predicted for the largest clips, None where it was not needed. budget_bytes: None without one.
    """

    parts: int
    recompute: bool = False
    peak_bytes: int | None = None
    budget_bytes: int | None = None

    @property
    def fits(self) -> bool:
        """Whether the prediction is within the budget, as far as both are known."""
        return self.peak_bytes is None or self.budget_bytes is None or self.peak_bytes <= self.budget_bytes

    def sentence(self) -> str:
        """What was planned, for the log; empty where there is nothing to say."""
        how = [f"the batch goes in {self.parts} parts"] if self.parts > 1 else []
        how += ["blocks are recomputed"] if self.recompute else []
        if not how:
            return ""
        has = "" if self.budget_bytes is None else f" of {self.budget_bytes / GIB:.1f}"
        size = "" if self.peak_bytes is None else f", about {self.peak_bytes / GIB:.1f}{has} GiB"
        return f"memory: {' and '.join(how)}{size}; the result is that of the whole batch"


def plan_step(
    vae: CausalVAE,
    critic: nn.Module | None,
    *,
    shapes: Sequence[Sequence[int]],
    parts: int,
    memory: MemoryBudget,
    available_bytes: int | None,
    loss: LossPlan,
    optimizer: str,
) -> StepPlan:
    """The fastest plan whose prediction fits.

    shapes: b 3 t h w of every kind of batch. parts: the least number. available_bytes: what `auto` may use,
    None if unknown. ConfigError where a budget was given and nothing fits into it.
    """
    if memory.policy in ("speed", "lean"):
        return StepPlan(parts, recompute=memory.policy == "lean")
    budget = memory.num_bytes if memory.num_bytes is not None else available_bytes
    if budget is None or (memory.num_bytes is None and _surely_fits(vae, critic, shapes, budget)):
        return StepPlan(parts, budget_bytes=budget)
    plan = StepPlan(parts)
    for plan in _candidates(parts, clips=max(shape[0] for shape in shapes)):
        sizes = [
            step_bytes(
                vae,
                critic,
                shape=shape,
                parts=min(plan.parts, shape[0]),
                optimizer=optimizer,
                loss=loss,
                recompute=plan.recompute,
            )
            for shape in shapes
        ]
        plan = _with_bytes(plan, sizes, budget)
        if plan.fits:
            return plan
    if memory.num_bytes is not None and plan.peak_bytes is not None:
        raise ConfigError(
            f"--memory {memory}: a step needs at least {plan.peak_bytes / GIB:.1f} GiB; lower --resolution "
            "or --video_num_frames, take a smaller --model, or raise the budget"
        )
    return plan


def smaller(plan: StepPlan, *, clips: int) -> StepPlan | None:
    """The next plan that needs less memory; None if there is none."""
    if not plan.recompute:
        return StepPlan(plan.parts, recompute=True, budget_bytes=plan.budget_bytes)
    if plan.parts < clips:
        return StepPlan(min(2 * plan.parts, clips), recompute=True, budget_bytes=plan.budget_bytes)
    return None


def _candidates(parts: int, *, clips: int) -> Iterator[StepPlan]:
    """Plans from the fastest to the smallest."""
    plan: StepPlan | None = StepPlan(parts)
    while plan is not None:
        yield plan
        plan = smaller(plan, clips=clips)


def _with_bytes(plan: StepPlan, sizes: Sequence[StepBytes], budget: int) -> StepPlan:
    return StepPlan(plan.parts, plan.recompute, max(size.peak for size in sizes), budget)


def _surely_fits(
    vae: CausalVAE, critic: nn.Module | None, shapes: Sequence[Sequence[int]], budget: int
) -> bool:
    """Whether a rough bound is within the budget, so that nothing has to be counted."""
    weights = sum(p.numel() for network in (vae, critic) if network is not None for p in network.parameters())
    values = max(b * c * t * h * w for b, c, t, h, w in shapes)
    return weights * CERTAIN_BYTES_PER_WEIGHT + values * CERTAIN_BYTES_PER_VALUE + GIB <= budget
