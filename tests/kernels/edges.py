"""Edge cases of the loss, and the behaviour that users of PyTorch expect from autograd.

The checks run on any backend:

    @pytest.mark.parametrize("edge", EDGES, ids=lambda edge: edge.__name__)
    def test_edge(edge):
        edge("native")
"""

import contextlib
import math
import zlib
from collections.abc import Callable
from unittest import mock

import pytest
import torch
from bdkd_kernels import BDKDStats, autograd, bdkd_loss, bdkd_loss_and_grad
from bdkd_kernels.options import STATISTICS
from cases import (
    BF16,
    FP16,
    FP32,
    FP64,
    Inputs,
    Result,
    at_once,
    backward_from,
    close,
    compare,
    truth,
)
from torch import Tensor

EDGES: list[Callable[..., None]] = []  # of (backend, device="cpu")


def edge(function: Callable[..., None]) -> Callable[..., None]:
    EDGES.append(function)
    return function


def draw(name: str, n: int = 5, c: int = 11, device: str = "cpu", dtype=FP32):
    """Return the student's and the teacher's logits ``(n, c)``, without gradients, and labels."""
    rng = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    s, t = (2.0 * torch.randn(2, n, c, generator=rng, dtype=FP64)).to(device, dtype)
    return s, t, torch.randint(c, (n,), generator=rng).to(device)


def run(s, t, y, backend: str, *, sample_weight=None, offline=False, **options) -> list[Result]:
    """Return the results of ``bdkd_loss`` and ``bdkd_loss_and_grad`` for new leaves."""
    shape = s.shape[:-1] if options.get("reduction") == "none" else ()
    x = Inputs(
        s.detach().requires_grad_(),
        t.detach().requires_grad_(not offline),
        y,
        sample_weight,
        options,
        (torch.ones(shape, dtype=FP64, device=s.device),) * 2,
    )
    return [backward_from(x, backend), at_once(x, backend)]


def judged(s, t, y, backend: str, **options) -> list[Result]:
    """Return :func:`run`, after each result was compared with the reference in float64."""
    results = run(s, t, y, backend, **options)
    weight, offline = options.pop("sample_weight", None), options.pop("offline", False)
    shape = s.shape[:-1] if options.get("reduction") == "none" else ()
    above = (torch.ones(shape, dtype=FP64, device=s.device),) * 2
    leaves = s.detach().requires_grad_(), t.detach().requires_grad_(not offline)
    for result in results:
        compare(Inputs(*leaves, y, weight, options, above), result, "edge")
    return results


def same(a: Result, b: Result, rows: Tensor | slice = slice(None)) -> None:
    """Assert two results bitwise equal in these rows."""
    for name, x, y in (
        ("student", a.student, b.student),
        ("teacher", a.teacher, b.teacher),
        *zip(STATISTICS, a.stats.table, b.stats.table, strict=True),
        ("ds", a.ds, b.ds),
        ("dt", a.dt, b.dt),
    ):
        pick = rows if x.ndim else ...
        assert torch.equal(x[pick], y[pick]), f"{name}: {x[pick]} is not {y[pick]}"


@edge
def ignored_rows_are_zero_and_not_counted(backend, device="cpu"):
    s, t, y = draw("ignored", device=device)
    y[1] = y[3] = -100
    kept = [0, 2, 4]
    for reduction in ("mean", "sum"):
        few = run(s[kept], t[kept], y[kept], backend, reduction=reduction)
        for all_, some in zip(judged(s, t, y, backend, reduction=reduction), few, strict=True):
            close("student", all_.student, some.student, 1e-6 * some.student.abs().item())
            close("teacher", all_.teacher, some.teacher, 1e-6 * some.teacher.abs().item())
            close("ds", all_.ds[kept], some.ds, 1e-6)
            close("dt", all_.dt[kept], some.dt, 1e-6)
            assert not all_.ds[[1, 3]].any()
            assert not all_.dt[[1, 3]].any()
            assert not all_.stats.table[:, [1, 3]].any()


@edge
def an_ignored_row_with_nan_or_inf_is_zero(backend, device="cpu"):
    s, t, y = draw("ignored nan", device=device)
    y[1] = y[3] = -100
    clean = run(s, t, y, backend)
    s[1], t[1, 2], s[3, 0], t[3] = math.nan, math.nan, math.inf, -math.inf
    weight = torch.ones(5, device=device)
    for a, b in zip(judged(s, t, y, backend), clean, strict=True):
        same(a, b)
    weight[1] = math.nan
    for result in run(s, t, y, backend, sample_weight=weight):
        assert result.student.isfinite()
        assert result.ds.isfinite().all()


@edge
def all_rows_ignored_is_zero(backend, device="cpu"):
    s, t, y = draw("all ignored", device=device)
    for reduction in ("mean", "sum", "none"):
        for weight in (None, torch.ones(5, device=device)):
            for result in run(s, t, torch.full_like(y, -100), backend, reduction=reduction,
                              sample_weight=weight):  # fmt: skip
                for value in (result.student, result.teacher, result.ds, result.dt, *result.stats):
                    assert torch.equal(value, torch.zeros_like(value))


