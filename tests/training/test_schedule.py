"""The learning rate: values computed by hand, boundaries, and resumed runs."""

import dataclasses
import itertools
import math
from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from bdkd.config import ScheduleConfig
from bdkd.engine.schedule import Span, rate_factor


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        # 10 steps an epoch, 100 in all
        (ScheduleConfig("constant"), {0: 1.0, 99: 1.0}),
        (ScheduleConfig("constant", warmup=1.0), {0: 0.1, 4: 0.5, 8: 0.9, 9: 1.0, 50: 1.0}),
        (ScheduleConfig("constant", "steps", warmup=4.0), {0: 0.25, 3: 1.0}),
        (ScheduleConfig("step", milestones=(3.0, 6.0)), {29: 1.0, 30: 0.1, 59: 0.1, 60: 0.01}),
        (
            ScheduleConfig("step", "steps", milestones=(5.0,), factor=0.5, warmup=2.0),
            {0: 0.5, 1: 1.0, 4: 1.0, 5: 0.5, 99: 0.5},
        ),
        # a milestone inside the warm-up takes effect when the warm-up is over
        (ScheduleConfig("step", "steps", milestones=(2.0,), warmup=4.0), {2: 0.75, 3: 1.0, 4: 0.1}),
        (ScheduleConfig("cosine"), {0: 1.0, 50: 0.5, 100: 0.0}),
        (ScheduleConfig("cosine", warmup=2.0, final=0.1), {0: 0.05, 20: 1.0, 60: 0.55, 100: 0.1}),
    ],
)
def test_rate_factors_of_given_steps(config, expected):
    for step, factor in expected.items():
        assert rate_factor(config, step, 10, 100) == pytest.approx(factor)


def test_rate_never_jumps_at_the_end_of_a_warmup():
    config = ScheduleConfig("cosine", warmup=1.5)
    rates = [rate_factor(config, step, 10, 100) for step in range(100)]
    assert max(abs(a - b) for a, b in itertools.pairwise(rates)) < 0.1
    assert min(rates) >= 0
    assert max(rates) == 1.0


# The peak is in the last step of the warm-up, and the rate never rises after it.
@pytest.mark.parametrize(
    ("warmup", "total", "expected"),
    [
        (4, 12, [0.25, 0.5, 0.75, 1.0, 1.0, 0.962, 0.854, 0.691, 0.5, 0.309, 0.146, 0.038]),
        (1, 2, [1.0, 1.0]),
        (4, 4, [0.25, 0.5, 0.75, 1.0]),
        (4, 5, [0.25, 0.5, 0.75, 1.0, 1.0]),
        (0, 2, [1.0, 0.5]),
        (6, 3, [1 / 6, 2 / 6, 3 / 6]),  # stopped inside the warm-up
    ],
)
def test_cosine_with_warmup(warmup, total, expected):
    config = ScheduleConfig("cosine", "steps", warmup=warmup)
    rates = [rate_factor(config, step, 10, total) for step in range(total)]
    assert rates == pytest.approx(expected, abs=5e-4)


lengths = st.one_of(st.integers(0, 60).map(float), st.floats(0, 60))
schedules = st.builds(
    ScheduleConfig,
    st.sampled_from(["cosine", "step", "constant"]),
    st.sampled_from(["epochs", "steps"]),
    warmup=lengths,
    milestones=st.lists(lengths, max_size=3).map(tuple),
    factor=st.floats(0.01, 1),
    final=st.floats(0, 1),
)


@given(schedules, st.integers(1, 40), st.integers(1, 40))
@example(ScheduleConfig("step", warmup=1e-139, milestones=(0.0,), factor=0.5), 1, 1)  # rounded to 0
def test_a_schedule_rises_to_its_peak_and_falls(config, steps_per_epoch, epochs):
    later = tuple(config.warmup + length for length in config.milestones)
    config = dataclasses.replace(config, milestones=later)
    total = steps_per_epoch * epochs
    rates = [rate_factor(config, step, steps_per_epoch, total) for step in range(total)]
    unit = steps_per_epoch if config.unit == "epochs" else 1
    top = max(0, math.ceil(round(config.warmup * unit, 9)) - 1)  # the step that ends the warm-up
    assert 0 <= min(rates) <= max(rates) <= 1
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    first = round(min(config.milestones, default=math.inf) * unit, 9)
    if top < total and not (config.name == "step" and first <= top):
        assert rates[top] == 1.0


@given(st.integers(1, 60), st.integers(1, 40), st.integers(0, 30), st.integers(1, 30))
@example(22, 5, 0, 2)  # 2.2 * 25 is 55.00000000000001
def test_boundaries_in_epochs_are_exact(tenths, multiple, after, factor):
    """2.2 epochs of 25 steps are 55 steps. Rounding of the product must not move the boundary."""
    steps_per_epoch = multiple * 10 // math.gcd(tenths, 10)  # so that these tenths are whole steps
    milestone = tenths * steps_per_epoch // 10
    config = ScheduleConfig("step", milestones=(tenths / 10,), factor=1 / factor)
    before = rate_factor(config, milestone - 1, steps_per_epoch, 10**6)
    assert before == 1.0
    assert rate_factor(config, milestone + after, steps_per_epoch, 10**6) == 1 / factor


tenths = st.integers(0, 60).map(lambda k: Fraction(k, 10))


