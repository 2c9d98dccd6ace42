"""Test the Triton kernels on a GPU: the cases of the interpreted grid, and tests that need a GPU.

``bench/gpu.sh FOLDER --stages 2`` runs this file and the benchmark.
"""

import functools
import os
import shutil
import subprocess
import sys
from unittest import mock

import pytest
import torch
from bdkd_kernels import bdkd_loss, bdkd_loss_and_grad
from cases import CASES, judge
from edges import EDGES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1",
        reason="no GPU; without one, test_triton.py runs triton_grid.py in the interpreter, and "
        "test_triton_aot.py compiles the kernels",
    ),
]
BF16 = torch.bfloat16


@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_float64(case):
    judge(case, "triton", "cuda")


@pytest.mark.parametrize("edge", EDGES, ids=lambda edge: edge.__name__)
def test_edge(edge):
    edge("triton", device="cuda")


def draw(rows: int, classes: int, dtype=BF16):
    s, t = (torch.randn(rows, classes, device="cuda").mul_(2).to(dtype) for _ in range(2))
    return s, t, torch.randint(classes, (rows,), device="cuda")


@pytest.mark.parametrize("classes", [10, 1000, 4096, 21841, 50000])
def test_every_element_is_written(classes):
    """Test without a GPU: the test of the same name in triton_grid.py."""
    s, t, y = draw(257, classes)
    y[3] = -100
    real = torch.empty

    def poisoned(*shape, **kwargs):
        x = real(*shape, **kwargs)
        return x.fill_(float("nan")) if x.is_floating_point() else x

    nan = functools.partial(torch.full_like, fill_value=float("nan"))
    with mock.patch("torch.empty", poisoned):
        out, (ds, dt) = bdkd_loss_and_grad(s, t, y, backend="triton", grads=(nan(s), nan(t)))
    for x in (out.student, out.teacher, ds, dt, *out.stats):
        assert not x.isnan().any()


@pytest.mark.parametrize("classes", [100, 1000, 40000])
def test_streams_do_not_race(classes):
    """Test without a GPU: every_run_gives_the_same_bits in triton_grid.py, with one stream."""
    inputs = [draw(300, classes) for _ in range(4)]
    call = functools.partial(bdkd_loss_and_grad, temperature=4.0, backend="triton")
    want = [call(*x) for x in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in inputs]
    for _ in range(20):
        got = []
        for stream, x in zip(streams, inputs, strict=True):
            with torch.cuda.stream(stream):
                got.append(call(*x))
        torch.cuda.synchronize()
        for (out, gradients), (want_out, want_gradients) in zip(got, want, strict=True):
            assert torch.equal(out.student, want_out.student)
            assert all(map(torch.equal, out.stats, want_out.stats))
            assert all(map(torch.equal, gradients, want_gradients))


@pytest.mark.parametrize("classes", [10, 1000, 40000])
def test_calls_without_a_pause_between_them(classes):
    """Launches begin early, in memory that the previous call has just freed.

    Test without a GPU: triton_launches.py checks which launches wait for others.
    """
    inputs = [draw(rows, classes) for rows in (1, 33, 257, 3000, 5, 1024)]
    call = functools.partial(bdkd_loss_and_grad, temperature=4.0, backend="triton")
    want = []
    for s, t, y in inputs:
        y[::3] = -100
        want.append(call(s, t, y))
        torch.cuda.synchronize()
    kept = []
    for _ in range(50):
        for x in inputs:
            out, gradients = call(*x)
            kept.append((out.student, out.teacher, *(g[-1].clone() for g in gradients)))
    torch.cuda.synchronize()
    for i, got in enumerate(kept):
        out, gradients = want[i % len(inputs)]
        assert all(map(torch.equal, got, (out.student, out.teacher, *(g[-1] for g in gradients))))


