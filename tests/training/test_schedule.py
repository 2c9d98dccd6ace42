"""The learning rate at steps where it is known by hand."""

import itertools

import pytest

from bdkd.config import ScheduleConfig
from bdkd.training.schedule import rate_factor


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
        (ScheduleConfig("cosine"), {0: 1.0, 50: 0.5, 100: 0.0}),
        (ScheduleConfig("cosine", warmup=2.0, final=0.1), {0: 0.05, 20: 1.0, 60: 0.55, 100: 0.1}),
    ],
)
def test_rate(config, expected):
    for step, factor in expected.items():
        assert rate_factor(config, step, 10, 100) == pytest.approx(factor)


def test_rate_never_jumps_at_the_end_of_a_warmup():
    config = ScheduleConfig("cosine", warmup=1.5)
    rates = [rate_factor(config, step, 10, 100) for step in range(100)]
    assert max(abs(a - b) for a, b in itertools.pairwise(rates)) < 0.1
    assert min(rates) >= 0
    assert max(rates) == 1.0
