"""Argument checks of the loss. Each failure is one line that names the argument, what came, what is
needed and what to do."""

import math
import os
from collections.abc import Sequence
from typing import TypeGuard

import torch
from torch import Tensor

from ._torch_compat import (
    DTENSORS_WORK,
    PLAIN,
    is_dtensor,
    is_fake,
    is_plain,
    is_zero_tensor,
    values_can_be_read,
)
from .types import LossInputs, LossOptions, as_float, shown

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

    Flattening returns views wherever a view exists. The options are checked elsewhere.

    Raises:
        TypeError, ValueError: an argument that does not fit, by name.
    """
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
        check_dense("sample_weight", sample_weight)
        if sample_weight.dtype not in _STORAGE:
            raise TypeError(
                "sample_weight must be float16, bfloat16, float32 or float64, "
                f"got {sample_weight.dtype}: convert it with sample_weight.float()"
            )
        if sample_weight.shape != leading:
            raise ValueError(
                f"sample_weight must have shape {tuple(leading)}, one weight a sample, "
                f"got {tuple(sample_weight.shape)}"
            )
        _same_device("sample_weight", sample_weight, device)
        sample_weight = sample_weight.detach()

    plain = is_plain(student, teacher)
    if target is not None and type(target) not in PLAIN:
        plain = False
    if sample_weight is not None and type(sample_weight) not in PLAIN:
        plain = False
    if type(grad_scale) is not float and isinstance(grad_scale, Tensor):
        plain = plain and type(grad_scale) in PLAIN
        if plain:
            in_memory("grad_scale", grad_scale)
    dense = False
    if plain:
        # Nearly every call: one question of a tensor takes 0.1 us of a step that takes 60.
        dense = (
            sample_weight is None and _is_dense(student) and _is_dense(teacher)
            and (target is None or _is_dense(target))
        )  # fmt: skip
        if not dense:
            student = in_memory("student_logits", student)
            teacher = in_memory("teacher_logits", teacher)
            if target is not None:
                target = in_memory("target", target)
            if sample_weight is not None:
                sample_weight = in_memory("sample_weight", sample_weight)
    else:
        tensors = {
            "student_logits": student, "teacher_logits": teacher, "target": target,
            "sample_weight": sample_weight, "grad_scale": grad_scale,
        }  # fmt: skip
        given = {name: x for name, x in tensors.items() if isinstance(x, Tensor)}
        for name, x in given.items():
            check_dense(name, x)
        if not torch.compiler.is_compiling():
            check_one_kind(given)

    if sample_weight is not None:
        sample_weight = sample_weight.reshape(-1)
    if len(shape) != 2:
        rows = leading.numel()  # not -1: that is ambiguous where the leading shape holds a 0
        student, teacher = student.reshape(rows, classes), teacher.reshape(rows, classes)
        if target is not None:
            target = target.reshape((rows, classes) if target.is_floating_point() else (rows,))
    return LossInputs(student, teacher, target, sample_weight, options, plain, dense)


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
    """Whether labels can be checked without a device sync, or were asked to be, and are values
    rather than something that is traced or batched."""
    if target is None or target.is_floating_point() or not values_can_be_read(target):
        return False
    return target.device.type == "cpu" or os.environ.get("BDKD_CHECK_LABELS") == "1"


# -- memory ----------------------------------------------------------------------------------------


def _is_dense(tensor: Tensor) -> bool:
    """Whether a tensor is contiguous, fills its storage and has its values there."""
    try:
        storage = tensor.untyped_storage()
        return (
            storage.nbytes() == tensor.nbytes
            and tensor.is_contiguous()
            and storage.data_ptr() == tensor.data_ptr()
            and not tensor.is_neg()
        )
    except (RuntimeError, NotImplementedError):  # sparse tensors have no storage, zero tensors no
        return False  # pointer: in_memory says so, or makes it right


def in_memory(name: str, tensor: Tensor) -> Tensor:
    """The tensor itself, or a dense copy of one whose values are not what its memory holds.

    Kernels read raw pointers. A negative-bit view (``x.conj().imag``) and a zero tensor are
    materialised here, with their gradients.

    Raises:
        ValueError: the storage was freed or is too small, as after ``untyped_storage().resize_``.
    """
    try:
        size = tensor.untyped_storage().nbytes()
    except (RuntimeError, NotImplementedError):  # sparse and the like have none
        check_dense(name, tensor)
        raise
    whole = size == tensor.nbytes and not tensor.storage_offset()  # as most tensors
    if not whole and size < _bytes_needed(tensor):
        raise ValueError(
            f"{name} must have its values in memory, got {tuple(tensor.shape)} {tensor.dtype} over "
            f"a storage of {size} bytes: its storage was freed or resized"
        )
    if tensor.is_neg():
        return tensor.resolve_neg()
    if size and not tensor.data_ptr() and tensor.numel() and not tensor.is_meta:
        if is_zero_tensor(tensor):
            return tensor.clone()  # allocates the zeros
        raise ValueError(f"{name} must have its values in memory, got a tensor without any")
    return tensor


def _bytes_needed(tensor: Tensor) -> int:
    """From the storage's begin to the end of the last element."""
    if tensor.numel() == 0:
        return 0
    if tensor.is_contiguous():
        return int(tensor.storage_offset()) * tensor.itemsize + tensor.nbytes
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return (int(tensor.storage_offset()) + last + 1) * tensor.itemsize


