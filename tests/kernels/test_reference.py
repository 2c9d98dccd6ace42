"""Test the reference, with which all kernels are compared.

It is compared with a second derivation and with numerical differentiation, and it has the
mathematical properties of the loss.
"""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from bdkd_kernels import BDKDLoss, BDKDStats, bdkd_loss, bdkd_loss_and_grad
from bdkd_kernels.options import STATISTICS
from cases import (
    CASES,
    FP32,
    FP64,
    Inputs,
    Result,
    close,
    either_branch,
    gradient_terms,
    judge,
    make,
    truth,
    underflows_in,
)
from compiler import COMPILER
from derivation import derive
from edges import EDGES, draw
from hypothesis import given, settings
from hypothesis import strategies as st


@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_float64(case):
    judge(case, "reference")


@pytest.mark.parametrize("edge", EDGES, ids=lambda edge: edge.__name__)
def test_edge(edge):
    edge("reference")


def assert_derivation_agrees(x: Inputs, name: str) -> None:
    """Compare the reference in float64 with the closed forms, up to rounding errors."""
    *leading, c = x.student.shape
    n = math.prod(leading)

    def rows(tensor, *shape):
        return None if tensor is None else tensor.detach().to(FP64).expand(shape).numpy()

    target = x.target
    if target is not None:
        soft = target.is_floating_point()
        target = rows(target, *leading, c).reshape(n, c) if soft else target.reshape(n).numpy()
    derived = derive(
        rows(x.student, *leading, c).reshape(n, c),
        rows(x.teacher, *leading, c).reshape(n, c),
        target,
        None if x.sample_weight is None else rows(x.sample_weight, *leading).reshape(n),
        tuple(rows(above, *leading).reshape(n) for above in x.upstream),
        **x.options,
    )

    # If entropies differ only by rounding, the reference uses the weights of the derivation.
    stats = {k: torch.from_numpy(v).reshape(tuple(leading)) for k, v in derived.stats.items()}
    table = BDKDStats(torch.stack([stats[name] for name in STATISTICS]))
    chosen = Result(torch.empty(()), torch.empty(()), table, None, None)
    want = truth(x, either_branch(x, chosen, 1e-12, 1e-12))
    tiny = underflows_in(x, 1e-300)  # such a probability, possibly 0, times inf may be NaN or inf

    def check(what, got, exact, tolerance):
        close(f"{name} {what}", torch.from_numpy(np.asarray(exact)).reshape(got.shape), got,
              tolerance)  # fmt: skip

    τ = x.options.get("temperature", 1.0)
    for net in ("student", "teacher"):
        value = getattr(want, net)
        check(net, value, getattr(derived, net), 1e-12 * (max(1, τ**2) + value.abs()))
    for stat in STATISTICS:
        value = getattr(want.stats, stat)
        check(stat, value, derived.stats[stat], 1e-12 * (1 + value.abs()))
    terms = gradient_terms(x, want)
    for side, value, exact, scale in zip(
        ("ds", "dt"), want[3:], (derived.ds, derived.dt), terms, strict=True
    ):
        if value is not None:
            exact = torch.from_numpy(exact).reshape(value.shape)
            infinite = ~(value.isfinite() & exact.isfinite())
            exact = torch.where(tiny & infinite, value, exact).numpy()
            check(side, value, exact, 1e-12 * scale[..., None].nan_to_num(0, 0, 0))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_derivation_agrees(case):
    assert_derivation_agrees(make(case), case.name)


weights = st.sampled_from([0.0, 1.0, 0.3, 2.0])


