"""Knowledge distillation: students learn from teachers that were trained before.

Source: Hinton, Vinyals, Dean, arXiv 1503.02531, with the weights and the temperature of
RepDistiller and mdistiller.
"""

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from bdkd.config import NetworkConfig, ObjectiveConfig
from bdkd.errors import UsageError
from bdkd.objectives.base import Logits
from bdkd.objectives.one_sided import OneSidedObjective, by_role


class KD(OneSidedObjective):
    """Compute ``student_ce CE(s, y) + student_kd tau^2 KL(p_t || p_s)``. Every teacher is frozen.
    With several teachers, the divergence is the mean over the teachers."""

    options: ClassVar[Mapping[str, object]] = {
        "temperature": 4.0, "student_ce": 0.1, "student_kd": 0.9, "label_smoothing": 0.0,
        "backend": "auto",
    }  # fmt: skip

    def __init__(self, config: ObjectiveConfig, networks: Mapping[str, NetworkConfig]) -> None:
        super().__init__(config, networks)
        if not self.teachers:
            needed = "needs a teacher, got none: set networks.NAME.role"
            raise UsageError(f"objective.name = 'kd' {needed}")
        for name in self.teachers:
            if networks[name].weights is None and not networks[name].options.get("pretrained"):
                raise UsageError(
                    f"objective.name = 'kd' learns from a trained teacher: set networks.{name}."
                    "weights to its file or to the folder of the run that trained it (for example, "
                    "a run with objective.name = 'independent')"
                )
        self.frozen |= frozenset(self.teachers)
        self.losses = by_role(config, self.students, [])

    def partners(self, logits: Logits, target: Tensor) -> dict[str, list[Tensor]]:
        teachers = [logits[name] for name in self.teachers]
        return dict.fromkeys(self.students, teachers)
