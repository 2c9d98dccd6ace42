"""Measure the speed of training steps and evaluations of a recipe, without writing files.

``bdkd train --dry-run`` and ``bdkd benchmark`` use this module.
"""

import contextlib
import dataclasses
import itertools
import math
import sys
import time
from collections.abc import Generator, Iterator
from typing import NamedTuple

import torch

from bdkd.data import Batch, DataSource, Shard, Split
from bdkd.data.base import WHOLE
from bdkd.device import autocast, available_memory, peak_memory_mib
from bdkd.engine.components import Components
from bdkd.engine.cost import Cost, Memory, costs, estimate_memory
from bdkd.engine.cuda_graph import WARM_UP
from bdkd.engine.progress import Progress
from bdkd.engine.throughput import StepClock, StepTimes, ThroughputMeter
from bdkd.runs.plan import memory_warning
from bdkd.runs.summary import evaluator_of
from bdkd.trainer import Trainer


class MemoryCheck(NamedTuple):
    """The result of :func:`check_memory`."""

    each: dict[str, Cost]  # cost of each network by name
    estimate: Memory  # for one rank
    available: int | None  # free memory in bytes; None: unknown
    warning: str | None  # a message if the estimate exceeds the free memory


def check_memory(components: Components, ranks: int) -> MemoryCheck:
    """Estimate the memory of a run and compare it with the available memory.

    Args:
        components: a data set and networks that were built but not trained.
        ranks: number of ranks that share a batch.
    """
    recipe, size = components.recipe, components.source.info.image_size
    largest = max((side for side in recipe.data.training_sizes() if side), default=0)
    if largest > max(size):  # data.progressive
        size = largest, largest
    each = costs(components, size)
    estimate = estimate_memory(components, each, ranks)
    available = available_memory(components.device)
    return MemoryCheck(each, estimate, available, memory_warning(estimate, available, recipe))


class Limit(NamedTuple):
    """How long to measure: for ``seconds``, but at least ``least`` and at most ``most`` steps."""

    least: int
    most: int
    seconds: float = math.inf

    def turns(self) -> Iterator[int]:
        began = time.monotonic()
        for turn in range(self.most):
            if turn >= self.least and time.monotonic() - began >= self.seconds:
                return
            yield turn


class Measurement(NamedTuple):
    """The speed of a recipe on this machine."""

    steps: StepTimes
    evaluation: float  # seconds per evaluated image


def measure(components: Components) -> Measurement:
    """Time a few training steps and evaluation batches.

    This trains the networks of ``components``. The output of compilers goes to standard error.
    """
    # Do not time the steps before the capture of a CUDA graph, nor the capture itself.
    least = WARM_UP + 1 if components.recipe.train.cuda_graph else 1
    with contextlib.redirect_stdout(sys.stderr):
        trainer = Trainer(components)
        steps = time_steps(trainer, Limit(least, 5, 2.0), Limit(2, 20, 5.0))
        evaluation = time_evaluation(trainer, Limit(1, 20, 2.0))
    peak = peak_memory_mib(components.device)  # an evaluation may need more than a step
    return Measurement(dataclasses.replace(steps, memory_mib=peak), evaluation)


def time_steps(trainer: Trainer, warm_up: Limit, measured: Limit) -> StepTimes:
    """Time training steps after some warm-up steps.

    With several ranks, all ranks must call this with limits that have no ``seconds``, because their
    clocks differ and all ranks must run the same number of steps.
    """
    device = trainer.components.device
    meter, clock = ThroughputMeter(trainer.components), StepClock(device)
    trainer.state.networks.train()
    with contextlib.closing(_batches(trainer)) as batches:
        watched = meter.watch(batches)
        for _ in warm_up.turns():
            trainer.train_step(next(watched))
        clock.restart()
        meter.waited = 0.0
        for _ in measured.turns():
            trainer.train_step(next(watched))
            clock.mark()
        seconds = clock.seconds()
    share = min(meter.waited / max(sum(seconds), 1e-9), 1.0)
    return StepTimes(seconds, trainer.batch_size, share, peak_memory_mib(device))


def _batches(trainer: Trainer) -> Generator[Batch, None, None]:
    """Yield training batches without end. They belong to the last epoch of the recipe, because
    ``data.progressive`` makes images largest there."""
    while True:
        trainer.state.progress = Progress()  # so that the schedule of the learning rate never ends
        yield from trainer.source.train_batches(
            trainer.recipe.train.epochs - 1, 0, trainer.batch_size, trainer.objective.views,
            trainer.context.shard,
        )  # fmt: skip


def time_evaluation(trainer: Trainer, limit: Limit) -> float:
    """Return the seconds per image of an evaluation of all networks, including its metrics. Return
    0 if the data set has no test and validation images."""
    components = trainer.components
    counts = components.source.info.counts
    splits: tuple[Split, ...] = ("test", "val")
    split = next((split for split in splits if counts[split]), None)
    if split is None:
        return 0.0
    whole = evaluator_of(components, trainer.state.evaluated_networks())
    first = _FirstBatches(components.source, 1, whole.batch_size)
    whole._replace(source=first).run(split).results()  # warms up
    began = time.monotonic()
    whole._replace(source=first).run(split).results()
    batch_seconds = max(time.monotonic() - began, 1e-6)
    batches = min(max(int(limit.seconds / batch_seconds), limit.least), limit.most)
    part = _FirstBatches(components.source, batches, whole.batch_size)
    began = time.monotonic()
    whole._replace(source=part).run(split).results()  # reads the device
    return (time.monotonic() - began) / part.info.counts[split]


class _FirstBatches:
    """The first evaluation batches of each split of a data source, for a single process."""

    def __init__(self, source: DataSource, batches: int, batch_size: int) -> None:
        self.source, self.batches = source, batches
        counts: dict[Split, int] = {
            split: min(count, batches * batch_size) for split, count in source.info.counts.items()
        }
        self.info = dataclasses.replace(source.info, counts=counts)
        self.train_batches = source.train_batches

    def eval_batches(self, split: Split, batch_size: int, shard: Shard = WHOLE) -> Iterator[Batch]:
        batches = self.source.eval_batches(split, batch_size, shard)
        yield from itertools.islice(batches, self.batches)


def time_forward(trainer: Trainer, name: str, warm_up: Limit, measured: Limit) -> StepTimes:
    """Time forward passes of one network in evaluation mode, without data loading and metrics.

    All ranks must call this function.
    """
    device, train, context = trainer.components.device, trainer.recipe.train, trainer.context
    info, network = trainer.source.info, trainer.state.networks.members[name]
    count = math.ceil(train.batch_size / context.world_size)
    layout = torch.channels_last if train.channels_last else torch.contiguous_format
    images = torch.randn(count, info.channels, *info.image_size, device=device)
    images = images.contiguous(memory_format=layout)
    clock, training = StepClock(device), network.training
    network.eval()
    with torch.inference_mode(), autocast(device, train.precision):
        for _ in warm_up.turns():
            network(images)
        clock.restart()
        for _ in measured.turns():
            network(images)
            clock.mark()
        seconds = clock.seconds()
    network.train(training)
    return StepTimes(seconds, count * context.world_size, 0.0, peak_memory_mib(device))
