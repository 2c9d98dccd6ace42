"""What goes into the loss and what comes out of it, the same for every backend."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from numbers import Integral, Real
from typing import ClassVar, Literal, NamedTuple, get_args, overload

import torch
from torch import Tensor
from torch.utils._pytree import register_pytree_node

PLAIN = (Tensor, torch.nn.Parameter)  # no subclass, which may do as it likes
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


_WEIGHT = ("a finite number >= 0", lambda x: 0 <= x < math.inf)
_RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "temperature": ("a finite number > 0", lambda x: 0 < x < math.inf),
    "gamma": ("a finite number >= 1", lambda x: 1 <= x < math.inf),
    "student_ce": _WEIGHT,
    "student_kd": _WEIGHT,
    "teacher_ce": _WEIGHT,
    "teacher_kd": _WEIGHT,
    "label_smoothing": ("a number in [0, 1]", lambda x: 0 <= x <= 1),
}


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
        """Raise ``ValueError`` or ``TypeError`` naming the first option that does not fit.

        Numbers of other types (NumPy's) become Python's: operators take no others.
        """
        for name, (needed, fits) in _RANGES.items():
            value = getattr(self, name)
            if type(value) is not float:
                if isinstance(value, bool) or not isinstance(value, Real):
                    kind = type(value).__name__
                    hint = f": {name}.item() gives one" if isinstance(value, Tensor) else ""
                    raise TypeError(f"{name} must be {needed}, got {value!r} ({kind}){hint}")
                object.__setattr__(self, name, float(value))
            if not fits(value):
                raise ValueError(f"{name} must be {needed}, got {value!r}")
        if self.teacher_divergence not in get_args(Divergence):
            raise ValueError(
                "teacher_divergence must be 'reverse' or 'forward', "
                f"got {self.teacher_divergence!r}"
            )
        if self.reduction not in get_args(Reduction):
            raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {self.reduction!r}")
        if not isinstance(self.soften_entropy, bool):
            raise TypeError(f"soften_entropy must be a bool, got {self.soften_entropy!r}")
        if type(self.ignore_index) is not int:
            if isinstance(self.ignore_index, bool) or not isinstance(self.ignore_index, Integral):
                raise TypeError(f"ignore_index must be an int, got {self.ignore_index!r}")
            object.__setattr__(self, "ignore_index", int(self.ignore_index))


@lru_cache(maxsize=256, typed=True)  # typed: True is not 1.0
def _checked_options(*values) -> LossOptions:
    options = LossOptions(*values)
    options.check()
    return options


def checked_options(*values) -> LossOptions:
    """``LossOptions(*values)``, checked; the same object for the same values, which a training loop
    repeats: making and checking it takes longer than the kernel of a small batch."""
    if not torch.compiler.is_compiling():
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


class Problem(NamedTuple):
    """One checked call, flattened to rows, as every backend receives it."""

    student: Tensor  # (N, C) fp16, bf16, fp32 or fp64; any row stride
    teacher: Tensor  # (N, C) likewise, its own storage type
    target: Tensor | None  # (N,) int64 labels, or (N, C) floating soft labels, or None
    sample_weight: Tensor | None  # (N,) floating, constant
    options: LossOptions
