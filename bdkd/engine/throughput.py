"""How well a log interval used the machine: the wait for data, memory, utilisation."""

import time
from collections.abc import Iterable, Iterator

from bdkd.data import Batch
from bdkd.device import peak_flops, peak_memory_mib
from bdkd.engine.components import Components
from bdkd.engine.ranges import named_range


class ThroughputMeter:
    """Counts between two log lines."""

    def __init__(self, components: Components) -> None:
        self.components = components
        self.peak = peak_flops(components.device, components.recipe.train)  # FLOP/s, or None
        self.waited = 0.0  # seconds since the last read
        self.image_size = components.source.info.image_size
        self._flops: dict[tuple[int, int], int] = {}  # of a step, for an image, by image size

    def watch(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the batches and count the time that each is waited for."""
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
        """Return the values of an interval for the log, and reset.

        ``data_wait`` is the share of the interval in which this rank waited for its next batch.
        ``memory_mib`` is the peak memory of this rank so far. ``mfu`` is the share of the devices'
        published peak that the networks' operations are, or None if the peak is unknown.

        Args:
            images: trained on in the interval, over all ranks.
            seconds: length of the interval.
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
        """Return the FLOPs of a step for one image of the current size, over all networks."""
        if self.image_size not in self._flops:
            from bdkd.engine.cost import costs

            each = costs(self.components, self.image_size).values()
            self._flops[self.image_size] = sum(cost.step for cost in each)
        return self._flops[self.image_size]
