"""Temperature scaling, the post-hoc baseline of calibration: one number, fitted on held-out data.

Source: Guo et al. 2017, arXiv 1706.04599, section 4.2: divide the logits by the ``T`` that
minimises the NLL of a validation part. Predictions stay as they are, confidences change.

With ``b = 1/T`` the NLL of a sample, ``logsumexp(b x) - b x_y``, is convex in ``b``, and its
derivatives are ``E_p[x] - x_y`` and ``Var_p[x]``. So the minimum is the one root of an increasing
function of one number: Newton's steps inside a bracket, halved where they leave it, until ``T``
stands still.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

# No trained classifier needs less or more. Where a small validation part is classified without an
# error the lower bound comes out, and the NLL of the test images' errors is divided by it.
LOWEST, HIGHEST = 0.05, 100.0
_ROWS = 2**22  # numbers that are widened to float64 at a time: 32 MB
_STEPS = 200  # never reached: the bracket's logarithm is halved or Newton's step was taken


def fit_temperature(
    logits: Tensor, target: Tensor, total: Callable[[Tensor], Tensor] = lambda sums: sums
) -> float | None:
    """The temperature in [0.05, 100] that minimises the NLL of ``logits / T``, to 1e-10 relative.

    A bound comes out where there is no minimum between them: 0.05 where every sample is classified
    correctly (the surer the better), 100 where the logits tell less than chance. Where all
    temperatures are alike (one class, constant logits), it is 1. A class masked with ``-inf`` has
    no part in it.

    Args:
        logits: ``(N, C)``, any floating type; computed in float64.
        target: ``(N,)``, integers in [0, C).
        total: of several ranks, each with its own samples: sums a tensor ``(4,)`` over the ranks.

    Returns:
        ``T``; None where there are no samples, or none has a finite NLL at any temperature (NaN or
        ``+inf`` among the logits, a masked label).

    Raises:
        ValueError: shapes that do not fit.
    """
    if logits.ndim != 2 or target.shape != logits.shape[:1]:
        raise ValueError(
            f"logits must have shape (N, C) and target (N,), "
            f"got {tuple(logits.shape)} and {tuple(target.shape)}"
        )

    def derivatives(inverse: float) -> tuple[float, float, float, float]:
        """Samples, and the sums of first and second derivative and scale of the NLL at ``1/T``."""
        return tuple(total(_sums(logits, target, inverse)).tolist())

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
    for _ in range(_STEPS):
        if slope == 0:
            break
        low, high = (inverse, high) if slope < 0 else (low, inverse)
        step = inverse - slope / curvature if curvature > 0 else math.inf
        # The bracket's middle on the scale of log T where Newton leaves the bracket.
        following = step if low < step < high else math.sqrt(low * high)
        moved = abs(following / inverse - 1)
        inverse = following
        if moved < 1e-10:
            break
        _, slope, curvature, _ = derivatives(inverse)
    return 1 / inverse


@torch.no_grad()
def _sums(logits: Tensor, target: Tensor, inverse: float) -> Tensor:
    """``(4,)`` float64: samples, sum of ``E_p[x] - x_y``, sum of ``Var_p[x]``, sum of ``|x|``'s
    largest, with ``p = softmax(inverse * x)``."""
    sums = torch.zeros(4, dtype=torch.float64, device=logits.device)
    rows = max(1, _ROWS // max(1, logits.shape[1]))
    for x, y in zip(logits.split(rows), target.split(rows), strict=True):
        if not len(x):
            break
        x = x.double()  # (B, C)
        x = x - x.amax(-1, keepdim=True)  # NaN where there is NaN or +inf
        p = (inverse * x).softmax(-1)  # (B, C)
        counted = x.masked_fill(x == -torch.inf, 0)  # p is 0 there
        mean = (p * counted).sum(-1)  # (B,)
        variance = (p * (counted - mean.unsqueeze(-1)).square()).sum(-1)  # (B,)
        label = x.gather(-1, y.long().unsqueeze(-1)).squeeze(-1)  # (B,), -inf where it is masked
        largest = counted.abs().amax(-1)  # (B,)
        sums += torch.stack(
            (torch.ones_like(mean).sum(), (mean - label).sum(), variance.sum(), largest.sum())
        )
    return sums
