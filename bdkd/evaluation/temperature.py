"""Fit the temperature of temperature scaling, the post-hoc baseline of calibration.

Source: Guo et al. 2017, arXiv 1706.04599, section 4.2. The logits are divided by the ``T`` that
minimizes the NLL of held-out data. Predictions do not change, but confidences do.

With ``b = 1/T``, the NLL of a sample is ``logsumexp(b x) - b x_y``. It is convex in ``b``, with the
derivatives ``E_p[x] - x_y`` and ``Var_p[x]``. The minimum is therefore the root of an increasing
function, which Newton's method finds inside a bracket. A step that leaves the bracket is replaced
by bisection.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

# If all samples are classified correctly, the NLL has no minimum and the result is LOWEST.
LOWEST, HIGHEST = 0.05, 100.0
_ROWS = 2**22  # numbers that are converted to float64 at a time: 32 MB
_MAX_STEPS = 200  # never reached: each step is Newton's or halves the bracket of log T


def fit_temperature(
    logits: Tensor, target: Tensor, total: Callable[[Tensor], Tensor] = lambda sums: sums
) -> float | None:
    """Return the temperature in [0.05, 100] that minimizes the NLL of ``logits / T``.

    The relative error is at most 1e-10. If there is no minimum between the bounds, the result is a
    bound: 0.05 if every sample is classified correctly, 100 if the logits are worse than chance. If
    the NLL does not depend on the temperature (one class, constant logits), the result is 1.
    Classes masked with ``-inf`` are ignored.

    Args:
        logits: (N, C), any floating-point type. Computed in float64.
        target: (N,), integers in [0, C).
        total: sums a tensor (4,) over the ranks, if each rank has a part of the samples.

    Returns:
        ``T``, or None if there are no samples or if the NLL is not finite at any temperature (NaN
        or ``+inf`` in the logits, or a masked label).

    Raises:
        ValueError: the shapes of logits and target do not match.
    """
    if logits.ndim != 2 or target.shape != logits.shape[:1]:
        raise ValueError(
            f"logits must have shape (N, C) and target (N,), "
            f"got {tuple(logits.shape)} and {tuple(target.shape)}"
        )

    def derivatives(inverse: float) -> list[float]:
        return total(_sums(logits, target, inverse)).tolist()

    count, slope, curvature, scale = derivatives(1.0)
    if count == 0 or not math.isfinite(slope):
        return None
    if abs(slope) <= 1e-13 * scale and curvature <= 1e-13 * scale:
        return 1.0
    low, high = 1 / HIGHEST, 1 / LOWEST
    if derivatives(low)[1] >= 0:
        return HIGHEST
    if derivatives(high)[1] <= 0:
        return LOWEST
    inverse = 1.0
    for _ in range(_MAX_STEPS):
        if slope == 0:
            break
        low, high = (inverse, high) if slope < 0 else (low, inverse)
        step = inverse - slope / curvature if curvature > 0 else math.inf
        previous, inverse = inverse, step if low < step < high else math.sqrt(low * high)
        if abs(inverse / previous - 1) < 1e-10:
            break
        _, slope, curvature, _ = derivatives(inverse)
    return 1 / inverse


@torch.no_grad()
def _sums(logits: Tensor, target: Tensor, inverse: float) -> Tensor:
    """Return (4,) float64: number of samples, and the sums of ``E_p[x] - x_y``, ``Var_p[x]`` and
    ``max |x|``, with ``p = softmax(inverse * x)``."""
    sums = torch.zeros(4, dtype=torch.float64, device=logits.device)
    rows = max(1, _ROWS // max(1, logits.shape[1]))
    for x, y in zip(logits.split(rows), target.split(rows), strict=True):
        if not len(x):
            break
        mean, variance, label, largest = _terms(x, y, inverse)
        terms = (torch.ones_like(mean), mean - label, variance, largest)
        sums += torch.stack([term.sum() for term in terms])
    return sums


@torch.no_grad()
def newton_terms(logits: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Return (N, 2) float64: the first and the second derivative of each sample's NLL with respect
    to ``log T`` at a temperature.

    One Newton step, ``log T - sum(first) / sum(second)``, gives approximately the temperature that
    fits a resample of the samples, if ``temperature`` fits all of them.
    """
    inverse, rows, parts = 1 / temperature, max(1, _ROWS // max(1, logits.shape[1])), []
    for x, y in zip(logits.split(rows), target.split(rows), strict=True):
        mean, variance, label, _ = _terms(x, y, inverse)
        first = -inverse * (mean - label)
        parts.append(torch.stack((first, inverse**2 * variance - first), -1))
    return torch.cat(parts)


def _terms(x: Tensor, y: Tensor, inverse: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (B,) float64 each: ``E_p[x]``, ``Var_p[x]``, ``x_y`` and ``max |x|``."""
    x = x.double()  # (B, C)
    x = x - x.amax(-1, keepdim=True)  # NaN if there is NaN or +inf
    p = (inverse * x).softmax(-1)  # (B, C)
    unmasked = x.masked_fill(x == -torch.inf, 0)  # p is 0 there
    mean = (p * unmasked).sum(-1)  # (B,)
    variance = (p * (unmasked - mean.unsqueeze(-1)).square()).sum(-1)  # (B,)
    label = x.gather(-1, y.long().unsqueeze(-1)).squeeze(-1)  # (B,), -inf if it is masked
    return mean, variance, label, unmasked.abs().amax(-1)
