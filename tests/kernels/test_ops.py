"""The shared code of the fused backends: operators, torch.compile, autograd nodes."""

import gc
import threading
import weakref
from functools import partial

import pytest
import torch
from bdkd_kernels import BDKDLoss, bdkd_loss, bdkd_loss_and_grad, native
from bdkd_kernels.ops import flat_options
from bdkd_kernels.options import LossOptions
from cases import BF16, FP16, FP32, FP64
from compiler import COMPILER
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

pytestmark = pytest.mark.skipif(
    not native.AVAILABILITY, reason=f"{native.AVAILABILITY}; triton's tests check these operators"
)


def draw(n: int, c: int, seed: int, storage=FP32, soft: bool = False):
    rng = torch.Generator().manual_seed(seed)
    s, t = torch.randn(2, n, c, generator=rng).to(storage)
    y = torch.randint(c, (n,), generator=rng)
    if soft:
        y = torch.softmax(torch.randn(n, c, generator=rng), -1)
    return s.requires_grad_(), t.requires_grad_(), y


def gradients(s, t, y, upstream=(1.0, 1.0), **options):
    a, b = s.detach().clone().requires_grad_(), t.detach().clone().requires_grad_()
    out = bdkd_loss(a, b, y, **options)
    (upstream[0] * out.student.sum() + upstream[1] * out.teacher.sum()).backward()
    return a.grad, b.grad


