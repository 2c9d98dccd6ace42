"""Options that several objectives share."""

from dataclasses import dataclass
from typing import Literal

from bdkd_kernels.options import TABLE

from bdkd.config import ObjectiveConfig, Share
from bdkd.errors import UsageError


@dataclass(frozen=True)
class FusedConfig(ObjectiveConfig):
    """Options of the objectives that use the fused loss. ``bdkd_kernels`` defines their bounds."""

    backend: Literal["auto", "triton", "native", "reference"] = "auto"
    """Implementation of the fused loss. auto: the fastest one that supports the tensors."""
    temperature: float = 1.0
    """Temperature of the divergences, in [1e-4, 1e4]."""
    student_ce: float = 1.0
    """Weight of the cross entropy in a student's loss: 0, or in [1e-30, 1e9]."""
    student_kd: float = 1.0
    """Weight of the divergence in a student's loss: 0, or in [1e-30, 1e9]."""
    label_smoothing: Share = 0.0
    """Label smoothing of the cross entropy of all networks."""

    def check(self) -> None:
        for option in TABLE:
            if hasattr(self, option.name):
                try:
                    option.check(getattr(self, option.name))
                except (ValueError, TypeError) as error:
                    raise UsageError(f"objective.{error}") from error
        if self.student_ce == 0 and self.student_kd == 0:
            raise UsageError(
                "objective.student_ce and objective.student_kd must not both be 0: the student "
                "would learn nothing"
            )


@dataclass(frozen=True)
class MutualConfig(FusedConfig):
    """Options of the objectives in which students and teachers learn from each other."""

    teacher_ce: float = 1.0
    """Weight of the cross entropy in a teacher's loss: 0, or in [1e-30, 1e9]."""
    teacher_kd: float = 1.0
    """Weight of the divergence in a teacher's loss: 0, or in [1e-30, 1e9]."""