@edge
def mean_is_the_weighted_mean_of_none(backend, device="cpu"):
    s, t, y = draw("weights", device=device)
    y[2] = -100
    weight = torch.tensor([0.5, 2.0, 7.0, 0.0, 1.25], device=device)
    counted = torch.tensor([0.5, 2.0, 0.0, 0.0, 1.25], dtype=FP64, device=device)
    plain = run(s, t, y, backend, reduction="none")
    none = judged(s, t, y, backend, reduction="none", sample_weight=weight)
    total = judged(s, t, y, backend, reduction="sum", sample_weight=weight)
    mean = judged(s, t, y, backend, sample_weight=weight)
    for p, n, sum_, m in zip(plain, none, total, mean, strict=True):
        for name in ("student", "teacher"):
            rows = counted * getattr(p, name)
            close(name, getattr(n, name), rows, 1e-6 * (1 + rows.abs()))
            close(name, getattr(sum_, name), rows.sum(), 1e-5)
            close(name, getattr(m, name), rows.sum() / 3.75, 1e-5)
        for name in ("ds", "dt"):
            close(name, getattr(n, name), counted[:, None] * getattr(p, name), 1e-5)
            close(name, getattr(m, name), getattr(n, name) / 3.75, 1e-5)


@edge
def all_sample_weights_zero_is_zero(backend, device="cpu"):
    s, t, y = draw("zero weights", device=device)
    for result in judged(s, t, y, backend, sample_weight=torch.zeros(5, device=device)):
        for value in (result.student, result.teacher, result.ds, result.dt):
            assert torch.equal(value, torch.zeros_like(value))


@edge
def without_a_target_there_is_no_cross_entropy(backend, device="cpu"):
    s, t, y = draw("unlabelled", device=device)
    without = judged(s, t, y, backend, student_ce=0.0, teacher_ce=0.0)
    for a, b in zip(judged(s, t, None, backend), without, strict=True):
        assert not a.stats.student_correct.any()
        assert not a.stats.teacher_correct.any()
        unlabelled = torch.cat([a.stats.table[:10], b.stats.table[10:]])
        same(a._replace(stats=BDKDStats(unlabelled)), b)


@edge
def soft_one_hot_labels_are_labels(backend, device="cpu"):
    s, t, y = draw("one-hot", device=device)
    soft = torch.nn.functional.one_hot(y, 11).to(FP32)
    for ε in (0.0, 0.1):
        hard = run(s, t, y, backend, label_smoothing=ε)
        for a, b in zip(judged(s, t, soft, backend, label_smoothing=ε), hard, strict=True):
            close("student", a.student, b.student, 2e-6 * (1 + b.student.abs().item()))
            close("ds", a.ds, b.ds, 2e-6)
            close("dt", a.dt, b.dt, 2e-6)


@edge
def the_first_of_tied_soft_labels_is_the_label(backend, device="cpu"):
    """Soft labels tie, for example, if two classes are mixed half and half, or if all are 0.

    Some kernels read the last classes of a row first, and rows with a masked class run other code.
    """
    for classes, first, last in ((33, 0, 32), (5000, 3, 4099)):
        s, t, _ = draw("equal soft", 4, classes, device=device)
        soft = torch.zeros(4, classes, device=device)
        soft[:3, [first, last]] = 0.5
        s[1:, 7] = t[1:, 7] = -math.inf
        s[:2, first], t[:2, last] = 20.0, 20.0
        s[2, last], t[2, first] = 20.0, 20.0
        s[3, 0], t[3, 1] = 20.0, 20.0
        for result in judged(s, t, soft, backend):
            assert result.stats.student_correct.tolist() == [1, 1, 0, 1]
            assert result.stats.teacher_correct.tolist() == [0, 0, 1, 0]


@edge
def soft_labels_need_not_sum_to_one(backend, device="cpu"):
    s, t, _ = draw("mass", device=device)
    soft = torch.rand(5, 11, device=device) * torch.tensor([[0.0], [0.1], [1], [3], [9]]).to(device)
    for dtype in (FP32, FP64, BF16, FP16):
        judged(s, t, soft.to(dtype), backend, reduction="none")


@edge
def a_term_of_weight_zero_adds_no_nan(backend, device="cpu"):
    s, t, y = draw("absent", device=device)
    bad = torch.full_like(s, math.nan)
    kd_off = {"student_kd": 0.0, "teacher_kd": 0.0}
    for a, b in zip(
        run(s, bad, y, backend, **kd_off), run(s, t, y, backend, **kd_off), strict=True
    ):
        assert torch.equal(a.student, b.student)
        assert torch.equal(a.ds, b.ds)
        assert a.teacher.isnan()
        assert a.dt.isnan().all()
    judged(s, bad, y, backend, student_kd=0.0)
    judged(bad, t, y, backend, teacher_kd=0.0)
    s[:, 4] = t[:, 4] = -math.inf  # a label there would be an infinite cross entropy
    y[:] = 4
    for result in judged(s, t, y, backend, student_ce=0.0, teacher_ce=0.0):
        assert result.student.isfinite()
        assert result.teacher.isfinite()
    for result in judged(s, t, y, backend, student_ce=0.0):
        assert result.student.isfinite()
        assert result.teacher == math.inf


