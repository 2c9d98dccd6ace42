"""What goes into the loss and what comes out of it, the same for every backend."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from numbers import Integral, Real
from typing import ClassVar, Literal, NamedTuple, get_args, overload

import torch
from torch import Tensor
from torch.utils._pytree import register_pytree_node

Reduction = Literal["mean", "sum", "none"]
Divergence = Literal["reverse", "forward"]


class BDKDStats(Sequence[Tensor]):
    """Statistics of one call by name, each of the logits' leading shape, detached, float32 (float64
    for float64 logits).

    In all but its making it is a named tuple of twelve tensors, the rows of one, ``table``, of
    shape ``(12, ...)``; a row is looked up when it is asked for, since twelve views made in every
    call take a tenth of a small batch's step. (Where torch.func or a map over a tree has been at
    them, ``table`` is a tuple of twelve.)
    Samples that are ignored hold 0 everywhere; so do the statistics of a term whose weight is 0
    (both cross entropies; divergences, entropies and weights when ``student_kd`` and
    ``teacher_kd`` are both 0).
    """

    __slots__ = ("table",)
    _fields: ClassVar[tuple[str, ...]]

    def __init__(self, table: Tensor) -> None:
        self.table = table

    @property
    def forward_kl(self) -> Tensor:
        """KL(p_t || p_s), nats."""
        return self.table[0]

    @property
    def reverse_kl(self) -> Tensor:
        """KL(p_s || p_t), nats."""
        return self.table[1]

    @property
    def student_entropy(self) -> Tensor:
        """In nats, of the softened distribution or (``soften_entropy=False``) at 1."""
        return self.table[2]

    @property
    def teacher_entropy(self) -> Tensor:
        """Likewise."""
        return self.table[3]

    @property
    def student_ce(self) -> Tensor:
        """Cross entropy, nats."""
        return self.table[4]

    @property
    def teacher_ce(self) -> Tensor:
        """Cross entropy, nats."""
        return self.table[5]

    @property
    def forward_weight(self) -> Tensor:
        """d1: ``gamma`` or 1."""
        return self.table[6]

    @property
    def reverse_weight(self) -> Tensor:
        """d2: ``gamma`` or 1."""
        return self.table[7]

    @property
    def student_confidence(self) -> Tensor:
        """The largest softmax at temperature 1."""
        return self.table[8]

    @property
    def teacher_confidence(self) -> Tensor:
        """The largest softmax at temperature 1."""
        return self.table[9]

    @property
    def student_correct(self) -> Tensor:
        """1.0 where the first largest logit is the label's, else (and without a target) 0.0."""
        return self.table[10]

    @property
    def teacher_correct(self) -> Tensor:
        """Likewise."""
        return self.table[11]

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
        return f"BDKDStats({', '.join(f'{name}={x}' for name, x in self._asdict().items())})"


STATISTICS = tuple(name for name, what in vars(BDKDStats).items() if isinstance(what, property))
BDKDStats._fields = STATISTICS
# What torch.func and torch.export hand through as they do a tuple. Row by row: vmap's dimension of
# the batch would come before that of the table.
register_pytree_node(
    BDKDStats,
    lambda stats: (list(stats), None),
    lambda rows, _: BDKDStats(tuple(rows)),  # type: ignore[arg-type]
    serialized_type_name="bdkd.BDKDStats",
)


class BDKDOutput(NamedTuple):
    """Losses of student and teacher (scalars, or of the leading shape with ``reduction="none"``)
    and the statistics of every sample."""

    student: Tensor
    teacher: Tensor
    stats: BDKDStats


# The ranges keep every product of options, and its square, within float32: a value beyond them
# would become 0 or inf in a kernel and turn a loss into NaN.
TEMPERATURE_RANGE = (1e-4, 1e4)
TEMPERATURE_NEEDED = "a number in [0.0001, 10000]"
_WEIGHT = ("0 or a number in [1e-30, 1e9]", lambda x: x == 0 or 1e-30 <= x <= 1e9)
_RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "temperature": (
        TEMPERATURE_NEEDED,
        lambda x: TEMPERATURE_RANGE[0] <= x <= TEMPERATURE_RANGE[1],
    ),
    "gamma": ("a number in [1, 1e9]", lambda x: 1 <= x <= 1e9),
    "student_ce": _WEIGHT,
    "student_kd": _WEIGHT,
    "teacher_ce": _WEIGHT,
    "teacher_kd": _WEIGHT,
    "label_smoothing": ("a number in [0, 1]", lambda x: 0 <= x <= 1),
}
_INT64 = (-(2**63), 2**63 - 1)