def check_gradient_buffers(
    grads: object,
    student: Tensor,  # (..., C)
    teacher: Tensor,  # (..., C)
    target: Tensor | None,
    sample_weight: Tensor | None,
    grad_scale: float | Tensor,
    plain: bool,
) -> None:
    """Check the tensors that :func:`bdkd_loss_and_grad` writes into.

    A buffer may be its own network's logits. Any other memory shared with an input, with the other
    buffer or within itself would be read after it was overwritten, and is refused. Memory is looked
    at only in a ``plain`` call (:class:`LossInputs`); in any other, torch copies into the buffers.

    Raises:
        TypeError, ValueError: a buffer that does not fit, by name.
    """
    if not isinstance(grads, tuple | list) or len(grads) != 2:
        raise TypeError(f"grads must be a pair (ds, dt), each a tensor or None, got {_kind(grads)}")
    inputs = (student, teacher, target, sample_weight, grad_scale)
    if plain and _are_whole_and_apart(grads, inputs):
        return
    for i, logits in enumerate((student, teacher)):
        if grads[i] is not None:
            _check_gradient_buffer(f"grads[{i}]", grads[i], logits, plain)
    if not plain:
        return
    names = ("student_logits", "teacher_logits", "target", "sample_weight", "grad_scale")
    # What is read while the gradients are written, then the other buffer too.
    taken = {name: _Extent(x) for name, x in zip(names, inputs, strict=True)
             if isinstance(x, Tensor)}  # fmt: skip
    for i, buffer in enumerate(grads):
        if buffer is None:
            continue
        name, extent = f"grads[{i}]", _Extent(buffer)
        for other, theirs in taken.items():
            own = other == names[i] and extent == theirs
            if extent.meets(theirs) and not own:
                raise ValueError(
                    f"{name} must not overlap the memory of {other}, which is in use while {name} "
                    "is written: make it with torch.empty_like(logits)"
                )
        taken[name] = extent


def _are_whole_and_apart(grads: Sequence[object], inputs: tuple[object, ...]) -> bool:
    """A fast yes for buffers that fit and fill memory of their own. False: look closer."""
    spans = []
    for x, logits in zip(grads, inputs, strict=False):  # the first two are the logits
        if x is None:
            continue
        if type(x) is not Tensor or x.is_nested or not _is_dense(x):
            return False
        if x.dtype != logits.dtype:  # type: ignore[attr-defined]
            return False
        if x.shape != logits.shape or x.device != logits.device:  # type: ignore[attr-defined]
            return False
        begin = x.data_ptr()
        spans.append((begin, begin + x.nbytes))
    for x in inputs:
        if x is None or type(x) is float:
            continue
        if type(x) not in PLAIN or not x.is_contiguous():  # type: ignore[attr-defined]
            return False
        begin = x.data_ptr()  # type: ignore[attr-defined]
        spans.append((begin, begin + x.nbytes))  # type: ignore[attr-defined]
    spans.sort()
    end = 0
    for span in spans:
        if span[0] < end:
            return False
        end = span[1]
    return True


