"""BD-KD: online distillation with forward and reverse KL, balanced sample by sample.

Source: Amara et al., arXiv 2212.12965; the equations stand in ``bdkd_kernels.reference``. More than
two networks, and the ablations that change more than ``gamma`` or a weight, are ours to define: the
body of the paper was not at hand.
"""

from collections.abc import Mapping
from typing import ClassVar

from bdkd_kernels import BDKDLoss, BDKDOutput, BDKDStats, bdkd_loss_and_grad
from torch import Tensor

from bdkd.config import NetworkConfig, ObjectiveConfig
from bdkd.errors import UsageError
from bdkd.objectives.base import Objective, ObjectiveOutput
from bdkd.objectives.one_sided import OneSided

STATISTICS = ("forward_weight", "reverse_weight", "forward_kl", "reverse_kl")


class BDKD(Objective):
    """Each student learns from each teacher, and each teacher is regularised by each student.

    The losses of :func:`bdkd_kernels.bdkd_loss`, averaged over a network's partners. Without a
    teacher the students are a cohort of peers: each is a student of every other.

    Ablations: ``gamma = 1`` (no weighting), ``student_divergence`` (one divergence of the student's
    two, with its weight), ``weighting = "swapped"`` (each divergence has the other's weight),
    ``teacher_kd = 0`` (no regulariser of the teacher).
    """

    options: ClassVar[Mapping[str, object]] = {
        "backend": "auto", "temperature": 1.0, "gamma": 2.0, "student_ce": 1.0, "student_kd": 1.0,
        "teacher_ce": 1.0, "teacher_kd": 1.0, "teacher_divergence": "reverse",
        "student_divergence": "both", "weighting": "entropy", "soften_entropy": True,
        "label_smoothing": 0.0,
    }  # fmt: skip

    def __init__(self, config: ObjectiveConfig, networks: Mapping[str, NetworkConfig]) -> None:
        super().__init__(config, networks)
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
        shared = self.options.keys() - {"student_divergence", "weighting"}
        # A sum over the counted rows of this part of the batch. Divided by those of the whole step,
        # micro-batches and ranks add up to the mean.
        self.arguments = {**{name: getattr(config, name) for name in shared}, "reduction": "sum"}
        try:
            self.loss = BDKDLoss(**self.arguments)
        except (ValueError, TypeError) as error:
            raise UsageError(f"objective.{error}") from error

    def __call__(
        self,
        logits: Mapping[str, Tensor],
        target: Tensor,
        normaliser: float | Tensor,
        grad_scale: float | Tensor,
        active: frozenset[str] | None = None,
    ) -> ObjectiveOutput:
        output = ObjectiveOutput({})
        for student, teacher in self.edges:
            s, t = logits[student], logits[teacher]
            # The fused loss has one scale for both gradients. If a student and its teacher have
            # unlike numbers of partners, the backward pass recomputes one gradient exactly.
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
        self,
        logits: Mapping[str, Tensor],
        target: Tensor,
        normaliser: float | Tensor,
        grad_scale: float | Tensor,
        active: frozenset[str] | None = None,
    ) -> ObjectiveOutput:
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
                **self.arguments,
            )  # fmt: skip
            self._add_pair(output, student, teacher, loss, normaliser)
            for name, gradient in zip((student, teacher), gradients, strict=True):
                if gradient is not None:
                    _add(output.gradients, name, gradient)
        return output

    def _add_pair(
        self,
        output: ObjectiveOutput,
        student: str,
        teacher: str,
        loss: BDKDOutput,
        normaliser: float | Tensor,
    ) -> None:
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
    """The student's loss with one divergence only, or with its two weights exchanged, ``sum``-med.

    Each divergence is a one-sided loss of its own, weighted sample by sample with the weights that
    the fused kernel found.
    """

    def __init__(self, config: ObjectiveConfig) -> None:
        kd = config.student_kd
        self.swapped = config.weighting == "swapped"
        self.cross_entropy = OneSided(config, config.student_ce, 0.0)
        self.forward = OneSided(config, 0.0, kd, "forward")
        self.reverse = OneSided(config, 0.0, kd, "reverse")
        self.divergence = config.student_divergence

    def __call__(
        self,
        student: Tensor,
        teacher: Tensor,
        target: Tensor,
        stats: BDKDStats,
        scale: float | Tensor,
    ) -> Tensor:
        d1, d2 = stats.forward_weight, stats.reverse_weight
        if self.swapped:
            d1, d2 = d2, d1
        total = self.cross_entropy(student, [teacher], target, 1.0, scale)
        if self.divergence != "reverse":
            total = total + self.forward(student, [teacher], None, 1.0, scale, d1)
        if self.divergence != "forward":
            total = total + self.reverse(student, [teacher], None, 1.0, scale, d2)
        return total


def _add(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    sums[name] = sums[name] + value if name in sums else value
