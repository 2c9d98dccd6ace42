"""The plan of ``--dry-run`` against numbers computed by hand."""

import dataclasses
import re

import pytest
from small_runs import TINY_RUN, components_of

from bdkd.cli.train import parse
from bdkd.config import load_recipe
from bdkd.engine.components import Components
from bdkd.engine.cost import costs
from bdkd.runs.plan import mebibytes, plan


def planned(*options: str) -> tuple[Components, str]:
    """A run whose networks differ in size, and its plan."""
    small = ["--networks.teacher.options", "width", "0.25"]
    components = components_of(parse([*TINY_RUN, *small, *options], load_recipe(*TINY_RUN)).config)
    return components, plan(components)


# Copies of a network's size, four bytes a value: weights, gradients, and what the optimizer keeps.
SGD, PLAIN_SGD, ADAMW = 3, 2, 4


@pytest.mark.parametrize(
    ("options", "copies"),
    [
        ([], {"teacher": SGD, "student": SGD}),
        (["--optimizer.momentum", "0"], {"teacher": PLAIN_SGD, "student": PLAIN_SGD}),
        (["--optimizer.name", "adamw"], {"teacher": ADAMW, "student": ADAMW}),
        (["--train.ema-decay", "0.9"], {"teacher": SGD, "student": SGD + 1}),
        (
            ["--networks.teacher.frozen", "--networks.teacher.weights", "random"],
            {"teacher": 1, "student": SGD},
        ),
        (["--train.accumulate", "2"], {"teacher": SGD, "student": SGD}),
    ],
    ids=["sgd", "no momentum", "adamw", "an average", "frozen", "accumulated"],
)
def test_memory_is_weights_gradients_moments_averages_and_activations(options, copies):
    """Activations are those of one part of a batch of four."""
    if "--networks.teacher.frozen" in options:
        options = [*options, "--objective.name", "independent"]
    components, text = planned(*options)
    parts = 2 if "--train.accumulate" in options else 1
    needed = sum(
        4 * cost.parameters * copies[name] + cost.kept * 4 // parts
        for name, cost in costs(components).items()
    )
    assert f"memory     about {mebibytes(needed)}:" in text


def test_steps_and_hours():
    """48 images, batches of 5: nine steps an epoch, the rest of an epoch is dropped."""
    options = ["--train.batch-size", "5", "--train.epochs", "4", "--seed", "3"]
    components, text = planned(*options)
    assert "seed 3, on cpu" in text
    assert "steps      9 per epoch, 4 epochs, 36 in all; batch 5 in 1 part, fp32" in text
    assert "0.05 hours at 1 images/s" in plan(components, 1.0)  # 36 * 5 / 3600
    for limit, stop, hours in ((18, 18, "0.03"), (100, 36, "0.05")):
        limited = dataclasses.replace(components.recipe, max_steps=limit)
        components = dataclasses.replace(components, recipe=limited)
        text = plan(components, 1.0)
        assert f"36 in all, stopping after {stop}; batch 5" in text
        assert f"{hours} hours at 1 images/s" in text


def test_units():
    assert mebibytes(3 * 2**20 // 2) == "1.5 MiB"
    assert mebibytes(5 * 2**30) == "5,120.0 MiB"
    components, text = planned()
    step = sum(cost.step for cost in costs(components).values())
    said = re.search(r"operations ([\d.]+) MFLOP per image .*, ([\d.]+) MFLOP per step", text)
    assert said is not None
    assert float(said[1]) == pytest.approx(step / 1e6, rel=5e-3)
    assert float(said[2]) == pytest.approx(4 * step / 1e6, rel=5e-3)
