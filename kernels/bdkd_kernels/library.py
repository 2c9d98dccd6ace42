"""The namespace of this package in torch's registries, and an operator that all backends use."""

import torch
from torch import Tensor

# The namespace of operators, and of types in exported programs. A copy of the package under another
# name, such as acme.vendored.bdkd_kernels, has another namespace. So one process can load both.
NAMESPACE = "bdkd" if __package__ == "bdkd_kernels" else (__package__ or "").replace(".", "_")

_COPIES = f"{NAMESPACE}::copies"

# The copy must be an operator: torch.compile would recompute a plain clone in the backward pass,
# and would save the original tensor for that.
torch.library.define(_COPIES, "(Tensor[] tensors) -> Tensor[]")


@torch.library.impl(_COPIES, "default")
def _copies(tensors: list[Tensor]) -> list[Tensor]:
    return [x.clone(memory_format=torch.contiguous_format) for x in tensors]


@torch.library.register_fake(_COPIES)
def _fake_copies(tensors: list[Tensor]) -> list[Tensor]:
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors]


def copies_to_save(tensors: list[Tensor]) -> list[Tensor]:
    """Return copies that ``torch.compile`` saves for the backward pass instead of the tensors."""
    return getattr(torch.ops, NAMESPACE).copies(tensors)
