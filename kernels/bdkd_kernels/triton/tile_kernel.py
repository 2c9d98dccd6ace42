"""The kernel for rows that stay in registers: each logit is loaded once, each gradient stored once.

A program has TILE.rows rows of up to TILE.block classes, as tensors of shape (BLOCK_OUTER, ROWS,
BLOCK_INNER). The class of an element is ``outer * BLOCK_INNER + inner``. Triton distributes threads
along the last dimension first, then along the rows, and not along the first dimension if the other
two fill a warp. So BLOCK_INNER decides how many threads share a row. Each of these threads computes
all values of the row, which have shape (1, ROWS, 1).
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from .loop_kernel import compute_long_row
from .row_io import (
    INTERPRETED,
    load_labels,
    load_logits,
    load_row_weight,
    multiple_of,
    store_gradient,
    store_program_losses,
)
from .row_math import (
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
)
from .row_results import row_stats, store_row
from .spec import Batch, Network, Pair


class Tile(NamedTuple):
    """Indices and masks of a program's elements."""

    rows: Any  # (1, ROWS, 1)
    cols: Any  # (BLOCK_OUTER, 1, BLOCK_INNER)
    inside: Any  # whether cols are classes
    active: Any  # whether rows are rows of the batch
    counted: Any  # whether rows count in the loss: active and not ignored
    in_range: Any  # whether the rows' labels are classes


class Target(NamedTuple):
    """The target of each row."""

    q: Any  # soft labels, or the part of each class in a smoothed label; None: 0
    sum: Any  # of the target: 1 for a label
    label: Any  # of a soft label, its first largest class


@triton.jit
def max_2(a, b):
    """Return a Pair of the maxima over the classes.

    The two tensors are joined, so that the threads exchange both values in one step.
    """
    a, b = tl.split(tl.max(tl.max(tl.join(a, b), 0), 1))
    return Pair(a[None, :, None], b[None, :, None])


@triton.jit
def sum_joined(x):
    """Sum over the classes. Threads add in a tree; the interpreter adds in order, in float64."""
    if INTERPRETED:
        return tl.sum(tl.sum(x.to(tl.float64), 0), 1).to(x.dtype)
    else:
        return tl.sum(tl.sum(x, 0), 1)


@triton.jit
def sum_2(a, b):
    a, b = tl.split(sum_joined(tl.join(a, b)))
    return Pair(a[None, :, None], b[None, :, None])


@triton.jit
def sum_4(a, b, c, d):
    ab, cd = tl.split(sum_joined(tl.join(tl.join(a, b), tl.join(c, d))))
    a, b = tl.split(ab)
    c, d = tl.split(cd)
    return a[None, :, None], b[None, :, None], c[None, :, None], d[None, :, None]


@triton.jit
def load_target(batch, tile, y, mask, options, SPEC: tl.constexpr):
    """Return the rows' Target, if it is soft or smoothed; ``y`` are their labels."""
    if SPEC.target == "soft":
        cols, inside = tile.cols, tile.inside
        q = tl.load(batch.target + tile.rows * batch.C + cols, mask, other=0.0).to(SPEC.dtype)
        largest = tl.max(tl.max(tl.where(inside, q, float("-inf")), 0), 1)[None, :, None]
        first = tl.where(inside & (q == largest), cols, batch.C - 1)
        first = tl.min(tl.min(first, 0), 1)[None, :, None]
        if SPEC.smooth:
            smoothed = q * (1.0 - options.label_smoothing) + options.smoothing_per_class
            q = tl.where(inside, smoothed, 0.0)
        return Target(q, tl.sum(tl.sum(q, 0), 1)[None, :, None], first)
    else:
        return Target(tl.full((), options.smoothing_per_class, SPEC.dtype), 1.0, y)


