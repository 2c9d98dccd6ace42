"""Gradients written into the caller's memory: refused where one would overwrite the other, held to
a search of every byte; taken everywhere else."""

import numpy as np
import pytest
import torch
from bdkd_kernels import bdkd_loss_and_grad

S, T = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0)).unbind()
N, C = 3, 2  # enough for rows that meet a neighbour's, and for every byte to be looked at


def elements(x: torch.Tensor) -> list[set[int]]:
    """The addresses of each element's bytes, element by element."""
    starts = [
        x.data_ptr() + (i * x.stride(0) + j * x.stride(1)) * x.itemsize
        for i in range(x.shape[0])
        for j in range(x.shape[1])
    ]
    return [{start + k for k in range(x.itemsize)} for start in starts]


STEPS = [(2, 1), (4, 1), (4, 1), (5, 1), (6, 1), (6, 1), (4, 2), (1, 3), (1, 4), (2, 3), (0, 1),
         (1, 1)]  # fmt: skip


def test_no_gradient_is_written_where_another_lies():
    """Pairs of views of one memory, in fp32 and fp16: those that share a byte are refused. Those
    that are taken hold the gradients, and nothing else has changed."""
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
        except ValueError:  # where only a search could tell
            refused += 1
            continue
        taken += 1
        for got, want in zip(grads, bdkd_loss_and_grad(s, t, None)[1], strict=True):
            torch.testing.assert_close(got, want)
        written = set().union(*a, *b)
        around = [i for i in range(len(memory)) if memory.data_ptr() + i not in written]
        assert (memory[around] == 7).all()
    assert taken > 2 * refused


def test_gradients_in_records_are_taken_up_to_the_last_byte():
    """A row of each gradient in one record, of 4 bytes a number and of 2: taken exactly where
    neither reaches into the other."""
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