@edge
def cross_entropy_equals_torch(backend, device="cpu"):
    s, t, y = draw("torch", device=device)
    y[2] = -100
    kd_off = {"student_kd": 0.0, "teacher_kd": 0.0}
    for ε in (0.0, 0.1, 1.0):
        want = [torch.nn.functional.cross_entropy(x.to(FP64), y, label_smoothing=ε) for x in (s, t)]
        for result in judged(s, t, y, backend, label_smoothing=ε, **kd_off):
            close("student", result.student, want[0], 1e-5)
            close("teacher", result.teacher, want[1], 1e-5)


@edge
def a_class_masked_in_both_networks_has_no_effect(backend, device="cpu"):
    s, t, y = draw("masked", device=device)
    y %= 7
    kept = [0, 1, 2, 3, 4, 5, 6]
    s[:, 7:] = t[:, 7:] = -math.inf
    for options in ({}, {"temperature": 4.0}, {"teacher_divergence": "forward", "gamma": 3.0}):
        few = run(s[:, kept], t[:, kept], y, backend, **options)
        for all_, some in zip(judged(s, t, y, backend, **options), few, strict=True):
            for name in ("student", "teacher"):
                close(name, getattr(all_, name), getattr(some, name), 1e-5)
            for name, a, b in zip(STATISTICS, all_.stats.table, some.stats.table, strict=True):
                close(name, a, b, 1e-6 + 2e-6 * b.abs())
            for a, b in ((all_.ds, some.ds), (all_.dt, some.dt)):
                close("gradient", a[:, kept], b, 1e-5)
                assert not a[:, 7:].any()


@edge
def a_target_in_a_masked_class_is_infinite(backend, device="cpu"):
    s, t, y = draw("masked label", device=device)
    s[:, 7:] = t[:, 7:] = -math.inf
    y[:] = torch.tensor([7, 0, 10, 1, 2], device=device)
    for result in judged(s, t, y, backend, reduction="none"):
        assert result.student.isinf().tolist() == [True, False, True, False, False]
        assert result.ds.isfinite().all()  # softmax - q
    for result in judged(s, t, y, backend, reduction="none", label_smoothing=0.1):
        assert (result.teacher == math.inf).all()
        assert result.dt.isfinite().all()
    soft = torch.zeros(5, 11, device=device)
    soft[:, :7] = 1 / 7  # q = 0 in the masked classes adds nothing
    soft[2, 8] = 0.5
    for result in judged(s, t, soft, backend, reduction="none"):
        assert result.student.isinf().tolist() == [False, False, True, False, False]
        assert result.ds.isfinite().all()


@edge
def a_class_masked_in_one_network_only(backend, device="cpu"):
    """The KL is infinite if the other network has mass in a masked class.

    The gradients are the closed forms with 0 log 0 = 0: -inf for p (finite - inf), NaN for
    p (inf - inf), and 0 for p = 0.
    """
    for divergence in ("reverse", "forward"):
        for τ in (1.0, 4.0):
            options = {"temperature": τ, "teacher_divergence": divergence, "reduction": "none"}
            s, t, y = draw("one-sided", device=device)
            y[:] = 0
            clean = run(s, t, y, backend, **options)
            s[1, 3] = t[2, 5] = s[4, 6] = t[4, 7] = -math.inf
            touched = torch.tensor([1, 2, 4], device=device)
            for a, b in zip(judged(s, t, y, backend, **options), clean, strict=True):
                same(a, b, torch.tensor([0, 3], device=device))
                assert (a.student[touched] == math.inf).all()
                infinite = [row in ((1, 4) if divergence == "forward" else (2, 4))
                            for row in range(5)]  # fmt: skip
                assert a.teacher.isinf().tolist() == infinite
                assert a.stats.forward_kl.isinf().tolist() == [False, True, False, False, True]
                assert a.stats.reverse_kl.isinf().tolist() == [False, False, True, False, True]
                assert a.ds[1].isfinite().all()  # the forward KL's gradient p_s - p_t is finite
                assert a.ds[2, 5].isnan()
                assert (a.ds[2, :5] == -math.inf).all()
                assert a.ds[4, 7].isnan()
                assert a.ds[4, 6].isfinite()  # p_s = 0: only the forward KL pulls


@edge
def no_gradient_is_computed_unless_required(backend, device="cpu"):
    s, t, y = draw("no grad", device=device)
    want = run(s, t, y, backend)[0]
    out = bdkd_loss(s, t, y, backend=backend)
    assert not out.student.requires_grad
    s.requires_grad_()
    t.requires_grad_()
    with torch.no_grad():
        quiet = bdkd_loss(s, t, y, backend=backend)
        at_once_, (ds, dt) = bdkd_loss_and_grad(s, t, y, backend=backend)
    assert quiet.student.grad_fn is None
    for x in (out, quiet, at_once_):
        close("student", x.student, want.student, 1e-6 * want.student.item())
        close("teacher", x.teacher, want.teacher, 1e-6 * want.teacher.item())
    close("ds", ds, want.ds, 1e-6)
    close("dt", dt, want.dt, 1e-6)


