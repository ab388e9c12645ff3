"""How a step is made to fit into memory: blocks recomputed, the batch in parts, and the same result.

Predictions come from `train.predict`; the choice between them is arithmetic that knows no tensors.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from causalvae.errors import ConfigError
from causalvae.flags import MemoryBudget
from causalvae.losses import LossPlan
from causalvae.machine import amount
from causalvae.train.optim import OptimizerKind
from causalvae.train.predict import step_bytes
from causalvae.train.state import TrainState

GIB = 2**30
TIGHT_SHARE = 0.5  # of its budget, from which on a step may not waste any
WORTH_IT = 0.98  # of the bytes before: more parts cost time
PARTS_RUN = 4  # are predicted by running them; beyond, every other part costs the same
# Three times what the widest preset keeps of a value of the clip, in bytes, and what AdamW holds of a weight
# with gradient, master and average: a step that fits even so is not counted.
CERTAIN_BYTES_PER_VALUE = 16_000
CERTAIN_BYTES_PER_WEIGHT = 40

Policy = Literal["auto", "speed", "lean", "budget"]


@dataclass(frozen=True)
class StepPlan:
    """parts: pieces of a batch. recompute: whether blocks run again in backward.

    peak_bytes: predicted for the largest clips, None where it was not needed. budget_bytes: None without one.
    whole_bytes: what the plan without any saving would take, None where it was not needed.
    """

    parts: int
    recompute: bool = False
    peak_bytes: int | None = None
    budget_bytes: int | None = None
    whole_bytes: int | None = None

    @property
    def fits(self) -> bool:
        """Whether the prediction is within the budget, as far as both are known."""
        return self.peak_bytes is None or self.budget_bytes is None or self.peak_bytes <= self.budget_bytes

    @property
    def tight(self) -> bool:
        """Whether memory that is freed should be handed back at once (`machine.hand_back_memory`)."""
        if self.peak_bytes is None or self.budget_bytes is None:
            return False
        return self.peak_bytes > TIGHT_SHARE * self.budget_bytes

    def sentence(self) -> str:
        """What was planned, for the log; empty where there is nothing to say."""
        how = ["blocks are recomputed"] if self.recompute else []
        how += [f"the batch goes in {self.parts} parts"] if self.parts > 1 else []
        if not how:
            return ""
        size = "" if self.peak_bytes is None else f" ({amount(self.peak_bytes)})"
        needs = "memory: "
        if self.whole_bytes is not None and self.budget_bytes is not None:
            needs = (
                f"memory: a step needs {amount(self.whole_bytes)} and may take {amount(self.budget_bytes)}: "
            )
        return f"{needs}{' and '.join(how)}{size}; the result is that of the whole batch"


Predict = Callable[[StepPlan], int]


def plan_step(
    state: TrainState,
    *,
    shapes: Sequence[Sequence[int]],
    parts: int,
    memory: MemoryBudget,
    available_bytes: int | None,
    loss: LossPlan,
    optimizer: OptimizerKind,
) -> StepPlan:
    """The fastest plan whose prediction fits, with `lean` the smallest. ConfigError if nothing fits.

    state: as `predict.step_bytes` takes it. shapes: b 3 t h w of every kind of batch. parts: the least
    number. available_bytes: what a step may use where no number is given, None if unknown.
    """
    budget = memory.num_bytes if memory.num_bytes is not None else available_bytes
    if memory.policy in ("auto", "speed") and (budget is None or _surely_fits(state, shapes, budget)):
        return StepPlan(parts, budget_bytes=budget)
    clips = max(shape[0] for shape in shapes)
    predict = predictor(state, shapes=shapes, loss=loss, optimizer=optimizer)
    return choose(clips, predict=predict, policy=memory.policy, budget_bytes=budget, least_parts=parts)


def choose(
    clips: int, *, predict: Predict, policy: Policy, budget_bytes: int | None, least_parts: int = 1
) -> StepPlan:
    """The first plan that fits, from fast to small; with `lean` the smallest. ConfigError if none fits."""
    plans = candidates(clips, policy=policy, least_parts=least_parts)
    if policy == "lean":
        least = min(predict(plan) for plan in plans)
        found = next(plan for plan in plans if WORTH_IT * predict(plan) <= least)
    else:
        fitting = (plan for plan in plans if budget_bytes is None or predict(plan) <= budget_bytes)
        found = next(fitting, None) or min(plans, key=predict)
    plan = replace(found, peak_bytes=predict(found), budget_bytes=budget_bytes)
    if not plan.fits:
        raise ConfigError(_nothing_fits(plan, policy=policy))
    return replace(plan, whole_bytes=predict(StepPlan(least_parts)))


def smaller(plan: StepPlan, *, clips: int) -> StepPlan | None:
    """The next plan that needs less memory, for a device that had too little; None if there is none."""
    if not plan.recompute:
        return StepPlan(plan.parts, recompute=True, budget_bytes=plan.budget_bytes)
    parts = _more_parts(plan.parts, clips=clips)
    return None if parts is None else StepPlan(parts, recompute=True, budget_bytes=plan.budget_bytes)


def candidates(clips: int, *, policy: Policy, least_parts: int) -> list[StepPlan]:
    """What a policy allows, from fast to small: recomputing blocks costs less time than parts do."""
    counts: list[int] = []
    parts: int | None = least_parts
    while parts is not None:
        counts.append(parts)
        parts = _more_parts(parts, clips=clips)
    if policy == "speed":
        return [StepPlan(parts) for parts in counts]
    plans = [StepPlan(parts, recompute=True) for parts in counts]
    return plans if policy == "lean" else [StepPlan(least_parts), *plans]


def _more_parts(parts: int, *, clips: int) -> int | None:
    """About twice as many, as many as torch.chunk then makes; None where every clip goes alone."""
    if parts >= clips:
        return None
    each = math.ceil(clips / min(2 * parts, clips))
    return math.ceil(clips / each)


def predictor(
    state: TrainState, *, shapes: Sequence[Sequence[int]], loss: LossPlan, optimizer: OptimizerKind
) -> Predict:
    """Bytes of a step by its plan, for the largest of these batches; each is counted once, in a second."""
    _, channels, *size = max(shapes, key=math.prod)

    @functools.cache
    def peak(parts: int, clips: int, *, recompute: bool) -> int:
        if parts > PARTS_RUN:
            each = math.ceil(clips / parts)
            few, more = (
                peak(count, count * each, recompute=recompute) for count in (PARTS_RUN // 2, PARTS_RUN)
            )
            return more + (more - few) * (parts - PARTS_RUN) // (PARTS_RUN - PARTS_RUN // 2)
        return step_bytes(
            state,
            shape=(clips, channels, *size),
            parts=parts,
            recompute=recompute,
            loss=loss,
            optimizer=optimizer,
        ).peak

    clips = max(shape[0] for shape in shapes)
    return lambda plan: peak(min(plan.parts, clips), clips, recompute=plan.recompute)


def _nothing_fits(plan: StepPlan, *, policy: Policy) -> str:
    needs, may = (amount(size or 0) for size in (plan.peak_bytes, plan.budget_bytes))
    how = "blocks recomputed" if plan.recompute else "nothing recomputed"
    parts = f" and the batch in {plan.parts} parts" if plan.parts > 1 else ""
    room = f"--memory gives it {may}" if policy == "budget" else f"{may} of the free memory may be used"
    other = "use --memory auto, or " if policy == "speed" else ""
    more = "raise the budget" if policy == "budget" else "give --memory a number to plan with another"
    return (
        f"a step needs at least {needs}, with {how}{parts}, and {room}; {other}lower --resolution, "
        f"--video_num_frames or --batch_size, take a smaller --model, or {more}"
    )


def _surely_fits(state: TrainState, shapes: Sequence[Sequence[int]], budget: int) -> bool:
    """Whether a rough bound is within the budget, so that nothing has to be counted."""
    networks = [network for network in (state.vae, state.critic) if network is not None]
    weights = sum(p.numel() for network in networks for p in network.parameters())
    values = max(math.prod(shape) for shape in shapes)
    return weights * CERTAIN_BYTES_PER_WEIGHT + values * CERTAIN_BYTES_PER_VALUE + GIB <= budget
