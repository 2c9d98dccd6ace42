"""The features of PyTorch that the loss supports: one table for the tests and the docs.

Each row has a function of a package, a backend and a folder for files. It raises an AssertionError
if the result differs from that of the reference. ``test_torch_features.py`` runs every row on every
backend, and ``docs/reference/loss-features.md`` shows :func:`markdown`.
"""

import copy
import gc
import io
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import bdkd_kernels
import torch
import torch.autograd.forward_ad as forward_ad
import torch.distributed as dist
from compiler import COMPILER
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

RNG = torch.Generator().manual_seed(0)
S, T, V = torch.randn(3, 6, 5, generator=RNG).unbind()
Y = torch.randint(5, (6,), generator=RNG)
OPTIONS: dict[str, Any] = {"temperature": 2.0, "label_smoothing": 0.1}

WORKS, REFERENCE = "works", "runs the reference"
FUSED = ("native", "triton")


class Feature(NamedTuple):
    """One row of the table."""

    name: str  # in Markdown
    run: Callable[[Any, str, Path], None]
    fused: str = WORKS  # or REFERENCE, or the error, with … for parts that vary
    reference: str = WORKS
    note: str = ""
    compiles: bool = False  # takes seconds
    threads: bool = False  # needs several threads, which Triton's interpreter does not support

    def outcome(self, backend: str) -> str:
        return self.fused if backend in FUSED else self.reference


FEATURES: list[Feature] = []


def feature(name: str, **columns: Any) -> Callable:
    """Add a function to the table."""

    def add(run: Callable) -> Callable:
        FEATURES.append(Feature(name, run, **columns))
        return run

    return add


def markdown() -> str:
    """Return the table for the docs."""
    lines = [
        '| feature | `"native"`, `"triton"` | `"reference"` | note |',
        "| --- | --- | --- | --- |",
    ]
    for row in FEATURES:
        cells = [x if x in (WORKS, REFERENCE) else f"error: `{x}`"
                 for x in (row.fused, row.reference)]  # fmt: skip
        lines.append(f"| {row.name} | {cells[0]} | {cells[1]} | {row.note} |")
    return "\n".join(lines)


# -- what is compared ------------------------------------------------------------------------------


def gradients(**options) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of both losses, computed by the reference in float64."""
    options = {**OPTIONS, **options, "backend": "reference"}
    return bdkd_kernels.bdkd_loss_and_grad(S.double(), T.double(), Y, **options)[1]


def losses(**options) -> tuple[torch.Tensor, torch.Tensor]:
    options = {**OPTIONS, **options, "backend": "reference"}
    return bdkd_kernels.bdkd_loss(S.double(), T.double(), Y, **options)[:2]


def close(got, want, tolerance=1e-5) -> None:
    torch.testing.assert_close(got.double(), want.double(), rtol=tolerance, atol=tolerance)


def leaves(*tensors) -> list[torch.Tensor]:
    return [x.detach().clone().requires_grad_() for x in tensors or (S, T)]


def student_of(package, backend):
    """Return the student's loss as a function of tensors."""

    def loss(s, t=T, y=Y, **options):
        return package.bdkd_loss(s, t, y, **{**OPTIONS, **options}, backend=backend).student

    return loss


def check_step(step, **options) -> None:
    """Compare both losses that ``step(s, t, y)`` returns, and their gradients."""
    s, t = leaves()
    student, teacher = step(s, t, Y)[:2]
    (student + teacher).sum().backward()
    for got, want in zip((student, teacher), losses(**options), strict=True):
        close(got, want)
    for got, want in zip((s.grad, t.grad), gradients(**options), strict=True):
        close(got, want)


class Losses(torch.nn.Module):
    def __init__(self, package, backend: str) -> None:
        super().__init__()
        self.loss = package.BDKDLoss(backend=backend, **OPTIONS)

    def forward(self, s, t, y):
        out = self.loss(s, t, y)
        return out.student, out.teacher


# -- compilers -------------------------------------------------------------------------------------


@feature(
    "`torch.compile(fullgraph=True)`", compiles=True,
    note="Records one operator of the fused backends. Floating inputs that need no gradient, such "
    "as a frozen teacher's logits, are copied, because the compiler cannot tell whether they come "
    "from inference mode.",
)  # fmt: skip
def compiled(package, backend, folder):
    torch.compiler.reset()
    check_step(torch.compile(Losses(package, backend), fullgraph=True, backend=COMPILER))