@settings(max_examples=300)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(0, 9),
    c=st.integers(1, 12),
    spread=st.sampled_from([0.01, 1.0, 5.0, 1e4]),
    special=st.sampled_from(["", "", "masked", "one-sided", "nan", "everything"]),
    target=st.sampled_from(["labels", "soft", None]),
    weighted=st.booleans(),
    temperature=st.sampled_from([1.0, 4.0, 3.0, 0.5, 0.01, 100.0]),
    gamma=st.sampled_from([1.0, 2.0, 7.5]),
    student_ce=weights,
    student_kd=weights,
    teacher_ce=weights,
    teacher_kd=weights,
    teacher_divergence=st.sampled_from(["reverse", "forward"]),
    soften_entropy=st.booleans(),
    label_smoothing=st.sampled_from([0.0, 0.1, 0.9]),
    ignore_index=st.sampled_from([-100, 0, 255]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
)
def test_derivation_agrees_on_anything(seed, n, c, spread, special, target, weighted, **options):
    rng = torch.Generator().manual_seed(seed)
    s, t = spread * torch.randn(2, n, c, generator=rng, dtype=FP64)

    def some(share):
        return torch.rand(n, c, generator=rng) < share

    if special in ("masked", "everything"):
        both = some(0.3)
        s[both] = t[both] = -math.inf
    if special in ("one-sided", "everything") and spread <= 5:
        s[some(0.1)] = -math.inf
        t[some(0.1)] = -math.inf
    if special in ("nan", "everything"):
        s[some(0.05)] = math.nan
        t[some(0.05)] = math.nan
        t[some(0.02)] = math.inf
    y = None
    if target == "labels":
        y = torch.randint(c, (n,), generator=rng)
        y[torch.rand(n, generator=rng) < 0.3] = options["ignore_index"]
    elif target == "soft":
        y = torch.rand(n, c, generator=rng).masked_fill(some(0.3), 0.0)
    w = torch.rand(n, generator=rng) if weighted else None
    shape = (n,) if options["reduction"] == "none" else ()
    above = tuple(torch.randn(2, *shape, generator=rng, dtype=FP64))
    x = Inputs(s.requires_grad_(), t.requires_grad_(), y, w, options, above)
    assert_derivation_agrees(x, "anything")


GRADCHECK = [
    {},
    {"teacher_divergence": "forward", "reduction": "none"},
    {"temperature": 4.0, "gamma": 1.0, "soften_entropy": False},
    {"temperature": 4.0, "gamma": 3.0, "label_smoothing": 0.2, "teacher_divergence": "forward"},
    {"temperature": 0.5, "student_ce": 0.0, "teacher_ce": 0.0, "reduction": "sum"},
    {"temperature": 0.5, "student_ce": 0.1, "student_kd": 0.7, "teacher_ce": 2.0,
     "teacher_kd": 0.3, "teacher_divergence": "forward"},
]  # fmt: skip


@pytest.mark.parametrize("target", ["labels", "soft", None])
@pytest.mark.parametrize("options", GRADCHECK, ids=str)
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_gradcheck(side, options, target):
    """Compare first and second derivatives with numerical ones.

    Each loss is a function of its own network's logits, and the other network's logits are
    constants. Some classes are masked in both networks, and rows are ignored or weighted.
    """
    s, t, y = draw(f"gradcheck {target} {options}", n=4, c=5, dtype=FP64)
    hidden = torch.zeros(4, 5, dtype=torch.bool)
    hidden[:2, 3] = True
    y[y == 3] = 1
    if target == "labels":
        y[3] = -100
    elif target == "soft":
        y = torch.rand(4, 5, dtype=FP64, generator=torch.Generator().manual_seed(1))
        y[hidden] = 0.0
    else:
        y = None
    if options.get("label_smoothing"):
        hidden[:] = False  # a masked class with smoothing is an infinite loss
    weight = torch.tensor([1.0, 0.25, 2.0, 3.0], dtype=FP64)

    def loss(logits):
        pair = (logits, t) if side == "student" else (s, logits)
        pair = [torch.where(hidden, -math.inf, x) for x in pair]
        out = bdkd_loss(*pair, y, sample_weight=weight, backend="reference", **options)
        return getattr(out, side)

    logits = (s if side == "student" else t).clone().requires_grad_()
    assert torch.autograd.gradcheck(loss, logits)
    assert torch.autograd.gradgradcheck(loss, logits)


@pytest.mark.parametrize("divergence", ["reverse", "forward"])
def test_each_loss_trains_its_own_network_only(divergence):
    s, t, y = draw("detached")
    s.requires_grad_()
    t.requires_grad_()
    out = bdkd_loss(s, t, y, teacher_divergence=divergence, backend="reference")
    assert torch.autograd.grad(out.student, t, retain_graph=True, allow_unused=True) == (None,)
    assert torch.autograd.grad(out.teacher, s, retain_graph=True, allow_unused=True) == (None,)
    assert not any(x.requires_grad for x in out.stats)


def test_direction_of_the_divergences():
    """F.kl_div(log q, p) is KL(p ‖ q): two well-known trainers had the arguments swapped."""
    s, t, y = draw("direction", dtype=FP64)
    τ = 4.0
    log_p_s, log_p_t = F.log_softmax(s / τ, -1), F.log_softmax(t / τ, -1)
    forward = F.kl_div(log_p_s, log_p_t, log_target=True, reduction="none").sum(-1)
    reverse = F.kl_div(log_p_t, log_p_s, log_target=True, reduction="none").sum(-1)
    assert ((forward - reverse).abs() > 1e-3).all()
    for divergence, teacher in (("reverse", reverse), ("forward", forward)):
        out = bdkd_loss(s, t, y, temperature=τ, gamma=1.0, student_ce=0.0, teacher_ce=0.0,
                        teacher_divergence=divergence, backend="reference")  # fmt: skip
        torch.testing.assert_close(out.stats.forward_kl, forward)
        torch.testing.assert_close(out.stats.reverse_kl, reverse)
        torch.testing.assert_close(out.student, τ**2 * (forward + reverse).mean())
        torch.testing.assert_close(out.teacher, τ**2 * teacher.mean())


