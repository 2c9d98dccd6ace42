"""The Triton backend: makes its kernels' arguments and launches them. Forward is at most three
launches: the mean's denominator where rows may not count, the rows, the sum of the losses."""

import functools
import math
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver

from .. import ops
from ..checks import check_labels as raise_for_bad_labels
from ..checks import labels_can_be_read
from ..reference import compute_dtype
from ..types import Availability, LossInputs, LossOptions
from . import launch_table
from .row_kernels import (
    RECORD,
    STATE,
    STATISTICS,
    Terms,
    gradient_kernel,
    loop_kernel,
    sum_kernel,
    tile_kernel,
    totals_kernel,
)

_RECORD, _STATE, _STATISTICS = RECORD.value, STATE.value, STATISTICS.value
_SQUARINGS = {1.0: 0, 2.0: 1, 4.0: 2, 8.0: 3}
_INTERPRETED = triton.knobs.runtime.interpret
_OLDEST = (3, 6)
_ROWS_A_PART = 2**14  # of the mean's denominator, which one program adds up
_NVIDIA = torch.version.hip is None and not _INTERPRETED
_AMD = torch.version.hip is not None and not _INTERPRETED
_ORDERED_STORES = torch.version.hip is None


def availability() -> Availability:
    """Whether this machine can run the kernels, or why not."""
    version = triton.__version__
    if tuple(int(part) for part in version.split(".")[:2]) < _OLDEST:
        needed = ".".join(map(str, _OLDEST))
        return Availability(False, f"triton {version} is too old: {needed} is needed")
    if _INTERPRETED:
        return Availability(True, f"triton {version}, interpreted on the CPU")
    if not torch.cuda.is_available():
        return Availability(False, "no CUDA or ROCm device is visible to torch")
    name = torch.cuda.get_device_name()
    if torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
        major, minor = torch.cuda.get_device_capability()
        return Availability(False, f"{name} is sm_{major}{minor}: sm_80 or newer is needed")
    return Availability(True, f"triton {version}, {name}")


