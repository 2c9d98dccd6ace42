"""The interface of every training objective."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from bdkd.config import NetworkConfig, ObjectiveConfig
from bdkd.errors import UsageError
from bdkd.registry import OBJECTIVES

Logits = Mapping[str, Tensor]  # (B, C) each, by network
Scalar = float | Tensor
Active = frozenset[str] | None

IGNORED = -100  # the label of samples that do not count, as in F.cross_entropy


@dataclass
class ObjectiveOutput:
    """The result of an objective on one batch."""

    losses: dict[str, Tensor]
    """A 0-dim loss for each network that trains on this batch. The loss of a network depends only
    on the logits of this network."""
    statistics: dict[str, Tensor] = field(default_factory=dict)
    """Per-sample values for the log, by name. Each is detached and has the shape ``(B,)``."""
    gradients: dict[str, Tensor] | None = None
    """Gradients of ``grad_scale * loss`` with respect to the logits ``(B, C)``, for each network
    that trains. If it is None, the trainer calls ``backward`` on the losses."""


class Objective(ABC):
    """Compute one loss for each network from the logits of K networks and the labels.

    An objective does not depend on the device, the precision or the process group. Register it with
    :func:`register_objective`.

    An objective with ``has_dynamic_active_set`` decides for each batch which networks train. All
    ranks must make the same decision, based on the whole batch. Therefore the decision has two
    steps. :meth:`measure` returns sums over samples, which the trainer adds up over the ranks.
    :meth:`active` receives the means and returns the names of the networks that train. Reading the
    means synchronizes with the device.

    Args:
        config: the options of the objective.
        networks: the networks of the recipe, by name.

    Raises:
        UsageError: the objective does not support these networks or their roles.
    """

    has_dynamic_active_set: ClassVar[bool] = False

    def __init__(self, config: Any, networks: Mapping[str, NetworkConfig]) -> None:
        config.check()
        self.config = config
        self.students = [name for name, network in networks.items() if network.role == "student"]
        self.teachers = [name for name, network in networks.items() if network.role == "teacher"]
        self.frozen = frozenset(name for name, network in networks.items() if network.frozen)
        """Networks that never train."""
        self.views = 1
        """Number of augmented views of each image: 1, or one view for each network."""
        self.warmup = 0.0
        """Number of epochs after which all weights have their full values. See :meth:`advance`."""
        if not self.students:
            key = f"networks.{(self.teachers or ['NAME'])[0]}.role"
            remedy = f"set {key}, or add a network with role = 'student'"
            raise UsageError(f"no network is a student: {remedy}")
        for name in self.frozen.intersection(self.students):
            reason = f"{name!r} is a student, which trains"
            raise UsageError(f"networks.{name}.frozen must be false: {reason}")

    @abstractmethod
    def __call__(
        self,
        logits: Logits,
        target: Tensor,  # (B,) labels, or (B, C) soft labels
        normaliser: Scalar,  # counted samples of the whole optimizer step
        grad_scale: Scalar,  # the loss scale that will multiply the losses
        active: Active = None,  # the networks that train; None: all
    ) -> ObjectiveOutput: ...

    def loss_and_grad(
        self, logits: Logits, target: Tensor, normaliser: Scalar, grad_scale: Scalar,
        active: Active = None,
    ) -> ObjectiveOutput:  # fmt: skip
        """Compute the losses for a backward pass that follows immediately.

        The arguments are the same as for ``__call__``. Override this method if the objective can
        compute the gradients together with the losses, and return them in ``gradients``. The kernel
        then does not have to check in the backward pass that its saved gradients are still valid.
        """
        return self(logits, target, normaliser, grad_scale, active)

    def measure(self, logits: Logits, target: Tensor) -> Tensor:
        """Return the values that :meth:`active` needs, as sums over the samples, ``(k,)``."""
        raise NotImplementedError(f"{type(self).__name__} has no dynamic active set")

    def active(self, means: Tensor) -> frozenset[str]:
        """Return the names of the networks that train on a batch.

        Args:
            means: the result of :meth:`measure` divided by the batch size, ``(k,)``, on the CPU.
        """
        raise NotImplementedError(f"{type(self).__name__} has no dynamic active set")

    def advance(self, epochs: float, device: torch.device) -> None:  # noqa: B027 - optional
        """Prepare the next step. The trainer calls this method before each step, and before the
        passes that warm up DDP.

        Override it to change weights of the loss during training. Store such a weight in a tensor
        and change the tensor in place, because a compiled or captured step reads this tensor.

        Args:
            epochs: number of completed epochs, including the completed fraction of this epoch.
            device: device of the logits.
        """

    def need_frozen_teachers(self, networks: Mapping[str, NetworkConfig]) -> None:
        """Freeze every teacher. Raise ``UsageError`` if there is no teacher or if a teacher has no
        trained weights."""
        named = f"objective.name = {self.config.name!r}"
        if not self.teachers:
            raise UsageError(f"{named} needs a teacher, got none: set networks.NAME.role")
        for name in self.teachers:
            if networks[name].weights is None and not networks[name].options.get("pretrained"):
                raise UsageError(
                    f"{named} learns from a trained teacher: set networks.{name}.weights to its "
                    "file or to the folder of the run that trained it (for example, a run with "
                    "objective.name = 'independent')"
                )
        self.frozen |= frozenset(self.teachers)

    def need_pair(self) -> None:
        """Raise ``UsageError`` unless there is one student and one teacher."""
        for role, names in (("student", self.students), ("teacher", self.teachers)):
            if len(names) != 1:
                raise UsageError(
                    f"objective.name = {self.config.name!r} needs one {role}, got {len(names)} "
                    f"({', '.join(names) or 'none'}): set networks.NAME.role, or choose an "
                    "objective for any number of networks (bdkd, dml, kdcl)"
                )

    def need_several(self) -> None:
        """Raise ``UsageError`` unless there are at least two networks."""
        if len(names := [*self.students, *self.teachers]) < 2:
            needed = f"needs at least two networks, got {', '.join(names)}"
            raise UsageError(f"objective.name = {self.config.name!r} {needed}")


Class = TypeVar("Class", bound=type[Objective])


def register_objective(
    name: str, config: type[ObjectiveConfig] = ObjectiveConfig
) -> Callable[[Class], Class]:
    """Return a decorator that registers a class of objectives.

    Args:
        name: the value of ``objective.name``.
        config: a frozen dataclass with the options of the objective, a subclass of
            :class:`bdkd.config.ObjectiveConfig`.
    """

    return OBJECTIVES.decorator(name, config, ObjectiveConfig)
