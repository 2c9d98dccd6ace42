"""Deep mutual learning: every network learns from every other.

Source: Zhang, Xiang, Hospedales, Lu, arXiv 1706.00384, equations 5 to 8.
"""

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from bdkd.config import NetworkConfig, ObjectiveConfig
from bdkd.errors import UsageError
from bdkd.objectives.base import Objective, ObjectiveOutput
from bdkd.objectives.one_sided import OneSided


class DML(Objective):
    """``CE(x, y) + tau^2 mean over peers of KL(p_peer || p_x)``, the peers held constant; a
    network's two weights are those of its role."""

    options: ClassVar[Mapping[str, object]] = {
        "temperature": 1.0, "student_ce": 1.0, "student_kd": 1.0, "teacher_ce": 1.0,
        "teacher_kd": 1.0, "label_smoothing": 0.0, "backend": "auto",
    }  # fmt: skip

    def __init__(self, config: ObjectiveConfig, networks: Mapping[str, NetworkConfig]) -> None:
        super().__init__(config, networks)
        if len(networks) < 2:
            raise UsageError(
                f"objective.name = 'dml' needs at least two networks, got {', '.join(networks)}"
            )
        self.losses = {
            **{n: OneSided(config, config.student_ce, config.student_kd) for n in self.students},
            **{n: OneSided(config, config.teacher_ce, config.teacher_kd) for n in self.teachers},
        }

    def __call__(
        self,
        logits: Mapping[str, Tensor],
        target: Tensor,
        normaliser: float | Tensor,
        grad_scale: float | Tensor,
        active: frozenset[str] | None = None,
    ) -> ObjectiveOutput:
        return ObjectiveOutput(
            {
                name: loss(
                    logits[name],
                    [x for peer, x in logits.items() if peer != name],
                    target,
                    normaliser,
                    grad_scale,
                )
                for name, loss in self.losses.items()
                if name not in self.frozen
            }
        )
