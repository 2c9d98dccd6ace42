"""Cases that every backend of the loss must get right, and their judge, with SPEC's tolerances.

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_agrees_with_float64(case):
        judge(case, "native")

The truth is ``reference.py``, evaluated in float64 on the same, already rounded inputs.
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
from bdkd_kernels.types import STATISTICS
from torch import Tensor

FP64, FP32, BF16, FP16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
SHORT_NAMES = {FP64: "fp64", FP32: "fp32", BF16: "bf16", FP16: "fp16"}

# Half a unit in the last place, relative, and below the normal range, absolute.
ROUNDING = {
    FP64: (0.0, 0.0),
    FP32: (0.0, 0.0),
    BF16: (2.0**-8, 2.0**-134),
    FP16: (2.0**-11, 2.0**-25),
}


@dataclass(frozen=True, eq=False)
class Case:
    """One call of the loss, its inputs drawn from a seed made of its name."""

    name: str
    shape: tuple[int, ...] = (6, 10)  # of the logits
    logits: str = "ordinary"  # a key of DISTRIBUTIONS
    storage: tuple[torch.dtype, torch.dtype] = (FP32, FP32)  # student's, teacher's
    target: str | None = "labels"  # "labels", "soft" or None
    options: dict[str, Any] = field(default_factory=dict)  # of bdkd_loss, but for the tensors
    sample_weight: bool = False
    ignored: bool = False  # about a third of the labels are ignore_index
    offline: bool = False  # the teacher needs no gradient
    layout: str = "contiguous"  # or "rows", "classes", "expanded": see lay_out
    label_type: torch.dtype = torch.int64
    upstream: float | str | None = None  # what backward brings; "rows": one a row; None: grad_scale

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
    hidden[:, 0] = False  # labels of masked cases are 0: see make
    return s.masked_fill(hidden, -math.inf), t.masked_fill(hidden, -math.inf)


DISTRIBUTIONS: dict[str, Callable] = {
    "ordinary": _ordinary,
    "flat": _flat,  # entropies at their largest, divergences near 0
    "peaked": _peaked,  # entropies near 0, as late in training
    "near": _near,  # KL about 1e-8: lost by a difference of two large sums
    "equal": _equal,
    "huge": _huge,  # +-1e4: exp of anything but a shifted logit overflows
    "offset": _offset,  # ordinary spread around +-1e4: lost by logsumexp(x) - x_y unshifted
    "masked": _masked,  # -inf in both networks
}


class Inputs(NamedTuple):
    student: Tensor  # (..., C), a leaf; likewise teacher
    teacher: Tensor
    target: Tensor | None
    sample_weight: Tensor | None  # (...)
    options: dict[str, Any]
    upstream: tuple[Tensor, Tensor]  # gradients of out.student and out.teacher, float64


def lay_out(logits: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout."""
    if layout == "contiguous":
        return logits
    *leading, c = logits.shape
    if layout == "rows":  # row stride > C, and rows that start off any vector's alignment
        wide = torch.full((*leading, c + 5), math.nan, dtype=logits.dtype, device=logits.device)
        return wide[..., 1 : c + 1].copy_(logits)
    if layout == "classes":  # the classes are strided
        return logits.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "expanded":  # one row seen many times: row stride 0
        return logits[:1].expand_as(logits)
    raise ValueError(layout)


def make(case: Case, device: str = "cpu") -> Inputs:
    rng = torch.Generator().manual_seed(zlib.crc32(case.name.encode()))
    *leading, c = case.shape
    n = math.prod(leading)
    options = dict(case.options)

    logits = []
    for drawn, storage in zip(DISTRIBUTIONS[case.logits](rng, n, c), case.storage, strict=True):
        rounded = drawn.to(storage).reshape(case.shape).to(device)
        logits.append(lay_out(rounded, case.layout).detach())
    student, teacher = logits

    target: Tensor | None = None
    if case.target == "labels":
        target = torch.randint(c, (n,), generator=rng)
        if case.logits == "masked":
            target.zero_()
        if case.ignored:
            ignore = torch.rand(n, generator=rng) < 1 / 3
            target[ignore] = options.get("ignore_index", -100)
        target = target.to(case.label_type).reshape(leading).to(device)
    elif case.target == "soft":
        target = torch.rand(n, c, generator=rng)
        target[torch.rand(n, c, generator=rng) < 0.3] = 0.0
        target = (target / target.sum(-1, keepdim=True).clamp(min=0.1)).to(device)
        target = target.masked_fill(student.reshape(n, c).isinf(), 0.0).reshape(case.shape)

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


def _storage_name(storage) -> str:
    return "+".join(dict.fromkeys(SHORT_NAMES[x] for x in storage))


