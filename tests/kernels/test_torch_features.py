"""What PyTorch can do to a function, done to the loss: right, or refused in one clear line. A
transform that kernels cannot follow runs the reference, whatever the backend."""

import io

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from bdkd_kernels import BDKDLoss, bdkd_loss, bdkd_loss_and_grad, checks, native
from bdkd_kernels.compat import DistillKL, LigerJSD, LigerKLDIVLoss, kd_loss
from compiler import COMPILER
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

BACKENDS = ["reference", *(["native"] if native.AVAILABILITY else [])]
pytestmark = pytest.mark.parametrize("backend", BACKENDS)

RNG = torch.Generator().manual_seed(0)
S, T, V = torch.randn(3, 6, 5, generator=RNG).unbind()
Y = torch.randint(5, (6,), generator=RNG)
OPTIONS = {"temperature": 2.0, "label_smoothing": 0.1}


def student_loss(s, t=T, y=Y, **options):
    return bdkd_loss(s, t, y, **{**OPTIONS, **options}).student


def gradients(**options):
    """Of both losses, by the reference in float64."""
    wide = [x.double() for x in (S, T)]
    return bdkd_loss_and_grad(*wide, Y, **{**OPTIONS, **options}, backend="reference")[1]


def assert_close(got, want, tolerance=1e-5):
    torch.testing.assert_close(got.double(), want.double(), rtol=tolerance, atol=tolerance)


def test_forward_mode_gives_the_true_tangent(backend):
    ds, dt = gradients()
    with forward_ad.dual_level():
        out = bdkd_loss(forward_ad.make_dual(S, V), forward_ad.make_dual(T, V), Y, **OPTIONS,
                        backend=backend)  # fmt: skip
        for loss, gradient in ((out.student, ds), (out.teacher, dt)):
            assert_close(forward_ad.unpack_dual(loss).tangent, (gradient * V).sum())
    _, tangent = torch.func.jvp(lambda s: student_loss(s, backend=backend), (S,), (V,))
    assert_close(tangent, (ds * V).sum())
    assert_close(torch.func.jacfwd(lambda s: student_loss(s, backend=backend))(S), ds)
    # A tangent of the partner's logits alone: constants to the student's loss.
    _, tangent = torch.func.jvp(lambda t: student_loss(S, t, backend=backend), (T,), (V,))
    assert tangent == 0


def test_transforms_of_torch_func(backend):
    ds, _ = gradients()
    assert_close(torch.func.grad(lambda s: student_loss(s, backend=backend))(S), ds)
    rows = torch.func.jacrev(lambda s: student_loss(s, reduction="none", backend=backend))(S)
    assert_close(rows.sum(0), gradients(reduction="sum")[0])
    of_sample = torch.func.grad(
        lambda s, t, y: student_loss(s[None], t[None], y[None], backend=backend)
    )
    assert_close(torch.func.vmap(of_sample)(S, T, Y), gradients(reduction="sum")[0])
    hessian = torch.func.hessian(lambda s: student_loss(s, backend=backend))(S)
    want = torch.autograd.functional.hessian(
        lambda s: student_loss(s, T.double(), backend="reference"), S.double()
    )
    assert_close(hessian, want)


def test_batched_backward_passes(backend):
    jacobian = torch.autograd.functional.jacobian(
        lambda s: student_loss(s, reduction="none", backend=backend), S, vectorize=True
    )
    assert_close(jacobian.sum(0), gradients(reduction="sum")[0])
    leaf = S.double().requires_grad_()
    torch.autograd.gradcheck(
        lambda s: student_loss(s, T.double(), backend=backend), (leaf,), check_batched_grad=True
    )


def test_double_backward_of_a_batch_is_right_or_refused(backend):
    leaf = S.clone().requires_grad_()
    loss = student_loss(leaf, reduction="none", backend=backend)
    options = {"is_grads_batched": True, "create_graph": True}
    if backend == "reference":
        torch.autograd.grad(loss, leaf, torch.eye(6), **options)
    else:
        with pytest.raises(RuntimeError, match="native backend has no double backward"):
            torch.autograd.grad(loss, leaf, torch.eye(6), **options)


