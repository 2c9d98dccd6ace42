"""Every network on its own, from the labels alone: what each method is compared with."""

from collections.abc import Mapping

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
        return ObjectiveOutput(
            losses={
                name: F.cross_entropy(
                    x.float(), target, reduction="sum", label_smoothing=self.label_smoothing
                )
                / normaliser
                for name, x in logits.items()
            }
        )
