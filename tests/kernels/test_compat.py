"""The losses of other libraries have the same values and gradients as the originals.

Each is compared with its published definition, written here in float64 with torch's functions.
"""

from functools import partial

import pytest
import torch
from bdkd_kernels import native
from bdkd_kernels.compat import DistillKL, LigerJSD, LigerKLDIVLoss, kd_loss
from torch import nn
from torch.nn import functional as F

BACKENDS = ["auto", "reference"]


def logits(n=7, c=13, dtype=torch.float64, scale=3.0):
    """Return the student's and the teacher's logits, leaves that require gradients."""
    g = torch.Generator().manual_seed(0)
    pair = (scale * torch.randn(2, n, c, generator=g, dtype=torch.float64)).to(dtype)
    return [x.clone().requires_grad_() for x in pair]


def assert_same(ours, theirs, leaves, upstream=1.0, tolerance=1e-12):
    """Compare the values and the gradients of the leaves."""
    torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=tolerance, atol=tolerance)
    came = torch.autograd.grad(ours * upstream, leaves, retain_graph=True, allow_unused=True)
    expected = torch.autograd.grad(theirs * upstream, leaves, retain_graph=True, allow_unused=True)
    for a, b in zip(came, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def hinton(s, t, tau):
    """RepDistiller: the sum over all elements, times tau^2, divided by the number of rows."""
    total = F.kl_div(F.log_softmax(s / tau, 1), F.softmax(t / tau, 1), reduction="sum")
    return total * tau**2 / s.shape[0]


def hinton_rows(s, t, tau):
    """mdistiller: the sum over classes of every row, times tau^2."""
    p = F.softmax(t / tau, 1)
    return F.kl_div(F.log_softmax(s / tau, 1), p, reduction="none").sum(1) * tau**2


def jsd(log_q, log_p, beta, labels=None, ignore_index=-100):
    """Liger: beta KL(P || M) + (1 - beta) KL(Q || M); forward KL for 0, reverse KL for 1."""
    p, q = log_p.exp(), log_q.exp()
    if beta == 0:
        rows = (p * (log_p - log_q)).sum(-1)
    elif beta == 1:
        rows = (q * (log_q - log_p)).sum(-1)
    else:
        log_m = (beta * p + (1 - beta) * q).log()
        rows = beta * (p * (log_p - log_m)).sum(-1) + (1 - beta) * (q * (log_q - log_m)).sum(-1)
    if labels is None:
        return rows.mean()
    return rows[labels != ignore_index].mean()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tau", [1, 4.0])
@pytest.mark.parametrize("upstream", [1.0, 0.9])
def test_distill_kl_equals_repdistiller(backend, tau, upstream):
    s, t = logits()
    assert_same(DistillKL(tau, backend=backend)(s, t.detach()), hinton(s, t.detach(), tau), [s],
                upstream)  # fmt: skip
    # A teacher that is not detached receives a gradient too, as in the original.
    assert_same(DistillKL(tau, backend=backend)(s, t), hinton(s, t, tau), [s, t], upstream)
    assert_same(DistillKL(tau, backend=backend)(s.detach(), t), hinton(s.detach(), t, tau), [t])


@pytest.mark.parametrize("backend", BACKENDS)
def test_kd_loss_equals_mdistiller(backend):
    s, t = logits()
    came = kd_loss(s, t, 4.0, backend=backend)
    assert_same(came, hinton_rows(s, t, 4.0).mean(), [s, t])
    rows = kd_loss(s, t.detach(), 4, reduce=False, backend=backend)
    assert rows.shape == (7,)
    weights = torch.arange(7.0, dtype=torch.float64)
    assert_same(rows @ weights, hinton_rows(s, t.detach(), 4.0) @ weights, [s])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("beta", [0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("labels", [None, [3, -100, 5, 0, -100, 1, 2]])
def test_liger_jsd(backend, beta, labels):
    """The inputs come from log_softmax, as in Liger. The teacher receives no gradient, as there."""
    s, t = logits()
    labels = None if labels is None else torch.tensor(labels)
    log_q, log_p = s.log_softmax(-1), t.detach().log_softmax(-1)
    ours = LigerJSD(beta, backend=backend)
    assert_same(ours(log_q, log_p, labels), jsd(log_q, log_p, beta, labels), [s], 3.0)
    assert not torch.autograd.grad(ours(s, t, labels), t, allow_unused=True)[0]
    logits_too = ours(s, t, labels)
    torch.testing.assert_close(logits_too, ours(log_q, log_p, labels))


@pytest.mark.parametrize("beta", [0, 0.3, 1])
@pytest.mark.parametrize("ignore_index", [-100, 2, 99])
def test_liger_jsd_ignores_only_its_ignore_index(beta, ignore_index):
    """The labels only select the samples that count: a label outside the vocabulary is valid."""
    s, t = logits()
    labels = torch.tensor([2, -100, 99, 2, 5, -100, 10**6])
    ours = LigerJSD(beta, ignore_index)
    for kind in (torch.int64, torch.int32):
        came = ours(s.log_softmax(-1), t.detach().log_softmax(-1), labels.to(kind))
        log_q, log_p = s.log_softmax(-1), t.detach().log_softmax(-1)
        assert_same(came, jsd(log_q, log_p, beta, labels, ignore_index), [s])


@pytest.mark.filterwarnings("ignore:reduction")  # torch's own warning about 'mean'
@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum"])
@pytest.mark.parametrize("log_target", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_liger_kl_div_equals_torch(reduction, log_target, backend):
    s, t = logits()
    log_q, log_p = s.log_softmax(-1), t.detach().log_softmax(-1)
    truth = log_p if log_target else log_p.exp()
    ours = LigerKLDIVLoss(reduction=reduction, log_target=log_target, backend=backend)
    theirs = nn.KLDivLoss(reduction=reduction, log_target=log_target)
    assert_same(ours(log_q, truth), theirs(log_q, truth), [s])


@pytest.mark.filterwarnings("ignore:reduction")  # torch's own warning about 'mean'
def test_defaults_equal_the_originals():
    s, t = logits()
    log_q, log_p = s.log_softmax(-1), t.detach().log_softmax(-1)
    labels = torch.tensor([3, -100, 5, 0, -100, 1, 2])
    assert_same(LigerJSD()(log_q, log_p, labels), jsd(log_q, log_p, 0.5, labels), [s])
    assert_same(LigerKLDIVLoss()(log_q, log_p.exp()), nn.KLDivLoss()(log_q, log_p.exp()), [s])
    assert_same(kd_loss(s, t, 4.0), hinton_rows(s, t, 4.0).mean(), [s, t])
    with pytest.raises(TypeError):  # the meaning of the fourth argument differs between forks
        kd_loss(s, t, 4.0, False)
    with pytest.raises(TypeError):  # Liger's first argument is eps
        LigerKLDIVLoss(1e-8)


def test_half_precision_probabilities_lose_no_precision():
    """A logarithm rounded to bf16 would have an error of up to 2**-9, as would the loss."""
    s, t = logits(n=40, dtype=torch.float32)
    for dtype in (torch.bfloat16, torch.float16):
        truth = t.detach().softmax(-1).to(dtype)
        p = truth.double() / truth.double().sum(-1, keepdim=True)
        log_q = s.detach().double().log_softmax(-1)
        want = torch.where(p == 0, 0.0, p * (p.log() - log_q)).sum(-1).mean()
        came = LigerKLDIVLoss(reduction="batchmean")(s.log_softmax(-1), truth)
        assert came.dtype == torch.float32
        torch.testing.assert_close(came.double(), want, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("which", [0, 1])
def test_one_network_in_float64_makes_the_arithmetic_float64(which):
    s, t = (x.detach() for x in logits())
    pair = [s.float(), t.float()]
    pair[which] = (s, t)[which]
    wide = [x.double() for x in pair]
    for loss, want in (
        (DistillKL(4.0), hinton(*wide, 4.0)),
        (LigerJSD(0.5), jsd(*(x.log_softmax(-1) for x in wide), 0.5)),
        (LigerJSD(0), jsd(*(x.log_softmax(-1) for x in wide), 0)),
    ):
        torch.testing.assert_close(loss(*pair), want, rtol=1e-12, atol=1e-12)


X = torch.zeros(4, 5)
WRONG = {  # the call, the error, and the words that its message must contain
    "DistillKL temperature": (lambda: DistillKL(0.0), ValueError, ["T must be", "0.0"]),
    "DistillKL no number": (lambda: DistillKL("4"), TypeError, ["T must be", "'4'"]),
    "DistillKL backend": (lambda: DistillKL(4.0, "cuda"), ValueError, ["backend", "cuda"]),
    "DistillKL y_s": (lambda: DistillKL(4.0)([1.0], X), TypeError, ["y_s must be", "list"]),
    "DistillKL y_t": (lambda: DistillKL(4.0)(X, X.int()), TypeError, ["y_t must be", "int32"]),
    "DistillKL rows": (lambda: DistillKL(4.0)(X, X[:3]), ValueError, ["y_s and y_t", "(3, 5)"]),
    "DistillKL one sample": (lambda: DistillKL(4.0)(X[0], X[0]), ValueError, ["y_s", "(N, C)"]),
    "DistillKL sequence": (
        lambda: DistillKL(4.0)(X[None], X[None]), ValueError, ["y_s", "(1, 4, 5)", "flatten"],
    ),
    "DistillKL device": (
        lambda: DistillKL(4.0)(X, X.to("meta")), ValueError, ["y_s and y_t", "cpu and meta"],
    ),
    "kd_loss temperature": (lambda: kd_loss(X, X, 1e5), ValueError, ["temperature", "100000.0"]),
    "kd_loss reduce": (lambda: kd_loss(X, X, 4.0, reduce=1), TypeError, ["reduce", "1 (int)"]),
    "kd_loss student": (lambda: kd_loss(None, X, 4.0), TypeError, ["logits_student", "NoneType"]),
    "kd_loss teacher": (
        lambda: kd_loss(X, X.bool(), 4.0), TypeError, ["logits_teacher", "torch.bool"],
    ),
    "LigerJSD beta": (lambda: LigerJSD(1.5), ValueError, ["beta", "1.5", "[0, 1]"]),
    "LigerJSD negative beta": (lambda: LigerJSD(-0.1), ValueError, ["beta", "-0.1"]),
    "LigerJSD no label": (lambda: LigerJSD(0.5, True), TypeError, ["ignore_index", "True"]),
    "LigerJSD large label": (lambda: LigerJSD(0.5, 2**63), ValueError, ["ignore_index", "64"]),
    "LigerJSD backend": (lambda: LigerJSD(backend="gpu"), ValueError, ["backend", "gpu"]),
    "LigerJSD log_p": (lambda: LigerJSD()(X, X[:, :4]), ValueError, ["log_q and log_p", "(4, 4)"]),
    "LigerJSD labels": (
        lambda: LigerJSD()(X, X, torch.zeros(4, 1).long()), ValueError, ["shift_labels", "(4, 1)"],
    ),
    "LigerJSD soft labels": (
        lambda: LigerJSD()(X, X, torch.zeros(4)), TypeError, ["shift_labels", "float32"],
    ),
    "LigerJSD labels' device": (
        lambda: LigerJSD()(X, X, torch.zeros(4, device="meta").long()),
        ValueError, ["shift_labels", "cpu", "meta"],
    ),
    "LigerKLDIVLoss none": (
        lambda: LigerKLDIVLoss(reduction="none"), ValueError, ["reduction", "'none'", "KLDivLoss"],
    ),
    "LigerKLDIVLoss log_target": (
        lambda: LigerKLDIVLoss(log_target=1), TypeError, ["log_target", "1 (int)"],
    ),
    "LigerKLDIVLoss backend": (
        lambda: LigerKLDIVLoss(backend=None), ValueError, ["backend", "None"],
    ),
    "LigerKLDIVLoss y_true": (
        lambda: LigerKLDIVLoss()(X, X[0]), ValueError, ["y_pred and y_true", "(5,)"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_an_error_names_the_argument_as_in_the_original(name):
    call, error, words = WRONG[name]
    with pytest.raises(error) as raised:
        call()
    assert "\n" not in str(raised.value)
    for word in words:
        assert word in str(raised.value)


@pytest.mark.skipif(not native.AVAILABILITY, reason=f"{native.AVAILABILITY}: one backend to take")
def test_the_requested_backend_runs():
    """The test recognises the backend by its double backward, which only the reference supports."""
    for make in (
        lambda backend: DistillKL(4.0, backend=backend),
        lambda backend: partial(kd_loss, temperature=4.0, backend=backend),
        lambda backend: LigerJSD(1, backend=backend),
        lambda backend: LigerKLDIVLoss(log_target=True, backend=backend),
    ):
        for backend in ("reference", "native"):
            s, t = logits()
            (ds,) = torch.autograd.grad(make(backend)(s, t.detach()), s, create_graph=True)
            if backend == "reference":
                ds.square().sum().backward()
                continue
            with pytest.raises(RuntimeError, match="native backend has no double backward"):
                ds.square().sum().backward()


def test_kl_div_supports_one_hot_targets():
    """A probability of 0 adds 0 to the loss, so no eps is needed."""
    s, _ = logits()
    truth = F.one_hot(torch.arange(7), 13).double()
    ours = LigerKLDIVLoss(reduction="batchmean")(s.log_softmax(-1), truth)
    assert_same(ours, F.cross_entropy(s, torch.arange(7)), [s])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_losses_of_other_storage_types_are_float32(dtype):
    s, t = logits(dtype=dtype)
    wide_s, wide_t = s.detach().double().requires_grad_(), t.detach().double()
    came = DistillKL(4.0)(s, t.detach())
    assert came.dtype == torch.float32
    expected = hinton(wide_s, wide_t, 4.0)
    torch.testing.assert_close(came, expected.float(), rtol=2e-6, atol=3e-5)
    (came_grad,) = torch.autograd.grad(came, s)
    (expected_grad,) = torch.autograd.grad(expected, wide_s)
    bound = 5e-6 * 16 + torch.finfo(dtype).eps * expected_grad.abs().max()
    assert (came_grad - expected_grad).abs().max() <= bound


@pytest.mark.parametrize("beta", [0, 0.5, 1])
def test_ignored_rows_and_masked_classes_add_no_nan(beta):
    s, t = logits()
    labels = torch.tensor([-100, 1, 2, 3, 4, 5, 6])
    with torch.no_grad():
        s[0], t[0] = torch.nan, torch.inf
        s[:, 9] = t[:, 9] = -torch.inf
    kept = [x.detach()[1:, [*range(9), *range(10, 13)]].requires_grad_() for x in (s, t)]
    loss = LigerJSD(beta)(s, t, labels)
    (gradient,) = torch.autograd.grad(loss, s)
    assert gradient[0].count_nonzero() == gradient[:, 9].count_nonzero() == 0
    expected = jsd(*(x.log_softmax(-1) for x in kept), beta)
    torch.testing.assert_close(loss, expected)
    (kept_gradient,) = torch.autograd.grad(expected, kept[0])
    torch.testing.assert_close(gradient[1:, :9], kept_gradient[:, :9])


@pytest.mark.parametrize("beta", [0, 0.5, 1])
def test_the_loss_is_zero_if_no_sample_counts(beta):
    s, t = logits()
    ignored = torch.full((7,), -100)
    loss = LigerJSD(beta)(s, t, ignored)
    assert loss == 0
    assert torch.autograd.grad(loss, s)[0].count_nonzero() == 0
    assert LigerJSD(beta)(s[:0], t[:0]) == 0


def test_bdkd_exports_the_compat_losses():
    import bdkd

    for name in ("DistillKL", "kd_loss", "LigerJSD", "LigerKLDIVLoss"):
        assert getattr(bdkd, name).__name__ == name
        assert name in bdkd.__all__
        assert name in dir(bdkd)


def test_the_repr_shows_the_options():
    assert repr(DistillKL(4)) == "DistillKL(T=4, backend='auto')"
    assert "beta=0.5" in repr(LigerJSD())
    assert "batchmean" in repr(LigerKLDIVLoss(reduction="batchmean"))


@pytest.mark.parametrize(
    "divergence",
    [
        lambda s, t: DistillKL(4.0)(s, t),
        lambda s, t: kd_loss(s, t, 2.0),
        lambda s, t: LigerJSD(0)(s, t, torch.arange(7)),
        lambda s, t: LigerJSD(0.5)(s, t),
        lambda s, t: LigerKLDIVLoss(reduction="sum", log_target=True)(s, t),
    ],
    ids=["DistillKL", "kd_loss", "LigerJSD-0", "LigerJSD-0.5", "LigerKLDIVLoss"],
)
def test_compat_losses_compile_to_one_graph(divergence):
    s, t = logits(dtype=torch.float32)
    compiled = torch.compile(divergence, fullgraph=True, backend="aot_eager")
    assert_same(compiled(s, t.detach()), divergence(s, t.detach()), [s], tolerance=1e-6)