def _grid() -> list[Case]:
    cases = []

    def add(name: str, **kwargs) -> None:
        cases.append(Case(name, **kwargs))

    # Sizes: every way a row can meet a vector, a block and a regime.
    for n, c in (
        (5, 1),  # one class: all divergences and entropies 0
        (5, 2),
        (33, 7),  # fewer classes than a vector; rows that fill no block
        (17, 10),  # CIFAR-10
        (9, 16),  # exactly one AVX-512 vector
        (9, 17),  # and one class over
        (8, 100),  # CIFAR-100
        (5, 1000),  # ImageNet
        (3, 1023), (3, 1024), (3, 1025),  # around a power of two, where blocks are padded
        (2, 4097),  # just past a row that fits on chip
        (2, 33000),  # the loop over blocks, with a ragged last block
        (1, 1000),  # a single row
        (0, 10),  # an empty shard
    ):  # fmt: skip
        add(f"{n}x{c}", shape=(n, c), options={"temperature": 4.0})
    for logits in ("flat", "peaked", "ordinary"):  # where adding one after the other loses digits
        add(f"1x100000-{logits}", shape=(1, 100_000), logits=logits, options={"temperature": 2.0})
    add("300x10", shape=(300, 10))  # more rows than one program or one thread's chunk
    add("131x100-ignored", shape=(131, 100), ignored=True, options={"temperature": 2.0})
    add("shape-c", shape=(10,))  # one sample without a leading dimension
    add("shape-btc", shape=(2, 3, 10), sample_weight=True, ignored=True)
    add("shape-btc-none", shape=(2, 3, 10), options={"reduction": "none"}, target="soft")
    add("shape-empty-btc", shape=(2, 0, 10), options={"reduction": "none"})

    for logits in DISTRIBUTIONS:
        for τ in (1.0, 4.0):
            options = {"temperature": τ, "reduction": "none"}
            add(f"{logits}-tau{τ:g}", shape=(7, 50), logits=logits, options=options)
        add(f"{logits}-wide", shape=(2, 5000), logits=logits, options={"temperature": 2.0})
        add(
            f"{logits}-forward-soft",
            shape=(5, 37),
            logits=logits,
            target="soft",
            options={"teacher_divergence": "forward", "temperature": 3.0, "reduction": "sum"},
        )

    # Storage types and their mixes; fp16 once where its gradients are subnormal.
    pairs = ((FP64, FP64), (BF16, BF16), (FP16, FP16), (BF16, FP32), (FP32, FP16), (FP16, BF16),
             (FP32, FP64), (FP64, BF16))  # fmt: skip
    for storage in pairs:
        name = _storage_name(storage)
        for logits in ("ordinary", "flat", "peaked", "near"):
            add(f"{name}-{logits}", shape=(5, 67), logits=logits, storage=storage,
                options={"temperature": 4.0})  # fmt: skip
        add(f"{name}-wide-tau1", shape=(2, 4500), storage=storage)
        add(f"{name}-huge", shape=(3, 67), logits="huge", storage=storage)
    add("fp16-subnormal", shape=(4, 1000), storage=(FP16, FP16), options={"grad_scale": 2.0**-10})
    add("fp16-loss-scale", shape=(4, 1000), storage=(FP16, FP16), options={"grad_scale": 2.0**12})

    # Temperatures: those with powers by squaring, those without, and extremes.
    for τ in (0.5, 1.0, 2.0, 3.0, 4.0, 8.0, 0.01, 100.0):
        for soften in (True, False):
            options = {"temperature": τ, "soften_entropy": soften, "reduction": "none"}
            add(f"tau{τ:g}-{'soften' if soften else 'plain'}", shape=(9, 21), options=options)

    # Options one by one, then together.
    for gamma in (1.0, 2.5):
        for divergence in ("reverse", "forward"):
            for reduction in ("mean", "sum", "none"):
                options = {"gamma": gamma, "teacher_divergence": divergence, "reduction": reduction}
                add(f"{divergence}-{reduction}-gamma{gamma:g}", options=options, ignored=True,
                    sample_weight=True)  # fmt: skip
    terms = ("student_ce", "student_kd", "teacher_ce", "teacher_kd")
    for absent in range(1, 16):  # every subset of terms switched off
        weights = {name: 0.0 for bit, name in enumerate(terms) if absent >> bit & 1}
        name = "+".join(weights)
        add(f"without-{name}", options={**weights, "temperature": 2.0, "gamma": 3.0})
    add("weights", options={"student_ce": 0.1, "student_kd": 0.9, "teacher_ce": 2.0,
                            "teacher_kd": 0.3, "temperature": 4.0})  # fmt: skip
    for target in ("labels", "soft", None):
        for smoothing in (0.0, 0.1, 1.0):
            if target is None and smoothing:
                continue
            add(f"target-{target}-smooth{smoothing:g}", shape=(7, 13), target=target,
                sample_weight=True, options={"label_smoothing": smoothing})  # fmt: skip
    for label_type in (torch.uint8, torch.int8, torch.int16, torch.int32):
        add(f"labels-{label_type}", label_type=label_type)
    add("ignore-index-a-class", ignored=True, options={"ignore_index": 3, "label_smoothing": 0.1})
    add("ignore-index-none", ignored=True, options={"ignore_index": -1, "reduction": "none"})
    for layout in ("rows", "classes", "expanded"):
        for shape in ((6, 37), (3, 4099)):
            add(f"{layout}-{shape[1]}", shape=shape, layout=layout, options={"temperature": 4.0})
    add("rows-bf16", shape=(6, 129), layout="rows", storage=(BF16, FP32))
    add("offline", offline=True, options={"temperature": 4.0})
    add("offline-fp16", offline=True, storage=(FP16, FP32), options={"grad_scale": 512.0})
    add("offline-no-teacher-terms", offline=True, options={"teacher_ce": 0.0, "teacher_kd": 0.0})

    # The gradient that comes from above is not the announced one: recomputed, never rescaled.
    for storage in ((FP32, FP32), (FP16, FP16), (BF16, FP32)):
        name = _storage_name(storage)
        for c in (10, 1000, 4099):
            add(f"upstream-scalar-{name}-{c}", shape=(4, c), storage=storage, upstream=-3.0,
                options={"temperature": 4.0, "grad_scale": 7.0})  # fmt: skip
        add(f"upstream-rows-{name}", shape=(5, 70), storage=storage, upstream="rows",
            sample_weight=True, ignored=True, options={"reduction": "none"})  # fmt: skip
    add("upstream-zero", upstream=0.0)
    return cases


