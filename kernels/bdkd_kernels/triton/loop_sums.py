"""The first sweep over a long row. It computes all sums over the classes.

Each lane keeps its own running maximum and sums over its classes, so threads exchange no values
before the end of the row.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .loop_blocks import (
    Block,
    bodies_of,
    classes_of,
    load_block,
    load_edges,
    load_row,
    load_tail,
    unpack_block,
)
from .row_io import INTERPRETED, PAD, load_row_weight
from .row_math import exponentials, power, shift_of, times
from .spec import Pair


class NetworkSums(NamedTuple):
    """Sums over the classes of each lane, or of the row, of one network."""

    m: Any  # the largest logit
    z: Any  # sum e
    z1: Any  # sum e1
    ea: Any  # sum e a or (soften_entropy=False) e1 a
    gap: Any  # sum e (a_partner - a): a moment of KL(own || partner)
    qa: Any  # sum q a, of a soft label q
    a: Any  # sum a, for label smoothing


class TargetSums(NamedTuple):
    """Values of the target, over the classes of each lane or of the row."""

    q: Any  # sum q of a soft label; with label smoothing, the number of classes
    largest: Any  # the largest q
    label: Any  # its first class


class RowSums(NamedTuple):
    student: Any  # NetworkSums
    teacher: Any  # NetworkSums
    target: Any  # TargetSums


class Late(NamedTuple):
    """Values that are loaded in the first sweep and used after it."""

    label_logit: Any  # Pair
    weight: Any  # the factor of the row's losses


@triton.jit
def lane_sum(x):
    """Sum a block over each lane's classes: (OUTER, LANES, INNER) to (LANES,)."""
    return tl.sum(tl.sum(x, 2), 0)


@triton.jit
def lane_max(x):
    return tl.max(tl.max(x, 2), 0)


@triton.jit
def larger_2(a, b, c, d):
    return tl.maximum(a, c), tl.maximum(b, d)


@triton.jit
def add_4(a, b, c, d, e, f, g, h):
    return a + e, b + f, c + g, d + h


@triton.jit
def max_lanes_2(a, b):
    """Return the maxima over the lanes of two tensors (LANES,), in one exchange between warps."""
    if INTERPRETED:
        return tl.max(a), tl.max(b)
    else:
        return tl.reduce((a, b), 0, larger_2)


@triton.jit
def sum_lanes_4(a, b, c, d):
    """Return the sums over the lanes of four tensors (LANES,), in one exchange between warps."""
    if INTERPRETED:
        return tl.sum(a), tl.sum(b), tl.sum(c), tl.sum(d)
    else:
        return tl.reduce((a, b, c, d), 0, add_4)


@triton.jit
def rescale(sums, m, moved, partner_moved, q, options, NET: tl.constexpr, SPEC: tl.constexpr,
            MASKED: tl.constexpr):  # fmt: skip
    """Return the sums of one network for a new maximum ``m``.

    ``moved`` is added to each a of the network, and ``partner_moved`` to each a of its partner.
    ``q`` is TargetSums.q.
    """
    factor = tl.exp2(moved)
    factor1 = power(factor, moved, options.temperature, SPEC.squarings)
    z, ea, gap, qa, a = sums.z, sums.ea, sums.gap, sums.qa, sums.a
    if SPEC.kd:
        if SPEC.choices.soften_entropy:
            ea = times(factor, ea + z * moved, MASKED)
        else:
            ea = times(factor1, ea + sums.z1 * moved, MASKED)
        if NET.grad and NET.own_kl:
            gap = times(factor, gap + z * (partner_moved - moved), MASKED)
        z = factor * z
    if SPEC.target == "soft":
        qa = times(q, moved, MASKED) + qa
    elif SPEC.smooth:
        a += q * moved
    return NetworkSums(m, z, factor1 * sums.z1, ea, gap, qa, a)


@triton.jit
def add_network(sums, own, partner, q, inside, NET: tl.constexpr, SPEC: tl.constexpr,
                MASKED: tl.constexpr):  # fmt: skip
    """Add a block of one network's Exponentials to its sums."""
    z, ea, gap, qa, a = sums.z, sums.ea, sums.gap, sums.qa, sums.a
    if SPEC.kd:
        if SPEC.choices.soften_entropy:
            ea += lane_sum(times(own.e, own.a, MASKED))
        else:
            ea += lane_sum(times(own.e1, own.a, MASKED))
        if NET.grad and NET.own_kl:
            gap += lane_sum(times(own.e, partner.a - own.a, MASKED))
        z += lane_sum(own.e)
    if SPEC.target == "soft":
        qa += lane_sum(times(q, own.a, MASKED))
    elif SPEC.smooth:
        a += lane_sum(tl.where(inside, own.a, 0.0))
    return NetworkSums(sums.m, z, sums.z1 + lane_sum(own.e1), ea, gap, qa, a)


