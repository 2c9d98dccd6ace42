"""Independent training from the labels alone: the baseline of the other objectives."""

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from bdkd.objectives.base import Active, Logits, Objective, ObjectiveOutput, Scalar


class Independent(Objective):
    """Compute ``CE(x, y)`` for each of any number of networks."""

    options: ClassVar[Mapping[str, object]] = {"label_smoothing": 0.0}

    def __call__(
        self, logits: Logits, target: Tensor, normaliser: Scalar, grad_scale: Scalar,
        active: Active = None,
    ) -> ObjectiveOutput:  # fmt: skip
        smoothing = self.config.label_smoothing or 0.0
        losses = {}
        for name, x in logits.items():
            if name not in self.frozen:
                x = x.to(torch.promote_types(x.dtype, torch.float32))
                total = F.cross_entropy(x, target, reduction="sum", label_smoothing=smoothing)
                losses[name] = total / normaliser
        return ObjectiveOutput(losses)
