"""BD-KD: online distillation with forward and reverse KL, balanced sample by sample.

Source: Amara et al., arXiv 2212.12965; the equations stand in ``bdkd_kernels.reference``. More than
two networks, and the ablations that change more than ``gamma`` or a weight, are ours to define: the
body of the paper was not at hand.
"""

from collections.abc import Mapping
from typing import ClassVar

from bdkd_kernels import BDKDLoss, BDKDStats
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
        try:
            self.loss = BDKDLoss(
                **{name: getattr(config, name) for name in shared},
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
        active: frozenset[str] | None = None,
    ) -> ObjectiveOutput:
        losses: dict[str, Tensor] = {}
        statistics: dict[str, Tensor] = {}
        for student, teacher in self.edges:
            s, t = logits[student], logits[teacher]
            # The fused loss has one scale for both gradients. Where a student and its teacher have
            # unlike numbers of partners, one of them is recomputed from the logits, as exactly.
            scale = grad_scale / (normaliser * self.partners[student])
            learner, partner = (
                (s.detach() if self.ablation else s),
                (t.detach() if self.peers else t),
            )
            out = self.loss(learner, partner, target, grad_scale=scale)
            learned = out.student
            if self.ablation is not None:
                learned = self.ablation(s, t, target, out.stats, scale)
            _add(losses, student, learned / (normaliser * self.partners[student]))
            if not self.peers and teacher not in self.frozen:
                _add(losses, teacher, out.teacher / (normaliser * self.partners[teacher]))
            for name in STATISTICS:
                value = getattr(out.stats, name)
                if len(self.edges) > 1:
                    statistics[f"{name}/{student}/{teacher}"] = value
                _add(statistics, name, value / len(self.edges))
        return ObjectiveOutput(losses, statistics)


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