class Losses(torch.nn.Module):
    def __init__(self, backend: str, **options) -> None:
        super().__init__()
        self.loss = BDKDLoss(backend=backend, **OPTIONS, **options)

    def forward(self, s, t, y):
        out = self.loss(s, t, y)
        return out.student, out.teacher


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_jit_trace_records_the_loss(backend):
    """It used to return memory that nothing had written."""
    module = Losses(backend)
    traced = torch.jit.trace(module, (S, T, Y))
    fresh = torch.randn(2, 6, 5, generator=RNG)
    for got, want in zip(traced(*fresh, Y), module(*fresh, Y), strict=True):
        assert_close(got, want)
    assert "bdkd::" not in str(traced.inlined_graph)  # it loads where bdkd is not installed


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx_records_the_loss(mode, backend):
    graph = make_fx(lambda s, t, y: student_loss(s, t, y, backend=backend), tracing_mode=mode)(
        S, T, Y
    )
    assert_close(graph(T, S, Y), student_loss(T, S, backend=backend))
    gradient = torch.func.grad(lambda s, t, y: student_loss(s, t, y, backend=backend))
    assert_close(make_fx(gradient, tracing_mode=mode)(S, T, Y)(S, T, Y), gradients()[0])


def test_fake_tensors_have_shapes_and_gradients(backend):
    with FakeTensorMode():
        s, t = (torch.empty(6, 5, requires_grad=True) for _ in range(2))
        out = bdkd_loss(s, t, torch.zeros(6, dtype=torch.int64), **OPTIONS, backend=backend)
        (out.student + out.teacher).backward()
        assert s.grad.shape == t.grad.shape == (6, 5)
        assert out.stats.forward_kl.shape == (6,)
    for tensors, words in (
        (
            (s.detach(), T, Y),
            "student_logits is a FakeTensor and teacher_logits is not, got Tensor",
        ),
        (
            (S, t.detach(), Y),
            "teacher_logits is a FakeTensor and student_logits is not, got Tensor",
        ),
    ):
        with pytest.raises(TypeError, match=words):
            bdkd_loss(*tensors, backend=backend)
    with FakeTensorMode():
        y, weight = torch.zeros(6, dtype=torch.int64), torch.ones(6)
    with pytest.raises(TypeError, match="target is a FakeTensor and student_logits is not"):
        bdkd_loss(S, T, y, backend=backend)
    with pytest.raises(TypeError, match="sample_weight is a FakeTensor and student_logits is not"):
        bdkd_loss(S, T, Y, sample_weight=weight, backend=backend)


def test_a_dispatch_mode_changes_nothing(backend):
    leaf = S.clone().requires_grad_()
    with FlopCounterMode(display=False):
        student_loss(leaf, backend=backend).backward()
        with pytest.raises(ValueError, match=r"target\[0\] is 7"):
            student_loss(leaf, y=Y + 7 - Y, backend=backend)
    assert_close(leaf.grad, gradients()[0])


@pytest.mark.parametrize("strict", [False, True])
def test_export_with_a_dynamic_batch(strict, backend):
    rows = torch.export.Dim("rows")
    module = Losses(backend)
    shapes = ({0: rows},) * 3
    exported = torch.export.export(module, (S, T, Y), dynamic_shapes=shapes, strict=strict)
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for n in (2, 13):  # the program is not of the traced batch alone
        s, t = torch.randn(2, n, 5, generator=RNG)
        y = torch.randint(5, (n,), generator=RNG)
        for got, want in zip(loaded(s, t, y), module(s, t, y), strict=True):
            assert_close(got, want)


def test_export_of_gradients(backend):
    class Gradients(torch.nn.Module):
        def forward(self, s, t, y):
            return bdkd_loss_and_grad(s, t, y, **OPTIONS, backend=backend)[1]

    if backend == "reference":
        with pytest.raises(RuntimeError, match="export bdkd_loss"):
            torch.export.export(Gradients(), (S, T, Y))
    else:
        exported = torch.export.export(Gradients(), (S, T, Y)).module()
        for got, want in zip(exported(S, T, Y), gradients(), strict=True):
            assert_close(got, want)


@pytest.fixture
def float64_by_default():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_the_default_dtype_changes_nothing(float64_by_default, backend):
    leaf = S.clone().requires_grad_()
    out = bdkd_loss(leaf, T, Y, **OPTIONS, backend=backend)
    out.student.backward()
    assert {x.dtype for x in (out.student, out.teacher, *out.stats)} == {torch.float32}
    assert_close(leaf.grad, gradients()[0])
    for loss in (LigerJSD(0.5), LigerKLDIVLoss(log_target=True), DistillKL(2.0)):
        assert loss(S.log_softmax(-1), T.log_softmax(-1)).dtype == torch.float32


