"""How well a log interval used the machine: the wait for data, memory, utilisation."""

import time
from collections.abc import Iterable, Iterator

from bdkd.data import Batch
from bdkd.training.device import peak_flops, peak_memory_mib
from bdkd.training.profile import named_range
from bdkd.training.setup import Setup


class Usage:
    """Counts between two log lines."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.peak = peak_flops(setup.device, setup.recipe.train)  # FLOPs a second, or None
        self.waited = 0.0  # seconds since the last read
        self.image_size = setup.source.info.image_size
        self._flops: dict[tuple[int, int], int] = {}  # of a step, an image, by image size

    def watch(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches, while the time that the loop waits for each is counted."""
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
        """What goes into the metrics of an interval, and start anew.

        ``data_wait`` is the share of the interval in which this rank's loop waited for its next
        batch, ``memory_mib`` the most memory of this rank so far, ``mfu`` the share of the devices'
        published peak that the networks' own operations are (None where that is not known).

        Args:
            images: of the interval, over all ranks.
            seconds: that it took.
        """
        values = {
            "data_wait": min(self.waited / seconds, 1.0),
            "memory_mib": peak_memory_mib(self.setup.device),
            "mfu": None,
        }
        if self.peak is not None:
            done = self.flops_an_image() * images / seconds
            values["mfu"] = done / (self.peak * self.setup.ranks.world)
        self.waited = 0.0
        return values

    def flops_an_image(self) -> int:
        """FLOPs of a step for one image of the current size, over all networks."""
        if self.image_size not in self._flops:
            from bdkd.training.cost import costs

            each = costs(self.setup, self.image_size).values()
            self._flops[self.image_size] = sum(cost.step for cost in each)
        return self._flops[self.image_size]
