"""The kernel for rows of any length: one row per program, read twice in blocks.

The first sweep (loop_sums.py) sums over the classes. The second sweep stores the gradients and
computes the values of the divergences. It goes backward through the row and starts with the
blocks that the first sweep left in the cache.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from .loop_blocks import (
    Block,
    Row,
    bodies_of,
    body_of,
    classes_of,
    load_block,
    load_edges,
    load_row,
    load_tail,
    split_row,
    unpack_block,
)
from .loop_sums import lane_sum, sum_lanes_4, sum_row
from .row_io import (
    load_labels,
    multiple_of,
    store_gradient,
    store_program_losses,
)
from .row_math import (
    LN2,
    Divergences,
    balance,
    coefficients,
    confidence,
    cross_entropy,
    divergence_values,
    entropy,
    exponentials,
    gradient,
    is_correct,
    shift_of,
    smoothed_label,
    softmaxes_of,
    store_label_gradients,
    times,
)
from .row_results import row_stats, store_row
from .spec import Batch, Network, Pair


class Values(NamedTuple):
    """The values of a row between the sweeps."""

    softmaxes: Any
    kl: Any  # Divergences, from moments: precise enough for the gradient, not for the value
    ce: Any  # Pair
    confidences: Any  # Pair
    correct: Any  # Pair
    label: Any
    label_logit: Any  # Pair
    target_sum: Any


@triton.jit
def gradient_block(sums, logits, block, outputs, batch, row, softmaxes, k, options,
                   PADDED: tl.constexpr, SPEC: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """Store the gradients of a block of logits to ``outputs``, a Pair of pointers.

    Adds to the lanes' sums of the divergences.
    """
    STUDENT: tl.constexpr = SPEC.student
    TEACHER: tl.constexpr = SPEC.teacher
    excess, forward, reverse = sums
    s = exponentials(logits.student, softmaxes.student.shift, options, SPEC)
    t = exponentials(logits.teacher, softmaxes.teacher.shift, options, SPEC)
    d = (t.a - s.a) + softmaxes.log_ratio
    if SPEC.kd:
        excess += lane_sum(t.e * softmaxes.ratio - s.e)
        forward += lane_sum(times(t.e, d, MASKED))
        reverse += lane_sum(times(s.e, d, MASKED))
    q = None
    if SPEC.target == "soft":
        q = tl.load(row.soft + block.cols, block.mask, other=0.0).to(SPEC.dtype)
        if SPEC.smooth:
            q = q * (1.0 - options.label_smoothing) + options.smoothing_per_class
    elif SPEC.smooth:
        q = tl.full((), options.smoothing_per_class, SPEC.dtype)
    if SPEC.target == "labels" and not SPEC.ordered_stores:
        q = smoothed_label(block.cols, row.label, options, SPEC.dtype)
    mask = block.inside if PADDED else None
    if SPEC.student.grad:
        x = gradient(s, t, d, q, k.student, STUDENT, MASKED)
        store_gradient(outputs.student, x, mask, "evict_first")
    if SPEC.teacher.grad:
        x = gradient(t, s, -d, q, k.teacher, TEACHER, MASKED)
        store_gradient(outputs.teacher, x, mask, "evict_first")
    return excess, forward, reverse


@triton.jit
def row_divergences(sums, softmaxes, options, SPEC: tl.constexpr):
    """Return the row's Divergences from its RowSums."""
    zero = tl.full((), 0.0, SPEC.dtype)
    if SPEC.kd:
        s, t = softmaxes.student, softmaxes.teacher
        H_s = entropy(sums.student.ea, s, options, SPEC)
        H_t = entropy(sums.teacher.ea, t, options, SPEC)
        d1, d2 = balance(H_s, H_t, options, SPEC)
        R = (sums.student.gap * s.inv_z + softmaxes.log_ratio) * -LN2
        F = (sums.teacher.gap * t.inv_z - softmaxes.log_ratio) * -LN2
        return Divergences(F, R, H_s, H_t, d1, d2)
    else:
        return Divergences(zero, zero, zero, zero, zero, zero)


