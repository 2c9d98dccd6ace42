"""Check the memory of tensors.

Kernels read and write raw pointers. So they need dense tensors whose values are in memory, and
gradient buffers that share no memory with other arguments.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ._torch_compat import PLAIN, is_zero_tensor
from .types import Pair

_REMEDY = "make it with torch.empty_like(logits)"


def is_dense(tensor: Tensor) -> bool:
    """Whether a tensor is contiguous and its storage holds exactly its values."""
    try:
        storage = tensor.untyped_storage()
        return (
            storage.nbytes() == tensor.nbytes
            and tensor.is_contiguous()
            and storage.data_ptr() == tensor.data_ptr()
            and not tensor.is_neg()
        )
    except (RuntimeError, NotImplementedError):  # no storage (sparse) or no pointer (zero tensor)
        return False  # in_memory converts the tensor or raises


def in_memory(name: str, tensor: Tensor) -> Tensor:
    """Return the tensor, or a dense copy if its values differ from the contents of its memory.

    Copies negative-bit views (``x.conj().imag``) and zero tensors.

    Raises:
        ValueError: If the storage was freed or is too small, as after
            ``untyped_storage().resize_()``.
    """
    try:
        size = tensor.untyped_storage().nbytes()
    except (RuntimeError, NotImplementedError):  # sparse and similar tensors have no storage
        check_dense(name, tensor)
        raise
    whole = size == tensor.nbytes and not tensor.storage_offset()  # the usual case
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
        raise ValueError(f"{name} must have its values in memory, got a tensor without memory")
    return tensor


def _bytes_needed(tensor: Tensor) -> int:
    """Return the number of bytes from the start of the storage to the end of the last element."""
    if tensor.numel() == 0:
        return 0
    if tensor.is_contiguous():
        return int(tensor.storage_offset()) * tensor.itemsize + tensor.nbytes
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return (int(tensor.storage_offset()) + last + 1) * tensor.itemsize


# -- the kind of a tensor --------------------------------------------------------------------------


def check_dense(name: str, value: object, needed: str = "a tensor") -> None:
    """Raise ``TypeError`` unless the value is a strided tensor."""
    if not isinstance(value, Tensor):
        raise not_a_tensor(name, value, needed)
    if value.is_nested:
        raise TypeError(
            f"{name} must be a dense tensor, got a nested tensor: pad it with "
            f"torch.nested.to_padded_tensor, or call the loss on {name}.values()"
        )
    if value.layout != torch.strided:
        raise TypeError(
            f"{name} must be a dense tensor, got {value.layout}: convert with .to_dense()"
        )


def not_a_tensor(name: str, value: object, needed: str = "a tensor") -> TypeError:
    """Return the error for a value that is not a tensor. Its message names the usual conversion."""
    remedy = ""
    if isinstance(value, torch.fx.Proxy):
        remedy = ": trace with torch.export or make_fx instead of symbolic_trace"
    elif hasattr(value, "logits"):  # the output of a Hugging Face model
        remedy = ": pass its .logits"
    elif hasattr(value, "__array__") or isinstance(value, tuple | list):
        remedy = f": convert with torch.as_tensor({name})"
    return TypeError(f"{name} must be {needed}, got {type(value).__name__}{remedy}")


def check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    """Raise ``ValueError`` unless the tensor is on the device of the student's logits."""
    if tensor.device != device:
        raise ValueError(
            f"{name} must be on the student logits' device {device}, got {tensor.device}: "
            f"move it with {name}.to({str(device)!r})"
        )


# -- gradient buffers ------------------------------------------------------------------------------


def as_rows(gradients: Pair[Tensor | None]) -> Pair[Tensor | None]:
    """Return views of shape ``(N, C)`` of gradients ``(..., C)``."""
    return Pair(*(None if x is None else _rows(f"grads[{i}]", x) for i, x in enumerate(gradients)))


