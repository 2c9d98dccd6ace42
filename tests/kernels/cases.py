"""Random calls of the loss for every backend, and a function that checks their results.

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_agrees_with_float64(case):
        judge(case, "native")

``CASES`` samples the product of sizes, kinds of rows, storage types, layouts, targets and every
option of the loss. A batch mixes rows of many kinds, so that masked classes, NaN and infinite rows,
denormal and huge logits meet every combination of options. The expected result is that of
``reference.py`` in float64, on the same rounded inputs.
"""

import math
import random
import zlib
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from unittest import mock

import torch
from bdkd_kernels import BDKDStats, bdkd_loss, bdkd_loss_and_grad, reference
from bdkd_kernels.options import STATISTICS
from torch import Tensor

FP64, FP32, BF16, FP16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
# The rounding error of each type: half a unit in the last place (relative), and the absolute error
# below the normal range.
ROUNDING = {
    FP64: (0.0, 0.0),
    FP32: (0.0, 0.0),
    BF16: (2.0**-8, 2.0**-134),
    FP16: (2.0**-11, 2.0**-25),
}


@dataclass(frozen=True, eq=False)
class Case:
    """One call of the loss. Its name is the seed of its random inputs."""

    name: str
    shape: tuple[int, ...] = (6, 10)  # of the logits
    logits: str = "ordinary"  # a key of DISTRIBUTIONS; "any", "finite": a random one for each row
    storage: tuple[torch.dtype, torch.dtype] = (FP32, FP32)  # student's, teacher's
    target: str | None = "labels"  # "labels", "soft" or None
    options: dict[str, Any] = field(default_factory=dict)  # arguments of bdkd_loss but the tensors
    sample_weight: bool = False
    ignored: bool = False  # about a third of the labels are ignore_index
    offline: bool = False  # the teacher needs no gradient
    layout: str = "contiguous"  # or "rows", "classes", "expanded": see lay_out
    label_type: torch.dtype = torch.int64
    soft_type: torch.dtype = FP32
    upstream: float | str | None = None  # upstream gradient; "rows": (N,) values; None: grad_scale

    def __str__(self) -> str:
        return self.name


def _ordinary(rng, n, c):
    s = 2.0 * torch.randn(n, c, generator=rng, dtype=FP64)
    return s, 0.5 * s + 2.0 * torch.randn(n, c, generator=rng, dtype=FP64)


def _flat(rng, n, c):
    return tuple(0.01 * torch.randn(2, n, c, generator=rng, dtype=FP64))


def _peaked(rng, n, c):
    both = 2.0 * torch.randn(2, n, c, generator=rng, dtype=FP64)
    peak = torch.randint(c, (2, n, 1), generator=rng)
    both.scatter_add_(-1, peak, torch.full((2, n, 1), 15.0, dtype=FP64))
    return tuple(both)


def _near(rng, n, c):
    s = 2.0 * torch.randn(n, c, generator=rng, dtype=FP64)
    return s, s + 1e-4 * torch.randn(n, c, generator=rng, dtype=FP64)


def _equal(rng, n, c):
    s = 2.0 * torch.randn(n, c, generator=rng, dtype=FP64)
    return s, s.clone()


def _huge(rng, n, c):
    return tuple(1e4 * (2.0 * torch.rand(2, n, c, generator=rng, dtype=FP64) - 1.0))


def _offset(rng, n, c):
    s, t = _ordinary(rng, n, c)
    return s + 1e4, t - 1e4


def _masked(rng, n, c):
    s, t = _ordinary(rng, n, c)
    hidden = torch.rand(n, c, generator=rng) < 0.3
    hidden[:, 0] = False
    return s.masked_fill(hidden, -math.inf), t.masked_fill(hidden, -math.inf)


