"""The one shape of every training method."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from bdkd.config import NetworkConfig, ObjectiveConfig
from bdkd.errors import UsageError


@dataclass
class ObjectiveOutput:
    """What a method makes of one batch."""

    losses: dict[str, Tensor]
    """One 0-dim loss a network that trains on this batch; each reaches its own network's logits
    only."""
    statistics: dict[str, Tensor] = field(default_factory=dict)
    """Per-sample values of the method, ``(B,)`` each, detached."""


class Objective(ABC):
    """A method: logits of K networks and labels in, one loss a network out.

    It knows of no device, precision or process group. ``options`` maps each field of
    :class:`ObjectiveConfig` that the method reads to the method's own default, so that setting any
    other field is an error and not a no-op.

    A method with ``controls`` decides batch by batch which networks train. Its decision must be
    that of the whole batch on every rank, so it comes in two halves: :meth:`measure` gives sums
    over samples, which the trainer adds up over the ranks; :meth:`active` turns their means into
    the names of the networks that train. Reading them waits for the device, and the graph of a step
    is not the same from step to step.

    Args:
        config: with every option of the method set.

    Raises:
        UsageError: networks and roles that do not suit the method.
    """

    options: ClassVar[Mapping[str, object]]
    controls: ClassVar[bool] = False

    def __init__(self, config: ObjectiveConfig, networks: Mapping[str, NetworkConfig]) -> None:
        self.config = config
        self.students = [name for name, network in networks.items() if network.role == "student"]
        self.teachers = [name for name, network in networks.items() if network.role == "teacher"]
        self.frozen = frozenset(name for name, network in networks.items() if network.frozen)
        """Networks that never train: no gradient, no step, always in evaluation mode."""
        self.views = 1
        """Augmentations of an image that the method wants: 1, or one for each network."""
        if not self.students:
            raise UsageError(
                f"no network is a student: set networks.{(self.teachers or ['NAME'])[0]}.role, "
                "or add one with role = 'student'"
            )
        for name in self.students:
            if name in self.frozen:
                raise UsageError(
                    f"networks.{name}.frozen must be false: {name!r} is a student, which trains"
                )

        if config.student_ce == 0 and config.student_kd == 0:
            raise UsageError(
                "objective.student_ce and objective.student_kd must not both be 0: the student "
                f"({', '.join(self.students)}) would learn nothing"
            )
        trained = [name for name in self.teachers if name not in self.frozen]
        if trained and config.teacher_ce == 0 and config.teacher_kd == 0:
            raise UsageError(
                "objective.teacher_ce and objective.teacher_kd must not both be 0: the teacher "
                f"would learn nothing and weight decay shrink it; set networks.{trained[0]}.frozen"
            )

    @abstractmethod
    def __call__(
        self,
        logits: Mapping[str, Tensor],  # (B, C) each, by network
        target: Tensor,  # (B,) labels, or (B, C) soft labels
        normaliser: float | Tensor,  # counted samples of the whole optimizer step
        grad_scale: float | Tensor,  # the loss scale that will multiply the losses
        active: frozenset[str] | None = None,  # the networks that train; None: all
    ) -> ObjectiveOutput: ...

    def measure(self, logits: Mapping[str, Tensor], target: Tensor) -> Tensor:
        """What the method decides by, summed over the samples: ``(k,)``, on the device."""
        raise NotImplementedError(f"{type(self).__name__} controls nothing")

    def active(self, means: Tensor) -> frozenset[str]:
        """The networks that train on a batch with these means ``(k,)``, on the CPU."""
        raise NotImplementedError(f"{type(self).__name__} controls nothing")

    def need_pair(self) -> None:
        """Raise ``UsageError`` unless there is one student and one teacher."""
        for role, names in (("student", self.students), ("teacher", self.teachers)):
            if len(names) != 1:
                raise UsageError(
                    f"objective.name = {self.config.name!r} needs one {role}, got {len(names)} "
                    f"({', '.join(names) or 'none'}): set networks.NAME.role, or choose a method "
                    "for any number of networks (bdkd, dml, kdcl)"
                )

    def need_several(self) -> None:
        """Raise ``UsageError`` unless there are at least two networks."""
        if len(names := [*self.students, *self.teachers]) < 2:
            raise UsageError(
                f"objective.name = {self.config.name!r} needs at least two networks, got "
                f"{', '.join(names)}"
            )