def test_the_weights_follow_the_entropy_gap():
    sure, unsure = torch.tensor([[9.0, 0, 0]]), torch.tensor([[1.0, 0, 0]])
    y = torch.tensor([0])
    for s, t, weight in ((sure, unsure, (3, 1)), (unsure, sure, (1, 3)), (sure, sure, (1, 1))):
        stats = bdkd_loss(s, t, y, gamma=3.0, backend="reference").stats
        assert (stats.forward_weight.item(), stats.reverse_weight.item()) == weight
    # At temperature 10, one peak over nine lower classes has a larger entropy than two tied peaks.
    s, t = torch.tensor([[9.0, *[0] * 9]]), torch.tensor([[50.0, 49, *[-50] * 8]])
    for soften, weight in ((True, (1, 2)), (False, (2, 1))):
        stats = bdkd_loss(
            s, t, y, temperature=10.0, soften_entropy=soften, backend="reference"
        ).stats
        assert (stats.forward_weight.item(), stats.reverse_weight.item()) == weight


logit_pairs = st.tuples(
    st.integers(0, 2**32 - 1), st.integers(1, 6), st.integers(1, 30), st.floats(1e-3, 30)
)


def pair(drawn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    seed, n, c, spread = drawn
    rng = torch.Generator().manual_seed(seed)
    s, t = spread * torch.randn(2, n, c, generator=rng, dtype=FP64)
    return s, t, torch.randint(c, (n,), generator=rng)


def stats_of(s, t, y, **options) -> BDKDStats:
    return bdkd_loss(s, t, y, backend="reference", **options).stats


temperatures = st.sampled_from([1.0, 4.0, 0.3])


@given(logit_pairs, temperatures, st.floats(-1e3, 1e3), st.floats(-1e3, 1e3))
def test_a_shift_of_the_logits_changes_nothing(drawn, τ, a, b):
    s, t, y = pair(drawn)
    before, after = (
        bdkd_loss_and_grad(*logits, y, temperature=τ, gamma=1.0, backend="reference")
        for logits in ((s, t), (s + a, t + b))
    )
    for x, z in zip((*before[0][:2], *before[1]), (*after[0][:2], *after[1]), strict=True):
        torch.testing.assert_close(x, z, rtol=1e-8, atol=1e-8)


@given(logit_pairs, temperatures, st.floats(1, 10))
def test_swapping_the_networks_swaps_their_statistics(drawn, τ, gamma):
    s, t, y = pair(drawn)
    one = stats_of(s, t, y, temperature=τ, gamma=gamma)._asdict()
    other = stats_of(t, s, y, temperature=τ, gamma=gamma)._asdict()
    swap = {"student": "teacher", "teacher": "student", "forward": "reverse", "reverse": "forward"}
    for name, value in one.items():
        side, what = name.split("_", 1)
        assert torch.equal(value, other[f"{swap[side]}_{what}"]), name


@given(logit_pairs, temperatures)
def test_equal_logits_have_no_divergence(drawn, τ):
    s, _, y = pair(drawn)
    for dtype in (FP32, FP64):
        out, (ds, _) = bdkd_loss_and_grad(s.to(dtype), s.to(dtype), y, temperature=τ,
                                          student_ce=0.0, backend="reference")  # fmt: skip
        assert out.student == 0
        assert not ds.any()
        assert (out.stats.forward_weight == 1).all()


@given(logit_pairs, temperatures, st.floats(1e-9, 1.0))
def test_a_divergence_is_never_negative(drawn, τ, distance):
    s, t, y = (x.to(FP32) if x.is_floating_point() else x for x in pair(drawn))
    stats = stats_of(s, s + distance * t, y, temperature=τ)
    assert stats.forward_kl.min() >= -1e-6
    assert stats.reverse_kl.min() >= -1e-6


@given(logit_pairs, temperatures, st.randoms(use_true_random=False))
def test_the_order_of_the_classes_has_no_effect(drawn, τ, random):
    s, t, y = pair(drawn)
    order = list(range(s.shape[-1]))
    random.shuffle(order)
    place = torch.tensor(order).argsort()
    before, gradients = bdkd_loss_and_grad(s, t, y, temperature=τ, gamma=1.0, backend="reference")
    after, permuted = bdkd_loss_and_grad(
        s[:, order], t[:, order], place[y], temperature=τ, gamma=1.0, backend="reference"
    )
    torch.testing.assert_close(before.student, after.student)
    torch.testing.assert_close(before.teacher, after.teacher)
    for x, z in zip(gradients, permuted, strict=True):
        torch.testing.assert_close(x[:, order], z, rtol=1e-9, atol=1e-9)


@given(logit_pairs, st.booleans())
def test_mean_is_the_weighted_mean_of_none(drawn, weighted):
    s, t, y = pair(drawn)
    y[::3] = -100
    w = torch.rand(len(s), dtype=FP64, generator=torch.Generator().manual_seed(drawn[0]))
    if not weighted:
        w = torch.ones_like(w)
    mean, none = (
        bdkd_loss(s, t, y, sample_weight=w if weighted else None, reduction=reduction,
                  backend="reference")
        for reduction in ("mean", "none")
    )  # fmt: skip
    total = w[y != -100].sum().clamp(min=1e-300)
    torch.testing.assert_close(mean.student, none.student.sum() / total)
    torch.testing.assert_close(mean.teacher, none.teacher.sum() / total)


@given(logit_pairs, st.floats(0.1, 20))
def test_temperature_is_a_scale_of_the_logits(drawn, τ):
    s, t, y = pair(drawn)
    hot = stats_of(s, t, y, temperature=τ)
    scaled = stats_of(s / τ, t / τ, y)
    for name in ("forward_kl", "reverse_kl", "student_entropy", "teacher_entropy"):
        torch.testing.assert_close(getattr(hot, name), getattr(scaled, name), rtol=1e-9, atol=1e-9)


def test_compiles_without_a_graph_break():
    """One graph serves all batch sizes and loss scales.

    A compiled call does not read labels on the host: a wrong label makes its row NaN.
    """

    def step(s, t, y, scale):
        return bdkd_loss(s, t, y, temperature=4, label_smoothing=0.1, reduction="none",
                         grad_scale=scale, backend="reference")  # fmt: skip

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for n, scale in ((6, 2.0), (9, 4.0)):
        s, t, y = draw("compiled", n)
        s.requires_grad_()
        t.requires_grad_()
        results = []
        for function in (step, compiled):
            out = function(s, t, y, scale)
            gradients = torch.autograd.grad((out.student + out.teacher).sum(), (s, t))
            results.append((out, gradients))
        torch.testing.assert_close(*results)

        y[3] = 99
        wrong = compiled(s, t, y, scale)
        assert wrong.student.isnan().nonzero().tolist() == [[3]]
        assert wrong.teacher.isnan().nonzero().tolist() == [[3]]


def test_loss_and_grad_compiles_without_a_graph_break():
    s, t, y = draw("inductor", n=6)
    compiled = torch.compile(bdkd_loss_and_grad, fullgraph=True, backend=COMPILER)
    torch.testing.assert_close(
        compiled(s, t, y, temperature=4.0, backend="reference"),
        bdkd_loss_and_grad(s, t, y, temperature=4.0, backend="reference"),
    )


def test_autocast_leaves_the_arithmetic_alone():
    net = torch.nn.Linear(8, 11)
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    _, t, y = draw("autocast")
    with torch.autocast("cpu", torch.bfloat16):
        logits = net(x)
        inside = bdkd_loss(logits, t, y, backend="reference")
    outside = bdkd_loss(logits, t, y, backend="reference")
    assert logits.dtype == torch.bfloat16
    assert inside.student.dtype == FP32
    assert torch.equal(inside.student, outside.student)
    inside.student.backward(retain_graph=True)
    got, net.weight.grad = net.weight.grad, None
    outside.student.backward()
    assert torch.equal(got, net.weight.grad)


def test_functional_call_and_func_grad():
    _, t, y = draw("functional")
    net = torch.nn.Linear(8, 11)
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    parameters = dict(net.named_parameters())

    def loss(parameters):
        logits = torch.func.functional_call(net, parameters, x)
        return BDKDLoss(backend="reference")(logits, t, y).student

    gradients = torch.func.grad(loss)(parameters)
    bdkd_loss(net(x), t, y, backend="reference").student.backward()
    torch.testing.assert_close(gradients["weight"], net.weight.grad)


def test_inference_mode():
    s, t, y = draw("inference")
    want = bdkd_loss_and_grad(s, t, y, backend="reference")
    with torch.inference_mode():
        out = bdkd_loss(s, t, y, backend="reference")
        assert torch.equal(out.student, want[0].student)
        torch.testing.assert_close(bdkd_loss_and_grad(s, t, y, backend="reference"), want)