def test_the_default_device_changes_nothing(backend):
    with torch.device("meta"):
        out, (ds, _) = bdkd_loss_and_grad(S, T, Y, **OPTIONS, backend=backend)
    assert out.student.device == ds.device == S.device
    assert_close(ds, gradients()[0])


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_step_with_a_teacher_of_inference_mode(dynamic, backend):
    """Autograd cannot save its logits, and the compiler cannot see where they were made."""
    torch.compiler.reset()
    compiled = torch.compile(
        lambda s, t, y, w: student_loss(s, t, y, sample_weight=w, backend=backend),
        fullgraph=True, dynamic=dynamic, backend=COMPILER,
    )  # fmt: skip
    ones = torch.ones(6)
    with torch.inference_mode():
        teacher, weight, soft = T.clone(), ones.clone(), T.softmax(-1)
    for arguments in ((T, Y, ones), (teacher, Y, weight), (teacher, soft, weight)):
        leaf = S.clone().requires_grad_()
        compiled(leaf, *arguments).backward()
        target = soft.clone() if arguments[1] is soft else Y
        want = S.clone().requires_grad_()
        student_loss(want, y=target, backend="reference").backward()
        assert_close(leaf.grad, want.grad)


def test_a_compiled_loss_without_a_term(backend):
    @torch.compile(fullgraph=True, backend=COMPILER)
    def step(s, t):
        return bdkd_loss(s, t, None, student_kd=0.0, backend=backend).student

    leaf = S.clone().requires_grad_()
    loss = step(leaf, T)
    loss.backward()
    assert loss == 0
    assert torch.equal(leaf.grad, torch.zeros(6, 5))


def test_swap_ins_in_forward_mode_and_inference_mode(backend):
    """Their teacher trains too, where it asks: so does its tangent."""
    for divergence in (DistillKL(2.0, backend), lambda s, t: kd_loss(s, t, 2.0, backend=backend)):
        wide = [x.double().requires_grad_() for x in (S, T)]
        want = torch.autograd.grad(divergence(*wide), wide)
        for k in (0, 1):
            _, tangent = torch.func.jvp(
                lambda x, k=k, f=divergence: f(*((x, T) if k == 0 else (S, x))), ((S, T)[k],), (V,)
            )
            assert_close(tangent, (want[k] * V).sum())
    log_s = S.log_softmax(-1).requires_grad_()
    with torch.inference_mode():
        log_t, labels = T.log_softmax(-1), Y.clone()
    for loss in (LigerJSD(0.5, backend=backend), LigerJSD(0.0, backend=backend)):
        got = torch.autograd.grad(loss(log_s, log_t, labels), log_s)[0]
        want = torch.autograd.grad(loss(log_s, T.log_softmax(-1), Y), log_s)[0]
        assert_close(got, want)
    loss = LigerKLDIVLoss(backend=backend)
    got = torch.autograd.grad(loss(log_s, log_t.exp()), log_s)[0]
    assert_close(got, torch.autograd.grad(loss(log_s, T.softmax(-1)), log_s)[0])


@pytest.fixture
def mesh(tmp_path):
    import torch.distributed as dist
    from torch.distributed.tensor import init_device_mesh

    dist.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{tmp_path}/store")
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_distributed_tensors_need_a_torch_that_computes_them(mesh, backend, monkeypatch):
    from torch.distributed.tensor import Shard, distribute_tensor

    monkeypatch.setattr(checks, "DTENSORS_WORK", False)
    s, t, y = (distribute_tensor(x, mesh, [Shard(0)]) for x in (S, T, Y))
    for name in (backend, "auto"):
        with pytest.raises(RuntimeError, match=r"need torch 2\.10 or newer.*to_local"):
            student_loss(s, t, y, backend=name)


@pytest.mark.skipif(not checks.DTENSORS_WORK, reason="the test above runs with any torch")
def test_distributed_tensors(mesh, backend):
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    for placement in (Shard(0), Replicate()):
        s, t, y = (distribute_tensor(x, mesh, [placement]) for x in (S, T, Y))
        s = s.detach().requires_grad_()
        if backend == "reference":
            student_loss(s, t, y, backend="auto").backward()
            assert_close(s.grad.full_tensor(), gradients()[0])
        else:
            with pytest.raises(RuntimeError, match=r"DTensor.*to_local"):
                student_loss(s, t, y, backend=backend)
        with pytest.raises(TypeError, match="DTensor and teacher_logits is not"):
            student_loss(s, T, y, backend=backend)
        student_loss(s.to_local(), T, Y, backend=backend).backward()