@edge
def nan_stays_in_its_row(backend, device="cpu"):
    for options in ({}, {"temperature": 4.0, "label_smoothing": 0.1}, {"soften_entropy": False}):
        options = {"reduction": "none", **options}
        for c in (11, 4099):
            s, t, y = draw(f"nan {c}", c=c, device=device)
            y[1], y[3], y[4] = c - 1, 2, 0  # an argmax that prefers NaN would be counted as correct
            clean = run(s, t, y, backend, **options)
            s[1, c - 1], t[3, 2], s[4] = math.nan, math.nan, math.nan
            for a, b in zip(judged(s, t, y, backend, **options), clean, strict=True):
                same(a, b, torch.tensor([0, 2], device=device))
                for value in (a.student, a.teacher, a.ds, a.dt):
                    assert value[[1, 3, 4]].isnan().all()
                assert not a.stats.student_correct[[1, 4]].any()
                assert not a.stats.teacher_correct[3]


@edge
def infinite_and_fully_masked_rows_are_nan(backend, device="cpu"):
    s, t, y = draw("infinite", device=device)
    clean = run(s, t, y, backend, reduction="none")
    s[1, 4], s[2], t[3] = math.inf, -math.inf, -math.inf  # these rows are not distributions
    for a, b in zip(judged(s, t, y, backend, reduction="none"), clean, strict=True):
        same(a, b, torch.tensor([0, 4], device=device))
        assert a.ds[1:4].isnan().all()


@edge
def an_empty_batch_is_zero(backend, device="cpu"):
    for shape in ((0, 10), (2, 0, 10), (0, 4099)):
        for reduction in ("mean", "sum", "none"):
            s = torch.zeros(shape, device=device)
            labels = torch.zeros(shape[:-1], dtype=torch.int64, device=device)
            for target in (labels, s.clone(), None):
                for weight in (None, torch.ones(shape[:-1], device=device)):
                    for result in judged(s, s, target, backend, reduction=reduction,
                                         sample_weight=weight):  # fmt: skip
                        assert result.student.shape == (shape[:-1] if reduction == "none" else ())
                        assert not result.student.any()
                        assert not result.teacher.any()
                        assert result.ds.shape == result.dt.shape == shape


@edge
def one_class_and_huge_logits_are_finite(backend, device="cpu"):
    for c in (1, 2, 3, 1000):
        for τ in (1.0, 4.0, 0.5):
            s, t, y = draw(f"huge {c}", c=c, device=device)
            s, t = 1e4 * s.sign(), -1e4 * t.sign()
            for result in judged(s, t, y, backend, temperature=τ):
                assert result.student.isfinite()
                assert result.teacher.isfinite()
                assert result.ds.isfinite().all()
                if c == 1:
                    assert not result.student.any()
                    assert not result.ds.any()


@edge
def a_label_out_of_range_raises_with_its_row(backend, device="cpu"):
    """On a GPU, labels are not checked: the loss and the gradients of the row are NaN."""
    for label in (11, -1, 2**40, -101):
        s, t, y = draw("labels", device=device)
        clean = run(s, t, y, backend, reduction="none")
        y[2] = y[4] = label
        if device == "cpu":
            y[0] = -100  # ignore_index is a valid label although it is not a class
            for function in (bdkd_loss, bdkd_loss_and_grad):
                with pytest.raises(ValueError, match=rf"target\[2\] is {label}.*\[0, 11\)"):
                    function(s, t, y, backend=backend)
            y[0] = 0
            bdkd_loss(s, t, y, backend=backend, ignore_index=label)
            continue
        for a, b in zip(run(s, t, y, backend, reduction="none"), clean, strict=True):
            assert a.student.isnan().tolist() == [False, False, True, False, True]
            assert a.teacher.isnan().tolist() == [False, False, True, False, True]
            same(a, b, torch.tensor([0, 1, 3], device=device))


@edge
def offline_makes_no_teacher_gradient(backend, device="cpu"):
    s, t, y = draw("offline", device=device)
    both = run(s, t, y, backend)
    for a, b in zip(judged(s, t, y, backend, offline=True), both, strict=True):
        assert a.dt is None
        close("ds", a.ds, b.ds, 1e-6)
        close("teacher", a.teacher, b.teacher, 1e-6)
    out = bdkd_loss(s.requires_grad_(), t, y, backend=backend)
    assert not out.teacher.requires_grad
    (dt,) = bdkd_loss_and_grad(s.detach(), t.requires_grad_(), y, backend=backend)[1][1:]
    close("dt", dt, both[0].dt, 1e-6)


@edge
def equal_logits_have_no_divergence(backend, device="cpu"):
    s, _, y = draw("equal", c=1003, device=device)
    for τ in (1.0, 4.0, 3.0):
        for result in judged(s, s.clone(), y, backend, temperature=τ):
            assert result.stats.forward_kl.abs().max() <= 1e-6
            assert result.stats.reverse_kl.abs().max() <= 1e-6
            assert (result.stats.forward_weight == 1).all()
            assert (result.stats.reverse_weight == 1).all()


@edge
def nearly_equal_logits_keep_their_divergence(backend, device="cpu"):
    """The difference of two large sums would have an error of 1e-7, or give a negative KL."""
    s, t, y = draw("nearly", c=1003, device=device)
    t = s + 1e-4 * t
    want = truth(Inputs(s, t, y, None, {}, (torch.ones((), device=device),) * 2)).stats
    for result in run(s, t, y, backend):
        for name in ("forward_kl", "reverse_kl"):
            exact = getattr(want, name)
            assert exact.max() < 1e-7
            close(name, getattr(result.stats, name), exact, 1e-7)


