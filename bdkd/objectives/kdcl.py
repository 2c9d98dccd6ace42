"""Online distillation by collaborative learning: each network learns from an ensemble of all.

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
    """How the logits of all networks are combined into one target. minlogit: for each class, the
    smallest logit relative to the logit of the label. naive: for each sample, the logits of the
    network with the smallest cross entropy."""


@register_objective("kdcl", KDCLConfig)
class KDCL(OneSidedObjective):
    """Compute ``ce CE(x, y) + kd tau^2 KL(p_ensemble || p_x)`` for each network.

    The gradient does not flow into the ensemble. Each network receives a different augmented view
    of an image. The role of a network determines its weights: ``student_ce`` and ``student_kd``, or
    ``teacher_ce`` and ``teacher_kd``.
    """

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
    """Return for each sample the logits of the network with the smallest cross entropy.

    Args:
        logits: logits of all networks ``(K, B, C)``.
        target: ``(B,)`` labels, or ``(B, C)`` soft labels.

    Returns:
        Logits ``(B, C)``.
    """
    networks, samples, classes = logits.shape
    targets = target.expand(networks, *target.shape).flatten(0, 1)
    losses = F.cross_entropy(logits.flatten(0, 1), targets, reduction="none")  # (K B,)
    best = losses.view(networks, samples).argmin(0)  # (B,)
    return logits.gather(0, best.view(1, -1, 1).expand(1, samples, classes))[0]


def minlogit(logits: Tensor, target: Tensor) -> Tensor:
    """Return for each class the smallest logit of any network, relative to the label's logit.

    For each class, this is the network with the largest margin between the label and this class.

    Args:
        logits: logits of all networks ``(K, B, C)``.
        target: ``(B,)`` labels, or ``(B, C)`` soft labels, which count as their most likely class.

    Returns:
        Logits ``(B, C)``. The logit of the label is 0.
    """
    label = target.argmax(-1) if target.ndim == 2 else target.clamp_min(0)  # ignored: any class
    index = label.expand(len(logits), -1)[..., None]
    return (logits - logits.gather(-1, index)).amin(0)
