"""The outputs of a row: its statistics, its state for the backward pass, its losses."""

import triton
import triton.language as tl

from .row_io import store_record
from .spec import NUM_STATISTICS, Pair, RowState, RowStats


@triton.jit
def network_loss(ce_weight, kd_weight, ce, own_kl, partner_kl, options, NET: tl.constexpr):
    """Return one network's loss. ``own_kl`` and ``partner_kl`` are already weighted by d1, d2."""
    loss = 0.0
    if NET.ce:
        loss += ce_weight * ce
    if NET.kd:
        if NET.own_kl and NET.partner_kl:
            kl = partner_kl + own_kl
        else:
            kl = own_kl if NET.own_kl else partner_kl
        loss += kd_weight * options.temperature * options.temperature * kl
    return loss


@triton.jit
def row_stats(kl, ce, confidences, correct):
    """Return the RowStats of a row from its Divergences and Pairs of the other statistics."""
    return RowStats(
        forward_kl=kl.forward,
        reverse_kl=kl.reverse,
        student_entropy=kl.student_entropy,
        teacher_entropy=kl.teacher_entropy,
        student_ce=ce.student,
        teacher_ce=ce.teacher,
        forward_weight=kl.forward_weight,
        reverse_weight=kl.reverse_weight,
        student_confidence=confidences.student,
        teacher_confidence=confidences.teacher,
        student_correct=correct.student,
        teacher_correct=correct.teacher,
    )


@triton.jit
def store_row(batch, rows, counted, stored, weight, target_sum, stats, softmaxes, options,
              SPEC: tl.constexpr):  # fmt: skip
    """Store the records of the rows, and return a Pair: their weighted losses."""
    STUDENT: tl.constexpr = SPEC.student
    TEACHER: tl.constexpr = SPEC.teacher
    s, t = softmaxes.student, softmaxes.teacher
    state = RowState(
        s.shift, s.inv_z, s.inv_z1, t.shift, t.inv_z, t.inv_z1, softmaxes.log_ratio, weight,
        target_sum,
    )  # fmt: skip
    store_record(batch.records, rows, stored, NUM_STATISTICS, state)
    for i in tl.static_range(len(stats)):
        value = tl.where(counted, stats[i], 0.0) if SPEC.target == "labels" else stats[i]
        store_record(batch.records, rows, stored, i, (value,))
    forward, reverse = stats.forward_kl, stats.reverse_kl
    student = network_loss(
        options.student_ce, options.student_kd, stats.student_ce, stats.reverse_weight * reverse,
        stats.forward_weight * forward, options, STUDENT,
    )  # fmt: skip
    teacher = network_loss(
        options.teacher_ce, options.teacher_kd, stats.teacher_ce, forward, reverse, options, TEACHER
    )
    kept = counted & stored
    return Pair(tl.where(kept, weight * student, 0.0), tl.where(kept, weight * teacher, 0.0))
