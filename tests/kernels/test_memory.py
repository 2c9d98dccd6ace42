"""Tensors with unusual memory: shared, freed, or without stored values.

Kernels read and write raw pointers. So for each such tensor, the result is right, or an error names
the argument.
"""

import pytest
import torch
from bdkd_kernels import bdkd_loss, bdkd_loss_and_grad, native
from bdkd_kernels.compat import DistillKL, LigerJSD

BACKENDS = ["reference", *(["native"] if native.AVAILABILITY else [])]
N, C = 4, 6
RNG = torch.Generator().manual_seed(0)
S, T = torch.randn(2, N, C, generator=RNG).unbind()
Y = torch.tensor([0, 3, 5, 2])
SOFT, WEIGHT = torch.softmax(T, -1), torch.rand(N, generator=RNG)

pytestmark = pytest.mark.parametrize("backend", BACKENDS)


def expected(target=Y, **options):
    return bdkd_loss_and_grad(S.double(), T.double(), target, backend="reference", **options)[1]


def assert_right(grads, target=Y, **options):
    for got, want in zip(grads, expected(target, **options), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


def flat(size: int) -> torch.Tensor:
    return torch.full((size,), float("nan"))


@pytest.mark.parametrize(
    "make",
    {
        "the same tensor": lambda: (x := flat(N * C).view(N, C), x),
        "a view of it": lambda: (x := flat(N * C).view(N, C), x.view(N, C)),
        "shifted": lambda: ((x := flat(2 * N * C))[: N * C], x[6 : 6 + N * C].view(N, C)),
        "one row in common": lambda: ((x := flat(2 * N * C).view(-1, C))[:N], x[N - 1 : 2 * N - 1]),
        "overlaps itself": lambda: (flat(N * C), flat(N + C).as_strided((N, C), (1, 1))),
        "expanded": lambda: (flat(N * C), flat(C).expand(N, C)),
    }.items(),
    ids=lambda item: item[0],
)
def test_gradients_that_share_memory_are_refused(make, backend):
    first, second = make[1]()
    with pytest.raises(ValueError, match=r"grads\[1\].*(overlap|each element once)"):
        bdkd_loss_and_grad(S, T, Y, grads=(first.view(N, C), second), backend=backend)


@pytest.mark.parametrize(
    "make",
    {
        "halves of rows": lambda: ((x := flat(2 * N * C).view(N, 2 * C))[:, :C], x[:, C:]),
        "rows in turn": lambda: ((x := flat(2 * N * C).view(2 * N, C))[::2], x[1::2]),
        "columns in turn": lambda: ((x := flat(2 * N * C).view(N, 2 * C))[:, ::2], x[:, 1::2]),
        "one behind the other": lambda: flat(2 * N * C).view(2, N, C).unbind(),
        "transposed": lambda: flat(2 * N * C).view(2, C, N).mT.unbind(),
    }.items(),
    ids=lambda item: item[0],
)
def test_gradients_side_by_side_in_one_tensor_are_right(make, backend):
    grads = make[1]()
    bdkd_loss_and_grad(S, T, Y, grads=grads, backend=backend)
    assert_right(grads)


def test_a_gradient_over_another_argument_is_refused(backend):
    s, t, soft = S.clone(), T.clone(), SOFT.clone()
    memory = torch.ones(N * C)
    for name, arguments in {
        "teacher_logits": {"grads": (t, None)},
        "student_logits": {"grads": (None, s)},
        "target": {"target": soft, "grads": (soft, None)},
        "sample_weight": {"sample_weight": memory[:N], "grads": (None, memory.view(N, C))},
        "grad_scale": {"grad_scale": memory[3], "grads": (memory.view(N, C), None)},
    }.items():
        call = {"student_logits": s, "teacher_logits": t, "target": Y, **arguments}
        with pytest.raises(ValueError, match=rf"grads\[[01]\] must not overlap.*{name}"):
            bdkd_loss_and_grad(**call, backend=backend)
    two = torch.cat([S.flatten(), T.flatten()])
    near = two[: N * C].view(N, C)
    for offset in (1, 3, C, N * C - 1):  # overlaps its own logits at other elements
        with pytest.raises(ValueError, match=r"grads\[0\] must not overlap.*student_logits"):
            bdkd_loss_and_grad(near, T, Y, grads=(two[offset : offset + N * C].view(N, C), None),
                               backend=backend)  # fmt: skip
    columns = near.as_strided((N, C), (1, N))  # the memory of its logits, in another order
    for other in (columns, near.as_strided((N, C), (1, C))):
        with pytest.raises(ValueError, match=r"grads\[0\] must (not overlap.*student|hold each)"):
            bdkd_loss_and_grad(near, T, Y, grads=(other, None), backend=backend)
    assert torch.equal(s, S)  # nothing was written
    assert torch.equal(soft, SOFT)


def test_autograd_notices_gradients_written_over_what_it_saved(backend):
    leaf = S.clone().requires_grad_()
    logits = leaf * 1.0
    saved = logits.exp().sum()  # its backward needs exp(logits)
    squared = logits.square().sum()  # its backward needs the logits
    bdkd_loss_and_grad(logits.detach(), T, Y, grads=(logits.detach(), None), backend=backend)
    saved.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squared.backward()
    logits = leaf * 1.0
    squared = logits.square().sum()
    with torch.inference_mode():  # this tensor has no version; the other one's must still change
        ds = torch.empty(N, C)
    bdkd_loss_and_grad(T, logits.detach(), Y, grads=(ds, logits.detach()), backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squared.backward()


def freed(x: torch.Tensor, size: int = 0) -> torch.Tensor:
    x = x.clone()
    x.untyped_storage().resize_(size)
    return x


@pytest.mark.parametrize("size", [0, 8])
def test_freed_storage_is_refused(size, backend):
    arguments = {"student_logits": S, "teacher_logits": T, "target": SOFT, "sample_weight": WEIGHT}
    for name, value in (*arguments.items(), ("target", Y), ("target", Y.int())):
        call = {**arguments, name: freed(value, size), "backend": backend}
        for function in (bdkd_loss, bdkd_loss_and_grad):
            with pytest.raises(ValueError, match=rf"{name} .*storage of {size} bytes.*freed"):
                function(**call)
    with pytest.raises(ValueError, match=r"grads\[1\].*freed"):
        bdkd_loss_and_grad(S, T, Y, grads=(None, freed(T, size)), backend=backend)
    with pytest.raises(ValueError, match=r"grad_scale.*freed"):
        bdkd_loss(S, T, Y, grad_scale=freed(torch.tensor(1.0)), backend=backend)
    with pytest.raises(ValueError, match=r"y_s.*freed"):
        DistillKL(4.0, backend=backend)(freed(S, size), T)
    with pytest.raises(ValueError, match=r"log_p.*freed"):
        LigerJSD(0.5, backend=backend)(S, freed(T, size))


@pytest.mark.parametrize("make", {
    "rows apart": lambda x: x.as_strided((N, C), (C + 2, 1), 3),
    "columns apart": lambda x: x.as_strided((N, C), (1, N), 1),
    "contiguous, further on": lambda x: x.as_strided((N, C), (C, 1), 5),
}.items(), ids=lambda item: item[0])  # fmt: skip
def test_a_storage_must_contain_the_last_element(make, backend):
    memory = torch.randn(100, generator=RNG)
    view = make[1](memory)
    want = bdkd_loss(view.clone(), T, Y, backend=backend).student
    last = view.storage_offset() + (N - 1) * view.stride(0) + (C - 1) * view.stride(1)
    memory.untyped_storage().resize_(4 * (last + 1))
    torch.testing.assert_close(bdkd_loss(view, T, Y, backend=backend).student, want)
    memory.untyped_storage().resize_(4 * last)
    with pytest.raises(ValueError, match=rf"student_logits .*storage of {4 * last} bytes"):
        bdkd_loss(view, T, Y, backend=backend)


def test_storage_freed_before_backward_is_refused(backend):
    s, t = S.clone().requires_grad_(), T.clone()
    out = bdkd_loss(s, t, Y, backend=backend)
    if backend == "reference":  # it has saved other tensors
        t.untyped_storage().resize_(0)
        (3 * out.student).backward()
        return torch.testing.assert_close(s.grad.double(), 3 * expected()[0], rtol=1e-5, atol=1e-5)
    t.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"teacher_logits.*freed"):
        (3 * out.student).backward()  # the gradient is recomputed from the logits


def negative(x: torch.Tensor) -> torch.Tensor:
    """Return a view of x whose memory contains -x: the imaginary part of a conjugate."""
    view = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert view.is_neg()
    torch.testing.assert_close(view, x)
    return view


def test_negative_bit_views_give_the_right_values(backend):
    dense = torch._neg_view(-S)  # the same values, contiguous
    alone = T.clone()  # fills its storage: such tensors take the shortest checks
    for student in (negative(S), dense):
        out, grads = bdkd_loss_and_grad(
            student, negative(T), negative(SOFT), sample_weight=negative(WEIGHT), backend=backend
        )
        assert_right(grads, SOFT, sample_weight=WEIGHT)
        out = bdkd_loss(student.requires_grad_(), alone, Y, backend=backend)
        torch.testing.assert_close(out.student.detach(), bdkd_loss(S, T, Y, backend=backend)[0])
        out.student.backward(negative(torch.tensor(2.0)))
        torch.testing.assert_close(student.grad.double(), 2 * expected()[0], rtol=1e-5, atol=1e-6)
        student.grad = None
        rows = bdkd_loss(student, T, Y, reduction="none", backend=backend).student
        above = WEIGHT - 2
        rows.backward(torch._neg_view(-above))  # dense, so a kernel could read it without a copy
        want = above[:, None] * expected(reduction="sum")[0]
        torch.testing.assert_close(student.grad.double(), want, rtol=1e-5, atol=1e-5)
        student.requires_grad_(False)
    with pytest.raises(ValueError, match=r"grads\[0\].*negative-bit"):
        bdkd_loss_and_grad(S, T, Y, grads=(negative(S), None), backend=backend)


def test_zero_tensors_without_memory_are_zeros(backend):
    zeros = torch._efficientzerotensor(N, C)
    out = bdkd_loss(zeros, T, Y, backend=backend)
    want = bdkd_loss(torch.zeros(N, C), T, Y, backend=backend)
    assert torch.equal(out.student, want.student)
    assert bdkd_loss(S, T, zeros, backend=backend).stats.student_ce.count_nonzero() == 0
    with pytest.raises(ValueError, match=r"grads\[1\].*zero tensor"):
        bdkd_loss_and_grad(S, T, Y, grads=(None, zeros), backend=backend)


def test_columns_and_offsets_of_larger_tensors_are_read_in_place(backend):
    wide = torch.full((N + 2, 2 * C + 3), float("nan"))
    s, t = wide[1 : N + 1, 1 : C + 1], wide[1 : N + 1, C + 2 : 2 * C + 2]
    s.copy_(S), t.copy_(T)
    assert_right(bdkd_loss_and_grad(s, t, Y, backend=backend)[1])
    assert_right(bdkd_loss_and_grad(s, t, Y, grads=(s, t), backend=backend)[1])
    assert wide[0].isnan().all()
    assert wide[:, [0, C + 1, 2 * C + 2]].isnan().all()