@dataclass(frozen=True)
class LossOptions:
    """The named choices of the loss; see :func:`bdkd_kernels.bdkd_loss` for each one's meaning."""

    temperature: float = 1.0
    gamma: float = 2.0
    student_ce: float = 1.0
    student_kd: float = 1.0
    teacher_ce: float = 1.0
    teacher_kd: float = 1.0
    teacher_divergence: Divergence = "reverse"
    soften_entropy: bool = True
    label_smoothing: float = 0.0
    ignore_index: int = -100
    reduction: Reduction = "mean"

    def check(self) -> None:
        """Check every option.

        Numbers of other types, such as NumPy's, are converted to Python's: operators take no
        others.

        Raises:
            ValueError, TypeError: the first option that does not fit, by name.
        """
        for name, (needed, fits) in _RANGES.items():
            value = getattr(self, name)
            if type(value) is not float:
                value = as_float(name, value, needed)
                object.__setattr__(self, name, value)
            if not fits(value):
                raise ValueError(f"{name} must be {needed}, got {value!r}")
        for name, choices in (("teacher_divergence", Divergence), ("reduction", Reduction)):
            value = getattr(self, name)
            if not isinstance(value, str) or value not in get_args(choices):
                *others, last = map(repr, get_args(choices))
                raise ValueError(
                    f"{name} must be {', '.join(others)} or {last}, got {shown(value)}"
                )
        if not isinstance(self.soften_entropy, bool):
            raise TypeError(f"soften_entropy must be a bool, got {shown(self.soften_entropy)}")
        if type(self.ignore_index) is not int:
            if isinstance(self.ignore_index, bool) or not isinstance(self.ignore_index, Integral):
                raise TypeError(f"ignore_index must be an int, got {shown(self.ignore_index)}")
            object.__setattr__(self, "ignore_index", int(self.ignore_index))
        if not _INT64[0] <= self.ignore_index <= _INT64[1]:
            raise ValueError(
                f"ignore_index must be an int of 64 bits, got {shown(self.ignore_index)}"
            )


def as_float(name: str, value: object, needed: str) -> float:
    """A Python float of any real number; ``needed`` completes the error message.

    Raises:
        TypeError: not a number. ValueError: a number that no float can hold.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        hint = f": {name}.item() gives one" if isinstance(value, Tensor) else ""
        raise TypeError(f"{name} must be {needed}, got {shown(value)}{hint}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} must be {needed}, got {shown(value)}") from None


def shown(value: object) -> str:
    """The value and its type for an error message, on one line and cut to a readable length."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # Python refuses to print an int of more than 4300 digits
        text = "a very large number"
    text = text if len(text) <= 60 else f"{text[:60]}..."
    return text if isinstance(value, float) else f"{text} ({type(value).__name__})"


@lru_cache(maxsize=256, typed=True)  # typed: True is not 1.0
def _checked_options(*values) -> LossOptions:
    options = LossOptions(*values)
    options.check()
    return options


def checked_options(*values) -> LossOptions:
    """``LossOptions(*values)``, checked; the same object for the same values, which a training loop
    repeats: making and checking it takes longer than the kernel of a small batch."""
    if not torch.compiler.is_dynamo_compiling():
        try:
            return _checked_options(*values)
        except TypeError:
            pass  # a value that cannot be hashed, or that the check refuses: it says so itself
    options = LossOptions(*values)
    options.check()
    return options


@dataclass(frozen=True)
class Availability:
    """Whether a backend can run here, and the reason where it can't. True where it can."""

    available: bool
    reason: str

    def __bool__(self) -> bool:
        return self.available

    def __str__(self) -> str:
        return self.reason


class LossInputs(NamedTuple):
    """One checked call, flattened to rows, as every backend receives it."""

    student: Tensor  # (N, C) fp16, bf16, fp32 or fp64; any row stride
    teacher: Tensor  # (N, C), its own storage type
    target: Tensor | None  # (N,) int64 labels, or (N, C) floating soft labels, or None
    sample_weight: Tensor | None  # (N,) floating, constant
    options: LossOptions
    plain: bool = False  # ordinary eager tensors, whose memory a kernel may use directly
    dense: bool = False  # plain, contiguous and without weights: ready for a kernel as they are

    def has_terms(self) -> tuple[bool, bool]:
        """Whether the student's and the teacher's loss have a term. One without is a constant 0."""
        o, labelled = self.options, self.target is not None
        student = o.student_kd != 0 or (o.student_ce != 0 and labelled)
        teacher = o.teacher_kd != 0 or (o.teacher_ce != 0 and labelled)
        return student, teacher

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of this call, by field."""
        # Field by field: in torch 2.8, torch.compile traces no slice of a NamedTuple.
        found = {
            "student": self.student,
            "teacher": self.teacher,
            "target": self.target,
            "sample_weight": self.sample_weight,
        }
        return {name: x for name, x in found.items() if isinstance(x, Tensor)}

    def with_tensors(self, **changed: Tensor) -> "LossInputs":
        """Return this call with other tensors."""
        # Not _replace, which torch.compile does not trace in torch 2.8.
        return LossInputs(
            changed.get("student", self.student),
            changed.get("teacher", self.teacher),
            changed.get("target", self.target),
            changed.get("sample_weight", self.sample_weight),
            self.options,
            self.plain,
            self.dense,
        )
