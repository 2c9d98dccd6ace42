"""Gradient buffers of the caller are refused if they overlap, and accepted otherwise.

The tests search every byte to find out whether two buffers overlap.
"""

import numpy as np
import pytest
import torch
from bdkd_kernels import bdkd_loss_and_grad

S, T = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0)).unbind()
N, C = 3, 2  # large enough for overlapping rows, small enough to check every byte


def elements(x: torch.Tensor) -> list[set[int]]:
    """Return the addresses of each element's bytes."""
    starts = [
        x.data_ptr() + (i * x.stride(0) + j * x.stride(1)) * x.itemsize
        for i in range(x.shape[0])
        for j in range(x.shape[1])
    ]
    return [{start + k for k in range(x.itemsize)} for start in starts]


STEPS = [(2, 1), (4, 1), (4, 1), (5, 1), (6, 1), (6, 1), (4, 2), (1, 3), (1, 4), (2, 3), (0, 1),
         (1, 1)]  # fmt: skip


def test_overlapping_gradient_buffers_are_refused():
    """Pairs of views of the same memory, in fp32 and fp16, are refused if they share a byte.

    Accepted views contain the gradients afterwards, and no other byte has changed.
    """
    random = np.random.default_rng(0)
    refused = taken = 0
    for _ in range(300):
        memory = torch.full((160,), 7, dtype=torch.uint8)
        types = [(torch.float32, torch.float16)[i] for i in random.integers(2, size=2)]
        grads = tuple(
            memory.view(dtype).as_strided(
                (N, C), STEPS[random.integers(len(STEPS))], int(random.integers(20))
            )
            for dtype in types
        )
        a, b = map(elements, grads)
        each_once = all(len(set().union(*x)) == sum(map(len, x)) for x in (a, b))
        apart = not set().union(*a) & set().union(*b)
        s, t = S[:N, :C].to(types[0]), T[:N, :C].to(types[1])
        if not (each_once and apart):
            with pytest.raises(ValueError, match=r"grads\[[01]\] must (not overlap|hold each)"):
                bdkd_loss_and_grad(s, t, None, grads=grads)
            assert (memory == 7).all()
            continue
        try:
            bdkd_loss_and_grad(s, t, None, grads=grads)
        except ValueError:  # only a search of all elements could show that they do not overlap
            refused += 1
            continue
        taken += 1
        for got, want in zip(grads, bdkd_loss_and_grad(s, t, None)[1], strict=True):
            torch.testing.assert_close(got, want)
        written = set().union(*a, *b)
        around = [i for i in range(len(memory)) if memory.data_ptr() + i not in written]
        assert (memory[around] == 7).all()
    assert taken > 2 * refused


def test_interleaved_buffers_are_accepted_unless_they_share_a_byte():
    """Each record contains a row of both gradients, with 4 and 2 bytes per number.

    The buffers are accepted exactly if the two rows do not overlap.
    """
    for types in ((torch.float32, torch.float16), (torch.float16, torch.float32)):
        s, t = S[:N, :C].to(types[0]), T[:N, :C].to(types[1])
        want = bdkd_loss_and_grad(s, t, None)[1]
        sizes = [C * x.itemsize for x in types]
        for record in (12, 16):
            for begins in ((a, b) for a in range(0, 13, 4) for b in range(0, 13, 4)):
                if any(x + size > record for x, size in zip(begins, sizes, strict=True)):
                    continue
                memory = torch.zeros(N * record, dtype=torch.uint8)
                grads = tuple(
                    memory.view(x).as_strided((N, C), (record // x.itemsize, 1), at // x.itemsize)
                    for x, at in zip(types, begins, strict=True)
                )
                if begins[0] + sizes[0] <= begins[1] or begins[1] + sizes[1] <= begins[0]:
                    bdkd_loss_and_grad(s, t, None, grads=grads)
                    assert all(map(torch.equal, grads, want))
                else:
                    with pytest.raises(ValueError, match=r"grads\[1\] must not overlap"):
                        bdkd_loss_and_grad(s, t, None, grads=grads)


def test_a_single_row_or_class_may_have_any_stride():
    for shape in ((1, 6), (4, 1)):
        s, t = S[: shape[0], : shape[1]], T[: shape[0], : shape[1]]
        want = bdkd_loss_and_grad(s, t, None)[1]
        for stride in (0, 1, 6, 7):
            strides = (stride, 1) if shape[0] == 1 else (2, stride)
            grads = tuple(torch.zeros(9).as_strided(shape, strides) for _ in range(2))
            assert all(map(torch.equal, bdkd_loss_and_grad(s, t, None, grads=grads)[1], want))
