"""The training state, which a run keeps between steps and saves between sessions."""

import dataclasses
import itertools
from functools import cache

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from small_runs import Tiny, objective_of, same, tiny_state
from test_step import a_batch, everything, run_steps
from torch import nn

from bdkd.distributed.context import DistributedContext
from bdkd.engine.optim import SGDConfig
from bdkd.engine.progress import Best, Progress
from bdkd.engine.state import snapshot
from bdkd.engine.step import eager, warm_up


def of_rank(rank: int, world: int, seed: int = 0):
    """Return the state of one of several ranks. It uses SwitOKD, because DDP needs all ranks."""
    return reseeded(tiny_state(objective="switokd", context=DistributedContext(rank, world)), seed)


def reseeded(state, seed: int):
    state.recipe = dataclasses.replace(state.recipe, seed=seed)
    return state


def test_the_loss_scale_depends_on_fp16_and_on_the_number_of_ranks():
    """DDP averages the gradients of the ranks, but the losses of the ranks add up to one mean."""
    scales = {
        (precision, world): float(
            tiny_state(
                precision=precision, objective="switokd", context=DistributedContext(0, world)
            ).loss_scale()
        )
        for precision in ("fp32", "bf16", "fp16")
        for world in (1, 3)
    }
    assert scales == {
        ("fp32", 1): 1, ("fp32", 3): 3, ("bf16", 1): 1, ("bf16", 3): 3,
        ("fp16", 1): 2**16, ("fp16", 3): 3 * 2**16,
    }  # fmt: skip


def test_skipped_steps_are_counted_in_all_and_in_a_row():
    """The longest row since the last log line decides whether a run stops, even if it has ended."""
    state = tiny_state()
    skips = [0, 1, 1, 0, 0, 1, 0, 1, 1, 1, 0, 1]
    for number, skip in enumerate(skips, 1):
        state.count_skipped(torch.tensor(not skip))
        rows = [len(list(run)) for skipped, run in itertools.groupby(skips[:number]) if skipped]
        row = rows[-1] if skip else 0
        assert state.skipped.tolist() == [sum(skips[:number]), row, max(rows, default=0)]
        assert state.last_step_was_skipped() == bool(skip)


def test_the_best_checkpoint_is_chosen_by_the_averages_if_there_are_any():
    assert tiny_state(ema_decay=0.9).selection_networks() == ["student_ema"]
    assert tiny_state().selection_networks() == ["student"]
    assert list(tiny_state(ema_decay=0.9).evaluated_networks()) == [
        "teacher", "student", "student_ema",
    ]  # fmt: skip


@pytest.mark.parametrize("mode", [True, False], ids=["training", "evaluation"])
def test_the_warm_up_leaves_the_training_state_unchanged(mode):
    """The warm-up runs two passes for DDP and the compiler."""
    state = tiny_state(dropping, ema_decay=0.9)
    run_steps(state, [a_batch(seed=1), a_batch(seed=2)])
    state.networks.train(mode)
    before = snapshot(state.state_dict())
    warm_up(state, eager(state, objective_of(state)), a_batch(seed=3))
    assert same(snapshot(state.state_dict()), before)
    assert {network.training for network in state.networks.modules()} == {mode}
    assert not any(p.grad.any() for p in state.networks.parameters() if p.grad is not None)


# --- how far a run is -----------------------------------------------------------------------------


@cache
def any_state():
    return tiny_state(objective="switokd")


def walk(images: int, size: int, epochs: int, limit: int | None, place: Progress) -> int:
    """Return the number of optimizer steps from a position to the end. An epoch ends when no whole
    batch is left."""
    epoch, seen, step = place.epoch, place.seen, place.step
    while epoch < epochs and (limit is None or step < limit):
        if seen + size > images:
            epoch, seen = epoch + 1, 0
        else:
            seen, step = seen + size, step + 1
    return step - place.step


