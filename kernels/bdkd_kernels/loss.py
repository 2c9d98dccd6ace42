"""What a user calls: the loss as a function and as a module. Checks, flattens, dispatches."""

from torch import Tensor, nn

from . import backends, buffers
from .checks import as_rows, check_gradient_buffers, prepare
from .types import BDKDOutput, BDKDStats, Divergence, Reduction, checked_options


def bdkd_loss(
    student_logits: Tensor,  # (..., C)
    teacher_logits: Tensor,  # (..., C)
    target: Tensor | None,  # (...) labels or (..., C) soft labels
    *,
    temperature: float = 1.0,
    gamma: float = 2.0,
    student_ce: float = 1.0,
    student_kd: float = 1.0,
    teacher_ce: float = 1.0,
    teacher_kd: float = 1.0,
    teacher_divergence: Divergence = "reverse",
    soften_entropy: bool = True,
    label_smoothing: float = 0.0,
    sample_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    grad_scale: float | Tensor = 1.0,
    backend: str = "auto",
) -> BDKDOutput:
    """BD-KD's losses of a student and its teacher, from logits alone.

    For every sample, with ``p = softmax(logits / temperature)``, everything in nats::

        student = student_ce * CE(s, y) + student_kd * temperature**2 * (d1 * F + d2 * R)
        teacher = teacher_ce * CE(t, y) + teacher_kd * temperature**2 * R
        F = KL(p_t || p_s)                  R = KL(p_s || p_t)
        d1 = gamma where H(p_t) > H(p_s), else 1
        d2 = gamma where H(p_s) > H(p_t), else 1

    The partner's probabilities and both weights are constants for the gradient, so each loss trains
    its own network only: ``(out.student + out.teacher).backward()`` trains both.

    Args:
        student_logits, teacher_logits: ``(..., C)``, fp16, bf16, fp32 or fp64 (mixes too). All
            arithmetic is float32, or float64 where one of them is. ``-inf`` masks a class.
        target: labels ``(...)`` of an integer type, soft labels ``(..., C)`` of a floating type, or
            None for unlabelled data (no cross entropy).
        temperature: of both divergences; > 0.
        gamma: the larger of a sample's two weights; >= 1 (1: unweighted).
        student_ce, student_kd, teacher_ce, teacher_kd: weights of the four terms, >= 0. The term of
            a weight of 0 is not computed.
        teacher_divergence: ``"reverse"``, KL(p_s || p_t), or ``"forward"``, KL(p_t || p_s).
        soften_entropy: compare the entropies at ``temperature``, or else at 1.
        label_smoothing: as in :func:`torch.nn.functional.cross_entropy`.
        sample_weight: ``(...)``, multiplies each sample's losses; ``mean`` divides by its sum over
            the counted samples. A constant: no gradient flows into it.
        ignore_index: samples with this label have loss 0 and gradients 0 and are not counted.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        grad_scale: the gradient that will come from above (fp16's loss scale, say), a number or a
            0-dim tensor. Backends that make gradients in the forward pass put it in before
            rounding. It changes no value.
        backend: ``"auto"``, ``"triton"``, ``"native"`` or ``"reference"``;
            see :func:`available_backends`.

    Returns:
        :class:`BDKDOutput`: ``student`` and ``teacher``, float32 (float64 for float64 logits), and
        ``stats``, the :class:`BDKDStats` of every sample.

    Raises:
        ValueError, TypeError: an argument that does not fit, by name; a label outside [0, C), with
            its row, on the CPU (elsewhere that row's loss is NaN, unless ``BDKD_CHECK_LABELS=1``).
        RuntimeError: ``backend`` is not available here.

    Source: Amara et al., arXiv 2212.12965.
    """
    options = checked_options(
        temperature, gamma, student_ce, student_kd, teacher_ce, teacher_kd, teacher_divergence,
        soften_entropy, label_smoothing, ignore_index, reduction,
    )  # fmt: skip
    problem = prepare(student_logits, teacher_logits, target, sample_weight, options, grad_scale)
    implementation = backends.choose(backend, problem)
    student, teacher, stats = implementation.loss(problem, grad_scale)
    return _unflatten(student, teacher, stats, student_logits, reduction)