@feature("`torch.compile(dynamic=True)`: dynamic shapes", compiles=True)
def compiled_dynamic(package, backend, folder):
    torch.compiler.reset()
    module = Losses(package, backend)
    step = torch.compile(module, fullgraph=True, dynamic=True, backend=COMPILER)
    check_step(step)
    for rows, classes in ((3, 5), (9, 4)):
        s, t = torch.randn(2, rows, classes, generator=RNG)
        y = torch.randint(classes, (rows,), generator=RNG)
        for got, want in zip(step(s, t, y), module(s, t, y), strict=True):
            close(got, want)


@feature(
    "`torch.export` with a dynamic batch",
    compiles=True,
    note="To load a program of a fused backend, import this package first.",
)
def exported(package, backend, folder):
    module, rows = Losses(package, backend), torch.export.Dim("rows")
    program = torch.export.export(module, (S, T, Y), dynamic_shapes=({0: rows},) * 3)
    torch.export.save(program, folder / "loss.pt2")
    loaded = torch.export.load(folder / "loss.pt2").module()
    for n in (2, 13):  # not only the traced batch
        s, t = torch.randn(2, n, 5, generator=RNG)
        y = torch.randint(5, (n,), generator=RNG)
        for got, want in zip(loaded(s, t, y), module(s, t, y), strict=True):
            close(got, want)


@feature("`torch.export` of `bdkd_loss_and_grad`", compiles=True,
         reference="torch.export cannot record the gradients of backend 'reference'…")  # fmt: skip
def exported_gradients(package, backend, folder):
    class Gradients(torch.nn.Module):
        def forward(self, s, t, y):
            return package.bdkd_loss_and_grad(s, t, y, **OPTIONS, backend=backend)[1]

    program = torch.export.export(Gradients(), (S, T, Y)).module()
    for got, want in zip(program(S, T, Y), gradients(), strict=True):
        close(got, want)


@feature("`make_fx`", note="Real, fake and symbolic tracing.", compiles=True)
def traced_by_make_fx(package, backend, folder):
    loss = student_of(package, backend)
    for mode in ("real", "fake", "symbolic"):
        graph = make_fx(lambda s, t, y: loss(s, t, y), tracing_mode=mode)(S, T, Y)
        close(graph(T, S, Y), loss(T, S))
        gradient = torch.func.grad(lambda s, t, y: loss(s, t, y))
        close(make_fx(gradient, tracing_mode=mode)(S, T, Y)(S, T, Y), gradients()[0])


@feature("`torch.jit.trace`", fused=REFERENCE, compiles=True)
def jit_traced(package, backend, folder):
    """A kernel would not be recorded, so the traced program would return uninitialised outputs."""
    module = Losses(package, backend)
    program = torch.jit.trace(module, (S, T, Y))
    s, t = torch.randn(2, 6, 5, generator=RNG)
    for got, want in zip(program(s, t, Y), module(s, t, Y), strict=True):
        close(got, want)
    assert "::native" not in str(program.inlined_graph)  # it loads without this package


@feature("`torch.fx.symbolic_trace`", fused="student_logits must be a tensor, got Proxy…",
         reference="student_logits must be a tensor, got Proxy…",
         note="Use `torch.export` or `make_fx`.")  # fmt: skip
def symbolically_traced(package, backend, folder):
    torch.fx.symbolic_trace(Losses(package, backend), concrete_args={"y": None})


@feature("CUDA graphs", note="On a GPU. The labels are then not checked.")
def in_a_cuda_graph(package, backend, folder):
    """A graph replays the launches of a step.

    On the CPU, check that a step gives the same bits every time. On a GPU, test_triton_gpu.py
    replays a graph.
    """
    first, again = [], []
    for found in (first, again):
        s, t = leaves()
        out = package.bdkd_loss(s, t, Y, backend=backend)
        (out.student + out.teacher).backward()
        found += [*out[:2], out.stats.table, s.grad, t.grad]
    assert all(map(torch.equal, first, again))


# -- differentiation -------------------------------------------------------------------------------


