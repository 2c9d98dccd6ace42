"""The private APIs of torch that the checks and the operators rely on, each with its reason.

``make versions`` tries them with each version of torch. They answer questions that torch has no
public API for, or ones whose public API takes several times as long in every call. ``buffers.py``
has one more, and its fallback.
"""

import sys

import torch
from torch import Tensor
from torch.autograd import forward_ad

PLAIN = (Tensor, torch.nn.Parameter)  # exact types: a subclass may redefine what a call does

# True inside torch.func's grad, vmap, jvp, ... and while autograd runs a batched backward pass.
# https://github.com/pytorch/pytorch/blob/v2.13.0/torch/autograd/function.py (Function.apply)
_transforms_active = torch._C._are_functorch_transforms_active

# How many TorchDispatchModes watch this thread: FakeTensorMode, make_fx, FlopCounterMode, ...
_dispatch_modes = torch._C._len_torch_dispatch_stack
_tracing_state = torch._C._get_tracing_state  # torch.jit.is_tracing(), without its Python

_FROM_2_12 = torch.__version__ >= "2.12"

# DTensor before torch 2.10 computes neither argmax nor the gradient of gather.
DTENSORS_WORK = torch.__version__ >= "2.10"


def is_exporting() -> bool:
    """Whether ``torch.export`` traces this call.

    Before torch 2.12, ``torch.compiler.is_exporting()`` is also True under ``torch.compile``, but
    the flag behind it is not.
    """
    if _FROM_2_12:
        return torch.compiler.is_exporting()
    return getattr(torch.compiler, "_is_exporting_flag", False)


def vjp_needs_to_leave_inference_mode() -> bool:
    """Whether ``torch.func.vjp`` would compute zeros here: before torch 2.12, it does so under
    ``torch.inference_mode()``."""
    return (
        not _FROM_2_12 and not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()
    )


def is_plain(student: Tensor, teacher: Tensor) -> bool:
    """Whether this call is ordinary eager PyTorch, so that a kernel may use raw memory.

    False under ``torch.compile``, ``torch.func``, forward-mode AD, ``torch.jit.trace`` and any
    dispatch mode, and for subclasses of ``Tensor``.
    """
    return not (
        torch.compiler.is_dynamo_compiling()  # what follows it watches by a dispatch mode
        or _dispatch_modes()
        or _transforms_active()
        or forward_ad._current_level >= 0  # as in forward_ad.make_dual; no public counterpart
        or _tracing_state() is not None
        or type(student) not in PLAIN
        or type(teacher) not in PLAIN
    )


def needs_torch_operators() -> bool:
    """Whether every step of the call must be an operator of torch's own: a transform of
    ``torch.func``, forward-mode AD or ``torch.jit.trace`` is active outside ``torch.compile``."""
    if torch.compiler.is_compiling():
        return False
    return _transforms_active() or forward_ad._current_level >= 0 or _tracing_state() is not None


def values_can_be_read(tensor: Tensor) -> bool:
    """Whether Python may look at the values: not while they are traced, faked or batched."""
    if torch.compiler.is_compiling() or _tracing_state() is not None or _proxy_mode():
        return False
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return False
        tensor = functorch.get_unwrapped(tensor)
    return not (is_fake(tensor) or tensor.is_meta)


def _proxy_mode() -> bool:
    """Whether make_fx records this call."""
    if not _dispatch_modes():
        return False
    # Imported with make_fx at the latest.
    module = sys.modules.get("torch.fx.experimental.proxy_tensor")
    return module is not None and module.get_proxy_mode() is not None


def is_fake(tensor: object) -> bool:
    """Whether it is a ``FakeTensor``, which has a shape and a device but no values."""
    return isinstance(tensor, torch._subclasses.FakeTensor)


def is_dtensor(tensor: object) -> bool:
    """Whether it is a ``torch.distributed.tensor.DTensor``, without importing that module."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


# Whether a tensor has a storage at all. False for the batched tensors of torch.func.vmap and of
# autograd's is_grads_batched=True, which the other questions above do not see.
has_memory = torch._C._has_storage


def is_zero_tensor(tensor: Tensor) -> bool:
    """Whether it stands for zeros that were never stored, as autograd makes them internally
    (``torch._efficientzerotensor``)."""
    return tensor._is_zerotensor()


# -- triton ----------------------------------------------------------------------------------------

# Triton's launcher of a compiled kernel, which `kernel[grid]` calls after binding its arguments.
# The direct call saves the binding, about 20 us of a call. tests/kernels/triton_launches.py
# compares what both hand to the driver, with each of these versions of triton.
# https://github.com/triton-lang/triton/blob/v3.7.1/python/triton/runtime/jit.py (JITFunction.run)
_FAST_LAUNCH = ((3, 6), (3, 7))


def fast_launch_is_tested(version: str) -> bool:
    """Whether `launch_compiled` was tested with this version of triton."""
    return tuple(map(int, version.split(".")[:2])) in _FAST_LAUNCH


def launch_compiled(compiled, programs: int, stream: int, arguments: tuple) -> None:
    """Launch a compiled Triton kernel: ``arguments`` are all of the kernel's, pointers as numbers.

    Raises:
        TypeError: If the kernel takes other arguments. Nothing was launched.
    """
    compiled.run(
        programs, 1, 1, stream, compiled.function, compiled.packed_metadata, None, None, None,
        *arguments,
    )  # fmt: skip


def has_launch_hooks() -> bool:
    """Whether a profiler such as Proton watches Triton's launches."""
    runtime = sys.modules["triton"].knobs.runtime
    return bool(runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls)


def current_triton_stream(device: int) -> int:
    """Return the handle of the current stream; torch's public API takes several times as long."""
    return sys.modules["triton"].runtime.driver.active.get_current_stream(device)


def current_triton_arch() -> int:
    """Return the compute capability of the current NVIDIA device: 90 for sm_90."""
    return sys.modules["triton"].runtime.driver.active.get_current_target().arch