@triton.jit
def row_values(sums, late, networks, batch, row, options, LOOP: tl.constexpr, SPEC: tl.constexpr):
    """Return the row's Values from its RowSums."""
    s, t = sums.student, sums.teacher
    shift = Pair(shift_of(s.m, options.c), shift_of(t.m, options.c))
    softmaxes = softmaxes_of(Pair(s.m, t.m), shift, Pair(s.z, t.z), Pair(s.z1, t.z1), row.counted,
                             SPEC)  # fmt: skip
    kl = row_divergences(sums, softmaxes, options, SPEC)
    confidences = Pair(confidence(s.m, softmaxes.student, options, SPEC),
                       confidence(t.m, softmaxes.teacher, options, SPEC))  # fmt: skip
    logit_rows = Pair(networks.student.logits + row.index * networks.student.stride,
                      networks.teacher.logits + row.index * networks.teacher.stride)  # fmt: skip
    y, label_logit, target_sum = row.label, late.label_logit, 1.0
    if SPEC.target == "soft":
        y, target_sum = sums.target.label, sums.target.q
        label_logit = load_row(networks, row, y, row.counted, SPEC)
    ce_s, ce_t, correct = 0.0, 0.0, Pair(0.0, 0.0)
    if SPEC.target != "none":
        if SPEC.student.ce:
            ce_s = cross_entropy(softmaxes.student, label_logit.student, s.qa, s.a / batch.C,
                                 target_sum, row.in_range, options, SPEC)  # fmt: skip
        if SPEC.teacher.ce:
            ce_t = cross_entropy(softmaxes.teacher, label_logit.teacher, t.qa, t.a / batch.C,
                                 target_sum, row.in_range, options, SPEC)  # fmt: skip
        one = tl.zeros((1, 1, 1), tl.int32)  # is_correct takes rows of shape (1, ROWS, 1)
        right = is_correct(
            logit_rows, y + one, row.in_range,
            Pair(label_logit.student + one, label_logit.teacher + one), Pair(s.m, t.m),
            Pair(confidences.student + one, confidences.teacher + one), batch.C, LOOP.lanes,
            SPEC.dtype,
        )  # fmt: skip
        correct = Pair(tl.max(right.student.to(SPEC.dtype)), tl.max(right.teacher.to(SPEC.dtype)))
    return Values(softmaxes, kl, Pair(ce_s, ce_t), confidences, correct, y, label_logit, target_sum)


@triton.jit
def output_pointers(networks, row, LOOP: tl.constexpr, SPEC: tl.constexpr):
    """Return a Pair of pointers to the rows of the gradients, and a Pair to their aligned parts."""
    s, t = networks.student, networks.teacher
    # Pointers of a network without a gradient are placeholders and never used.
    rows, bodies = Pair(s.logits, t.logits), Pair(s.logits, t.logits)
    if SPEC.student.grad:
        rows = Pair(s.gradient + row.index * s.gradient_stride, rows.teacher)
        bodies = Pair(body_of(s.gradient, s.gradient_stride, row, LOOP), bodies.teacher)
    if SPEC.teacher.grad:
        rows = Pair(rows.student, t.gradient + row.index * t.gradient_stride)
        bodies = Pair(bodies.student, body_of(t.gradient, t.gradient_stride, row, LOOP))
    return rows, bodies


@triton.jit
def store_gradients(networks, batch, options, row, ahead, values, k, LOOP: tl.constexpr,
                    PREFETCH: tl.constexpr, SPEC: tl.constexpr,
                    MASKED: tl.constexpr):  # fmt: skip
    """Second sweep: store both gradients of the row. Returns the row's F and R."""
    softmaxes = values.softmaxes
    bodies = bodies_of(networks, row, LOOP)
    output_rows, outputs = output_pointers(networks, row, LOOP, SPEC)
    if SPEC.target != "none":
        # Gradients may overwrite logits. Wait until all threads have read the label's logit.
        tl.debug_barrier()
    lanes: tl.constexpr = LOOP.lanes
    zeros = tl.zeros((lanes,), SPEC.dtype)
    sums = (zeros, zeros, zeros)
    mask = row.counted if MASKED else None
    for done in tl.range(0, row.body, LOOP.block, num_stages=1):
        start = row.body - LOOP.block - done
        if PREFETCH:
            raw = (ahead[0], ahead[1])
            at = tl.maximum(start - PREFETCH * LOOP.block, 0)
            ahead = ahead[2:] + load_block(bodies, at, mask, LOOP, "evict_first")
        else:
            raw = load_block(bodies, start, mask, LOOP, "")
        logits = unpack_block(raw, mask, MASKED, SPEC.dtype)
        cols = classes_of(start, LOOP.outer, LOOP.lanes, LOOP.inner)
        block = Block(cols + row.head, cols < batch.C, row.counted)
        pointers = Pair(outputs.student + cols, outputs.teacher + cols)
        sums = gradient_block(sums, logits, block, pointers, batch, row, softmaxes, k, options,
                              False, SPEC, MASKED)  # fmt: skip
    tail_logits, tail = load_tail(networks, row, row.counted, LOOP, SPEC)
    at_tail = tail.cols - row.head
    pointers_tail = Pair(outputs.student + at_tail, outputs.teacher + at_tail)
    sums = gradient_block(sums, tail_logits, tail, pointers_tail, batch, row, softmaxes, k, options,
                          True, SPEC, MASKED)  # fmt: skip
    if LOOP.shifted:
        edge_logits, edges = load_edges(networks, batch, row, LOOP, SPEC)
        pointers_edge = Pair(output_rows.student + edges.cols, output_rows.teacher + edges.cols)
        sums = gradient_block(sums, edge_logits, edges, pointers_edge, batch, row, softmaxes, k,
                              options, True, SPEC, MASKED)  # fmt: skip
    F, R = values.kl.forward, values.kl.reverse
    if SPEC.kd:
        excess, forward, reverse, _ = sum_lanes_4(sums[0], sums[1], sums[2], sums[2])
        F, R = divergence_values(forward, reverse, excess, softmaxes)
    if SPEC.stores_label_again:
        store_label_gradients(output_rows, values.label, row.index >= 0, values.label_logit,
                              softmaxes, k, options, SPEC, MASKED)  # fmt: skip
    return F, R


