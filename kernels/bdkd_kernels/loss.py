"""The loss as a function and as a module: checks the arguments, flattens them, picks a backend."""

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
    """Compute BD-KD's losses of a student and its teacher from their logits.

    For every sample, with ``p = softmax(logits / temperature)``, everything in nats::

        student = student_ce * CE(s, y) + student_kd * temperature**2 * (d1 * F + d2 * R)
        teacher = teacher_ce * CE(t, y) + teacher_kd * temperature**2 * R
        F = KL(p_t || p_s)                  R = KL(p_s || p_t)
        d1 = gamma where H(p_t) > H(p_s), else 1
        d2 = gamma where H(p_s) > H(p_t), else 1

    The other network's probabilities and both weights are constants for the gradient, so each loss
    trains its own network only: ``(out.student + out.teacher).backward()`` trains both.

    Args:
        student_logits, teacher_logits: ``(..., C)``, fp16, bf16, fp32 or fp64; the two may differ.
            All arithmetic is float32, or float64 if one of them is. ``-inf`` masks a class.
            Tensors that were made under ``torch.inference_mode()`` are accepted everywhere.
        target: labels ``(...)`` of an integer type, soft labels ``(..., C)`` of a floating type, or
            None for unlabelled data (no cross entropy).
        temperature: of both divergences, in [1e-4, 1e4].
        gamma: the larger of a sample's two weights, in [1, 1e9]. 1 means no weighting.
        student_ce, student_kd, teacher_ce, teacher_kd: weights of the four terms, each 0 or in
            [1e-30, 1e9]. A term of weight 0 is not computed. A loss without any term is 0, and its
            gradients are 0.
        teacher_divergence: ``"reverse"``, KL(p_s || p_t), or ``"forward"``, KL(p_t || p_s).
        soften_entropy: compare the entropies at ``temperature``, or else at 1.
        label_smoothing: as in :func:`torch.nn.functional.cross_entropy`.
        sample_weight: ``(...)``, multiplies each sample's losses; ``mean`` divides by its sum over
            the counted samples. A constant: no gradient flows into it.
        ignore_index: samples with this label have loss 0 and gradients 0 and are not counted.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        grad_scale: the gradient that the backward pass will bring, for example fp16's loss scale: a
            number of float32's range or a 0-dim tensor. Backends that compute gradients in the
            forward pass apply it before rounding. It changes no value.
        backend: ``"auto"``, ``"triton"``, ``"native"`` or ``"reference"``;
            see :func:`available_backends`. Calls under ``torch.func``, forward-mode AD or
            ``torch.jit.trace`` run the reference whatever the backend.

    Returns:
        :class:`BDKDOutput`: ``student`` and ``teacher``, float32 (float64 for float64 logits), and
        ``stats``, the :class:`BDKDStats` of every sample.

    Raises:
        ValueError, TypeError: an argument that does not fit, by name; a label outside [0, C), with
            its row, on the CPU (elsewhere that row's loss is NaN, unless ``BDKD_CHECK_LABELS=1``).
        RuntimeError: ``backend`` is not available here, or not for these tensors.

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
    """Compute :func:`bdkd_loss` and both gradients, in one pass.

    For trainers that call ``torch.autograd.backward([s, t], [ds, dt])`` themselves. The arguments
    are those of :func:`bdkd_loss`. ``ds`` is the gradient of ``out.student`` (of its sum, with
    ``reduction="none"``) with respect to the student's logits, times ``grad_scale``. ``dt`` is that
    of ``out.teacher`` and the teacher's logits. Each has the shape and dtype of its logits.

    If neither network's logits require a gradient, both gradients are computed. If only one does,
    the other gradient is None (offline distillation).

    Args:
        grads: tensors to write the gradients into, ``(ds, dt)``, each of its logits' shape, dtype
            and device. A buffer may be its own network's logits; it must not share memory with any
            other argument, with the other buffer or within itself. Pass None in a place to compute
            no such gradient.

    Returns:
        ``(out, (ds, dt))``; ``out`` is detached.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`bdkd_loss`; a buffer that does not fit.
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
        check_gradient_buffers(
            grads, student_logits, teacher_logits, target, sample_weight, grad_scale, problem.plain
        )
        ds, dt = grads
    implementation = backends.choose(backend, problem)
    student, teacher, stats = implementation.loss_and_grad(
        problem, grad_scale, as_rows("grads[0]", ds), as_rows("grads[1]", dt)
    )
    return _unflatten(student, teacher, stats, student_logits, reduction), (ds, dt)


class BDKDLoss(nn.Module):
    """:func:`bdkd_loss` as a module: options in the constructor, tensors in the call."""

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
