"""The public functions and the module. They check the arguments and call the chosen backend."""

from collections.abc import Callable, Mapping
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from . import backends, buffers
from .checks import prepare
from .memory import as_rows, check_gradient_buffers
from .options import (
    STATISTICS,
    TABLE,
    LossArguments,
    LossOptions,
    cached_options,
    check_names,
    checked_options,
    shows_options,
)
from .types import BDKDOutput, BDKDStats, Pair, fast_new


@shows_options
def bdkd_loss(
    student_logits: Tensor,  # (..., C)
    teacher_logits: Tensor,  # (..., C)
    target: Tensor | None,  # (...) labels or (..., C) soft labels
    *,
    sample_weight: Tensor | None = None,  # (...)
    grad_scale: float | Tensor = 1.0,
    backend: str = "auto",
    **options: Unpack[LossArguments],
) -> BDKDOutput:
    """Compute the BD-KD losses of a student and its teacher from their logits.

    For every sample, with ``p = softmax(logits / temperature)``, in nats::

        student = student_ce * CE(s, y) + student_kd * temperature**2 * (d1 * F + d2 * R)
        teacher = teacher_ce * CE(t, y) + teacher_kd * temperature**2 * R
        F = KL(p_t || p_s)                  R = KL(p_s || p_t)
        d1 = gamma where H(p_t) > H(p_s), else 1
        d2 = gamma where H(p_s) > H(p_t), else 1

    With ``teacher_divergence="forward"``, the teacher's loss contains F instead of R. In each
    gradient, d1, d2 and the other network's probabilities are constants. So each loss trains its
    own network only, and ``(out.student + out.teacher).backward()`` trains both networks.

    Args:
        student_logits, teacher_logits: Logits ``(..., C)``, fp16, bf16, fp32 or fp64. The two
            dtypes may differ. The arithmetic is float32, or float64 if either dtype is float64.
            ``-inf`` masks a class. Tensors created under ``torch.inference_mode()`` are accepted
            everywhere.
        target: Labels ``(...)`` of an integer type, soft labels ``(..., C)`` of a floating type, or
            None for unlabelled data (no cross entropy).
        {options}
        sample_weight: Weights ``(...)`` that multiply each sample's losses. ``mean`` divides by
            their sum over the counted samples. They are constants: no gradient flows into them.
        grad_scale: The upstream gradient of the later backward pass, for example the loss scale of
            fp16 training: a number in float32's range or a 0-dim tensor. Backends that compute
            gradients in the forward pass multiply them by it before rounding. The losses do not
            depend on it.
        backend: ``"auto"``, ``"triton"``, ``"native"`` or ``"reference"``; see
            :func:`available_backends`. Calls under ``torch.func``, forward-mode AD or
            ``torch.jit.trace`` always run the reference.

    Terms of weight 0 and cross entropies without a target are omitted. A loss without terms is 0.

    Returns:
        :class:`BDKDOutput`: ``student`` and ``teacher``, float32 (float64 for float64 logits), and
        ``stats``, the :class:`BDKDStats` of every sample.

    Raises:
        ValueError, TypeError: If an argument is invalid. The message names it. For a label outside
            [0, C), the message also names the row. On devices other than the CPU, labels are
            checked only if ``BDKD_CHECK_LABELS=1`` is set. Otherwise the loss of that row is NaN.
        RuntimeError: If ``backend`` is not available, or does not support these tensors.

    Source: Amara et al., arXiv 2212.12965.
    """
    checked = _checked(bdkd_loss, options)
    inputs = prepare(student_logits, teacher_logits, target, sample_weight, checked, grad_scale)
    losses, stats = backends.choose(backend, inputs).loss(inputs, grad_scale)
    return _output(losses, stats, student_logits, checked)


