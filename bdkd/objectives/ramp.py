"""A weight that grows from 0 to 1 during the first epochs."""

import torch
from torch import Tensor


class Ramp:
    """A weight that grows linearly from 0 to 1: ``min(epochs / length, 1)``.

    ``value`` is a tensor that :meth:`advance` changes in place, so that a compiled or captured step
    reads the current value. Before the first call of :meth:`advance` it is 1.

    Args:
        length: number of epochs until the weight is 1. 0: the weight is always 1.
    """

    def __init__(self, length: float) -> None:
        self.length = length
        self.value: Tensor | float = 1.0

    def advance(self, epochs: float, device: torch.device) -> None:
        """Set the value for the step that follows ``epochs`` completed epochs."""
        if not self.length:
            return
        if not isinstance(self.value, Tensor):
            self.value = torch.ones((), device=device)
        self.value.fill_(min(epochs / self.length, 1.0))
