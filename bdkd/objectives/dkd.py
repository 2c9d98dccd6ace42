"""Decoupled knowledge distillation: separate weights for the target class and the other classes.

Source: Zhao, Cui, Song, Qiu, Liang, *Decoupled Knowledge Distillation*, CVPR 2022, arXiv
2203.08679, equation 7. The default weights and the warm-up are those of mdistiller.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from bdkd.bounds import Bounds, NotNegative, Share
from bdkd.config import NetworkConfig, ObjectiveConfig
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
from bdkd.objectives.ramp import Ramp

Weight = Annotated[float, Bounds(ge=0, le=1e9)]


@dataclass(frozen=True)
class DKDConfig(ObjectiveConfig):
    """Options of dkd."""

    temperature: Annotated[float, Bounds(ge=1e-4, le=1e4)] = 4.0
    """Temperature of the divergences."""
    student_ce: Weight = 1.0
    """Weight of the cross entropy."""
    target_kd: Weight = 1.0
    """Weight of the divergence between the target class and all other classes (alpha)."""
    other_kd: Weight = 8.0
    """Weight of the divergence among the other classes (beta)."""
    warmup: NotNegative[float] = 20.0
    """Number of epochs during which the weights of both divergences grow linearly from 0 to their
    full values."""
    label_smoothing: Share = 0.0
    """Label smoothing of the cross entropy."""

    def check(self) -> None:
        if self.student_ce == self.target_kd == self.other_kd == 0:
            raise UsageError(
                "objective.student_ce, target_kd and other_kd must not all be 0: the student would "
                "learn nothing"
            )


@register_objective("dkd", DKDConfig)
class DKD(Objective):
    """Compute ``student_ce CE(s, y) + ramp tau^2 (target_kd TCKD + other_kd NCKD)``.

    TCKD is KL(b_t || b_s), where b contains two probabilities: that of the target class and that of
    all other classes together. NCKD is KL(q_t || q_s), where q contains the probabilities of the
    other classes, divided by their sum. Every teacher is frozen. With several teachers, each
    divergence is the mean over the teachers. The target class of a soft label is its most likely
    class.
    """

    def __init__(self, config: DKDConfig, networks: Mapping[str, NetworkConfig]) -> None:
        super().__init__(config, networks)
        self.need_frozen_teachers(networks)
        self.warmup = config.warmup
        self.ramp = Ramp(config.warmup)

    def advance(self, epochs: float, device: torch.device) -> None:
        self.ramp.advance(epochs, device)

    def __call__(
        self, logits: Logits, target: Tensor, normaliser: Scalar, grad_scale: Scalar,
        active: Active = None,
    ) -> ObjectiveOutput:  # fmt: skip
        config: DKDConfig = self.config
        losses = {}
        for name in self.students:
            s = _wide(logits[name])
            smoothing = config.label_smoothing
            loss = F.cross_entropy(s, target, reduction="sum", label_smoothing=smoothing)
            total = config.student_ce * loss
            for teacher in self.teachers:
                t = _wide(logits[teacher].detach())
                of_target, of_others = decoupled(s, t, target, config.temperature)
                divergence = config.target_kd * of_target + config.other_kd * of_others
                total = total + self.ramp.value * divergence / len(self.teachers)
            losses[name] = total / normaliser
        return ObjectiveOutput(losses)


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def decoupled(
    student: Tensor, teacher: Tensor, target: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return ``tau^2 TCKD`` and ``tau^2 NCKD``, each summed over the samples, 0-dim.

    Args:
        student, teacher: logits ``(B, C)``.
        target: ``(B,)`` labels, or ``(B, C)`` soft labels.
        temperature: the divisor tau of the logits.
    """
    label = target.argmax(-1) if target.ndim == 2 else target
    counted = (label != IGNORED)[:, None]  # (B, 1)
    label = label.clamp_min(0)[:, None]  # (B, 1)
    place = torch.arange(student.shape[-1] - 1, device=label.device)
    others = place + (place >= label)  # (B, C - 1), the classes without the target class
    binary, without = [], []
    for x in (student / temperature, teacher / temperature):
        log_p = x.log_softmax(-1)
        rest = log_p.gather(-1, others)
        without.append(rest.log_softmax(-1))
        binary.append(torch.cat((log_p.gather(-1, label), rest.logsumexp(-1, True)), -1))
    of_target, of_others = (
        F.kl_div(s, t, reduction="none", log_target=True) for s, t in (binary, without)
    )
    # A class adds 0 if the teacher gives it the probability 0. kl_div may return NaN there.
    of_target = torch.where(counted & (binary[1] != -math.inf), of_target, 0.0)
    of_others = torch.where(counted & (without[1] != -math.inf), of_others, 0.0)
    return (of_target * temperature**2).sum(), (of_others * temperature**2).sum()
