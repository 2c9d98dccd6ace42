"""The mathematics of a row: softmax, entropies, divergences, losses and gradients.

For one row of one network, with ``c = log2(e) / temperature``::

    shift = max(logits) * c
    a     = logits * c - shift       log2 of e, one fused multiply-add
    e     = 2 ** a                   exp((logits - max) / temperature),    z  = sum e
    e1    = e ** temperature         exp(logits - max): squarings of e,    z1 = sum e1
    p     = e / z

    d     = log2 p_t - log2 p_s = (a_t - a_s) + log2(z_s / z_t)
    F     = KL(p_t || p_s) = sum [p_t d + p_s - p_t]      (times ln 2)
    R     = KL(p_s || p_t) = sum [p_t - p_s - p_s d]      (times ln 2)

Both kernels use the same functions: a row's values have shape (1, ROWS, 1) in the tile kernel and
are scalars in the loop kernel. A function of one network calls the network ``own`` and the other
network its ``partner``.

By default, ``0 * log 0`` is NaN. So a masked class (-inf) makes sums of its row NaN. Only a row
with such a NaN is computed again with MASKED, which selects 0 where a probability is 0.
"""

import math
from typing import Any, NamedTuple

import triton
import triton.language as tl

from .row_io import INTERPRETED, PAD, load_logits, store_gradient
from .spec import Pair

LN2 = tl.constexpr(math.log(2.0))


class Exponentials(NamedTuple):
    """The exponentials of one network's logits; see the docstring of the module."""

    a: Any
    e: Any
    e1: Any


class Softmax(NamedTuple):
    """One network's normalisers of a row."""

    shift: Any
    z: Any
    log_z: Any  # log2
    inv_z: Any
    log_z1: Any  # log2
    inv_z1: Any


class Softmaxes(NamedTuple):
    """Both networks' normalisers of a row."""

    student: Any  # Softmax
    teacher: Any  # Softmax
    ratio: Any  # z_student / z_teacher
    log_ratio: Any  # log2 of ratio


class Divergences(NamedTuple):
    """The divergences of a row, the entropies (both in nats), and the weights d1 and d2."""

    forward: Any  # KL(p_t || p_s)
    reverse: Any  # KL(p_s || p_t)
    student_entropy: Any
    teacher_entropy: Any
    forward_weight: Any  # d1
    reverse_weight: Any  # d2


class Coefficients(NamedTuple):
    """One network's gradient is a sum of these, each times a value of the class."""

    softmax: Any  # times e1
    target: Any  # times the target, subtracted
    own: Any  # times e
    log_ratio: Any  # times e and d
    partner: Any  # times the partner's e, subtracted


# -- exponentials ----------------------------------------------------------------------------------


@triton.jit
def log2_of_e(x, c, shift):
    """Return x * c - shift, rounded once.

    Rounding twice would change each exponent by up to 1e-3 for logits of 1e4. The interpreter's fma
    rounds twice. There, this function computes float32 in float64, and float64 with Dekker's exact
    product.
    """
    if not INTERPRETED and x.dtype == tl.float64:
        return tl.fma(x, tl.full((), c, tl.float64), -shift)  # tl.fma makes a number float32
    elif not INTERPRETED:
        return tl.fma(x, c, -shift)
    elif x.dtype == tl.float64:
        c = tl.full((), c, x.dtype)
        product = x * c
        x_high, c_high = high_half(x), high_half(c)
        x_low, c_low = x - x_high, c - c_high
        lost = ((x_high * c_high - product) + x_high * c_low + x_low * c_high) + x_low * c_low
        return (product - shift) + tl.where(tl.abs(product) < float("inf"), lost, 0.0)
    else:
        return (x.to(tl.float64) * tl.full((), c, x.dtype).to(tl.float64) - shift).to(x.dtype)


@triton.jit
def high_half(x):
    """Return the first 26 bits of a float64."""
    shifted = x * 134217729.0  # 2**27 + 1
    return shifted - (shifted - x)