@pytest.mark.parametrize("classes", [1000, 40000])
def test_cuda_graph_replay(classes):
    """Test without a GPU: test_compiles_without_a_graph_break in triton_grid.py.

    It shows that the host reads no values.
    """
    s, t, y = draw(128, classes)
    s.requires_grad_()
    t.requires_grad_()

    def step():
        s.grad = t.grad = None
        out = bdkd_loss(s, t, y, temperature=4.0, backend="triton")
        torch.autograd.backward((out.student, out.teacher))
        return out

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    captured_ds = s.grad
    for _ in range(3):
        fresh_s, fresh_t, fresh_y = draw(128, classes)
        with torch.no_grad():
            for into, x in ((s, fresh_s), (t, fresh_t), (y, fresh_y)):
                into.copy_(x)
        graph.replay()
        out, (ds, _) = bdkd_loss_and_grad(fresh_s, fresh_t, fresh_y, temperature=4.0,
                                          backend="triton")  # fmt: skip
        assert torch.equal(captured.student, out.student)
        assert torch.equal(captured_ds, ds)


def test_nothing_syncs_with_the_host():
    """Test without a GPU: test_compiles_without_a_graph_break in triton_grid.py."""
    s, t, y = draw(64, 1000)
    s.requires_grad_()
    t.requires_grad_()
    scale = torch.tensor(1024.0, device="cuda")

    def step():
        out = bdkd_loss(s, t, y, grad_scale=scale, backend="triton")
        torch.autograd.backward((out.student * scale, out.teacher))

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("rows", "classes"), [(2_200_000, 1000), (17_000, 128_256)])
def test_more_than_2_to_the_31_elements(rows, classes):
    """Compare the last rows, after 2^31 elements, with a call of these rows alone.

    There is no such test without a GPU, because it needs too much memory.
    """
    if torch.cuda.mem_get_info()[0] < 5 * rows * classes * 2:
        pytest.skip("not enough GPU memory; triton_grid.py interprets smaller batches")
    s = torch.empty(rows, classes, dtype=BF16, device="cuda").normal_()
    t = torch.empty_like(s).normal_()
    y = torch.randint(classes, (rows,), device="cuda")
    options = {"temperature": 4.0, "reduction": "none", "backend": "triton"}
    tail = slice(rows - 3, rows)
    want = bdkd_loss_and_grad(s[tail].clone(), t[tail].clone(), y[tail].clone(), **options)
    out, (ds, dt) = bdkd_loss_and_grad(s, t, y, **options, grads=(s, t))
    assert torch.equal(out.student[tail], want[0].student)
    assert torch.equal(ds[tail], want[1][0])
    assert torch.equal(dt[tail], want[1][1])


def test_inductor_compiles_it():
    """Test without a GPU: test_compiles_without_a_graph_break in triton_grid.py."""
    s, t, y = draw(96, 1000, torch.float32)
    s.requires_grad_()
    t.requires_grad_()

    def step(s, t, y):
        out = bdkd_loss(s, t, y, temperature=4.0, backend="triton")
        return out.student + out.teacher

    want = torch.autograd.grad(step(s, t, y), (s, t))
    loss = torch.compile(step, fullgraph=True)(s, t, y)
    for got, expected in zip(torch.autograd.grad(loss, (s, t)), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.skipif(
    shutil.which("compute-sanitizer") is None,
    reason="no compute-sanitizer; triton_grid.py checks for writes outside of the gradients "
    "(gradients_are_written_into_given_tensors)",
)
def test_memcheck_finds_nothing():
    code = (
        "import torch\n"
        "from bdkd_kernels import bdkd_loss_and_grad\n"
        "for c in (7, 1000, 4099):\n"
        "    s, t = torch.randn(2, 9, c, device='cuda').to(torch.bfloat16).unbind()\n"
        "    y = torch.randint(c, (9,), device='cuda')\n"
        "    s[2, 1] = t[2, 1] = -float('inf')\n"
        "    bdkd_loss_and_grad(s, t, y, temperature=4.0, backend='triton')\n"
        "torch.cuda.synchronize()\n"
    )
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = ["compute-sanitizer", "--error-exitcode", "9", sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