class _Extent:
    """Which bytes a tensor's elements lie in."""

    __slots__ = ("begin", "end", "shape", "strides", "width")

    def __init__(self, tensor: Tensor) -> None:
        itemsize = tensor.itemsize
        self.begin = tensor.data_ptr()
        self.shape, self.strides, self.width = tensor.shape, tensor.stride(), itemsize
        if tensor.is_contiguous():
            self.end = self.begin + tensor.nbytes
        elif tensor.numel() == 0:
            self.end = self.begin
        else:
            steps = zip(tensor.shape, tensor.stride(), strict=True)
            self.end = self.begin + (sum((n - 1) * step for n, step in steps) + 1) * itemsize

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Extent) and (
            (self.begin, self.shape, self.strides, self.width)
            == (other.begin, other.shape, other.strides, other.width)
        )

    __hash__ = None  # type: ignore[assignment]

    def meets(self, other: "_Extent") -> bool:
        """Whether an element may be shared.

        False for tensors whose columns or rows alternate in one piece of memory; True where only a
        search could tell.
        """
        if self.begin >= other.end or other.begin >= self.end:
            return False
        # Every element of either lies at a multiple of this from its first one.
        step = math.gcd(*(x * self.width for x in self.strides),
                        *(x * other.width for x in other.strides))  # fmt: skip
        if _apart((other.begin - self.begin) % (step or 1), self.width, other.width, step):
            return False
        row, other_row = self._rows(), other._rows()
        if row is None or other_row is None or row[0] != other_row[0]:
            return True
        return not _apart((other.begin - self.begin) % row[0], row[1], other_row[1], row[0])

    def _rows(self) -> tuple[int, int] | None:
        """Bytes from row to row, and of a row, of a tensor ``(N, C)`` with unit stride in C."""
        if len(self.shape) != 2 or self.strides[1] != 1 or self.shape[1] > self.strides[0]:
            return None
        return self.strides[0] * self.width, self.shape[1] * self.width


def _apart(offset: int, width: int, other_width: int, step: int) -> bool:
    """Whether pieces of ``width`` bytes every ``step`` miss those of another that begin at
    ``offset`` of them."""
    return width <= offset and offset + other_width <= step


def _overlaps_itself(tensor: Tensor) -> bool:
    """Whether two indices may reach one element: sorted by stride, each dimension must step past
    all that the smaller ones cover."""
    if tensor.is_contiguous():
        return False
    covered = 0  # elements past the first that the dimensions so far reach
    dimensions = zip(tensor.stride(), tensor.shape, strict=True)
    for stride, size in sorted(x for x in dimensions if x[1] > 1):
        if stride <= covered:
            return True
        covered += (size - 1) * stride
    return False


def _check_gradient_buffer(name: str, buffer: object, logits: Tensor, plain: bool) -> None:
    if not isinstance(buffer, Tensor):
        raise _no_tensor(name, buffer)
    if plain and type(buffer) not in PLAIN:
        raise TypeError(
            f"{name} must be an ordinary tensor as the logits are, got "
            f"{type(buffer).__name__}: make it with torch.empty_like(logits)"
        )
    if buffer.is_nested or buffer.shape != logits.shape or buffer.dtype != logits.dtype:
        check_dense(name, buffer)
        raise ValueError(
            f"{name} must have its logits' shape and dtype, {tuple(logits.shape)} {logits.dtype}, "
            f"got {tuple(buffer.shape)} {buffer.dtype}: make it with torch.empty_like(logits)"
        )
    _same_device(name, buffer, logits.device)
    if plain and in_memory(name, buffer) is not buffer:
        raise ValueError(
            f"{name} must be ordinary memory, got a negative-bit view or a zero tensor: make it "
            "with torch.empty_like(logits)"
        )
    if not plain:
        check_dense(name, buffer)
    if not torch.compiler.is_compiling() and _overlaps_itself(buffer):
        raise ValueError(
            f"{name} must hold each element once, got shape {tuple(buffer.shape)} with strides "
            f"{buffer.stride()}: an expanded or overlapping tensor cannot be written to, "
            "make it .contiguous()"
        )


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


# -- one argument ----------------------------------------------------------------------------------


def _kind(value: object) -> str:
    kind = type(value).__name__
    return f"a {kind} of {len(value)}" if isinstance(value, tuple | list) else kind


