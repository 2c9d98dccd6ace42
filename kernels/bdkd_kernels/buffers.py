"""Memory of gradients on the CPU that is used again once nobody holds it.

The C library gives large blocks back to the system as soon as they are freed: a step whose fresh
gradients fault their pages in anew can take longer for that than for the loss. So the storages of
the latest large gradients are kept, and one that has no owner left is handed out again. At most
``LIMIT`` bytes are kept, and ``COUNT`` storages; ``BDKD_BUFFER_MB`` in the environment sets the
limit, 0 keeps none.
"""

import os
import sys
from collections import deque

import torch
from torch import Tensor, UntypedStorage

SMALLEST = 1 << 20  # bytes: smaller ones stay with the C library
COUNT = 16


def _limit(text: str | None) -> int:
    try:
        return (256 if text is None else max(int(text), 0)) << 20
    except ValueError:
        raise ValueError(
            f"BDKD_BUFFER_MB must be a whole number of MiB, got {text!r}: 0 keeps no buffers"
        ) from None


LIMIT = _limit(os.environ.get("BDKD_BUFFER_MB"))
_PLAIN = (Tensor, torch.nn.Parameter)
# How many hold a storage; not public, so a torch without it keeps none.
_owners = getattr(torch._C, "_storage_Use_Count", None)
_kept: deque[UntypedStorage] = deque()  # the latest last


def empty_like(logits: Tensor) -> Tensor:
    """An uninitialised dense tensor of the logits' shape, dtype and device, its caller's alone."""
    if torch.compiler.is_compiling() or type(logits) not in _PLAIN or not logits.is_cpu:
        size = 0
    else:
        size = logits.numel() * logits.element_size()
    if size < SMALLEST or size > LIMIT or _owners is None:
        # Dense, whatever the strides of the logits.
        return torch.empty_like(logits, memory_format=torch.contiguous_format)
    # The latest first: it may still be in the caches.
    others, again = [], None
    while _kept and again is None:
        try:
            storage = _kept.pop()  # out of every other thread's reach while it is looked at
        except IndexError:  # they have taken the rest
            break
        # Tensors count as owners, and whoever took the storage itself shares this very object.
        unowned = _owners(storage._cdata) == 1 and sys.getrefcount(storage) == 2
        if unowned and storage.nbytes() == size:
            again = logits.new_empty(0).set_(storage).resize_(logits.shape)
        else:
            others.append(storage)
    _kept.extend(reversed(others))
    if again is not None:
        _kept.append(again.untyped_storage())
        return again
    fresh = torch.empty_like(logits, memory_format=torch.contiguous_format)
    _kept.append(fresh.untyped_storage())
    _trim()
    return fresh


def release() -> None:
    """Keep none of those that there are now."""
    _kept.clear()


def _trim() -> None:
    try:
        while len(_kept) > COUNT or sum(storage.nbytes() for storage in list(_kept)) > LIMIT:
            _kept.popleft()
    except IndexError:
        pass  # another thread has trimmed
