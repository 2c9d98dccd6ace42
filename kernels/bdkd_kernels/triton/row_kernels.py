"""Device code: one pass over the logits of both networks, in Triton.

Notation of this file, for one row. ``c = log2(e) / temperature`` and ``M = max(logits) * c``:

    a  = logits * c - M         log2 of e, one fused multiply-add
    e  = 2 ** a                 exp((logits - max) / temperature);     Z  = sum e
    e1 = e ** temperature       exp(logits - max): squarings of e      Z1 = sum e1
    d  = log2 p_t - log2 p_s  = (a_t - a_s) + (log2 Z_s - log2 Z_t)

Suffix ``_s`` is the student's, ``_t`` the teacher's; values of a row are (1, ROWS, 1) in the tile
kernel and scalars in the loop kernel, so that the same helpers serve both.

Four measures keep issue slots, not only bytes, at bay. Exponentials at temperature 1 are powers of
those at ``temperature``. Gradients are multiply-adds of ``e``, ``e1`` and ``d`` with the row's own
coefficients, in which normalisers, weights and scales are folded. The label is no comparison for
every class: where stores can be ordered, its class is stored once more. And ``0 * log 0`` is not
guarded against: a masked class (-inf) makes its row's sums NaN, which is noticed once a row, and
only such a row is done again with the selects that the mathematics wants (CAREFUL), in blocks, so
that it costs the others no registers.
"""

import math
from dataclasses import dataclass

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.language.target_info import is_cuda

# A row's record: the 12 statistics in BDKDStats' order, then for the backward pass M_s, 1 / Z_s,
# 1 / Z1_s, M_t, 1 / Z_t, 1 / Z1_t, log2 Z_s / Z_t, the row's weight and the target's sum. Beside
# each other: as (fields, N) each would want an address of its own.
STATISTICS = tl.constexpr(12)
STATE = tl.constexpr(21)
RECORD = tl.constexpr(24)  # padded to three sectors of 32 bytes

if not hasattr(triton, "knobs"):
    raise ImportError(f"triton {triton.__version__} is too old")

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
LN2 = tl.constexpr(math.log(2.0))
# In the place of classes past C. A power of two, so that PAD * c - M is 0 exactly in a row of
# nothing else; finite, so that 0 * a is 0; below any logit that is not a mask.
PAD = tl.constexpr(-(2.0**100))


@dataclass(frozen=True)
class Terms:
    """What is compiled in: everything else of a call is a run-time argument."""

    student_ce: bool
    student_kd: bool
    teacher_ce: bool
    teacher_kd: bool
    target: str  # "none", "labels" or "soft"
    smooth: bool
    teacher_forward: bool  # the teacher's divergence is KL(p_t || p_s)
    soften_entropy: bool
    squarings: int  # log2(temperature) for 1, 2, 4 and 8; -1: a second exponential instead
    student_grad: bool
    teacher_grad: bool
    mean: bool
    per_row: bool  # reduction="none"
    nvidia: bool  # compiled for an NVIDIA GPU
    # A barrier orders the stores before and after it, to one address, of a program's threads. So it
    # is on NVIDIA; on AMD Triton's barrier waits for shared memory alone (seen in gfx942's code).
    ordered_stores: bool
    # A launch begins while the one before it still runs, and waits where it reads what that wrote.
    overlapped: bool = False

    @property
    def kd(self) -> bool:
        return self.student_kd or self.teacher_kd

    @property
    def label_again(self) -> bool:
        student = self.student_grad and self.student_ce
        teacher = self.teacher_grad and self.teacher_ce
        return self.ordered_stores and self.target == "labels" and (student or teacher)


@triton.jit
def _log2_e(x, c, M):
    """x * c - M with one rounding. With two, logits of 1e4 would lose 1e-3 of every exponent.

    The interpreter's fma rounds twice: there float32 goes through float64, and float64 through
    Dekker's exact product.
    """
    if not INTERPRETED and x.dtype == tl.float64:
        return tl.fma(x, tl.full((), c, tl.float64), -M)  # of a number, tl.fma makes float32
    elif not INTERPRETED:
        return tl.fma(x, c, -M)
    elif x.dtype == tl.float64:
        c = tl.full((), c, x.dtype)
        product = x * c
        x_high, c_high = _high_half(x), _high_half(c)
        x_low, c_low = x - x_high, c - c_high
        lost = ((x_high * c_high - product) + x_high * c_low + x_low * c_high) + x_low * c_low
        return (product - M) + tl.where(tl.abs(product) < float("inf"), lost, 0.0)
    else:
        return (x.to(tl.float64) * tl.full((), c, x.dtype).to(tl.float64) - M).to(x.dtype)


@triton.jit
def _shift(m, c):
    """M = m * c, rounded. On a GPU a difference of two such products would be contracted into one
    multiply-add, and 0 become the rounding of M: an addition of 0 forbids that."""
    if INTERPRETED:
        return m * c
    else:
        return tl.fma(m, tl.full((), c, m.dtype), tl.zeros_like(m))


@triton.jit
def _high_half(x):
    """The first 26 bits of a float64."""
    shifted = x * 134217729.0  # 2**27 + 1
    return shifted - (shifted - x)


@triton.jit
def _log2(x, TERMS: tl.constexpr):
    """Within 2**-22, absolute, in one instruction; tl.log2 is a polynomial on NVIDIA."""
    if TERMS.nvidia and x.dtype == tl.float32:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.log2(x)


@triton.jit
def _power(e, a, temperature, SQUARINGS: tl.constexpr):
    """e ** temperature."""
    if SQUARINGS < 0:
        return tl.exp2(a * temperature)
    else:
        for _ in tl.static_range(SQUARINGS):
            e = e * e
        return e


@triton.jit
def _times(p, x, CAREFUL: tl.constexpr):
    """p * x; where CAREFUL, 0 where p is 0, whatever x."""
    if CAREFUL:
        return tl.where(p == 0.0, 0.0, p * x)
    else:
        return p * x


@triton.jit
def _load_raw(pointers, mask, POLICY: tl.constexpr):
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
def _widen(x, mask, PADDED: tl.constexpr, DTYPE: tl.constexpr):
    """Convert what `_load_raw` returned to the type of the arithmetic; PAD outside the mask."""
    if x.dtype == tl.float16 and PADDED:  # PAD is no float16
        return tl.where(mask, x.to(DTYPE), PAD)
    elif INTERPRETED and x.dtype == tl.bfloat16:
        # The interpreter's cast changes numbers below the normal range.
        x = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
        if mask is not None:
            x = tl.where(mask, x, PAD)
        return x.to(DTYPE)
    elif x.dtype == tl.bfloat16 and tl.float32 == DTYPE and x.numel > 1 and is_cuda():
        # One instruction a number. The compiler's own cast takes two: it extracts 16 bits first.
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [x], dtype=tl.float32,
            is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return x.to(DTYPE)


@triton.jit
def _load(pointers, mask, PADDED: tl.constexpr, DTYPE: tl.constexpr):
    """Load logits, PAD outside the mask."""
    return _widen(_load_raw(pointers, mask, ""), mask, PADDED, DTYPE)


@triton.jit
def _store(pointers, x, mask, POLICY: tl.constexpr):
    """Gradients, rounded to nearest in their storage type; the interpreter alone would truncate."""
    if INTERPRETED and pointers.dtype.element_ty == tl.bfloat16:
        x = x.to(tl.float32)
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(tl.abs(x) < float("inf"), bits.to(tl.float32, bitcast=True), x)
    tl.store(pointers, x, mask, eviction_policy=POLICY)


@triton.jit
def _coefficients(
    g, in_range, mass, temperature, d1, d2, F, R, r_s, r1_s, r_t, r1_t,
    student_ce, student_kd, teacher_ce, teacher_kd, TERMS: tl.constexpr,
):  # fmt: skip
    """Factors of a row's gradients, below; ``g`` is what multiplies its losses, the
    ``r`` are the reciprocals of the ``Z``, ``mass`` is the sum of the target."""
    label = g if TERMS.target != "labels" else g + tl.where(in_range, 0.0, float("nan"))
    q_s = label * student_ce
    q_t = label * teacher_ce
    k_s = g * (student_kd * temperature)
    k_t = g * (teacher_kd * temperature)
    # A NaN of either network is in every product, even where e is 0.
    poison = 0.0 * (r_s + r_t)
    s_own = k_s * (d1 - d2 * R) * r_s
    s_d = -k_s * d2 * LN2 * r_s
    s_other = k_s * d1 * r_t + poison
    if TERMS.teacher_forward:
        t_own = -k_t * F * r_t
        t_d = k_t * LN2 * r_t
        t_other = poison
    else:
        t_own = k_t * r_t
        t_d = 0.0 * k_t
        t_other = k_t * r_s
    return q_s * mass * r1_s, q_s, s_own, s_d, s_other, q_t * mass * r1_t, q_t, t_own, t_d, t_other