@edge
def each_loss_can_go_backward_alone_in_either_order(backend, device="cpu"):
    s, t, y = draw("apart", device=device)
    together = run(s, t, y, backend)[0]
    for order in (("student", "teacher"), ("teacher", "student")):
        a, b = s.clone().requires_grad_(), t.clone().requires_grad_()
        out = bdkd_loss(a, b, y, backend=backend)
        getattr(out, order[0]).backward()
        assert (a.grad is not None and bool(a.grad.any())) == (order[0] == "student")
        assert (b.grad is not None and bool(b.grad.any())) == (order[0] == "teacher")
        getattr(out, order[1]).backward()
        close("ds", a.grad, together.ds, 1e-7)
        close("dt", b.grad, together.dt, 1e-7)


@edge
def retain_graph_gives_the_gradient_again(backend, device="cpu"):
    s, t, y = draw("retain", device=device)
    want = run(s, t, y, backend)[0]
    s.requires_grad_()
    t.requires_grad_()
    out = bdkd_loss(s, t, y, backend=backend)
    for times in (1, 2, 3):
        (out.student + out.teacher).backward(retain_graph=True)
        close("ds", s.grad, times * want.ds, 1e-6)
        close("dt", t.grad, times * want.dt, 1e-6)
    (3 * out.student).backward()
    close("ds", s.grad, 6 * want.ds, 2e-6)
    s.grad, out = None, bdkd_loss(s, t, y, backend=backend)
    for times in (1, 2):  # the teacher's gradient, computed in the same pass, is still kept
        (3 * out.student).backward(retain_graph=True)
        close("ds", s.grad, 3 * times * want.ds, 2e-6)
    (3 * out.teacher).backward()
    close("dt", t.grad, 6 * want.dt, 2e-6)
    (first,) = torch.autograd.grad(bdkd_loss(s, t, y, backend=backend).student, s)
    close("ds", first, want.ds, 1e-7)


@edge
def a_late_loss_scale_multiplies_both_gradients(backend, device="cpu"):
    """In any order of the backward passes, and also if the host cannot read the upstream gradient.

    A loss scale that is applied to the losses, instead of passed as ``grad_scale``, is late.
    """
    s, t, y = draw("late", 2, 5, device)
    blind = mock.patch.object(autograd.GradScale, "is_like", return_value=False)
    for reduction, seen in (("mean", True), ("mean", False), ("none", False)):
        one = run(s, t, y, backend, reduction=reduction)[0]
        shape = (2,) if reduction == "none" else ()
        for above in ((8.0, 8.0), (1.0, 8.0), (8.0, 3.0)):
            for way in ("at once", "student first", "teacher first"):
                a, b = s.clone().requires_grad_(), t.clone().requires_grad_()
                out = bdkd_loss(a, b, y, backend=backend, reduction=reduction)
                ups = [torch.full(shape, x, device=device) for x in above]
                with contextlib.nullcontext() if seen else blind:
                    if way == "at once":
                        torch.autograd.backward(out[:2], ups)
                    else:
                        order = (0, 1) if way == "student first" else (1, 0)
                        out[order[0]].backward(ups[order[0]])
                        ups[order[0]].fill_(math.nan)  # the caller may write into this tensor
                        out[order[1]].backward(ups[order[1]])
                close("ds", a.grad, above[0] * one.ds, 1e-6 * above[0])
                close("dt", b.grad, above[1] * one.dt, 1e-6 * above[1])


@edge
def a_grad_scale_changed_before_backward_is_not_used(backend, device="cpu"):
    s, t, y = draw("changed", device=device)
    want = run(s, t, y, backend)[0]
    s.requires_grad_()
    scale = torch.tensor(64.0, device=device)
    out = bdkd_loss(s, t, y, backend=backend, grad_scale=scale)
    scale.fill_(1.0)
    out.student.backward()
    close("ds", s.grad, want.ds, 1e-6)


@edge
def gradients_kept_by_the_caller_are_never_overwritten(backend, device="cpu"):
    s, t, y = draw("kept", device=device)
    s.requires_grad_()
    t.requires_grad_()
    out = bdkd_loss(s, t, y, backend=backend)
    (one,) = torch.autograd.grad(out.student, s, retain_graph=True)
    before = one.clone()
    (two,) = torch.autograd.grad(out.student, s, torch.tensor(5.0, device=device), True)
    one.mul_(0.0)
    (three,) = torch.autograd.grad(out.student, s)
    close("second", two, 5 * before, 2e-6)
    close("third", three, before, 1e-7)

    out = bdkd_loss(s, t, y, backend=backend)
    (one,) = torch.autograd.grad(out.student, s)
    before = one.clone()
    (two,) = torch.autograd.grad(7 * out.teacher, t)  # must not write into the student's gradient
    assert torch.equal(one, before)


@edge
def gradients_flow_through_a_shared_network(backend, device="cpu"):
    s, t, y = draw("network", device=device)
    net = torch.nn.Linear(11, 11, device=device)
    shared = torch.nn.functional.gelu(net(s))  # both logits depend on the same parameters
    out = bdkd_loss(shared, net(t), y, backend=backend)
    (out.student + out.teacher).backward()
    got = net.weight.grad.clone()
    net.weight.grad = None
    want = bdkd_loss(torch.nn.functional.gelu(net(s)), net(t), y, backend="reference")
    (want.student + want.teacher).backward()
    close("weight", got, net.weight.grad, 1e-5)


