"""The private APIs of torch and triton that the package uses. No other file uses any.

The comment of each one states what it is needed for, where its source is, and what replaces it in a
version of torch without it. Importing the package never fails because of a missing private API.
``tests/kernels/test_torch_compat.py`` removes each one and compares the results. ``make versions``
runs the tests of the kernels with each version of torch and triton.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

PLAIN = (Tensor, torch.nn.Parameter)  # exact types: a subclass may redefine its operations

_FROM_2_12 = torch.__version__ >= "2.12"

# Before torch 2.10, DTensor supports neither argmax nor the gradient of gather.
DTENSORS_WORK = torch.__version__ >= "2.10"


def _private(path: str) -> Any:
    """Return a private attribute of torch, or None if this torch does not have it."""
    found: Any = torch
    for name in path.split("."):
        found = getattr(found, name, None)
    return found


# -- the kind of a call ----------------------------------------------------------------------------

_peek_transform = _private("_C._functorch.peek_interpreter_stack")


def _has_transform() -> bool:
    """Replace :func:`_transforms_active` with the check in ``torch/_functorch/pyfunctorch.py``."""
    return _peek_transform is not None and _peek_transform() is not None


# Whether a transform of torch.func (grad, vmap, jvp, ...) or a batched backward pass is active.
# https://github.com/pytorch/pytorch/blob/v2.13.0/torch/csrc/utils/python_dispatch.cpp
# If torch has neither of the two functions, such a call raises torch's error about storage.
_transforms_active: Callable[[], bool] = (
    _private("_C._are_functorch_transforms_active") or _has_transform
)

# How many TorchDispatchModes see the calls of this thread: FakeTensorMode, make_fx and others.
# https://github.com/pytorch/pytorch/blob/v2.13.0/torch/csrc/autograd/init.cpp
# Without it, every call runs the operators of torch.library, which a mode sees.
_dispatch_modes: Callable[[], int] = _private("_C._len_torch_dispatch_stack") or (lambda: 1)


class _Levels:
    """The level of forward-mode AD from the public API. It mostly raises, which takes 1.8 us."""

    @property
    def _current_level(self) -> int:
        zero = torch.zeros((), device="cpu")
        try:
            forward_ad.make_dual(zero, zero)
        except RuntimeError:
            return -1
        return 0


# Its _current_level is the number of nested levels of forward-mode AD, minus 1.
# https://github.com/pytorch/pytorch/blob/v2.13.0/torch/autograd/forward_ad.py (make_dual)
_levels: Any = forward_ad if hasattr(forward_ad, "_current_level") else _Levels()


def is_plain(student: Tensor, teacher: Tensor) -> bool:
    """Whether this call is ordinary eager PyTorch, so that a kernel may use raw memory.

    False under ``torch.compile``, ``torch.func``, forward-mode AD, ``torch.jit.trace`` and any
    dispatch mode, and for subclasses of ``Tensor``.
    """
    return not (
        torch.compiler.is_dynamo_compiling()  # later stages of torch.compile use a dispatch mode
        or _dispatch_modes()
        or _transforms_active()
        or _levels._current_level >= 0
        or torch.jit.is_tracing()
        or type(student) not in PLAIN
        or type(teacher) not in PLAIN
    )


def needs_torch_operators() -> bool:
    """Whether every step of the call must be an operator of torch itself.

    True outside ``torch.compile`` if a transform of ``torch.func``, forward-mode AD or
    ``torch.jit.trace`` is active.
    """
    if torch.compiler.is_compiling():
        return False
    return _transforms_active() or _levels._current_level >= 0 or torch.jit.is_tracing()


def values_can_be_read(tensor: Tensor) -> bool:
    """Whether Python may read the values. False if they are traced, fake or batched."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or _is_recording():
        return False
    if is_fake(tensor) or tensor.is_meta:
        return False
    if _transforms_active():
        try:
            tensor.sum().item()
        except RuntimeError:  # a batched tensor of vmap
            return False
    return True


def _is_recording() -> bool:
    """Whether make_fx records this call.

    https://github.com/pytorch/pytorch/blob/v2.13.0/torch/fx/experimental/proxy_tensor.py
    Without ``get_proxy_mode``: True under any dispatch mode, where labels are then not checked.
    """
    if not _dispatch_modes():
        return False
    module = sys.modules.get("torch.fx.experimental.proxy_tensor")  # make_fx imports it
    if module is None:
        return False
    get_proxy_mode = getattr(module, "get_proxy_mode", None)
    return get_proxy_mode is None or get_proxy_mode() is not None


