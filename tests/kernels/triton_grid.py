"""Test the device code of the Triton kernels in the interpreter, on CPU tensors.

TRITON_INTERPRET=1 must be set before triton is imported, and kernels cannot be compiled then. So
``test_triton.py`` runs this file in a separate process.

Short rows run as on a GPU. Tests of long rows use launches with small blocks, so that shorter rows
still cross all boundaries between blocks.
"""

import contextlib
import functools
import math
import os
from unittest import mock

import pytest
import torch
from bdkd_kernels import available_backends, bdkd_loss, bdkd_loss_and_grad
from bdkd_kernels.options import LossOptions
from bdkd_kernels.triton import arguments, launch_table
from bdkd_kernels.triton import backend as triton_backend
from bdkd_kernels.types import LossInputs, Pair
from cases import BF16, FP32, FP64, Case, judge, sample, short_sample
from edges import EDGES
from triton import language
from triton.runtime.interpreter import InterpretedFunction

# A row with masked classes is first computed as if it had none, with -inf - -inf: see row_math.py.
pytestmark = pytest.mark.filterwarnings("ignore:.*:RuntimeWarning")

# make soak runs seven times as many calls.
SCALE = 0.2 if os.environ.get("BDKD_SOAK") else 0.03
SHORT = short_sample(SCALE)
# Calls for the loop kernel, with rows that fill a few small blocks. (The loop kernel never computes
# rows of one class.)
LOOPED = [
    case
    for case in sample(0.6 * SCALE, "loop")
    if math.prod(case.shape) <= 4000 and case.shape[-1] > 1 and math.prod(case.shape[:-1]) <= 33
]


class Unordered(arguments.Platform):
    """A platform like AMD, where a barrier does not order the stores of a program."""

    ordered_stores = False


@functools.cache
def languages_of(function: InterpretedFunction) -> list:
    """Return the modules of Triton's language that are globals of a function."""
    known = (language, language.core)
    return [module for module in known if module in function.fn.__globals__.values()]


@pytest.fixture(autouse=True, scope="module")
def language_is_replaced_once():
    """Replace Triton's language by NumPy once per kernel, which is more than twice as fast.

    Triton replaces it before it runs a kernel, and again for every function that the kernel calls.
    """
    replace_and_call = InterpretedFunction.__call__

    def call(function, *args, **kwargs):
        if any(language.core.is_builtin(module.load) for module in languages_of(function)):
            return replace_and_call(function, *args, **kwargs)
        return function.rewrite()(*args, **kwargs)

    with mock.patch.object(InterpretedFunction, "__call__", call):
        yield


def test_the_interpreter_is_on():
    assert available_backends()["triton"]
    assert "interpreted" in str(available_backends()["triton"])


@pytest.mark.parametrize("case", SHORT, ids=str)
def test_agrees_with_float64(case):
    judge(case, "triton")


@pytest.mark.parametrize("edge", EDGES, ids=lambda edge: edge.__name__)
def test_edge(edge):
    edge("triton")


