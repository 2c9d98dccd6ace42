"""Switchable online distillation: the teacher pauses while the student is too far behind.

Source: Qian et al., *Switchable Online Knowledge Distillation*, ECCV 2022, arXiv 2209.04996. The
gap and the adaptive threshold are those of section 3. The losses are those of learning mode and
expert mode.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from bdkd.config import NetworkConfig
from bdkd.errors import UsageError
from bdkd.objectives.base import (
    IGNORED,
    Active,
    Logits,
    Objective,
    ObjectiveOutput,
    Scalar,
    register_objective,
)
from bdkd.objectives.one_sided import OneSided, check_teachers_learn
from bdkd.objectives.options import MutualConfig


@register_objective("switokd", MutualConfig)
class SwitOKD(Objective):
    """Compute ``CE(s, y) + tau^2 KL(p_t || p_s)`` for the student and ``CE(t, y) + tau^2
    KL(p_s || p_t)`` for the teacher.

    Let ``a = |p_s - y|``, ``b = |p_t - y|`` and ``g = |p_s - p_t|`` be mean L1 distances over a
    batch. If ``b < a`` and ``g > a - exp(-b / (a + b)) b``, the teacher pauses (*expert mode*). A
    paused teacher has no loss, no backward pass and no optimizer step, but its forward pass runs
    and updates its batch norm statistics. Otherwise both networks train (*learning mode*).
    """

    has_dynamic_active_set = True

    def __init__(self, config: MutualConfig, networks: Mapping[str, NetworkConfig]) -> None:
        super().__init__(config, networks)
        check_teachers_learn(self)
        self.need_pair()
        if self.frozen:
            key, reason = f"networks.{self.teachers[0]}.frozen", "switokd decides when it trains"
            raise UsageError(f"{key} must be false: {reason}")
        self.student, self.teacher = self.students[0], self.teachers[0]
        self.temperature = config.temperature
        self.student_loss = OneSided(config, config.student_ce, config.student_kd)
        self.teacher_loss = OneSided(config, config.teacher_ce, config.teacher_kd)

    @torch.no_grad()
    def measure(self, logits: Logits, target: Tensor) -> Tensor:
        """Return the L1 distances a, b and g, summed over the samples that count: ``(3,)``,
        float64."""
        tau = self.temperature
        p_s, p_t = ((logits[n].double() / tau).softmax(-1) for n in (self.student, self.teacher))
        if target.ndim == 2:
            y = target
        else:
            y = F.one_hot(target.clamp_min(0), p_s.shape[-1])
            counted = (target != IGNORED)[:, None]
            p_s, p_t, y = (torch.where(counted, x, 0) for x in (p_s, p_t, y))
        return torch.stack([(p_s - y).abs().sum(), (p_t - y).abs().sum(), (p_s - p_t).abs().sum()])

    def active(self, means: Tensor) -> frozenset[str]:
        a, b, g = means.tolist()
        # Both train if the means are NaN or both networks are already perfect.
        expert = b < a and g > a - math.exp(-b / (a + b)) * b
        return frozenset({self.student} if expert else {self.student, self.teacher})

    def __call__(
        self, logits: Logits, target: Tensor, normaliser: Scalar, grad_scale: Scalar,
        active: Active = None,
    ) -> ObjectiveOutput:  # fmt: skip
        s, t = logits[self.student], logits[self.teacher]
        losses = {self.student: self.student_loss(s, [t], target, normaliser, grad_scale)}
        teaches = active is None or self.teacher in active
        if teaches:
            losses[self.teacher] = self.teacher_loss(t, [s], target, normaliser, grad_scale)
        active_samples = torch.full(s.shape[:1], float(teaches), device=s.device)
        return ObjectiveOutput(losses, {"teacher_active": active_samples})
