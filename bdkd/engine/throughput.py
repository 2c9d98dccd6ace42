"""Measure the speed of training.

:class:`StepClock` measures the time of single steps. :class:`ThroughputMeter` measures the wait for
data, the memory and the utilisation of each log interval.
"""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from bdkd.data import Batch
from bdkd.device import peak_flops, peak_memory_mib
from bdkd.engine.components import Components
from bdkd.engine.ranges import named_range


@dataclass(frozen=True)
class StepTimes:
    """The times of consecutive steps."""

    seconds: tuple[float, ...]  # time of each step, including the wait for its batch
    images: int  # images in a step, over all ranks
    data_wait: float  # share of the time in which the loop waited for its next batch
    memory_mib: float  # peak of the process so far; see peak_memory_mib()

    @property
    def mean(self) -> float:
        return sum(self.seconds) / len(self.seconds)

    @property
    def images_per_second(self) -> float:
        return self.images / self.mean

    def percentile(self, share: float) -> float:
        """Return a percentile of the step times in seconds.

        Args:
            share: the percentile, in [0, 100].
        """
        return float(np.percentile(self.seconds, share))


class StepClock:
    """Measure the time between marks.

    On a GPU the marks are CUDA events, so that the host can prepare the next step while the GPU
    computes the current step, as in training.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.marks: list[Any] = []  # seconds on a CPU, events on a GPU

    def restart(self) -> None:
        """Wait for the device, delete all marks, and set the first mark."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.marks = []
        self.mark()

    def mark(self) -> None:
        """Set a mark. On a GPU, wait until the GPU has reached the previous mark."""
        if self.device.type != "cuda":
            self.marks.append(time.monotonic())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        self.marks.append(event)
        if len(self.marks) > 1:
            self.marks[-2].synchronize()

    def seconds(self) -> tuple[float, ...]:
        """Wait for the device, and return the seconds between consecutive marks."""
        pairs = pairwise(self.marks)
        if self.device.type != "cuda":
            return tuple(end - begin for begin, end in pairs)
        torch.cuda.synchronize(self.device)
        return tuple(begin.elapsed_time(end) / 1000 for begin, end in pairs)


class ThroughputMeter:
    """Measure the wait for data, the memory and the utilisation between two log lines."""

    def __init__(self, components: Components) -> None:
        self.components = components
        self.peak = peak_flops(components.device, components.recipe.train)  # FLOP/s, or None
        self.waited = 0.0  # seconds since the last read
        self.image_size = components.source.info.image_size
        self._flops: dict[tuple[int, int], int] = {}  # FLOPs per image of a step, by image size

    def watch(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the batches, and measure the time that the loop waits for each."""
        iterator = iter(batches)
        while True:
            began = time.monotonic()
            with named_range("data wait"):
                batch = next(iterator, None)
            self.waited += time.monotonic() - began
            if batch is None:
                return
            height, width = batch.views[0].shape[-2:]
            self.image_size = (height, width)
            yield batch

    def read(self, images: int, seconds: float) -> dict[str, float | None]:
        """Return the values of an interval for the log, and reset the meter.

        Args:
            images: number of images in the interval, over all ranks.
            seconds: length of the interval.

        Returns:
            ``data_wait``: the share of the interval in which this rank waited for its next batch.
            ``memory_mib``: the peak memory of this rank so far. ``mfu`` (model FLOPs utilisation):
            the operations of the networks as a share of the published peak of the devices, or None
            if the peak is unknown.
        """
        values = {
            "data_wait": min(self.waited / seconds, 1.0),
            "memory_mib": peak_memory_mib(self.components.device),
            "mfu": None,
        }
        if self.peak is not None:
            done = self.flops_per_image() * images / seconds
            values["mfu"] = done / (self.peak * self.components.context.world_size)
        self.waited = 0.0
        return values

    def flops_per_image(self) -> int:
        """Return the FLOPs per image of a step of all networks, for the current image size."""
        if self.image_size not in self._flops:
            from bdkd.engine.cost import costs

            each = costs(self.components, self.image_size).values()
            self._flops[self.image_size] = sum(cost.step for cost in each)
        return self._flops[self.image_size]