CASES = _grid()

# For backends that are slow per element or per program (the Triton interpreter): every regime,
# distribution, storage type and option once.
SHORT = [
    case
    for case in CASES
    if math.prod(case.shape) <= 1000
    or case.name in ("5x1000", "2x4097", "2x33000", "bf16-wide-tau1", "upstream-scalar-fp16-4099")
]


def random_case(seed: int, classes: tuple[int, ...] = (1, 2, 3, 7, 10, 64, 100, 333, 1025)) -> Case:
    """A case with everything drawn at random: what the list above forgot."""
    draw = random.Random(seed)
    logits = draw.choice(list(DISTRIBUTIONS))
    reduction = draw.choice(["mean", "sum", "none"])
    weights = ("student_ce", "student_kd", "teacher_ce", "teacher_kd")
    options = {
        "temperature": draw.choice([1.0, 2.0, 3.0, 4.0, 8.0, 0.5, 0.1, 20.0]),
        "gamma": draw.choice([1.0, 2.0, 3.0, 10.0]),
        "teacher_divergence": draw.choice(["reverse", "forward"]),
        "soften_entropy": draw.random() < 0.5,
        "reduction": reduction,
        "label_smoothing": 0.0 if logits == "masked" else draw.choice([0.0, 0.1]),
        **{name: draw.choice([1.0, 1.0, 1.0, 0.0, 0.1, 3.0]) for name in weights},
    }
    storage = (FP32, FP32, BF16, FP16, FP64)
    return Case(
        f"random-{seed}",
        (draw.choice([1, 2, 9, 33]), draw.choice(classes)),
        logits,
        (draw.choice(storage), draw.choice(storage)),
        draw.choice(["labels", "soft", None]),
        options,
        sample_weight=draw.random() < 0.3,
        ignored=draw.random() < 0.3,
        offline=draw.random() < 0.2,
        layout=draw.choice(["contiguous", "rows", "classes", "expanded"]),
        upstream=draw.choice([None, None, 3.0, "rows" if reduction == "none" else 0.1]),
    )


class Result(NamedTuple):
    student: Tensor
    teacher: Tensor
    stats: BDKDStats
    ds: Tensor | None
    dt: Tensor | None


def backward_from(x: Inputs, backend: str) -> Result:
    """Losses by ``bdkd_loss``, gradients by ``backward`` of both from ``x.upstream``."""
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
    """Losses and gradients by ``bdkd_loss_and_grad``."""
    out, (ds, dt) = bdkd_loss_and_grad(x.student, x.teacher, x.target, backend=backend,
                                       sample_weight=x.sample_weight, **x.options)  # fmt: skip
    return Result(*out, ds, dt)