@triton.jit
def shift_of(m, c):
    """Return m * c, rounded.

    The addition of 0 prevents the compiler from fusing the difference of two such products into a
    multiply-add. Then the difference of equal products would be a rounding error instead of 0.
    """
    if INTERPRETED:
        return m * c
    else:
        return tl.fma(m, tl.full((), c, m.dtype), tl.zeros_like(m))


@triton.jit
def power(e, a, temperature, SQUARINGS: tl.constexpr):
    """Return e ** temperature."""
    if SQUARINGS < 0:
        return tl.exp2(a * temperature)
    else:
        for _ in tl.static_range(SQUARINGS):
            e = e * e
        return e


@triton.jit
def exponentials(x, shift, options, SPEC: tl.constexpr):
    a = log2_of_e(x, options.c, shift)
    e = tl.exp2(a)
    return Exponentials(a, e, power(e, a, options.temperature, SPEC.squarings))


@triton.jit
def fast_log2(x, SPEC: tl.constexpr):
    """Return log2(x), with an absolute error of at most 2**-22.

    On NVIDIA this takes one instruction in float32, where tl.log2 evaluates a polynomial.
    """
    if SPEC.nvidia and x.dtype == tl.float32:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.log2(x)


@triton.jit
def times(p, x, MASKED: tl.constexpr):
    """Return p * x. If MASKED, it is 0 where p is 0, for every x."""
    if MASKED:
        return tl.where(p == 0.0, 0.0, p * x)
    else:
        return p * x


# -- the values of a row ---------------------------------------------------------------------------


@triton.jit
def softmax_of(m, shift, z, z1, counted, SPEC: tl.constexpr):
    """Return the Softmax of one network, from the maximum of a row and its sums."""
    # If every class of a row is masked, the result is NaN: the maximum is then -inf or PAD.
    z1 = tl.where((m > PAD) | (counted == 0), z1, float("nan"))
    log_z1 = fast_log2(z1, SPEC)
    z = z1 if SPEC.squarings == 0 else z + 0.0 * z1
    log_z = fast_log2(z, SPEC)
    return Softmax(shift, z, log_z, tl.exp2(-log_z), log_z1, tl.exp2(-log_z1))


@triton.jit
def softmaxes_of(m, shift, z, z1, counted, SPEC: tl.constexpr):
    """Return the Softmaxes of a row. ``m``, ``shift``, ``z`` and ``z1`` are Pairs."""
    s = softmax_of(m.student, shift.student, z.student, z1.student, counted, SPEC)
    t = softmax_of(m.teacher, shift.teacher, z.teacher, z1.teacher, counted, SPEC)
    ratio = s.z / t.z
    # tl.log2 rather than fast_log2: it must be exact where the ratio is nearly 1.
    return Softmaxes(s, t, ratio, tl.log2(ratio))


@triton.jit
def entropy(sum_ea, own, options, SPEC: tl.constexpr):
    """Return the entropy in nats, from sum e a or (soften_entropy=False) sum e1 a."""
    if SPEC.choices.soften_entropy:
        return (own.log_z - sum_ea * own.inv_z) * LN2
    else:
        return (own.log_z1 - options.temperature * sum_ea * own.inv_z1) * LN2


@triton.jit
def balance(H_s, H_t, options, SPEC: tl.constexpr):
    """Return the weights d1 of the forward and d2 of the reverse KL, by the entropy gap."""
    gamma = tl.full((), options.gamma, SPEC.dtype)
    return tl.where(H_t > H_s, gamma, 1.0), tl.where(H_s > H_t, gamma, 1.0)


@triton.jit
def divergence_values(forward, reverse, excess, softmaxes):
    """Return F and R in nats, from sum e_t d, sum e_s d and sum (e_t ratio - e_s).

    The term p_t d + p_s - p_t of every class is >= 0, so no digits cancel between classes. The same
    rounded ratio is used in d and to scale e_t in ``excess``, so its rounding error cancels.
    """
    s, t = softmaxes.student, softmaxes.teacher
    F = t.inv_z * forward * LN2 - s.inv_z * excess
    R = s.inv_z * (excess - reverse * LN2)
    return F, R


