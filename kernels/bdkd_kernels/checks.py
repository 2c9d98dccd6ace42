"""Argument checks of the loss: each failure is one line that names the argument, what came and what
is needed."""

import math
import os
from numbers import Real
from typing import TypeGuard

import torch
from torch import Tensor

from .types import LossOptions, Problem

_STORAGE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def prepare(
    student: Tensor,  # (..., C)
    teacher: Tensor,  # (..., C)
    target: Tensor | None,  # (...) or (..., C)
    sample_weight: Tensor | None,  # (...)
    options: LossOptions,
    grad_scale: float | Tensor,
) -> Problem:
    """Check one call, but for its options, and flatten its leading dimensions to rows (a view
    wherever one exists)."""
    shape = check_logits("student_logits", student)
    teacher_shape = check_logits("teacher_logits", teacher)
    if shape != teacher_shape:
        raise ValueError(
            "student_logits and teacher_logits must have one shape, "
            f"got {tuple(shape)} and {tuple(teacher_shape)}: "
            + (
                "both networks see the same samples"
                if shape[-1] == teacher_shape[-1]
                else "both networks tell the same classes apart, in the same order"
            )
        )
    device = student.device
    _same_device("teacher_logits", teacher, device)
    _check_grad_scale(grad_scale, device)

    leading, classes = shape[:-1], shape[-1]
    if target is not None:
        target = _check_target(target, shape, leading, device)
    if sample_weight is not None:
        _check_tensor("sample_weight", sample_weight)
        if not sample_weight.is_floating_point():
            raise TypeError(
                f"sample_weight must be floating, got {sample_weight.dtype}: "
                "convert it with sample_weight.float()"
            )
        if sample_weight.shape != leading:
            raise ValueError(
                f"sample_weight must have shape {tuple(leading)}, one weight a sample, "
                f"got {tuple(sample_weight.shape)}"
            )
        _same_device("sample_weight", sample_weight, device)
        sample_weight = sample_weight.detach().reshape(-1)
    if len(shape) != 2:
        rows = leading.numel()  # not -1: that is ambiguous where the leading shape holds a 0
        student, teacher = student.reshape(rows, classes), teacher.reshape(rows, classes)
        if target is not None:
            target = target.reshape((rows, classes) if target.is_floating_point() else (rows,))
    return Problem(student, teacher, target, sample_weight, options)


def check_labels(target: Tensor, classes: int, ignore_index: int) -> None:
    """Raise ``ValueError`` for the first label outside [0, classes) that is not ``ignore_index``.

    Reads the labels on the host: for the CPU, or where ``BDKD_CHECK_LABELS=1`` asks for it.
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
    """Whether a look at the labels is free of a device sync (or asked for) and not being traced or
    vmapped."""
    if target is None or target.is_floating_point() or torch.compiler.is_compiling():
        return False
    inner = target
    while torch._C._functorch.is_functorch_wrapped_tensor(inner):
        if torch._C._functorch.is_batchedtensor(inner):
            return False
        inner = torch._C._functorch.get_unwrapped(inner)
    return target.device.type == "cpu" or os.environ.get("BDKD_CHECK_LABELS") == "1"


def check_gradient_buffers(grads: object, student: Tensor, teacher: Tensor) -> None:
    if not isinstance(grads, tuple | list) or len(grads) != 2:
        raise TypeError(f"grads must be a pair (ds, dt), each a tensor or None, got {_kind(grads)}")
    _check_gradient_buffer("grads[0]", grads[0], student)
    _check_gradient_buffer("grads[1]", grads[1], teacher)
    if grads[0] is not None and grads[0] is grads[1]:
        raise ValueError(
            "grads must be two tensors, got the same one twice: each network needs its own"
        )


def _kind(value: object) -> str:
    kind = type(value).__name__
    return f"a {kind} of {len(value)}" if isinstance(value, tuple | list) else kind


def _check_gradient_buffer(name: str, buffer: Tensor | None, logits: Tensor) -> None:
    if buffer is None:
        return
    _check_tensor(name, buffer)
    if buffer.shape != logits.shape or buffer.dtype != logits.dtype:
        raise ValueError(
            f"{name} must have its logits' shape and dtype, {tuple(logits.shape)} {logits.dtype}, "
            f"got {tuple(buffer.shape)} {buffer.dtype}: make it with torch.empty_like(logits)"
        )
    if any(
        stride == 0 and size > 1 for size, stride in zip(buffer.shape, buffer.stride(), strict=True)
    ):
        raise ValueError(
            f"{name} must hold each element once, got shape {tuple(buffer.shape)} with strides "
            f"{buffer.stride()}: an expanded tensor cannot be written to, make it .contiguous()"
        )
    _same_device(name, buffer, logits.device)


def as_rows(name: str, buffer: Tensor | None) -> Tensor | None:
    """The buffer as ``(N, C)``, the same memory."""
    if buffer is None or buffer.ndim == 2:
        return buffer
    try:
        return buffer.view(buffer.shape[:-1].numel(), buffer.shape[-1])
    except RuntimeError:
        raise ValueError(
            f"{name} must flatten to rows without a copy, got shape {tuple(buffer.shape)} with "
            f"strides {buffer.stride()}"
        ) from None


def _check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise _no_tensor(name, value)


def _no_tensor(name: str, value: object, needed: str = "a tensor") -> TypeError:
    remedy = ""
    if hasattr(value, "logits"):  # what a Hugging Face model returns
        remedy = ": give its .logits"
    elif hasattr(value, "__array__") or isinstance(value, tuple | list):
        remedy = f": torch.as_tensor({name}) makes one"
    return TypeError(f"{name} must be {needed}, got {type(value).__name__}{remedy}")


def check_logits(name: str, logits: object) -> torch.Size:
    """Their shape: to ask a tensor for it again takes a good part of a check's time."""
    if not isinstance(logits, Tensor):
        raise _no_tensor(name, logits)
    if logits.dtype not in _STORAGE:
        remedy = "labels go into target" if logits.dtype in _INTEGERS else "convert with .float()"
        raise TypeError(
            f"{name} must be float16, bfloat16, float32 or float64, got {logits.dtype}: {remedy}"
        )
    if logits.layout != torch.strided:
        raise TypeError(
            f"{name} must be a dense tensor, got {logits.layout}: convert with .to_dense()"
        )
    shape = logits.shape
    if len(shape) == 0 or shape[-1] == 0:
        raise ValueError(f"{name} must have shape (..., C) with C >= 1, got {tuple(shape)}")
    return shape


