"""Networks beside each other on one GPU, each on a stream of its own.

A small network leaves multiprocessors free that another one can use. Only the forward passes are
put on streams here: autograd runs each backward pass on the stream of its forward pass, lets it
wait for the loss's gradients, and joins all of them at its end. Captured as a CUDA graph
(``train.cuda_graph``) the streams become branches, which start without the host.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bdkd.errors import UsageError
from bdkd.training.step import Passes, forward_and_backward, forward_and_loss

if TYPE_CHECKING:
    from bdkd.training.setup import Setup


def overlapped(setup: "Setup") -> Passes:
    """:func:`forward_and_backward`, whose networks run beside each other."""
    streams = Streams(setup.device, len(setup.networks.members))
    return partial(forward_and_backward, forward=partial(forward_and_loss, run=streams.run))


class Streams:
    """The current stream, and as many beside it as make ``count``."""

    def __init__(self, device: torch.device, count: int) -> None:
        self.device, self.of_device = device, torch.get_device_module(device)
        self.beside = [self.of_device.Stream(device) for _ in range(count - 1)]

    def run(self, calls: Sequence[Callable[[], Tensor]]) -> list[Tensor]:
        """What the calls return: each begins after all that the current stream was given before,
        and what it is given afterwards begins after all of them."""
        here = self.of_device.current_stream(self.device)
        for stream in self.beside:  # before the first call, for which nobody has to wait
            stream.wait_stream(here)
        results = []
        for stream, call in zip((here, *self.beside), calls, strict=True):
            with self.of_device.stream(stream):
                results.append(call())
        for stream, result in zip(self.beside, results[1:], strict=True):
            here.wait_stream(stream)
            if result.is_cuda:
                result.record_stream(here)  # its memory is the other stream's to give away
        return results


def check(setup: "Setup") -> None:
    """Raise ``UsageError`` where the networks cannot run beside each other."""
    for fits, needed in (
        (setup.device.type == "cuda", f"on a GPU (device is {setup.device})"),
        # DDP's buckets hold gradients of several networks, and wait for the last one's stream.
        (setup.ranks.alone, "with one rank"),
        (not setup.recipe.train.compile, "without train.compile, whose graph has one order"),
    ):
        if not fits:
            raise UsageError(f"train.overlap can be true only {needed}")
