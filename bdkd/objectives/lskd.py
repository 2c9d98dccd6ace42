"""Logit standardisation: knowledge distillation from standardised logits.

Source: Sun, Ren, Li, Wang, Cao, *Logit Standardization in Knowledge Distillation*, CVPR 2024, arXiv
2403.01427. The default weights are those that the authors' public code uses for KD.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bdkd.config import NetworkConfig
from bdkd.objectives.base import (
    Active,
    Logits,
    Objective,
    ObjectiveOutput,
    Scalar,
    register_objective,
)
from bdkd.objectives.one_sided import OneSided
from bdkd.objectives.options import FusedConfig

EPSILON = 1e-7  # added to the standard deviation, as in the authors' public code


@dataclass(frozen=True)
class LSKDConfig(FusedConfig):
    """Options of lskd."""

    temperature: float = 2.0
    """Temperature of the divergence between standardised logits, in [1e-4, 1e4]."""
    student_ce: float = 0.1
    """Weight of the cross entropy: 0, or in [1e-30, 1e9]."""
    student_kd: float = 9.0
    """Weight of the divergence: 0, or in [1e-30, 1e9]."""


@register_objective("lskd", LSKDConfig)
class LSKD(Objective):
    """Compute ``student_ce CE(s, y) + student_kd tau^2 KL(p_t || p_s)`` for each student.

    The probabilities p_t and p_s are computed from standardised logits. Every teacher is frozen.
    With several teachers, the divergence is the mean over the teachers.
    """

    def __init__(self, config: LSKDConfig, networks: Mapping[str, NetworkConfig]) -> None:
        super().__init__(config, networks)
        self.need_frozen_teachers(networks)
        self.cross_entropy = OneSided(config, config.student_ce, 0.0)
        self.divergence = OneSided(config, 0.0, config.student_kd)

    def __call__(
        self, logits: Logits, target: Tensor, normaliser: Scalar, grad_scale: Scalar,
        active: Active = None,
    ) -> ObjectiveOutput:  # fmt: skip
        teachers = [standardised(logits[name]) for name in self.teachers]
        losses = {}
        for name in self.students:
            x = logits[name]
            # The cross entropy does not depend on partners, but the kernel requires one.
            partners = [logits[teacher] for teacher in self.teachers]
            loss = self.cross_entropy(x, partners[:1], target, normaliser, grad_scale)
            # The divergence needs the labels to skip the samples with the label -100.
            losses[name] = loss + self.divergence(
                standardised(x), teachers, target, normaliser, grad_scale
            )
        return ObjectiveOutput(losses)


def standardised(logits: Tensor) -> Tensor:
    """Return logits with mean 0 and standard deviation 1 in each row.

    Args:
        logits: ``(B, C)``. A row that is not finite becomes NaN.

    Returns:
        ``(B, C)``, float32 or wider. The standard deviation is computed with the divisor C - 1.
    """
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + EPSILON)