def is_exporting() -> bool:
    """Whether ``torch.export`` traces this call.

    Before torch 2.12, ``torch.compiler.is_exporting()`` is also True under ``torch.compile``, but
    the flag behind it is not.
    https://github.com/pytorch/pytorch/blob/v2.11.0/torch/compiler/__init__.py
    """
    if _FROM_2_12:
        return torch.compiler.is_exporting()
    return getattr(torch.compiler, "_is_exporting_flag", False)


def vjp_needs_to_leave_inference_mode() -> bool:
    """Whether ``torch.func.vjp`` would compute zeros.

    Before torch 2.12, it does so under ``torch.inference_mode()``.
    """
    return (
        not _FROM_2_12 and not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()
    )


# -- the kind of a tensor --------------------------------------------------------------------------


def is_fake(tensor: object) -> bool:
    """Whether this is a ``FakeTensor``, which has a shape and a device but no values.

    The class is recognised by its name, because it is in the private module ``torch._subclasses``.
    """
    return any(base.__name__ == "FakeTensor" for base in type(tensor).__mro__)


def is_dtensor(tensor: object) -> bool:
    """Whether this is a ``torch.distributed.tensor.DTensor``, without importing that module."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def is_zero_tensor(tensor: Tensor) -> bool:
    """Whether the tensor represents zeros without storing them. Forward-mode AD creates such zeros.

    https://github.com/pytorch/pytorch/blob/v2.13.0/aten/src/ATen/ZeroTensorFallback.cpp
    Without ``_is_zerotensor``: such a tensor raises an error, because it has no memory.
    """
    return getattr(tensor, "_is_zerotensor", bool)()


def _version(value: float | Tensor) -> object:
    """Return a number that changes when a tensor is written to; 0 for floats, inference tensors.

    https://docs.pytorch.org/docs/stable/notes/autograd.html (in-place correctness checks)
    """
    try:
        return value._version  # type: ignore[union-attr]
    except (AttributeError, RuntimeError):
        return 0


def _new_version(value: float | Tensor) -> object:
    """Replace :func:`_version` if torch has no version counter: gradients are recomputed more."""
    return object() if isinstance(value, Tensor) else 0


version = _version if hasattr(Tensor, "_version") else _new_version


# -- registries and memory -------------------------------------------------------------------------


def register_pytree(
    kind: type, flatten: Callable, unflatten: Callable, serialized_type_name: str
) -> None:
    """Let ``torch.func`` and ``torch.export`` handle a class as a container of tensors.

    https://github.com/pytorch/pytorch/blob/v2.13.0/torch/utils/_pytree.py
    Without it: they do not support functions that return the class.
    """
    try:
        from torch.utils._pytree import register_pytree_node
    except ImportError:
        return
    register_pytree_node(kind, flatten, unflatten, serialized_type_name=serialized_type_name)


def _owner_counter() -> Callable[[torch.UntypedStorage], tuple[int, int]] | None:
    """Return a function that counts the owners of a storage, or None if its result is wrong.

    Tensors, views and NumPy arrays are owners of the memory. References to the Python object are
    counted too, because ``untyped_storage()`` returns the same object to every caller.
    https://github.com/pytorch/pytorch/blob/v2.13.0/torch/_inductor/cudagraph_trees.py
    Without it: ``buffers.py`` reuses no memory.
    """
    use_count = _private("_C._storage_Use_Count")

    def count(storage: torch.UntypedStorage) -> tuple[int, int]:
        return use_count(storage._cdata), sys.getrefcount(storage)

    try:
        tensor = torch.empty(2, device="cpu")
        storage = tensor.untyped_storage()
        memory, references = count(storage)
        view, same = tensor[1:], storage
        with_owners = count(storage)
        del view, same
        right = with_owners == (memory + 1, references + 1)
        return count if right and count(storage) == (memory, references) else None
    except (AttributeError, TypeError, RuntimeError):
        return None


owners = _owner_counter()


# -- triton ----------------------------------------------------------------------------------------

# Triton's launcher of a compiled kernel, which `kernel[grid]` calls after binding its arguments.
# Calling it directly skips the binding, which takes about 20 us. tests/kernels/triton_launches.py
# compares the arguments that both ways pass to the driver, with each of these versions of triton.
# https://github.com/triton-lang/triton/blob/v3.7.1/python/triton/runtime/jit.py (JITFunction.run)
_FAST_LAUNCH = ((3, 6), (3, 7), (3, 8), (3, 9))


def fast_launch_is_tested(version: str) -> bool:
    """Whether `launch_compiled` was tested with this version of triton."""
    return tuple(map(int, version.split(".")[:2])) in _FAST_LAUNCH


def launch_compiled(compiled, programs: int, stream: int, arguments: tuple) -> None:
    """Launch a compiled Triton kernel with all of its ``arguments``. Pointers are numbers.

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
