"""Gradient memory is reused only if it has no other owner, within a limit, never by two tensors."""

import gc
import os
import subprocess
import sys
import threading

import pytest
import torch
from bdkd_kernels import bdkd_loss, bdkd_loss_and_grad, buffers

ROWS, CLASSES = 300, 1000  # 1.2 MB: just large enough to be kept


@pytest.fixture(autouse=True)
def nothing_kept():
    buffers.release()
    yield
    buffers.release()


def leaves(rows=ROWS, seed=0):
    rng = torch.Generator().manual_seed(seed)
    s, t = torch.randn(2, rows, CLASSES, generator=rng)
    y = torch.randint(CLASSES, (rows,), generator=rng)
    return s.requires_grad_(), t.requires_grad_(), y


def test_the_next_call_reuses_gradient_memory():
    s, t, y = leaves()
    _, (ds, dt) = bdkd_loss_and_grad(s, t, y)
    first, addresses = (ds.clone(), dt.clone()), {ds.data_ptr(), dt.data_ptr()}
    for _ in range(3):
        del ds, dt
        _, (ds, dt) = bdkd_loss_and_grad(s, t, y)
        assert {ds.data_ptr(), dt.data_ptr()} == addresses
    assert torch.equal(ds, first[0])
    assert torch.equal(dt, first[1])


def test_without_an_owner_count_no_memory_is_kept(monkeypatch):
    monkeypatch.setattr(buffers, "owners", None)
    s, t, y = leaves()
    _, (ds, _) = bdkd_loss_and_grad(s, t, y)
    assert ds.isfinite().all()
    assert not buffers._kept


def values(held) -> torch.Tensor:
    """Return a copy of the values of a tensor, an array or a storage."""
    if isinstance(held, torch.UntypedStorage):
        return torch.empty(0).set_(held).clone()
    return torch.as_tensor(held).clone()


@pytest.mark.parametrize("keep", [lambda g: g, lambda g: g[3:, 2], lambda g: g.numpy(),
                                  lambda g: g.detach(), lambda g: g.untyped_storage()])  # fmt: skip
def test_memory_with_other_references_is_not_reused(keep):
    s, t, y = leaves()
    _, (ds, dt) = bdkd_loss_and_grad(s, t, y)
    expected, held, address = ds.clone(), keep(ds), ds.data_ptr()
    inside = values(held)
    del ds, dt
    gc.collect()
    taken = [bdkd_loss_and_grad(s, t, y)[1] for _ in range(4)]
    assert all(x.data_ptr() != address for pair in taken for x in pair)
    assert torch.equal(values(held), inside)
    del held, expected
    gc.collect()
    assert address in {buffers.empty_like(s.detach()).data_ptr() for _ in range(1)}


def test_live_tensors_never_share_memory():
    like = torch.empty(ROWS, CLASSES)
    for _ in range(3):
        live = [buffers.empty_like(like) for _ in range(2 * buffers.COUNT)]
        assert len({x.data_ptr() for x in live}) == len(live)
        assert len(buffers._kept) <= buffers.COUNT


def test_threads_never_share_memory():
    like = torch.empty(ROWS, CLASSES)
    wrong = []

    def work(number: float) -> None:
        for _ in range(200):
            mine = buffers.empty_like(like)
            mine.fill_(number)
            if not (mine == number).all():
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(float(k),)) for k in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_kept_memory_stays_within_the_limit(monkeypatch):
    monkeypatch.setattr(buffers, "LIMIT", 8 << 20)
    for rows in range(300, 900, 50):
        assert buffers.empty_like(torch.empty(rows, CLASSES)).shape == (rows, CLASSES)
        assert sum(kept.bytes for kept in buffers._kept) <= buffers.LIMIT
    buffers.empty_like(torch.empty(850, CLASSES)).fill_(7.0)
    assert (buffers.empty_like(torch.empty(850, CLASSES)) == 7).all()  # the latest stays
    large = buffers.empty_like(torch.empty(3000, CLASSES))  # larger than the limit
    assert all(kept.address != large.data_ptr() for kept in buffers._kept)
    assert (buffers.empty_like(torch.empty(850, CLASSES)) == 7).all()  # others are still kept


def test_small_gradients_are_not_kept():
    buffers.empty_like(torch.empty(128, 100))
    assert not buffers._kept


