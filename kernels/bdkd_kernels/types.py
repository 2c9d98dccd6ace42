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
# Pair(student, teacher) takes 0.42 us, and fast_new(Pair, (student, teacher)) takes 0.2 us. It is
# used only in plain eager calls (90 us for a batch of 8 x 10): torch.compile does not trace it.
fast_new = tuple.__new__
_BOOLS = tuple(tuple(Pair(s, t) for t in (False, True)) for s in (False, True))


def bools(student: bool, teacher: bool) -> Pair[bool]:
    """Return a pair of bools from a table, which is faster than creating it."""
    # Before torch 2.12, torch.compile does not support a bool as an index. No version supports a
    # symbolic bool.
    return _BOOLS[1 if student else 0][1 if teacher else 0]


class BDKDStats(Sequence[Tensor]):
    """The statistics of one call. Each has the leading shape of the logits.

    They are detached, and float32 (float64 for float64 logits). All statistics of an ignored sample
    are 0. The statistic of a cross entropy of weight 0 is 0. If ``student_kd`` and ``teacher_kd``
    are both 0, the divergences, entropies and weights are 0.

    The object behaves like a named tuple. Its tensor ``table`` has one row for each statistic, in
    the order of the names. A row is a view that is created on access, because creating all views in
    every call takes a tenth of the step of a small batch. After a transform of ``torch.func`` or
    ``tree_map``, ``table`` is a tuple of rows.

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

    After a ``tree_map``, rows may be objects other than tensors.
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

# torch.func and torch.export handle the statistics as a tuple of rows. The table cannot be the only
# leaf, because vmap would add its batch dimension before the dimension of the statistics.
register_pytree(
    BDKDStats,
    lambda stats: (list(stats), None),
    lambda rows, _: BDKDStats(tuple(rows)),  # type: ignore[arg-type]
    serialized_type_name=f"{NAMESPACE}.BDKDStats",
)


class BDKDOutput(NamedTuple):
    """The losses of student and teacher and the statistics of every sample.

    The losses are scalars. With ``reduction="none"`` they have the leading shape of the logits.
    """

    student: Tensor
    teacher: Tensor
    stats: BDKDStats

    def __repr__(self) -> str:
        student, teacher = (f"{_values(x)}{_shape(x)}" for x in (self.student, self.teacher))
        return f"BDKDOutput(\n  student={student},\n  teacher={teacher},\n  stats={self.stats!r})"


def _no_such_attribute(output: BDKDOutput, name: str) -> Any:
    """Raise ``AttributeError``, with the right call if tensors have this attribute."""
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


# Set outside of the class: with a method in the class, type checkers would accept every name.
BDKDOutput.__getattr__ = _no_such_attribute  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Availability:
    """Whether a backend can run on this machine, and the reason if it cannot.

    The object is truthy if the backend can run. ``str`` returns the reason.
    """

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
    dense: bool = False  # plain, contiguous, without weights: passed to a kernel without a copy

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
        """Return the tensors of this call, by the name of their field."""
        # Not a slice of the NamedTuple, which torch.compile of torch 2.8 does not trace.
        found = {
            "student": self.student,
            "teacher": self.teacher,
            "target": self.target,
            "sample_weight": self.sample_weight,
        }
        return {name: x for name, x in found.items() if isinstance(x, Tensor)}

    def with_tensors(self, **changed: Tensor) -> "LossInputs":
        """Return the inputs with some tensors replaced."""
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
    state: Tensor | None  # (state_rows, N): values of each row for the backend's backward pass
