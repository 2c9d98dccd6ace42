"""The private APIs of torch that the trainer uses. No other file of ``bdkd`` uses private APIs.

Each entry links to the source code of torch, and has a fallback if a supported version lacks it.
``tests/training/test_private_apis.py`` compares each function with public operations.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bdkd.errors import RunError, first_line

# -- operations on lists of tensors ----------------------------------------------------------------
# torch.optim uses them. One launch processes hundreds of tensors.
# https://github.com/pytorch/pytorch/blob/v2.13.0/aten/src/ATen/native/ForeachUtils.h


def foreach_copy_(tensors: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy each source into the tensor of the same index."""
    torch._foreach_copy_(list(tensors), list(sources))


def foreach_add_(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    """Add to each tensor the one of ``others`` with the same index, in place."""
    torch._foreach_add_(list(tensors), list(others))


def foreach_lerp_(tensors: Sequence[Tensor], ends: Sequence[Tensor], weight: Tensor) -> None:
    """Interpolate each tensor in place: ``x += weight * (end - x)``, with a 0-dim weight."""
    difference = torch._foreach_sub(list(ends), list(tensors))
    torch._foreach_mul_(difference, weight)
    torch._foreach_add_(list(tensors), difference)


# -- DistributedDataParallel -----------------------------------------------------------------------


def ignore_in_ddp(module: nn.Module, names: Sequence[str]) -> None:
    """Exclude parameters and buffers, by name, from a DDP wrapper that is created later.

    torch has no public API for a module that both FSDP2 and DDP manage. Source:
    https://github.com/pytorch/pytorch/blob/v2.13.0/torch/nn/parallel/distributed.py
    """
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, list(names))


# -- torch.compile ---------------------------------------------------------------------------------
# https://github.com/pytorch/pytorch/blob/v2.13.0/torch/_dynamo/config.py. torch.compiler.config has
# no recompile limit before 2.9. torch 2.8 cannot compile torch.autograd.grad.
_BACKWARD_FLAG = "trace_autograd_ops"


def traces_backward() -> bool:
    """Return whether ``torch.compile`` can compile forward and backward passes as one graph."""
    from torch._dynamo import config  # this import takes a second

    return hasattr(config, _BACKWARD_FLAG)


def compile_shapes(
    function: Callable, shapes: int, backend: str | Callable, backward: bool
) -> Callable:
    """Compile a function for a number of static shapes.

    Args:
        shapes: number of shapes. It raises dynamo's recompile limit. Above the limit, dynamo runs
            the function without compilation and without an error.
        backward: whether the function calls ``torch.autograd.grad``. This requires
            :func:`traces_backward`.
    """
    from torch._dynamo import config

    settings: dict[str, Any] = {"recompile_limit": config.recompile_limit + shapes}
    if backward:
        settings[_BACKWARD_FLAG] = True
    return config.patch(settings)(torch.compile(function, dynamic=False, backend=backend))


def compile_error(error: Exception) -> str | None:
    """Return the reason of an error that ``torch.compile`` raised. Return None for other errors."""
    from torch._dynamo.exc import TorchDynamoException

    if not isinstance(error, TorchDynamoException):
        return None
    inner = getattr(error, "inner_exception", error)
    return f"{type(inner).__name__}: {first_line(inner)}"


def check_cpp_compiler(remedy: str) -> None:
    """Raise ``RunError`` if inductor finds no C++ compiler.

    Source: https://github.com/pytorch/pytorch/blob/v2.13.0/torch/_inductor/cpp_builder.py

    Args:
        remedy: the end of the message, with what else the user can do.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise RunError(
            "train.compile needs a C++ compiler on a CPU, and none was found: install g++, set the "
            f"environment variable CXX to another compiler, {remedy}"
        ) from error
