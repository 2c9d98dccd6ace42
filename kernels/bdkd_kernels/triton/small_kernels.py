"""The kernels before and after the row kernel: the mean's denominator, the sum of the losses."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .row_io import partial_sums


@triton.jit(do_not_specialize=["N", "ignore_index"])
def denominator_kernel(
    target, sample_weight, records, N, ignore_index,
    LABELS: tl.constexpr, BLOCK: tl.constexpr, OVERLAPPED: tl.constexpr,
):  # fmt: skip
    """Add up the weights of the rows that count. Each program stores one partial sum."""
    if OVERLAPPED:
        gdc_launch_dependents()
    part = tl.zeros((BLOCK,), tl.float64)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    for start in range(first, N, tl.num_programs(0) * BLOCK):
        rows = start + tl.arange(0, BLOCK)
        counted = rows < N
        if LABELS:
            counted &= tl.load(target + rows, counted, other=0) != ignore_index
        if sample_weight is None:
            part += tl.where(counted, 1.0, 0.0)
        else:
            part += tl.load(sample_weight + rows, counted, other=0.0).to(tl.float64)
    tl.store(partial_sums(records, N) + tl.program_id(0), tl.sum(part))


@triton.jit(do_not_specialize=["N", "count"])
def sum_kernel(
    student, teacher, records, N, count,
    NUM_PARTIALS: tl.constexpr, BLOCK: tl.constexpr, OVERLAPPED: tl.constexpr,
):  # fmt: skip
    """Add up the losses of ``count`` programs, in float64 and always in the same order."""
    if OVERLAPPED:
        gdc_wait()
    losses = partial_sums(records, N) + NUM_PARTIALS
    sum_s, sum_t = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        sum_s += tl.load(losses + at, at < count, other=0.0).to(tl.float64)
        sum_t += tl.load(losses + count + at, at < count, other=0.0).to(tl.float64)
    tl.store(student, tl.sum(sum_s))
    tl.store(teacher, tl.sum(sum_t))
