"""How a step is made so that it fits into memory: whether blocks are recomputed, and in how many parts.

The result of the step is the same either way (`train.step`); only memory and time differ. Predictions come
from `train.predict`; the choice between them is arithmetic and knows no tensors.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from causalvae.errors import ConfigError
from causalvae.losses import LossPlan
from causalvae.train.optim import OptimizerKind
from causalvae.train.predict import held_bytes, step_bytes
from causalvae.train.state import TrainState

Policy = Literal["auto", "speed", "lean", "budget"]

AUTO_SHARE = 0.8  # of free memory that a step may fill: predictions are within 15 %, and others live here too
TIGHT_SHARE = 0.5  # of its budget, from which on a step may not waste any
SAVED_ENOUGH = 0.98  # of the bytes: more parts cost time, and have to be worth it
PARTS_RUN = 8  # predicted by running them all; beyond, what another part costs is the same for each


@dataclass(frozen=True, kw_only=True)
class Way:
    """How a step could be made. recompute: blocks keep their input only and run again in backward."""

    parts: int
    recompute: bool


Predict = Callable[[Way], int]


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """How steps are made. Sizes are in bytes, predicted, without the bare process.

    whole_bytes: what the step would take with nothing recomputed and in as few parts as were asked for.
    """

    clips: int
    least_parts: int
    way: Way
    predicted_bytes: int
    whole_bytes: int
    budget_bytes: int

    @property
    def parts(self) -> int:
        """The batch goes through the autoencoder in this many pieces."""
        return self.way.parts

    @property
    def recompute(self) -> bool:
        """Blocks keep their input only."""
        return self.way.recompute

    @property
    def tight(self) -> bool:
        """Whether memory that is freed has to be handed back at once (`machine.hand_back_memory`)."""
        return self.predicted_bytes > TIGHT_SHARE * self.budget_bytes

    def say(self) -> str:
        """The plan in one sentence, for the log."""
        whole, room, planned = map(amount, (self.whole_bytes, self.budget_bytes, self.predicted_bytes))
        done = ["blocks are recomputed"] if self.recompute else []
        if self.parts > self.least_parts:
            done.append(f"the batch goes in {self.parts} parts")
        if not done:
            return f"a step takes about {planned} of {room}"
        return f"a step needs {whole} of {room}: {' and '.join(done)} ({planned})"


def plan_step(
    clips: int, *, predict: Predict, policy: Policy, budget_bytes: int, least_parts: int = 1
) -> StepPlan:
    """The fastest way that fits, or with `lean` the smallest. ConfigError if none fits.

    clips: in the batch. least_parts: never fewer, as gradient accumulation asks.
    """
    ways = ways_of(clips, policy=policy, least_parts=least_parts)
    found = smallest(ways, predict) if policy == "lean" else first_fit(ways, predict, budget_bytes)
    needs = predict(found)
    if needs > budget_bytes:
        raise ConfigError(_nothing_fits(found, needs=needs, budget_bytes=budget_bytes, policy=policy))
    return StepPlan(
        clips=clips,
        least_parts=least_parts,
        way=found,
        predicted_bytes=needs,
        whole_bytes=predict(Way(parts=least_parts, recompute=False)),
        budget_bytes=budget_bytes,
    )


def smaller(plan: StepPlan, *, predict: Predict) -> StepPlan | None:
    """The next smaller plan, for a device that ran out of memory: recomputation first, then more parts.

    None if there is none. The budget is what the prediction of the failed plan was, as it did not fit.
    """
    ways = ways_of(plan.clips, policy="auto", least_parts=plan.least_parts)
    below = [way for way in ways if (way.recompute, way.parts) > (plan.recompute, plan.parts)]
    below = [way for way in below if way.parts >= plan.parts]
    if not below:
        return None
    return StepPlan(
        clips=plan.clips,
        least_parts=plan.least_parts,
        way=below[0],
        predicted_bytes=predict(below[0]),
        whole_bytes=plan.whole_bytes,
        budget_bytes=plan.predicted_bytes,
    )


def ways_of(clips: int, *, policy: Policy, least_parts: int) -> list[Way]:
    """The ways that a policy allows, from fast to small: recomputation costs less time than parts do."""
    counts = [least_parts]
    while counts[-1] < clips:
        pieces = math.ceil(clips / min(2 * counts[-1], clips))  # clips per part, as torch.chunk has it
        counts.append(math.ceil(clips / pieces))
    if policy == "speed":
        return [Way(parts=parts, recompute=False) for parts in counts]
    ways = [Way(parts=parts, recompute=True) for parts in counts]
    return ways if policy == "lean" else [Way(parts=least_parts, recompute=False), *ways]


def first_fit(ways: Sequence[Way], predict: Predict, budget_bytes: int) -> Way:
    """The first way that fits, or the smallest where none does."""
    return next((way for way in ways if predict(way) <= budget_bytes), None) or min(ways, key=predict)


def smallest(ways: Sequence[Way], predict: Predict) -> Way:
    """The way of fewest bytes, or one of fewer parts that is about as small."""
    least = min(predict(way) for way in ways)
    return next(way for way in ways if SAVED_ENOUGH * predict(way) <= least)


def predictor(
    state: TrainState, *, shape: Sequence[int], loss: LossPlan, optimizer: OptimizerKind
) -> Predict:
    """Bytes of a step of this training by the way it is made; each way is computed once, in about a second.

    shape: b 3 t h w of the largest batch.
    """

    @functools.cache
    def peak(way: Way, clips: int) -> int:
        counts = [PARTS_RUN // 2, PARTS_RUN]
        if way.parts > PARTS_RUN:
            each = math.ceil(clips / way.parts)
            few, more = (peak(Way(parts=n, recompute=way.recompute), n * each) for n in counts)
            return more + (more - few) * (way.parts - counts[1]) // (counts[1] - counts[0])
        batch = (clips, *shape[1:])
        return step_bytes(
            state, shape=batch, parts=way.parts, recompute=way.recompute, loss=loss, optimizer=optimizer
        ).peak

    return lambda way: peak(way, shape[0])


def auto_budget(state: TrainState, free_bytes: int) -> int:
    """Bytes that a step may take where nobody gave a number. What the training holds already counts as free."""
    return int(AUTO_SHARE * (free_bytes + held_bytes(state)))


def amount(num_bytes: int) -> str:
    """A size for people: GiB, or MiB where there is less than one."""
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"


def _nothing_fits(way: Way, *, needs: int, budget_bytes: int, policy: Policy) -> str:
    parts = f" and the batch in {way.parts} parts" if way.parts > 1 else ""
    how = f" with {'blocks recomputed' if way.recompute else 'nothing recomputed'}{parts}"
    room = (
        "was given by --memory" if policy == "budget" else f"may be used ({AUTO_SHARE:.0%} of what is free)"
    )
    other = "use --memory auto, or " if policy == "speed" else ""
    return (
        f"--memory: a step needs at least {amount(needs)}{how}, and {amount(budget_bytes)} {room}; {other}"
        "lower --resolution, --video_num_frames or --batch_size, or take a smaller --model"
    )
