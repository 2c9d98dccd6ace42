"""One network's cross entropy and its divergence from partners that are held constant."""

from collections.abc import Sequence
from typing import Any, Literal

from bdkd_kernels import BDKDLoss
from torch import Tensor

from bdkd.config import ObjectiveConfig
from bdkd.errors import UsageError


class OneSided:
    """``ce CE(x, y) + kd tau^2 mean over partners of KL``, by the fused kernel.

    It is the teacher's half of BD-KD's loss: the learner stands in the teacher's place and each
    partner in the student's, of whom nothing is then computed but its probabilities.

    Args:
        divergence: ``"forward"``, KL(partner || learner), or ``"reverse"``, KL(learner || partner).

    Raises:
        UsageError: an option out of range, by its key.
    """

    def __init__(
        self,
        config: ObjectiveConfig,
        ce: float | None,
        kd: float | None,
        divergence: Literal["forward", "reverse"] = "forward",
    ) -> None:
        settings: dict[str, Any] = {
            "student_ce": 0.0,
            "student_kd": 0.0,
            "teacher_ce": ce,
            "teacher_kd": kd,
            # In the kernel's words the partner is the student.
            "teacher_divergence": "reverse" if divergence == "forward" else "forward",
            "temperature": config.temperature,
            "label_smoothing": config.label_smoothing,
            "backend": config.backend,
        }
        try:
            self.loss = BDKDLoss(**settings, reduction="sum")
        except (ValueError, TypeError) as error:
            raise UsageError(f"objective.{error}") from error

    def __call__(
        self,
        learner: Tensor,  # (B, C)
        partners: Sequence[Tensor],  # (B, C) each, at least one
        target: Tensor | None,
        normaliser: float | Tensor,
        grad_scale: float | Tensor,
        sample_weight: Tensor | None = None,  # (B,)
    ) -> Tensor:
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
    """The loss of every network by name, with the two weights of its role."""
    return {
        **{name: OneSided(config, config.student_ce, config.student_kd) for name in students},
        **{name: OneSided(config, config.teacher_ce, config.teacher_kd) for name in teachers},
    }