@triton.jit
def _student_gradient(e_s, e1_s, e_t, d, q, k, TERMS: tl.constexpr, CAREFUL: tl.constexpr):
    """``g (CE: mass softmax - q) + (KD: d1 (p_s - p_t) + d2 p_s (log p_s - log p_t - R))``;
    ``q`` is the target, None where it is 0."""
    ce, k_q, own, k_d, other, _, _, _, _, _ = k
    x = 0.0
    if TERMS.student_ce and TERMS.target != "none":
        x = e1_s * ce
        if q is not None:
            x -= k_q * q
    if TERMS.student_kd:
        x = _times(e_s, k_d * d + own, CAREFUL) + x
        x -= e_t * other
    return x


@triton.jit
def _teacher_gradient(e_t, e1_t, e_s, d, q, k, TERMS: tl.constexpr, CAREFUL: tl.constexpr):
    _, _, _, _, _, ce, k_q, own, k_d, other = k
    x = 0.0
    if TERMS.teacher_ce and TERMS.target != "none":
        x = e1_t * ce
        if q is not None:
            x -= k_q * q
    if TERMS.teacher_kd:
        if TERMS.teacher_forward:
            x = _times(e_t, k_d * d + own, CAREFUL) + x
            if CAREFUL:
                x += other
        else:
            x = e_t * own + x
            x -= e_s * other
    return x


@triton.jit
def _row_weight(sample_weight, records, rows, counted, N, DTYPE: tl.constexpr,
                PARTS: tl.constexpr, TERMS: tl.constexpr):  # fmt: skip
    """What the row's losses are multiplied by: its weight over the denominator of the mean."""
    weight = tl.where(counted, 1.0, 0.0).to(DTYPE)
    if sample_weight is not None:
        weight = tl.where(counted, tl.load(sample_weight + rows, counted, other=0.0).to(DTYPE), 0.0)
    if TERMS.mean:
        if PARTS == 0:
            total = N.to(DTYPE)
        else:
            if TERMS.overlapped:
                gdc_wait()
            total = tl.sum(tl.load(_totals(records, N) + tl.arange(0, PARTS)))
            total = tl.where(total == 0.0, 1.0, total)
        weight = weight / total
    return weight


@triton.jit
def _totals(records, N):
    """The denominator of the mean, in PARTS, behind the records; behind it every program's sum of
    the student's losses, then of the teacher's."""
    return records + N.to(tl.int64) * RECORD


@triton.jit
def _confidence(m, M, r1, c, temperature, SQUARINGS: tl.constexpr):
    a = _log2_e(m, c, M)  # what M = m * c lost to rounding
    return _power(tl.exp2(a), a, temperature, SQUARINGS) * r1


@triton.jit
def _cross_entropy(log_z1, a_y, q_a, mean_a, mass, in_range, temperature, smoothing,
                   TERMS: tl.constexpr):  # fmt: skip
    """``mass log Z1 - sum q (logits - max)`` in nats."""
    if TERMS.target == "soft":
        return (mass * log_z1 - temperature * q_a) * LN2
    else:
        inner = a_y
        if TERMS.smooth:
            # At a smoothing of 1 the label has no part of its own, also where it is masked.
            inner = tl.where(smoothing < 1.0, (1.0 - smoothing) * a_y, 0.0) + smoothing * mean_a
        return (log_z1 - temperature * inner) * LN2 + tl.where(in_range, 0.0, float("nan"))


@triton.jit
def _store_record(records, rows, mask, FIRST: tl.constexpr, values):
    """Fields of the rows' records, from FIRST on. Rows (1, ROWS, 1) are summed over what is one:
    triton 3.6 fails to lay out a value that is both stored and needed elsewhere."""
    if len(rows.shape) == 3:
        record = records + tl.sum(tl.sum(rows, 2), 0) * RECORD + FIRST
        written = tl.max(tl.max(mask.to(tl.int32), 2), 0) != 0
        for i in tl.static_range(len(values)):
            tl.store(record + i, tl.sum(tl.sum(values[i], 2), 0), written)
    else:
        record = records + rows * RECORD + FIRST
        for i in tl.static_range(len(values)):
            tl.store(record + i, values[i], mask)


@triton.jit
def _losses(
    records, rows, counted, write, weight, temperature, F, R, H_s, H_t, CE_s, CE_t, d1, d2,
    confidence_s, confidence_t, hit_s, hit_t, student_ce, student_kd, teacher_ce, teacher_kd,
    TERMS: tl.constexpr,
):  # fmt: skip
    """Both networks' weighted losses of the rows to be written; stores the statistics."""
    values = (F, R, H_s, H_t, CE_s, CE_t, d1, d2, confidence_s, confidence_t, hit_s, hit_t)
    for i in tl.static_range(len(values)):
        value = tl.where(counted, values[i], 0.0) if TERMS.target == "labels" else values[i]
        _store_record(records, rows, write, i, (value,))
    loss_s, loss_t = 0.0, 0.0
    if TERMS.student_ce:
        loss_s += student_ce * CE_s
    if TERMS.student_kd:
        loss_s += student_kd * temperature * temperature * (d1 * F + d2 * R)
    if TERMS.teacher_ce:
        loss_t += teacher_ce * CE_t
    if TERMS.teacher_kd:
        loss_t += teacher_kd * temperature * temperature * (F if TERMS.teacher_forward else R)
    kept = counted & write
    return tl.where(kept, weight * loss_s, 0.0), tl.where(kept, weight * loss_t, 0.0)


@triton.jit
def _normalisers(m_s, m_t, Z_s, Z_t, Z1_s, Z1_t, counted, TERMS: tl.constexpr):
    """log2 Z and log2 Z1 of both, their reciprocals, the ratio Z_s / Z_t and its log2."""
    # A row of masks alone is no distribution. (PAD would pass for one.)
    Z1_s = tl.where((m_s > PAD) | (counted == 0), Z1_s, float("nan"))
    Z1_t = tl.where((m_t > PAD) | (counted == 0), Z1_t, float("nan"))
    l1_s, l1_t = _log2(Z1_s, TERMS), _log2(Z1_t, TERMS)
    r1_s, r1_t = tl.exp2(-l1_s), tl.exp2(-l1_t)
    if TERMS.squarings == 0:
        Z_s, Z_t = Z1_s, Z1_t
    else:
        Z_s, Z_t = Z_s + 0.0 * Z1_s, Z_t + 0.0 * Z1_t
    ratio = Z_s / Z_t
    log_ratio = tl.log2(ratio)  # not _log2: it is to be exact where the ratio is nearly 1
    l_s, l_t = _log2(Z_s, TERMS), _log2(Z_t, TERMS)
    return l_s, l_t, tl.exp2(-l_s), tl.exp2(-l_t), ratio, log_ratio, l1_s, l1_t, r1_s, r1_t


@triton.jit
def _entropies(S_s, S_t, l_s, l_t, r_s, r_t, l1_s, l1_t, r1_s, r1_t, temperature,
               TERMS: tl.constexpr):  # fmt: skip
    """Of both, in nats; S = sum p a, unnormalised, at the temperature that is asked for."""
    if TERMS.soften_entropy:
        return (l_s - S_s * r_s) * LN2, (l_t - S_t * r_t) * LN2
    else:
        return (l1_s - temperature * S_s * r1_s) * LN2, (l1_t - temperature * S_t * r1_t) * LN2


@triton.jit
def _earlier(rows, y, m, C, CHUNK: tl.constexpr, DTYPE: tl.constexpr):
    """Whether a class before ``y`` is as large as ``m``, as an int."""
    found = tl.zeros_like(y)
    for start in range(0, C, CHUNK):
        cols = start + tl.arange(0, CHUNK)[None, None, :]
        x = _load(rows + cols, cols < y, True, DTYPE)
        found = tl.maximum(found, tl.max((x == m).to(tl.int32), 2, keep_dims=True))
    return found


