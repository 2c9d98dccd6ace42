"""Test each row of torch_features.py on each backend, and further cases of the same features.

A feature works and equals the reference, or it raises the error in the table.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import bdkd_kernels
import pytest
import torch
import torch_features
from bdkd_kernels import available_backends, backends, bdkd_loss, checks, native
from bdkd_kernels.compat import DistillKL, LigerJSD, LigerKLDIVLoss, kd_loss
from compiler import COMPILER
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from torch_features import FEATURES, OPTIONS, REFERENCE, WORKS, S, T, V, Y, gradients, leaves
from torch_features import close as assert_close

# In the interpreter, Triton supports CPU tensors. This needs TRITON_INTERPRET=1 at the start.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = ["reference", *(["native"] if native.AVAILABILITY else [])]
TABLE_BACKENDS = [*BACKENDS, *(["triton"] if INTERPRETED else [])]
each_backend = pytest.mark.parametrize("backend", BACKENDS)
DOCS = Path(__file__).parents[2] / "docs" / "reference" / "loss-features.md"


def student_loss(s, t=T, y=Y, **options):
    return bdkd_loss(s, t, y, **{**OPTIONS, **options}).student


def pattern(outcome: str, backend: str) -> str:
    """Return a regular expression for an error of the table.

    ``'…'`` and ``the …`` stand for the name of the backend, and any other … for any text.
    """
    text = re.escape(outcome.replace("'…'", repr(backend)).replace("the …", f"the {backend}"))
    return "^" + text.replace("…", ".*") + "$"


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning",
                            "ignore::UserWarning")  # fmt: skip
@pytest.mark.parametrize(
    ("row", "backend"),
    [(row, backend) for row in FEATURES for backend in TABLE_BACKENDS
     if not (row.threads and backend == "triton")],
    ids=lambda value: value if isinstance(value, str) else value.run.__name__,
)  # fmt: skip
def test_a_feature_works_or_raises_the_error_of_the_table(row, backend, tmp_path):
    outcome = row.outcome(backend)
    if row.run is torch_features.distributed_tensors and not checks.DTENSORS_WORK:
        outcome = "the tensors are DTensors, which need torch 2.10 or newer…"
    if outcome in (WORKS, REFERENCE):
        row.run(bdkd_kernels, backend, tmp_path)
        return
    with pytest.raises((TypeError, ValueError, RuntimeError)) as raised:
        row.run(bdkd_kernels, backend, tmp_path)
    assert re.match(pattern(outcome, backend), str(raised.value)), raised.value


def test_the_docs_show_the_table():
    assert torch_features.markdown() in DOCS.read_text("utf-8")


def test_rows_of_the_table_are_unique_and_complete():
    names = [row.name for row in FEATURES]
    assert len(names) == len(set(names)) > 30
    for row in FEATURES:
        assert row.reference != REFERENCE, row.name
        assert "|" not in row.name + row.note
        assert not row.note or row.note.endswith("."), row.name


@pytest.mark.skipif(
    INTERPRETED, reason="waits for a process without the interpreter, as make test is"
)
def test_features_work_on_interpreted_triton():
    """The rows run in the interpreter, except rows that compile for seconds or need two threads."""
    pytest.importorskip("triton", reason="no triton for this platform: the other backends run")
    too_old = backends._too_old_triton()
    if too_old is not None:
        pytest.skip(f"{too_old}; the same table runs here on native and reference")
    rows = [f"[{row.run.__name__}-triton]" for row in FEATURES if not (row.compiles or row.threads)]
    test = f"{__file__}::{test_a_feature_works_or_raises_the_error_of_the_table.__name__}"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run([*command, *(test + row for row in rows)], env=environment,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert f"{len(rows)} passed" in done.stdout


# -- cases of one feature --------------------------------------------------------------------------


@each_backend
def test_double_backward_of_a_batch_is_right_or_refused(backend):
    (leaf,) = leaves(S)
    loss = student_loss(leaf, reduction="none", backend=backend)
    options = {"is_grads_batched": True, "create_graph": True}
    if backend == "reference":
        torch.autograd.grad(loss, leaf, torch.eye(6), **options)
    else:
        with pytest.raises(RuntimeError, match="native backend has no double backward"):
            torch.autograd.grad(loss, leaf, torch.eye(6), **options)


@each_backend
def test_a_checkpointed_step_with_create_graph(backend):
    """Checkpointing allows saved tensors to be unpacked once, also if the gradient needs them."""

    def loss(s, t):
        return student_loss(2 * s, t, backend=backend)

    (leaf,) = leaves(S)
    value = checkpoint(loss, leaf, T, use_reentrant=False)
    (got,) = torch.autograd.grad(3 * value, leaf, create_graph=True)
    (want,) = torch.autograd.grad(3 * loss(leaf, T), leaf)
    assert_close(got, want)


@each_backend
def test_gradcheck_of_batched_gradients(backend):
    leaf = S.double().requires_grad_()
    torch.autograd.gradcheck(
        lambda s: student_loss(s, T.double(), backend=backend), (leaf,), check_batched_grad=True
    )


@each_backend
def test_fake_tensors_do_not_mix_with_others(backend):
    with FakeTensorMode():
        s, t = torch.empty(6, 5), torch.empty(6, 5)
        y, weight = torch.zeros(6, dtype=torch.int64), torch.ones(6)
    for tensors, weights, words in (
        ((s, T, Y), None, "student_logits is a FakeTensor and teacher_logits is not, got Tensor"),
        ((S, t, Y), None, "teacher_logits is a FakeTensor and student_logits is not, got Tensor"),
        ((S, T, y), None, "target is a FakeTensor and student_logits is not"),
        ((S, T, Y), weight, "sample_weight is a FakeTensor and student_logits is not"),
    ):
        with pytest.raises(TypeError, match=words):
            bdkd_loss(*tensors, sample_weight=weights, backend=backend)


@each_backend
def test_a_dispatch_mode_changes_nothing(backend):
    (leaf,) = leaves(S)
    with FlopCounterMode(display=False):
        student_loss(leaf, backend=backend).backward()
        with pytest.raises(ValueError, match=r"target\[0\] is 7"):
            student_loss(leaf, y=Y + 7 - Y, backend=backend)
    assert_close(leaf.grad, gradients()[0])


@each_backend
def test_bad_labels_under_transforms(backend):
    """A label that Python can read is checked. In a batched tensor of labels, its row is NaN."""
    bad = Y.clone()
    bad[0] = 7
    with pytest.raises(ValueError, match=r"target\[0\] is 7"):
        torch.func.grad(lambda s: student_loss(s, y=bad, backend=backend))(S)
    with pytest.raises(ValueError, match=r"target\[0\] is 7"):
        torch.func.vmap(lambda s: student_loss(s, y=bad, backend=backend))(S[None])
    rows = torch.func.vmap(lambda y: student_loss(S, y=y, reduction="none", backend=backend))(
        bad[None]
    )
    assert rows.isnan().tolist() == [[True] + [False] * 5]


@each_backend
def test_strict_export(backend):
    module = torch_features.Losses(bdkd_kernels, backend)
    rows = torch.export.Dim("rows")
    exported = torch.export.export(
        module, (S, T, Y), dynamic_shapes=({0: rows},) * 3, strict=True
    ).module()
    for got, want in zip(exported(S[:2], T[:2], Y[:2]), module(S[:2], T[:2], Y[:2]), strict=True):
        assert_close(got, want)


def test_compat_losses_under_another_default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        for loss in (LigerJSD(0.5), LigerKLDIVLoss(log_target=True), DistillKL(2.0)):
            assert loss(S.log_softmax(-1), T.log_softmax(-1)).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


@each_backend
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_step_with_a_teacher_of_inference_mode(dynamic, backend):
    """Autograd cannot save inference tensors, and the compiler cannot recognise them."""
    torch.compiler.reset()
    compiled = torch.compile(
        lambda s, t, y, w: student_loss(s, t, y, sample_weight=w, backend=backend),
        fullgraph=True, dynamic=dynamic, backend=COMPILER,
    )  # fmt: skip
    ones = torch.ones(6)
    with torch.inference_mode():
        teacher, weight, soft = T.clone(), ones.clone(), T.softmax(-1)
    for arguments in ((T, Y, ones), (teacher, Y, weight), (teacher, soft, weight)):
        (leaf,) = leaves(S)
        compiled(leaf, *arguments).backward()
        target = soft.clone() if arguments[1] is soft else Y
        (want,) = leaves(S)
        student_loss(want, y=target, backend="reference").backward()
        assert_close(leaf.grad, want.grad)


@each_backend
def test_a_compiled_loss_without_a_term(backend):
    @torch.compile(fullgraph=True, backend=COMPILER)
    def step(s, t):
        return bdkd_loss(s, t, None, student_kd=0.0, backend=backend).student

    (leaf,) = leaves(S)
    loss = step(leaf, T)
    loss.backward()
    assert loss == 0
    assert torch.equal(leaf.grad, torch.zeros(6, 5))


@each_backend
def test_options_that_a_compiled_function_takes_as_arguments(backend):
    """The compiler turns a float that changes into a symbol. Each of its values is checked."""
    torch.compiler.reset()

    @torch.compile(fullgraph=True, backend=COMPILER)
    def step(s, t, temperature):
        return bdkd_loss(s, t, Y, temperature=temperature, backend=backend).student

    for temperature in (1.0, 2.0, 3.5):
        want = bdkd_loss(S, T, Y, temperature=temperature, backend="reference").student
        assert_close(step(S, T, temperature), want)


@each_backend
def test_compat_losses_in_forward_mode_and_inference_mode(backend):
    """The teacher of these losses has a gradient if it requires one, and also a tangent."""
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


@each_backend
def test_distributed_tensors_need_a_torch_that_computes_them(mesh, backend, monkeypatch):
    from torch.distributed.tensor import Shard, distribute_tensor

    monkeypatch.setattr(checks, "DTENSORS_WORK", False)
    s, t, y = (distribute_tensor(x, mesh, [Shard(0)]) for x in (S, T, Y))
    for name in (backend, "auto"):
        with pytest.raises(RuntimeError, match=r"need torch 2\.10 or newer.*to_local"):
            student_loss(s, t, y, backend=name)


@each_backend
def test_distributed_tensors_do_not_mix_with_others(mesh, backend):
    from torch.distributed.tensor import Shard, distribute_tensor

    s, y = (distribute_tensor(x, mesh, [Shard(0)]) for x in (S, Y))
    with pytest.raises(TypeError, match="DTensor and teacher_logits is not"):
        student_loss(s, T, y, backend=backend)


def test_the_table_covers_all_backends():
    assert {"reference", *torch_features.FUSED} == set(available_backends())