def bdkd_loss_and_grad(
    student_logits: Tensor,  # (..., C)
    teacher_logits: Tensor,  # (..., C)
    target: Tensor | None,  # (...) labels or (..., C) soft labels
    *,
    temperature: float = 1.0,
    gamma: float = 2.0,
    student_ce: float = 1.0,
    student_kd: float = 1.0,
    teacher_ce: float = 1.0,
    teacher_kd: float = 1.0,
    teacher_divergence: Divergence = "reverse",
    soften_entropy: bool = True,
    label_smoothing: float = 0.0,
    sample_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    grad_scale: float | Tensor = 1.0,
    backend: str = "auto",
    grads: tuple[Tensor | None, Tensor | None] | None = None,
) -> tuple[BDKDOutput, tuple[Tensor | None, Tensor | None]]:
    """:func:`bdkd_loss` and both gradients, for ``torch.autograd.backward([s, t], [ds, dt])``.

    The arguments are those of :func:`bdkd_loss`. ``ds`` is the gradient of ``out.student`` (of its
    sum, with ``reduction="none"``) with respect to the student's logits, times ``grad_scale``;
    ``dt`` likewise of the teacher. Each has the shape and dtype of its logits.

    A gradient is made for the logits that require one; where neither does, for both. The gradient
    of logits that need none beside a partner's that do (offline distillation) is None.

    Args:
        grads: tensors to write the gradients into, ``(ds, dt)``, each of its logits' shape, dtype
            and device; they may be the logits themselves. None in a place: no such gradient.

    Returns:
        ``(out, (ds, dt))``; ``out`` is detached.
    """
    options = checked_options(
        temperature, gamma, student_ce, student_kd, teacher_ce, teacher_kd, teacher_divergence,
        soften_entropy, label_smoothing, ignore_index, reduction,
    )  # fmt: skip
    problem = prepare(student_logits, teacher_logits, target, sample_weight, options, grad_scale)
    if grads is None:
        neither = not (student_logits.requires_grad or teacher_logits.requires_grad)
        want_student = neither or student_logits.requires_grad
        want_teacher = neither or teacher_logits.requires_grad
        ds = buffers.empty_like(student_logits.detach()) if want_student else None
        dt = buffers.empty_like(teacher_logits.detach()) if want_teacher else None
    else:
        check_gradient_buffers(grads, student_logits, teacher_logits)
        ds, dt = grads
    implementation = backends.choose(backend, problem)
    student, teacher, stats = implementation.loss_and_grad(
        problem, grad_scale, as_rows("grads[0]", ds), as_rows("grads[1]", dt)
    )
    return _unflatten(student, teacher, stats, student_logits, reduction), (ds, dt)


class BDKDLoss(nn.Module):
    """:func:`bdkd_loss` as a module: the options in the constructor, the tensors in the call."""

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        gamma: float = 2.0,
        student_ce: float = 1.0,
        student_kd: float = 1.0,
        teacher_ce: float = 1.0,
        teacher_kd: float = 1.0,
        teacher_divergence: Divergence = "reverse",
        soften_entropy: bool = True,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.options = checked_options(
            temperature, gamma, student_ce, student_kd, teacher_ce, teacher_kd, teacher_divergence,
            soften_entropy, label_smoothing, ignore_index, reduction,
        )  # fmt: skip
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
        problem = prepare(
            student_logits, teacher_logits, target, sample_weight, self.options, grad_scale
        )
        implementation = backends.choose(self.backend, problem)
        student, teacher, stats = implementation.loss(problem, grad_scale)
        return _unflatten(student, teacher, stats, student_logits, self.options.reduction)

    def extra_repr(self) -> str:
        o = self.options
        options = ", ".join(f"{name}={getattr(o, name)!r}" for name in o.__dataclass_fields__)
        return f"{options}, backend={self.backend!r}"


def _unflatten(
    student: Tensor, teacher: Tensor, stats: BDKDStats, logits: Tensor, reduction: Reduction
) -> BDKDOutput:
    if logits.ndim != 2:
        leading = logits.shape[:-1]
        stats = BDKDStats(stats.table.reshape(12, *leading))
        if reduction == "none":
            student, teacher = student.reshape(leading), teacher.reshape(leading)
    return BDKDOutput(student, teacher, stats)
