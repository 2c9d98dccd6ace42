"""Online distillation by collaborative learning: every network learns from an ensemble of all.

Source: Guo et al., *Online Knowledge Distillation via Collaborative Learning*, CVPR 2020,
sections 3.2 (naive, MinLogit) and 3.3 (each network on a different augmentation).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from bdkd.config import NetworkConfig
from bdkd.objectives.base import Logits, register_objective
from bdkd.objectives.one_sided import OneSidedObjective
from bdkd.objectives.options import MutualConfig


@dataclass(frozen=True)
class KDCLConfig(MutualConfig):
    """Options of kdcl."""

    ensemble: Literal["minlogit", "naive"] = "minlogit"
    """Method that combines the networks' logits into one target."""


@register_objective("kdcl", KDCLConfig)
class KDCL(OneSidedObjective):
    """Compute ``CE(x, y) + tau^2 KL(p_ensemble || p_x)`` with a constant ensemble. Each network
    sees a different view of an image. The role of a network determines its two weights."""

    def __init__(self, config: KDCLConfig, networks: Mapping[str, NetworkConfig]) -> None:
        super().__init__(config, networks)
        self.need_several()
        self.views = len(networks)
        self.ensemble = {"naive": naive, "minlogit": minlogit}[config.ensemble]
        self.losses = self.losses_by_role()

    def partners(self, logits: Logits, target: Tensor) -> dict[str, list[Tensor]]:
        widest = max((x.dtype for x in logits.values()), key=lambda dtype: dtype.itemsize)
        widest = torch.promote_types(widest, torch.float32)
        stacked = torch.stack([x.detach().to(widest) for x in logits.values()])  # (K, B, C)
        ensemble = self.ensemble(stacked, target)
        return {name: [ensemble] for name in logits}


def naive(logits: Tensor, target: Tensor) -> Tensor:
    """Return for every sample the logits ``(B, C)`` of the network with the smallest cross entropy,
    from ``(K, B, C)``."""
    networks, samples, classes = logits.shape
    targets = target.expand(networks, *target.shape).flatten(0, 1)
    losses = F.cross_entropy(logits.flatten(0, 1), targets, reduction="none")  # (K B,)
    best = losses.view(networks, samples).argmin(0)  # (B,)
    return logits.gather(0, best.view(1, -1, 1).expand(1, samples, classes))[0]


def minlogit(logits: Tensor, target: Tensor) -> Tensor:
    """Return for every class the smallest difference from the label's logit, ``(B, C)`` from
    ``(K, B, C)``. This takes the network with the largest margin, class by class. A soft label
    ``(B, C)`` counts as its most likely class."""
    label = target.argmax(-1) if target.ndim == 2 else target
    index = label.expand(len(logits), -1)[..., None]
    return (logits - logits.gather(-1, index)).amin(0)