@edge
def gradients_are_written_into_given_tensors(backend, device="cpu"):
    for storage in (FP32, BF16):
        s, t, y = draw("buffers", device=device, dtype=storage)
        out, want = bdkd_loss_and_grad(s, t, y, backend=backend)
        nan = torch.full((5, 20), math.nan, dtype=storage, device=device)
        wide = nan.clone()[:, 3:14], nan.clone()[:, 2:13]  # row stride > C
        columns = tuple(torch.full_like(s.mT, math.nan).contiguous().mT for _ in range(2))
        for grads in (tuple(torch.full_like(s, math.nan) for _ in range(2)), wide, columns):
            again, given = bdkd_loss_and_grad(s, t, y, backend=backend, grads=grads)
            assert given[0] is grads[0]
            assert given[1] is grads[1]
            # With other strides or only one gradient, another kernel runs, which may round
            # differently.
            torch.testing.assert_close(given, want)
            torch.testing.assert_close(again.student, out.student)
        around = wide[0]._base
        assert around[:, :3].isnan().all()
        assert around[:, 14:].isnan().all()

        for one in ((torch.empty_like(s), None), (None, torch.empty_like(t))):
            given = bdkd_loss_and_grad(s, t, y, backend=backend, grads=one)[1]
            for x, y_ in zip(given, want, strict=True):
                if x is not None:
                    torch.testing.assert_close(x, y_)
            assert [x is None for x in given] == [x is None for x in one]
        none = bdkd_loss_and_grad(s, t, y, backend=backend, grads=(None, None))
        assert none[1] == (None, None)
        torch.testing.assert_close(none[0].student, out.student)


@edge
def gradients_may_be_written_over_the_logits(backend, device="cpu"):
    for shape in ((5, 11), (2, 3, 11), (3, 4099)):
        s, t, y = draw("over", math.prod(shape[:-1]), shape[-1], device)
        s, t, y = s.reshape(shape), t.reshape(shape), y.reshape(shape[:-1])
        out, want = bdkd_loss_and_grad(s, t, y, backend=backend)
        again, (ds, dt) = bdkd_loss_and_grad(s, t, y, backend=backend, grads=(s, t))
        assert ds is s
        assert dt is t
        assert torch.equal(ds, want[0])
        assert torch.equal(dt, want[1])
        assert torch.equal(again.student, out.student)


@edge
def grad_scale_changes_no_value(backend, device="cpu"):
    s, t, y = draw("scale", device=device)
    plain = run(s, t, y, backend)[1]
    for scale in (64.0, torch.tensor(64.0, device=device), torch.tensor(64.0).to(device, FP64)):
        scaled = run(s, t, y, backend, grad_scale=scale)
        for result in scaled:
            assert torch.equal(result.student, plain.student)
        close("ds assumed", scaled[1].ds, 64 * plain.ds, 64e-7)
        close("ds of 1", scaled[0].ds, plain.ds, 1e-7)
        a = s.clone().requires_grad_()
        (bdkd_loss(a, t, y, backend=backend, grad_scale=scale).student * scale).backward()
        close("ds of scale", a.grad, 64 * plain.ds, 64e-7)


@edge
def every_run_gives_the_same_bits(backend, device="cpu"):
    s, t, y = draw("bits", 37, 301, device)
    first = run(s, t, y, backend, temperature=4.0)
    for a, b in zip(run(s, t, y, backend, temperature=4.0), first, strict=True):
        same(a, b)


@edge
def double_backward_works_or_raises(backend, device="cpu"):
    s, t, y = draw("double", device=device, dtype=FP64)
    s.requires_grad_()
    out = bdkd_loss(s, t, y, backend=backend)
    (first,) = torch.autograd.grad(out.student, s, create_graph=True)
    if backend == "reference":
        (second,) = torch.autograd.grad(first.square().sum(), s)
        assert second.any()
    else:
        with pytest.raises(RuntimeError, match=r"(?i)double backward|twice|once_differentiable"):
            torch.autograd.grad(first.square().sum(), s)


@edge
def labels_and_weights_may_have_any_strides(backend, device="cpu"):
    """Here the logits are contiguous and need no copy, but labels and weights are not.

    A kernel that assumed contiguous labels or weights would read those of another row.
    """
    n, c = 4, 11
    s, t, y = draw("lie anywhere", n, c, device)
    s, t = s.clone(), t.clone()  # each in its own storage, as a network's logits
    rng = torch.Generator().manual_seed(3)
    soft, weight = torch.rand(n, c, generator=rng).to(device), torch.rand(n, generator=rng)
    weight = weight.to(device)

    def apart(x):  # every other element of a larger tensor, from the second one on
        larger = torch.full([2 * size for size in x.shape], -7, dtype=x.dtype, device=device)
        return larger[(slice(1, None, 2),) * x.ndim].copy_(x)

    def expanded(x):  # every row is the first row
        return x[:1].expand_as(x)

    columns = soft.mT.contiguous().mT
    for target, weights in (
        (apart(y), None), (expanded(y), None), (y, apart(weight)), (columns, expanded(weight)),
        (apart(soft), None), (expanded(soft), None),
    ):  # fmt: skip
        judged(s, t, target, backend, sample_weight=weights, temperature=4.0)