def _no_tensor(name: str, value: object, needed: str = "a tensor") -> TypeError:
    remedy = ""
    if hasattr(value, "logits"):  # what a Hugging Face model returns
        remedy = ": give its .logits"
    elif hasattr(value, "__array__") or isinstance(value, tuple | list):
        remedy = f": torch.as_tensor({name}) makes one"
    return TypeError(f"{name} must be {needed}, got {type(value).__name__}{remedy}")


def check_dense(name: str, value: object, needed: str = "a tensor") -> None:
    """Raise ``TypeError`` unless the value is a tensor with elements at strides."""
    if not isinstance(value, Tensor):
        raise _no_tensor(name, value, needed)
    if value.is_nested:
        raise TypeError(
            f"{name} must be a dense tensor, got a nested tensor: pad it with "
            f"torch.nested.to_padded_tensor, or call the loss on {name}.values()"
        )
    if value.layout != torch.strided:
        raise TypeError(
            f"{name} must be a dense tensor, got {value.layout}: convert with .to_dense()"
        )


def check_logits(name: str, logits: object) -> torch.Size:
    """Check one network's logits, ``(..., C)``, and return their shape: asking a tensor for it
    again takes a good part of a check's time. The layout is checked by :func:`in_memory`."""
    if not isinstance(logits, Tensor):
        raise _no_tensor(name, logits)
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


def _check_target(
    target: object, shape: torch.Size, leading: torch.Size, device: torch.device
) -> Tensor:
    if type(target) is Tensor and target.dtype == torch.int64 and not target.is_nested:  # noqa: SIM102
        if target.shape == leading and target.device == device:
            return target  # as nearly always; in_memory checks its layout
    check_dense("target", target, "a tensor or None")
    assert isinstance(target, Tensor)
    if target.dtype in _STORAGE:
        if target.shape != shape:
            raise ValueError(
                f"a floating target holds soft labels of the logits' shape {tuple(shape)}, "
                f"got {tuple(target.shape)}; labels need an integer type, target.long()"
            )
        target = target.detach()
    elif target.dtype in INTEGERS:
        if target.shape != leading:
            raise ValueError(
                f"target must have shape {tuple(leading)}, one label a sample, "
                f"got {tuple(target.shape)}{_other_labels(target.shape, shape, leading)}"
            )
        if is_plain(target, target):
            in_memory("target", target)  # before it is read
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
    if type(grad_scale) is float and abs(grad_scale) <= _FLOAT32_MAX:
        return  # as nearly always
    if isinstance(grad_scale, Tensor):
        check_dense("grad_scale", grad_scale)
        if grad_scale.ndim != 0 or grad_scale.dtype not in _STORAGE:
            raise ValueError(
                "grad_scale must be a number or a floating 0-dim tensor, "
                f"got {tuple(grad_scale.shape)} {grad_scale.dtype}"
            )
        _same_device("grad_scale", grad_scale, device)
        return
    needed = "a finite number of float32's range, or a 0-dim tensor"
    number = as_float("grad_scale", grad_scale, needed)
    if not abs(number) <= _FLOAT32_MAX:  # math.isfinite breaks the graph of a dynamic float
        raise ValueError(f"grad_scale must be {needed}, got {shown(grad_scale)}")


def check_one_kind(tensors: dict[str, Tensor]) -> None:
    """Either all of a call's tensors are DTensors (or FakeTensors), or none is."""
    for kind, is_kind in (("DTensor", is_dtensor), ("FakeTensor", is_fake)):
        are = {name: is_kind(x) for name, x in tensors.items()}
        if any(are.values()) and not all(are.values()):
            (one, *_), (other, *_) = ([n for n in are if are[n]], [n for n in are if not are[n]])
            raise TypeError(
                f"{one} is a {kind} and {other} is not, got {type(tensors[other]).__name__}: "
                "give all tensors of one kind"
            )
        if kind == "DTensor" and all(are.values()) and not DTENSORS_WORK:
            raise RuntimeError(
                "the tensors are DTensors, which need torch 2.10 or newer, got torch "
                f"{torch.__version__}: give their to_local(), or upgrade torch"
            )


def _same_device(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(
            f"{name} must be on the student logits' device {device}, got {tensor.device}: "
            f"move it with {name}.to({str(device)!r})"
        )