@triton.jit
def load_label_logits(rows, y, counted, SPEC: tl.constexpr):
    """Load both logits of the labels ``y``.

    They are loaded together with the other logits. After the reductions, the threads would have to
    wait for them.
    """
    if SPEC.target == "none":
        return Pair(0.0, 0.0)
    else:
        # PAD in a row that does not count, in fp16 too: 0 * exp2(0 - shift) may be NaN.
        return Pair(load_logits(rows.student + y, counted, True, SPEC.dtype),
                    load_logits(rows.teacher + y, counted, True, SPEC.dtype))  # fmt: skip


@triton.jit
def tile_softmaxes(s_logits, t_logits, m, counted, options, SPEC: tl.constexpr):
    """Return both networks' Exponentials, and the rows' Softmaxes; ``m`` is a Pair of maxima."""
    shift = Pair(shift_of(m.student, options.c), shift_of(m.teacher, options.c))
    s = exponentials(s_logits, shift.student, options, SPEC)
    t = exponentials(t_logits, shift.teacher, options, SPEC)
    if SPEC.squarings == 0:
        z1 = sum_2(s.e1, t.e1)
        z = z1
    else:
        z_s, z_t, z1_s, z1_t = sum_4(s.e, t.e, s.e1, t.e1)
        z, z1 = Pair(z_s, z_t), Pair(z1_s, z1_t)
    return s, t, softmaxes_of(m, shift, z, z1, counted, SPEC)


@triton.jit
def tile_moments(s, t, target, tile, zero, SPEC: tl.constexpr):
    """Return Pairs of sum e a (soften_entropy=False: sum e1 a) and of sum q a.

    The first is for the entropies. The second is for the cross entropies: q is the soft label, or 1
    for label smoothing. The threads exchange both in one step. After it, only d needs a.
    """
    NEEDS_QA: tl.constexpr = SPEC.target == "soft" or SPEC.smooth
    if SPEC.target == "soft":
        qa_s, qa_t = target.q * s.a, target.q * t.a
    elif SPEC.smooth:
        qa_s, qa_t = tl.where(tile.inside, s.a, 0.0), tl.where(tile.inside, t.a, 0.0)
    if SPEC.kd:
        if SPEC.choices.soften_entropy:
            ea_s, ea_t = s.e * s.a, t.e * t.a
        else:
            ea_s, ea_t = s.e1 * s.a, t.e1 * t.a
        if NEEDS_QA:
            ea_s, ea_t, qa_s, qa_t = sum_4(ea_s, ea_t, qa_s, qa_t)
            return Pair(ea_s, ea_t), Pair(qa_s, qa_t)
        else:
            return sum_2(ea_s, ea_t), Pair(zero, zero)
    elif NEEDS_QA:
        return Pair(zero, zero), sum_2(qa_s, qa_t)
    else:
        return Pair(zero, zero), Pair(zero, zero)


@triton.jit
def tile_divergences(s, t, sum_ea, softmaxes, options, SPEC: tl.constexpr):
    """Return the rows' Divergences, and each class's d."""
    zero = tl.zeros_like(softmaxes.student.z)
    if SPEC.kd:
        H_s = entropy(sum_ea.student, softmaxes.student, options, SPEC)
        H_t = entropy(sum_ea.teacher, softmaxes.teacher, options, SPEC)
        d1, d2 = balance(H_s, H_t, options, SPEC)
        d = (t.a - s.a) + softmaxes.log_ratio
        excess = t.e * softmaxes.ratio - s.e
        forward, reverse, excess, _ = sum_4(t.e * d, s.e * d, excess, s.e * d)
        F, R = divergence_values(forward, reverse, excess, softmaxes)
        return Divergences(F, R, H_s, H_t, d1, d2), d
    else:
        return Divergences(zero, zero, zero, zero, zero, zero), 0.0