@triton.jit
def _right(s_rows, t_rows, y, in_range, s_y, t_y, m_s, m_t, confidence_s, confidence_t, C,
           CHUNK: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """Whether the first largest logit is the label's, in the shape of ``y``, (1, ROWS, 1). With an
    earlier one as large, confidence is at most a half: else there is no need to look."""
    right_s = (y >= 0) & in_range & (s_y == m_s)
    right_t = (y >= 0) & in_range & (t_y == m_t)
    tied = (right_s & (confidence_s < 0.50048828125)) | (right_t & (confidence_t < 0.50048828125))
    if tl.max(tied.to(tl.int32)) != 0:
        right_s &= _earlier(s_rows, y, m_s, C, CHUNK, DTYPE) == 0
        right_t &= _earlier(t_rows, y, m_t, C, CHUNK, DTYPE) == 0
    return right_s & (confidence_s == confidence_s), right_t & (confidence_t == confidence_t)


@triton.jit
def _smoothed_label(cols, y, smoothing, smoothing_each, DTYPE: tl.constexpr):
    # tl.full: of two Python numbers tl.where makes float32.
    return tl.where(cols == y, tl.full((), 1.0 - smoothing, DTYPE), 0.0) + smoothing_each


@triton.jit
def _store_labels(
    ds, dt, y, write, s_y, t_y, M_s, M_t, log_ratio, k, c, temperature, smoothing, smoothing_each,
    TERMS: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """The gradients of the labels' classes once more, now with the label."""
    tl.debug_barrier()  # after the other threads' stores of these very elements
    a_s, a_t = _log2_e(s_y, c, M_s), _log2_e(t_y, c, M_t)
    e_s, e_t = tl.exp2(a_s), tl.exp2(a_t)
    e1_s = _power(e_s, a_s, temperature, TERMS.squarings)
    e1_t = _power(e_t, a_t, temperature, TERMS.squarings)
    d = (a_t - a_s) + log_ratio
    q = tl.full((), (1.0 - smoothing) + smoothing_each, k[0].dtype)
    if TERMS.student_grad and TERMS.student_ce:
        _store(ds + y, _student_gradient(e_s, e1_s, e_t, d, q, k, TERMS, CAREFUL), write, "")
    if TERMS.teacher_grad and TERMS.teacher_ce:
        _store(dt + y, _teacher_gradient(e_t, e1_t, e_s, d, q, k, TERMS, CAREFUL), write, "")


@triton.jit
def _max_2(a, b):
    """Maxima over the classes, (1, ROWS, 1) each, of two (APART, ROWS, BESIDE). Joined, they take
    one exchange between warps."""
    a, b = tl.split(tl.max(tl.max(tl.join(a, b), 0), 1))
    return a[None, :, None], b[None, :, None]


@triton.jit
def _sum_of_joined(x):
    """Threads add in a tree, the interpreter one after the other: there, float64 stands in."""
    if INTERPRETED:
        return tl.sum(tl.sum(x.to(tl.float64), 0), 1).to(x.dtype)
    else:
        return tl.sum(tl.sum(x, 0), 1)


@triton.jit
def _sum_2(a, b):
    a, b = tl.split(_sum_of_joined(tl.join(a, b)))
    return a[None, :, None], b[None, :, None]


@triton.jit
def _sum_4(a, b, c, d):
    ab, cd = tl.split(_sum_of_joined(tl.join(tl.join(a, b), tl.join(c, d))))
    a, b = tl.split(ab)
    c, d = tl.split(cd)
    return a[None, :, None], b[None, :, None], c[None, :, None], d[None, :, None]


@triton.jit
def _labels(target, rows, active, C, ignore_index, TERMS: tl.constexpr):
    """The rows' labels (0 where there is none or no such class), whether they are in range, and
    whether the rows count."""
    if TERMS.target == "labels":
        y = tl.load(target + rows, active, other=0)
        in_range = (y >= 0) & (y < C)
        return tl.where(in_range, y, 0).to(tl.int32), in_range, active & (y != ignore_index)
    else:
        return (rows * 0).to(tl.int32), rows >= 0, active & (rows >= 0)


@triton.jit
def _tile(
    student, teacher, target, sample_weight, scale, ds, dt, records,
    rows, active, N, C, s_stride, t_stride, ds_stride, dt_stride,
    c, temperature, gamma, student_ce, student_kd, teacher_ce, teacher_kd,
    smoothing, smoothing_each, ignore_index,
    APART: tl.constexpr, BESIDE: tl.constexpr, CHUNK: tl.constexpr, PADDED: tl.constexpr,
    PARTS: tl.constexpr, SCALE_AT: tl.constexpr, DTYPE: tl.constexpr, TERMS: tl.constexpr,
):  # fmt: skip
    """Rows (1, ROWS, 1) that stay in registers. Returns both weighted losses and the rows whose
    sums are NaN: of these nothing was written.

    Triton lays threads along the last dimension first, then along the rows, never along the first
    where these fill a warp: so BESIDE says how many threads share a row, and each of them
    computes all of the row's own values.
    """
    cols = tl.arange(0, APART)[:, None, None] * BESIDE + tl.arange(0, BESIDE)[None, None, :]
    inside = cols < C
    y, in_range, counted = _labels(target, rows, active, C, ignore_index, TERMS)
    # With a divergence, rows to be ignored are read like the others, so that no load waits for a
    # label: all their factors are 0, and where they are not finite they come back as suspects.
    read = active if TERMS.kd else counted
    mask = (read & inside) if PADDED else read
    s_rows, t_rows = student + rows * s_stride, teacher + rows * t_stride
    s = _load(s_rows + cols, mask, PADDED, DTYPE)  # (APART, ROWS, BESIDE)
    t = _load(t_rows + cols, mask, PADDED, DTYPE)
    q = None
    q_sum = 1.0
    if TERMS.target == "soft":
        q = tl.load(target + rows * C + cols, mask, other=0.0).to(DTYPE)
        largest = tl.max(tl.max(tl.where(inside, q, float("-inf")), 0), 1)[None, :, None]
        y = tl.min(tl.min(tl.where(inside & (q == largest), cols, C - 1), 0), 1)[None, :, None]
        if TERMS.smooth:
            q = tl.where(inside, q * (1.0 - smoothing) + smoothing_each, 0.0)
        q_sum = tl.sum(tl.sum(q, 0), 1)[None, :, None]
    elif TERMS.smooth:
        q = tl.full((), smoothing_each, DTYPE)

    # Loads that would stall where they are used, behind the reductions, are issued here.
    s_y, t_y = 0.0, 0.0
    if TERMS.target != "none":
        # PAD in a row that is not read, also of fp16: 0 * exp2(0 - M) may be NaN.
        s_y = _load(s_rows + y, counted, True, DTYPE)
        t_y = _load(t_rows + y, counted, True, DTYPE)
    m_s, m_t = _max_2(s, t)
    M_s, M_t = _shift(m_s, c), _shift(m_t, c)
    a_s, a_t = _log2_e(s, c, M_s), _log2_e(t, c, M_t)
    e_s, e_t = tl.exp2(a_s), tl.exp2(a_t)
    e1_s = _power(e_s, a_s, temperature, TERMS.squarings)
    e1_t = _power(e_t, a_t, temperature, TERMS.squarings)
    if TERMS.squarings == 0:
        Z1_s, Z1_t = _sum_2(e1_s, e1_t)
        Z_s, Z_t = Z1_s, Z1_t
    else:
        Z_s, Z_t, Z1_s, Z1_t = _sum_4(e_s, e_t, e1_s, e1_t)
    l_s, l_t, r_s, r_t, ratio, log_ratio, l1_s, l1_t, r1_s, r1_t = _normalisers(
        m_s, m_t, Z_s, Z_t, Z1_s, Z1_t, counted, TERMS
    )

    weight = _row_weight(sample_weight, records, rows, counted, N, DTYPE, PARTS, TERMS)
    zero = tl.zeros_like(Z1_s)
    suspect, d = zero, 0.0
    F, R, H_s, H_t, d1, d2 = zero, zero, zero, zero, zero, zero
    if TERMS.kd:
        p_s, p_t = (e_s, e_t) if TERMS.soften_entropy else (e1_s, e1_t)
        S_s, S_t = _sum_2(p_s * a_s, p_t * a_t)
        suspect = S_s + S_t
        H_s, H_t = _entropies(
            S_s, S_t, l_s, l_t, r_s, r_t, l1_s, l1_t, r1_s, r1_t, temperature, TERMS
        )
        d1 = tl.where(H_t > H_s, tl.full((), gamma, DTYPE), 1.0)
        d2 = tl.where(H_s > H_t, tl.full((), gamma, DTYPE), 1.0)
        # Every class's p_t d + p_s - p_t is >= 0: no cancellation between classes. The very ratio
        # whose logarithm is in d brings p_t to p_s' scale, so that its rounding cancels too.
        d = (a_t - a_s) + log_ratio
        forward, reverse, excess, _ = _sum_4(e_t * d, e_s * d, e_t * ratio - e_s, e_s * d)
        F = r_t * forward * LN2 - r_s * excess
        R = r_s * (excess - reverse * LN2)

    confidence_s = _confidence(m_s, M_s, r1_s, c, temperature, TERMS.squarings)
    confidence_t = _confidence(m_t, M_t, r1_t, c, temperature, TERMS.squarings)
    CE_s, CE_t, hit_s, hit_t = zero, zero, zero, zero
    if TERMS.target != "none":
        qa_s, qa_t, mean_s, mean_t = zero, zero, zero, zero
        if TERMS.target == "soft":
            qa_s, qa_t = _sum_2(q * a_s, q * a_t)
            suspect += qa_s + qa_t
        elif TERMS.smooth:
            sum_s, sum_t = _sum_2(tl.where(inside, a_s, 0.0), tl.where(inside, a_t, 0.0))
            mean_s, mean_t = sum_s / C, sum_t / C
        if TERMS.student_ce:
            CE_s = _cross_entropy(l1_s, _log2_e(s_y, c, M_s), qa_s, mean_s, q_sum, in_range,
                                  temperature, smoothing, TERMS)  # fmt: skip
        if TERMS.teacher_ce:
            CE_t = _cross_entropy(l1_t, _log2_e(t_y, c, M_t), qa_t, mean_t, q_sum, in_range,
                                  temperature, smoothing, TERMS)  # fmt: skip
        right_s, right_t = _right(
            s_rows, t_rows, y, in_range, s_y, t_y, m_s, m_t, confidence_s, confidence_t, C, CHUNK,
            DTYPE,
        )  # fmt: skip
        hit_s, hit_t = right_s.to(DTYPE), right_t.to(DTYPE)

    write = active & (suspect == suspect)
    if TERMS.student_grad or TERMS.teacher_grad:
        k_scale = tl.load(scale).to(DTYPE) if SCALE_AT else scale
        k = _coefficients(
            tl.where(counted, weight * k_scale, 0.0), in_range | (counted == 0), q_sum, temperature,
            d1, d2, F, R, r_s, r1_s, r_t, r1_t, student_ce, student_kd, teacher_ce, teacher_kd,
            TERMS,
        )  # fmt: skip
        into = (write & inside) if PADDED else write
        if TERMS.target != "none":
            tl.debug_barrier()  # gradients may go over logits: all threads have read the label's
        if TERMS.target == "labels" and not TERMS.ordered_stores:
            q = _smoothed_label(cols, y, smoothing, smoothing_each, DTYPE)
        ds_rows, dt_rows = ds, dt
        if TERMS.student_grad:
            ds_rows = ds + rows * ds_stride
            g_s = _student_gradient(e_s, e1_s, e_t, d, q, k, TERMS, False)
            _store(ds_rows + cols, g_s, into, "")
        if TERMS.teacher_grad:
            dt_rows = dt + rows * dt_stride
            g_t = _teacher_gradient(e_t, e1_t, e_s, d, q, k, TERMS, False)
            _store(dt_rows + cols, g_t, into, "")
        if TERMS.label_again:
            _store_labels(
                ds_rows, dt_rows, y, write, s_y, t_y, M_s, M_t, log_ratio, k, c, temperature,
                smoothing, smoothing_each, TERMS, False,
            )  # fmt: skip
    state = (M_s, r_s, r1_s, M_t, r_t, r1_t, log_ratio, weight, zero + q_sum)
    _store_record(records, rows, write, STATISTICS, state)
    loss_s, loss_t = _losses(
        records, rows, counted, write, weight, temperature, F, R, H_s, H_t, CE_s, CE_t, d1, d2,
        confidence_s, confidence_t, hit_s, hit_t, student_ce, student_kd, teacher_ce, teacher_kd,
        TERMS,
    )  # fmt: skip
    return loss_s, loss_t, active & (suspect != suspect)


@triton.jit
def _block(start, OUTER: tl.constexpr, LANES: tl.constexpr, INNER: tl.constexpr):
    """Classes of a block, (OUTER, LANES, INNER). A lane takes INNER neighbours in one access."""
    outer = tl.arange(0, OUTER)[:, None, None]
    lanes = tl.arange(0, LANES)[None, :, None]
    return start + (outer * LANES + lanes) * INNER + tl.arange(0, INNER)[None, None, :]


@triton.jit
def _lane_sum(x):
    """Sum a block over each lane's classes: (OUTER, LANES, INNER) to (LANES,)."""
    return tl.sum(tl.sum(x, 2), 0)


@triton.jit
def _lane_max(x):
    return tl.max(tl.max(x, 2), 0)


@triton.jit
def _larger_2(a, b, c, d):
    return tl.maximum(a, c), tl.maximum(b, d)


@triton.jit
def _add_4(a, b, c, d, e, f, g, h):
    return a + e, b + f, c + g, d + h


@triton.jit
def _max_lanes_2(a, b):
    """Maxima over the lanes of two tensors (LANES,), in one exchange between warps."""
    if INTERPRETED:
        return tl.max(a), tl.max(b)
    else:
        return tl.reduce((a, b), 0, _larger_2)


@triton.jit
def _sum_lanes_4(a, b, c, d):
    """Sums over the lanes of four tensors (LANES,), in one exchange between warps."""
    if INTERPRETED:
        return tl.sum(a), tl.sum(b), tl.sum(c), tl.sum(d)
    else:
        return tl.reduce((a, b, c, d), 0, _add_4)


@triton.jit
def _add_block(
    sums, s, t, q_row, cols, inside, mask, C, c, temperature, smoothing, smoothing_each,
    DTYPE: tl.constexpr, TERMS: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """Add a block of logits, (OUTER, LANES, INNER), to each lane's sums; see `_row_sums`."""
    (m_s, m_t, Z_s, Z_t, Z1_s, Z1_t, S_s, S_t, x, x_t, qa_s, qa_t, mean_s, mean_t, q_sum,
     q_max, q_at) = sums  # fmt: skip
    new_s, new_t = tl.maximum(m_s, _lane_max(s)), tl.maximum(m_t, _lane_max(t))
    M_s, M_t = _shift(new_s, c), _shift(new_t, c)
    moved_s, moved_t = _shift(m_s, c) - M_s, _shift(m_t, c) - M_t
    kept_s, kept_t = tl.exp2(moved_s), tl.exp2(moved_t)
    a_s, a_t = _log2_e(s, c, M_s[None, :, None]), _log2_e(t, c, M_t[None, :, None])
    e_s, e_t = tl.exp2(a_s), tl.exp2(a_t)
    e1_s = _power(e_s, a_s, temperature, TERMS.squarings)
    e1_t = _power(e_t, a_t, temperature, TERMS.squarings)
    kept1_s = _power(kept_s, moved_s, temperature, TERMS.squarings)
    kept1_t = _power(kept_t, moved_t, temperature, TERMS.squarings)
    if TERMS.kd:
        if TERMS.soften_entropy:
            S_s = _times(kept_s, S_s + Z_s * moved_s, CAREFUL)
            S_t = _times(kept_t, S_t + Z_t * moved_t, CAREFUL)
            S_s += _lane_sum(_times(e_s, a_s, CAREFUL))
            S_t += _lane_sum(_times(e_t, a_t, CAREFUL))
        else:
            S_s = _times(kept1_s, S_s + Z1_s * moved_s, CAREFUL)
            S_t = _times(kept1_t, S_t + Z1_t * moved_t, CAREFUL)
            S_s += _lane_sum(_times(e1_s, a_s, CAREFUL))
            S_t += _lane_sum(_times(e1_t, a_t, CAREFUL))
        if TERMS.student_grad and TERMS.student_kd:
            x = _times(kept_s, x + Z_s * (moved_t - moved_s), CAREFUL)
            x += _lane_sum(_times(e_s, a_t - a_s, CAREFUL))
        if TERMS.teacher_grad and TERMS.teacher_forward:
            x_t = _times(kept_t, x_t + Z_t * (moved_t - moved_s), CAREFUL)
            x_t += _lane_sum(_times(e_t, a_t - a_s, CAREFUL))
        Z_s = kept_s * Z_s + _lane_sum(e_s)
        Z_t = kept_t * Z_t + _lane_sum(e_t)
    if TERMS.target == "soft":
        q = tl.load(q_row + cols, mask, other=0.0).to(DTYPE)
        largest = _lane_max(tl.where(inside, q, float("-inf")))
        first = tl.where(inside & (q == largest[None, :, None]), cols, C)
        first = tl.min(tl.min(first, 2), 0)
        # The last block comes first: an equal class of a later block may be an earlier one.
        first = tl.where(largest == q_max, tl.minimum(first, q_at), first)
        q_at = tl.where(largest >= q_max, first, q_at)
        q_max = tl.maximum(q_max, largest)
        if TERMS.smooth:
            q = tl.where(inside, q * (1.0 - smoothing) + smoothing_each, 0.0)
        qa_s = _times(q_sum, moved_s, CAREFUL) + qa_s + _lane_sum(_times(q, a_s, CAREFUL))
        qa_t = _times(q_sum, moved_t, CAREFUL) + qa_t + _lane_sum(_times(q, a_t, CAREFUL))
        q_sum += _lane_sum(q)
    elif TERMS.smooth:
        # q_sum counts a lane's classes here.
        mean_s += q_sum * moved_s + _lane_sum(tl.where(inside, a_s, 0.0))
        mean_t += q_sum * moved_t + _lane_sum(tl.where(inside, a_t, 0.0))
        q_sum += _lane_sum(tl.where(inside, 1.0, 0.0))
    Z1_s = kept1_s * Z1_s + _lane_sum(e1_s)
    Z1_t = kept1_t * Z1_t + _lane_sum(e1_t)
    return (new_s, new_t, Z_s, Z_t, Z1_s, Z1_t, S_s, S_t, x, x_t, qa_s, qa_t, mean_s, mean_t,
            q_sum, q_max, q_at)  # fmt: skip


@triton.jit
def _merge(sums, C, c, temperature, TERMS: tl.constexpr, CAREFUL: tl.constexpr):
    """Merge the sums of parts of a row, (PARTS,) each, into the row's: the same 17 scalars."""
    (m_s, m_t, Z_s, Z_t, Z1_s, Z1_t, S_s, S_t, x, x_t, qa_s, qa_t, mean_s, mean_t, q_sum,
     q_max, q_at) = sums  # fmt: skip
    row_m_s, row_m_t = _max_lanes_2(m_s, m_t)
    moved_s = _shift(m_s, c) - _shift(row_m_s, c)
    moved_t = _shift(m_t, c) - _shift(row_m_t, c)
    kept_s, kept_t = tl.exp2(moved_s), tl.exp2(moved_t)
    kept1_s = _power(kept_s, moved_s, temperature, TERMS.squarings)
    kept1_t = _power(kept_t, moved_t, temperature, TERMS.squarings)
    if TERMS.kd:
        if TERMS.soften_entropy:
            S_s = _times(kept_s, S_s + Z_s * moved_s, CAREFUL)
            S_t = _times(kept_t, S_t + Z_t * moved_t, CAREFUL)
        else:
            S_s = _times(kept1_s, S_s + Z1_s * moved_s, CAREFUL)
            S_t = _times(kept1_t, S_t + Z1_t * moved_t, CAREFUL)
        x = _times(kept_s, x + Z_s * (moved_t - moved_s), CAREFUL)
        x_t = _times(kept_t, x_t + Z_t * (moved_t - moved_s), CAREFUL)
    zero = tl.zeros((), Z1_s.dtype)
    Z, Z1, S, mixed = (zero, zero), (zero, zero), (zero, zero), (zero, zero)
    if TERMS.kd:
        z_s, z_t, z1_s, z1_t = _sum_lanes_4(kept_s * Z_s, kept_t * Z_t, kept1_s * Z1_s,
                                            kept1_t * Z1_t)  # fmt: skip
        Z, Z1 = (z_s, z_t), (z1_s, z1_t)
        sum_s, sum_t, sum_x, sum_x_t = _sum_lanes_4(S_s, S_t, x, x_t)
        S, mixed = (sum_s, sum_t), (sum_x, sum_x_t)
    else:
        z1_s, z1_t, _, _ = _sum_lanes_4(kept1_s * Z1_s, kept1_t * Z1_t, Z_s, Z_t)
        Z1 = (z1_s, z1_t)
    qa, mean, total, best, first = (zero, zero), (zero, zero), zero, zero, 0
    if TERMS.target == "soft":
        qa_s += _times(q_sum, moved_s, CAREFUL)
        qa_t += _times(q_sum, moved_t, CAREFUL)
        sum_qa_s, sum_qa_t, total, _ = _sum_lanes_4(qa_s, qa_t, q_sum, q_sum)
        qa = (sum_qa_s, sum_qa_t)
        best = tl.max(q_max)
        first = tl.min(tl.where(q_max == best, q_at, C))
    elif TERMS.smooth:
        mean_s += q_sum * moved_s
        mean_t += q_sum * moved_t
        mean = (tl.sum(mean_s), tl.sum(mean_t))
    return (row_m_s, row_m_t, Z[0], Z[1], Z1[0], Z1[1], S[0], S[1], mixed[0], mixed[1],
            qa[0], qa[1], mean[0], mean[1], total, best, first)  # fmt: skip


@triton.jit
def _parts(row, stride, C, STEP: tl.constexpr, INNER: tl.constexpr, SHIFTED: tl.constexpr):
    """Return ``(head, end, body)`` of a row: the classes before the first address that 16 bytes
    divide, then ``end`` classes in whole accesses of INNER, of which the first ``body`` are whole
    blocks of STEP, and the rest at most one. Rows that are not SHIFTED have no head."""
    head, end = 0, C
    if SHIFTED:
        head = ((0 - row * stride) % INNER).to(tl.int32)
        head = tl.where(head < 0, head + INNER, head)  # the remainder has the dividend's sign
        head = tl.minimum(head, C)
        end = _multiple(C - head, INNER)
    return head, end, tl.maximum(tl.cdiv(end, STEP) - 1, 0) * STEP


@triton.jit
def _edges(head, end, LANES: tl.constexpr):
    """The classes before and after whole accesses, (1, LANES, 1)."""
    at = tl.arange(0, LANES)[None, :, None]
    return tl.where(at < head, at, at + end)


@triton.jit
def _body(logits, row, stride, head, INNER: tl.constexpr, SHIFTED: tl.constexpr):
    """Pointer to a row's aligned part."""
    if SHIFTED:
        return logits + _multiple(row * stride + head, INNER)
    else:
        return logits + row * stride


@triton.jit
def _load_block(
    s_body, t_body, at, mask,
    OUTER: tl.constexpr, LANES: tl.constexpr, INNER: tl.constexpr, POLICY: tl.constexpr,
):  # fmt: skip
    """Load the block of both rows that begins at ``at``, as `_unpack` takes it."""
    return (_load_packed(s_body, at, mask, OUTER, LANES, INNER, POLICY),
            _load_packed(t_body, at, mask, OUTER, LANES, INNER, POLICY))  # fmt: skip


@triton.jit
def _load_packed(
    body, at, mask,
    OUTER: tl.constexpr, LANES: tl.constexpr, INNER: tl.constexpr, POLICY: tl.constexpr,
):  # fmt: skip
    """Load a block of one row; two numbers of bf16 as one int32, (OUTER, LANES, INNER / 2).

    A loop's variables of 16 bits would each be extracted from their register and put back.
    """
    if body.dtype.element_ty == tl.bfloat16 and INNER > 1 and mask is None:
        pairs = body.to(tl.pointer_type(tl.int32), bitcast=True)
        return tl.load(pairs + _block(at // 2, OUTER, LANES, INNER // 2), eviction_policy=POLICY)
    else:
        return _load_raw(body + _block(at, OUTER, LANES, INNER), mask, POLICY)


@triton.jit
def _unpack(x, mask, CAREFUL: tl.constexpr, DTYPE: tl.constexpr):
    """Convert what `_load_packed` returned to the type of the arithmetic."""
    if x.dtype == tl.int32:
        low = (x << 16).to(tl.float32, bitcast=True)
        high = (x & -65536).to(tl.float32, bitcast=True)
        shape: tl.constexpr = [x.shape[0], x.shape[1], 2 * x.shape[2]]
        return tl.join(low, high).reshape(shape).to(DTYPE)
    else:
        return _widen(x, mask, CAREFUL, DTYPE)


@triton.jit
def _row_sums(
    student, teacher, target, sample_weight, records, row, N, s_stride, t_stride, y, counted, C,
    c, temperature, smoothing, smoothing_each,
    OUTER: tl.constexpr, LANES: tl.constexpr, INNER: tl.constexpr,
    PREFETCH: tl.constexpr, SHIFTED: tl.constexpr, PARTS: tl.constexpr,
    DTYPE: tl.constexpr, TERMS: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """Sweep once over a row: everything of it that is a sum. Return ``(sums, ahead, later)``.

    A block is (OUTER, LANES, INNER). Each of the LANES keeps its own running maximum and sums, and
    rescales them once for the classes that it takes of a block, so no thread waits for another
    before the row's end. ``x`` sums e_s (a_t - a_s) (for R), ``x_t`` sums e_t (a_t - a_s) (for F).

    PREFETCH blocks are loaded ahead, into registers, in their storage type; ``ahead`` are the first
    of the other sweep. A row must have more than one block then. (Triton's own pipeline, through
    shared memory, costs two barriers a block.) What is no whole block comes first, so that the
    loads of the others have no mask.

    Rows to be ignored are read like the others, so that no load waits for a label; where they are
    not finite, the row is done again, CAREFUL. ``later`` is used after the sweep: both logits of
    the label, and the row's weight. Its loads come after those of the first blocks, and arrive with
    them.
    """
    zeros = tl.zeros((LANES,), DTYPE)
    lowest = zeros + PAD
    sums = (lowest, lowest, zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros,
            zeros, zeros, zeros, zeros + float("-inf"), tl.zeros((LANES,), tl.int32))  # fmt: skip
    step: tl.constexpr = OUTER * LANES * INNER
    head, end, body = _parts(row, s_stride, C, step, INNER, SHIFTED)
    s_body = _body(student, row, s_stride, head, INNER, SHIFTED)
    t_body = _body(teacher, row, t_stride, head, INNER, SHIFTED)
    q_row = target
    if TERMS.target == "soft":
        q_row = target + row * C
    mask = counted if CAREFUL else None
    last = body - step
    ahead = ()
    for i in tl.static_range(PREFETCH):
        at = tl.maximum(tl.minimum(i * step, 2 * last + step - i * step), 0)
        ahead = ahead + _load_block(s_body, t_body, at, mask, OUTER, LANES, INNER,
                                    "evict_last")  # fmt: skip
    if SHIFTED:
        edges = _edges(head, end, LANES)
        is_edge = edges < C
        read_edge = is_edge & counted  # without, fp32 spills
        s_edge = _load(student + row * s_stride + edges, read_edge, True, DTYPE)
        t_edge = _load(teacher + row * t_stride + edges, read_edge, True, DTYPE)
        sums = _add_block(sums, s_edge, t_edge, q_row, edges, is_edge, read_edge, C, c, temperature,
                          smoothing, smoothing_each, DTYPE, TERMS, CAREFUL)  # fmt: skip
    tail = _block(body, OUTER, LANES, INNER)
    is_tail = tail < end
    read = (is_tail & counted) if CAREFUL else is_tail
    s, t = _load(s_body + tail, read, True, DTYPE), _load(t_body + tail, read, True, DTYPE)
    s_y, t_y = 0.0, 0.0
    if TERMS.target == "labels":
        s_y = _load(student + row * s_stride + y, counted, True, DTYPE)  # as in _tile
        t_y = _load(teacher + row * t_stride + y, counted, True, DTYPE)
    later = (s_y, t_y, _row_weight(sample_weight, records, row, counted, N, DTYPE, PARTS, TERMS))
    sums = _add_block(sums, s, t, q_row, tail + head, is_tail, read, C, c, temperature, smoothing,
                      smoothing_each, DTYPE, TERMS, CAREFUL)  # fmt: skip
    for start in tl.range(0, body, step, num_stages=1):
        if PREFETCH:
            s_raw, t_raw = ahead[0], ahead[1]  # type: ignore[misc]
            # Past the last block it goes back: the other sweep takes the last block first.
            following = start + PREFETCH * step
            at = tl.maximum(tl.minimum(following, 2 * last + step - following), 0)
            ahead = ahead[2:] + _load_block(s_body, t_body, at, mask, OUTER, LANES, INNER,
                                            "evict_last")  # fmt: skip
        else:
            s_raw, t_raw = _load_block(s_body, t_body, start, mask, OUTER, LANES, INNER, "")
        s, t = _unpack(s_raw, mask, CAREFUL, DTYPE), _unpack(t_raw, mask, CAREFUL, DTYPE)
        cols = _block(start, OUTER, LANES, INNER) + head
        sums = _add_block(sums, s, t, q_row, cols, cols < C, counted, C, c, temperature,
                          smoothing, smoothing_each, DTYPE, TERMS, CAREFUL)  # fmt: skip
    return _merge(sums, C, c, temperature, TERMS, CAREFUL), ahead, later


@triton.jit
def _gradient_block(
    sums, s, t, cols, inside, mask, q_row, y, ds_block, dt_block, M_s, M_t, ratio, log_ratio, k,
    c, temperature, smoothing, smoothing_each,
    PADDED: tl.constexpr, DTYPE: tl.constexpr, TERMS: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """Store the gradients of a block of logits, (OUTER, LANES, INNER), and add to the lanes' sums
    of the divergences."""
    excess, forward, reverse = sums
    a_s, a_t = _log2_e(s, c, M_s), _log2_e(t, c, M_t)
    e_s, e_t = tl.exp2(a_s), tl.exp2(a_t)
    e1_s = _power(e_s, a_s, temperature, TERMS.squarings)
    e1_t = _power(e_t, a_t, temperature, TERMS.squarings)
    d = (a_t - a_s) + log_ratio
    if TERMS.kd:
        excess += _lane_sum(e_t * ratio - e_s)
        forward += _lane_sum(_times(e_t, d, CAREFUL))
        reverse += _lane_sum(_times(e_s, d, CAREFUL))
    q = None
    if TERMS.target == "soft":
        q = tl.load(q_row + cols, mask, other=0.0).to(DTYPE)
        if TERMS.smooth:
            q = q * (1.0 - smoothing) + smoothing_each
    elif TERMS.smooth:
        q = tl.full((), smoothing_each, DTYPE)
    if TERMS.target == "labels" and not TERMS.ordered_stores:
        q = _smoothed_label(cols, y, smoothing, smoothing_each, DTYPE)
    into = inside if PADDED else None
    if TERMS.student_grad:
        g_s = _student_gradient(e_s, e1_s, e_t, d, q, k, TERMS, CAREFUL)
        _store(ds_block, g_s, into, "evict_first")
    if TERMS.teacher_grad:
        g_t = _teacher_gradient(e_t, e1_t, e_s, d, q, k, TERMS, CAREFUL)
        _store(dt_block, g_t, into, "evict_first")
    return excess, forward, reverse


@triton.jit
def _row_rest(
    sums, ahead, later, student, teacher, target, scale, ds, dt, records,
    row, y, in_range, counted, C, s_stride, t_stride, ds_stride, dt_stride,
    c, temperature, gamma, student_ce, student_kd, teacher_ce, teacher_kd,
    smoothing, smoothing_each,
    OUTER: tl.constexpr, LANES: tl.constexpr, INNER: tl.constexpr,
    PREFETCH: tl.constexpr, SHIFTED: tl.constexpr,
    SCALE_AT: tl.constexpr, DTYPE: tl.constexpr, TERMS: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """The other sweep: gradients and the values of both divergences. Returns both weighted losses.

    It goes backward, so that it begins with what the first sweep left in the cache.
    """
    (m_s, m_t, Z_s, Z_t, Z1_s, Z1_t, S_s, S_t, x, x_t, qa_s, qa_t, mean_s, mean_t, q_sum,
     _, q_at) = sums  # fmt: skip
    s_y, t_y, weight = later
    if TERMS.target != "soft":
        q_sum = 1.0
    s_row, t_row = student + row * s_stride, teacher + row * t_stride
    q_row = target
    if TERMS.target == "soft":
        q_row = target + row * C
    M_s, M_t = _shift(m_s, c), _shift(m_t, c)
    l_s, l_t, r_s, r_t, ratio, log_ratio, l1_s, l1_t, r1_s, r1_t = _normalisers(
        m_s, m_t, Z_s, Z_t, Z1_s, Z1_t, counted, TERMS
    )
    zero = tl.full((), 0.0, DTYPE)
    H_s, H_t, d1, d2, R, F = zero, zero, zero, zero, zero, zero
    if TERMS.kd:
        H_s, H_t = _entropies(
            S_s, S_t, l_s, l_t, r_s, r_t, l1_s, l1_t, r1_s, r1_t, temperature, TERMS
        )
        d1 = tl.where(H_t > H_s, tl.full((), gamma, DTYPE), 1.0)
        d2 = tl.where(H_s > H_t, tl.full((), gamma, DTYPE), 1.0)
        # From moments: good enough for the gradient, not for the value.
        R = (x * r_s + log_ratio) * -LN2
        F = (x_t * r_t + log_ratio) * LN2
    k_scale = tl.load(scale).to(DTYPE) if SCALE_AT else scale
    k = _coefficients(
        tl.where(counted, weight * k_scale, 0.0), in_range | (counted == 0), q_sum, temperature,
        d1, d2, F, R, r_s, r1_s, r_t, r1_t, student_ce, student_kd, teacher_ce, teacher_kd,
        TERMS,
    )  # fmt: skip

    CE_s, CE_t, hit_s, hit_t = 0.0, 0.0, 0.0, 0.0
    confidence_s = _confidence(m_s, M_s, r1_s, c, temperature, TERMS.squarings)
    confidence_t = _confidence(m_t, M_t, r1_t, c, temperature, TERMS.squarings)
    if TERMS.target == "soft":
        y = q_at
        s_y = _load(s_row + y, counted, True, DTYPE)
        t_y = _load(t_row + y, counted, True, DTYPE)
    if TERMS.target != "none":
        if TERMS.student_ce:
            CE_s = _cross_entropy(l1_s, _log2_e(s_y, c, M_s), qa_s, mean_s / C, q_sum, in_range,
                                  temperature, smoothing, TERMS)  # fmt: skip
        if TERMS.teacher_ce:
            CE_t = _cross_entropy(l1_t, _log2_e(t_y, c, M_t), qa_t, mean_t / C, q_sum, in_range,
                                  temperature, smoothing, TERMS)  # fmt: skip
        one = tl.zeros((1, 1, 1), tl.int32)  # _right takes rows
        right_s, right_t = _right(
            s_row, t_row, y + one, in_range, s_y + one, t_y + one, m_s, m_t, confidence_s + one,
            confidence_t + one, C, LANES, DTYPE,
        )  # fmt: skip
        hit_s, hit_t = tl.max(right_s.to(DTYPE)), tl.max(right_t.to(DTYPE))

    if TERMS.kd or TERMS.student_grad or TERMS.teacher_grad:
        zeros = tl.zeros((LANES,), DTYPE)
        divergences = (zeros, zeros, zeros)
        step: tl.constexpr = OUTER * LANES * INNER
        head, end, body = _parts(row, s_stride, C, step, INNER, SHIFTED)
        s_body = _body(student, row, s_stride, head, INNER, SHIFTED)
        t_body = _body(teacher, row, t_stride, head, INNER, SHIFTED)
        ds_row, dt_row, ds_body, dt_body = s_row, t_row, s_body, t_body  # never stored to as such
        if TERMS.student_grad:
            ds_row = ds + row * ds_stride
            ds_body = _body(ds, row, ds_stride, head, INNER, SHIFTED)
        if TERMS.teacher_grad:
            dt_row = dt + row * dt_stride
            dt_body = _body(dt, row, dt_stride, head, INNER, SHIFTED)
        if TERMS.target != "none":
            tl.debug_barrier()  # as in _tile
        mask = counted if CAREFUL else None
        for done in tl.range(0, body, step, num_stages=1):
            start = body - step - done
            if PREFETCH:
                s_raw, t_raw = ahead[0], ahead[1]
                at = tl.maximum(start - PREFETCH * step, 0)
                ahead = ahead[2:] + _load_block(s_body, t_body, at, mask, OUTER, LANES, INNER,
                                                "evict_first")  # fmt: skip
            else:
                s_raw, t_raw = _load_block(s_body, t_body, start, mask, OUTER, LANES, INNER, "")
            s, t = _unpack(s_raw, mask, CAREFUL, DTYPE), _unpack(t_raw, mask, CAREFUL, DTYPE)
            cols = _block(start, OUTER, LANES, INNER)
            divergences = _gradient_block(
                divergences, s, t, cols + head, cols < C, counted, q_row, y, ds_body + cols,
                dt_body + cols, M_s, M_t, ratio, log_ratio, k, c, temperature, smoothing,
                smoothing_each, False, DTYPE, TERMS, CAREFUL,
            )  # fmt: skip
        tail = _block(body, OUTER, LANES, INNER)
        is_tail = tail < end
        read = is_tail & counted
        s, t = _load(s_body + tail, read, True, DTYPE), _load(t_body + tail, read, True, DTYPE)
        divergences = _gradient_block(
            divergences, s, t, tail + head, is_tail, read, q_row, y, ds_body + tail,
            dt_body + tail, M_s, M_t, ratio, log_ratio, k, c, temperature, smoothing,
            smoothing_each, True, DTYPE, TERMS, CAREFUL,
        )  # fmt: skip
        if SHIFTED:
            edges = _edges(head, end, LANES)
            is_edge = edges < C
            read_edge = is_edge & counted
            s_edge = _load(s_row + edges, read_edge, True, DTYPE)
            t_edge = _load(t_row + edges, read_edge, True, DTYPE)
            divergences = _gradient_block(
                divergences, s_edge, t_edge, edges, is_edge, read_edge, q_row, y, ds_row + edges,
                dt_row + edges, M_s, M_t, ratio, log_ratio, k, c, temperature, smoothing,
                smoothing_each, True, DTYPE, TERMS, CAREFUL,
            )  # fmt: skip
        if TERMS.kd:
            excess, forward, reverse = divergences
            excess, forward, reverse, _ = _sum_lanes_4(excess, forward, reverse, reverse)
            F = r_t * forward * LN2 - r_s * excess
            R = r_s * (excess - reverse * LN2)
        if TERMS.label_again:
            _store_labels(
                ds_row, dt_row, y, row >= 0, s_y, t_y, M_s, M_t, log_ratio, k, c, temperature,
                smoothing, smoothing_each, TERMS, CAREFUL,
            )  # fmt: skip
    state = (M_s, r_s, r1_s, M_t, r_t, r1_t, log_ratio, weight, q_sum)
    _store_record(records, row, True, STATISTICS, state)
    return _losses(
        records, row, counted, row >= 0, weight, temperature, F, R, H_s, H_t, CE_s, CE_t, d1, d2,
        confidence_s, confidence_t, hit_s, hit_t, student_ce, student_kd, teacher_ce, teacher_kd,
        TERMS,
    )  # fmt: skip


@triton.jit
def _row(
    student, teacher, target, sample_weight, scale, ds, dt, records,
    row, N, C, s_stride, t_stride, ds_stride, dt_stride,
    c, temperature, gamma, student_ce, student_kd, teacher_ce, teacher_kd,
    smoothing, smoothing_each, ignore_index,
    OUTER: tl.constexpr, LANES: tl.constexpr, INNER: tl.constexpr,
    PREFETCH: tl.constexpr, SHIFTED: tl.constexpr,
    PARTS: tl.constexpr, SCALE_AT: tl.constexpr, DTYPE: tl.constexpr, TERMS: tl.constexpr,
    ALWAYS_CAREFUL: tl.constexpr,
):  # fmt: skip
    """One row of any length, in two sweeps. Returns both weighted losses."""
    y, in_range, counted = _labels(target, row, row >= 0, C, ignore_index, TERMS)
    careful: tl.constexpr = ALWAYS_CAREFUL or not (TERMS.kd or TERMS.target == "soft")
    sums, ahead, later = _row_sums(
        student, teacher, target, sample_weight, records, row, N, s_stride, t_stride, y, counted, C,
        c, temperature, smoothing, smoothing_each, OUTER, LANES, INNER, PREFETCH, SHIFTED, PARTS,
        DTYPE, TERMS, careful,
    )  # fmt: skip
    suspect = sums[6] + sums[7] + sums[10] + sums[11]
    loss_s, loss_t = 0.0 * suspect, 0.0 * suspect
    if careful:
        loss_s, loss_t = _row_rest(
            sums, ahead, later, student, teacher, target, scale, ds, dt, records,
            row, y, in_range, counted, C, s_stride, t_stride, ds_stride, dt_stride,
            c, temperature, gamma, student_ce, student_kd, teacher_ce, teacher_kd,
            smoothing, smoothing_each, OUTER, LANES, INNER, PREFETCH, SHIFTED,
            SCALE_AT, DTYPE, TERMS, True,
        )  # fmt: skip
    elif suspect == suspect:
        loss_s, loss_t = _row_rest(
            sums, ahead, later, student, teacher, target, scale, ds, dt, records,
            row, y, in_range, counted, C, s_stride, t_stride, ds_stride, dt_stride,
            c, temperature, gamma, student_ce, student_kd, teacher_ce, teacher_kd,
            smoothing, smoothing_each, OUTER, LANES, INNER, PREFETCH, SHIFTED,
            SCALE_AT, DTYPE, TERMS, False,
        )  # fmt: skip
    else:
        again, nothing, _ = _row_sums(
            student, teacher, target, sample_weight, records, row, N, s_stride, t_stride, y,
            counted, C, c, temperature, smoothing, smoothing_each, OUTER, LANES, INNER, 0, SHIFTED,
            PARTS, DTYPE, TERMS, True,
        )  # fmt: skip
        loss_s, loss_t = _row_rest(
            again, nothing, later, student, teacher, target, scale, ds, dt, records,
            row, y, in_range, counted, C, s_stride, t_stride, ds_stride, dt_stride,
            c, temperature, gamma, student_ce, student_kd, teacher_ce, teacher_kd,
            smoothing, smoothing_each, OUTER, LANES, INNER, 0, SHIFTED,
            SCALE_AT, DTYPE, TERMS, True,
        )  # fmt: skip
    return loss_s, loss_t


@triton.jit
def _gradient_row(
    g_s, g_t, student, teacher, target, record, ds, dt, row, C,
    s_stride, t_stride, ds_stride, dt_stride, field,
    c, temperature, student_ce, student_kd, teacher_ce, teacher_kd,
    smoothing, smoothing_each, ignore_index,
    BLOCK: tl.constexpr, DTYPE: tl.constexpr, TERMS: tl.constexpr,
):  # fmt: skip
    """Gradients of one row, whose losses are multiplied by ``g_s`` and ``g_t``."""
    y, in_range, counted = _labels(target, row, row >= 0, C, ignore_index, TERMS)
    s_row, t_row = student + row * s_stride, teacher + row * t_stride
    F, R = tl.load(record), tl.load(record + field)
    d1, d2 = tl.load(record + 6 * field), tl.load(record + 7 * field)
    M_s, M_t = tl.load(record + 12 * field), tl.load(record + 15 * field)
    r_s, r_t = tl.load(record + 13 * field), tl.load(record + 16 * field)
    r1_s, r1_t = tl.load(record + 14 * field), tl.load(record + 17 * field)
    log_ratio = tl.load(record + 18 * field)
    weight, q_sum = tl.load(record + 19 * field), tl.load(record + 20 * field)
    k_s = _coefficients(
        tl.where(counted, weight * g_s, 0.0), in_range | (counted == 0), q_sum, temperature,
        d1, d2, F, R, r_s, r1_s, r_t, r1_t, student_ce, student_kd, teacher_ce, teacher_kd, TERMS,
    )  # fmt: skip
    k_t = _coefficients(
        tl.where(counted, weight * g_t, 0.0), in_range | (counted == 0), q_sum, temperature,
        d1, d2, F, R, r_s, r1_s, r_t, r1_t, student_ce, student_kd, teacher_ce, teacher_kd, TERMS,
    )  # fmt: skip
    for start in range(0, C, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        inside = cols < C
        s = _load(s_row + cols, inside & counted, True, DTYPE)
        t = _load(t_row + cols, inside & counted, True, DTYPE)
        a_s, a_t = _log2_e(s, c, M_s), _log2_e(t, c, M_t)
        e_s, e_t = tl.exp2(a_s), tl.exp2(a_t)
        e1_s = _power(e_s, a_s, temperature, TERMS.squarings)
        e1_t = _power(e_t, a_t, temperature, TERMS.squarings)
        d = (a_t - a_s) + log_ratio
        q = None
        if TERMS.target == "soft":
            q = tl.load(target + row * C + cols, inside, other=0.0).to(DTYPE)
            if TERMS.smooth:
                q = q * (1.0 - smoothing) + smoothing_each
        elif TERMS.target == "labels":
            q = _smoothed_label(cols, y, smoothing, smoothing_each, DTYPE)
        if TERMS.student_grad:
            g = _student_gradient(e_s, e1_s, e_t, d, q, k_s, TERMS, True)
            _store(ds + row * ds_stride + cols, g, inside, "")
        if TERMS.teacher_grad:
            g = _teacher_gradient(e_t, e1_t, e_s, d, q, k_t, TERMS, True)
            _store(dt + row * dt_stride + cols, g, inside, "")


@triton.jit
def _multiple(x, ALIGN: tl.constexpr):
    """x, and the compiler knows what divides it. (By itself it knows multiples of 16 alone, and
    rows of 1000 classes, aligned to 16 bytes as they are, would be read logit by logit.)"""
    return x // ALIGN * ALIGN


@triton.jit(do_not_specialize=["N", "ignore_index"])
def tile_kernel(
    student,  # (N, C), rows s_stride apart; likewise the teacher, ds and dt
    teacher,
    target,  # (N,) int64, (N, C) floating, or None
    sample_weight,  # (N,) or None
    ds, dt,  # gradients, or None
    student_losses,  # (N,) if TERMS.per_row, else None
    teacher_losses,
    records,  # (N, RECORD), and behind them what _totals says
    scale,  # of the gradients: 0-dim if SCALE_AT, else a number
    N, C, s_stride, t_stride, ds_stride, dt_stride,
    c, temperature, gamma, student_ce, student_kd, teacher_ce, teacher_kd,
    smoothing,  # label smoothing, and its share of each class
    smoothing_each,
    ignore_index,
    ROW_ALIGN: tl.constexpr,  # what divides all four strides; what divides C
    CLASS_ALIGN: tl.constexpr,
    ROWS: tl.constexpr, APART: tl.constexpr, BESIDE: tl.constexpr,  # classes: APART * BESIDE
    CHUNK: tl.constexpr, PADDED: tl.constexpr,
    PARTS: tl.constexpr,  # of the denominator of the mean; 0: it is N
    SCALE_AT: tl.constexpr, DTYPE: tl.constexpr, TERMS: tl.constexpr,
):  # fmt: skip
    """ROWS rows a program, each loaded once, of both networks, and kept in registers."""
    if TERMS.overlapped and not TERMS.per_row:  # else no launch of this call follows
        gdc_launch_dependents()
    C = _multiple(C, CLASS_ALIGN)
    s_stride, t_stride = _multiple(s_stride, ROW_ALIGN), _multiple(t_stride, ROW_ALIGN)
    ds_stride, dt_stride = _multiple(ds_stride, ROW_ALIGN), _multiple(dt_stride, ROW_ALIGN)
    first = tl.program_id(0).to(tl.int64) * ROWS
    rows = first + tl.arange(0, ROWS)[None, :, None]  # (1, ROWS, 1)
    loss_s, loss_t, bad = _tile(
        student, teacher, target, sample_weight, scale, ds, dt, records,
        rows, rows < N, N, C, s_stride, t_stride, ds_stride, dt_stride,
        c, temperature, gamma, student_ce, student_kd, teacher_ce, teacher_kd,
        smoothing, smoothing_each, ignore_index,
        APART, BESIDE, CHUNK, PADDED, PARTS, SCALE_AT, DTYPE, TERMS,
    )  # fmt: skip
    if TERMS.kd or TERMS.target == "soft":  # noqa: SIM102  # the outer one is for the compiler
        if tl.max(bad.to(tl.int32)) != 0:
            for i in range(ROWS):
                row = first + i
                here = rows == row
                if tl.max((bad & here).to(tl.int32)) != 0:
                    again_s, again_t = _row(
                        student, teacher, target, sample_weight, scale, ds, dt, records,
                        row, N, C, s_stride, t_stride, ds_stride, dt_stride,
                        c, temperature, gamma, student_ce, student_kd, teacher_ce, teacher_kd,
                        smoothing, smoothing_each, ignore_index,
                        1, CHUNK, 1, 0, False, PARTS, SCALE_AT, DTYPE, TERMS, True,
                    )  # fmt: skip
                    loss_s = tl.where(here, again_s, loss_s)
                    loss_t = tl.where(here, again_t, loss_t)
    if TERMS.per_row and ROWS > 1:
        tl.store(student_losses + rows, loss_s, rows < N)
        tl.store(teacher_losses + rows, loss_t, rows < N)
    else:
        _store_losses(student_losses, teacher_losses, records, N, tl.sum(loss_s), tl.sum(loss_t),
                      PARTS, TERMS)  # fmt: skip


@triton.jit
def _store_losses(student_losses, teacher_losses, records, N, loss_s, loss_t,
                  PARTS: tl.constexpr, TERMS: tl.constexpr):  # fmt: skip
    """Store the losses of one program."""
    program = tl.program_id(0)
    if TERMS.per_row:
        tl.store(student_losses + program, loss_s)
        tl.store(teacher_losses + program, loss_t)
    else:
        losses = _totals(records, N) + PARTS
        tl.store(losses + program, loss_s)
        tl.store(losses + tl.num_programs(0) + program, loss_t)


@triton.jit(do_not_specialize=["N", "ignore_index"])
def loop_kernel(
    student, teacher, target, sample_weight, ds, dt,
    student_losses, teacher_losses, records, scale,
    N, C, s_stride, t_stride, ds_stride, dt_stride,
    c, temperature, gamma, student_ce, student_kd, teacher_ce, teacher_kd,
    smoothing, smoothing_each, ignore_index,
    ROW_ALIGN: tl.constexpr, CLASS_ALIGN: tl.constexpr,
    OUTER: tl.constexpr, LANES: tl.constexpr, INNER: tl.constexpr,
    PREFETCH: tl.constexpr, SHIFTED: tl.constexpr,
    PARTS: tl.constexpr, SCALE_AT: tl.constexpr, DTYPE: tl.constexpr, TERMS: tl.constexpr,
):  # fmt: skip
    """One row a program, in blocks, of any length; the arguments are `tile_kernel`'s."""
    if TERMS.overlapped and not TERMS.per_row:  # else no launch of this call follows
        gdc_launch_dependents()
    C = _multiple(C, CLASS_ALIGN)
    s_stride, t_stride = _multiple(s_stride, ROW_ALIGN), _multiple(t_stride, ROW_ALIGN)
    ds_stride, dt_stride = _multiple(ds_stride, ROW_ALIGN), _multiple(dt_stride, ROW_ALIGN)
    row = tl.program_id(0).to(tl.int64)
    loss_s, loss_t = _row(
        student, teacher, target, sample_weight, scale, ds, dt, records,
        row, N, C, s_stride, t_stride, ds_stride, dt_stride,
        c, temperature, gamma, student_ce, student_kd, teacher_ce, teacher_kd,
        smoothing, smoothing_each, ignore_index,
        OUTER, LANES, INNER, PREFETCH, SHIFTED, PARTS, SCALE_AT, DTYPE, TERMS,
        False,
    )  # fmt: skip
    _store_losses(student_losses, teacher_losses, records, N, loss_s, loss_t, PARTS, TERMS)


@triton.jit(do_not_specialize=["N", "ignore_index"])
def totals_kernel(
    target, sample_weight, records, N, ignore_index,
    LABELS: tl.constexpr, BLOCK: tl.constexpr, OVERLAPPED: tl.constexpr,
):  # fmt: skip
    """Before: the weights of the rows that count, added up, a part a program."""
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
    tl.store(_totals(records, N) + tl.program_id(0), tl.sum(part))


@triton.jit(do_not_specialize=["N", "count"])
def sum_kernel(
    student, teacher, records, N, count,
    PARTS: tl.constexpr, BLOCK: tl.constexpr, OVERLAPPED: tl.constexpr,
):  # fmt: skip
    """After: one program adds up what ``count`` others left, in float64 and always in the same
    order."""
    if OVERLAPPED:
        gdc_wait()
    losses = _totals(records, N) + PARTS
    sum_s, sum_t = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        sum_s += tl.load(losses + at, at < count, other=0.0).to(tl.float64)
        sum_t += tl.load(losses + count + at, at < count, other=0.0).to(tl.float64)
    tl.store(student, tl.sum(sum_s))
    tl.store(teacher, tl.sum(sum_t))


@triton.jit(do_not_specialize=["N", "ignore_index"])
def gradient_kernel(
    student, teacher, target, state, student_upstream, teacher_upstream, ds, dt, announced,
    N, C, s_stride, t_stride, ds_stride, dt_stride,
    state_row, state_field,  # strides of the state, a record a row
    student_upstream_stride, teacher_upstream_stride,  # 0: one for all rows
    c, temperature, student_ce, student_kd, teacher_ce, teacher_kd, smoothing, smoothing_each,
    ignore_index,
    BLOCK: tl.constexpr, ANNOUNCED: tl.constexpr, DTYPE: tl.constexpr, TERMS: tl.constexpr,
):  # fmt: skip
    """Gradients from the logits and the rows' records. Rows whose upstream is ``announced`` (0-dim
    where ANNOUNCED is "tensor", not there where it is "none") have theirs, and are left alone."""
    g_s, g_t = tl.zeros((), DTYPE), tl.zeros((), DTYPE)
    for at in range(tl.program_id(0).to(tl.int64), N, tl.num_programs(0)):
        row = tl.cast(at, tl.int64)  # the interpreter's is Python's
        if TERMS.student_grad:
            g_s = tl.load(student_upstream + row * student_upstream_stride).to(DTYPE)
        if TERMS.teacher_grad:
            g_t = tl.load(teacher_upstream + row * teacher_upstream_stride).to(DTYPE)
        stale = True
        if ANNOUNCED != "none":
            scale = tl.load(announced).to(DTYPE) if ANNOUNCED == "tensor" else announced
            stale = ((g_s != scale) & TERMS.student_grad) | ((g_t != scale) & TERMS.teacher_grad)
        if stale:
            _gradient_row(
                g_s, g_t, student, teacher, target, state + row * state_row, ds, dt, row, C,
                s_stride, t_stride, ds_stride, dt_stride, state_field,
                c, temperature, student_ce, student_kd, teacher_ce, teacher_kd,
                smoothing, smoothing_each, ignore_index, BLOCK, DTYPE, TERMS,
            )  # fmt: skip
