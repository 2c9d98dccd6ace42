"""Create the kernels' arguments from the inputs of a call."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..options import TABLE, LossOptions
from ..types import LossInputs, Pair
from . import launch_table
from .spec import Choices, NetworkSpec, Options, Spec

DTYPES = {torch.float32: tl.float32, torch.float64: tl.float64}
_SQUARINGS = {1.0: 0, 2.0: 1, 4.0: 2, 8.0: 3}


@dataclass(frozen=True)
class Platform:
    """The platform that the kernels are compiled for."""

    interpreted: bool
    amd: bool

    @property
    def nvidia(self) -> bool:
        return not (self.interpreted or self.amd)

    @property
    def ordered_stores(self) -> bool:
        """See :class:`Spec`. Also True in the interpreter, which runs one thread."""
        return not self.amd


PLATFORM = Platform(triton.knobs.runtime.interpret, torch.version.hip is not None)


# -- properties that compiled code depends on ------------------------------------------------------


def described(tensors: tuple[Tensor | None, ...]) -> tuple[list, list]:
    """Return the tensors' addresses, and all properties of them that compiled code depends on."""
    addresses: list[Any] = [None if x is None else x.data_ptr() for x in tensors]
    kinds: list[Any] = [None if x is None else (x.dtype, x.stride(), address % 16)
                        for x, address in zip(tensors, addresses, strict=True)]  # fmt: skip
    if PLATFORM.amd:
        kinds += [x is not None and _is_within_2_gib(x) for x in tensors]
    return addresses, kinds


def kind_of_scale(scale: float | Tensor | None) -> Any:
    """Return the properties of a scale that compiled code depends on."""
    if isinstance(scale, Tensor):
        return scale.dtype, scale.data_ptr() % 16, PLATFORM.amd and _is_within_2_gib(scale)
    return type(scale)


def kind_of_count(rows: int) -> Any:
    """Return the properties of the number of rows that compiled code depends on.

    Compiled code depends on the width of the integer. On AMD, it also depends on whether the
    records fit into 2 GiB, as those of 2**23 rows do.
    """
    return rows if PLATFORM.amd and rows > 2**23 else rows < 2**31


def _is_within_2_gib(tensor: Tensor) -> bool:
    """Whether Triton compiles 32-bit offsets for the tensor, on AMD."""
    return tensor.untyped_storage().size() < 2**31


# -- arguments -------------------------------------------------------------------------------------


def network_specs(
    inputs: LossInputs, student_grad: bool, teacher_grad: bool
) -> tuple[NetworkSpec, NetworkSpec]:
    o, has_target = inputs.options, inputs.target is not None
    student_kd, teacher_kd = o.student_kd != 0, o.teacher_kd != 0
    forward = o.teacher_divergence == "forward"  # KL(p_t || p_s)
    student = NetworkSpec(
        ce=o.student_ce != 0 and has_target, kd=student_kd, own_kl=student_kd,
        partner_kl=student_kd, grad=student_grad,
    )  # fmt: skip
    teacher = NetworkSpec(
        ce=o.teacher_ce != 0 and has_target, kd=teacher_kd, own_kl=teacher_kd and forward,
        partner_kl=teacher_kd and not forward, grad=teacher_grad,
    )  # fmt: skip
    return student, teacher


def spec_of(
    inputs: LossInputs,
    gradients: Pair[Tensor | None],
    dtype: torch.dtype,
    **others: Any,
) -> Spec:
    """Return the Spec of a call; ``others`` are the fields that depend on the launch."""
    o, target = inputs.options, inputs.target
    student, teacher = network_specs(inputs, *(x is not None for x in gradients))
    kd = student.kd or teacher.kd
    return Spec(
        student=student,
        teacher=teacher,
        target="none" if target is None else "labels" if target.ndim == 1 else "soft",
        smooth=target is not None and o.label_smoothing != 0,
        squarings=_SQUARINGS.get(float(o.temperature), -1) if kd else 0,
        choices=Choices(*(getattr(o, name) for name in Choices._fields)),
        dtype=DTYPES[dtype],
        nvidia=PLATFORM.nvidia,
        ordered_stores=PLATFORM.ordered_stores,
        **others,
    )


def numbers_of(o: LossOptions, spec: Spec, classes: int, dtype: torch.dtype) -> Any:
    """Return the Options of a call.

    Triton rounds float arguments to float32. So if the arithmetic is float64, floats are
    compile-time constants. The interpreter does not round floats, so this function rounds them.
    """
    temperature = float(o.temperature) if spec.kd else 1.0
    # With one class, c is 0: otherwise a rounding error in the exponent could make its probability
    # differ from 1.
    c = math.log2(math.e) / temperature if classes > 1 else 0.0
    numbers = {option.name: getattr(o, option.name) for option in TABLE if option.type is float}
    numbers |= {"temperature": temperature, "c": c,
                "smoothing_per_class": o.label_smoothing / classes}  # fmt: skip

    def exact(x: float) -> Any:
        if PLATFORM.interpreted:
            return torch.tensor(x, dtype=dtype).item()
        return float(x) if dtype == torch.float32 else tl.constexpr(float(x))

    integers = {option.name: getattr(o, option.name) for option in TABLE if option.type is int}
    return Options(**{name: exact(x) for name, x in numbers.items()}, **integers)


def exact_scale(scale: float | Tensor, dtype: torch.dtype, device: torch.device) -> float | Tensor:
    """Return a gradient's scale, as a tensor if a float32 argument would round it."""
    if isinstance(scale, Tensor):
        return scale
    if dtype == torch.float32:
        return float(scale)
    return torch.full((), scale, dtype=dtype, device=device)


def row_stride(tensor: Tensor | None) -> int:
    return 0 if tensor is None or tensor.ndim == 0 else tensor.stride(0)


def alignment(*numbers: int) -> int:
    """Return the largest power of two up to 16 that divides all numbers."""
    common = math.gcd(16, *numbers)
    return common & -common


def launch_of(
    inputs: LossInputs, gradients: Pair[Tensor | None]
) -> launch_table.Tile | launch_table.Loop:
    """Return the launch of the row kernel."""
    tensors = [x for x in (inputs.student, inputs.teacher, *gradients) if x is not None]
    itemsize = max(x.element_size() for x in tensors)
    # The only property of an address that Triton uses is that it is a multiple of 16.
    vector, shifted = 1, False
    if all(x.data_ptr() % 16 == 0 for x in tensors):
        strides = [x.stride(0) for x in tensors]
        vector = min(16 // itemsize, alignment(*strides))
        distances = {stride * itemsize % 16 for stride in strides}
        shifted = len(distances) == 1 and all(x.element_size() == itemsize for x in tensors)
    return launch_table.choose(inputs.student.shape[1], itemsize, vector, shifted)
