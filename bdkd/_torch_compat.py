"""The private APIs of torch that the trainer uses. No other file of ``bdkd`` uses any.

Each has its source, and what replaces it in a torch that lacks it.
``tests/training/test_private_apis.py`` compares each with public operations.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bdkd.errors import RunError, first_line

# -- operations on lists of tensors ----------------------------------------------------------------
# torch.optim is built on them. They need one launch instead of one for each of hundreds of tensors.
# https://github.com/pytorch/pytorch/blob/v2.13.0/aten/src/ATen/native/ForeachUtils.h


def foreach_copy_(tensors: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy each source into the tensor of the same index."""
    torch._foreach_copy_(list(tensors), list(sources))


def foreach_add_(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    """Add to each tensor the other one of the same index."""
    torch._foreach_add_(list(tensors), list(others))


def foreach_lerp_(tensors: Sequence[Tensor], ends: Sequence[Tensor], weight: Tensor) -> None:
    """Move each tensor towards its end by a 0-dim weight: ``x += weight * (end - x)``."""
    difference = torch._foreach_sub(list(ends), list(tensors))
    torch._foreach_mul_(difference, weight)
    torch._foreach_add_(list(tensors), difference)


# -- DistributedDataParallel -----------------------------------------------------------------------


def ignore_in_ddp(module: nn.Module, names: Sequence[str]) -> None:
    """Exclude parameters and buffers, by name, from a DDP that will wrap ``module``.

    https://github.com/pytorch/pytorch/blob/v2.13.0/torch/nn/parallel/distributed.py. FSDP2 and DDP
    have no public way to share a module.
    """
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, list(names))


# -- torch.compile ---------------------------------------------------------------------------------
# https://github.com/pytorch/pytorch/blob/v2.13.0/torch/_dynamo/config.py. torch.compiler.config has
# no recompile limit before 2.9. torch 2.8 cannot take torch.autograd.grad into a graph.
_BACKWARD_FLAG = "trace_autograd_ops"


def traces_backward() -> bool:
    """Return whether ``torch.compile`` can take a backward pass into the graph of its forward."""
    from torch._dynamo import config  # a second to import

    return hasattr(config, _BACKWARD_FLAG)


def compile_shapes(
    function: Callable, shapes: int, backend: str | Callable, backward: bool
) -> Callable:
    """Compile a function for a number of static shapes.

    Args:
        shapes: beyond its limit of recompilations dynamo runs uncompiled, without an error.
        backward: the function calls ``torch.autograd.grad``; requires :func:`traces_backward`.
    """
    from torch._dynamo import config

    settings: dict[str, Any] = {"recompile_limit": config.recompile_limit + shapes}
    if backward:
        settings[_BACKWARD_FLAG] = True
    return config.patch(settings)(torch.compile(function, dynamic=False, backend=backend))


def compile_error(error: Exception) -> str | None:
    """Return the reason if ``torch.compile`` raised this error, else None."""
    from torch._dynamo.exc import TorchDynamoException

    if not isinstance(error, TorchDynamoException):
        return None
    inner = getattr(error, "inner_exception", error)
    return f"{type(inner).__name__}: {first_line(inner)}"


def check_cpp_compiler(remedy: str) -> None:
    """Raise ``RunError`` if inductor finds no C++ compiler.

    https://github.com/pytorch/pytorch/blob/v2.13.0/torch/_inductor/cpp_builder.py
    """
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise RunError(
            "train.compile needs a C++ compiler on a CPU, and there is none: install g++, name "
            f"another in the environment variable CXX, {remedy}"
        ) from error
