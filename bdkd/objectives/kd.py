"""Offline knowledge distillation: students learn from trained, frozen teachers.

Source: Hinton, Vinyals, Dean, arXiv 1503.02531. The default weights and temperature are those of
RepDistiller and mdistiller.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from bdkd.config import NetworkConfig
from bdkd.objectives.base import Logits, register_objective
from bdkd.objectives.one_sided import OneSided, OneSidedObjective
from bdkd.objectives.options import FusedConfig


@dataclass(frozen=True)
class KDConfig(FusedConfig):
    """Options of kd."""

    temperature: float = 4.0
    """Temperature of the divergence, in [1e-4, 1e4]."""
    student_ce: float = 0.1
    """Weight of the cross entropy: 0, or in [1e-30, 1e9]."""
    student_kd: float = 0.9
    """Weight of the divergence: 0, or in [1e-30, 1e9]."""


@register_objective("kd", KDConfig)
class KD(OneSidedObjective):
    """Compute ``student_ce CE(s, y) + student_kd tau^2 KL(p_t || p_s)`` for each student.

    Every teacher is frozen. With several teachers, the divergence is the mean over the teachers.
    """

    def __init__(self, config: KDConfig, networks: Mapping[str, NetworkConfig]) -> None:
        super().__init__(config, networks)
        self.need_frozen_teachers(networks)
        loss = OneSided(config, config.student_ce, config.student_kd)
        self.losses = dict.fromkeys(self.students, loss)

    def partners(self, logits: Logits, target: Tensor) -> dict[str, list[Tensor]]:
        teachers = [logits[name] for name in self.teachers]
        return dict.fromkeys(self.students, teachers)