@edge
def upstream_gradients_may_have_any_strides(backend, device="cpu"):
    """A sum over the samples expands one number to N. Some numbers may equal the assumed 1."""
    s, t, y = draw("above", device=device)
    one = run(s, t, y, backend, reduction="none")[0]
    many = torch.arange(1.0, 11.0, device=device)
    for first, second in (
        (many[2].expand(5), many[1::2]), (many[::2], many.reshape(5, 2)[:, 1]),
    ):  # fmt: skip
        for order in ((0, 1), (1, 0)):
            leaves = s.clone().requires_grad_(), t.clone().requires_grad_()
            out = bdkd_loss(*leaves, y, reduction="none", backend=backend)
            for k, above in zip(order, (first, second), strict=True):
                out[k].backward(above)
                close(("ds", "dt")[k], leaves[k].grad, above[:, None] * one[3 + k], 1e-5)


@edge
def soft_labels_and_weights_are_constants(backend, device="cpu"):
    """No gradient flows into them, even if they require one."""
    s, t, _ = draw("constants", device=device)
    soft, weight = torch.softmax(s + t, -1), torch.rand(5).to(device)
    want = run(s, t, soft, backend, sample_weight=weight)[0]
    leaves = [x.clone().requires_grad_() for x in (s, t, soft, weight)]
    a, b, q, w = leaves
    out = bdkd_loss(a, b, 1 * q, sample_weight=1 * w, backend=backend)
    ds, dt, *none = torch.autograd.grad(out.student + out.teacher, leaves, allow_unused=True)
    assert none == [None, None]
    close("ds", ds, want.ds, 1e-7)
    close("dt", dt, want.dt, 1e-7)
    out = bdkd_loss(s, t, q, sample_weight=w, backend=backend)
    assert not any(x.requires_grad for x in (*out[:2], *out.stats))
    out, grads = bdkd_loss_and_grad(a, b, q, sample_weight=w, backend=backend)
    assert not any(x.requires_grad for x in (*out[:2], *out.stats, *grads))


# -- usual operations of PyTorch on a loss ---------------------------------------------------------


@edge
def a_loss_without_a_term_is_zero_with_zero_gradients(backend, device="cpu"):
    off = {"student_ce": 0.0, "student_kd": 0.0, "teacher_ce": 0.0, "teacher_kd": 0.0}
    for storage in (FP32, FP16, FP64):
        s, t, y = draw("no term", device=device, dtype=storage)
        s[1], t[2, 3] = math.nan, math.inf  # 0 * NaN would be visible
        for target, options in (
            (y, off), (None, {"student_kd": 0.0, "teacher_kd": 0.0}),
            (y, {"teacher_ce": 0.0, "teacher_kd": 0.0}), (y, {**off, "reduction": "none"}),
            (y.masked_fill(y >= 0, -100), {**off, "reduction": "sum"}),
        ):  # fmt: skip
            for result in run(s, t, target, backend, **options):
                assert not result.teacher.any()
                assert torch.equal(result.dt, torch.zeros_like(t))
                if target is None or "student_ce" in options:
                    assert not result.student.any()
                    assert torch.equal(result.ds, torch.zeros_like(s))
    empty = s[:0].detach().requires_grad_()
    bdkd_loss(empty, t[:0], None, backend=backend, **off).student.backward()
    assert empty.grad.shape == empty.shape


@edge
def gradients_of_no_term_may_be_written_over_the_logits(backend, device="cpu"):
    """These gradients are 0, and are written after the other network's loss has read the logits."""
    s, t, y = draw("over, no term", device=device)
    options = {"student_ce": 0.0, "student_kd": 0.0, "backend": backend}
    out, (_, dt) = bdkd_loss_and_grad(s, t, y, **options)
    buffers = s.clone(), t.clone()
    again, _ = bdkd_loss_and_grad(*buffers, y, grads=buffers, **options)
    assert not buffers[0].any()
    assert torch.equal(buffers[1], dt)
    assert torch.equal(again.teacher, out.teacher)
    for a, b in zip(again.stats, out.stats, strict=True):
        assert torch.equal(a, b)


@edge
def tensors_of_inference_mode_are_accepted_everywhere(backend, device="cpu"):
    """A frozen teacher usually runs under inference_mode."""
    s, t, y = draw("inference", device=device)
    soft = torch.softmax(t, -1)
    weight = torch.rand(5).to(device)
    for target in (y, soft, None):
        for kd in (1.0, 0.0):
            options = {"teacher_ce": kd, "teacher_kd": kd, "temperature": 2.0, "backend": backend}
            with torch.inference_mode():
                theirs = [None if x is None else x.clone() for x in (t, target, weight)]
            for above in (1.0, 3.0):  # 3: recomputed from the saved tensors
                gradients = []
                for teacher, labels, weights in ((t, target, weight), theirs):
                    leaf = s.clone().requires_grad_()
                    out = bdkd_loss(leaf, teacher, labels, sample_weight=weights, **options)
                    (above * out.student).backward()
                    gradients.append(leaf.grad)
                close("ds", *gradients, 1e-7)
    with torch.inference_mode():
        other = s.clone()
    leaf = t.clone().requires_grad_()
    bdkd_loss(other, leaf, y, backend=backend).teacher.backward()
    close("dt", leaf.grad, run(s, t, y, backend)[0].dt, 1e-7)
    with torch.inference_mode():
        bdkd_loss_and_grad(other, other, y, grads=(buffers := (t.clone(), t.clone())),
                           backend=backend)  # fmt: skip
        assert bdkd_loss(other, other, y, backend=backend).student.isfinite()
    bdkd_loss_and_grad(s, t, y, grads=buffers, backend=backend)  # outside of inference mode
    close("ds", buffers[0], run(s, t, y, backend)[0].ds, 1e-7)


