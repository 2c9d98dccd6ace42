"""The inputs and outputs of the loss, which are the same for every backend."""

import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar, overload

from torch import Tensor

from ._torch_compat import PLAIN, register_pytree, values_can_be_read
from .library import NAMESPACE
from .options import STATISTICS, LossOptions, fill_doc

T = TypeVar("T")


class Pair(NamedTuple, Generic[T]):
    """A value for the student and one for the teacher, such as their losses or gradients."""

    student: T
    teacher: T


NONE: Pair[Any] = Pair(None, None)
# Calling a named tuple takes 0.42 us, and fast_new(Pair, (student, teacher)) 0.2 us. Only for the
# path of a plain call, of which a batch of 8 x 10 takes 90 us: torch.compile does not trace it.
fast_new = tuple.__new__
_BOOLS = tuple(tuple(Pair(s, t) for t in (False, True)) for s in (False, True))


def bools(student: bool, teacher: bool) -> Pair[bool]:
    """Return a pair without creating it, for the same reason."""
    # torch.compile takes no bool as an index before torch 2.12, and no symbol in any version.
    return _BOOLS[1 if student else 0][1 if teacher else 0]


class BDKDStats(Sequence[Tensor]):
    """The statistics of one call, each of the logits' leading shape.

    They are detached, and float32 (float64 for float64 logits). A sample that is ignored has 0 in
    every statistic. The statistics of a term of weight 0 are 0 too: each cross entropy, and the
    divergences, entropies and weights if ``student_kd`` and ``teacher_kd`` are both 0.

    The object behaves like a named tuple. The statistics are the rows of one tensor, ``table``,
    whose first dimension is in the order of the names. A row is a view that is created on access:
    creating all views in every call takes a tenth of the step of a small batch. After a transform
    of ``torch.func`` or ``tree_map``, ``table`` is a tuple of rows.

    Attributes:
        {statistics}
    """

    __slots__ = ("table",)
    _fields: ClassVar[tuple[str, ...]] = tuple(STATISTICS)

    forward_kl: Tensor
    reverse_kl: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    student_ce: Tensor
    teacher_ce: Tensor
    forward_weight: Tensor
    reverse_weight: Tensor
    student_confidence: Tensor
    teacher_confidence: Tensor
    student_correct: Tensor
    teacher_correct: Tensor

    def __init__(self, table: Tensor) -> None:
        self.table = table

    def __len__(self) -> int:
        return len(STATISTICS)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.table)

    @overload
    def __getitem__(self, which: int) -> Tensor: ...
    @overload
    def __getitem__(self, which: slice) -> tuple[Tensor, ...]: ...
    def __getitem__(self, which):
        return tuple(self)[which]

    def _asdict(self) -> dict[str, Tensor]:
        return dict(zip(STATISTICS, self, strict=True))

    def __repr__(self) -> str:
        rows = [f"{name}={_values(x)}" for name, x in self._asdict().items()]
        lines = ",\n".join(f"    {', '.join(rows[i : i + 2])}" for i in range(0, len(rows), 2))
        return f"BDKDStats({len(self)} statistics{_shape(self[0])}:\n{lines})"


def _values(x: Any) -> str:
    """Return the first values of a tensor, or its type if they cannot be read without side effects.

    The rows are no tensors after a ``tree_map``.
    """
    if not isinstance(x, Tensor):
        return textwrap.shorten(repr(x), 40, placeholder="...")
    if type(x) not in PLAIN or not values_can_be_read(x):  # reading a DTensor is a collective
        return type(x).__name__
    if x.ndim == 0:
        return f"{x.item():.5g}"
    values = [f"{value:.3g}" for value in x.detach().reshape(-1)[:3].tolist()]
    return f"[{', '.join(values)}{', ...' if x.numel() > 3 else ''}]"


def _shape(x: Any) -> str:
    if not isinstance(x, Tensor):
        return ""
    dtype = str(x.dtype).removeprefix("torch.")
    gradient = ", requires_grad=True" if x.requires_grad else ""
    return f" of shape {tuple(x.shape)}, {dtype} on {x.device}{gradient}"


def _row(index: int) -> Callable[[BDKDStats], Tensor]:
    return lambda stats: stats.table[index]


for _index, (_name, _doc) in enumerate(STATISTICS.items()):
    setattr(BDKDStats, _name, property(_row(_index), doc=_doc))