@triton.jit
def confidence(m, own, options, SPEC: tl.constexpr):
    """Return the largest probability at temperature 1."""
    a = log2_of_e(m, options.c, own.shift)  # the rounding error of the shift
    return power(tl.exp2(a), a, options.temperature, SPEC.squarings) * own.inv_z1


@triton.jit
def cross_entropy(own, label_logit, sum_qa, mean_a, target_sum, in_range, options,
                  SPEC: tl.constexpr):  # fmt: skip
    """Return sum q * log z1 - sum q (logits - max), in nats."""
    # The interpreter turns a number that is assigned to a name into a float32 tensor.
    if SPEC.target == "soft":
        return (target_sum * own.log_z1 - options.temperature * sum_qa) * LN2
    else:
        inner = log2_of_e(label_logit, options.c, own.shift)
        if SPEC.smooth:
            # With a smoothing of 1, the label's own part is 0, even if its class is masked.
            label_part = (1.0 - options.label_smoothing) * inner
            inner = tl.where(options.label_smoothing < 1.0, label_part, 0.0)
            inner += options.label_smoothing * mean_a
        valid = tl.where(in_range, 0.0, float("nan"))
        return (own.log_z1 - options.temperature * inner) * LN2 + valid


@triton.jit
def has_earlier(rows, y, m, C, CHUNK: tl.constexpr, DTYPE: tl.constexpr):
    """Return whether the logit of a class before ``y`` equals the maximum ``m``, as an int."""
    found = tl.zeros_like(y)
    for start in range(0, C, CHUNK):
        cols = start + tl.arange(0, CHUNK)[None, None, :]
        x = load_logits(rows + cols, cols < y, True, DTYPE)
        found = tl.maximum(found, tl.max((x == m).to(tl.int32), 2, keep_dims=True))
    return found


@triton.jit
def is_correct(rows, y, in_range, label_logit, m, confidences, C, CHUNK: tl.constexpr,
               DTYPE: tl.constexpr):  # fmt: skip
    """Return a Pair: whether the label is the argmax, in the shape of ``y``.

    ``y`` is (1, ROWS, 1); rows, label_logit, m and confidences are Pairs. An earlier class can have
    an equal logit only if the confidence is at most a half. Only then the row is read again.
    """
    s = (y >= 0) & in_range & (label_logit.student == m.student)
    t = (y >= 0) & in_range & (label_logit.teacher == m.teacher)
    half = 0.50048828125  # a half, plus a margin for rounding
    tied = (s & (confidences.student < half)) | (t & (confidences.teacher < half))
    if tl.max(tied.to(tl.int32)) != 0:
        s &= has_earlier(rows.student, y, m.student, C, CHUNK, DTYPE) == 0
        t &= has_earlier(rows.teacher, y, m.teacher, C, CHUNK, DTYPE) == 0
    # A NaN is never correct.
    s &= confidences.student == confidences.student
    t &= confidences.teacher == confidences.teacher
    return Pair(s, t)


# -- gradients -------------------------------------------------------------------------------------


@triton.jit
def network_coefficients(g, ce, kd, own, partner, in_range, target_sum, own_kl, partner_kl,
                         own_weight, partner_weight, options, NET: tl.constexpr,
                         SPEC: tl.constexpr):  # fmt: skip
    """Return one network's Coefficients.

    ``g`` is the factor of the row's loss. ``ce`` and ``kd`` are the weights of its terms.
    ``own_kl`` is KL(own || partner) and ``partner_kl`` is KL(partner || own). The coefficients
    include all normalisers, weights and scales, which are thus multiplied once per row.
    """
    label = g if SPEC.target != "labels" else g + tl.where(in_range, 0.0, float("nan"))
    q = label * ce
    k = g * (kd * options.temperature)
    # A NaN of either network reaches every product, even where e is 0.
    poison = 0.0 * (own.inv_z + partner.inv_z)
    of_own = partner_weight if NET.partner_kl else 0.0
    of_log_ratio = 0.0 * k
    if NET.own_kl:
        of_own = of_own - own_weight * own_kl
        of_log_ratio = -k * own_weight * LN2 * own.inv_z
    of_partner = poison
    if NET.partner_kl:
        of_partner = k * partner_weight * partner.inv_z + poison
    return Coefficients(
        q * target_sum * own.inv_z1, q, k * of_own * own.inv_z, of_log_ratio, of_partner
    )