@triton.jit
def tile_cross_entropies(sum_qa, target, tile, label_logit, softmaxes, C, options,
                         SPEC: tl.constexpr):  # fmt: skip
    """Return a Pair of cross entropies."""
    zero = tl.zeros_like(softmaxes.student.z)
    student, teacher = zero, zero
    if SPEC.student.ce:
        student = cross_entropy(softmaxes.student, label_logit.student, sum_qa.student,
                                sum_qa.student / C, target.sum, tile.in_range, options,
                                SPEC)  # fmt: skip
    if SPEC.teacher.ce:
        teacher = cross_entropy(softmaxes.teacher, label_logit.teacher, sum_qa.teacher,
                                sum_qa.teacher / C, target.sum, tile.in_range, options,
                                SPEC)  # fmt: skip
    return Pair(student, teacher)


@triton.jit
def store_tile_gradients(networks, s, t, d, target, tile, stored, label_logit, softmaxes, k,
                         options, PADDED: tl.constexpr, SPEC: tl.constexpr):  # fmt: skip
    """Store both gradients of the rows that the mask ``stored`` selects."""
    STUDENT: tl.constexpr = SPEC.student
    TEACHER: tl.constexpr = SPEC.teacher
    mask = (stored & tile.inside) if PADDED else stored
    if SPEC.target != "none":
        # Gradients may overwrite logits. Wait until all threads have read the label's logit.
        tl.debug_barrier()
    q = target.q
    if SPEC.target == "labels" and not SPEC.ordered_stores:
        q = smoothed_label(tile.cols, target.label, options, SPEC.dtype)
    ds, dt = networks.student.gradient, networks.teacher.gradient
    if SPEC.student.grad:
        ds = ds + tile.rows * networks.student.gradient_stride
        x = gradient(s, t, d, q, k.student, STUDENT, False)
        store_gradient(ds + tile.cols, x, mask, "")
    if SPEC.teacher.grad:
        dt = dt + tile.rows * networks.teacher.gradient_stride
        x = gradient(t, s, -d, q, k.teacher, TEACHER, False)
        store_gradient(dt + tile.cols, x, mask, "")
    if SPEC.stores_label_again:
        store_label_gradients(Pair(ds, dt), target.label, stored, label_logit, softmaxes, k,
                              options, SPEC, False)  # fmt: skip


