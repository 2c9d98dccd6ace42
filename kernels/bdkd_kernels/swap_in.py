"""Other people's names over the fused kernels: one import changes, no value does.

=====================  =========================================================================
``DistillKL``          RepDistiller, ``distiller_zoo/KD.py``
``kd_loss``            mdistiller, ``mdistiller/distillers/KD.py``; ``reduce`` as its descendants
``LigerJSD``           Liger-Kernel, ``liger_kernel.transformers.LigerJSD``
``LigerKLDIVLoss``     Liger-Kernel, ``liger_kernel.transformers.LigerKLDIVLoss``
=====================  =========================================================================

A divergence alone, as these are, is one half of a :func:`bdkd_kernels.bdkd_loss` call: the network
that learns stands in the teacher's place, its partner in the student's, and every weight but
``teacher_kd`` is 0. Whoever wants cross entropy too, or both networks trained, calls that function:
it makes them in the same pass.

Everything comes out in float32 (float64 for float64 logits), also where the original would have
rounded to the input's type. A gradient from above other than 1 (``0.9 * loss``) costs a
pass more.
"""

import math
from numbers import Integral, Real

import torch
from torch import Tensor, nn

from .backends import check_name
from .checks import check_logits
from .loss import bdkd_loss
from .types import Divergence


class DistillKL(nn.Module):
    """RepDistiller's module: ``T**2 * KL(p_t || p_s)``, summed over classes, averaged over samples.

    Args:
        T: temperature of both networks, > 0.
        backend: of the kernel; see :func:`bdkd_kernels.available_backends`.

    Raises:
        TypeError, ValueError: a value or a tensor that does not fit, by name.

    Source: Hinton et al., arXiv 1503.02531.
    """

    def __init__(self, T: float, backend: str = "auto") -> None:
        super().__init__()
        _check_number("T", T, 0, math.inf)
        check_name(backend)
        self.T = T
        self.backend = backend

    def forward(self, y_s: Tensor, y_t: Tensor) -> Tensor:
        """Student and teacher logits ``(N, C)`` to a scalar. As in the original, a gradient flows
        into ``y_t`` too where it asks for one: detach it, or compute it under ``no_grad``."""
        _check_pair("y_s", y_s, "y_t", y_t)
        return _forward_kl(y_s, y_t, self.T, "mean", self.backend)

    def extra_repr(self) -> str:
        return f"T={self.T}, backend={self.backend!r}"


def kd_loss(
    logits_student: Tensor,  # (N, C)
    logits_teacher: Tensor,  # (N, C)
    temperature: float,
    *,
    reduce: bool = True,
    backend: str = "auto",
) -> Tensor:
    """mdistiller's function: ``temperature**2 * KL(p_t || p_s)``.

    Args:
        logits_student, logits_teacher: ``(N, C)``. A gradient flows into both where they ask.
        temperature: > 0.
        reduce: the mean over samples, or else ``(N,)``. By name only: the fourth positional
            argument means different things in mdistiller's descendants.
        backend: of the kernel.

    Raises:
        TypeError, ValueError: an argument that does not fit, by name.

    Source: Hinton et al., arXiv 1503.02531.
    """
    _check_number("temperature", temperature, 0, math.inf)
    if not isinstance(reduce, bool):
        raise TypeError(f"reduce must be a bool, got {reduce!r}")
    _check_pair("logits_student", logits_student, "logits_teacher", logits_teacher)
    reduction = "mean" if reduce else "none"
    return _forward_kl(logits_student, logits_teacher, temperature, reduction, backend)


