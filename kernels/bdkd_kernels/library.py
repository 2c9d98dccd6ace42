"""The names of this package in torch's global registries, and its operator without a backend."""

import torch
from torch import Tensor

# Of operators and of types in exported programs. A copy of the package under another name, such as
# acme.vendored.bdkd_kernels, has another namespace, so that both can be loaded in one process.
NAMESPACE = "bdkd" if __package__ == "bdkd_kernels" else (__package__ or "").replace(".", "_")

_COPIES = f"{NAMESPACE}::copies"

# An operator, because torch.compile recomputes a plain clone in the backward pass, and saves the
# tensor that was cloned.
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
