"""The loss of one network that learns from partners without changing them.

DML, KD, KDCL, LSKD, SwitOKD and the ablations of BD-KD use it.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Literal

from bdkd_kernels import BDKDLoss
from torch import Tensor

from bdkd.errors import UsageError
from bdkd.objectives.base import Active, Logits, Objective, ObjectiveOutput, Scalar
from bdkd.objectives.options import FusedConfig, MutualConfig


class OneSided:
    """Compute ``ce CE(x, y) + kd tau^2 mean over partners of KL`` with the fused kernel.

    The kernel computes the teacher's half of BD-KD's loss. The learner takes the place of the
    teacher, and a partner takes the place of the student. The partner gets no gradient.

    Args:
        config: temperature, label smoothing and backend.
        ce, kd: weights of the cross entropy and of the divergence.
        divergence: ``"forward"`` is KL(partner || learner), ``"reverse"`` is KL(learner ||
            partner).
    """

    def __init__(
        self, config: FusedConfig, ce: float, kd: float,
        divergence: Literal["forward", "reverse"] = "forward",
    ) -> None:  # fmt: skip
        self.loss = BDKDLoss(
            student_ce=0.0, student_kd=0.0, teacher_ce=ce, teacher_kd=kd,
            # The kernel names the directions from the student's side, which is the partner here.
            teacher_divergence="reverse" if divergence == "forward" else "forward",
            temperature=config.temperature, label_smoothing=config.label_smoothing,
            backend=config.backend, reduction="sum",
        )  # fmt: skip

    def __call__(
        self, learner: Tensor, partners: Sequence[Tensor], target: Tensor | None,
        normaliser: Scalar, grad_scale: Scalar, sample_weight: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Return the 0-dim loss of the learner.

        Args:
            learner: logits ``(B, C)``.
            partners: logits ``(B, C)`` of one or more networks.
            target: ``(B,)`` labels, or ``(B, C)`` soft labels. None: no labels, which requires
                that the cross entropy has the weight 0.
            normaliser: the divisor of the sum over the samples.
            grad_scale: the loss scale that will multiply the loss.
            sample_weight: ``(B,)``, default 1.
        """
        share = normaliser * len(partners)
        scale = grad_scale / share
        total = sum(
            self.loss(partner.detach(), learner, target, sample_weight, scale).teacher
            for partner in partners
        )
        return total / share


def check_teachers_learn(objective: Objective) -> None:
    """Raise ``UsageError`` if a teacher trains although both of its weights are 0."""
    config = objective.config
    trained = [name for name in objective.teachers if name not in objective.frozen]
    if trained and config.teacher_ce == 0 and config.teacher_kd == 0:
        raise UsageError(
            "objective.teacher_ce and objective.teacher_kd must not both be 0: the teacher would "
            "learn nothing, and weight decay would shrink its weights; set "
            f"networks.{trained[0]}.frozen"
        )


class OneSidedObjective(Objective):
    """An objective in which each network learns from partners that get no gradient."""

    losses: Mapping[str, OneSided]

    def losses_by_role(self) -> dict[str, OneSided]:
        """Return the loss of each network by name, with the two weights of the network's role."""
        check_teachers_learn(self)
        config: MutualConfig = self.config
        return {
            **dict.fromkeys(self.students, OneSided(config, config.student_ce, config.student_kd)),
            **dict.fromkeys(self.teachers, OneSided(config, config.teacher_ce, config.teacher_kd)),
        }

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