def exact_factor(config, step, per_epoch, end, start=Fraction(0), phase=Fraction(0)) -> float:
    """Return the factor in exact arithmetic. Lengths are multiples of 1/10."""
    unit = per_epoch if config.unit == "epochs" else 1
    warm_up, *milestones = (
        Fraction(round(10 * length), 10) * unit for length in (config.warmup, *config.milestones)
    )
    if step + 1 <= warm_up:
        return float(Fraction(step + 1) / warm_up)
    if config.name == "step":
        return config.factor ** len([m for m in milestones if m <= step])
    if config.name == "constant":
        return 1.0
    begin = max(warm_up, start)
    share = (step - begin) / max(Fraction(1), end - begin)
    done = phase + (1 - phase) * min(Fraction(1), max(Fraction(0), share))
    return config.final + (1 - config.final) * (1 + math.cos(math.pi * done)) / 2


@given(
    schedules, tenths, st.lists(tenths, max_size=3), st.integers(1, 12), st.integers(1, 8),
    st.integers(1, 8), st.data(),
)  # fmt: skip
def test_every_rate_equals_exact_arithmetic(
    config, warm_up, milestones, per_epoch, epochs, others, data
):
    """Check the steps from the first one to beyond the last one, and after a resume with another
    number of epochs.

    Tenths of an epoch may be fractions of a step, so a warm-up may end inside a step.
    """
    config = dataclasses.replace(
        config, warmup=float(warm_up), milestones=tuple(float(m) for m in milestones)
    )
    span, images = Span(10, epochs), 10 * per_epoch + 9  # the last 9 fill no batch
    end = epochs * per_epoch
    for step in range(end + 3):
        exact = exact_factor(config, step, per_epoch, end)
        assert span.factor(config, step, images) == pytest.approx(exact, abs=1e-9)
        assert exact <= 1
    at = data.draw(st.integers(0, end))
    resumed, new_end = span.with_epochs(others, config, at, images), others * per_epoch
    begin = Fraction(round(10 * config.warmup), 10) * (per_epoch if config.unit == "epochs" else 1)
    done = min(Fraction(1), max(Fraction(0), (at - begin) / max(Fraction(1), end - begin)))
    kept = (Fraction(at), done) if 0 < done < 1 else ()  # a decay that has ended starts again
    for step in range(at, new_end + 3):
        exact = exact_factor(config, step, per_epoch, new_end, *kept)
        assert resumed.factor(config, step, images) == pytest.approx(exact, abs=1e-9)


def walk(span, config, images, batch_size, epoch, seen):
    """Yield the rates of the steps from a position to the end, as in a run."""
    while epoch < span.epochs:
        if seen + batch_size > images:
            epoch, seen = epoch + 1, 0
            continue
        yield span.factor(config, span.step(epoch, seen, images), images)
        seen += batch_size


@given(schedules, st.integers(20, 300), st.integers(2, 20), st.integers(1, 6))
def test_an_unchanged_run_counts_optimizer_steps(config, images, batch_size, epochs):
    span, per_epoch = Span(batch_size, epochs), images // batch_size
    came = list(walk(span, config, images, batch_size, 0, 0))
    total = per_epoch * epochs
    assert came == [rate_factor(config, step, per_epoch, total) for step in range(total)]


@given(
    schedules, st.integers(40, 300), st.integers(2, 20), st.integers(2, 40), st.integers(2, 6),
    st.integers(2, 6), st.data(),
)  # fmt: skip
def test_a_resumed_schedule_continues(config, images, batch_size, other, epochs, others, data):
    """Resume with another batch size and number of epochs. The rate does not change at the resume,
    it stays in [0, 1], and a cosine reaches its final value with the new last epoch."""
    span = Span(batch_size, epochs)
    epoch = data.draw(st.integers(0, min(epochs, others) - 1))
    seen = data.draw(st.integers(0, images // batch_size - 1)) * batch_size
    step = span.step(epoch, seen, images)
    before = span.factor(config, step, images)
    resumed = span.with_epochs(others, config, step, images)
    assert resumed.factor(config, step, images) == pytest.approx(before, abs=1e-9)
    rates = list(walk(resumed, config, images, other, epoch, seen))
    assert all(0 <= rate <= 1 for rate in rates)
    end = span.steps_per_epoch(images) * others
    if config.name == "cosine" and config.warmup == 0:
        assert resumed.factor(config, end, images) == pytest.approx(config.final)


def test_a_step_of_the_schedule_is_a_batch_of_the_first_size():
    """45 images in batches of 10 are 4 steps. After a resume with batches of 3, positions may be
    fractions of a step, and the last 5 images of an epoch do not count."""
    span = Span(10, 2)
    assert [span.step(0, seen, 45) for seen in (0, 10, 15, 40, 43)] == [0, 1, 1.5, 4, 4]
    assert [span.step(1, seen, 45) for seen in (0, 3, 45)] == [4, 4.3, 8]
    assert span.steps_per_epoch(9) == 1  # every epoch has at least one step


def test_a_decay_that_has_ended_starts_again():
    config = ScheduleConfig("cosine")
    span = Span(10, 3)
    resumed = span.with_epochs(6, config, span.step(3, 0, 100), 100)
    assert resumed == Span(10, 6)
    assert resumed.factor(config, resumed.step(3, 0, 100), 100) == pytest.approx(0.5)
