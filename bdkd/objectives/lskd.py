"""Logit standardisation: knowledge distillation from standardised logits.

Source: Sun, Ren, Li, Wang, Cao, *Logit Standardization in Knowledge Distillation*, CVPR 2024, arXiv
2403.01427, with the weights of its public code for ``kd``.
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

EPSILON = 1e-7  # added to the deviation, as in the public code


@dataclass(frozen=True)
class LSKDConfig(FusedConfig):
    """Options of lskd."""

    temperature: float = 2.0
    """Temperature of the divergence of standardised logits, in [1e-4, 1e4]."""
    student_ce: float = 0.1
    """Weight of the cross entropy: 0, or in [1e-30, 1e9]."""
    student_kd: float = 9.0
    """Weight of the divergence: 0, or in [1e-30, 1e9]."""


@register_objective("lskd", LSKDConfig)
class LSKD(Objective):
    """Compute ``student_ce CE(s, y) + student_kd tau^2 KL(p_t || p_s)``, where the probabilities of
    the divergence are those of standardised logits. Every teacher is frozen. With several teachers,
    the divergence is the mean over the teachers."""

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
            # The cross entropy ignores the partners, but the kernel needs one.
            partners = [logits[teacher] for teacher in self.teachers]
            loss = self.cross_entropy(x, partners[:1], target, normaliser, grad_scale)
            # The divergence needs the labels to leave out samples that do not count.
            losses[name] = loss + self.divergence(
                standardised(x), teachers, target, normaliser, grad_scale
            )
        return ObjectiveOutput(losses)


def standardised(logits: Tensor) -> Tensor:
    """Return logits ``(B, C)`` with mean 0 and standard deviation 1 in every row, float32 or wider.
    The deviation has the divisor C - 1. A row that is not finite becomes NaN."""
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + EPSILON)