@given(
    st.integers(4, 40), st.integers(2, 4), st.integers(1, 4), st.none() | st.integers(1, 30),
    st.integers(0, 5), st.integers(0, 39), st.integers(0, 20), st.integers(1, 3), st.booleans(),
)  # fmt: skip
@example(10, 4, 1, None, 0, 8, 2, 2, False)  # the last epoch is always evaluated
@example(10, 4, 3, None, 0, 8, 2, 2, True)  # a stopped run has an evaluation due
def test_remaining_steps_and_evaluations_equal_those_of_a_simulated_run(
    images, size, epochs, limit, epoch, seen, step, every, due
):
    """Start from any position at which a run with another batch size, number of epochs or limit may
    have stopped."""
    state, recipe = any_state(), any_state().recipe
    seen %= images
    train = dataclasses.replace(recipe.train, batch_size=size, epochs=epochs)
    state.recipe = dataclasses.replace(recipe, train=train, max_steps=limit, evaluate_every=every)
    state.train_images = images
    state.progress = Progress(step, epoch, seen, validation_due=due)
    remaining = walk(images, size, epochs, limit, state.progress)
    assert state.remaining_steps() == remaining
    # Less than a batch, or nothing, may be left of the epoch.
    state.progress.end_short_epoch(state.recipe, images)
    ended = seen > 0 and seen + size > images
    assert (state.progress.epoch, state.progress.seen) == (
        (epoch + 1, 0) if ended else (epoch, seen)
    )
    assert state.progress.validation_due == (
        due or (ended and (epoch + 1 >= epochs or (epoch + 1) % every == 0))
    )
    assert state.remaining_steps() == remaining
    evaluations = state.progress.remaining_evaluations(state.recipe, images)
    for left in reversed(range(remaining)):
        state.progress.advance(size, images)
        assert state.remaining_steps() == left
        ends = state.progress.seen == 0 and state.progress.epoch % every == 0
        evaluations -= ends or left == 0  # as the trainer does
        assert state.progress.remaining_evaluations(state.recipe, images) == evaluations
    assert evaluations == 0
    assert state.progress.step == step + remaining
    if remaining and limit is None:
        assert (state.progress.epoch, state.progress.seen) == (epochs, 0)


# --- random numbers of several ranks --------------------------------------------------------------


def test_every_rank_draws_other_numbers_and_rank_0_those_of_one_process():
    draws = []
    for rank in range(4):
        of_rank(rank, 4)
        draws.append(torch.rand(1).item())
    tiny_state()
    assert torch.rand(1).item() == draws[0]
    assert len(set(draws)) == 4


def test_a_run_resumed_on_more_ranks_draws_new_random_numbers():
    """The numbers differ for every rank, seed and step."""
    draws = {}
    for steps, seed in ((1, 0), (2, 0), (2, 1)):
        saved = tiny_state(objective="switokd")
        run_steps(saved, [a_batch(seed=i) for i in range(steps)])
        saved = snapshot(saved.state_dict())
        for rank in range(3):
            state = of_rank(rank, 3, seed)
            draws["fresh", rank] = torch.rand(1).item()
            state.load_state_dict(saved)
            draws[steps, seed, rank] = torch.rand(1).item()
    assert len(set(draws.values())) == len(draws) == 12


def test_rank_0_continues_the_log_interval_of_a_checkpoint():
    saved = tiny_state(objective="switokd")
    run_steps(saved, [a_batch()])
    state = snapshot(saved.state_dict())
    for rank, samples in ((0, 16), (1, 0)):
        resumed = of_rank(rank, 2)
        resumed.load_state_dict(state)
        assert resumed.meter.samples == samples
    two = {**state, "ranks": [state["ranks"][0]] * 2}
    alone = tiny_state(objective="switokd")
    alone.load_state_dict(two)
    assert alone.meter.samples == 32


# --- saved and loaded -----------------------------------------------------------------------------


