"""The Triton backend: makes its kernels' arguments and launches them. Forward is at most three
launches: the mean's denominator where rows may not count, the rows, the sum of the losses."""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import ops, triton_launch
from .checks import check_labels as raise_for_bad_labels
from .checks import labels_can_be_read
from .reference import compute_dtype
from .triton_rows import (
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
from .types import Availability, LossOptions, Problem

_RECORD, _STATE, _STATISTICS = RECORD.value, STATE.value, STATISTICS.value
_SQUARINGS = {1.0: 0, 2.0: 1, 4.0: 2, 8.0: 3}
_INTERPRETED = triton.knobs.runtime.interpret
_OLDEST = (3, 6)
_NVIDIA = torch.version.hip is None and not _INTERPRETED
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
    problem: Problem,
    grad_scale: float | Tensor,
    ds: Tensor | None,
    dt: Tensor | None,
    check_labels: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    student, teacher, target, weight, o = problem
    if check_labels and labels_can_be_read(target):
        raise_for_bad_labels(target, student.shape[1], o.ignore_index)
    rows = student.shape[0]
    device = student.device
    if device.index is not None and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return _forward(problem, grad_scale, ds, dt, False)
    logits = (student, teacher, ds, dt)
    key = (
        o, device.index, student.shape[1], rows < 2**31,
        *[None if x is None else (x.dtype, x.stride(0), x.data_ptr() % 16) for x in logits],
        None if target is None else (target.dtype, target.ndim, target.data_ptr() % 16),
        None if weight is None else weight.data_ptr() % 16,
        grad_scale.dtype if isinstance(grad_scale, Tensor) else None,
    )  # fmt: skip
    plan = _plans.get(key)
    if plan is None:
        plan = _plans[key] = _plan(problem, ds, dt)
    dtype, terms = plan.dtype, plan.terms
    programs = -(-rows // plan.rows)

    totals, parts = None, 1
    if terms.mean and (weight is not None or terms.target == "labels"):
        parts = min(256, triton.next_power_of_2(-(-rows // 4096)))
        totals = torch.empty(parts, dtype=torch.float64, device=device)
        _run(totals_kernel, (*key, "totals"), parts, 4, target, weight, totals, rows,
             o.ignore_index, terms.target == "labels", 1024)  # fmt: skip

    losses = rows if terms.per_row else programs
    student_losses = torch.empty(losses, dtype=dtype, device=device)
    teacher_losses = torch.empty(losses, dtype=dtype, device=device)
    records = torch.empty((rows, _RECORD), dtype=dtype, device=device)
    scale = _exact(grad_scale, dtype, device)
    _run(
        plan.kernel, (*key, parts), programs, plan.warps,
        student, teacher, target, weight, totals, scale, ds, dt,
        student_losses, teacher_losses, records, rows, *plan.numbers, *plan.shape,
        parts, isinstance(scale, Tensor), _TYPES[dtype], terms,
    )  # fmt: skip

    if not terms.per_row:
        if losses > 1:
            sums = [torch.empty((), dtype=dtype, device=device) for _ in range(2)]
            _run(sum_kernel, (dtype, device.index, "sum"), 1, 4, student_losses, teacher_losses,
                 *sums, losses, 1024)  # fmt: skip
            student_losses, teacher_losses = sums
        else:
            student_losses, teacher_losses = student_losses[0], teacher_losses[0]
    return student_losses, teacher_losses, records[:, :_STATISTICS].t(), records[:, :_STATE].t()


class _Plan(NamedTuple):
    """What is the same in every call of one kind, in the order of the kernel's arguments."""

    kernel: Any
    rows: int  # a program
    warps: int
    dtype: torch.dtype
    terms: Terms
    numbers: tuple  # classes to ignore_index
    shape: tuple  # ROW_ALIGN to PADDED


# By everything that a launch depends on but the number of rows.
_plans: dict[tuple, _Plan] = {}
_compiled: dict[tuple, Any] = {}


def _plan(problem: Problem, ds: Tensor | None, dt: Tensor | None) -> _Plan:
    student, teacher, _, _, o = problem
    classes, dtype = student.shape[1], compute_dtype(student, teacher)
    terms = _terms(problem, ds is not None, dt is not None)
    launch = _launch(problem, ds, dt)
    strides = (student.stride(0), teacher.stride(0), _row_stride(ds), _row_stride(dt))
    numbers = (classes, *strides, *_numbers(o, terms, classes, dtype), o.ignore_index)
    aligned, padded = (_divisor(*strides), _divisor(classes)), classes % launch.block != 0
    if isinstance(launch, triton_launch.Tile):
        shape = (*aligned, launch.rows, launch.block, launch.chunk, padded)
        return _Plan(tile_kernel, launch.rows, launch.warps, dtype, terms, numbers, shape)
    blocks = (*aligned, launch.lanes, launch.each, launch.apart, launch.stages, padded)
    return _Plan(loop_kernel, 1, launch.warps, dtype, terms, numbers, blocks)


def _run(kernel, key: tuple, programs: int, warps: int, *arguments) -> None:
    """Launch; from the second time on without Triton's binding and hashing of 40 arguments. ``key``
    stands for all that it would specialise on."""
    compiled = _compiled.get(key)
    if compiled is not None:
        compiled[(programs, 1, 1)](*arguments)
        return
    compiled = kernel[(programs,)](*arguments, num_warps=warps)
    if compiled is not None:  # it is where kernels are interpreted
        _compiled[key] = compiled


def _backward(
    problem: Problem,
    state: Tensor | None,
    student_upstream: Tensor | None,
    teacher_upstream: Tensor | None,
    ds: Tensor | None,
    dt: Tensor | None,
    announced: float | Tensor | None,
) -> None:
    student, teacher, target, _, o = problem
    assert state is not None  # it comes from _forward
    dtype = compute_dtype(student, teacher)
    rows, classes = student.shape
    terms = _terms(problem, ds is not None, dt is not None)
    if announced is not None:
        announced = _exact(announced, dtype, student.device)
    kind = "none" if announced is None else "tensor" if isinstance(announced, Tensor) else "number"
    gradient_kernel[(min(rows, 1024),)](
        student, teacher, target, state, student_upstream, teacher_upstream, announced, ds, dt,
        rows, classes, student.stride(0), teacher.stride(0), _row_stride(ds), _row_stride(dt),
        state.stride(1), state.stride(0), _row_stride(student_upstream),
        _row_stride(teacher_upstream), *_numbers(o, terms, classes, dtype, gamma=False),
        o.ignore_index,
        BLOCK=min(2048, triton.next_power_of_2(classes)), ANNOUNCED=kind, DTYPE=_TYPES[dtype],
        TERMS=terms, num_warps=4,
    )  # fmt: skip


_TYPES = {torch.float32: tl.float32, torch.float64: tl.float64}


def _terms(problem: Problem, student_grad: bool, teacher_grad: bool) -> Terms:
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
    the arithmetic is float64, they are compiled in. (The interpreter keeps a float as it is.)"""
    temperature = float(o.temperature) if terms.kd else 1.0
    # One class has probability 1, exactly, only if no rounding of its logit is in the exponent.
    c = math.log2(math.e) / temperature if classes > 1 else 0.0
    numbers = [
        c, temperature, *([float(o.gamma)] if gamma else []),
        float(o.student_ce), float(o.student_kd), float(o.teacher_ce), float(o.teacher_kd),
        float(o.label_smoothing), float(o.label_smoothing) / classes,
    ]  # fmt: skip
    if dtype == torch.float32 or _INTERPRETED:
        return numbers
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


def _launch(problem: Problem, ds: Tensor | None, dt: Tensor | None):
    tensors = [x for x in (problem.student, problem.teacher, ds, dt) if x is not None]
    itemsize = max(x.element_size() for x in tensors)
    aligned = all(
        x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0 for x in tensors
    )
    return triton_launch.choose(problem.student.shape[1], itemsize, aligned)


_fused = ops.Fused("triton", _forward, _backward, state_rows=_STATE)
loss, loss_and_grad = _fused.loss, _fused.loss_and_grad
