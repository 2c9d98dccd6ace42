"""The private APIs of torch that the trainer uses give the results of public operations."""

import pytest
import torch
from torch import nn

from bdkd import _torch_compat as compat
from bdkd.errors import RunError


def tensors(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in ((3,), (2, 4), ())]


def test_foreach_operations_equal_a_loop_over_the_tensors():
    one, other, weight = tensors(0), tensors(1), torch.tensor(0.25)
    copied, added, moved = tensors(0), tensors(0), tensors(0)
    compat.foreach_copy_(copied, other)
    compat.foreach_add_(added, other)
    compat.foreach_lerp_(moved, other, weight)
    for i, (a, b) in enumerate(zip(one, other, strict=True)):
        assert torch.equal(copied[i], b)
        assert torch.equal(added[i], a + b)
        assert torch.equal(moved[i], a + weight * (b - a))


def test_ddp_does_not_synchronise_ignored_parameters(tmp_path):
    """DDP broadcasts all other parameters when it is constructed."""
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    compat.ignore_in_ddp(network, ["0.weight", "0.bias"])
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        # The model is freed before the group; see _with_one_rank in torch_features.py.
        ignored = nn.parallel.DistributedDataParallel(network).parameters_to_ignore
    finally:
        torch.distributed.destroy_process_group()
    assert ignored == {"0.weight", "0.bias"}


def test_compile_error_describes_only_compiler_errors():
    def broken(graph, inputs):
        raise ValueError("no such operator\nand more")

    torch.compiler.reset()
    with pytest.raises(Exception) as raised:
        torch.compile(lambda x: x + 1, backend=broken)(torch.ones(2))
    assert compat.compile_error(raised.value) == "ValueError: no such operator"
    assert compat.compile_error(RunError("a full disk")) is None