OPTIONS = {
    "mean": LossOptions(temperature=4.0),
    "none": LossOptions(reduction="none", teacher_divergence="forward", label_smoothing=0.1),
    "teacher without a term": LossOptions(teacher_ce=0.0, teacher_kd=0.0),
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("storage", [FP32, BF16, FP64])
def test_opcheck(name, storage):
    o, ops = OPTIONS[name], torch.ops.bdkd
    s, t, y = draw(5, 7, 1, storage, soft=name == "none")
    weight = torch.rand(5)
    for grads in ((False, False), (True, True), (True, False)):
        arguments = (s, t, y, weight, None, 2.0, *grads, *flat_options(o))
        torch.library.opcheck(ops.native_forward.default, arguments)
    above = torch.rand(5) if o.reduction == "none" else torch.tensor(3.0)
    above = above.to(FP64 if storage == FP64 else FP32)
    for upstreams in ((above, above), (above, None)):
        arguments = (*upstreams, s.detach(), t.detach(), y, None, torch.empty(0, 5))
        torch.library.opcheck(ops.native_backward.default, (*arguments, *flat_options(o)))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_one_graph(dynamic):
    @torch.compile(fullgraph=True, dynamic=dynamic, backend=COMPILER)
    def both(s, t, y, weight):
        out = bdkd_loss(2 * s, t, y, temperature=4.0, sample_weight=weight, backend="native")
        return out.student, 3 * out.teacher, out.stats.forward_kl

    for n, c in ((5, 7), (9, 33)) if dynamic else ((5, 7),):
        s, t, y = draw(n, c, 2)
        weight = torch.rand(n)
        student, teacher, kl = both(s, t, y, weight)
        (student + teacher).backward()
        a, b = s.detach().clone().requires_grad_(), t.detach().clone().requires_grad_()
        want = bdkd_loss(2 * a, b, y, temperature=4.0, sample_weight=weight, backend="reference")
        (want.student + 3 * want.teacher).backward()
        right = (want.student, 3 * want.teacher, want.stats.forward_kl)
        torch.testing.assert_close((student, teacher, kl), right)
        torch.testing.assert_close((s.grad, t.grad), (a.grad, b.grad), atol=1e-6, rtol=1e-5)
        assert not kl.requires_grad


def test_loss_and_grad_compiles_to_one_graph():
    @torch.compile(fullgraph=True, backend=COMPILER)
    def at_once(s, t, y, scale):
        return bdkd_loss_and_grad(s, t, y, reduction="sum", grad_scale=scale, backend="native")

    s, t, y = draw(5, 7, 3)
    out, (ds, dt) = at_once(s, t, y, torch.tensor(8.0))
    want, (want_ds, want_dt) = bdkd_loss_and_grad(s, t, y, reduction="sum", grad_scale=8.0)
    torch.testing.assert_close((out.student, ds, dt), (want.student, want_ds, want_dt))


def test_a_bad_label_gives_nan_in_a_compiled_call():
    s, t, y = draw(4, 6, 4)
    y[2] = 6
    compiled = torch.compile(bdkd_loss, fullgraph=True, backend=COMPILER)
    out = compiled(s, t, y, reduction="none", backend="native")
    assert out.student.isnan().tolist() == [False, False, True, False]
    (out.student + out.teacher).sum().backward()
    assert s.grad.isnan().all(-1).tolist() == [False, False, True, False]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_an_operator_gives_nan_for_a_bad_label(reduction):
    """An operator may be part of a graph, where it cannot raise. Forward and backward give NaN."""
    s, t, y = (x.detach() for x in draw(4, 6, 4))
    y[2] = 6
    flat, ops = flat_options(LossOptions(reduction=reduction)), torch.ops.bdkd
    out = ops.native_forward.default(s, t, y, None, None, 1.0, True, True, *flat)
    above = torch.ones(4 if reduction == "none" else ())
    again = ops.native_backward.default(above, above, s, t, y, None, out[3], *flat)
    for loss in out[:2]:
        assert loss.isnan().any()
    for gradient in (*out[4:], *again):
        assert gradient.isnan().all(-1).tolist() == [False, False, True, False]
        assert gradient.isnan().any(-1).tolist() == [False, False, True, False]


class Watching(TorchDispatchMode):
    """A dispatch mode that records every operator."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_dispatch_mode_sees_the_operators(order):
    s, t, y = draw(5, 7, 5)
    with Watching() as mode:
        out = bdkd_loss(s, t, y, backend="native")
        bdkd_loss_and_grad(s, t, y, backend="native")
        for network in order:  # one after the other
            out[network].backward()
    assert "bdkd.native_forward.default" in mode.seen
    assert "bdkd.native_backward.default" in mode.seen
    torch.testing.assert_close((s.grad, t.grad), gradients(s, t, y), atol=1e-7, rtol=1e-5)
    want = gradients(s, t, y, (8.0, 8.0))
    for scale in (8.0, torch.tensor(8.0)):
        with Watching():
            scaled = bdkd_loss_and_grad(s, t, y, grad_scale=scale, backend="native")[1]
        torch.testing.assert_close(scaled, want, atol=1e-6, rtol=1e-5)


def test_transforms_of_torch_func_run_the_reference():
    s, t, y = draw(5, 7, 6)
    ds = torch.func.grad(lambda s: bdkd_loss(s, t.detach(), y).student)(s.detach())
    torch.testing.assert_close(ds, gradients(s, t, y)[0])


def test_vmap_equals_one_call_per_batch():
    batches = [draw(5, 7, seed) for seed in (14, 15, 16)]
    s, t, y = (torch.stack(x).detach() for x in zip(*batches, strict=True))
    out = torch.func.vmap(bdkd_loss)(s, t, y)
    ds = torch.func.vmap(torch.func.grad(lambda *x: bdkd_loss(*x).student))(s, t, y)
    for k, batch in enumerate(batches):
        alone = bdkd_loss(*batch)
        torch.testing.assert_close(out.student[k], alone.student)
        torch.testing.assert_close([x[k] for x in out.stats], list(alone.stats))
        torch.testing.assert_close(ds[k], gradients(*batch)[0])


def test_backward_returns_gradients_without_a_copy():
    """Accumulation into an empty ``.grad`` clones a gradient that has other references."""
    s, t, y = draw(64, 1000, 7)
    out = bdkd_loss(s, t, y, backend="native")
    made = [x.data_ptr() for x in out.student.grad_fn.call.gradients]
    (out.student + out.teacher).backward()
    assert [s.grad.data_ptr(), t.grad.data_ptr()] == made


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_backward_of_a_loss_runs_through_its_own_network_only(order):
    """Otherwise the first backward would free tensors that the other network has saved."""
    s, t, y = draw(5, 7, 8)
    hidden = [(2 * s).exp(), (3 * t).exp()]
    gone = [weakref.ref(x) for x in hidden]
    out = bdkd_loss(*hidden, y, backend="native")
    del hidden
    out[order[0]].backward()
    assert ((s, t)[order[1]]).grad is None
    out[order[1]].backward()
    assert s.grad.any()
    assert t.grad.any()
    gc.collect()
    assert [x() for x in gone] == [None, None]  # the logits are freed after both backward passes
    with pytest.raises(RuntimeError, match="second time"):
        out.student.backward()


def test_logits_changed_before_a_recomputation_raise():
    s, t, y = draw(5, 7, 9)
    hidden = s * 2
    out = bdkd_loss(hidden, t, y, backend="native")
    with torch.no_grad():
        hidden.zero_()
    with pytest.raises(RuntimeError, match="inplace"):
        (3 * out.student).backward()


def test_another_upstream_gradient_is_recomputed_not_rescaled():
    """In fp16, gradients for a scale of 1 underflow where those for a scale of 2^16 do not."""
    rng = torch.Generator().manual_seed(10)
    s, t = (torch.randn(2, 512, 1000, generator=rng)).to(FP16)
    y = torch.randint(1000, (512,), generator=rng)
    late = gradients(s, t, y, (2.0**16, 2.0**16), backend="native")
    early = gradients(s, t, y, (2.0**16, 2.0**16), backend="native", grad_scale=2.0**16)
    want = gradients(s.double(), t.double(), y, (2.0**16, 2.0**16), backend="reference")
    for a, b, right in zip(late, early, want, strict=True):
        assert torch.equal(a, b)
        assert (a == 0).float().mean() < 1e-3
        torch.testing.assert_close(a.double(), right, atol=1e-4, rtol=2e-3)


@pytest.mark.parametrize("module", [False, True])
@pytest.mark.parametrize("storage", [FP32, FP16])
@pytest.mark.parametrize(
    ("scale", "above"),
    [
        (1.0, 1.0),
        (64.0, 64.0),
        (0.1, 0.1),  # float32 rounds 0.1
        (torch.tensor(64.0), 64.0),
        (1.0, 64.0),  # the first backward pass recomputes both gradients with the late scale
    ],
)
def test_backward_with_the_assumed_scale_reads_no_logits(scale, above, storage, module):
    """The forward pass computed the gradients, so the logits may be overwritten before backward.

    If the upstream gradient is another one, the first backward recomputes the gradients of both
    networks. After that, the logits of both networks may be overwritten.
    """
    s, t, y = draw(5, 7, 12, storage)
    hidden = [1 * s, 1 * t]
    call = BDKDLoss(backend="native") if module else partial(bdkd_loss, backend="native")
    out = call(*hidden, y, grad_scale=scale)
    if above != scale:
        (above * out.teacher).backward()
    with torch.no_grad():
        for logits in hidden:
            logits.zero_()  # autograd raises if a backward pass reads them now
    if above == scale:
        (above * out.teacher).backward()
    (above * out.student).backward()
    want = gradients(s, t, y, (above, above), grad_scale=above, backend="native")
    assert torch.equal(s.grad, want[0])
    assert torch.equal(t.grad, want[1])


def test_a_scale_tensor_with_a_new_value_is_noticed():
    """A loop may keep its scale in one tensor and change the value of that tensor.

    Neither the assumed scale nor the scale of the other network's backward pass may then be
    mistaken for the new value.
    """
    s, t, y = draw(5, 7, 12)
    scale = torch.tensor(8.0)
    out = bdkd_loss(s, t, y, grad_scale=scale, backend="native")
    out.teacher.backward(scale)
    out = bdkd_loss(s, t, y, grad_scale=scale, backend="native")
    scale.fill_(2.0)
    out.student.backward(scale)
    scale.fill_(3.0)
    t.grad = None
    out.teacher.backward(scale)
    want = gradients(s, t, y, (2.0, 3.0), backend="native")
    torch.testing.assert_close((s.grad, t.grad), want, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("above", [(1.0, 1.0), (8.0, 8.0), (1.0, 8.0), (8.0, 1.0), (8.0, 3.0)])
def test_backward_copies_no_gradient_for_any_scale(above):
    s, t, y = draw(5, 7, 12)
    out = bdkd_loss(s, t, y, backend="native")
    made = {x.data_ptr() for x in out.student.grad_fn.call.gradients}
    (above[0] * out.student + above[1] * out.teacher).backward()
    assert {s.grad.data_ptr(), t.grad.data_ptr()} == made  # not copied
    want = gradients(s.double(), t.double(), y, above, backend="reference")
    torch.testing.assert_close((s.grad.double(), t.grad.double()), want, atol=1e-5, rtol=1e-5)


def test_two_threads_run_backward_at_the_same_time():
    """Each thread runs backward on one loss. The first one also recomputes the other gradient."""
    s, t, y = draw(64, 1000, 13)
    want = [gradients(s, t, y, (scale, scale)) for scale in (8.0, 3.0)]
    for same in (True, False) * 20:
        out = bdkd_loss(s, t, y, backend="native")
        gate, got = threading.Barrier(2), {}

        def work(network, scale, out=out, gate=gate, got=got):
            gate.wait()
            (got[network],) = torch.autograd.grad(scale * out[network], (s, t)[network])

        threads = [
            threading.Thread(target=work, args=(0, 8.0)),
            threading.Thread(target=work, args=(1, 8.0 if same else 3.0)),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
        assert torch.equal(got[0], want[0][0])
        assert torch.equal(got[1], want[0 if same else 1][1])


def test_works_under_autocast_and_checkpoint():
    s, t, y = draw(6, 16, 11)
    net = torch.nn.Linear(16, 16)

    def loss(s, t):
        with torch.autocast("cpu", torch.bfloat16):
            out = bdkd_loss(net(s), net(t), y, backend="native")
            assert out.student.dtype == FP32
            return out.student + out.teacher

    loss(s, t).backward()
    once = net.weight.grad.clone()
    net.weight.grad = None
    checkpoint(loss, s, t, use_reentrant=False).backward()
    torch.testing.assert_close(net.weight.grad, once)
