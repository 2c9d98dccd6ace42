"""Losses of one network that learns from constant partners: DML, KDCL, KD, SwitOKD, ablations."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from bdkd_kernels import BDKDLoss
from torch import Tensor

from bdkd.config import ObjectiveConfig
from bdkd.errors import UsageError
from bdkd.objectives.base import Active, Logits, Objective, ObjectiveOutput, Scalar

# Defaults of the objectives in which students and teachers learn from each other.
MUTUAL_OPTIONS: Mapping[str, object] = {
    "temperature": 1.0, "student_ce": 1.0, "student_kd": 1.0, "teacher_ce": 1.0, "teacher_kd": 1.0,
    "label_smoothing": 0.0, "backend": "auto",
}  # fmt: skip


def fused_loss(**settings: Any) -> BDKDLoss:
    """Return the fused loss with ``sum`` reduction. Raise ``UsageError`` for invalid options."""
    try:
        return BDKDLoss(**settings, reduction="sum")
    except (ValueError, TypeError) as error:
        raise UsageError(f"objective.{error}") from error


class OneSided:
    """Compute ``ce CE(x, y) + kd tau^2 mean over partners of KL`` with the fused kernel.

    The kernel computes the teacher's half of BD-KD's loss: the learner is its teacher and a partner
    is its student. Of the partner, the kernel computes only the probabilities. ``divergence`` is
    ``"forward"``, KL(partner || learner), or ``"reverse"``, KL(learner || partner).
    """

    def __init__(
        self, config: ObjectiveConfig, ce: float | None, kd: float | None,
        divergence: Literal["forward", "reverse"] = "forward",
    ) -> None:  # fmt: skip
        self.loss = fused_loss(
            student_ce=0.0, student_kd=0.0, teacher_ce=ce, teacher_kd=kd,
            # The partner is the kernel's student, so the direction is reversed.
            teacher_divergence="reverse" if divergence == "forward" else "forward",
            temperature=config.temperature, label_smoothing=config.label_smoothing,
            backend=config.backend,
        )  # fmt: skip

    def __call__(
        self, learner: Tensor, partners: Sequence[Tensor], target: Tensor | None,
        normaliser: Scalar, grad_scale: Scalar, sample_weight: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Return the loss for the logits ``(B, C)`` of the learner and of at least one partner."""
        share = normaliser * len(partners)
        scale = grad_scale / share
        total = sum(
            self.loss(partner.detach(), learner, target, sample_weight, scale).teacher
            for partner in partners
        )
        return total / share


def by_role(
    config: ObjectiveConfig, students: Sequence[str], teachers: Sequence[str]
) -> dict[str, OneSided]:
    """Return the loss of every network by name, with the two weights of the network's role."""
    return {
        **{name: OneSided(config, config.student_ce, config.student_kd) for name in students},
        **{name: OneSided(config, config.teacher_ce, config.teacher_kd) for name in teachers},
    }


class OneSidedObjective(Objective):
    """An objective in which every network learns from partners that are held constant."""

    losses: Mapping[str, OneSided]

    @abstractmethod
    def partners(self, logits: Logits, target: Tensor) -> dict[str, list[Tensor]]:
        """Return the logits that each network learns from, ``(B, C)`` each."""

    def __call__(
        self, logits: Logits, target: Tensor, normaliser: Scalar, grad_scale: Scalar,
        active: Active = None,
    ) -> ObjectiveOutput:  # fmt: skip
        partners = self.partners(logits, target)
        losses = {
            name: loss(logits[name], partners[name], target, normaliser, grad_scale)
            for name, loss in self.losses.items()
            if name not in self.frozen
        }
        return ObjectiveOutput(losses)
