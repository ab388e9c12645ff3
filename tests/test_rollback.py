"""What the stability kit keeps in a checkpoint, and the way back to one: resume laws with and without."""

import math
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import pytest
import torch
from test_step import LOSS, SHUFFLE, batch, state_of, tensors_of
from torch import Tensor, nn

from causalvae.losses import LossPlan
from causalvae.rundir import RunDir
from causalvae.train.optim import clip_by_unit, optimizer_tensors
from causalvae.train.stability import LevelOff, rollback_step
from causalvae.train.state import TrainState, read_counters
from causalvae.train.step import train_step

KIT = LossPlan(kl_weight=1e-3, lecam_weight=0.1, r1_weight=0.5)


def everything(state: TrainState) -> dict[str, Tensor]:
    found = tensors_of(state) | {"lecam": state.lecam}
    for name, optimizer in (("vae", state.optimizer), ("critic", state.critic_optimizer)):
        assert optimizer is not None
        found |= {f"moments.{name}.{k}": v for k, v in optimizer_tensors(optimizer).items()}
    return found


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert not [name for name in one if not torch.equal(one[name], other[name])]


def kit_step(state: TrainState, *, poison: range = range(0)) -> bool:
    """One step on the batch at the cursor; batches of `poison` are not finite."""
    x, latent_noise = batch(state, clips=2, frames=5, size=16)
    x = x * (1.0 + 0.1 * state.cursor)
    if state.cursor in poison:
        x[0, 0, 0, 0, 0] = math.nan
    for optimizer in (state.optimizer, state.critic_optimizer):
        assert optimizer is not None
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * state.rate_factor
    clipping = partial(clip_by_unit, factor=0.01)
    result = train_step(
        state, x, latent_noise, loss=KIT, critic_loss="hinge", clipping=clipping, ema_decay=0.9
    )
    if result.applied and state.level_off is not None:
        state.level_off.update(float(result.terms.pixel))
    return result.applied


def kit_state() -> TrainState:
    state = state_of(SHUFFLE)
    state.level_off = LevelOff(window=2)
    return state


def saved(state: TrainState, folder: Path) -> Path:
    folder.mkdir()
    state.save(folder)
    return folder


def test_resume_with_the_whole_kit_is_bitwise_the_run_never_interrupted(tmp_path: Path) -> None:
    whole, first, second = kit_state(), kit_state(), kit_state()
    for _ in range(5):
        kit_step(whole, poison=range(2, 4))
    for _ in range(3):
        kit_step(first, poison=range(2, 4))
    second.load(saved(first, tmp_path / "step"))
    assert second.skipped == 1  # in the middle of a row of bad batches
    for _ in range(2):
        kit_step(second, poison=range(2, 4))
    assert_equal(everything(whole), everything(second))
    assert whole.level_off == second.level_off
    assert (
        (whole.step, whole.cursor, whole.skipped) == (second.step, second.cursor, second.skipped) == (3, 5, 0)
    )


def test_a_critic_update_that_is_not_finite_leaves_the_averages_alone() -> None:
    state = state_of(SHUFFLE)
    x, latent_noise = batch(state, clips=2)
    train_step(state, x, latent_noise, loss=LOSS, critic_loss="hinge")
    before = state.lecam.clone()
    assert float(before[2]) == pytest.approx(0.01)

    assert state.critic is not None
    judging = next(state.critic.parameters())

    def broken(params: Iterable[nn.Parameter]) -> float:
        return math.nan if next(iter(params)) is judging else 1.0

    train_step(state, x, latent_noise, loss=LOSS, critic_loss="hinge", clipping=broken)
    assert torch.equal(state.lecam, before)


def test_rolling_back_restores_the_checkpoint_with_half_the_rate_and_the_next_data(tmp_path: Path) -> None:
    state = kit_state()
    kit_step(state)
    folder = saved(state, tmp_path / "step")
    good = everything(state)
    level = state.level_off.saved() if state.level_off is not None else None
    bad = range(3, 6)
    while state.skipped < len(bad):
        kit_step(state, poison=bad)
    assert (state.step, state.cursor) == (3, 6)
    state.roll_back(folder)
    assert_equal(everything(state), good)
    assert (state.step, state.cursor, state.skipped) == (1, 6, 0)
    assert (state.rate_factor, state.rollbacks, state.went_back_to) == (0.5, 1, 1)
    assert state.level_off is not None
    assert state.level_off.saved() == level
    assert kit_step(state, poison=bad)  # the bad batches are behind it
    state.roll_back(folder)
    assert (state.rate_factor, state.rollbacks, state.cursor) == (0.25, 2, 7)


def test_a_run_killed_before_or_after_it_saved_its_rollback_ends_as_the_one_never_killed(
    tmp_path: Path,
) -> None:
    bad = range(2, 5)

    def go_on(state: TrainState, folder: Path, *, until: int) -> None:
        while state.cursor < until:
            kit_step(state, poison=bad)
            if state.skipped == len(bad):
                state.roll_back(folder)

    whole = kit_state()
    go_on(whole, tmp_path, until=1)
    folder = saved(whole, tmp_path / "before")
    go_on(whole, folder, until=6)
    after = saved(whole, tmp_path / "after")
    assert read_counters(after)["rate_factor"] == 0.5
    go_on(whole, folder, until=8)
    for checkpoint in (folder, after):
        resumed = kit_state()
        resumed.load(checkpoint)
        go_on(resumed, folder, until=8)
        assert_equal(everything(whole), everything(resumed))
        assert (resumed.step, resumed.rate_factor, resumed.rollbacks) == (whole.step, 0.5, 1)


goes_back_to = partial(rollback_step, save_steps=10)


def test_a_run_goes_back_to_a_step_that_it_saves_whether_it_was_stopped_or_not() -> None:
    assert goes_back_to([10, 20], before=25, tried=None) == 20
    assert goes_back_to([10, 20, 23], before=25, tried=None) == 20  # 23 was saved because of a signal
    assert goes_back_to([23, 27], before=29, tried=None) == 27


def test_a_run_does_not_go_back_to_the_weights_that_it_has() -> None:
    assert goes_back_to([10, 20], before=20, tried=None) == 10
    assert goes_back_to([20], before=20, tried=None) is None
    assert goes_back_to([], before=7, tried=None) is None


def test_a_run_goes_further_back_before_it_tries_a_step_again() -> None:
    assert goes_back_to([10, 20], before=25, tried=20) == 10
    assert goes_back_to([10, 20, 30], before=31, tried=20) == 30
    assert goes_back_to([20], before=25, tried=20) == 20


def test_checkpoints_after_the_one_gone_back_to_make_room_and_are_kept(tmp_path: Path) -> None:
    with RunDir(tmp_path / "run") as run:
        for text in ("first", "second"):
            for step in (10, 20, 30):
                with run.stage(step) as folder:
                    (folder / "state.json").write_text(f"{text} {step}")
            latest = run.latest()
            assert latest is not None
            assert (latest.path / "state.json").read_text() == f"{text} 30"
            run.set_aside_after(10)
            latest = run.latest()
            assert latest is not None
            assert latest.step == 10
        assert run.warnings == []
    folders = tmp_path / "run" / "checkpoints"
    names = {"step-00000010", *(f"step-000000{n}.diverged-{k}" for n in (20, 30) for k in (1, 2))}
    assert {item.name for item in folders.iterdir()} == names
    assert (folders / "step-00000030.diverged-2" / "state.json").read_text() == "second 30"