def _check_target(
    target: object, shape: torch.Size, leading: torch.Size, device: torch.device
) -> Tensor:
    if not isinstance(target, Tensor):
        raise _no_tensor("target", target, "a tensor or None")
    if target.dtype == torch.int64 and target.shape == leading and target.device == device:
        return target  # as nearly always
    if target.dtype in _STORAGE:
        if target.shape != shape:
            raise ValueError(
                f"a floating target holds soft labels of the logits' shape {tuple(shape)}, "
                f"got {tuple(target.shape)}; labels need an integer type, target.long()"
            )
        target = target.detach()
    elif target.dtype in _INTEGERS:
        if target.shape != leading:
            raise ValueError(
                f"target must have shape {tuple(leading)}, one label a sample, "
                f"got {tuple(target.shape)}{_other_labels(target.shape, shape, leading)}"
            )
        target = target.to(torch.int64)
    else:
        raise TypeError(
            f"target must hold integer labels or floating soft labels, got {target.dtype}: "
            "convert with .long() or .float()"
        )
    _same_device("target", target, device)
    return target


def _other_labels(came: torch.Size, shape: torch.Size, leading: torch.Size) -> str:
    """What to do with labels in one of the usual other forms."""
    if came == shape:
        return ": one-hot labels need a floating type, target.float()"
    if came == (*leading, 1):
        return ": give target.squeeze(-1)"
    return ""


def _check_grad_scale(grad_scale: object, device: torch.device) -> None:
    if type(grad_scale) is float and abs(grad_scale) < math.inf:
        return  # as nearly always
    if isinstance(grad_scale, Tensor):
        if grad_scale.ndim != 0 or not grad_scale.is_floating_point():
            raise ValueError(
                "grad_scale must be a number or a floating 0-dim tensor, "
                f"got {tuple(grad_scale.shape)} {grad_scale.dtype}"
            )
        _same_device("grad_scale", grad_scale, device)
    elif isinstance(grad_scale, bool) or not isinstance(grad_scale, float | Real):
        raise TypeError(
            f"grad_scale must be a number or a 0-dim tensor, got {type(grad_scale).__name__}"
        )
    elif not abs(float(grad_scale)) < math.inf:  # math.isfinite breaks the graph of a dynamic float
        raise ValueError(f"grad_scale must be finite, got {grad_scale!r}")


def _same_device(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(
            f"{name} must be on the student logits' device {device}, got {tensor.device}: "
            f"move it with {name}.to({str(device)!r})"
        )
