"""BD-KD: online distillation that balances forward and reverse KL for each sample.

Source: Amara et al., arXiv 2212.12965. See ``bdkd_kernels.reference`` for the equations. Two parts
are our own definitions, because we had no access to the body of the paper: the losses of more than
two networks, and the ablations that change more than ``gamma`` or a weight.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Literal

from bdkd_kernels import BDKDLoss, BDKDOutput, BDKDStats, bdkd_loss_and_grad
from bdkd_kernels.options import NAMES
from torch import Tensor

from bdkd.config import NetworkConfig
from bdkd.errors import UsageError
from bdkd.objectives.base import (
    Active,
    Logits,
    Objective,
    ObjectiveOutput,
    Scalar,
    register_objective,
)
from bdkd.objectives.one_sided import OneSided, check_teachers_learn
from bdkd.objectives.options import MutualConfig

STATISTICS = ("forward_weight", "reverse_weight", "forward_kl", "reverse_kl")


@dataclass(frozen=True)
class BDKDConfig(MutualConfig):
    """Options of bdkd."""

    gamma: float = 2.0
    """The larger of the weights of a sample's two divergences, in [1, 1e9]. The smaller weight is
    1, so gamma 1 means no weighting."""
    teacher_divergence: Literal["reverse", "forward"] = "reverse"
    """Divergence in the teacher's loss. reverse: KL(student || teacher). forward: KL(teacher ||
    student)."""
    student_divergence: Literal["both", "forward", "reverse"] = "both"
    """Ablation: the divergences in the student's loss. forward: KL(teacher || student). reverse:
    KL(student || teacher). both: their weighted sum."""
    weighting: Literal["entropy", "swapped"] = "entropy"
    """Ablation: how the entropies of a sample determine the two weights. entropy: as in BD-KD.
    swapped: exchange the weights of the two divergences."""
    soften_entropy: bool = True
    """Compute the entropies from logits divided by the temperature. false: from the logits
    themselves (temperature 1)."""


@register_objective("bdkd", BDKDConfig)
class BDKD(Objective):
    """Train each student with each teacher, and regularise each teacher with each student.

    The loss of a network is the mean of :func:`bdkd_kernels.bdkd_loss` over its partners. If no
    network is a teacher, each student learns from all other students.

    Ablations:

    - ``gamma = 1``: both divergences have the same weight.
    - ``student_divergence``: use only one of the student's two divergences, with its weight.
    - ``weighting = "swapped"``: exchange the weights of the two divergences.
    - ``teacher_kd = 0``: do not regularise the teacher.
    """

    def __init__(self, config: BDKDConfig, networks: Mapping[str, NetworkConfig]) -> None:
        super().__init__(config, networks)
        check_teachers_learn(self)
        if len(networks) < 2:
            raise UsageError(
                "objective.name = 'bdkd' needs a student and a teacher, or several students, got "
                f"one network ({', '.join(networks)})"
            )
        peers = not self.teachers
        self.edges = [
            (student, teacher)
            for student in self.students
            for teacher in (self.students if peers else self.teachers)
            if student != teacher
        ]
        self.partners = {
            name: sum(name == student or (name == teacher and not peers)
                      for student, teacher in self.edges)
            for name in networks
        }  # fmt: skip
        self.peers = peers
        plain = config.student_divergence == "both" and config.weighting == "entropy"
        self.ablation = None if plain else _Ablation(config)
        shared = {field.name for field in fields(config)} & {"backend", *NAMES}
        # The losses are sums over a micro-batch, divided by the number of counted samples in the
        # whole step. The results of all micro-batches and ranks then add up to the mean.
        self.arguments = {name: getattr(config, name) for name in shared}
        self.loss = BDKDLoss(**self.arguments, reduction="sum")

    def __call__(
        self, logits: Logits, target: Tensor, normaliser: Scalar, grad_scale: Scalar,
        active: Active = None,
    ) -> ObjectiveOutput:  # fmt: skip
        output = ObjectiveOutput({})
        for student, teacher in self.edges:
            s, t = logits[student], logits[teacher]
            # The fused loss scales both gradients by the same factor. If a student and its teacher
            # have different numbers of partners, the backward pass computes one gradient again.
            share = normaliser * self.partners[student]
            learner = s.detach() if self.ablation else s
            partner = t.detach() if self.peers else t
            loss = self.loss(learner, partner, target, grad_scale=grad_scale / share)
            if self.ablation is not None:
                learned = self.ablation(s, t, target, loss.stats, grad_scale / share)
                loss = BDKDOutput(learned, loss.teacher, loss.stats)
            self._add_pair(output, student, teacher, loss, normaliser)
        return output

    def loss_and_grad(
        self, logits: Logits, target: Tensor, normaliser: Scalar, grad_scale: Scalar,
        active: Active = None,
    ) -> ObjectiveOutput:  # fmt: skip
        if self.ablation is not None or len(set(self.partners.values())) > 1:
            return self(logits, target, normaliser, grad_scale, active)
        output = ObjectiveOutput({}, {}, {})
        assert output.gradients is not None
        for student, teacher in self.edges:
            s, t = logits[student], logits[teacher]
            trains = not self.peers and teacher not in self.frozen
            loss, gradients = bdkd_loss_and_grad(
                s, t if trains else t.detach(), target,
                grad_scale=grad_scale / (normaliser * self.partners[student]),
                **self.arguments, reduction="sum",
            )  # fmt: skip
            self._add_pair(output, student, teacher, loss, normaliser)
            for name, gradient in zip((student, teacher), gradients, strict=True):
                if gradient is not None:
                    _add(output.gradients, name, gradient)
        return output

    def _add_pair(
        self, output: ObjectiveOutput, student: str, teacher: str, loss: BDKDOutput,
        normaliser: Scalar,
    ) -> None:  # fmt: skip
        """Add the losses and statistics of one student and one teacher to the output."""
        _add(output.losses, student, loss.student / (normaliser * self.partners[student]))
        if not self.peers and teacher not in self.frozen:
            _add(output.losses, teacher, loss.teacher / (normaliser * self.partners[teacher]))
        for name in STATISTICS:
            value = getattr(loss.stats, name)
            if len(self.edges) > 1:
                output.statistics[f"{name}/{student}/{teacher}"] = value
            _add(output.statistics, name, value / len(self.edges))


class _Ablation:
    """Compute the student's loss with only one divergence or with exchanged weights.

    The loss is a sum over the samples. Each divergence is a separate one-sided loss, with the
    sample weights that the fused kernel computed.
    """

    def __init__(self, config: BDKDConfig) -> None:
        kd = config.student_kd
        self.swapped, self.divergence = config.weighting == "swapped", config.student_divergence
        self.cross_entropy = OneSided(config, config.student_ce, 0.0)
        self.forward = OneSided(config, 0.0, kd, "forward")
        self.reverse = OneSided(config, 0.0, kd, "reverse")

    def __call__(
        self, student: Tensor, teacher: Tensor, target: Tensor, stats: BDKDStats, scale: Scalar
    ) -> Tensor:
        weights = stats.forward_weight, stats.reverse_weight
        d1, d2 = reversed(weights) if self.swapped else weights
        total = self.cross_entropy(student, [teacher], target, 1.0, scale)
        if self.divergence != "reverse":
            total = total + self.forward(student, [teacher], None, 1.0, scale, d1)
        if self.divergence != "forward":
            total = total + self.reverse(student, [teacher], None, 1.0, scale, d2)
        return total


def _add(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    sums[name] = sums[name] + value if name in sums else value
