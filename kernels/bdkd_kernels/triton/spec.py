"""The types of the device code: compile-time options, grouped arguments, row records."""

from collections import namedtuple
from dataclasses import dataclass
from typing import Any, NamedTuple

import triton.language as tl

from ..options import STATISTICS, TABLE

_namedtuple: Any = namedtuple  # mypy accepts literal fields only


@dataclass(frozen=True)
class NetworkSpec:
    """Compile-time options of one network, ``own``. The other network is its ``partner``."""

    ce: bool  # its loss has a cross entropy, and there is a target
    kd: bool  # its loss has a divergence
    own_kl: bool  # the divergence KL(own || partner) is a term of its loss
    partner_kl: bool  # the divergence KL(partner || own) is a term of its loss
    grad: bool  # its gradient is computed


# The statistics of a sample, in the order of ``BDKDStats.table``.
RowStats = _namedtuple("RowStats", tuple(STATISTICS))


class RowState(NamedTuple):
    """The values of a row that the backward pass needs, in addition to its statistics."""

    student_shift: Any
    student_inv_z: Any
    student_inv_z1: Any
    teacher_shift: Any
    teacher_inv_z: Any
    teacher_inv_z1: Any
    log_ratio: Any  # log2 of z_student / z_teacher
    weight: Any  # the factor of the row's losses
    target_sum: Any  # the sum of the row's target, 1 for a label


# A row's record: its statistics, then its state. The fields of a row are adjacent in memory. In a
# table (fields, N), each field would need its own address.
RECORD_FIELDS = (*RowStats._fields, *RowState._fields)
NUM_STATISTICS = tl.constexpr(len(RowStats._fields))
NUM_FIELDS = tl.constexpr(len(RECORD_FIELDS))
RECORD = tl.constexpr(-(-len(RECORD_FIELDS) // 8) * 8)  # padded to sectors of 32 bytes


# The options of the loss that are not numbers, by name.
Choices = _namedtuple(
    "Choices", tuple(option.name for option in TABLE if option.type not in (float, int))
)


@dataclass(frozen=True)
class Spec:
    """Compile-time options of one call. Everything else is a run-time argument."""

    student: NetworkSpec
    teacher: NetworkSpec
    target: str  # "none", "labels" or "soft"
    smooth: bool  # the target is smoothed
    squarings: int  # log2(temperature) for 1, 2, 4 and 8; -1: a second exponential instead
    choices: Any  # Choices
    dtype: tl.dtype  # of the arithmetic: float32 or float64
    nvidia: bool  # compiled for an NVIDIA GPU
    # Whether a program's store before a barrier and one after it, to the same address, happen in
    # this order. They do on NVIDIA. On AMD, Triton's barrier waits for shared memory only (seen in
    # the assembly for gfx942).
    ordered_stores: bool
    # Whether a launch begins while the previous one still runs (programmatic dependent launch). It
    # waits before it reads the results of the previous one.
    overlapped: bool = False
    num_partials: int = 0  # partial sums of the mean's denominator; 0: the denominator is N
    scale_is_tensor: bool = False
    row_alignment: int = 1  # a divisor of all row strides
    class_alignment: int = 1  # a divisor of C
    # Part of Triton's cache key: the offsets in a record depend on the order of its fields.
    record: tuple[str, ...] = RECORD_FIELDS

    @property
    def kd(self) -> bool:
        return self.student.kd or self.teacher.kd

    @property
    def grads(self) -> bool:
        return self.student.grad or self.teacher.grad

    @property
    def next_starts_early(self) -> bool:
        """Whether a launch of this call follows the rows' launch, and starts before it ends."""
        return self.overlapped and self.choices.reduction != "none"

    @property
    def has_nan_if_masked(self) -> bool:
        """Whether a masked class (-inf) makes sums of its row NaN."""
        return self.kd or self.target == "soft"

    @property
    def stores_label_again(self) -> bool:
        """Whether the gradient of the label's class is stored a second time, with its target."""
        student = self.student.grad and self.student.ce
        teacher = self.teacher.grad and self.teacher.ce
        return self.ordered_stores and self.target == "labels" and (student or teacher)


class Pair(NamedTuple):
    """A value for each network."""

    student: Any
    teacher: Any


class Network(NamedTuple):
    """One network's arguments."""

    logits: Any  # (N, C); rows are `stride` elements apart
    stride: Any
    gradient: Any  # (N, C), or None; rows are `gradient_stride` elements apart
    gradient_stride: Any


class Batch(NamedTuple):
    """The arguments that both networks share."""

    target: Any  # (N,) int64 labels, (N, C) soft labels, or None
    sample_weight: Any  # (N,), or None
    scale: Any  # factor of the gradients: a number, or 0-dim if SPEC.scale_is_tensor
    records: Any  # (N, RECORD), then the partial sums; see `partial_sums`
    N: Any  # rows
    C: Any  # classes


# The options of the loss that are numbers, by name, and two numbers that are derived from them:
# ``c`` is log2(e) / temperature, ``smoothing_per_class`` is label_smoothing / C. The kernels get
# them as one argument. Pass its fields directly to functions. Assigning a field to a name, also
# inside of a tuple, turns a compile-time number into a float32 tensor, and float64 loses digits.
_NUMBERS = tuple(option.name for option in TABLE if option.type in (float, int))
Options = _namedtuple("Options", ("c", "smoothing_per_class", *_NUMBERS))
