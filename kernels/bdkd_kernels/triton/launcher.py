"""Launch a kernel repeatedly, with little work on the host."""

import functools
from typing import Any

import triton

from .._torch_compat import fast_launch_is_tested, has_launch_hooks, launch_compiled
from .gradient_kernel import gradient_kernel
from .loop_kernel import loop_kernel
from .small_kernels import denominator_kernel, sum_kernel
from .tile_kernel import tile_kernel

KERNELS = (denominator_kernel, tile_kernel, loop_kernel, sum_kernel, gradient_kernel)


@functools.cache
def _fix_cache_keys() -> None:
    """Compute Triton's cache keys in one order.

    A key depends on the order in which the keys are computed (seen in triton 3.6 and 3.7). In
    another order, kernels would be compiled again although they are in the cache.
    """
    for kernel in KERNELS:
        _ = getattr(kernel, "cache_key", None)  # an interpreted kernel has none


class Launcher:
    """Launch one kernel with arguments of the same kind.

    The first launch is ``kernel[grid]``. With the tested versions of Triton, later launches call
    the compiled kernel directly. This skips binding and hashing 30 arguments, and it passes
    addresses instead of tensors, so that the driver does not look them up. With other versions of
    Triton, in the interpreter, and while a profiler has installed launch hooks, all launches are
    ``kernel[grid]``.
    """

    def __init__(self, kernel: Any, warps: int, early: bool = False, registers: int = 0) -> None:
        _fix_cache_keys()
        self.kernel, self.compiled = kernel, None
        self.is_fast = fast_launch_is_tested(triton.__version__)
        # The arithmetic needs fused multiply-adds. Triton 3.10 will not use them by default.
        self.options: dict[str, Any] = {"num_warps": warps, "enable_fp_fusion": True}
        if early:
            self.options["launch_pdl"] = True
        if registers:
            self.options["maxnreg"] = registers

    def __call__(self, programs: int, stream: int, tensors, addresses, numbers) -> None:
        """Launch ``programs`` programs, with the tensors and then the numbers as arguments."""
        if self.compiled is not None and not has_launch_hooks():
            try:
                launch_compiled(self.compiled, programs, stream, (*addresses, *numbers))
                return
            except TypeError:  # the compiled kernel takes other arguments: nothing was launched
                self.compiled, self.is_fast = None, False
        compiled = self.kernel[(programs,)](*tensors, *numbers, **self.options)
        if self.is_fast:
            self.compiled = compiled
