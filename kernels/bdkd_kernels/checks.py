"""Check the arguments of the loss.

Each error message is one line: the argument, what is needed, what the call passed, and what to do.
"""

import os
from typing import TypeGuard

import torch
from torch import Tensor

from ._torch_compat import (
    DTENSORS_WORK,
    PLAIN,
    is_dtensor,
    is_fake,
    is_plain,
    values_can_be_read,
)
from .memory import check_dense, check_device, in_memory, is_dense, not_a_tensor
from .options import LossOptions, as_float, shown
from .types import LossInputs, fast_new

_STORAGE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_FLOAT32_MAX = torch.finfo(torch.float32).max


def prepare(
    student: Tensor,  # (..., C)
    teacher: Tensor,  # (..., C)
    target: Tensor | None,  # (...) or (..., C)
    sample_weight: Tensor | None,  # (...)
    options: LossOptions,
    grad_scale: float | Tensor,
) -> LossInputs:
    """Check the tensors of one call and flatten their leading dimensions to rows.

    The rows are views if a view exists. ``options`` are already checked.

    Raises:
        TypeError, ValueError: If an argument is invalid. The message names it.
    """
    shape = check_logits("student_logits", student)
    teacher_shape = check_logits("teacher_logits", teacher)
    if shape != teacher_shape:
        raise _different_shapes(shape, teacher_shape)
    device, leading = student.device, shape[:-1]
    if teacher.device != device:
        check_device("teacher_logits", teacher, device)
    if type(grad_scale) is not float or not abs(grad_scale) <= _FLOAT32_MAX:
        _check_grad_scale(grad_scale, device)

    if target is not None:
        target = _check_target(target, shape, leading, device)
    if sample_weight is not None:
        sample_weight = _check_sample_weight(sample_weight, leading, device)

    plain, dense = is_plain(student, teacher), False
    for x in (target, sample_weight):
        if x is not None and type(x) not in PLAIN:
            plain = False
    if type(grad_scale) is not float and isinstance(grad_scale, Tensor):
        plain = plain and type(grad_scale) in PLAIN
        if plain:
            in_memory("grad_scale", grad_scale)
    if plain:
        # The usual case is fast: each call of a tensor's method takes 0.1 us of a step of 60 us.
        dense = (
            sample_weight is None and is_dense(student) and is_dense(teacher)
            and (target is None or is_dense(target))
        )  # fmt: skip
        if not dense:
            tensors = _in_memory(student, teacher, target, sample_weight)
            student, teacher, target, sample_weight = tensors
    else:
        _check_tensors_of_one_kind(student, teacher, target, sample_weight, grad_scale)

    if sample_weight is not None:
        sample_weight = sample_weight.reshape(-1)
    if len(shape) != 2:
        # Do not pass -1 for the number of rows: it is ambiguous if the leading shape contains a 0.
        rows, classes = leading.numel(), shape[-1]
        student, teacher = student.reshape(rows, classes), teacher.reshape(rows, classes)
        if target is not None:
            target = target.reshape((rows, classes) if target.is_floating_point() else (rows,))
    fields = (student, teacher, target, sample_weight, options, plain, dense)
    return fast_new(LossInputs, fields) if plain else LossInputs(*fields)


