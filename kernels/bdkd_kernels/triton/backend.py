"""The host code of the Triton backend: it plans, allocates and launches.

The forward pass is at most three launches: the mean's denominator (if some rows may not count), the
row kernel, and the sum of the losses. The backward pass is one launch.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .. import ops
from .._torch_compat import current_triton_arch, current_triton_stream
from ..checks import check_labels as raise_for_bad_labels
from ..checks import labels_can_be_read
from ..reference import compute_dtype
from ..types import Availability, LossInputs, Outputs, Pair
from . import arguments, launch_table
from .gradient_kernel import gradient_kernel
from .launcher import Launcher
from .loop_kernel import loop_kernel
from .small_kernels import denominator_kernel, sum_kernel
from .spec import NUM_FIELDS, NUM_STATISTICS, RECORD, Spec
from .tile_kernel import tile_kernel

_RECORD, _FIELDS, _STATISTICS = RECORD.value, NUM_FIELDS.value, NUM_STATISTICS.value
_ROWS_A_PARTIAL = 2**14  # rows per partial sum of the mean's denominator; one program adds them up


def availability() -> Availability:
    """Return whether this machine can run the kernels, and the reason if it cannot."""
    version = triton.__version__
    if arguments.PLATFORM.interpreted:
        return Availability(True, f"triton {version}, interpreted on the CPU")
    if not torch.cuda.is_available():
        return Availability(False, "no CUDA or ROCm device is visible to torch")
    name = torch.cuda.get_device_name()
    if torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
        major, minor = torch.cuda.get_device_capability()
        return Availability(False, f"{name} is sm_{major}{minor}: sm_80 or newer is needed")
    return Availability(True, f"triton {version}, {name}")


class _Plan(NamedTuple):
    """Launchers and arguments that are shared by all calls with one key.

    The key contains everything that a launch depends on, except the number of rows.
    """

    denominator: Launcher
    rows: Launcher
    sum: Launcher
    rows_a_program: int
    dtype: torch.dtype
    spec: Spec
    numbers: tuple  # of the row kernel, C to options
    shape: tuple  # of the row kernel, its constexprs
    denominator_shape: tuple  # LABELS to OVERLAPPED
    sum_shape: tuple  # NUM_PARTIALS to OVERLAPPED


class _BackwardPlan(NamedTuple):
    gradient: Launcher
    dtype: torch.dtype
    spec: Spec
    numbers: tuple  # C to BLOCK


_plans: dict[tuple, _Plan] = {}
_backward_plans: dict[tuple, _BackwardPlan] = {}
_NO_LOSSES = (None, None)


def _is_on_other_device(device: torch.device) -> bool:
    """Whether the device differs from the current device, on which Triton launches."""
    return device.index is not None and device.index != torch.cuda.current_device()


def _stream(device: torch.device) -> int:
    return 0 if arguments.PLATFORM.interpreted else current_triton_stream(device.index)


def _count_partials(inputs: LossInputs) -> int:
    """Return the number of partial sums of the mean's denominator. If 0, all rows count."""
    target = inputs.target
    has_labels = target is not None and target.ndim == 1
    if inputs.options.reduction != "mean" or not (has_labels or inputs.sample_weight is not None):
        return 0
    return min(256, launch_table.block_of(-(-inputs.student.shape[0] // _ROWS_A_PARTIAL)))


def _plan(
    inputs: LossInputs,
    gradients: Pair[Tensor | None],
    partials: int,
    scale_is_tensor: bool,
) -> _Plan:
    o, (student, teacher) = inputs.options, inputs[:2]
    classes, dtype = student.shape[1], compute_dtype(student, teacher)
    nvidia = arguments.PLATFORM.nvidia
    early = nvidia and current_triton_arch() >= 90
    strides = tuple(map(arguments.row_stride, (student, teacher, *gradients)))
    spec = arguments.spec_of(
        inputs, gradients, dtype, overlapped=early, num_partials=partials,
        scale_is_tensor=scale_is_tensor or dtype == torch.float64,
        row_alignment=arguments.alignment(*strides), class_alignment=arguments.alignment(classes),
    )  # fmt: skip
    launch = arguments.launch_of(inputs, gradients)
    registers = launch.registers if nvidia else 0
    shape: tuple
    if isinstance(launch, launch_table.Tile):
        kernel, rows = tile_kernel, launch.rows
        shape = (classes != launch.block, launch, spec)
    else:
        kernel, rows = loop_kernel, 1
        shape = (launch.of_row(classes), spec)
    return _Plan(
        denominator=Launcher(denominator_kernel, 16),
        rows=Launcher(kernel, launch.warps, early and partials > 0, registers),
        sum=Launcher(sum_kernel, 16, early),
        rows_a_program=rows,
        dtype=dtype,
        spec=spec,
        numbers=(classes, *strides, arguments.numbers_of(o, spec, classes, dtype)),
        shape=shape,
        denominator_shape=(spec.target == "labels", min(4096, _ROWS_A_PARTIAL), early),
        sum_shape=(partials, 4096, early),
    )


def _forward(
    inputs: LossInputs,
    grad_scale: float | Tensor,
    gradients: Pair[Tensor | None],
    check_labels: bool,
) -> Outputs:
    student, teacher, target, weight, o, *_ = inputs
    if check_labels and labels_can_be_read(target):
        raise_for_bad_labels(target, student.shape[1], o.ignore_index)
    rows, device = student.shape[0], student.device
    if _is_on_other_device(device):
        with torch.cuda.device(device):
            return _forward(inputs, grad_scale, gradients, False)
    partials = _count_partials(inputs)
    tensors = (student, teacher, target, weight, *gradients)
    addresses, kinds = arguments.described(tensors)
    key = (o, device.index, student.shape[1], arguments.kind_of_count(rows), partials,
           arguments.kind_of_scale(grad_scale), *kinds)  # fmt: skip
    plan = _plans.get(key)
    if plan is None:
        plan = _plans[key] = _plan(inputs, gradients, partials, isinstance(grad_scale, Tensor))
    dtype, per_row = plan.dtype, o.reduction == "none"
    programs = -(-rows // plan.rows_a_program)

    # One allocation for all values that a launch passes to the next one: see row_io.partial_sums.
    records = torch.empty(rows * _RECORD + partials + 2 * programs, dtype=dtype, device=device)
    shape = (rows,) if per_row else ()
    losses = (torch.empty(shape, dtype=dtype, device=device),
              torch.empty(shape, dtype=dtype, device=device))  # fmt: skip
    scale = arguments.exact_scale(grad_scale, dtype, device)
    at, losses_at = records.data_ptr(), tuple(x.data_ptr() for x in losses)
    stream = _stream(device)
    if partials:
        plan.denominator(partials, stream, (target, weight, records), (*addresses[2:4], at),
                         (rows, o.ignore_index, *plan.denominator_shape))  # fmt: skip
    row_losses, row_losses_at = (losses, losses_at) if per_row else (_NO_LOSSES, _NO_LOSSES)
    plan.rows(programs, stream, (*tensors, *row_losses, records), (*addresses, *row_losses_at, at),
              (scale, rows, *plan.numbers, *plan.shape))  # fmt: skip
    if not per_row:
        plan.sum(1, stream, (*losses, records), (*losses_at, at),
                 (rows, programs, *plan.sum_shape))  # fmt: skip
    return Outputs(
        Pair(*losses),
        records.as_strided((_STATISTICS, rows), (1, _RECORD)),
        records.as_strided((_FIELDS, rows), (1, _RECORD)),
    )


def _backward(
    inputs: LossInputs,
    state: Tensor | None,
    upstreams: Pair[Tensor | None],
    gradients: Pair[Tensor | None],
    assumed: float | Tensor | None,
) -> None:
    student, teacher, target, _, o, *_ = inputs
    assert state is not None  # it comes from _forward
    rows, device = student.shape[0], student.device
    if _is_on_other_device(device):
        with torch.cuda.device(device):
            _backward(inputs, state, upstreams, gradients, assumed)
        return
    tensors = (student, teacher, target, state, *upstreams, *gradients)
    addresses, kinds = arguments.described(tensors)
    key = (o, device.index, student.shape[1], arguments.kind_of_count(rows),
           arguments.kind_of_scale(assumed), *kinds)  # fmt: skip
    plan = _backward_plans.get(key)
    if plan is None:
        plan = _backward_plans[key] = _backward_plan(inputs, state, upstreams, gradients)
    if assumed is not None:
        assumed = arguments.exact_scale(assumed, plan.dtype, device)
    kind = "none" if assumed is None else "tensor" if isinstance(assumed, Tensor) else "number"
    plan.gradient(min(rows, 1024), _stream(device), tensors, addresses,
                  (assumed, rows, *plan.numbers, kind, plan.spec))  # fmt: skip


def _backward_plan(
    inputs: LossInputs,
    state: Tensor,
    upstreams: Pair[Tensor | None],
    gradients: Pair[Tensor | None],
) -> _BackwardPlan:
    o, (student, teacher) = inputs.options, inputs[:2]
    classes, dtype = student.shape[1], compute_dtype(student, teacher)
    spec = arguments.spec_of(inputs, gradients, dtype)
    numbers = (
        classes, *map(arguments.row_stride, (student, teacher, *gradients)),
        state.stride(1), state.stride(0), *map(arguments.row_stride, upstreams),
        arguments.numbers_of(o, spec, classes, dtype), min(2048, launch_table.block_of(classes)),
    )  # fmt: skip
    return _BackwardPlan(Launcher(gradient_kernel, 4), dtype, spec, numbers)


_fused = ops.FusedBackend("triton", _forward, _backward, state_rows=_FIELDS)
loss, loss_and_grad = _fused.loss, _fused.loss_and_grad
