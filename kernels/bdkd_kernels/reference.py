"""BD-KD in eager PyTorch, written as its equations. Tests compare every kernel with this file.

Amara et al., *Balancing the Divergences for Online Knowledge Distillation*, arXiv 2212.12965.
Autograd computes the gradients, independently of the closed forms that the kernels use.

All inputs are flattened to rows: logits ``(N, C)``, labels ``(N,)``, losses ``(N,)``.
"""

import torch
from torch import Tensor

from ._torch_compat import is_exporting, vjp_needs_to_leave_inference_mode
from .checks import check_labels, labels_can_be_read
from .library import copies_to_save
from .options import STATISTICS, LossOptions
from .types import BDKDStats, LossInputs, Pair


def loss(inputs: LossInputs, grad_scale: float | Tensor = 1.0) -> tuple[Pair[Tensor], BDKDStats]:
    """Return the losses, reduced by ``options.reduction``, and the statistics, ``(N,)`` each.

    ``grad_scale`` is not used: autograd computes the gradients from the upstream gradient.
    """
    inputs = savable(inputs)
    o = inputs.options
    if labels_can_be_read(inputs.target):
        check_labels(inputs.target, inputs.student.shape[-1], o.ignore_index)
    dtype = compute_dtype(inputs.student, inputs.teacher)
    s, t = inputs.student.to(dtype), inputs.teacher.to(dtype)  # (N, C)

    counted = None  # (N,) bool; None: every row counts
    if inputs.target is not None and not inputs.target.is_floating_point():
        counted = inputs.target != o.ignore_index
        # Replace ignored rows before anything is computed from them. Otherwise a NaN in such a row
        # could reach the gradients, through 0 * NaN in the backward pass.
        s = torch.where(counted[:, None], s, 0.0)
        t = torch.where(counted[:, None], t, 0.0)

    (student_rows, teacher_rows), stats = row_losses(s, t, inputs.target, o)
    terms = inputs.has_terms()
    if not terms.student:
        student_rows = student_rows + zero_with_graph(s)
    if not terms.teacher:
        teacher_rows = teacher_rows + zero_with_graph(t)

    if counted is not None:
        stats = torch.where(counted, stats, 0.0)
    losses = Pair(
        reduce(student_rows, counted, inputs.sample_weight, o.reduction),
        reduce(teacher_rows, counted, inputs.sample_weight, o.reduction),
    )
    return losses, BDKDStats(stats)


def loss_and_grad(
    inputs: LossInputs, grad_scale: float | Tensor, gradients: Pair[Tensor | None]
) -> tuple[Pair[Tensor], BDKDStats]:
    """Return the detached :func:`loss`, and write the gradients, times ``grad_scale``.

    The gradients are written into the buffers that are not None.
    """
    if is_exporting():
        raise RuntimeError(
            "torch.export cannot record the gradients of backend 'reference': export bdkd_loss, "
            "or use backend='native' or 'triton'"
        )
    if vjp_needs_to_leave_inference_mode():
        with torch.inference_mode(False):
            return loss_and_grad(inputs, grad_scale, gradients)
    inputs = savable(inputs)
    inputs = inputs.with_tensors(student=inputs.student.detach(), teacher=inputs.teacher.detach())
    # Not _asdict, which torch.compile of torch 2.8 does not trace.
    names = ("student", "teacher")
    buffers = {net: x for net, x in zip(names, gradients, strict=True) if x is not None}

    def losses(logits: dict[str, Tensor]):
        losses, stats = loss(inputs.with_tensors(**logits))
        return tuple(losses), stats.table

    wanted = {net: getattr(inputs, net) for net in buffers}
    # The type annotation of torch.func.vjp lacks the third value that has_aux=True returns.
    (student, teacher), pull_back, table = torch.func.vjp(losses, wanted, has_aux=True)  # type: ignore[misc]
    scale = grad_scale.detach() if isinstance(grad_scale, Tensor) else grad_scale
    upstream = tuple((torch.ones_like(x) * scale).to(x.dtype) for x in (student, teacher))
    (computed,) = pull_back(upstream)
    with torch.no_grad():
        for net, buffer in buffers.items():
            write(buffer, computed[net])
    return Pair(student, teacher), BDKDStats(table)


def write(buffer: Tensor, values: Tensor | float) -> None:
    """Write values into a buffer. An inference tensor can be written only in inference mode."""
    if torch.compiler.is_compiling() or not buffer.is_inference():
        buffer.copy_(values) if isinstance(values, Tensor) else buffer.fill_(values)
        return
    with torch.inference_mode():
        buffer.copy_(values) if isinstance(values, Tensor) else buffer.fill_(values)