def _forward(
    problem: LossInputs,
    grad_scale: float | Tensor,
    ds: Tensor | None,
    dt: Tensor | None,
    check_labels: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    student, teacher, target, weight, o, *_ = problem
    if check_labels and labels_can_be_read(target):
        raise_for_bad_labels(target, student.shape[1], o.ignore_index)
    rows = student.shape[0]
    device = student.device
    if _is_elsewhere(device):
        with torch.cuda.device(device):
            return _forward(problem, grad_scale, ds, dt, False)
    # The mean's denominator, in parts; 0 where it is the number of rows.
    parts = 0
    if o.reduction == "mean" and (weight is not None or (target is not None and target.ndim == 1)):
        parts = min(256, launch_table.block_of(-(-rows // _ROWS_A_PART)))
    tensors = (student, teacher, target, weight, ds, dt)
    addresses, kinds = _described(tensors)
    key = (o, device.index, student.shape[1], _count(rows), parts, _kind(grad_scale), *kinds)
    plan = _plans.get(key)
    if plan is None:
        plan = _plans[key] = _plan(problem, ds, dt, parts)
    dtype, per_row = plan.dtype, plan.terms.per_row
    programs = -(-rows // plan.rows)

    # All that the launches leave for each other, in one allocation: see row_kernels._totals.
    records = torch.empty(rows * _RECORD + parts + 2 * programs, dtype=dtype, device=device)
    shape = (rows,) if per_row else ()
    losses = (torch.empty(shape, dtype=dtype, device=device),
              torch.empty(shape, dtype=dtype, device=device))  # fmt: skip
    scale = _exact(grad_scale, dtype, device)
    at, losses_at = records.data_ptr(), tuple(x.data_ptr() for x in losses)
    stream = 0 if _INTERPRETED else driver.active.get_current_stream(device.index)
    if parts:
        plan.totals(parts, stream, (target, weight, records), (*addresses[2:4], at),
                    (rows, o.ignore_index, *plan.totals_shape))  # fmt: skip
    row_losses, row_losses_at = (losses, losses_at) if per_row else (_NO_LOSSES, _NO_LOSSES)
    plan.losses(
        programs, stream, (*tensors, *row_losses, records), (*addresses, *row_losses_at, at),
        (scale, rows, *plan.numbers, isinstance(scale, Tensor), _TYPES[dtype], plan.terms),
    )  # fmt: skip
    if not per_row:
        plan.sum(1, stream, (*losses, records), (*losses_at, at),
                 (rows, programs, *plan.sum_shape))  # fmt: skip
    return (
        *losses,
        records.as_strided((_STATISTICS, rows), (1, _RECORD)),
        records.as_strided((_STATE, rows), (1, _RECORD)),
    )


_NO_LOSSES = (None, None)


def _is_elsewhere(device: torch.device) -> bool:
    """Whether it is not the current device, on which Triton launches."""
    return device.index is not None and device.index != torch.cuda.current_device()


def _described(tensors: tuple[Tensor | None, ...]) -> tuple[list, list]:
    """Their addresses, and all of them that compiled code depends on."""
    addresses: list[Any] = [None if x is None else x.data_ptr() for x in tensors]
    kinds: list[Any] = [None if x is None else (x.dtype, x.stride(), address % 16)
                        for x, address in zip(tensors, addresses, strict=True)]  # fmt: skip
    if _AMD:
        kinds += [x is not None and _within_2_gib(x) for x in tensors]
    return addresses, kinds


def _kind(scale: float | Tensor | None) -> Any:
    """Likewise, of a scale."""
    if isinstance(scale, Tensor):
        return scale.dtype, scale.data_ptr() % 16, _AMD and _within_2_gib(scale)
    return type(scale)


def _count(rows: int) -> Any:
    """Likewise, of the number of rows: the width of its integer and, on AMD, what it makes of the
    size of the records. Of 2**23 rows they are within 2 GiB."""
    return rows if _AMD and rows > 2**23 else rows < 2**31


def _within_2_gib(tensor: Tensor) -> bool:
    """Whether Triton compiles offsets of 32 bits for it, on AMD."""
    return tensor.untyped_storage().size() < 2**31


@functools.cache
def _fix_cache_keys() -> None:
    """Compute Triton's cache keys in one order: they depend on which kernel's is computed first
    (seen in 3.6 and 3.7), and a kernel would be compiled again for no reason."""
    if not _INTERPRETED:
        for kernel in (totals_kernel, tile_kernel, loop_kernel, sum_kernel, gradient_kernel):
            _ = kernel.cache_key


class _Launcher:
    """Launches one kernel: from the second time on without Triton's binding and hashing of its 40
    arguments, and with addresses in the place of tensors, which the driver need not look up."""

    def __init__(self, kernel: Any, warps: int, early: bool = False, registers: int = 0) -> None:
        _fix_cache_keys()
        self.kernel, self.compiled = kernel, None
        self.options: dict[str, Any] = {"num_warps": warps}
        if early:
            self.options["launch_pdl"] = True
        if registers:
            self.options["maxnreg"] = registers

    def __call__(self, programs: int, stream: int, tensors, addresses, numbers) -> None:
        compiled = self.compiled
        if compiled is None:  # so it stays where kernels are interpreted
            self.compiled = self.kernel[(programs,)](*tensors, *numbers, **self.options)
            return
        compiled.run(
            programs, 1, 1, stream, compiled.function, compiled.packed_metadata, None, None, None,
            *addresses, *numbers,
        )  # fmt: skip


class _Plan(NamedTuple):
    """What is the same in every call of one kind: by everything that a launch depends on but the
    number of rows."""

    totals: _Launcher
    losses: _Launcher
    sum: _Launcher
    rows: int  # a program of `losses`
    dtype: torch.dtype
    terms: Terms
    numbers: tuple  # of `losses`, in the order of its arguments, C to PARTS
    totals_shape: tuple  # LABELS to OVERLAPPED
    sum_shape: tuple  # PARTS to OVERLAPPED


_plans: dict[tuple, _Plan] = {}


def _plan(problem: LossInputs, ds: Tensor | None, dt: Tensor | None, parts: int) -> _Plan:
    student, teacher, _, _, o, *_ = problem
    classes, dtype = student.shape[1], compute_dtype(student, teacher)
    early = _NVIDIA and driver.active.get_current_target().arch >= 90
    terms = replace(_terms(problem, ds is not None, dt is not None), overlapped=early)
    launch = _launch(problem, ds, dt)
    strides = (student.stride(0), teacher.stride(0), _row_stride(ds), _row_stride(dt))
    aligned = (_divisor(*strides), _divisor(classes))
    if isinstance(launch, launch_table.Tile):
        kernel, rows = tile_kernel, launch.rows
        apart = launch.block // launch.beside
        shape: tuple = (launch.rows, apart, launch.beside, launch.chunk, classes != launch.block)
    else:
        kernel, rows = loop_kernel, 1
        # A row of one block has nothing to load ahead.
        prefetch = launch.prefetch if classes >= launch.block + 2 * launch.inner else 0
        shape = (launch.outer, launch.lanes, launch.inner, prefetch, launch.shifted)
    return _Plan(
        totals=_Launcher(totals_kernel, 16),
        losses=_Launcher(kernel, launch.warps, early and parts > 0,
                         launch.registers if _NVIDIA else 0),
        sum=_Launcher(sum_kernel, 16, early),
        rows=rows, dtype=dtype, terms=terms,
        numbers=(classes, *strides, *_numbers(o, terms, classes, dtype), o.ignore_index,
                 *aligned, *shape, parts),
        totals_shape=(terms.target == "labels", min(4096, _ROWS_A_PART), early),
        sum_shape=(parts, 4096, early),
    )  # fmt: skip


def _backward(
    problem: LossInputs,
    state: Tensor | None,
    student_upstream: Tensor | None,
    teacher_upstream: Tensor | None,
    ds: Tensor | None,
    dt: Tensor | None,
    announced: float | Tensor | None,
) -> None:
    student, teacher, target, _, o, *_ = problem
    assert state is not None  # it comes from _forward
    rows, classes = student.shape
    device = student.device
    if _is_elsewhere(device):
        with torch.cuda.device(device):
            _backward(problem, state, student_upstream, teacher_upstream, ds, dt, announced)
        return
    tensors = (student, teacher, target, state, student_upstream, teacher_upstream, ds, dt)
    addresses, kinds = _described(tensors)
    key = (o, device.index, classes, _count(rows), _kind(announced), *kinds)
    plan = _backward_plans.get(key)
    if plan is None:
        dtype = compute_dtype(student, teacher)
        terms = _terms(problem, ds is not None, dt is not None)
        strides = map(_row_stride, (student, teacher, ds, dt))
        numbers = (
            classes, *strides, state.stride(1), state.stride(0), _row_stride(student_upstream),
            _row_stride(teacher_upstream), *_numbers(o, terms, classes, dtype, gamma=False),
            o.ignore_index, min(2048, launch_table.block_of(classes)),
        )  # fmt: skip
        plan = _backward_plans[key] = _Launcher(gradient_kernel, 4), dtype, terms, numbers
    launcher, dtype, terms, numbers = plan
    if announced is not None:
        announced = _exact(announced, dtype, device)
    kind = "none" if announced is None else "tensor" if isinstance(announced, Tensor) else "number"
    stream = 0 if _INTERPRETED else driver.active.get_current_stream(device.index)
    launcher(min(rows, 1024), stream, tensors, addresses,
             (announced, rows, *numbers, kind, _TYPES[dtype], terms))  # fmt: skip


_backward_plans: dict[tuple, tuple[_Launcher, torch.dtype, Terms, tuple]] = {}
_TYPES = {torch.float32: tl.float32, torch.float64: tl.float64}


def _terms(problem: LossInputs, student_grad: bool, teacher_grad: bool) -> Terms:
    o, target = problem.options, problem.target
    kd = bool(o.student_kd or o.teacher_kd)
    return Terms(
        student_ce=o.student_ce != 0 and target is not None,
        student_kd=o.student_kd != 0,
        teacher_ce=o.teacher_ce != 0 and target is not None,
        teacher_kd=o.teacher_kd != 0,
        target="none" if target is None else "labels" if target.ndim == 1 else "soft",
        smooth=target is not None and o.label_smoothing != 0,
        teacher_forward=o.teacher_divergence == "forward",
        soften_entropy=o.soften_entropy,
        squarings=_SQUARINGS.get(float(o.temperature), -1) if kd else 0,
        student_grad=student_grad,
        teacher_grad=teacher_grad,
        mean=o.reduction == "mean",
        per_row=o.reduction == "none",
        nvidia=_NVIDIA,
        ordered_stores=_ORDERED_STORES,
    )


def _numbers(
    o: LossOptions, terms: Terms, classes: int, dtype: torch.dtype, gamma: bool = True
) -> list:
    """The options as the kernels want them, from ``c`` on. Triton rounds a float to float32; where
    the arithmetic is float64, they are compiled in. (The interpreter keeps a float as it is, so
    they are rounded here.)"""
    temperature = float(o.temperature) if terms.kd else 1.0
    # One class has probability 1, exactly, only if no rounding of its logit is in the exponent.
    c = math.log2(math.e) / temperature if classes > 1 else 0.0
    numbers = [
        c, temperature, *([float(o.gamma)] if gamma else []),
        float(o.student_ce), float(o.student_kd), float(o.teacher_ce), float(o.teacher_kd),
        float(o.label_smoothing), float(o.label_smoothing) / classes,
    ]  # fmt: skip
    if dtype == torch.float32 or _INTERPRETED:
        return torch.tensor(numbers, dtype=dtype).tolist() if _INTERPRETED else numbers
    return [tl.constexpr(x) for x in numbers]


def _exact(scale: float | Tensor, dtype: torch.dtype, device: torch.device) -> float | Tensor:
    """A gradient's scale, as a tensor where a float32 argument would round it."""
    if isinstance(scale, Tensor):
        return scale
    if dtype == torch.float32:
        return float(scale)
    return torch.full((), scale, dtype=dtype, device=device)


def _row_stride(tensor: Tensor | None) -> int:
    return 0 if tensor is None or tensor.ndim == 0 else tensor.stride(0)


def _divisor(*numbers: int) -> int:
    """The largest power of two up to 16 that divides them all."""
    common = math.gcd(16, *numbers)
    return common & -common


def _launch(problem: LossInputs, ds: Tensor | None, dt: Tensor | None):
    tensors = [x for x in (problem.student, problem.teacher, ds, dt) if x is not None]
    itemsize = max(x.element_size() for x in tensors)
    vector, shifted = 1, False  # Triton knows of an address that it divides by 16 or nothing
    if all(x.data_ptr() % 16 == 0 for x in tensors):
        strides = [x.stride(0) for x in tensors]
        vector = min(16 // itemsize, _divisor(*strides))
        distances = {stride * itemsize % 16 for stride in strides}
        shifted = len(distances) == 1 and all(x.element_size() == itemsize for x in tensors)
    return launch_table.choose(problem.student.shape[1], itemsize, vector, shifted)


_fused = ops.FusedBackend("triton", _forward, _backward, state_rows=_STATE)
loss, loss_and_grad = _fused.loss, _fused.loss_and_grad
