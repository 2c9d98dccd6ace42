"""BD-KD: online distillation with forward and reverse KL, balanced sample by sample.

Source: Amara et al., arXiv 2212.12965; the equations stand in ``bdkd_kernels.reference``.
"""

from collections.abc import Mapping

from bdkd_kernels import BDKDLoss
from torch import Tensor

from bdkd.config import NetworkConfig, ObjectiveConfig
from bdkd.errors import UsageError
from bdkd.objectives.base import ObjectiveOutput


class BDKD:
    """One teacher and one student, each learning from the labels and from the other."""

    views = 1
    options = frozenset(
        {
            "backend", "temperature", "gamma", "student_ce", "student_kd", "teacher_ce",
            "teacher_kd", "teacher_divergence", "soften_entropy", "label_smoothing",
        }
    )  # fmt: skip

    def __init__(self, config: ObjectiveConfig, networks: Mapping[str, NetworkConfig]) -> None:
        roles = {
            role: [name for name, network in networks.items() if network.role == role]
            for role in ("student", "teacher")
        }
        for role, names in roles.items():
            if len(names) != 1:
                raise UsageError(
                    f"objective.name = 'bdkd' needs one {role}, got {len(names)} "
                    f"({', '.join(names) or 'none'}): set networks.NAME.role"
                )
        self.student, self.teacher = roles["student"][0], roles["teacher"][0]
        try:
            self.loss = BDKDLoss(
                **{name: getattr(config, name) for name in self.options},
                # A sum over the batch's counted rows, divided by those of the whole step: the parts
                # of an accumulated batch, and ranks, add up to the one mean.
                reduction="sum",
            )
        except (ValueError, TypeError) as error:
            raise UsageError(f"objective.{error}") from error

    def __call__(
        self,
        logits: Mapping[str, Tensor],
        target: Tensor,
        normaliser: float | Tensor,
        grad_scale: float | Tensor,
    ) -> ObjectiveOutput:
        out = self.loss(
            logits[self.student],
            logits[self.teacher],
            target,
            grad_scale=grad_scale / normaliser,
        )
        return ObjectiveOutput(
            losses={
                self.student: out.student / normaliser,
                self.teacher: out.teacher / normaliser,
            },
            statistics={
                "forward_weight": out.stats.forward_weight,
                "reverse_weight": out.stats.reverse_weight,
                "forward_kl": out.stats.forward_kl,
                "reverse_kl": out.stats.reverse_kl,
            },
        )
