"""Every network on its own, from the labels alone: what each method is compared with."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from bdkd.config import NetworkConfig, ObjectiveConfig
from bdkd.objectives.base import ObjectiveOutput


class Independent:
    """Cross entropy of each of any number of networks."""

    views = 1
    options = frozenset({"label_smoothing"})

    def __init__(self, config: ObjectiveConfig, networks: Mapping[str, NetworkConfig]) -> None:
        self.label_smoothing = config.label_smoothing

    def __call__(
        self,
        logits: Mapping[str, Tensor],
        target: Tensor,
        normaliser: float | Tensor,
        grad_scale: float | Tensor,
    ) -> ObjectiveOutput:
        losses = {}
        for name, x in logits.items():
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            total = F.cross_entropy(
                wide, target, reduction="sum", label_smoothing=self.label_smoothing
            )
            losses[name] = total / normaliser
        return ObjectiveOutput(losses)