def test_memory_is_reused_only_for_the_same_type_and_shape():
    double = buffers.empty_like(torch.empty(ROWS, CLASSES, dtype=torch.float64))
    address = double.data_ptr()
    del double
    strided = torch.empty(CLASSES, ROWS, dtype=torch.float64).t()
    again = buffers.empty_like(strided)
    assert (again.data_ptr(), again.dtype, again.shape) == (address, strided.dtype, strided.shape)
    assert again.is_contiguous()
    del again
    for other in (torch.empty(ROWS, 2 * CLASSES), torch.empty(2 * ROWS, CLASSES)):  # as many bytes
        assert buffers.empty_like(other).data_ptr() != address


@pytest.mark.parametrize("second", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("first", [torch.float32, torch.bfloat16])
def test_gradients_have_the_type_of_their_own_logits(first, second):
    """Two calls may have the same shape but other types, for example float64 and float32.

    They may also have another shape with the same type and the same number of bytes.
    """
    shapes = (2 * ROWS, CLASSES), (ROWS, 2 * CLASSES), (2 * ROWS, CLASSES)
    for shape, dtype in zip(shapes, (first, first, second), strict=True):
        made = buffers.empty_like(torch.empty(shape, dtype=dtype))
        assert (made.dtype, made.shape, made.is_contiguous()) == (dtype, shape, True)
        assert made.nbytes == made.untyped_storage().nbytes()
        del made


@pytest.mark.parametrize("rows", [3, ROWS])  # too small to be kept, and kept
def test_gradients_are_dense_for_any_strides_of_the_logits(rows):
    for logits in (torch.empty(CLASSES, rows).t(), torch.empty(rows, 2 * CLASSES)[:, ::2],
                   torch.empty(1, CLASSES).expand(rows, CLASSES)):  # fmt: skip
        made = buffers.empty_like(logits)
        assert made.shape == logits.shape
        assert made.is_contiguous()
        assert made.untyped_storage().nbytes() == made.nbytes


def test_a_tensor_subclass_gets_a_gradient_of_its_type():
    class Mine(torch.Tensor):
        pass

    made = buffers.empty_like(torch.empty(CLASSES, ROWS).t().as_subclass(Mine))
    assert type(made) is Mine
    assert made.is_contiguous()


@pytest.mark.parametrize("size", [0, 100])
def test_a_resized_storage_is_not_reused(size):
    like = torch.empty(ROWS, CLASSES)
    taken = buffers.empty_like(like)
    taken.untyped_storage().resize_(size)
    del taken
    assert buffers.empty_like(like).untyped_storage().nbytes() == like.nbytes
    buffers.empty_like(like).fill_(1.0)


def test_memory_from_inference_mode_is_reused_in_training():
    s, t, y = leaves()
    with torch.inference_mode():
        address = bdkd_loss_and_grad(s, t, y)[1][0].data_ptr()
    for _ in range(2):  # the second backward accumulates the gradients in place
        out = bdkd_loss(s, t, y)
        (out.student + out.teacher).backward()
    assert address in {s.grad.data_ptr(), t.grad.data_ptr()}
    assert not s.grad.is_inference()


def test_a_second_backward_allocates_a_new_gradient():
    s, t, y = leaves()
    out = bdkd_loss(s, t, y)
    out.student.backward(retain_graph=True)
    first, kept = s.grad, s.grad.clone()
    s.grad = None
    out.student.backward()
    assert s.grad.data_ptr() != first.data_ptr()
    assert torch.equal(first, kept)
    assert torch.equal(s.grad, kept)


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], env={**os.environ, **environment},
                          capture_output=True, text=True)  # fmt: skip


def test_the_environment_sets_the_limit():
    """The limit is in MiB. One process shows that the variable is read.

    The other values are passed to the function that parses it.
    """
    code = ("import torch; from bdkd_kernels import buffers; "
            "buffers.empty_like(torch.empty(300, 1000)); print(len(buffers._kept))")  # fmt: skip
    assert run(code, BDKD_BUFFER_MB="0").stdout.strip() == "0"
    for text, size in ((None, 256 << 20), ("0", 0), ("2", 2 << 20), ("-1", 0)):
        assert buffers._limit(text) == size
    with pytest.raises(ValueError, match=r"BDKD_BUFFER_MB must be a whole number.*got 'much'"):
        buffers._limit("much")
