"""Independent training from labels only, without distillation. It is the baseline."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bdkd.config import ObjectiveConfig, Share
from bdkd.objectives.base import (
    Active,
    Logits,
    Objective,
    ObjectiveOutput,
    Scalar,
    register_objective,
)


@dataclass(frozen=True)
class IndependentConfig(ObjectiveConfig):
    """Options of independent."""

    label_smoothing: Share = 0.0
    """Label smoothing of the cross entropy."""


@register_objective("independent", IndependentConfig)
class Independent(Objective):
    """Compute ``CE(x, y)`` for each network. The number of networks is arbitrary."""

    def __call__(
        self, logits: Logits, target: Tensor, normaliser: Scalar, grad_scale: Scalar,
        active: Active = None,
    ) -> ObjectiveOutput:  # fmt: skip
        smoothing = self.config.label_smoothing
        losses = {}
        for name, x in logits.items():
            if name not in self.frozen:
                x = x.to(torch.promote_types(x.dtype, torch.float32))
                total = F.cross_entropy(x, target, reduction="sum", label_smoothing=smoothing)
                losses[name] = total / normaliser
        return ObjectiveOutput(losses)