def _one_sided(rng, n, c):
    """Mask a class in one network, or one class in each, where the other network has mass."""
    s, t = _ordinary(rng, n, c)
    for row in range(n):
        which = int(torch.randint(3, (), generator=rng))
        for x, other in ((s, t), (t, s))[which % 2 : 1 + (which + 1) // 2 + which // 2]:
            masked = int(torch.randint(c, (), generator=rng))
            other[row, masked] = other[row].max()
            x[row, masked] = -math.inf
    return s, t


def _spoiled(value):
    """Return a function that draws rows in which one network or both contain this value."""

    def draw(rng, n, c):
        s, t = _masked(rng, n, c)
        for row in range(n):
            which = int(torch.randint(3, (), generator=rng))
            for x in (s, t)[which % 2 : 1 + (which + 1) // 2]:
                x[row, int(torch.randint(c, (), generator=rng))] = value
        return s, t

    return draw


def _empty(rng, n, c):
    """Mask all classes in one network or in both."""
    s, t = _ordinary(rng, n, c)
    which = torch.randint(3, (n,), generator=rng)
    s[which != 1] = -math.inf
    t[which != 0] = -math.inf
    return s, t


def _denormal(rng, n, c):
    return tuple(2e-39 * torch.randn(2, n, c, generator=rng, dtype=FP64))


def _tied(rng, n, c):
    return tuple(torch.randint(-1, 2, (2, n, c), generator=rng).to(FP64))


# Functions that return both logits (n, c) from a generator, the number of rows and of classes.
DISTRIBUTIONS: dict[str, Callable] = {
    "ordinary": _ordinary,
    "flat": _flat,  # entropies near their maximum, divergences near 0
    "peaked": _peaked,  # entropies near 0, as late in training
    "near": _near,  # KL about 1e-8: the difference of two large sums would lose it
    "equal": _equal,
    "huge": _huge,  # +-1e4: exp overflows unless the logits are shifted
    "offset": _offset,  # ordinary spread around +-1e4: logsumexp(x) - x_y would lose it
    "masked": _masked,  # -inf in both networks
    "tied": _tied,  # several largest classes; few distinct values
    "denormal": _denormal,  # logits below the normal range of float32
    "one-sided": _one_sided,  # an infinite divergence in a batch with finite rows
    "nan": _spoiled(math.nan),
    "infinite": _spoiled(math.inf),  # not a distribution: the results are NaN
    "empty": _empty,
}
FINITE = list(DISTRIBUTIONS)[:10]  # with finite losses, so that sums over rows can be compared


def draw_rows(rng: torch.Generator, kinds: list[str], c: int) -> tuple[Tensor, Tensor]:
    """Return both networks' logits ``(N, C)``, with these kinds of rows."""
    s, t = torch.empty(2, len(kinds), c, dtype=FP64).unbind()
    for kind in dict.fromkeys(kinds):
        rows = torch.tensor([other == kind for other in kinds])
        s[rows], t[rows] = DISTRIBUTIONS[kind](rng, int(rows.sum()), c)
    return s, t


class Inputs(NamedTuple):
    student: Tensor  # (..., C), a leaf
    teacher: Tensor  # (..., C), a leaf
    target: Tensor | None
    sample_weight: Tensor | None  # (...)
    options: dict[str, Any]
    upstream: tuple[Tensor, Tensor]  # gradients of out.student and out.teacher, float64


def lay_out(logits: Tensor, layout: str) -> Tensor:
    """Return the same values in another memory layout."""
    if layout == "contiguous":
        return logits
    *leading, c = logits.shape
    if layout == "rows":  # row stride > C, and rows that are not aligned to vectors
        wide = torch.full((*leading, c + 5), math.nan, dtype=logits.dtype, device=logits.device)
        return wide[..., 1 : c + 1].copy_(logits)
    if layout == "classes":  # the classes are strided
        return logits.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "expanded":  # every row is the first row: row stride 0
        return logits[:1].expand_as(logits)
    raise ValueError(layout)


def make(case: Case, device: str = "cpu") -> Inputs:
    rng = torch.Generator().manual_seed(zlib.crc32(case.name.encode()))
    *leading, c = case.shape
    n = math.prod(leading)
    options = dict(case.options)

    kinds = [case.logits] * n
    if case.logits in ("any", "finite"):
        choices = FINITE if case.logits == "finite" else list(DISTRIBUTIONS)
        kinds = [choices[int(i)] for i in torch.randint(len(choices), (n,), generator=rng)]
    logits = []
    for drawn, storage in zip(draw_rows(rng, kinds, c), case.storage, strict=True):
        rounded = drawn.to(storage).reshape(case.shape).to(device)
        logits.append(lay_out(rounded, case.layout).detach())
    student, teacher = logits

    target: Tensor | None = None
    if case.target == "labels":
        target = torch.randint(c, (n,), generator=rng)
        if case.logits != "any":
            chosen = student.cpu().reshape(n, c).gather(1, target[:, None])[:, 0]
            target[chosen.isinf()] = 0
        if case.ignored:
            ignore = torch.rand(n, generator=rng) < 1 / 3
            target[ignore] = options.get("ignore_index", -100)
        target = target.to(case.label_type).reshape(leading).to(device)
    elif case.target == "soft":
        target = torch.rand(n, c, generator=rng)
        target[torch.rand(n, c, generator=rng) < 0.3] = 0.0
        target[torch.rand(n, generator=rng) < 0.1] = 0.0  # no label at all
        target = (target / target.sum(-1, keepdim=True).clamp(min=0.1)).to(device)
        if case.logits != "any":
            target = target.masked_fill(student.reshape(n, c).isinf(), 0.0)
        target = target.to(case.soft_type).reshape(case.shape)

    weight = None
    if case.sample_weight:
        weight = 1.5 * torch.rand(n, generator=rng)
        weight[::5] = 0.0
        weight = weight.reshape(leading).to(device)

    shape = tuple(leading) if options.get("reduction") == "none" else ()
    if case.upstream == "rows":
        upstream = tuple(torch.randn(2, *shape, generator=rng, dtype=FP64).to(device))
    else:
        value = options.get("grad_scale", 1.0) if case.upstream is None else case.upstream
        upstream = tuple(torch.full((2, *shape), float(value), dtype=FP64, device=device))
    student.requires_grad_()
    teacher.requires_grad_(not case.offline)
    return Inputs(student, teacher, target, weight, options, upstream)


# Sizes, and the number of calls of each. They cover every way in which a row can fill vectors and
# blocks, and every kernel.
SIZES: dict[tuple[int, ...], int] = {
    (5, 1): 6,  # one class: all divergences and entropies 0
    (6, 2): 10,
    (33, 7): 30,  # fewer classes than a vector; rows that fill no block; every kind of row
    (17, 10): 30,  # CIFAR-10
    (9, 16): 12,  # exactly one AVX-512 vector
    (9, 17): 12,  # one class more than an AVX-512 vector
    (12, 40): 30,  # rows of two vectors and a remainder
    (8, 100): 20,  # CIFAR-100
    (131, 33): 4,  # more rows than one program or one thread computes
    (5, 1000): 8,  # ImageNet
    (3, 1023): 4, (3, 1024): 4, (3, 1025): 4,  # around a power of two, where blocks are padded
    (4, 4097): 8,  # one class more than the longest row that stays in registers
    (3, 5000): 6,  # computed in parts, with rising maxima
    (2, 33000): 3,  # the loop over blocks, with a partial last block
    (1, 100_000): 3,  # where adding the classes one by one loses digits
    (300, 10): 2,
    (10,): 4,  # one sample without a leading dimension
    (2, 3, 10): 10,  # (batch, time, classes)
    (0, 10): 3,  # an empty shard
    (2, 0, 10): 2,
}  # fmt: skip

# Temperatures whose powers are computed by squaring, other temperatures, and extremes. With a low
# temperature, the probabilities of all classes but the largest are 0.
TEMPERATURES = (1.0, 4.0, 2.0, 8.0, 3.0, 1.7, 0.5, 0.1, 0.02, 0.01, 20.0, 100.0, 1e-4, 1e4)


def sampled_case(name: str, shape: tuple[int, ...]) -> Case:
    """Return a call of this size. Everything else is random, with its name as the seed."""
    draw = random.Random(name)
    half = draw.choice([BF16, FP16])
    labels = [torch.int64] * 4 + [torch.int32] + [torch.int8] * (shape[-1] < 128)
    storage = draw.choice(
        [(FP32, FP32)] * 6
        + [(half, half)] * 4
        + [(FP64, FP64)] * 3
        + [(half, FP32), (FP32, half), (BF16, FP16), (FP32, FP64), (FP64, half)]
    )
    reduction = draw.choice(["mean", "sum", "none", "none"])
    options = {
        "temperature": draw.choice(TEMPERATURES + TEMPERATURES[:4] * 2),
        "gamma": draw.choice([1.0, 1.7, 2.0, 3.0, 10.0]),
        "teacher_divergence": draw.choice(["reverse", "forward"]),
        "soften_entropy": draw.random() < 0.5,
        "label_smoothing": draw.choice([0.0, 0.0, 0.1, 1 / 3, 1.0]),
        "ignore_index": draw.choice([-100, -100, 0, -1]),
        "reduction": reduction,
        # float32 rounds 0.1. Gradients in float64 must not contain this rounding.
        "grad_scale": draw.choice([1.0, 0.1, 7.0, 2.0**-10, 1024.0]),
    }
    for weight in ("student_ce", "student_kd", "teacher_ce", "teacher_kd"):
        options[weight] = draw.choice([1.0, 1.0, 1.0, 0.0, 0.1, 1 / 3, 3.0])
    kinds = list(DISTRIBUTIONS)
    if reduction != "none":
        kinds = FINITE + ["finite"] * 8
    return Case(
        name,
        shape,
        draw.choice([*kinds, *["any"] * 8]),
        storage,
        draw.choice(["labels", "labels", "soft", None]),
        options,
        sample_weight=draw.random() < 0.3,
        ignored=draw.random() < 0.4,
        offline=draw.random() < 0.15,
        layout=draw.choice(["contiguous"] * 2 + ["rows", "classes", "expanded"] * (len(shape) > 1)),
        label_type=draw.choice(labels),
        soft_type=draw.choice([FP32, FP32, FP64, BF16, FP16]),
        upstream=draw.choice([None, None, -3.0, 0.0, "rows" if reduction == "none" else 0.1]),
    )  # fmt: skip


def sample(scale: float, salt: str = "") -> list[Case]:
    """Return ``scale`` times as many calls of each size as in ``SIZES``. ``salt`` is a seed."""
    return [
        sampled_case(f"{'x'.join(map(str, shape))}-{salt}{i}", shape)
        for shape, count in SIZES.items()
        for i in range(max(1, round(scale * count)))
    ]


CASES = sample(1.0)


def short_sample(scale: float) -> list[Case]:
    """Return small calls, for backends that are slow (the Triton interpreter)."""
    return [
        case
        for case in sample(scale)
        if math.prod(case.shape) <= 20_000 and math.prod(case.shape[:-1]) <= 33
    ]


class Result(NamedTuple):
    student: Tensor
    teacher: Tensor
    stats: BDKDStats
    ds: Tensor | None
    dt: Tensor | None


def backward_from(x: Inputs, backend: str) -> Result:
    """Return the losses of ``bdkd_loss``, and the gradients of ``backward`` from ``x.upstream``."""
    student = x.student.detach().requires_grad_(x.student.requires_grad)
    teacher = x.teacher.detach().requires_grad_(x.teacher.requires_grad)
    out = bdkd_loss(student, teacher, x.target, sample_weight=x.sample_weight, backend=backend,
                    **x.options)  # fmt: skip
    losses = [
        (loss, above.to(loss.dtype))
        for loss, above in zip((out.student, out.teacher), x.upstream, strict=True)
        if loss.requires_grad
    ]
    if losses:
        torch.autograd.backward(*map(list, zip(*losses, strict=True)))
    return Result(out.student.detach(), out.teacher.detach(), out.stats, student.grad, teacher.grad)


def at_once(x: Inputs, backend: str) -> Result:
    """Return the losses and gradients of ``bdkd_loss_and_grad``."""
    out, (ds, dt) = bdkd_loss_and_grad(x.student, x.teacher, x.target, backend=backend,
                                       sample_weight=x.sample_weight, **x.options)  # fmt: skip
    return Result(*out, ds, dt)


def truth(x: Inputs, weights: tuple[Tensor, Tensor] | None = None) -> Result:
    """Return the result of the reference in float64. ``weights`` (d1, d2) replace its own."""

    def wide(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or not tensor.is_floating_point():
            return tensor
        return tensor.detach().to(FP64).requires_grad_(tensor.requires_grad)

    x = x._replace(student=wide(x.student), teacher=wide(x.teacher), target=wide(x.target),
                   sample_weight=wide(x.sample_weight))  # fmt: skip
    forced = mock.patch.object(reference, "balance", return_value=weights)
    with forced if weights is not None else nullcontext():
        result = backward_from(x, "reference")
    zeros = [torch.zeros_like(x.student), torch.zeros_like(x.teacher)]
    grads = [
        zero if grad is None and logits.requires_grad else grad
        for zero, grad, logits in zip(zeros, result[3:], (x.student, x.teacher), strict=True)
    ]
    return result._replace(ds=grads[0], dt=grads[1])


def judge(case: Case, backend: str, device: str = "cpu") -> None:
    """Compare ``bdkd_loss`` and ``bdkd_loss_and_grad`` of a backend with the reference in float64.

    Compares dtypes, shapes, the losses, the statistics and the gradients.
    """
    x = make(case, device)
    result = backward_from(x, backend)
    compare(x, result, f"{case} bdkd_loss")
    assumed = float(x.options.get("grad_scale", 1.0))
    x = x._replace(upstream=tuple(torch.full_like(above, assumed) for above in x.upstream))
    compare(x, at_once(x, backend), f"{case} bdkd_loss_and_grad")


def compare(x: Inputs, got: Result, name: str) -> None:
    """Assert that a backend's result for these inputs equals the reference, within tolerances."""
    wide = FP64 in (x.student.dtype, x.teacher.dtype)
    relative, absolute = (1e-12, 1e-12) if wide else (2e-6, 1e-6)
    want = truth(x, either_branch(x, got, relative, absolute))
    o = dict.fromkeys(("temperature", "student_ce", "student_kd", "teacher_ce", "teacher_kd"), 1.0)
    o.update(x.options)

    # The error of a sum of rows may be the sum of the errors of the rows.
    rows = x.student.shape[:-1].numel() if o.get("reduction") == "sum" else 1
    for side in ("student", "teacher"):
        value = getattr(got, side)
        assert value.dtype == (FP64 if wide else FP32), f"{name} {side}: {value.dtype}"
        # The absolute error of a divergence is multiplied by the factors of its term.
        weight = o[f"{side}_kd"] * (max(1.0, o.get("gamma", 2.0) / 2) if side == "student" else 1.0)
        amplified = rows * absolute * max(1.0, o[f"{side}_ce"], weight * o["temperature"] ** 2)
        truth_value = getattr(want, side)
        close(f"{name} {side}", value, truth_value, relative * truth_value.abs() + amplified)
    for stat in STATISTICS:
        value, truth_value = getattr(got.stats, stat), getattr(want.stats, stat)
        assert value.dtype == (FP64 if wide else FP32), f"{name} {stat}: {value.dtype}"
        assert not value.requires_grad, f"{name} {stat} requires grad"
        exactly = stat in ("student_correct", "teacher_correct")
        tolerance = relative * truth_value.abs() + absolute
        close(f"{name} {stat}", value, truth_value, 0 * tolerance if exactly else tolerance)
    tiny = underflows_in(x, 1e-300 if wide else 1e-35)
    logits_of = zip(("ds", "dt"), (x.student, x.teacher), strict=True)
    sides = zip(logits_of, got[3:], want[3:], gradient_terms(x, want), strict=True)
    for (side, logits), value, truth_value, terms in sides:
        if truth_value is None:
            assert value is None, f"{name} {side}: a gradient for logits that need none"
            continue
        if value is None and not truth_value.any():
            continue  # this network's loss has no terms, so it is a constant
        assert value is not None, f"{name} {side}: no gradient"
        assert value.dtype == logits.dtype, f"{name} {side}: {value.dtype}"
        # The error of the arithmetic, plus one rounding to the storage type.
        error = (1e-11 if wide and logits.dtype == FP64 else 5e-6) * terms[..., None]
        unit, smallest = ROUNDING[logits.dtype]
        rounding = (unit * (truth_value.abs() + error)).clamp(min=smallest)
        overflow = truth_value.isfinite() & truth_value.to(logits.dtype).isinf()
        truth_value = torch.where(overflow, truth_value.sign() * math.inf, truth_value)
        # A probability that underflows in some types, times an infinity, is 0 or infinite.
        infinite = ~(truth_value.isfinite() & value.isfinite())
        value = torch.where(tiny & infinite, truth_value, value.to(FP64))
        close(f"{name} {side}", value, truth_value, error + rounding + 1e-37)


def underflows_in(x: Inputs, smallest: float) -> Tensor:
    """Return a mask ``(..., C)`` of the classes whose softened probability underflows.

    Their probability is below ``smallest`` in one of the networks, but they are not masked there.
    """
    τ = float(x.options.get("temperature", 1.0))
    logits = (x.student.detach().to(FP64), x.teacher.detach().to(FP64))
    log_p_s, log_p_t = (reference.log_softmax(u, τ) for u in logits)
    limit = math.log(smallest)
    return ((log_p_s < limit) & (log_p_s > -math.inf)) | ((log_p_t < limit) & (log_p_t > -math.inf))


def close(name: str, got: Tensor, want: Tensor, tolerance: Tensor | float) -> None:
    """Assert that values are within the tolerance, and that NaN and infinities are the same."""
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, not {tuple(want.shape)}"
    got, want = got.detach().to(FP64), want.detach().to(FP64)
    error = (got - want).abs()
    within = (error <= tolerance) & want.isfinite()
    fine = within | (got == want) | (got.isnan() & want.isnan())
    if not fine.all():
        worst = tuple((~fine).nonzero()[0].tolist())
        limit = torch.as_tensor(tolerance).expand_as(want)[worst].item()
        raise AssertionError(
            f"{name}{list(worst)} is {got[worst].item():.9g}, not {want[worst].item():.9g}: "
            f"off by {error[worst].item():.3g}, allowed {limit:.3g} "
            f"({int((~fine).sum())} of {fine.numel()} values are off)"
        )


def either_branch(x: Inputs, got: Result, relative: float, absolute: float):
    """Return weights d1, d2 for the reference, or None if it can use its own.

    In rows whose entropies differ by less than their rounding errors, the backend may choose either
    weight. In these rows, the returned weights are those that the backend has chosen.
    """
    own = truth(x).stats
    if not x.options.get("student_kd", 1.0) and not x.options.get("teacher_kd", 1.0):
        return None
    gap = (own.teacher_entropy - own.student_entropy).abs()
    undecided = gap <= relative * own.student_entropy + absolute
    if x.target is not None and not x.target.is_floating_point():
        undecided &= x.target != x.options.get("ignore_index", -100)
    if not undecided.any():
        return None
    γ = float(x.options.get("gamma", 2.0))
    one = torch.ones((), dtype=FP64, device=gap.device)  # torch.where of two numbers is float32
    weights = []
    for taken, true in (
        (got.stats.forward_weight, own.forward_weight),
        (got.stats.reverse_weight, own.reverse_weight),
    ):
        taken = taken.to(FP64)
        is_γ = (taken - γ).abs() < 1e-6 * γ
        assert (is_γ | (taken == 1))[undecided].all(), f"a weight is neither 1 nor {γ}"
        weights.append(torch.where(undecided, torch.where(is_γ, γ * one, one), true).reshape(-1))
    assert γ == 1 or not ((weights[0] == γ) & (weights[1] == γ)).any(), "both weights are gamma"
    return weights[0], weights[1]


def gradient_terms(x: Inputs, want: Result) -> tuple[Tensor, Tensor]:
    """Return each row's largest gradient term before cancellation, ``(...)``, for both networks.

    The terms are Σq·softmax and q of the cross entropy, p_s and p_t of the KL whose second argument
    is trained, and p log p, p log q and p KL of the KL whose first argument is trained.
    """
    o = {"temperature": 1.0, "student_ce": 1.0, "student_kd": 1.0, "teacher_ce": 1.0,
         "teacher_kd": 1.0, "teacher_divergence": "reverse", "reduction": "mean",
         "ignore_index": -100, **x.options}  # fmt: skip
    c = x.student.shape[-1]
    τ = float(o["temperature"])
    s, t = x.student.detach().to(FP64), x.teacher.detach().to(FP64)  # (..., C)
    log_p_s, log_p_t = reference.log_softmax(s, τ), reference.log_softmax(t, τ)
    p_s, p_t = log_p_s.exp(), log_p_t.exp()
    forward, reverse = want.stats.forward_kl, want.stats.reverse_kl  # (...)

    def largest(terms: Tensor) -> Tensor:
        return terms.abs().nan_to_num(0.0, 0.0, 0.0).amax(-1)

    def first(p, log_p, log_q, kl):
        # p / 16: the log-ratio of two p near 1 comes from two float32 sums near 1, each rounded by
        # 6e-8, even if the log-ratio is tiny. (The error of an H200 was 1.8e-7, and p / 32 would
        # allow 1.6e-7.)
        terms = (p * log_p, p * log_q, p * kl[..., None], p / 16)
        return torch.stack([largest(x) for x in terms]).amax(0)

    second = torch.maximum(largest(p_s), largest(p_t))
    first_s, first_t = first(p_s, log_p_s, log_p_t, reverse), first(p_t, log_p_t, log_p_s, forward)
    d1, d2 = want.stats.forward_weight, want.stats.reverse_weight
    student = o["student_kd"] * τ * torch.maximum(d1 * second, d2 * first_s)
    teacher = o["teacher_kd"] * τ * (second if o["teacher_divergence"] == "reverse" else first_t)
    counted = torch.ones_like(forward)
    if x.target is not None:
        soft = x.target.is_floating_point()
        mass = x.target.to(FP64).sum(-1) if soft else torch.ones_like(forward)
        q = x.target.to(FP64).amax(-1) if soft else torch.ones_like(forward)
        ε = o.get("label_smoothing", 0.0)
        q, mass = (1 - ε) * q + ε / c, (1 - ε) * mass + ε
        ce_s = torch.maximum(q, mass * largest(reference.log_softmax(s).exp()))
        ce_t = torch.maximum(q, mass * largest(reference.log_softmax(t).exp()))
        student = torch.maximum(student, o["student_ce"] * ce_s)
        teacher = torch.maximum(teacher, o["teacher_ce"] * ce_t)
        if not soft:
            counted = (x.target != o["ignore_index"]).to(FP64)
    weight = counted if x.sample_weight is None else counted * x.sample_weight.to(FP64)
    if o["reduction"] == "mean" and weight.sum() != 0:
        weight = weight / weight.sum()
    above_s, above_t = x.upstream
    return student * (weight * above_s).abs(), teacher * (weight * above_t).abs()
