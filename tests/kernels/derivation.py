"""A second derivation of the loss in NumPy float64: losses, statistics, closed-form gradients.

It shares no code with ``reference.py``, whose gradients come from autograd.

Conventions: a class of probability 0 adds nothing to a sum and has no gradient (0 log 0 = 0). If a
term reads a network whose logits are not a distribution (NaN, +inf, only -inf), the whole row of
its gradient is NaN.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class Derived(NamedTuple):
    student: Array  # () or (N,)
    teacher: Array
    stats: dict[str, Array]  # (N,) each
    ds: Array  # (N, C): gradient of student, times the upstream gradient
    dt: Array


def softmax(x: Array, tau: float) -> tuple[Array, Array]:
    """Return the probabilities and their logarithms."""
    z = (x - x.max(-1, keepdims=True)) / tau
    e = np.exp(z)
    total = e.sum(-1, keepdims=True)
    return e / total, z - np.log(total)


def dot(p: Array, x: Array) -> Array:
    """Return sum p x, with 0 * x = 0 for every x."""
    return times(p, x).sum(-1)


def times(p: Array, x: Array) -> Array:
    return np.where(p == 0, 0.0, p * x)


def targets(target: NDArray | None, n: int, classes: int, smoothing: float) -> Array | None:
    """Return the target distribution q of the cross entropy, ``(N, C)``. NaN for a bad label."""
    if target is None:
        return None
    if target.dtype.kind == "f":
        q = target.astype(np.float64)
    else:
        q = np.zeros((n, classes))
        for row, label in enumerate(target):
            if 0 <= label < classes:
                q[row, label] = 1.0
            else:
                q[row] = np.nan
    return (1 - smoothing) * q + smoothing / classes


@np.errstate(all="ignore")
def derive(
    s: Array,  # (N, C)
    t: Array,  # (N, C)
    target: NDArray | None,  # (N,) integers or (N, C) floats
    sample_weight: Array | None = None,  # (N,)
    upstream: tuple[Array | float, Array | float] = (1.0, 1.0),  # () or (N,)
    *,
    temperature: float = 1.0,
    gamma: float = 2.0,
    student_ce: float = 1.0,
    student_kd: float = 1.0,
    teacher_ce: float = 1.0,
    teacher_kd: float = 1.0,
    teacher_divergence: str = "reverse",
    soften_entropy: bool = True,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    grad_scale: float = 1.0,
) -> Derived:
    n, classes = s.shape
    tau = temperature
    labels = target is not None and target.dtype.kind != "f"
    counted = target != ignore_index if labels else np.ones(n, dtype=bool)

    zero = np.zeros(n)
    stats = {}
    loss_s, loss_t = zero.copy(), zero.copy()
    ds, dt = np.zeros_like(s), np.zeros_like(t)

    p_s, log_p_s = softmax(s, tau)
    p_t, log_p_t = softmax(t, tau)
    kd = student_kd > 0 or teacher_kd > 0
    F = dot(p_t, log_p_t - log_p_s)
    R = dot(p_s, log_p_s - log_p_t)
    at = tau if soften_entropy else 1.0
    H_s = -dot(*softmax(s, at))
    H_t = -dot(*softmax(t, at))
    d1, d2 = np.ones(n), np.ones(n)
    d1[H_t > H_s] = gamma
    d2[H_s > H_t] = gamma

    names = ("forward_kl", "reverse_kl", "student_entropy", "teacher_entropy",
             "forward_weight", "reverse_weight")  # fmt: skip
    for name, value in zip(names, (F, R, H_s, H_t, d1, d2), strict=True):
        stats[name] = value if kd else zero

    # NaN in rows in which a network's logits are not a distribution, else 0.
    no_student = np.where(np.isnan(log_p_s).any(-1, keepdims=True), np.nan, 0.0)
    no_pair = no_student + np.where(np.isnan(log_p_t).any(-1, keepdims=True), np.nan, 0.0)
    if student_kd > 0:
        ds += no_pair
        loss_s += student_kd * tau**2 * (d1 * F + d2 * R)
        dF = p_s - p_t
        dR = times(p_s, log_p_s - log_p_t - R[:, None])
        ds += student_kd * tau * (d1[:, None] * dF + d2[:, None] * dR)
    if teacher_kd > 0:
        dt += no_pair
        if teacher_divergence == "reverse":
            loss_t += teacher_kd * tau**2 * R
            dt += teacher_kd * tau * (p_t - p_s)
        else:
            loss_t += teacher_kd * tau**2 * F
            dt += teacher_kd * tau * times(p_t, log_p_t - log_p_s - F[:, None])

    q = targets(target, n, classes, label_smoothing)
    for net, x, weight, loss, gradient in (
        ("student", s, student_ce, loss_s, ds),
        ("teacher", t, teacher_ce, loss_t, dt),
    ):
        p, log_p = softmax(x, 1.0)
        ce = zero
        if q is not None and weight > 0:
            ce = -dot(q, log_p) + np.where(np.isnan(log_p).any(-1), np.nan, 0.0)
            loss += weight * ce
            gradient += weight * (q.sum(-1, keepdims=True) * p - q)
        stats[f"{net}_ce"] = ce
        stats[f"{net}_confidence"] = p.max(-1)
        correct = zero
        if target is not None:
            label = target if labels else target.argmax(-1)
            correct = ((x.argmax(-1) == label) & ~np.isnan(p).any(-1)).astype(np.float64)
        stats[f"{net}_correct"] = correct

    weight = np.ones(n) if sample_weight is None else sample_weight.astype(np.float64)
    factor = weight.copy()
    if reduction == "mean":
        total = weight[counted].sum()
        factor = weight / total if total != 0 else weight
    reduced = []
    for loss, gradient, above in ((loss_s, ds, upstream[0]), (loss_t, dt, upstream[1])):
        loss *= factor
        gradient *= (factor * above)[:, None]
        loss[~counted], gradient[~counted] = 0.0, 0.0
        reduced.append(loss if reduction == "none" else loss.sum())
    for value in stats.values():
        value[~counted] = 0.0
    return Derived(reduced[0], reduced[1], stats, ds, dt)