def _in_memory(
    student: Tensor, teacher: Tensor, target: Tensor | None, sample_weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    return (
        in_memory("student_logits", student),
        in_memory("teacher_logits", teacher),
        None if target is None else in_memory("target", target),
        None if sample_weight is None else in_memory("sample_weight", sample_weight),
    )


# -- labels ----------------------------------------------------------------------------------------


def check_labels(target: Tensor, classes: int, ignore_index: int) -> None:
    """Raise ``ValueError`` for the first label outside [0, classes) that is not ``ignore_index``.

    Reads the labels on the host. Call it only if :func:`labels_can_be_read`.
    """
    bad = ((target < 0) | (target >= classes)) & (target != ignore_index)
    if bad.any():
        row = int(bad.nonzero()[0])
        raise_bad_label(row, int(target[row]), classes, ignore_index)


def raise_bad_label(row: int, label: int, classes: int, ignore_index: int) -> None:
    raise ValueError(
        f"target[{row}] is {label}: a label must be in [0, {classes}) "
        f"or ignore_index ({ignore_index}), for logits of {classes} classes"
    )


def labels_can_be_read(target: Tensor | None) -> TypeGuard[Tensor]:
    """Whether to check the labels on the host.

    True if they have values (they are neither traced nor batched) and either reading them needs no
    device sync or ``BDKD_CHECK_LABELS=1`` is set.
    """
    if target is None or target.is_floating_point() or torch.compiler.is_compiling():
        return False
    if target.device.type != "cpu" and os.environ.get("BDKD_CHECK_LABELS") != "1":
        return False
    return values_can_be_read(target)


# -- one argument ----------------------------------------------------------------------------------


def check_logits(name: str, logits: object) -> torch.Size:
    """Check the logits of one network, ``(..., C)``, and return their shape.

    The caller uses the returned shape, because reading it again takes a large part of the time of a
    check. :func:`in_memory` checks the layout.
    """
    if not isinstance(logits, Tensor):
        raise not_a_tensor(name, logits)
    if logits.dtype not in _STORAGE:
        remedy = "labels go into target" if logits.dtype in INTEGERS else "convert with .float()"
        raise TypeError(
            f"{name} must be float16, bfloat16, float32 or float64, got {logits.dtype}: {remedy}"
        )
    try:
        shape = logits.shape
    except RuntimeError:  # a nested tensor
        check_dense(name, logits)
        raise
    if len(shape) == 0 or shape[-1] == 0:
        check_dense(name, logits)
        raise ValueError(f"{name} must have shape (..., C) with C >= 1, got {tuple(shape)}")
    return shape


def _different_shapes(shape: torch.Size, teacher_shape: torch.Size) -> ValueError:
    remedy = (
        "give both networks the same samples"
        if shape[-1] == teacher_shape[-1]
        else "both networks must have the same classes, in the same order"
    )
    return ValueError(
        "student_logits and teacher_logits must have one shape, "
        f"got {tuple(shape)} and {tuple(teacher_shape)}: {remedy}"
    )


def _check_target(
    target: object, shape: torch.Size, leading: torch.Size, device: torch.device
) -> Tensor:
    if type(target) is Tensor and target.dtype == torch.int64:
        try:
            if target.shape == leading and target.device == device:
                return target  # the usual case; in_memory checks the layout
        except RuntimeError:  # a nested tensor has no shape
            pass
    check_dense("target", target, "a tensor or None")
    assert isinstance(target, Tensor)
    if target.dtype in _STORAGE:
        if target.shape != shape:
            raise ValueError(
                "a floating-point target holds soft labels, and must have the logits' shape "
                f"{tuple(shape)}, got {tuple(target.shape)}: convert integer labels with "
                "target.long()"
            )
        target = target.detach()
    elif target.dtype in INTEGERS:
        if target.shape != leading:
            raise ValueError(
                f"target must have shape {tuple(leading)}, one label per sample, "
                f"got {tuple(target.shape)}{_label_remedy(target.shape, shape, leading)}"
            )
        if is_plain(target, target):
            in_memory("target", target)  # checks the memory before target.to reads it
        target = target.to(torch.int64)
    else:
        raise TypeError(
            f"target must hold integer labels or floating-point soft labels, got {target.dtype}: "
            "convert with .long() or .float()"
        )
    check_device("target", target, device)
    return target


def _label_remedy(came: torch.Size, shape: torch.Size, leading: torch.Size) -> str:
    """Return the conversion for labels of another common shape."""
    if came == shape:
        return ": convert one-hot labels to soft labels with target.float()"
    if came == (*leading, 1):
        return ": pass target.squeeze(-1)"
    return ""


def _check_sample_weight(
    sample_weight: object, leading: torch.Size, device: torch.device
) -> Tensor:
    check_dense("sample_weight", sample_weight)
    assert isinstance(sample_weight, Tensor)
    if sample_weight.dtype not in _STORAGE:
        raise TypeError(
            "sample_weight must be float16, bfloat16, float32 or float64, "
            f"got {sample_weight.dtype}: convert with sample_weight.float()"
        )
    if sample_weight.shape != leading:
        raise ValueError(
            f"sample_weight must have shape {tuple(leading)}, one weight per sample, "
            f"got {tuple(sample_weight.shape)}"
        )
    check_device("sample_weight", sample_weight, device)
    return sample_weight.detach()


def _check_grad_scale(grad_scale: object, device: torch.device) -> None:
    if isinstance(grad_scale, Tensor):
        check_dense("grad_scale", grad_scale)
        if grad_scale.ndim != 0 or grad_scale.dtype not in _STORAGE:
            raise ValueError(
                "grad_scale must be a number or a floating-point 0-dim tensor, "
                f"got {tuple(grad_scale.shape)} {grad_scale.dtype}"
            )
        check_device("grad_scale", grad_scale, device)
        return
    needed = "a finite number in float32's range, or a 0-dim tensor"
    number = as_float("grad_scale", grad_scale, needed)
    if not abs(number) <= _FLOAT32_MAX:  # math.isfinite breaks the graph of a dynamic float
        raise ValueError(f"grad_scale must be {needed}, got {shown(grad_scale)}")


def _check_tensors_of_one_kind(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    sample_weight: Tensor | None,
    grad_scale: float | Tensor,
) -> None:
    """Check the tensors of a call that is not plain (see :class:`LossInputs`)."""
    tensors = {
        "student_logits": student, "teacher_logits": teacher, "target": target,
        "sample_weight": sample_weight, "grad_scale": grad_scale,
    }  # fmt: skip
    given = {name: x for name, x in tensors.items() if isinstance(x, Tensor)}
    for name, x in given.items():
        check_dense(name, x)
    if not torch.compiler.is_compiling():
        check_one_kind(given)


def check_one_kind(tensors: dict[str, Tensor]) -> None:
    """Raise ``TypeError`` unless all or none are DTensors, and all or none are FakeTensors."""
    for kind, is_kind in (("DTensor", is_dtensor), ("FakeTensor", is_fake)):
        are = {name: is_kind(x) for name, x in tensors.items()}
        if any(are.values()) and not all(are.values()):
            (one, *_), (other, *_) = ([n for n in are if are[n]], [n for n in are if not are[n]])
            raise TypeError(
                f"{one} is a {kind} and {other} is not, got {type(tensors[other]).__name__}: "
                f"pass either all tensors as {kind}s or none"
            )
        if kind == "DTensor" and all(are.values()) and not DTENSORS_WORK:
            raise RuntimeError(
                "the tensors are DTensors, which need torch 2.10 or newer, got torch "
                f"{torch.__version__}: pass .to_local() of each tensor, or upgrade torch"
            )