@feature("`torch.func.grad`, `vjp`, `jacrev`", fused=REFERENCE)
def func_grad(package, backend, folder):
    loss = student_of(package, backend)
    close(torch.func.grad(loss)(S), gradients()[0])
    rows = torch.func.jacrev(lambda s: loss(s, reduction="none"))(S)
    close(rows.sum(0), gradients(reduction="sum")[0])


@feature("`torch.func.vmap`, also of `grad`", fused=REFERENCE,
         note="Labels outside [0, C) give NaN instead of an error.")  # fmt: skip
def func_vmap(package, backend, folder):
    loss = student_of(package, backend)
    of_sample = torch.func.grad(lambda s, t, y: loss(s[None], t[None], y[None]))
    close(torch.func.vmap(of_sample)(S, T, Y), gradients(reduction="sum")[0])
    out = torch.func.vmap(lambda s, t, y: package.bdkd_loss(s, t, y, backend=backend))(
        torch.stack([S, T]), torch.stack([T, S]), torch.stack([Y, Y])
    )
    assert out.stats.forward_kl.shape == (2, 6)
    close(out.student[0], package.bdkd_loss(S, T, Y, backend=backend).student)


@feature("forward-mode AD, `torch.func.jvp`, `jacfwd`", fused=REFERENCE)
def forward_mode(package, backend, folder):
    loss = student_of(package, backend)
    ds, dt = gradients()
    with forward_ad.dual_level():
        duals = forward_ad.make_dual(S, V), forward_ad.make_dual(T, V)
        out = package.bdkd_loss(*duals, Y, **OPTIONS, backend=backend)
        for value, gradient in ((out.student, ds), (out.teacher, dt)):
            close(forward_ad.unpack_dual(value).tangent, (gradient * V).sum())
    close(torch.func.jvp(loss, (S,), (V,))[1], (ds * V).sum())
    close(torch.func.jacfwd(loss)(S), ds)
    # The partner's logits are constants of the student's loss, so their tangent has no effect.
    assert torch.func.jvp(lambda t: loss(S, t), (T,), (V,))[1] == 0


@feature("`torch.func.hessian`", fused=REFERENCE)
def func_hessian(package, backend, folder):
    want = torch.autograd.functional.hessian(
        lambda s: student_of(bdkd_kernels, "reference")(s, T.double()), S.double()
    )
    close(torch.func.hessian(student_of(package, backend))(S), want)


@feature("double backward (`create_graph=True`)",
         fused="the … backend has no double backward: use backend='reference' for it")  # fmt: skip
def double_backward(package, backend, folder):
    (s,) = leaves(S)
    (ds,) = torch.autograd.grad(student_of(package, backend)(s), s, create_graph=True)
    close(ds, gradients()[0])
    (second,) = torch.autograd.grad(ds.square().sum(), s)
    wide = S.double().requires_grad_()
    (ds,) = torch.autograd.grad(
        student_of(bdkd_kernels, "reference")(wide, T.double()), wide, create_graph=True
    )
    close(second, torch.autograd.grad(ds.square().sum(), wide)[0])


@feature("`is_grads_batched=True`, `jacobian(vectorize=True)`")
def batched_gradients(package, backend, folder):
    loss = student_of(package, backend)
    jacobian = torch.autograd.functional.jacobian(
        lambda s: loss(s, reduction="none"), S, vectorize=True
    )
    close(jacobian.sum(0), gradients(reduction="sum")[0])
    (s,) = leaves(S)
    batch = torch.autograd.grad(loss(s, reduction="none"), s, torch.eye(6), is_grads_batched=True)
    close(batch[0], jacobian)


@feature("`backward(retain_graph=True)`, both losses in either order")
def retained_graph(package, backend, folder):
    for order in ((0, 1), (1, 0)):
        s, t = leaves()
        out = package.bdkd_loss(s, t, Y, **OPTIONS, backend=backend)
        for network in order:
            out[network].backward(retain_graph=True)
            out[network].backward()
        for leaf, want in zip((s, t), gradients(), strict=True):
            close(leaf.grad, 2 * want)


