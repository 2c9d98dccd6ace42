"""Loads and stores of rows: logits, labels, gradients and records."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait
from triton.language.target_info import is_cuda

from .spec import RECORD

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
# The logit of padding, which are the classes past C. It is a power of two, so that PAD * c - shift
# is exactly 0 in a row of padding. It is finite, so that 0 * a is 0. It is less than any logit that
# is not masked.
PAD = tl.constexpr(-(2.0**100))


@triton.jit
def multiple_of(x, ALIGNMENT: tl.constexpr):
    """Return x, and tell the compiler that it is a multiple of ALIGNMENT.

    The compiler itself only recognises multiples of 16. Without this function, rows of 1000 classes
    would be read logit by logit, although they are aligned to 16 bytes.
    """
    return x // ALIGNMENT * ALIGNMENT


@triton.jit
def load_storage(pointers, mask, POLICY: tl.constexpr):
    """Load logits in their storage type: PAD outside the mask, 0 in float16, which has no PAD."""
    if mask is None:
        return tl.load(pointers, eviction_policy=POLICY)
    elif pointers.dtype.element_ty == tl.float16 or (
        INTERPRETED and pointers.dtype.element_ty == tl.bfloat16
    ):
        return tl.load(pointers, mask, other=0.0, eviction_policy=POLICY)
    else:
        return tl.load(pointers, mask, other=PAD, eviction_policy=POLICY)


@triton.jit
def widen(x, mask, PADDED: tl.constexpr, DTYPE: tl.constexpr):
    """Convert what `load_storage` returned to the type of the arithmetic; PAD outside the mask."""
    if x.dtype == tl.float16 and PADDED:  # float16 cannot represent PAD
        return tl.where(mask, x.to(DTYPE), PAD)
    elif INTERPRETED and x.dtype == tl.bfloat16:
        # The cast in the interpreter changes subnormal numbers.
        x = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
        if mask is not None:
            x = tl.where(mask, x, PAD)
        return x.to(DTYPE)
    elif x.dtype == tl.bfloat16 and tl.float32 == DTYPE and x.numel > 1 and is_cuda():
        # One instruction per number. The compiler's own cast takes two: it extracts 16 bits first.
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [x], dtype=tl.float32,
            is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return x.to(DTYPE)


@triton.jit
def load_logits(pointers, mask, PADDED: tl.constexpr, DTYPE: tl.constexpr):
    """Load logits in the type of the arithmetic: PAD outside the mask."""
    return widen(load_storage(pointers, mask, ""), mask, PADDED, DTYPE)


@triton.jit
def store_gradient(pointers, x, mask, POLICY: tl.constexpr):
    """Store gradients, rounded to nearest. In bfloat16, the interpreter itself would truncate."""
    if INTERPRETED and pointers.dtype.element_ty == tl.bfloat16:
        x = x.to(tl.float32)
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(tl.abs(x) < float("inf"), bits.to(tl.float32, bitcast=True), x)
    tl.store(pointers, x, mask, eviction_policy=POLICY)


@triton.jit
def load_labels(batch, rows, active, options, SPEC: tl.constexpr):
    """Return the rows' labels, whether they are in range, and whether the rows count.

    A label is 0 where there is no target or no such class.
    """
    if SPEC.target == "labels":
        y = tl.load(batch.target + rows, active, other=0)
        in_range = (y >= 0) & (y < batch.C)
        counted = active & (y != options.ignore_index)
        y = tl.where(in_range, y, 0).to(tl.int32)
    else:
        y, in_range, counted = (rows * 0).to(tl.int32), rows >= 0, active & (rows >= 0)
    if INTERPRETED:
        # In the interpreter, a comparison has the type of its operands. A scalar comparison that is
        # broadcast becomes a block of int32, which triton 3.9 does not accept as a mask.
        counted = tl.where(counted, True, False)
    return y, in_range, counted


@triton.jit
def partial_sums(records, N):
    """Return a pointer to the values after the records.

    These are the partial sums of the mean's denominator, then each program's sum of the student's
    losses, then each program's sum of the teacher's losses.
    """
    return records + N.to(tl.int64) * RECORD


@triton.jit
def load_row_weight(batch, rows, counted, SPEC: tl.constexpr):
    """Return the factor of the rows' losses: their weight over the denominator of the mean."""
    weight = tl.where(counted, 1.0, 0.0).to(SPEC.dtype)
    if batch.sample_weight is not None:
        loaded = tl.load(batch.sample_weight + rows, counted, other=0.0)
        weight = tl.where(counted, loaded.to(SPEC.dtype), 0.0)
    if SPEC.choices.reduction == "mean":
        if SPEC.num_partials == 0:
            total = batch.N.to(SPEC.dtype)
        else:
            if SPEC.overlapped:
                gdc_wait()
            partials = partial_sums(batch.records, batch.N) + tl.arange(0, SPEC.num_partials)
            total = tl.sum(tl.load(partials))
            total = tl.where(total == 0.0, 1.0, total)
        weight = weight / total
    return weight


@triton.jit
def store_record(records, rows, mask, FIRST: tl.constexpr, values):
    """Store fields of the rows' records, from field FIRST on.

    Rows of shape (1, ROWS, 1) are stored as sums over the two dimensions of size 1: triton 3.6
    fails to lay out a value that is both stored and used elsewhere.
    """
    if len(rows.shape) == 3:
        record = records + tl.sum(tl.sum(rows, 2), 0) * RECORD + FIRST
        stored = tl.max(tl.max(mask.to(tl.int32), 2), 0) != 0
        for i in tl.static_range(len(values)):
            tl.store(record + i, tl.sum(tl.sum(values[i], 2), 0), stored)
    else:
        record = records + rows * RECORD + FIRST
        for i in tl.static_range(len(values)):
            tl.store(record + i, values[i], mask)


@triton.jit
def store_program_losses(losses, records, N, loss_s, loss_t, SPEC: tl.constexpr):
    """Store the losses of one program: the losses of its row, or its part of the batch's sum."""
    program = tl.program_id(0)
    if SPEC.choices.reduction == "none":
        tl.store(losses.student + program, loss_s)
        tl.store(losses.teacher + program, loss_t)
    else:
        sums = partial_sums(records, N) + SPEC.num_partials
        tl.store(sums + program, loss_s)
        tl.store(sums + tl.num_programs(0) + program, loss_t)