@triton.jit
def coefficients(g, softmaxes, in_range, target_sum, kl, options, SPEC: tl.constexpr):
    """Return both networks' Coefficients. ``g`` is a Pair, ``kl`` the row's Divergences."""
    STUDENT: tl.constexpr = SPEC.student
    TEACHER: tl.constexpr = SPEC.teacher
    s, t = softmaxes.student, softmaxes.teacher
    student = network_coefficients(
        g.student, options.student_ce, options.student_kd, s, t, in_range, target_sum, kl.reverse,
        kl.forward, kl.reverse_weight, kl.forward_weight, options, STUDENT, SPEC,
    )  # fmt: skip
    teacher = network_coefficients(
        g.teacher, options.teacher_ce, options.teacher_kd, t, s, in_range, target_sum, kl.forward,
        kl.reverse, 1.0, 1.0, options, TEACHER, SPEC,
    )  # fmt: skip
    return Pair(student, teacher)


@triton.jit
def gradient(own, partner, d, q, k, NET: tl.constexpr, MASKED: tl.constexpr):
    """Return one network's gradient of some classes. ``q`` is their target, or None if it is 0.

    It is ``g CE' + temperature (w_p (p - p_partner) + w_o p (log p - log p_partner - KL))``, with
    ``d`` the log2 of the partner's over its own probabilities.
    """
    x = 0.0
    if NET.ce:
        x = own.e1 * k.softmax
        if q is not None:
            x -= k.target * q
    if NET.kd:
        of_own = k.log_ratio * d + k.own if NET.own_kl else k.own
        x = times(own.e, of_own, NET.own_kl and MASKED) + x
        if NET.partner_kl or MASKED:
            x -= partner.e * k.partner
    return x


@triton.jit
def smoothed_label(cols, y, options, DTYPE: tl.constexpr):
    """Return the label as a distribution over the classes ``cols``."""
    # tl.full, because tl.where of two Python numbers is float32.
    label = tl.full((), 1.0 - options.label_smoothing, DTYPE)
    return tl.where(cols == y, label, 0.0) + options.smoothing_per_class


@triton.jit
def store_label_gradients(rows, y, stored, label_logit, softmaxes, k, options, SPEC: tl.constexpr,
                          MASKED: tl.constexpr):  # fmt: skip
    """Store the gradients of the labels' classes again, now with the target's term.

    The alternative, comparing every class with the label, would take issue slots in every class.
    """
    STUDENT: tl.constexpr = SPEC.student
    TEACHER: tl.constexpr = SPEC.teacher
    tl.debug_barrier()  # wait for the stores of other threads to these elements
    s = exponentials(label_logit.student, softmaxes.student.shift, options, SPEC)
    t = exponentials(label_logit.teacher, softmaxes.teacher.shift, options, SPEC)
    d = (t.a - s.a) + softmaxes.log_ratio
    q = tl.full((), (1.0 - options.label_smoothing) + options.smoothing_per_class, SPEC.dtype)
    if SPEC.student.grad and SPEC.student.ce:
        x = gradient(s, t, d, q, k.student, STUDENT, MASKED)
        store_gradient(rows.student + y, x, stored, "")
    if SPEC.teacher.grad and SPEC.teacher.ce:
        x = gradient(t, s, -d, q, k.teacher, TEACHER, MASKED)
        store_gradient(rows.teacher + y, x, stored, "")