@triton.jit
def finish_row(sums, ahead, late, networks, batch, options, row, LOOP: tl.constexpr,
               PREFETCH: tl.constexpr, SPEC: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """Compute the results of a row from its RowSums. Returns both weighted losses."""
    values = row_values(sums, late, networks, batch, row, options, LOOP, SPEC)
    row = Row(row.index, row.soft, values.label, row.in_range, row.counted, row.head, row.end,
              row.body)  # fmt: skip
    kl = values.kl
    scale = tl.load(batch.scale).to(SPEC.dtype) if SPEC.scale_is_tensor else batch.scale
    g = tl.where(row.counted, late.weight * scale, 0.0)
    in_range = row.in_range | (row.counted == 0)
    k = coefficients(Pair(g, g), values.softmaxes, in_range, values.target_sum, kl,
                     options, SPEC)  # fmt: skip
    if SPEC.kd or SPEC.grads:
        F, R = store_gradients(networks, batch, options, row, ahead, values, k, LOOP, PREFETCH,
                               SPEC, MASKED)  # fmt: skip
        kl = Divergences(F, R, kl.student_entropy, kl.teacher_entropy, kl.forward_weight,
                         kl.reverse_weight)  # fmt: skip
    stats = row_stats(kl, values.ce, values.confidences, values.correct)
    return store_row(batch, row.index, row.counted, row.index >= 0, late.weight,
                     values.target_sum, stats, values.softmaxes, options, SPEC)  # fmt: skip


@triton.jit
def compute_long_row(networks, batch, options, index, LOOP: tl.constexpr, SPEC: tl.constexpr,
                     MASKED: tl.constexpr):  # fmt: skip
    """Compute row ``index`` in two sweeps. Returns both weighted losses.

    A row with a NaN in its sums is computed again, MASKED.
    """
    y, in_range, counted = load_labels(batch, index, index >= 0, options, SPEC)
    soft = batch.target
    if SPEC.target == "soft":
        soft = batch.target + index * batch.C
    head, end, body = split_row(index, networks.student.stride, batch.C, LOOP)
    row = Row(index, soft, y, in_range, counted, head, end, body)
    masked: tl.constexpr = MASKED or not SPEC.has_nan_if_masked
    sums, ahead, late = sum_row(networks, batch, options, row, LOOP, LOOP.prefetch, SPEC, masked)
    nan = sums.student.ea + sums.teacher.ea + sums.student.qa + sums.teacher.qa
    losses = Pair(0.0 * nan, 0.0 * nan)
    if masked:
        losses = finish_row(sums, ahead, late, networks, batch, options, row, LOOP, LOOP.prefetch,
                            SPEC, True)  # fmt: skip
    elif nan == nan:
        losses = finish_row(sums, ahead, late, networks, batch, options, row, LOOP, LOOP.prefetch,
                            SPEC, False)  # fmt: skip
    else:
        sums, nothing, _ = sum_row(networks, batch, options, row, LOOP, 0, SPEC, True)
        losses = finish_row(sums, nothing, late, networks, batch, options, row, LOOP, 0, SPEC,
                            True)  # fmt: skip
    return losses


@triton.jit(do_not_specialize=["N"])
def loop_kernel(
    student, teacher, target, sample_weight, ds, dt,
    student_losses,  # (N,) if SPEC.choices.reduction is "none", else None
    teacher_losses,
    records, scale, N, C, s_stride, t_stride, ds_stride, dt_stride,
    loss_options,  # Options; Triton has an argument `options`
    LOOP: tl.constexpr,  # a launch_table.Loop
    SPEC: tl.constexpr,
):  # fmt: skip
    """Compute one row per program. See spec.py for the arguments."""
    if SPEC.next_starts_early:
        gdc_launch_dependents()
    C = multiple_of(C, SPEC.class_alignment)
    networks = Pair(
        Network(student, multiple_of(s_stride, SPEC.row_alignment),
                ds, multiple_of(ds_stride, SPEC.row_alignment)),
        Network(teacher, multiple_of(t_stride, SPEC.row_alignment),
                dt, multiple_of(dt_stride, SPEC.row_alignment)),
    )  # fmt: skip
    batch = Batch(target, sample_weight, scale, records, N, C)
    index = tl.program_id(0).to(tl.int64)
    losses = compute_long_row(networks, batch, loss_options, index, LOOP, SPEC, False)
    store_program_losses(Pair(student_losses, teacher_losses), records, N, losses.student,
                         losses.teacher, SPEC)  # fmt: skip