def row_losses(
    s: Tensor, t: Tensor, target: Tensor | None, o: LossOptions
) -> tuple[Pair[Tensor], Tensor]:
    """Return each row's losses and statistics, before ``ignore_index``, weights and reduction."""
    zero = s.new_zeros(s.shape[0])  # (N,)
    student_loss = teacher_loss = zero
    F = R = H_s = H_t = CE_s = CE_t = d1 = d2 = zero
    log_q_s, log_q_t = log_softmax(s), log_softmax(t)  # at temperature 1

    if o.student_kd or o.teacher_kd:
        τ = o.temperature
        # A network sees its partner's logits as constants: each loss trains one network.
        log_p_s = log_q_s if τ == 1 else log_softmax(s, τ)
        log_p_t = log_q_t if τ == 1 else log_softmax(t, τ)
        const_p_s, const_p_t = log_p_s.detach(), log_p_t.detach()

        if o.soften_entropy:
            H_s, H_t = entropy(const_p_s), entropy(const_p_t)
        else:
            H_s, H_t = entropy(log_q_s.detach()), entropy(log_q_t.detach())
        d1, d2 = balance(H_s, H_t, o.gamma)

        if o.student_kd:
            F = kl(const_p_t, log_p_s)
            R = kl(log_softmax(where_mass(s, const_p_s, const_p_t), τ), const_p_t)
            student_loss = student_loss + o.student_kd * τ**2 * (d1 * F + d2 * R)
        else:
            F, R = kl(const_p_t, const_p_s), kl(const_p_s, const_p_t)

        if o.teacher_kd:
            if o.teacher_divergence == "reverse":
                T = kl(const_p_s, log_p_t)
            else:
                T = kl(log_softmax(where_mass(t, const_p_t, const_p_s), τ), const_p_s)
            teacher_loss = teacher_loss + o.teacher_kd * τ**2 * T

    if target is not None:
        if o.student_ce:
            CE_s = cross_entropy(log_q_s, target, o)
            student_loss = student_loss + o.student_ce * CE_s
        if o.teacher_ce:
            CE_t = cross_entropy(log_q_t, target, o)
            teacher_loss = teacher_loss + o.teacher_ce * CE_t

    confidence_s, correct_s = confidence(s.detach(), log_q_s.detach(), target)
    confidence_t, correct_t = confidence(t.detach(), log_q_t.detach(), target)
    stats = {
        "forward_kl": F, "reverse_kl": R, "student_entropy": H_s, "teacher_entropy": H_t,
        "student_ce": CE_s, "teacher_ce": CE_t, "forward_weight": d1, "reverse_weight": d2,
        "student_confidence": confidence_s, "teacher_confidence": confidence_t,
        "student_correct": correct_s, "teacher_correct": correct_t,
    }  # fmt: skip
    table = torch.stack([stats[name] for name in STATISTICS]).detach()
    return Pair(student_loss, teacher_loss), table


def compute_dtype(student: Tensor, teacher: Tensor) -> torch.dtype:
    """Return float64 if either network's logits are float64, float32 otherwise."""
    wide = student.dtype == torch.float64 or teacher.dtype == torch.float64
    return torch.float64 if wide else torch.float32


def log_softmax(logits: Tensor, τ: float = 1.0) -> Tensor:
    """Return log softmax(logits / τ).

    The logits are shifted before they are divided. Dividing logits of 1e4 first would cause a
    rounding error of 5e-4 in each exponent. torch.log_softmax adds the exponentials one after the
    other, which makes a probability of 0.94 wrong by 2e-5 (float32, 100,000 classes). ``sum`` adds
    them pairwise.
    """
    u = (logits - logits.amax(-1, keepdim=True).detach()) / τ
    return u - u.exp().sum(-1, keepdim=True).log()


def entropy(log_p: Tensor) -> Tensor:
    """Return H(p) = -Σ p log p in nats, with 0 log 0 = 0."""
    p = log_p.exp()
    return -torch.where(p == 0, 0.0, p * log_p).sum(-1)


