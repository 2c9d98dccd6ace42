"""The blocks of a long row, and how they are loaded.

A block has shape (LOOP.outer, LOOP.lanes, LOOP.inner). A lane loads LOOP.inner neighbouring classes
in one access. Rows may be unaligned, but with the same offset from 16 bytes in all tensors
(LOOP.shifted). Then the aligned accesses start at the first aligned class. The few classes before
and after the aligned accesses are the edges, which are loaded one by one.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .row_io import load_logits, load_storage, multiple_of, widen
from .spec import Pair


class Row(NamedTuple):
    """One row of the batch."""

    index: Any
    soft: Any  # pointer to its soft labels, or the batch's target
    label: Any
    in_range: Any  # whether the label is
    counted: Any  # whether the row counts
    head: Any  # number of classes before the first 16-byte aligned address, if LOOP.shifted
    end: Any  # number of classes after `head` in whole accesses of LOOP.inner
    body: Any  # number of these classes before the last block


class Block(NamedTuple):
    """The classes of a block."""

    cols: Any
    inside: Any  # whether they are classes
    mask: Any  # which of them are loaded


@triton.jit
def classes_of(start, OUTER: tl.constexpr, LANES: tl.constexpr, INNER: tl.constexpr):
    """Return the classes of the block that begins at ``start``, (OUTER, LANES, INNER)."""
    outer = tl.arange(0, OUTER)[:, None, None]
    lanes = tl.arange(0, LANES)[None, :, None]
    return start + (outer * LANES + lanes) * INNER + tl.arange(0, INNER)[None, None, :]


@triton.jit
def split_row(index, stride, C, LOOP: tl.constexpr):
    """Return head, end and body of a row; see Row."""
    head, end = 0, C
    if LOOP.shifted:
        head = ((0 - index * stride) % LOOP.inner).to(tl.int32)
        head = tl.where(head < 0, head + LOOP.inner, head)  # the remainder has the dividend's sign
        head = tl.minimum(head, C)
        end = multiple_of(C - head, LOOP.inner)
    return head, end, tl.maximum(tl.cdiv(end, LOOP.block) - 1, 0) * LOOP.block


@triton.jit
def body_of(pointer, stride, row, LOOP: tl.constexpr):
    """Return a pointer to the row's first aligned class."""
    if LOOP.shifted:
        return pointer + multiple_of(row.index * stride + row.head, LOOP.inner)
    else:
        return pointer + row.index * stride


@triton.jit
def bodies_of(networks, row, LOOP: tl.constexpr):
    """Return a Pair of pointers to the first aligned logit of both rows."""
    s, t = networks.student, networks.teacher
    return Pair(body_of(s.logits, s.stride, row, LOOP), body_of(t.logits, t.stride, row, LOOP))


@triton.jit
def load_row(networks, row, cols, mask, SPEC: tl.constexpr):
    """Load some classes of a row of both networks, a Pair, with PAD outside the mask."""
    s, t = networks.student, networks.teacher
    s_row, t_row = s.logits + row.index * s.stride, t.logits + row.index * t.stride
    return Pair(load_logits(s_row + cols, mask, True, SPEC.dtype),
                load_logits(t_row + cols, mask, True, SPEC.dtype))  # fmt: skip


@triton.jit
def load_packed(body, at, mask, LOOP: tl.constexpr, POLICY: tl.constexpr):
    """Load a block of one row. Two bf16 numbers are one int32, (OUTER, LANES, INNER / 2).

    In loop variables, the compiler would unpack 16-bit numbers from their register and repack them.
    """
    if body.dtype.element_ty == tl.bfloat16 and LOOP.inner > 1 and mask is None:
        pairs = body.to(tl.pointer_type(tl.int32), bitcast=True)
        cols = classes_of(at // 2, LOOP.outer, LOOP.lanes, LOOP.inner // 2)
        return tl.load(pairs + cols, eviction_policy=POLICY)
    else:
        cols = classes_of(at, LOOP.outer, LOOP.lanes, LOOP.inner)
        return load_storage(body + cols, mask, POLICY)


@triton.jit
def load_block(bodies, at, mask, LOOP: tl.constexpr, POLICY: tl.constexpr):
    """Load the block that begins at ``at`` of both rows, for `unpack`."""
    return (load_packed(bodies.student, at, mask, LOOP, POLICY),
            load_packed(bodies.teacher, at, mask, LOOP, POLICY))  # fmt: skip


@triton.jit
def unpack(x, mask, MASKED: tl.constexpr, DTYPE: tl.constexpr):
    """Convert what `load_packed` returned to the type of the arithmetic."""
    if x.dtype == tl.int32:
        low = (x << 16).to(tl.float32, bitcast=True)
        high = (x & -65536).to(tl.float32, bitcast=True)
        shape: tl.constexpr = [x.shape[0], x.shape[1], 2 * x.shape[2]]
        return tl.join(low, high).reshape(shape).to(DTYPE)
    else:
        return widen(x, mask, MASKED, DTYPE)


@triton.jit
def unpack_block(raw, mask, MASKED: tl.constexpr, DTYPE: tl.constexpr):
    """Convert both rows' blocks, which `load_block` returned, to a Pair of logits."""
    return Pair(unpack(raw[0], mask, MASKED, DTYPE), unpack(raw[1], mask, MASKED, DTYPE))


@triton.jit
def load_tail(networks, row, mask, LOOP: tl.constexpr, SPEC: tl.constexpr):
    """Load the last block of a row, the only one with a mask. Returns its logits and its Block."""
    bodies = bodies_of(networks, row, LOOP)
    cols = classes_of(row.body, LOOP.outer, LOOP.lanes, LOOP.inner)
    inside = cols < row.end
    read = inside if mask is None else inside & mask
    logits = Pair(load_logits(bodies.student + cols, read, True, SPEC.dtype),
                  load_logits(bodies.teacher + cols, read, True, SPEC.dtype))  # fmt: skip
    return logits, Block(cols + row.head, inside, read)


@triton.jit
def load_edges(networks, batch, row, LOOP: tl.constexpr, SPEC: tl.constexpr):
    """Load the classes before and after the whole accesses. Returns the logits and the Block."""
    at = tl.arange(0, LOOP.lanes)[None, :, None]
    cols = tl.where(at < row.head, at, at + row.end)  # (1, LANES, 1)
    inside = cols < batch.C
    read = inside & row.counted  # without `counted`, fp32 spills
    return load_row(networks, row, cols, read, SPEC), Block(cols, inside, read)