@triton.jit
def add_target(sums, q, block, C):
    """Find the largest soft label of a block; `sums.q` is not changed."""
    largest = lane_max(tl.where(block.inside, q, float("-inf")))
    first = tl.where(block.inside & (q == largest[None, :, None]), block.cols, C)
    first = tl.min(tl.min(first, 2), 0)
    # The last block of the row is added first. So if two blocks have equal maxima, take the smaller
    # class.
    first = tl.where(largest == sums.largest, tl.minimum(first, sums.label), first)
    label = tl.where(largest >= sums.largest, first, sums.label)
    return TargetSums(sums.q, tl.maximum(sums.largest, largest), label)


@triton.jit
def add_block(sums, logits, block, batch, row, options, SPEC: tl.constexpr, MASKED: tl.constexpr):
    """Add a block of logits, a Pair of (OUTER, LANES, INNER), to each lane's RowSums."""
    STUDENT: tl.constexpr = SPEC.student
    TEACHER: tl.constexpr = SPEC.teacher
    s, t, target = sums.student, sums.teacher, sums.target
    m_s = tl.maximum(s.m, lane_max(logits.student))
    m_t = tl.maximum(t.m, lane_max(logits.teacher))
    shift_s, shift_t = shift_of(m_s, options.c), shift_of(m_t, options.c)
    moved_s = shift_of(s.m, options.c) - shift_s
    moved_t = shift_of(t.m, options.c) - shift_t
    s = rescale(s, m_s, moved_s, moved_t, target.q, options, STUDENT, SPEC, MASKED)
    t = rescale(t, m_t, moved_t, moved_s, target.q, options, TEACHER, SPEC, MASKED)
    e_s = exponentials(logits.student, shift_s[None, :, None], options, SPEC)
    e_t = exponentials(logits.teacher, shift_t[None, :, None], options, SPEC)
    q = None
    if SPEC.target == "soft":
        q = tl.load(row.soft + block.cols, block.mask, other=0.0).to(SPEC.dtype)
        target = add_target(target, q, block, batch.C)
        if SPEC.smooth:
            smoothed = q * (1.0 - options.label_smoothing) + options.smoothing_per_class
            q = tl.where(block.inside, smoothed, 0.0)
        target = TargetSums(target.q + lane_sum(q), target.largest, target.label)
    elif SPEC.smooth:
        count = target.q + lane_sum(tl.where(block.inside, 1.0, 0.0))
        target = TargetSums(count, target.largest, target.label)
    s = add_network(s, e_s, e_t, q, block.inside, STUDENT, SPEC, MASKED)
    t = add_network(t, e_t, e_s, q, block.inside, TEACHER, SPEC, MASKED)
    return RowSums(s, t, target)


@triton.jit
def merge(sums, C, options, SPEC: tl.constexpr, MASKED: tl.constexpr):
    """Merge the lanes' RowSums, (LANES,) each, into the row's, scalars."""
    STUDENT: tl.constexpr = SPEC.student
    TEACHER: tl.constexpr = SPEC.teacher
    s, t, target = sums.student, sums.teacher, sums.target
    m_s, m_t = max_lanes_2(s.m, t.m)
    moved_s = shift_of(s.m, options.c) - shift_of(m_s, options.c)
    moved_t = shift_of(t.m, options.c) - shift_of(m_t, options.c)
    s = rescale(s, m_s, moved_s, moved_t, target.q, options, STUDENT, SPEC, MASKED)
    t = rescale(t, m_t, moved_t, moved_s, target.q, options, TEACHER, SPEC, MASKED)
    zero = tl.zeros((), SPEC.dtype)
    z, ea, gap = Pair(zero, zero), Pair(zero, zero), Pair(zero, zero)
    if SPEC.kd:
        z_s, z_t, z1_s, z1_t = sum_lanes_4(s.z, t.z, s.z1, t.z1)
        ea_s, ea_t, gap_s, gap_t = sum_lanes_4(s.ea, t.ea, s.gap, t.gap)
        z, ea, gap = Pair(z_s, z_t), Pair(ea_s, ea_t), Pair(gap_s, gap_t)
    else:
        z1_s, z1_t, _, _ = sum_lanes_4(s.z1, t.z1, s.z, t.z)
    qa, a, q, largest, label = Pair(zero, zero), Pair(zero, zero), zero, zero, 0
    if SPEC.target == "soft":
        qa_s, qa_t, q, _ = sum_lanes_4(s.qa, t.qa, target.q, target.q)
        qa = Pair(qa_s, qa_t)
        largest = tl.max(target.largest)
        label = tl.min(tl.where(target.largest == largest, target.label, C))
    elif SPEC.smooth:
        a = Pair(tl.sum(s.a), tl.sum(t.a))
    return RowSums(
        NetworkSums(m_s, z.student, z1_s, ea.student, gap.student, qa.student, a.student),
        NetworkSums(m_t, z.teacher, z1_t, ea.teacher, gap.teacher, qa.teacher, a.teacher),
        TargetSums(q, largest, label),
    )


