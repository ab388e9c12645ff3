"""When the critic starts by itself, and where a training that diverged goes back to.

Both are functions of the run's history alone: a decision is state that a checkpoint keeps, or follows from
what lies in the run's folder, so that a run that was killed decides as the one that was not.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

LEVEL_WINDOW = 500  # updates whose mean pixel loss is one point of the curve
LEVEL_GAIN = 0.01  # a window has levelled off if it is not this much better, relative to the best before
MAX_ROLLBACKS = 3  # in one run; at the next one it stops
ROLLBACK_FACTOR = 0.5  # of the learning rates at each


@dataclass
class LevelOff:
    """Whether a loss has levelled off, for good: once it has, `done` stays True.

    The mean of each `window` updates is compared with the lowest mean before. Means of whole windows, because
    the loss of one batch varies by tens of percent and the mean of 500 by about one. The first `skip` updates
    (those of the warm-up, when a small learning rate looks like a level) are not looked at, so the earliest
    possible end is after skip + 2 * window of them.
    """

    skip: int = 0
    window: int = LEVEL_WINDOW
    gain: float = LEVEL_GAIN
    seen: int = 0
    total: float = 0.0
    best: float | None = None
    done: bool = False

    def update(self, value: float) -> bool:
        """Take the loss of one more update, finite; whether it has levelled off at this very update.

        Steps that were skipped are no updates.
        """
        if self.done:
            return False
        self.seen += 1
        if self.seen <= self.skip:
            return False
        self.total += value
        if (self.seen - self.skip) % self.window != 0:
            return False
        mean, self.total = self.total / self.window, 0.0
        self.done = self.best is not None and mean > (1.0 - self.gain) * self.best
        self.best = mean if self.best is None else min(mean, self.best)
        return self.done

    def saved(self) -> dict[str, int | float | bool | None]:
        """What changes, for JSON, which keeps every bit of these numbers."""
        return {"seen": self.seen, "total": self.total, "best": self.best, "done": self.done}

    def restore(self, saved: dict[str, Any]) -> None:  # Any: JSON
        """Go on from what `saved` gave."""
        self.seen, self.total = saved["seen"], saved["total"]
        self.best, self.done = saved["best"], saved["done"]


def rollback_step(saved: Sequence[int], *, before: int, tried: int | None, save_steps: int) -> int | None:
    """The checkpoint to go back to, of the steps whose full checkpoints are there; None if none can help.

    before: the step that the run is at. A checkpoint of this very step has the weights that no update came
    from, so it must be an earlier one. tried: where the run went back to last; it is taken only if nothing
    else is left, since weights can be lost before they are infinite. Else it is the newest of those that
    every run saves, one that was never stopped too: a signal saves at any step, and a run that was stopped
    and resumed must go back to the same place. Any earlier one, where none of those is left.
    """
    earlier = [step for step in saved if step < before]
    regular = [step for step in earlier if step % save_steps == 0]
    untried = [step for step in regular or earlier if step != tried]
    return max(untried or regular or earlier, default=None)