fill_doc(BDKDStats, "statistics", STATISTICS)

# torch.func and torch.export handle the statistics as they handle a tuple of rows. The table itself
# cannot be the leaf, because the batch dimension of vmap would come before that of the rows.
register_pytree(
    BDKDStats,
    lambda stats: (list(stats), None),
    lambda rows, _: BDKDStats(tuple(rows)),  # type: ignore[arg-type]
    serialized_type_name=f"{NAMESPACE}.BDKDStats",
)


class BDKDOutput(NamedTuple):
    """The losses of student and teacher and the statistics of every sample.

    The losses are scalars, or of the logits' leading shape with ``reduction="none"``.
    """

    student: Tensor
    teacher: Tensor
    stats: BDKDStats

    def __repr__(self) -> str:
        student, teacher = (f"{_values(x)}{_shape(x)}" for x in (self.student, self.teacher))
        return f"BDKDOutput(\n  student={student},\n  teacher={teacher},\n  stats={self.stats!r})"


def _no_such_attribute(output: BDKDOutput, name: str) -> Any:
    """Raise ``AttributeError``. If a tensor has this attribute, the message says what to call."""
    hint = ""
    if name == "backward":
        if any(getattr(x, "requires_grad", False) for x in output[:2]):
            one = ".sum()" if output.student.ndim else ""
            hint = f": call (out.student + out.teacher){one}.backward()"
        else:
            hint = (
                ": no loss requires a gradient; pass logits that do, or after bdkd_loss_and_grad "
                "call torch.autograd.backward([student_logits, teacher_logits], [ds, dt])"
            )
    elif hasattr(Tensor, name) and not name.startswith("__"):
        hint = ": the tensors are out.student and out.teacher"
    raise AttributeError(f"'BDKDOutput' object has no attribute '{name}'{hint}")


# Not in the class, where type checkers would then accept every name.
BDKDOutput.__getattr__ = _no_such_attribute  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Availability:
    """Whether a backend can run on this machine, and the reason if not. Truthy if it can."""

    available: bool
    reason: str

    def __bool__(self) -> bool:
        return self.available

    def __str__(self) -> str:
        return self.reason


class LossInputs(NamedTuple):
    """The inputs of one call, checked and flattened to rows."""

    student: Tensor  # (N, C) fp16, bf16, fp32 or fp64; any row stride
    teacher: Tensor  # (N, C), its own storage type
    target: Tensor | None  # (N,) int64 labels, or (N, C) floating soft labels, or None
    sample_weight: Tensor | None  # (N,) floating, constant
    options: LossOptions
    plain: bool = False  # ordinary eager tensors, whose memory a kernel may use directly
    dense: bool = False  # plain, contiguous and without weights: ready for a kernel as they are

    @property
    def logits(self) -> Pair[Tensor]:
        return Pair(self.student, self.teacher)

    def has_terms(self) -> Pair[bool]:
        """Return whether each network's loss has a term. A loss without terms is a constant 0."""
        o, labelled = self.options, self.target is not None
        student = o.student_kd != 0 or (o.student_ce != 0 and labelled)
        teacher = o.teacher_kd != 0 or (o.teacher_ce != 0 and labelled)
        return bools(student, teacher)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of this call, by field."""
        # Field by field: torch.compile of torch 2.8 traces no slice of a NamedTuple.
        found = {
            "student": self.student,
            "teacher": self.teacher,
            "target": self.target,
            "sample_weight": self.sample_weight,
        }
        return {name: x for name, x in found.items() if isinstance(x, Tensor)}

    def with_tensors(self, **changed: Tensor) -> "LossInputs":
        """Return this call with other tensors."""
        # Not _replace, which torch.compile of torch 2.8 does not trace.
        return LossInputs(
            changed.get("student", self.student),
            changed.get("teacher", self.teacher),
            changed.get("target", self.target),
            changed.get("sample_weight", self.sample_weight),
            self.options,
            self.plain,
            self.dense,
        )


class Outputs(NamedTuple):
    """The outputs of a backend's forward pass."""

    losses: Pair[Tensor]  # reduced: 0-dim, or (N,) for "none"
    stats: Tensor  # (number of statistics, N)
    state: Tensor | None  # (state_rows, N): what the backend's backward pass needs of each row