@feature("backward passes of several threads", threads=True)
def threads(package, backend, folder):
    s, t = leaves()
    out = package.bdkd_loss(s, t, Y, **OPTIONS, backend=backend)
    gate, found = threading.Barrier(2), {}

    def work(network: int) -> None:
        gate.wait()
        (found[network],) = torch.autograd.grad(3 * out[network], (s, t)[network])

    workers = [threading.Thread(target=work, args=(network,)) for network in (0, 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)
    for network, want in enumerate(gradients()):
        close(found[network], 3 * want)


# -- modes -----------------------------------------------------------------------------------------


@feature("`torch.autocast`", note="The losses stay float32.")
def autocast(package, backend, folder):
    with torch.autocast("cpu", torch.bfloat16):
        check_step(Losses(package, backend))


@feature("`torch.no_grad`, `torch.inference_mode`")
def without_gradients(package, backend, folder):
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            out = package.bdkd_loss(*leaves(), Y, **OPTIONS, backend=backend)
            grads = package.bdkd_loss_and_grad(S, T, Y, **OPTIONS, backend=backend)[1]
        assert not out.student.requires_grad
        for got, want in zip((*out[:2], *grads), (*losses(), *gradients()), strict=True):
            close(got, want)


@feature("a teacher that ran under `torch.inference_mode`", note="No teacher gradient is computed.")
def teacher_of_inference_mode(package, backend, folder):
    with torch.inference_mode():
        teacher = T.clone()
    (s,) = leaves(S)
    (2 * student_of(package, backend)(s, teacher)).backward()
    close(s.grad, 2 * gradients()[0])


@feature("`torch.use_deterministic_algorithms`")
def deterministic(package, backend, folder):
    torch.use_deterministic_algorithms(True)
    try:
        check_step(Losses(package, backend))
    finally:
        torch.use_deterministic_algorithms(False)


@feature("`set_default_dtype`, `set_default_device`", note="They change nothing.")
def defaults(package, backend, folder):
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            (s,) = leaves(S)
            out = package.bdkd_loss(s, T, Y, **OPTIONS, backend=backend)
            out.student.backward()
    finally:
        torch.set_default_dtype(torch.float32)
    assert {x.dtype for x in (*out[:2], *out.stats)} == {torch.float32}
    close(s.grad, gradients()[0])


@feature("`saved_tensors_hooks`, `save_on_cpu`")
def saved_tensors_hooks(package, backend, folder):
    packed = []

    def pack(x):
        packed.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        s, t = leaves()
        out = package.bdkd_loss(s, t, Y, **OPTIONS, backend=backend)
    (2 * (out.student + out.teacher)).backward()
    assert packed
    for leaf, want in zip((s, t), gradients(), strict=True):
        close(leaf.grad, 2 * want)


@feature("`torch.utils.checkpoint`")
def checkpointed(package, backend, folder):
    module = Losses(package, backend)
    check_step(lambda *x: checkpoint(module, *x, use_reentrant=False))


# -- tensors ---------------------------------------------------------------------------------------


@feature("`FakeTensorMode`", note="Shapes and gradients without values.")
def fake_tensors(package, backend, folder):
    with FakeTensorMode():
        s, t = (torch.empty(6, 5, requires_grad=True) for _ in range(2))
        labels = torch.zeros(6, dtype=torch.int64)
        out = package.bdkd_loss(s, t, labels, **OPTIONS, backend=backend)
        (out.student + out.teacher).backward()
        assert s.grad.shape == t.grad.shape == (6, 5)
        assert out.stats.forward_kl.shape == (6,)


@feature("a subclass of `Tensor`")
def subclass(package, backend, folder):
    class Named(torch.Tensor):
        pass

    s, t = (x.clone().as_subclass(Named).requires_grad_() for x in (S, T))
    out = package.bdkd_loss(s, t, Y, **OPTIONS, backend=backend)
    (out.student + out.teacher).backward()
    for got, want in zip((s.grad, t.grad), gradients(), strict=True):
        close(got.as_subclass(torch.Tensor), want)


@feature("`DTensor`", fused="backend '…' takes no DTensor in student_logits…",
         note='Works with `"auto"` from torch 2.10 on; otherwise pass `.to_local()`.')  # fmt: skip
def distributed_tensors(package, backend, folder):
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    dist.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{folder}/store")
    try:
        mesh = init_device_mesh("cpu", (1,))
        for placement in (Shard(0), Replicate()):
            s, t, y = (distribute_tensor(x, mesh, [placement]) for x in (S, T, Y))
            s = s.detach().requires_grad_()
            student_of(package, "auto")(s, t, y).backward()
            close(s.grad.full_tensor(), gradients()[0])
            student_of(package, backend)(s.to_local(), T, Y)
            student_of(package, backend)(s, t, y)
    finally:
        dist.destroy_process_group()


@feature("nested tensors", fused="student_logits must be a dense tensor, got a nested tensor…",
         reference="student_logits must be a dense tensor, got a nested tensor…",
         note="Pad them, or pass `.values()` of both networks.")  # fmt: skip
def nested(package, backend, folder):
    s, t = (torch.nested.nested_tensor([x[:2], x[2:]]) for x in (S, T))
    package.bdkd_loss(s, t, None, backend=backend)


@feature("sparse tensors", fused="student_logits must be a dense tensor, got torch.sparse_coo…",
         reference="student_logits must be a dense tensor, got torch.sparse_coo…")  # fmt: skip
def sparse(package, backend, folder):
    package.bdkd_loss(S.to_sparse(), T.to_sparse(), Y, backend=backend)


@feature("the meta device", fused="backend '…' takes … tensors, got meta…",
         note='Works with `"auto"`.')  # fmt: skip
def meta(package, backend, folder):
    s, t, y = (x.to("meta") for x in (S, T, Y))
    assert package.bdkd_loss(s, t, y).student.device.type == "meta"
    assert package.bdkd_loss(s, t, y, backend=backend).stats.forward_kl.shape == (6,)


# -- modules and files -----------------------------------------------------------------------------


class Networks(torch.nn.Module):
    """Two linear networks and the losses of their logits."""

    def __init__(self, package, backend: str) -> None:
        super().__init__()
        self.student, self.teacher = torch.nn.Linear(5, 5), torch.nn.Linear(5, 5)
        self.loss = Losses(package, backend)

    def forward(self, x):
        return sum(self.loss(self.student(x), self.teacher(x), Y))


def _with_one_rank(folder, wrap, package, backend) -> None:
    dist.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{folder}/store")
    try:
        _compare_wrapped(wrap, package, backend)
    finally:
        # Free the modules before the group. Otherwise DDP's reducer would hold the GIL and wait for
        # a thread of gloo, which may need the GIL to end.
        gc.collect()
        dist.destroy_process_group()


def _compare_wrapped(wrap, package, backend) -> None:
    plain = Networks(package, backend)
    wrapped = wrap(copy.deepcopy(plain))
    for module in (plain, wrapped):
        module(S).backward()
    for one, other in zip(plain.parameters(), wrapped.parameters(), strict=True):
        gradient = other.grad
        close(gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient, one.grad)


@feature("`DistributedDataParallel`", note="Wrap both networks as one module.")
def ddp(package, backend, folder):
    _with_one_rank(folder, torch.nn.parallel.DistributedDataParallel, package, backend)


@feature("FSDP (`fully_shard`)", note="Wrap both networks as one module.")
def fsdp(package, backend, folder):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import init_device_mesh

    def shard(module):
        return fully_shard(module, mesh=init_device_mesh("cpu", (1,)))

    _with_one_rank(folder, shard, package, backend)


@feature("`pickle` and `copy.deepcopy` of `BDKDLoss`")
def copied_module(package, backend, folder):
    module = package.BDKDLoss(**OPTIONS, backend=backend)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        check_step(lambda *x, other=other: other(*x))


@feature(
    "`pickle`, `copy.deepcopy` and `torch.save` of `BDKDStats`",
    note="Save `stats._asdict()` for `torch.load(weights_only=True)`, which reads no classes.",
)
def copied_statistics(package, backend, folder):
    stats = package.bdkd_loss(S, T, Y, backend=backend).stats
    file = io.BytesIO()
    torch.save(stats, file)
    file.seek(0)
    others = copy.deepcopy(stats), pickle.loads(pickle.dumps(stats))
    for other in (*others, torch.load(file, weights_only=False)):
        assert torch.equal(other.table, stats.table)
    file = io.BytesIO()
    torch.save(stats._asdict(), file)
    file.seek(0)
    rows = torch.load(file, weights_only=True)
    assert list(rows) == list(stats._fields)
    assert torch.equal(rows["forward_kl"], stats.forward_kl)