@triton.jit
def no_sums(LANES: tl.constexpr, DTYPE: tl.constexpr):
    """Return the RowSums of no class."""
    zeros = tl.zeros((LANES,), DTYPE)
    network = NetworkSums(zeros + PAD, zeros, zeros, zeros, zeros, zeros, zeros)
    target = TargetSums(zeros, zeros + float("-inf"), tl.zeros((LANES,), tl.int32))
    return RowSums(network, network, target)


@triton.jit
def load_late(networks, batch, row, SPEC: tl.constexpr):
    """Load the values that are used after the sweep.

    They are loaded right after the first blocks of logits, so they arrive together with these.
    """
    label_logit = Pair(0.0, 0.0)
    if SPEC.target == "labels":
        label_logit = load_row(networks, row, row.label, row.counted, SPEC)
    return Late(label_logit, load_row_weight(batch, row.index, row.counted, SPEC))


@triton.jit
def load_ahead(bodies, at, last, mask, LOOP: tl.constexpr):
    """Load the block that begins at ``at``.

    Past the ``last`` block, count backward from it, because the second sweep begins with it.
    """
    at = tl.maximum(tl.minimum(at, 2 * last + LOOP.block - at), 0)
    return load_block(bodies, at, mask, LOOP, "evict_last")


@triton.jit
def sum_row(networks, batch, options, row, LOOP: tl.constexpr, PREFETCH: tl.constexpr,
            SPEC: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """First sweep: return the row's RowSums, the first blocks of the second sweep, and its Late.

    PREFETCH blocks are loaded ahead, into registers, in their storage type. This requires rows of
    more than one block. (Triton's own pipeline uses shared memory and two barriers per block.) The
    last block and the edges are added separately, before the other blocks, which need no mask.

    Ignored rows are loaded too, so that no load waits for a label. If such a row has values that
    are not finite, it is computed again with MASKED.
    """
    bodies = bodies_of(networks, row, LOOP)
    mask = row.counted if MASKED else None
    last = row.body - LOOP.block
    ahead = ()
    for i in tl.static_range(PREFETCH):
        ahead = ahead + load_ahead(bodies, i * LOOP.block, last, mask, LOOP)
    sums = no_sums(LOOP.lanes, SPEC.dtype)
    if LOOP.shifted:
        edge_logits, edges = load_edges(networks, batch, row, LOOP, SPEC)
        sums = add_block(sums, edge_logits, edges, batch, row, options, SPEC, MASKED)
    tail_logits, tail = load_tail(networks, row, mask, LOOP, SPEC)
    late = load_late(networks, batch, row, SPEC)
    sums = add_block(sums, tail_logits, tail, batch, row, options, SPEC, MASKED)
    for start in tl.range(0, row.body, LOOP.block, num_stages=1):
        if PREFETCH:
            raw = (ahead[0], ahead[1])  # type: ignore[misc]
            at = start + PREFETCH * LOOP.block
            ahead = ahead[2:] + load_ahead(bodies, at, last, mask, LOOP)
        else:
            raw = load_block(bodies, start, mask, LOOP, "")
        logits = unpack_block(raw, mask, MASKED, SPEC.dtype)
        cols = classes_of(start, LOOP.outer, LOOP.lanes, LOOP.inner) + row.head
        block = Block(cols, cols < batch.C, row.counted)
        sums = add_block(sums, logits, block, batch, row, options, SPEC, MASKED)
    return merge(sums, batch.C, options, SPEC, MASKED), ahead, late