@contextlib.contextmanager
def small_blocks(inner: int = 4, prefetch: int = 1):
    """Launch the loop kernel with small blocks for every row.

    A block has 16 lanes of 4 classes, of which ``inner`` are neighbours. If all rows have the same
    offset from an aligned address, it has 16 lanes of 16 bytes.
    """

    def choose(classes: int, itemsize: int, vector: int, shifted: bool = False):
        if shifted and vector * itemsize < 16:
            neighbours = 16 // itemsize
            return launch_table.Loop(1, neighbours, prefetch=prefetch, shifted=True, lanes=16)
        return launch_table.Loop(1, inner, outer=4 // inner, prefetch=prefetch, lanes=16)

    with (
        mock.patch.object(launch_table, "choose", choose),
        mock.patch.dict(triton_backend._plans, clear=True),
    ):
        yield


@pytest.mark.parametrize("loop", [False, True], ids=["tile", "loop"])
@pytest.mark.parametrize("weighted", [False, True], ids=["labels", "weights"])
def test_the_denominator_of_many_rows_is_added_up_in_parts(loop, weighted, monkeypatch):
    """Batches of more than 16,384 rows have several partial sums.

    Here each one has 4 rows, so there are 3 partial sums, rounded up to 4.
    """
    monkeypatch.setattr(triton_backend, "_ROWS_A_PARTIAL", 4)
    monkeypatch.setattr(triton_backend, "_plans", {})
    case = Case("parts", (9, 20), sample_weight=weighted, ignored=True)
    with small_blocks() if loop else contextlib.nullcontext():
        judge(case, "triton")


@pytest.mark.parametrize("case", LOOPED, ids=str)
def test_loop_agrees_with_float64(case):
    with small_blocks(inner=(1, 2, 4)[len(case.name) % 3], prefetch=len(case.name) % 4):
        judge(case, "triton")


@pytest.mark.parametrize(
    "edge",
    [e for e in EDGES if e.__name__ in (
        "a_class_masked_in_one_network_only", "a_target_in_a_masked_class_is_infinite",
        "infinite_and_fully_masked_rows_are_nan", "an_ignored_row_with_nan_or_inf_is_zero",
        "a_label_out_of_range_raises_with_its_row", "gradients_are_written_into_given_tensors",
    )],
    ids=lambda edge: edge.__name__,
)  # fmt: skip
def test_loop_edge(edge):
    with small_blocks():
        edge("triton")


@pytest.mark.parametrize("classes", [5, 67, 131])  # only edges; a block and edges; two blocks
@pytest.mark.parametrize("storage", [FP32, BF16])
@pytest.mark.parametrize("prefetch", [0, 2])
def test_rows_that_are_not_aligned(classes, storage, prefetch):
    """Seven rows, each with another offset from a 16-byte aligned address."""
    options = {"temperature": 4.0, "label_smoothing": 0.1 * (classes == 67)}
    with small_blocks(prefetch=prefetch):
        judge(Case(f"not aligned {classes} {storage}", (7, classes), "finite", (storage, storage),
                   ignored=True, options=options), "triton")  # fmt: skip


@pytest.mark.parametrize("looped", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_label_where_stores_are_not_ordered(smoothing, looped):
    """On AMD, every class is compared with the label instead of storing the label's class again."""
    with (
        mock.patch.object(arguments, "PLATFORM", Unordered(interpreted=True, amd=False)),
        mock.patch.dict(triton_backend._plans, clear=True),
        small_blocks() if looped else contextlib.nullcontext(),
    ):
        for storage in (FP32, FP64):
            options = {"temperature": 4.0, "label_smoothing": smoothing, "ignore_index": 3}
            name = f"unordered {smoothing} {storage}"
            judge(Case(name, (8, 100), "finite", (storage, storage), ignored=True, options=options),
                  "triton")  # fmt: skip


@pytest.mark.parametrize("rows", [5, 133])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_many_programs(rows, reduction):
    """The batch needs several programs, the last one is partial, and some rows are ignored."""
    judge(
        Case(f"programs {rows} {reduction}", (rows, 3), ignored=True, sample_weight=True,
             options={"reduction": reduction, "temperature": 4.0}),
        "triton",
    )  # fmt: skip


@pytest.mark.parametrize("classes", [40, 300, 700])
@pytest.mark.parametrize("looped", [False, True])
def test_tied_maxima_belong_to_the_first_class(classes, looped):
    last = classes - 1
    logits = torch.zeros(7, classes)
    logits[1::2, 1] = 1.0  # the maxima of these rows are lower than those of their neighbours
    logits[[0, 2], 3] = logits[[0, 2], last] = 2.0
    logits[4, last] = 20.0
    logits[6, classes // 2] = 2.0
    labels = torch.tensor([3, 1, last, 1, last, 1, classes // 2])
    for student, teacher in ((logits, logits.flip(0)), (logits.flip(0), logits)):
        with small_blocks() if looped else contextlib.nullcontext():
            stats = bdkd_loss(student, teacher, labels, backend="triton").stats
        for network, right in ((student, stats.student_correct), (teacher, stats.teacher_correct)):
            assert torch.equal(right.bool(), network.argmax(1) == labels)


@pytest.mark.parametrize("classes", [10, 1000])
def test_opcheck(classes):
    rng = torch.Generator().manual_seed(classes)
    s, t = torch.randn(2, 5, classes, generator=rng).unbind()
    s, t = s.clone().requires_grad_(), t.clone().requires_grad_()
    y = torch.randint(classes, (5,), generator=rng)
    options = LossOptions(temperature=4.0)
    flat = tuple(getattr(options, name) for name in options.__dataclass_fields__)
    forward = torch.ops.bdkd.triton_forward.default
    torch.library.opcheck(forward, (s, t, y, None, None, 1.0, False, False, *flat))
    torch.library.opcheck(forward, (s.detach(), t.detach(), y, None, None, 2.0, True, True, *flat))
    state = forward(s.detach(), t.detach(), y, None, None, 1.0, False, False, *flat)[3]
    one = torch.ones(())
    arguments = (one, 3 * one, s.detach(), t.detach(), y, None, state, *flat)
    torch.library.opcheck(torch.ops.bdkd.triton_backward.default, arguments)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(dynamic):
    def step(s, t, y):
        out = bdkd_loss(s, t, y, temperature=4.0, backend="triton")
        return out.student + 2 * out.teacher

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (3, 7):
        s, t = (torch.randn(rows, 30, requires_grad=True) for _ in range(2))
        y = torch.randint(30, (rows,))
        a, b = (x.detach().clone().requires_grad_() for x in (s, t))
        step(a, b, y).backward()
        loss = compiled(s, t, y)
        loss.backward()
        torch.testing.assert_close(loss, step(a, b, y), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(s.grad, a.grad, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(t.grad, b.grad, rtol=1e-5, atol=1e-7)


def test_backward_with_the_assumed_scale_keeps_the_gradients(monkeypatch):
    """With the assumed upstream gradient, the backward pass keeps the gradients unchanged.

    It does not read the logits and the state, which are NaN here.
    """
    s, t = torch.randn(2, 6, 20).unbind()
    y = torch.arange(6)
    inputs = LossInputs(s.clone(), t.clone(), y, None, LossOptions())
    ds, dt = torch.empty_like(s), torch.empty_like(t)
    gradients = Pair(ds, dt)
    state = triton_backend._forward(inputs, 8.0, gradients, False).state
    kept = ds.clone(), dt.clone()
    inputs.student.fill_(float("nan"))
    state.fill_(float("nan"))
    eight = torch.tensor(8.0)
    for assumed in (8.0, eight):
        triton_backend._backward(inputs, state, Pair(eight, eight), gradients, assumed)
        assert torch.equal(ds, kept[0])
        assert torch.equal(dt, kept[1])
    triton_backend._backward(inputs, state, Pair(eight + 1, None), Pair(ds, None), 8.0)
    assert ds.isnan().all()  # another upstream gradient: recomputed
    assert torch.equal(dt, kept[1])


def test_every_element_is_written():
    """Outputs are filled with NaN before the call, and none is left. (GPU: test_triton_gpu.py.)"""
    for n, c, storage in ((5, 10, FP32), (7, 1000, torch.bfloat16), (3, 300, torch.float16)):
        s, t = (torch.randn(n, c).to(storage) for _ in range(2))
        y = torch.randint(c, (n,))
        y[0] = -100
        nan = functools.partial(torch.full_like, fill_value=float("nan"))
        real = torch.empty

        def poisoned(*shape, real=real, **kwargs):
            x = real(*shape, **kwargs)
            return x.fill_(float("nan")) if x.is_floating_point() else x

        with mock.patch("torch.empty", poisoned):
            out, (ds, dt) = bdkd_loss_and_grad(s, t, y, backend="triton", grads=(nan(s), nan(t)))
        for x in (out.student, out.teacher, ds, dt, *out.stats):
            assert not x.isnan().any()