@shows_options
def bdkd_loss_and_grad(
    student_logits: Tensor,  # (..., C)
    teacher_logits: Tensor,  # (..., C)
    target: Tensor | None,  # (...) labels or (..., C) soft labels
    *,
    sample_weight: Tensor | None = None,  # (...)
    grad_scale: float | Tensor = 1.0,
    backend: str = "auto",
    grads: tuple[Tensor | None, Tensor | None] | None = None,
    **options: Unpack[LossArguments],
) -> tuple[BDKDOutput, tuple[Tensor | None, Tensor | None]]:
    """Compute :func:`bdkd_loss` and both gradients in one pass.

    Use it in a training loop that calls ``torch.autograd.backward([s, t], [ds, dt])`` itself.
    ``ds`` is the gradient of ``out.student`` (of its sum, with ``reduction="none"``) with respect
    to the student's logits, times ``grad_scale``. ``dt`` is the gradient of ``out.teacher`` with
    respect to the teacher's logits, times ``grad_scale``. Each has the shape and dtype of its
    logits.

    If neither network's logits require a gradient, both gradients are computed. If only one does,
    the other gradient is None (offline distillation).

    Args:
        student_logits, teacher_logits, target: See :func:`bdkd_loss`.
        {options}
        sample_weight, grad_scale, backend: See :func:`bdkd_loss`.
        grads: Tensors ``(ds, dt)`` to write the gradients into, each of the shape, dtype and device
            of its logits. A buffer may be the logits of its own network. It must not share memory
            with any other argument or with the other buffer, and its elements must not overlap.
            Pass None instead of a buffer to skip that gradient.

    Returns:
        ``(out, (ds, dt))``; ``out`` is detached.

    Raises:
        ValueError, TypeError, RuntimeError: As :func:`bdkd_loss`, and if a buffer is invalid.
    """
    checked = _checked(bdkd_loss_and_grad, options)
    inputs = prepare(student_logits, teacher_logits, target, sample_weight, checked, grad_scale)
    if grads is None:
        gradients = _gradient_buffers(student_logits, teacher_logits)
    else:
        check_gradient_buffers(
            grads, student_logits, teacher_logits, target, sample_weight, grad_scale, inputs.plain
        )
        gradients = fast_new(Pair, grads) if inputs.plain else Pair(*grads)
    rows = gradients if student_logits.ndim == 2 else as_rows(gradients)
    losses, stats = backends.choose(backend, inputs).loss_and_grad(inputs, grad_scale, rows)
    # Return a plain tuple: torch.export.save cannot serialize named tuples of other libraries.
    return _output(losses, stats, student_logits, checked), (gradients.student, gradients.teacher)


@shows_options
class BDKDLoss(nn.Module):
    """Compute :func:`bdkd_loss` as a module.

    Pass the options to the constructor, and the tensors and ``grad_scale`` to the call.

    Args:
        {options}
        backend: ``"auto"``, ``"triton"``, ``"native"`` or ``"reference"``; see
            :func:`available_backends`.

    Raises:
        ValueError, TypeError: If an option is invalid. The message names it.
    """

    def __init__(self, *, backend: str = "auto", **options: Unpack[LossArguments]) -> None:
        super().__init__()
        self.options = _checked(BDKDLoss.__init__, options)
        backends.check_name(backend)
        self.backend = backend

    def forward(
        self,
        student_logits: Tensor,  # (..., C)
        teacher_logits: Tensor,  # (..., C)
        target: Tensor | None,  # (...) labels or (..., C) soft labels
        sample_weight: Tensor | None = None,  # (...)
        grad_scale: float | Tensor = 1.0,
    ) -> BDKDOutput:
        """Return the losses and statistics. See :func:`bdkd_loss` for the arguments."""
        options = self.options
        inputs = prepare(student_logits, teacher_logits, target, sample_weight, options, grad_scale)
        losses, stats = backends.choose(self.backend, inputs).loss(inputs, grad_scale)
        return _output(losses, stats, student_logits, options)

    def extra_repr(self) -> str:
        options = ", ".join(f"{x.name}={getattr(self.options, x.name)!r}" for x in TABLE)
        return f"{options}, backend={self.backend!r}"


def _checked(function: Callable, values: Mapping[str, Any]) -> LossOptions:
    """Return the options of one call of ``function``."""
    if not torch.compiler.is_dynamo_compiling():  # dynamo ignores lru_cache, with a warning
        try:
            return cached_options(**values)
        except (TypeError, KeyError):
            pass  # the checks below raise a clear error, or accept values that cannot be hashed
    check_names(function, values)
    return checked_options(values)


def _gradient_buffers(student: Tensor, teacher: Tensor) -> Pair[Tensor | None]:
    """Allocate the gradients that :func:`bdkd_loss_and_grad` returns."""
    neither = not (student.requires_grad or teacher.requires_grad)
    return Pair(
        buffers.empty_like(student.detach()) if neither or student.requires_grad else None,
        buffers.empty_like(teacher.detach()) if neither or teacher.requires_grad else None,
    )


def _output(
    losses: Pair[Tensor], stats: BDKDStats, logits: Tensor, options: LossOptions
) -> BDKDOutput:
    """Return the output of a call, with its rows reshaped to the leading shape of the logits."""
    student, teacher = losses
    if logits.ndim != 2:
        leading = logits.shape[:-1]
        stats = BDKDStats(stats.table.reshape(len(STATISTICS), *leading))
        if options.reduction == "none":
            student, teacher = student.reshape(leading), teacher.reshape(leading)
    return BDKDOutput(student, teacher, stats)
