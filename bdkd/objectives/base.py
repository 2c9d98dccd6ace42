"""The one shape of every training method."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor


@dataclass
class ObjectiveOutput:
    """What a method makes of one batch."""

    losses: dict[str, Tensor]
    """One 0-dim loss a network that trains; each reaches its own network's logits only."""
    statistics: dict[str, Tensor] = field(default_factory=dict)
    """Per-sample values of the method, ``(B,)`` each, detached."""


class Objective(Protocol):
    """A method: logits of K networks and labels in, one loss a network out.

    It is made from an :class:`ObjectiveConfig` and the networks' configurations, raises
    ``UsageError`` where networks and roles do not suit it, and knows of no device, precision or
    process group. ``options`` names the fields of the configuration that it reads, so that setting
    any other is an error and not a no-op; ``views`` says how many augmentations of an image it
    wants.
    """

    views: int
    options: frozenset[str]

    def __call__(
        self,
        logits: Mapping[str, Tensor],  # (B, C) each, by network
        target: Tensor,  # (B,)
        normaliser: float | Tensor,  # counted samples of the whole optimizer step
        grad_scale: float | Tensor,  # the loss scale that will multiply the losses
    ) -> ObjectiveOutput: ...