def balance(H_s: Tensor, H_t: Tensor, γ: float) -> tuple[Tensor, Tensor]:
    """Return the weights d1 of the forward and d2 of the reverse KL, by each row's entropy gap."""
    one = torch.ones_like(H_s)
    d1 = torch.where(H_t > H_s, γ, one)  # student more certain than teacher: cover all its mass
    d2 = torch.where(H_s > H_t, γ, one)  # student less certain than teacher: seek its mode
    return d1, d2


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(p ‖ q) = Σ p (log p - log q), with 0 log 0 = 0.

    With 0 log 0 = 0, a class that is masked in both networks adds nothing. The KL is computed as
    Σ [p (log p - log q) + q - p]. Adding q and subtracting p does not change the sum, because both
    sum to 1, but every term becomes >= 0. So no digits cancel between classes, even if the
    distributions are nearly equal.
    """
    p, q = log_p.exp(), log_q.exp()
    log_ratio = torch.where(p == 0, 0.0, log_p - log_q)
    return (p * log_ratio + q - p).sum(-1)


def where_mass(logits: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return the logits, detached where p is 0, for the gradient of KL(p ‖ q).

    Where p_i is 0, the gradient d KL(p ‖ q) / du_i = p_i (log p_i - log q_i - KL) is then 0, even
    if the KL is infinite. Autograd would compute 0 * inf. If q has a NaN, nothing in its row is
    detached, so that the whole row of the gradient is NaN.
    """
    massless = (log_p.exp() == 0) & ~log_q.isnan().any(-1, keepdim=True)
    return torch.where(massless, logits.detach(), logits)


def zero_with_graph(logits: Tensor) -> Tensor:
    """Return zeros ``(N,)`` whose gradient is 0 for every logit, even for NaN and inf."""
    return logits[:, :0].sum(-1)


def savable(inputs: LossInputs, logits: bool = False) -> LossInputs:
    """Return the inputs with copies of the tensors that autograd cannot save.

    Autograd cannot save tensors that were created in ``torch.inference_mode()``. A compiled call
    cannot recognise them, so there every floating tensor that needs no gradient is copied. Logits
    are copied only if ``logits`` is True, which means that the backward pass reads them.
    """
    if not torch.compiler.is_compiling():
        if torch.is_inference_mode_enabled():
            return inputs
        made_there = {name: x.clone() for name, x in inputs.tensors().items() if x.is_inference()}
        return inputs.with_tensors(**made_there) if made_there else inputs
    copied = {
        name: x
        for name, x in inputs.tensors().items()
        if x.is_floating_point() and not x.requires_grad
        and (logits or name not in ("student", "teacher"))
    }  # fmt: skip
    if not copied or not torch.is_grad_enabled():
        return inputs
    copies = copies_to_save(list(copied.values()))
    return inputs.with_tensors(**dict(zip(copied, copies, strict=True)))


def cross_entropy(log_p: Tensor, target: Tensor, o: LossOptions) -> Tensor:
    """Return -Σ q log p of each row. q is the label or the soft label, smoothed as in torch."""
    ε = o.label_smoothing
    C = log_p.shape[-1]
    if target.is_floating_point():
        q = target.to(log_p.dtype) * (1 - ε) + ε / C
        absent = (q == 0) & ~log_p.isnan()  # 0 log 0 = 0, and a row with a NaN is NaN
        return -torch.where(absent, 0.0, q * log_p).sum(-1)
    in_range = (target >= 0) & (target < C)
    label = torch.where(in_range, target, 0)
    loss = -log_p.gather(-1, label[:, None]).squeeze(-1)
    if ε:
        own = (1 - ε) * loss if ε < 1 else 0.0  # 0 * inf would be NaN
        loss = own - ε * log_p.mean(-1)
    # For a label that is not a class, the loss and its gradients are NaN, computed as 0 / 0:
    # torch 2.8 cannot export a NaN constant.
    exists = in_range.to(loss.dtype)
    return loss * (exists / exists)


def confidence(logits: Tensor, log_q: Tensor, target: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the largest probability at temperature 1, and 1.0 where the argmax is the label.

    The second value is 0.0 in other rows, and in all rows if there is no target.
    """
    largest = log_q.amax(-1).exp()
    if target is None:
        return largest, torch.zeros_like(largest)
    label = target.argmax(-1) if target.is_floating_point() else target
    correct = (logits.argmax(-1) == label) & ~largest.isnan()
    return largest, correct.to(largest.dtype)


def reduce(
    rows: Tensor, counted: Tensor | None, sample_weight: Tensor | None, reduction: str
) -> Tensor:
    """Return the weighted rows, their sum, or their weighted mean over the counted rows."""
    weight = torch.ones_like(rows) if sample_weight is None else sample_weight.to(rows.dtype)
    if counted is not None:
        weight = torch.where(counted, weight, 0.0)
        rows = torch.where(counted, rows, 0.0)
    rows = rows * weight
    if reduction == "none":
        return rows
    if reduction == "sum":
        return rows.sum()
    total = weight.sum()
    return rows.sum() / torch.where(total == 0, 1.0, total)  # 0 instead of 0 / 0