def _rows(name: str, buffer: Tensor) -> Tensor:
    try:
        return buffer.view(buffer.shape[:-1].numel(), buffer.shape[-1])
    except RuntimeError:
        raise ValueError(
            f"{name} must flatten to rows without a copy, got shape {tuple(buffer.shape)} with "
            f"strides {buffer.stride()}: {_REMEDY}"
        ) from None


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

    A buffer may be the logits of its own network. If it shares other memory with an input or with
    the other buffer, or if its elements overlap, values would be overwritten before they are read,
    so this raises an error. Memory is checked only in a ``plain`` call (see :class:`LossInputs`).
    In other calls, torch copies the gradients into the buffers.

    Raises:
        TypeError, ValueError: If a buffer is invalid. The message names it.
    """
    if not isinstance(grads, tuple | list) or len(grads) != 2:
        kind = type(grads).__name__
        kind = f"a {kind} of {len(grads)}" if isinstance(grads, tuple | list) else kind
        raise TypeError(f"grads must be a pair (ds, dt), each a tensor or None, got {kind}")
    inputs = (student, teacher, target, sample_weight, grad_scale)
    if plain and _are_dense_and_disjoint(grads, inputs):
        return
    for i, logits in enumerate((student, teacher)):
        if grads[i] is not None:
            _check_gradient_buffer(f"grads[{i}]", grads[i], logits, plain)
    if not plain:
        return
    names = ("student_logits", "teacher_logits", "target", "sample_weight", "grad_scale")
    # The tensors that are in use while the gradients are written. The loop adds the first buffer.
    used = {name: _Extent(x) for name, x in zip(names, inputs, strict=True)
            if isinstance(x, Tensor)}  # fmt: skip
    for i, buffer in enumerate(grads):
        if buffer is None:
            continue
        name, extent = f"grads[{i}]", _Extent(buffer)
        for other, other_extent in used.items():
            own = other == names[i] and extent == other_extent
            if extent.overlaps(other_extent) and not own:
                raise ValueError(
                    f"{name} must not overlap the memory of {other}, which is in use while {name} "
                    f"is written: {_REMEDY}"
                )
        used[name] = extent


def _are_dense_and_disjoint(grads: Sequence[object], inputs: tuple[object, ...]) -> bool:
    """Whether all tensors are dense and in separate memory.

    This check is fast. If it returns False, the buffers need the detailed check.
    """
    spans = []
    for x, logits in zip(grads, inputs, strict=False):  # the first two inputs are the logits
        if x is None:
            continue
        if type(x) is not Tensor or x.is_nested or not is_dense(x):
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


def _check_gradient_buffer(name: str, buffer: object, logits: Tensor, plain: bool) -> None:
    if not isinstance(buffer, Tensor):
        raise not_a_tensor(name, buffer)
    if plain and type(buffer) not in PLAIN:
        raise TypeError(
            f"{name} must be an ordinary tensor like the logits, got "
            f"{type(buffer).__name__}: {_REMEDY}"
        )
    if buffer.is_nested or buffer.shape != logits.shape or buffer.dtype != logits.dtype:
        check_dense(name, buffer)
        raise ValueError(
            f"{name} must have its logits' shape and dtype, {tuple(logits.shape)} {logits.dtype}, "
            f"got {tuple(buffer.shape)} {buffer.dtype}: {_REMEDY}"
        )
    check_device(name, buffer, logits.device)
    if plain and in_memory(name, buffer) is not buffer:
        raise ValueError(
            f"{name} must be ordinary memory, got a negative-bit view or a zero tensor: {_REMEDY}"
        )
    if not plain:
        check_dense(name, buffer)
    if not torch.compiler.is_compiling() and _overlaps_itself(buffer):
        raise ValueError(
            f"{name} must hold each element once, got shape {tuple(buffer.shape)} with strides "
            f"{buffer.stride()}: an expanded or overlapping tensor cannot be written to, "
            "make it .contiguous()"
        )


class _Extent:
    """The bytes that the elements of a tensor occupy."""

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

    def overlaps(self, other: "_Extent") -> bool:
        """Whether the tensors may share an element.

        False also for tensors whose columns or rows alternate in the same memory. True also for
        tensors that only a search of all elements could tell apart.
        """
        if self.begin >= other.end or other.begin >= self.end:
            return False
        # The distance of each element from the first element of its tensor is a multiple of this.
        step = math.gcd(*(x * self.width for x in self.strides),
                        *(x * other.width for x in other.strides))  # fmt: skip
        if _are_apart((other.begin - self.begin) % (step or 1), self.width, other.width, step):
            return False
        row, other_row = self._rows(), other._rows()
        if row is None or other_row is None or row[0] != other_row[0]:
            return True
        return not _are_apart((other.begin - self.begin) % row[0], row[1], other_row[1], row[0])

    def _rows(self) -> tuple[int, int] | None:
        """Return the distance between rows and the length of a row, in bytes.

        None unless the tensor is ``(N, C)`` with unit stride in C.
        """
        if len(self.shape) != 2 or self.strides[1] != 1 or self.shape[1] > self.strides[0]:
            return None
        return self.strides[0] * self.width, self.shape[1] * self.width


def _are_apart(offset: int, width: int, other_width: int, step: int) -> bool:
    """Whether two periodic sets of bytes, both of period ``step``, are disjoint.

    The first has ``width`` bytes in each period, the second ``other_width`` bytes that begin
    ``offset`` bytes later.
    """
    return width <= offset and offset + other_width <= step


def _overlaps_itself(tensor: Tensor) -> bool:
    """Whether two indices of a tensor may refer to the same element.

    They cannot if each stride is larger than the range of elements that all dimensions with smaller
    strides cover.
    """
    if tensor.is_contiguous():
        return False
    covered = 0  # the range of elements that the dimensions so far cover, without the first one
    dimensions = zip(tensor.stride(), tensor.shape, strict=True)
    for stride, size in sorted(x for x in dimensions if x[1] > 1):
        if stride <= covered:
            return True
        covered += (size - 1) * stride
    return False