class LigerJSD(nn.Module):
    """Liger's generalised Jensen-Shannon divergence; ``beta`` 0 is KL(P || Q), 1 is KL(Q || P).

    With ``M = beta P + (1 - beta) Q``, P the teacher and Q the student, it is
    ``beta KL(P || M) + (1 - beta) KL(Q || M)``, averaged over the samples that are not ignored.
    ``beta`` 0 and 1, one-sided divergences, run on the fused kernel; between them eager PyTorch
    does it, on any device (on a GPU Liger's own kernel is the faster one there).

    Both inputs are log-probabilities, as Liger's documentation asks. They are normalised here once
    more, which changes none: behind a ``log_softmax`` the logits receive the same gradient as from
    Liger, and that ``log_softmax`` may as well be left out.

    Args:
        beta: in [0, 1].
        ignore_index: samples with this label count for nothing.
        backend: of the kernel.

    Raises:
        TypeError, ValueError: a value or a tensor that does not fit, by name.

    Source: Hsu et al., arXiv 2410.10989.
    """

    def __init__(self, beta: float = 0.5, ignore_index: int = -100, backend: str = "auto") -> None:
        super().__init__()
        _check_number("beta", beta, 0, 1)
        _check_integer("ignore_index", ignore_index)
        check_name(backend)
        self.beta = beta
        self.ignore_index = ignore_index
        self.backend = backend

    def forward(self, log_q: Tensor, log_p: Tensor, shift_labels: Tensor | None = None) -> Tensor:
        """Log-probabilities ``(BT, V)`` of student and teacher, labels ``(BT,)``, to a scalar. No
        gradient flows into the teacher's, as in the original."""
        _check_pair("log_q", log_q, "log_p", log_p)
        if shift_labels is not None:
            _check_labels("shift_labels", shift_labels, log_q)
            # They say which samples count and nothing else: one beyond the vocabulary is no error.
            shift_labels = torch.where(shift_labels == self.ignore_index, self.ignore_index, 0)
        if self.beta in (0, 1):
            direction: Divergence = "forward" if self.beta == 1 else "reverse"
            return _learner_kl(
                log_q, log_p.detach(), direction, 1.0, "mean", self.backend, shift_labels,
                self.ignore_index,
            )  # fmt: skip
        return _mixture_divergence(
            log_q, log_p.detach(), shift_labels, self.beta, self.ignore_index
        )

    def extra_repr(self) -> str:
        return f"beta={self.beta}, ignore_index={self.ignore_index}, backend={self.backend!r}"


