"""The backward pass: gradients from the logits and the rows' records."""

import triton
import triton.language as tl

from .row_io import load_labels, load_logits, store_gradient
from .row_math import (
    Divergences,
    Softmax,
    Softmaxes,
    coefficients,
    exponentials,
    gradient,
    smoothed_label,
)
from .spec import NUM_FIELDS, NUM_STATISTICS, Batch, Network, Pair, RowState, RowStats


@triton.jit
def load_record(record, field_stride):
    """Return the RowStats and RowState of a row."""
    values = ()
    for i in tl.static_range(NUM_FIELDS):
        values += (tl.load(record + i * field_stride),)  # type: ignore[assignment]
    return RowStats(*values[:NUM_STATISTICS]), RowState(*values[NUM_STATISTICS:])


@triton.jit
def store_gradient_row(g, networks, batch, options, record, field_stride, row,
                       BLOCK: tl.constexpr, SPEC: tl.constexpr):  # fmt: skip
    """Store the gradients of one row. ``g`` is a Pair of upstream gradients."""
    STUDENT: tl.constexpr = SPEC.student
    TEACHER: tl.constexpr = SPEC.teacher
    y, in_range, counted = load_labels(batch, row, row >= 0, options, SPEC)
    stats, state = load_record(record, field_stride)
    softmaxes = Softmaxes(
        Softmax(state.student_shift, 1.0, 0.0, state.student_inv_z, 0.0, state.student_inv_z1),
        Softmax(state.teacher_shift, 1.0, 0.0, state.teacher_inv_z, 0.0, state.teacher_inv_z1),
        1.0,
        state.log_ratio,
    )
    kl = Divergences(stats.forward_kl, stats.reverse_kl, stats.student_entropy,
                     stats.teacher_entropy, stats.forward_weight, stats.reverse_weight)  # fmt: skip
    g = Pair(tl.where(counted, state.weight * g.student, 0.0),
             tl.where(counted, state.weight * g.teacher, 0.0))  # fmt: skip
    k = coefficients(g, softmaxes, in_range | (counted == 0), state.target_sum, kl,
                     options, SPEC)  # fmt: skip
    s_row = networks.student.logits + row * networks.student.stride
    t_row = networks.teacher.logits + row * networks.teacher.stride
    for start in range(0, batch.C, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        inside = cols < batch.C
        s_logits = load_logits(s_row + cols, inside & counted, True, SPEC.dtype)
        t_logits = load_logits(t_row + cols, inside & counted, True, SPEC.dtype)
        s = exponentials(s_logits, softmaxes.student.shift, options, SPEC)
        t = exponentials(t_logits, softmaxes.teacher.shift, options, SPEC)
        d = (t.a - s.a) + softmaxes.log_ratio
        q = None
        if SPEC.target == "soft":
            q = tl.load(batch.target + row * batch.C + cols, inside, other=0.0).to(SPEC.dtype)
            if SPEC.smooth:
                q = q * (1.0 - options.label_smoothing) + options.smoothing_per_class
        elif SPEC.target == "labels":
            q = smoothed_label(cols, y, options, SPEC.dtype)
        if SPEC.student.grad:
            x = gradient(s, t, d, q, k.student, STUDENT, True)
            ds = networks.student.gradient + row * networks.student.gradient_stride
            store_gradient(ds + cols, x, inside, "")
        if SPEC.teacher.grad:
            x = gradient(t, s, -d, q, k.teacher, TEACHER, True)
            dt = networks.teacher.gradient + row * networks.teacher.gradient_stride
            store_gradient(dt + cols, x, inside, "")


@triton.jit(do_not_specialize=["N"])
def gradient_kernel(
    student, teacher, target, state, student_upstream, teacher_upstream, ds, dt, assumed,
    N, C, s_stride, t_stride, ds_stride, dt_stride,
    state_row, state_field,  # strides of the state: from row to row, from field to field
    student_upstream_stride, teacher_upstream_stride,  # 0: one upstream gradient for all rows
    loss_options,  # Options; Triton has an argument `options`
    BLOCK: tl.constexpr, ASSUMED: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """Recompute the gradients for an upstream gradient that the forward pass did not assume.

    Rows whose upstream gradient equals ``assumed`` are skipped, because their gradients are already
    stored. ASSUMED is "number", "tensor" (0-dim) or "none".
    """
    networks = Pair(
        Network(student, s_stride, ds, ds_stride),
        Network(teacher, t_stride, dt, dt_stride),
    )
    batch = Batch(target, None, None, None, N, C)
    g_s, g_t = tl.zeros((), SPEC.dtype), tl.zeros((), SPEC.dtype)
    for at in range(tl.program_id(0).to(tl.int64), N, tl.num_programs(0)):
        row = tl.cast(at, tl.int64)  # in the interpreter, `at` is a Python int
        if SPEC.student.grad:
            g_s = tl.load(student_upstream + row * student_upstream_stride).to(SPEC.dtype)
        if SPEC.teacher.grad:
            g_t = tl.load(teacher_upstream + row * teacher_upstream_stride).to(SPEC.dtype)
        stale = True
        if ASSUMED != "none":
            scale = tl.load(assumed).to(SPEC.dtype) if ASSUMED == "tensor" else assumed
            stale = (g_s != scale) & SPEC.student.grad | (g_t != scale) & SPEC.teacher.grad
        if stale:
            record = state + row * state_row
            store_gradient_row(Pair(g_s, g_t), networks, batch, loss_options, record, state_field,
                               row, BLOCK, SPEC)  # fmt: skip
