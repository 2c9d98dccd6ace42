"""Test the native CPU kernel.

The file runs the cases and edge cases of all backends, and tests of this backend only: instruction
sets, threads, forks, rows at the end of a page.
"""

import ctypes
import mmap
import os
import sys
import threading

import pytest
import torch
from bdkd_kernels import bdkd_loss, bdkd_loss_and_grad, buffers, native
from cases import BF16, CASES, FP16, FP32, FP64, judge, short_sample
from edges import EDGES

pytestmark = pytest.mark.skipif(
    not native.AVAILABILITY, reason=f"{native.AVAILABILITY}; the reference is tested in its place"
)


def instruction_sets() -> list[str]:
    """Return the instruction sets of this machine, except the best, which all other tests use."""
    if not native.AVAILABILITY:
        return []
    names = ("portable", "avx2", "avx512", "avx512bf16")
    best = native.set_instruction_set()
    here = [name for name in names if native.set_instruction_set(name) == name]
    native.set_instruction_set(best)
    return [name for name in here if name != best]


@pytest.fixture(autouse=True)
def one_thread():
    """Use one thread: for hundreds of small cases, a second thread costs more than it saves."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def two_threads(one_thread):
    torch.set_num_threads(2)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_float64(case):
    judge(case, "native")


@pytest.mark.parametrize("edge", EDGES, ids=lambda edge: edge.__name__)
def test_edge(edge):
    edge("native")


@pytest.mark.parametrize("name", instruction_sets())
def test_every_instruction_set(name):
    best = native.set_instruction_set()
    assert native.set_instruction_set(name) == name
    try:
        for case in short_sample(0.1):
            judge(case, "native")
        for edge in EDGES:
            edge("native")
    finally:
        native.set_instruction_set(best)


def test_an_unknown_instruction_set_changes_nothing():
    assert native.set_instruction_set("z80") == native.set_instruction_set()


def everything(s, t, y, **options):
    out, (ds, dt) = bdkd_loss_and_grad(s, t, y, backend="native", temperature=4.0, **options)
    return [out.student, out.teacher, *out.stats, ds, dt]


@pytest.mark.parametrize("name", [None, *instruction_sets()])
@pytest.mark.parametrize(
    ("storage", "classes", "student_begins", "teacher_begins", "soft"),
    [
        (FP32, 21841, 0, 0, False),  # only the first row begins at a cache line
        (FP32, 21841, 3, 3, True),  # no row begins at a cache line
        (FP32, 21841, 3, 5, False),  # the gradients begin at different offsets: ordinary stores
        (FP32, 1000, 1, 1, False),  # rows whose exponentials are saved
        (FP32, 16384, 0, 0, False),  # every row begins at a cache line
        (BF16, 21841, 7, 7, False),
        (FP64, 10007, 1, 1, False),
    ],
)
def test_nontemporal_gradients_equal_those_of_few_rows(
    storage, classes, student_begins, teacher_begins, soft, name
):
    """Gradients of at least 16 MiB have the same bits as those of few rows, at any alignment.

    No memory before or after the gradients is written.
    """
    rows = (16 << 20) // (2 * classes * storage.itemsize) + 1
    s, t = (3 * torch.randn(2, rows, classes)).to(storage)
    target = torch.rand(rows, classes) if soft else torch.randint(classes, (rows,))
    buffers = [torch.full((rows * classes + 64,), 7.0, dtype=storage) for _ in range(2)]
    grads = tuple(
        buffer[begin : begin + rows * classes].view(rows, classes)
        for buffer, begin in zip(buffers, (student_begins, teacher_begins), strict=True)
    )
    options = {"temperature": 4.0, "reduction": "sum", "backend": "native"}
    best = native.set_instruction_set()
    native.set_instruction_set(name or best)
    try:
        bdkd_loss_and_grad(s, t, target, grads=grads, **options)
        few = [
            bdkd_loss_and_grad(*(x[i : i + 9] for x in (s, t, target)), **options)[1]
            for i in range(0, rows, 9)
        ]
        bdkd_loss_and_grad(s, t, target, grads=(s, t), **options)
    finally:
        native.set_instruction_set(best)
    for k, (buffer, begin) in enumerate(
        zip(buffers, (student_begins, teacher_begins), strict=True)
    ):
        expected = torch.cat([gradients[k] for gradients in few])
        assert torch.equal(grads[k], expected)
        assert torch.equal((s, t)[k], expected)  # written over the logits
        assert (buffer[:begin] == 7).all()
        assert (buffer[begin + rows * classes :] == 7).all()


@pytest.mark.parametrize("name", [None, *instruction_sets()])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0, 4.0, 8.0])  # 3: another exponential
@pytest.mark.parametrize(
    ("storage", "classes"),
    [
        (FP32, 999),  # rows begin anywhere in a cache line
        (FP32, 2560),  # several blocks of sums
        (FP32, 5000),  # exponentials are recomputed, in parts of the row
        (BF16, 3001),
        (FP16, 4999),
    ],
)
def test_no_row_depends_on_its_neighbours(storage, classes, temperature, name, two_threads):
    """Loops for large batches work on several rows at once, and give the same bits as for few rows.

    The batch includes ignored and masked rows.
    """
    rows = (4 << 20) // (2 * classes * storage.itemsize) + 7  # nontemporal; a partial last group
    rng = torch.Generator().manual_seed(11)
    s, t = (3 * torch.randn(2, rows, classes, generator=rng)).to(storage)
    y = torch.randint(classes, (rows,), generator=rng)
    y[torch.rand(rows, generator=rng) < 0.2] = -100
    masked = torch.rand(rows, generator=rng) < 0.2
    s[masked, classes // 3 : classes // 2] = t[masked, classes // 3 : classes // 2] = -torch.inf
    y[masked & (y >= 0)] = 1
    options = {"temperature": temperature, "reduction": "none", "backend": "native"}
    best = native.set_instruction_set()
    native.set_instruction_set(name or best)
    try:
        out, grads = bdkd_loss_and_grad(s, t, y, **options)
        few = [
            bdkd_loss_and_grad(*(x[i : i + 3] for x in (s, t, y)), **options)
            for i in range(0, rows, 3)
        ]
    finally:
        native.set_instruction_set(best)
    for k in range(2):
        assert torch.equal(grads[k], torch.cat([gradients[k] for _, gradients in few]))
        assert torch.equal(out[k], torch.cat([each[k] for each, _ in few]))
    for statistic, parts in zip(
        out.stats, zip(*(each.stats for each, _ in few), strict=True), strict=True
    ):
        assert torch.equal(statistic, torch.cat(parts))
    assert masked.any()
    assert all(torch.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("storage", [FP32, BF16])
def test_the_number_of_threads_changes_no_bit(storage, two_threads):
    rng = torch.Generator().manual_seed(5)
    # Many short rows; rows of several blocks; fewer rows than threads.
    for n, c in ((4001, 10), (300, 1003), (37, 5000), (1, 40000)):
        s, t = torch.randn(2, n, c, generator=rng).to(storage)
        y = torch.randint(c, (n,), generator=rng)
        weight = torch.rand(n, generator=rng)
        results = []
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            results.append(everything(s, t, y, sample_weight=weight))
        for other in results[1:]:
            for a, b in zip(results[0], other, strict=True):
                assert torch.equal(a, b), (n, c)


def test_several_python_threads_at_once(two_threads):
    rng = torch.Generator().manual_seed(6)
    inputs = [
        (*torch.randn(2, 400, 101 + k, generator=rng), torch.randint(101, (400,), generator=rng))
        for k in range(6)
    ]
    want = [everything(*x) for x in inputs]
    wrong = []

    def work(k: int) -> None:
        for _ in range(10):
            got = everything(*inputs[k])
            if not all(map(torch.equal, got, want[k])):
                wrong.append(k)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads)
    assert not wrong


@pytest.mark.skipif(
    not hasattr(os, "fork"), reason="no fork on this platform, so no forked child to compute in"
)
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_the_kernel_runs_in_a_forked_child(two_threads):
    """A DataLoader worker, for example, is a child of a process that has already used threads."""
    rng = torch.Generator().manual_seed(7)
    s, t = torch.randn(2, 600, 200, generator=rng)
    y = torch.randint(200, (600,), generator=rng)
    want = everything(s, t, y)
    child = os.fork()
    if child == 0:
        status = 4  # for an error: the child must exit, and not continue as a second pytest
        try:
            got = everything(s, t, y)
            pairs = zip(got, want, strict=True)
            status = 0 if all(x.numpy().tobytes() == w.numpy().tobytes() for x, w in pairs) else 3
        finally:
            os._exit(status)
    deadline = threading.Timer(30, os.kill, (child, 9))
    deadline.start()
    _, status = os.waitpid(child, 0)
    deadline.cancel()
    assert os.waitstatus_to_exitcode(status) == 0
    assert all(map(torch.equal, everything(s, t, y), want))  # the parent's threads still work


class PageEnd:
    """Memory between two pages that cannot be read or written."""

    def __init__(self, size: int) -> None:
        page = mmap.PAGESIZE
        self.whole = (size + page - 1) // page * page
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        private_anonymous = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        start = libc.mmap(None, self.whole + 2 * page, 3, private_anonymous, -1, 0)
        assert libc.mprotect(start, page, 0) == 0
        assert libc.mprotect(start + page + self.whole, page, 0) == 0
        self.first, self.end = start + page, start + page + self.whole

    def tensor(self, shape, dtype, at_end: bool) -> torch.Tensor:
        count = torch.Size(shape).numel()
        size = count * dtype.itemsize
        address = self.end - size if at_end else self.first
        memory = (ctypes.c_char * size).from_address(address)
        return torch.frombuffer(memory, dtype=dtype, count=count).view(shape)


@pytest.mark.skipif(
    sys.platform == "win32",
    reason="Windows has no mprotect; kernels/csrc/sanitize.py covers the same accesses",
)
@pytest.mark.parametrize("storage", [FP64, FP32, FP16, BF16])
def test_rows_at_the_end_of_a_page(storage):
    """Nothing before or after a row is read or written: that would end the process."""
    rng = torch.Generator().manual_seed(8)
    for n, c in ((1, 1), (3, 2), (2, 15), (2, 16), (1, 17), (3, 67), (1, 1000), (1, 33000)):
        y = torch.randint(c, (n,), generator=rng)
        soft = torch.softmax(torch.randn(n, c, generator=rng), -1).to(storage)
        values = torch.randn(2, n, c, generator=rng).to(storage)
        size = n * c * storage.itemsize
        for at_end in (True, False):
            s, t, ds, dt, q = (PageEnd(size).tensor((n, c), storage, at_end) for _ in range(5))
            s.copy_(values[0]), t.copy_(values[1]), q.copy_(soft)
            for target in (y, q):
                want = everything(*values, y if target is y else soft)
                for got, right in zip(everything(s, t, target, grads=(ds, dt)), want, strict=True):
                    assert torch.equal(got, right)


def test_large_nontemporal_gradients_equal_those_of_halves():
    rng = torch.Generator().manual_seed(9)
    s, t = torch.randn(2, 40, 65536, generator=rng)  # 2 x 10 MB: nontemporal stores
    y = torch.randint(65536, (40,), generator=rng)
    whole = everything(s, t, y, reduction="sum")
    halves = [everything(s[k], t[k], y[k], reduction="sum") for k in (slice(20), slice(20, 40))]
    for network in (-2, -1):
        assert torch.equal(whole[network], torch.cat([half[network] for half in halves]))


def test_auto_selects_the_native_kernel():
    """The test recognises the native kernel by its error for a double backward."""
    s, t = torch.randn(2, 3, 4)
    s.requires_grad_()
    (ds,) = torch.autograd.grad(bdkd_loss(s, t, None).student, s, create_graph=True)
    with pytest.raises(RuntimeError, match="the native backend has no double backward"):
        ds.sum().backward()


def test_no_gradient_buffers_without_gradients(monkeypatch):
    """No N x C tensor is allocated under no_grad, or for a teacher that needs no gradient."""
    made = []

    def watch(factory):
        def watched(*args, **kwargs):
            made.append(factory(*args, **kwargs))
            return made[-1]

        return watched

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, watch(getattr(torch, name)))
    s, t = torch.randn(2, 64, 100).unbind()
    y = torch.zeros(64, dtype=torch.int64)
    bdkd_loss(s, t, y, backend="native")
    with torch.no_grad():
        bdkd_loss(s.requires_grad_(), t, y, backend="native")
    assert sum(x.numel() for x in made) < 64 * 100
    made.clear()
    bdkd_loss(s, t, y, backend="native")
    assert sum(x.shape == s.shape for x in made) == 1


def test_backward_reuses_gradient_memory():
    """Autograd does not copy the gradients, and buffers.py reuses their memory in the next step."""
    s, t = (x.requires_grad_() for x in torch.randn(2, 300, 1000))
    y = torch.zeros(300, dtype=torch.int64)
    buffers.release()
    addresses = set()
    for _ in range(3):
        s.grad = t.grad = None
        out = bdkd_loss(s, t, y, backend="native")
        (out.student + out.teacher).backward()
        addresses |= {s.grad.data_ptr(), t.grad.data_ptr()}
    assert len(addresses) == 2
    assert torch.equal(s.grad, bdkd_loss_and_grad(s, t, y, backend="native")[1][0])


def test_outputs_follow_the_logits_not_the_default_device():
    s, t = torch.randn(2, 3, 4, requires_grad=True).unbind()
    expected = bdkd_loss(s, t, None, backend="native")
    with torch.device("meta"):
        out = bdkd_loss(s, t, None, backend="native")
        (out.student + out.teacher).backward()
    assert torch.equal(out.student, expected.student)
    assert out.stats.forward_kl.device.type == "cpu"


def against_float64(s, t, y, temperature):
    """Compare losses, statistics and gradients with those of the reference in float64."""
    # gamma 1: with nearly equal entropies, either network may get the larger weight.
    options = {"temperature": temperature, "reduction": "none", "gamma": 1.0}
    right, right_gradients = bdkd_loss_and_grad(
        s.double(), t.double(), y, backend="reference", **options
    )
    got, gradients = bdkd_loss_and_grad(s, t, y, backend="native", **options)
    absolute = 1e-6 * max(1.0, 2 * temperature**2)
    for name in ("student", "teacher"):
        a, b = getattr(got, name).double(), getattr(right, name)
        torch.testing.assert_close(a, b, rtol=2e-6, atol=absolute)
    for a, b in zip(got.stats, right.stats, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-6, atol=1e-6)
    assert min(got.stats.forward_kl.min(), got.stats.reverse_kl.min()) >= -1e-6
    for a, b in zip(gradients, right_gradients, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=5e-6 * max(1.0, 3 * temperature))


@pytest.mark.parametrize("name", [None, *instruction_sets()])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0, 4.0, 8.0])
def test_masks_and_rising_maxima_in_parts_of_a_row(temperature, name):
    """Long rows are computed in chunks of classes.

    The maxima of the chunks rise, fall, or one chunk has the maximum. Classes are masked by -inf or
    by the lowest float, alone or in whole chunks. Some distributions are nearly equal.
    """
    rng = torch.Generator().manual_seed(11)
    best = native.set_instruction_set()
    native.set_instruction_set(name or best)
    try:
        for classes in (10, 1003, 4099, 10_007):
            s, t = 3 * torch.randn(2, 8, classes, generator=rng)
            slope = torch.linspace(0, 12, classes)
            s[0], t[0] = s[0] + slope, t[0] - slope
            s[1], t[1] = s[1] - slope, t[1] + slope
            t[2] = s[2] + 1e-4 * torch.randn(classes, generator=rng) + slope
            s[2] += slope
            s[3, 0] = t[3, 1] = 40.0
            y = torch.full((8,), classes - 1)
            for row, mask in ((4, -torch.inf), (5, torch.finfo(FP32).min)):
                s[row, : classes // 2] = t[row, : classes // 2] = mask
                s[row + 2, 1::3] = t[row + 2, 1::3] = mask
                y[row + 2] = 0
            against_float64(s, t, y, temperature)
    finally:
        native.set_instruction_set(best)