@edge
def batched_upstream_gradients_are_supported(backend, device="cpu"):
    """``is_grads_batched=True``, as in ``jacobian(vectorize=True)``."""
    for storage in (FP32, FP16):
        for reduction in ("mean", "none"):
            s, t, y = draw("batched", device=device, dtype=storage)
            y[2] = -100
            leaf = s.requires_grad_()
            out = bdkd_loss(leaf, t, y, temperature=2.0, reduction=reduction, backend=backend)
            above = torch.randn(3, *out.student.shape).to(device)
            (got,) = torch.autograd.grad(out.student, leaf, above, retain_graph=True,
                                         is_grads_batched=True)  # fmt: skip
            alone = [torch.autograd.grad(out.student, leaf, x, retain_graph=True)[0] for x in above]
            tolerance = 1e-6 if storage == FP32 else 2e-3
            close("batched", got, torch.stack(alone), tolerance)


@edge
def a_nan_makes_the_whole_gradient_row_nan(backend, device="cpu"):
    """In a row with a NaN, the gradients of all classes are NaN, also of classes without mass.

    This applies only to a loss with a term that reads the network with the NaN. The gradients of
    other rows are finite.
    """
    for value, τ, c in ((math.nan, 1.0, 3), (math.inf, 0.01, 16), (math.nan, 4.0, 40)):
        for terms, divergence in (("kd", "reverse"), ("kd", "forward"), ("ce", "reverse")):
            off = "kd" if terms == "ce" else "ce"
            options = {f"{net}_{off}": 0.0 for net in ("student", "teacher")}
            options |= {"temperature": τ, "teacher_divergence": divergence, "reduction": "none"}
            for network in (0, 1):
                s, t, y = draw("whole nan", c=c, device=device)
                s[:, c - 1] = t[:, c - 1] = -math.inf
                (s, t)[network][1, 1] = value
                y[:] = 0
                for result in judged(s, t, y, backend, **options):
                    sides = ((result.student, result.ds), (result.teacher, result.dt))
                    for k, (loss, gradient) in enumerate(sides):
                        reads = terms == "kd" or k == network
                        assert bool(loss[1].isnan()) == reads
                        assert bool(gradient[1].isnan().all()) == reads
                        assert gradient[[0, 2, 3, 4]].isfinite().all()


@edge
def entropies_at_temperature_1_are_right_at_low_temperatures(backend, device="cpu"):
    """A probability that is 0 at the temperature may be > 0 at 1, also next to masked classes."""
    for c, τ in ((10, 0.5), (10, 0.01), (40, 0.05), (40, 1e-4), (5000, 0.01)):
        s, t, y = draw(f"low {c}", 3, c, device)
        s[:, 3] = t[:, 3] = -math.inf
        y[:] = 0
        for result in judged(s, t, y, backend, temperature=τ, soften_entropy=False):
            assert (result.stats.student_entropy > 0.05).all()


@edge
def an_ignored_row_of_distant_logits_is_zero(backend, device="cpu"):
    """Its losses and gradients are multiplied by 0, which must not meet an overflow."""
    for storage in (FP16, BF16, FP32):
        for c in (16, 128, *([4224] if storage == FP16 else [])):
            s, t, y = draw("distant", c=c, device=device, dtype=storage)
            s[1], t[1] = s[1] + 1e4, t[1] - 1e4
            y[1] = -100
            for result in run(s, t, y, backend, reduction="none"):
                assert not result.ds[1].any()
                assert not result.dt[1].any()
                assert result.ds.isfinite().all()


@edge
def logits_below_the_normal_range_keep_their_order(backend, device="cpu"):
    for storage in (FP32, BF16, FP64):
        smallest = torch.finfo(storage).smallest_normal
        for c in (5, 33):
            x = torch.zeros(3, c, dtype=storage, device=device)
            x[0, c - 2], x[1, 1], x[2] = smallest / 8, -smallest / 8, -0.0
            label = torch.tensor([c - 2, 0, 0], device=device)
            stats = bdkd_loss(x, x.clone(), label, backend=backend).stats
            assert stats.student_correct.tolist() == [1, 1, 1]
            stats = bdkd_loss(x, x.clone(), label * 0 + 1, backend=backend).stats
            assert stats.teacher_correct.tolist() == [0, 0, 0]


@edge
def full_smoothing_ignores_the_label(backend, device="cpu"):
    """With ``label_smoothing=1``, the part of a label in a masked class would be 0 * inf."""
    s, t, y = draw("smooth", device=device)
    s[1, 2] = t[1, 2] = -math.inf
    y[1] = 2
    for result in judged(s, t, y, backend, label_smoothing=1.0, reduction="none"):
        assert result.student.isinf().tolist() == [False, True, False, False, False]
        assert result.ds.isfinite().all()