class LigerKLDIVLoss(nn.Module):
    """Liger's KL(true || pred) from log-probabilities, as :class:`torch.nn.KLDivLoss`.

    Both inputs are distributions over the classes, and normalised here once more, which changes
    none: behind a ``log_softmax`` the logits receive the same gradient as from Liger. There is no
    ``eps``, since ``0 log 0`` is 0 here; by name only, since it is Liger's first argument.

    Args:
        reduction: ``"mean"`` (over samples and classes, as torch has it), ``"batchmean"`` or
            ``"sum"``. ``"none"``, a value for every class, is not on offer: nothing here is that
            large.
        log_target: the truth is given as log-probabilities.
        backend: of the kernel.

    Raises:
        TypeError, ValueError: a value or a tensor that does not fit, by name.
    """

    def __init__(
        self,
        *,
        reduction: str = "mean",
        log_target: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if reduction not in ("mean", "batchmean", "sum"):
            hint = ": keep torch.nn.KLDivLoss for a value of every class" * (reduction == "none")
            raise ValueError(
                f"reduction must be 'mean', 'batchmean' or 'sum', got {reduction!r}{hint}"
            )
        if not isinstance(log_target, bool):
            raise TypeError(f"log_target must be a bool, got {log_target!r}")
        check_name(backend)
        self.reduction = reduction
        self.log_target = log_target
        self.backend = backend

    def forward(self, y_pred: Tensor, y_true: Tensor) -> Tensor:
        """Log-probabilities and (log-)probabilities ``(BT, V)`` to a scalar."""
        _check_pair("y_pred", y_pred, "y_true", y_true)
        log_true = y_true.detach() if self.log_target else y_true.detach().log()
        reduction = "sum" if self.reduction == "sum" else "mean"
        loss = _learner_kl(y_pred, log_true, "reverse", 1.0, reduction, self.backend)
        return loss / y_pred.shape[1] if self.reduction == "mean" else loss

    def extra_repr(self) -> str:
        return (
            f"reduction={self.reduction!r}, log_target={self.log_target}, backend={self.backend!r}"
        )


def _forward_kl(
    student: Tensor, teacher: Tensor, temperature: float, reduction: str, backend: str
) -> Tensor:
    """KL(p_t || p_s), whose gradient reaches each network that asks for one."""
    loss = _learner_kl(student, teacher.detach(), "reverse", temperature, reduction, backend)
    if teacher.requires_grad and torch.is_grad_enabled():
        again = _learner_kl(teacher, student.detach(), "forward", temperature, reduction, backend)
        loss = loss + (again - again.detach())  # the value once, both gradients
    return loss


def _learner_kl(
    learner: Tensor,  # (N, C)
    partner: Tensor,  # (N, C), constant
    divergence: Divergence,  # "reverse": KL(partner || learner), "forward": KL(learner || partner)
    temperature: float,
    reduction: str,
    backend: str,
    target: Tensor | None = None,  # (N,): only which samples to ignore is read
    ignore_index: int = -100,
) -> Tensor:
    return bdkd_loss(
        partner, learner, target, temperature=temperature, student_ce=0.0, student_kd=0.0,
        teacher_ce=0.0, teacher_kd=1.0, teacher_divergence=divergence, ignore_index=ignore_index,
        reduction=reduction, backend=backend,  # type: ignore[arg-type]
    ).teacher  # fmt: skip


def _mixture_divergence(
    log_q: Tensor, log_p: Tensor, labels: Tensor | None, beta: float, ignore_index: int
) -> Tensor:
    """The divergence of both to their mixture, ``0 < beta < 1``, in float32 or better."""
    dtype = torch.promote_types(torch.promote_types(log_q.dtype, log_p.dtype), torch.float32)
    counted = None if labels is None else labels != ignore_index  # (N,)
    if counted is not None:  # an ignored row brings no NaN, also through 0 * NaN behind it
        log_q = torch.where(counted[:, None], log_q, 0.0)
        log_p = torch.where(counted[:, None], log_p, 0.0)
    # exp(-1e4) is 0 in every type: a masked class adds 0, and no inf - inf.
    log_q, log_p = (x.to(dtype).log_softmax(-1).clamp(min=-1e4) for x in (log_q, log_p))
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))  # (N, C)
    terms = beta * log_p.exp() * (log_p - log_m) + (1 - beta) * log_q.exp() * (log_q - log_m)
    rows = terms.sum(-1)  # (N,)
    if counted is None:
        return rows.sum() / max(len(rows), 1)
    return torch.where(counted, rows, 0.0).sum() / counted.sum().clamp(min=1)


def _check_number(name: str, value: object, low: float, high: float) -> None:
    """``value`` is in (0, inf) or in [low, high] with finite bounds."""
    closed = high < math.inf
    needed = f"a number in [{low:g}, {high:g}]" if closed else f"a finite number > {low:g}"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be {needed}, got {value!r} ({type(value).__name__})")
    number = float(value)
    if not (low <= number <= high if closed else low < number < high):
        raise ValueError(f"{name} must be {needed}, got {value!r}")


def _check_integer(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an int, got {value!r}")


def _check_pair(name: str, learner: Tensor, partner_name: str, partner: Tensor) -> None:
    """Both are logits, or as good as: rows of one shape on one device."""
    shape = check_logits(name, learner)
    partner_shape = check_logits(partner_name, partner)
    if len(shape) != 2:
        raise ValueError(
            f"{name} must have shape (N, C), one row a sample, got {tuple(shape)}"
            + ": bring the classes last, then flatten(0, -2)" * (len(shape) > 2)
        )
    if shape != partner_shape:
        raise ValueError(
            f"{name} and {partner_name} must have one shape, "
            f"got {tuple(shape)} and {tuple(partner_shape)}"
        )
    if learner.device != partner.device:
        raise ValueError(
            f"{name} and {partner_name} must be on one device, "
            f"got {learner.device} and {partner.device}"
        )


def _check_labels(name: str, labels: object, logits: Tensor) -> None:
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dtype is torch.bool:
        came = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"{name} must be a tensor of integer labels or None, got {came}")
    if labels.shape != logits.shape[:1]:
        raise ValueError(
            f"{name} must have shape ({logits.shape[0]},), one label a sample, "
            f"got {tuple(labels.shape)}"
        )
