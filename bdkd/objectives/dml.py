"""Deep mutual learning: every network learns from every other.

Source: Zhang, Xiang, Hospedales, Lu, arXiv 1706.00384, equations 5 to 8.
"""

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from bdkd.config import NetworkConfig, ObjectiveConfig
from bdkd.objectives.base import Objective, ObjectiveOutput
from bdkd.objectives.one_sided import by_role


class DML(Objective):
    """``CE(x, y) + tau^2 mean over peers of KL(p_peer || p_x)``, the peers held constant; a
    network's two weights are those of its role."""

    options: ClassVar[Mapping[str, object]] = {
        "temperature": 1.0, "student_ce": 1.0, "student_kd": 1.0, "teacher_ce": 1.0,
        "teacher_kd": 1.0, "label_smoothing": 0.0, "backend": "auto",
    }  # fmt: skip

    def __init__(self, config: ObjectiveConfig, networks: Mapping[str, NetworkConfig]) -> None:
        super().__init__(config, networks)
        self.need_several()
        self.losses = by_role(config, self.students, self.teachers)

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