def truth(x: Inputs, weights: tuple[Tensor, Tensor] | None = None) -> Result:
    """The reference in float64 on the same values; ``weights``: d1, d2 instead of its own."""

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
    """Both ways through a backend against float64: dtypes, shapes, 2 losses, 12 statistics, 2
    gradients; and both ways the same losses."""
    x = make(case, device)
    result = backward_from(x, backend)
    compare(x, result, f"{case} bdkd_loss")
    announced = float(x.options.get("grad_scale", 1.0))
    x = x._replace(upstream=tuple(torch.full_like(above, announced) for above in x.upstream))
    compare(x, at_once(x, backend), f"{case} bdkd_loss_and_grad")


def compare(x: Inputs, got: Result, name: str) -> None:
    """Assert that a backend's result for these inputs is the truth, within SPEC's tolerances."""
    wide = FP64 in (x.student.dtype, x.teacher.dtype)
    relative, absolute = (1e-12, 1e-12) if wide else (2e-6, 1e-6)
    want = truth(x, _either_branch(x, got, relative, absolute))
    o = {"temperature": 1.0, "student_kd": 1.0, "teacher_kd": 1.0, **x.options}

    # A sum of rows may be off by what each row may be off.
    rows = x.student.shape[:-1].numel() if o.get("reduction") == "sum" else 1
    for side in ("student", "teacher"):
        value = getattr(got, side)
        assert value.dtype == (FP64 if wide else FP32), f"{name} {side}: {value.dtype}"
        amplified = rows * absolute * max(1.0, o[f"{side}_kd"] * o["temperature"] ** 2)
        truth_value = getattr(want, side)
        close(f"{name} {side}", value, truth_value, relative * truth_value.abs() + amplified)
    for stat in STATISTICS:
        value, truth_value = getattr(got.stats, stat), getattr(want.stats, stat)
        assert value.dtype == (FP64 if wide else FP32), f"{name} {stat}: {value.dtype}"
        assert not value.requires_grad, f"{name} {stat} requires grad"
        exactly = stat in ("student_correct", "teacher_correct")
        tolerance = relative * truth_value.abs() + absolute
        close(f"{name} {stat}", value, truth_value, 0 * tolerance if exactly else tolerance)
    logits_of = zip(("ds", "dt"), (x.student, x.teacher), strict=True)
    sides = zip(logits_of, got[3:], want[3:], gradient_terms(x, want), strict=True)
    for (side, logits), value, truth_value, terms in sides:
        if truth_value is None:
            assert value is None, f"{name} {side}: a gradient for logits that need none"
            continue
        if value is None and not truth_value.any():
            continue  # every term of this network is switched off: its loss is a constant
        assert value is not None, f"{name} {side}: no gradient"
        assert value.dtype == logits.dtype, f"{name} {side}: {value.dtype}"
        # One rounding of the storage type more than the arithmetic's error.
        error = (1e-11 if wide and logits.dtype == FP64 else 5e-6) * terms[..., None]
        unit, smallest = ROUNDING[logits.dtype]
        rounding = (unit * (truth_value.abs() + error)).clamp(min=smallest)
        close(f"{name} {side}", value, truth_value, error + rounding + 1e-45)


def close(name: str, got: Tensor, want: Tensor, tolerance: Tensor | float) -> None:
    """NaN where NaN is wanted, the same infinity, and otherwise within the tolerance."""
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


def _either_branch(x: Inputs, got: Result, relative: float, absolute: float):
    """The weights d1, d2 that the truth must take to follow the backend's choice in rows whose
    entropies differ by less than rounding; None where there is no such row."""
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
    weights = []
    for taken, true in (
        (got.stats.forward_weight, own.forward_weight),
        (got.stats.reverse_weight, own.reverse_weight),
    ):
        taken = taken.to(FP64)
        is_γ = (taken - γ).abs() < 1e-6 * γ
        assert (is_γ | (taken == 1))[undecided].all(), f"a weight is neither 1 nor {γ}"
        weights.append(torch.where(undecided, torch.where(is_γ, γ, 1.0), true).reshape(-1))
    assert γ == 1 or not ((weights[0] == γ) & (weights[1] == γ)).any(), "both weights are gamma"
    return weights[0], weights[1]


def gradient_terms(x: Inputs, want: Result) -> tuple[Tensor, Tensor]:
    """Each row's largest gradient term before cancellation, ``(...)``, student's and teacher's.

    The terms as SPEC writes them: Σq·softmax and q of the cross entropy; p_s and p_t of the KL
    whose second argument is trained; p log p, p log q and p KL of the one whose first is.
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
        terms = (p * log_p, p * log_q, p * kl[..., None])
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
