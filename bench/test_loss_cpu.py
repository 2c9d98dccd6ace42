"""``loss_cpu.py``'s contenders under pytest-benchmark: pytest bench/test_loss_cpu.py
--benchmark-enable --benchmark-group-by=param:size."""

import pytest
import torch
from loss_cpu import DTYPES, SIZES, contenders, draw

NAMES = ("step", "eager", "compile", "copy", "loss_and_grad", "no gradient")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("size", [(8, 10), *SIZES], ids=lambda size: f"{size[0]}x{size[1]}")
def test_loss_cpu(benchmark, size, dtype, name):
    torch.set_num_threads(2)
    step = contenders(*draw(*size, DTYPES[dtype]), temperature=4.0)[name]
    benchmark.pedantic(step, rounds=20, iterations=10 if size[0] * size[1] < 100_000 else 1,
                       warmup_rounds=3)  # fmt: skip
