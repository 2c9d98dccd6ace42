"""Data wait, utilisation and memory of a log interval, measured with a fake clock."""

import dataclasses

import pytest
import torch
from small_runs import TINY_RUN, components_of

from bdkd.config import load_recipe
from bdkd.data import Batch
from bdkd.device import peak_memory_mib
from bdkd.distributed.context import DistributedContext
from bdkd.engine import throughput as usage
from bdkd.engine.cost import cost_of
from bdkd.engine.throughput import ThroughputMeter
from bdkd.models import create_model


class Clock:
    now = 50.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(usage, "time", clock)
    return clock


def a_meter(world: int = 1) -> ThroughputMeter:
    recipe = load_recipe(TINY_RUN[0])
    return ThroughputMeter(components_of(recipe, context=DistributedContext(0, world)))


def a_batch(side: int) -> Batch:
    return Batch((torch.zeros(4, 3, side, side),), torch.zeros(4, dtype=torch.int64))


def test_data_wait_is_a_share_of_the_interval(clock):
    """The loader takes 1, 2 and 3 s for three batches and 4 s to end. A step takes 10 s."""
    counted = a_meter()

    def loader():
        for seconds in (1, 2, 3):
            clock.now += seconds
            yield a_batch(8)
        clock.now += 4

    batches = counted.watch(loader())
    for number in range(3):
        assert len(next(batches).target) == 4
        clock.now += 10
        if number == 1:
            assert counted.read(8, 23.0)["data_wait"] == pytest.approx((1 + 2) / 23)
    assert next(batches, None) is None
    assert counted.read(4, 17.0)["data_wait"] == pytest.approx((3 + 4) / 17)
    assert counted.read(4, 1.0)["data_wait"] == 0
    # The wait and the interval are measured separately, so the wait may be longer.
    counted.waited = 2.0
    assert counted.read(4, 1.9)["data_wait"] == 1.0


@pytest.mark.parametrize("world", [1, 4])
def test_mfu_is_the_networks_operations_over_the_peak_of_all_devices(clock, world):
    """Operations count at the size of the latest images, which progressive resolution changes."""
    counted = a_meter(world)
    assert counted.read(8, 1.0)["mfu"] is None  # no peak is published for a CPU
    counted.peak = 1e12
    for side in (8, 16):
        list(counted.watch([a_batch(side)]))
        network = cost_of(create_model("resnet8", 3, in_channels=3), (3, side, side), trains=True)
        flops = 2 * network.step  # a teacher and a student of this model
        assert counted.read(500, 2.0)["mfu"] == pytest.approx(flops * 250 / (world * 1e12))


def test_a_frozen_teacher_counts_only_its_forward_pass(clock):
    recipe = load_recipe(TINY_RUN[0])
    teacher = recipe.networks["teacher"]
    teacher = dataclasses.replace(teacher, frozen=True, weights="random")
    recipe = dataclasses.replace(recipe, networks={**recipe.networks, "teacher": teacher})
    network = cost_of(create_model("resnet8", 3, in_channels=3), (3, 8, 8), trains=True)
    assert (
        ThroughputMeter(components_of(recipe)).flops_per_image() == network.forward + network.step
    )


def test_the_memory_is_that_of_the_process(clock):
    before = peak_memory_mib(torch.device("cpu"))
    assert a_meter().read(8, 1.0)["memory_mib"] >= before > 50
