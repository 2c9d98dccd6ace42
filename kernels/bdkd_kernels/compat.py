"""Distillation losses of other libraries, under their original names, on the fused kernels.

=====================  =========================================================================
``DistillKL``          RepDistiller, ``distiller_zoo/KD.py``
``kd_loss``            mdistiller, ``mdistiller/distillers/KD.py``, with ``reduce`` as in its forks
``LigerJSD``           Liger-Kernel, ``liger_kernel.transformers.LigerJSD``
``LigerKLDIVLoss``     Liger-Kernel, ``liger_kernel.transformers.LigerKLDIVLoss``
=====================  =========================================================================

Change one import. The values and gradients equal those of the original.

Each of these losses is one divergence. It is computed by :func:`bdkd_kernels.bdkd_loss`, with the
network that learns as the teacher, its partner as the student, and every weight except
``teacher_kd`` set to 0. To add cross entropy, or to train both networks, call
:func:`bdkd_kernels.bdkd_loss` directly: it computes all terms in one pass.

The arithmetic is float32 (float64 for float64 inputs), even if the original rounds to the dtype of
its inputs. An upstream gradient other than 1, as in ``0.9 * loss``, costs one more pass.
"""

import math
from numbers import Integral

import torch
from torch import Tensor, nn

from ._torch_compat import is_plain, needs_torch_operators
from .backends import check_name
from .checks import INTEGERS, check_logits, check_one_kind
from .loss import bdkd_loss
from .memory import check_dense, in_memory
from .options import TEMPERATURE, Divergence, as_float, shown

_IGNORED = -100  # replaces the caller's ignore_index


