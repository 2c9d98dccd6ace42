"""Every network on its own, from the labels alone: what each method is compared with."""

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from bdkd.objectives.base import Objective, ObjectiveOutput


class Independent(Objective):
    """``CE(x, y)`` of each of any number of networks."""

    options: ClassVar[Mapping[str, object]] = {"label_smoothing": 0.0}

    def __call__(
        self,
        logits: Mapping[str, Tensor],
        target: Tensor,
        normaliser: float | Tensor,
        grad_scale: float | Tensor,
        active: frozenset[str] | None = None,
    ) -> ObjectiveOutput:
        losses = {}
        for name, x in logits.items():
            if name not in self.frozen:
                wide = x.to(torch.promote_types(x.dtype, torch.float32))
                total = F.cross_entropy(
                    wide,
                    target,
                    reduction="sum",
                    label_smoothing=self.config.label_smoothing or 0.0,
                )
                losses[name] = total / normaliser
        return ObjectiveOutput(losses)