@triton.jit
def compute_tile(networks, batch, options, rows, PADDED: tl.constexpr, TILE: tl.constexpr,
                 SPEC: tl.constexpr):  # fmt: skip
    """Compute the rows (1, ROWS, 1).

    Returns both weighted losses, and a mask of the rows with a NaN, for which nothing was stored.
    """
    outer = tl.arange(0, TILE.outer)[:, None, None]
    cols = outer * TILE.inner + tl.arange(0, TILE.inner)[None, None, :]
    inside, active = cols < batch.C, rows < batch.N
    y, in_range, counted = load_labels(batch, rows, active, options, SPEC)
    tile = Tile(rows, cols, inside, active, counted, in_range)
    # With a divergence, ignored rows are loaded too, so that no load waits for a label. Their
    # losses and gradients are multiplied by 0. If they are not finite, they are computed again.
    read = active if SPEC.kd else counted
    mask = (read & inside) if PADDED else read
    logit_rows = Pair(networks.student.logits + rows * networks.student.stride,
                      networks.teacher.logits + rows * networks.teacher.stride)  # fmt: skip
    s_logits = load_logits(logit_rows.student + cols, mask, PADDED, SPEC.dtype)
    t_logits = load_logits(logit_rows.teacher + cols, mask, PADDED, SPEC.dtype)
    target = Target(None, 1.0, y)
    if SPEC.target == "soft" or SPEC.smooth:
        target = load_target(batch, tile, y, mask, options, SPEC)
    label_logit = load_label_logits(logit_rows, target.label, counted, SPEC)
    m = max_2(s_logits, t_logits)
    s, t, softmaxes = tile_softmaxes(s_logits, t_logits, m, counted, options, SPEC)
    weight = load_row_weight(batch, rows, counted, SPEC)
    zero = tl.zeros_like(weight)
    sum_ea, sum_qa = tile_moments(s, t, target, tile, zero, SPEC)
    has_nan = zero
    if SPEC.kd:
        has_nan += sum_ea.student + sum_ea.teacher
    if SPEC.target == "soft":
        has_nan += sum_qa.student + sum_qa.teacher
    kl, d = tile_divergences(s, t, sum_ea, softmaxes, options, SPEC)
    confidences = Pair(confidence(m.student, softmaxes.student, options, SPEC),
                       confidence(m.teacher, softmaxes.teacher, options, SPEC))  # fmt: skip
    ce, correct = Pair(zero, zero), Pair(zero, zero)
    if SPEC.target != "none":
        ce = tile_cross_entropies(sum_qa, target, tile, label_logit, softmaxes, batch.C, options,
                                  SPEC)  # fmt: skip
        right = is_correct(logit_rows, target.label, in_range, label_logit, m, confidences,
                           batch.C, TILE.chunk, SPEC.dtype)  # fmt: skip
        correct = Pair(right.student.to(SPEC.dtype), right.teacher.to(SPEC.dtype))
    stored = active & (has_nan == has_nan)
    if SPEC.grads:
        scale = tl.load(batch.scale).to(SPEC.dtype) if SPEC.scale_is_tensor else batch.scale
        g = tl.where(counted, weight * scale, 0.0)
        k = coefficients(Pair(g, g), softmaxes, in_range | (counted == 0), target.sum,
                         kl, options, SPEC)  # fmt: skip
        store_tile_gradients(networks, s, t, d, target, tile, stored, label_logit, softmaxes, k,
                             options, PADDED, SPEC)  # fmt: skip
    stats = row_stats(kl, ce, confidences, correct)
    losses = store_row(batch, rows, counted, stored, weight, zero + target.sum, stats,
                       softmaxes, options, SPEC)  # fmt: skip
    return losses, active & (has_nan != has_nan)


@triton.jit(do_not_specialize=["N"])
def tile_kernel(
    student, teacher, target, sample_weight, ds, dt,
    student_losses,  # (N,) if SPEC.choices.reduction is "none", else None
    teacher_losses,
    records, scale, N, C, s_stride, t_stride, ds_stride, dt_stride,
    loss_options,  # Options; Triton has an argument `options`
    PADDED: tl.constexpr,  # whether TILE.block is larger than C
    TILE: tl.constexpr,  # a launch_table.Tile
    SPEC: tl.constexpr,
):  # fmt: skip
    """Compute TILE.rows rows per program. See spec.py for the arguments."""
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
    first = tl.program_id(0).to(tl.int64) * TILE.rows
    rows = first + tl.arange(0, TILE.rows)[None, :, None]  # (1, ROWS, 1)
    losses, has_nan = compute_tile(networks, batch, loss_options, rows, PADDED, TILE, SPEC)
    RETRY: tl.constexpr = TILE.retry
    loss_s, loss_t = losses.student, losses.teacher
    if SPEC.has_nan_if_masked:  # noqa: SIM102  # evaluated at compile time
        if tl.max(has_nan.to(tl.int32)) != 0:
            for i in range(TILE.rows):
                row = first + i
                here = rows == row
                if tl.max((has_nan & here).to(tl.int32)) != 0:
                    again = compute_long_row(networks, batch, loss_options, row, RETRY, SPEC, True)
                    loss_s = tl.where(here, again.student, loss_s)
                    loss_t = tl.where(here, again.teacher, loss_t)
    if SPEC.choices.reduction == "none" and TILE.rows > 1:
        tl.store(student_losses + rows, loss_s, rows < N)
        tl.store(teacher_losses + rows, loss_t, rows < N)
    else:
        store_program_losses(Pair(student_losses, teacher_losses), records, N, tl.sum(loss_s),
                             tl.sum(loss_t), SPEC)  # fmt: skip