def dropping() -> nn.Module:
    return nn.Sequential(Tiny(), nn.Dropout(0.2))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_loaded_state_equals_the_saved_one_and_continues_like_it(precision):
    """Every part of it differs from a new state: a skipped step, averages, a best student, a halved
    loss scale, a log interval and random numbers."""
    options = {"ema_decay": 0.9, "clip_norm": 1.0, "precision": precision}
    whole, other = tiny_state(dropping, **options), tiny_state(dropping, **options)
    if precision == "fp16":
        whole.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    torch.manual_seed(5)
    run_steps(whole, [a_batch(seed=1), a_batch(seed=2, poisoned=True)])
    whole.meter.read()  # discards a NaN, which is not equal to itself
    run_steps(whole, [a_batch(seed=3)])
    whole.best = Best(2, 0.75)
    whole.progress.seconds, whole.progress.validation_due = 12.5, True
    saved = snapshot(whole.state_dict())
    run_steps(whole, [a_batch(seed=4), a_batch(seed=5)])
    torch.manual_seed(6)
    other.load_state_dict(snapshot(saved))  # a copy: the optimizer keeps the tensors
    loaded = snapshot(other.state_dict())
    for group in (*loaded["optimizer"]["param_groups"], *saved["optimizer"]["param_groups"]):
        del group["lr"]  # set before every step
    assert same(loaded, saved)
    assert vars(other.progress) == {
        "step": 3, "epoch": 0, "seen": 48, "validation_due": True, "seconds": 12.5,
    }  # fmt: skip
    assert other.best == Best(2, 0.75)
    assert other.skipped.tolist() == [1, 0, 1]
    assert int(other.ema_updates) == 2
    assert float(other.loss_scale()) == (2.0**9 if precision == "fp16" else 1.0)
    run_steps(other, [a_batch(seed=4), a_batch(seed=5)])
    assert same(snapshot(other.state_dict()), snapshot(whole.state_dict()))


def test_a_resume_uses_the_recipes_rates_and_decays_and_the_saved_moments():
    first = tiny_state(optimizer=SGDConfig("sgd", learning_rate=0.1, weight_decay=0.01))
    run_steps(first, [a_batch(seed=1)])
    changed = SGDConfig("sgd", learning_rate=0.4, weight_decay=0.02, momentum=0.5, nesterov=False)
    second = tiny_state(optimizer=changed)
    second.load_state_dict(snapshot(first.state_dict()))
    for group, saved in zip(
        second.optimizer.param_groups, first.optimizer.param_groups, strict=True
    ):
        assert (group["peak_rate"], group["momentum"], group["nesterov"]) == (0.4, 0.5, False)
        assert group["weight_decay"] == (0.02 if group["params"][0].ndim > 1 else 0)
        for own, old in zip(group["params"], saved["params"], strict=True):
            moments = (s.optimizer.state[p] for s, p in ((second, own), (first, old)))
            assert same(*(dict(moment) for moment in moments))
    second.set_learning_rate()
    # The warm-up takes two epochs, and this is its second step.
    steps = 2 * (second.train_images // second.recipe.train.batch_size)
    assert second.optimizer.param_groups[0]["lr"] == pytest.approx(0.4 * 2 / steps)


def test_averages_missing_in_a_saved_state_start_from_the_students():
    first, second = tiny_state(), tiny_state(ema_decay=0.9)
    run_steps(first, [a_batch(seed=i) for i in range(3)])
    second.load_state_dict(snapshot(first.state_dict()))
    assert same(
        second.ema["student_ema"].state_dict(), second.networks.members["student"].state_dict()
    )
    assert int(second.ema_updates) == 0
    run_steps(second, [a_batch(seed=3)])  # the first update of an average copies the student
    averaged = everything(second)
    torch.testing.assert_close(averaged["student_ema.4.weight"],
                               averaged["members.student.4.weight"])  # fmt: skip