class DistillKL(nn.Module):
    """RepDistiller's module: ``T**2 * KL(p_t || p_s)``, summed over classes, averaged over samples.

    Args:
        T: Temperature of both networks, in [1e-4, 1e4].
        backend: Backend of the kernel; see :func:`bdkd_kernels.available_backends`.

    Raises:
        TypeError, ValueError: If a value or a tensor is invalid. The message names it.

    Source: Hinton et al., arXiv 1503.02531.
    """

    def __init__(self, T: float, backend: str = "auto") -> None:
        super().__init__()
        _checked_temperature("T", T)
        check_name(backend)
        self.T = T
        self.backend = backend

    def forward(self, y_s: Tensor, y_t: Tensor) -> Tensor:
        """Return the loss of student and teacher logits ``(N, C)``, a scalar.

        As in the original, a gradient also flows into ``y_t`` if it requires one. To train only the
        student, detach ``y_t``, or compute it under ``torch.no_grad()``.
        """
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
        logits_student, logits_teacher: Logits ``(N, C)``. Gradients flow into both if they require
            them.
        temperature: Temperature of both networks, in [1e-4, 1e4].
        reduce: Return the mean over samples. If False, return ``(N,)``. Keyword-only, because the
            fourth positional argument differs between the forks of mdistiller.
        backend: Backend of the kernel; see :func:`bdkd_kernels.available_backends`.

    Raises:
        TypeError, ValueError: If an argument is invalid. The message names it.

    Source: Hinton et al., arXiv 1503.02531.
    """
    temperature = _checked_temperature("temperature", temperature)
    if not isinstance(reduce, bool):
        raise TypeError(f"reduce must be a bool, got {shown(reduce)}")
    _check_pair("logits_student", logits_student, "logits_teacher", logits_teacher)
    reduction = "mean" if reduce else "none"
    return _forward_kl(logits_student, logits_teacher, temperature, reduction, backend)


class LigerJSD(nn.Module):
    """Liger's generalised Jensen-Shannon divergence.

    P is the teacher, Q the student, and ``M = beta P + (1 - beta) Q``. The loss is
    ``beta KL(P || M) + (1 - beta) KL(Q || M)``, averaged over the samples that are not ignored.
    A ``beta`` of 0 is KL(P || Q), and a ``beta`` of 1 is KL(Q || P). Both run the fused kernel.
    Other values run eager PyTorch on any device. On a GPU, Liger's own kernel is faster for these.

    Both inputs are log-probabilities, as in Liger. They are normalised again, which does not change
    log-probabilities. You can also pass logits directly, without ``log_softmax``: they receive the
    same gradient.

    Args:
        beta: Weight of the teacher in the mixture, in [0, 1].
        ignore_index: Samples with this label are ignored.
        backend: Backend of the kernel; see :func:`bdkd_kernels.available_backends`.

    Raises:
        TypeError, ValueError: If a value or a tensor is invalid. The message names it.

    Source: Hsu et al., arXiv 2410.10989.
    """

    def __init__(self, beta: float = 0.5, ignore_index: int = -100, backend: str = "auto") -> None:
        super().__init__()
        if not 0 <= as_float("beta", beta, "a number in [0, 1]") <= 1:
            raise ValueError(f"beta must be a number in [0, 1], got {shown(beta)}")
        _check_integer("ignore_index", ignore_index)
        check_name(backend)
        self.beta = beta
        self.ignore_index = ignore_index
        self.backend = backend

    def forward(self, log_q: Tensor, log_p: Tensor, shift_labels: Tensor | None = None) -> Tensor:
        """Return the loss, a scalar.

        Args:
            log_q: Log-probabilities of the student, ``(BT, V)``.
            log_p: Log-probabilities of the teacher, ``(BT, V)``. As in the original, no gradient
                flows into them.
            shift_labels: Integer labels ``(BT,)``, of which only ``ignore_index`` has a meaning.
        """
        _check_pair("log_q", log_q, "log_p", log_p)
        if shift_labels is not None:
            _check_labels("shift_labels", shift_labels, log_q)
            # Labels only select the samples that count: a label >= V is not an error.
            ignored = shift_labels == self.ignore_index
            shift_labels = torch.where(ignored, _IGNORED, 0)
        if self.beta in (0, 1):
            direction: Divergence = "forward" if self.beta == 1 else "reverse"
            return _learner_kl(
                log_q, log_p.detach(), direction, 1.0, "mean", self.backend, shift_labels
            )
        return _mixture_divergence(log_q, log_p.detach(), shift_labels, self.beta)

    def extra_repr(self) -> str:
        return f"beta={self.beta}, ignore_index={self.ignore_index}, backend={self.backend!r}"


class LigerKLDIVLoss(nn.Module):
    """Liger's KL(true || pred) from log-probabilities, as in :class:`torch.nn.KLDivLoss`.

    Both inputs are distributions over the classes. They are normalised again, which does not change
    distributions. The logits before a ``log_softmax`` receive the same gradient as from Liger.
    Liger's first argument, ``eps``, does not exist here, because ``0 log 0`` is 0. Therefore all
    arguments are keyword-only.

    Args:
        reduction: ``"mean"`` (over samples and classes, as in torch), ``"batchmean"`` or ``"sum"``.
            ``"none"``, which returns a value for every class, is not supported: use
            :class:`torch.nn.KLDivLoss`.
        log_target: Whether ``y_true`` holds log-probabilities.
        backend: Backend of the kernel; see :func:`bdkd_kernels.available_backends`.

    Raises:
        TypeError, ValueError: If a value or a tensor is invalid. The message names it.
    """

    def __init__(
        self,
        *,
        reduction: str = "mean",
        log_target: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if not isinstance(reduction, str) or reduction not in ("mean", "batchmean", "sum"):
            hint = ": use torch.nn.KLDivLoss for a value per class"
            raise ValueError(
                f"reduction must be 'mean', 'batchmean' or 'sum', got {shown(reduction)}"
                + (hint if isinstance(reduction, str) and reduction == "none" else "")
            )
        if not isinstance(log_target, bool):
            raise TypeError(f"log_target must be a bool, got {shown(log_target)}")
        check_name(backend)
        self.reduction = reduction
        self.log_target = log_target
        self.backend = backend

    def forward(self, y_pred: Tensor, y_true: Tensor) -> Tensor:
        """Return the loss of log-probabilities and (log-)probabilities ``(BT, V)``, a scalar."""
        _check_pair("y_pred", y_pred, "y_true", y_true)
        log_true = y_true.detach()
        if not self.log_target:
            # A logarithm in half precision is wrong by up to 2**-9, and the gradient with it.
            log_true = log_true.to(torch.promote_types(log_true.dtype, torch.float32)).log()
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
    """Return KL(p_t || p_s), with a gradient for each network that requires one."""
    loss = _learner_kl(student, teacher.detach(), "reverse", temperature, reduction, backend)
    if (teacher.requires_grad and torch.is_grad_enabled()) or needs_torch_operators():
        again = _learner_kl(teacher, student.detach(), "forward", temperature, reduction, backend)
        loss = loss + (again - again.detach())  # adds a gradient and no value
    return loss


def _learner_kl(
    learner: Tensor,  # (N, C)
    partner: Tensor,  # (N, C), constant
    divergence: Divergence,  # "reverse": KL(partner || learner), "forward": KL(learner || partner)
    temperature: float,
    reduction: str,
    backend: str,
    target: Tensor | None = None,  # (N,): _IGNORED, or 0 for a sample that counts
) -> Tensor:
    return bdkd_loss(
        partner, learner, target, temperature=temperature, student_ce=0.0, student_kd=0.0,
        teacher_ce=0.0, teacher_kd=1.0, teacher_divergence=divergence, ignore_index=_IGNORED,
        reduction=reduction, backend=backend,  # type: ignore[arg-type]
    ).teacher  # fmt: skip


def _mixture_divergence(log_q: Tensor, log_p: Tensor, labels: Tensor | None, beta: float) -> Tensor:
    """Return the divergence of both networks from their mixture, for ``0 < beta < 1``."""
    dtype = torch.promote_types(torch.promote_types(log_q.dtype, log_p.dtype), torch.float32)
    counted = None if labels is None else labels != _IGNORED  # (N,)
    if counted is not None:  # a NaN in an ignored row must not reach the loss or the gradients
        log_q = torch.where(counted[:, None], log_q, 0.0)
        log_p = torch.where(counted[:, None], log_p, 0.0)
    # exp(-1e4) is 0 in every type, so a masked class adds 0, and inf - inf does not occur.
    log_q, log_p = (x.to(dtype).log_softmax(-1).clamp(min=-1e4) for x in (log_q, log_p))
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))  # (N, C)
    terms = beta * log_p.exp() * (log_p - log_m) + (1 - beta) * log_q.exp() * (log_q - log_m)
    rows = terms.sum(-1)  # (N,)
    if counted is None:
        return rows.sum() / max(rows.shape[0], 1)
    return torch.where(counted, rows, 0.0).sum() / counted.sum().clamp(min=1)


def _checked_temperature(name: str, value: object) -> float:
    number = as_float(name, value, TEMPERATURE.needed)
    if not TEMPERATURE.accept(number):
        raise ValueError(f"{name} must be {TEMPERATURE.needed}, got {shown(value)}")
    return number


def _check_integer(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an int, got {shown(value)}")
    if not -(2**63) <= int(value) < 2**63:
        raise ValueError(f"{name} must be an int of 64 bits, got {shown(value)}")


def _check_pair(name: str, learner: Tensor, partner_name: str, partner: Tensor) -> None:
    """Check that both are logits or log-probabilities: rows of one shape on one device."""
    check_dense(name, learner)
    check_dense(partner_name, partner)
    shape = check_logits(name, learner)
    partner_shape = check_logits(partner_name, partner)
    if len(shape) != 2:
        raise ValueError(
            f"{name} must have shape (N, C), one row per sample, got {tuple(shape)}"
            + ": move the classes to the last dimension, then flatten(0, -2)" * (len(shape) > 2)
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
    if is_plain(learner, partner):  # checked here, because bdkd_loss would name its own arguments
        in_memory(name, learner)
        in_memory(partner_name, partner)
    elif not torch.compiler.is_compiling():
        check_one_kind({name: learner, partner_name: partner})


def _check_labels(name: str, labels: object, logits: Tensor) -> None:
    check_dense(name, labels, "a tensor of integer labels or None")
    assert isinstance(labels, Tensor)
    if labels.dtype not in INTEGERS:
        raise TypeError(f"{name} must be a tensor of integer labels or None, got {labels.dtype}")
    if labels.shape != logits.shape[:1]:
        raise ValueError(
            f"{name} must have shape ({logits.shape[0]},), one label per sample, "
            f"got {tuple(labels.shape)}"
        )
    if labels.device != logits.device:
        raise ValueError(
            f"{name} must be on the logits' device {logits.device}, got {labels.device}"
        )
    if is_plain(labels, logits):
        in_memory(name, labels)
