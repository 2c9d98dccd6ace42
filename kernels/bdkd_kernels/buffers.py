"""Reuse the memory of large gradients on the CPU.

The C library returns a large block to the system when it is freed. If each step allocates its
gradients again, their page faults can take longer than the loss: 3.9 ms instead of 1.2 ms for both
at 1024 x 1000. Therefore this file keeps the storages of the latest large gradients, and reuses a
storage that has no other owner. It keeps at most ``LIMIT`` bytes and ``COUNT`` storages. The
environment variable ``BDKD_BUFFER_MB`` sets the limit. 0 keeps no storages.
"""

import os
from collections import deque

import torch
from torch import Tensor

from ._torch_compat import PLAIN, owners

SMALLEST = 1 << 20  # bytes; the C library keeps smaller blocks itself
COUNT = 16


def _limit(text: str | None) -> int:
    try:
        return (256 if text is None else max(int(text), 0)) << 20
    except ValueError:
        raise ValueError(
            f"BDKD_BUFFER_MB must be a whole number of MiB, got {text!r}: 0 keeps no buffers"
        ) from None


LIMIT = _limit(os.environ.get("BDKD_BUFFER_MB"))


class _Kept:
    """A kept storage. ``tensor`` and the tensors that are returned to callers share it."""

    __slots__ = ("address", "alone", "bytes", "dtype", "shape", "storage", "tensor")

    def __init__(self, shape: torch.Size, dtype: torch.dtype, size: int) -> None:
        with torch.inference_mode(False):  # its next user may be a training step
            self.tensor = torch.empty(shape, dtype=dtype, device="cpu")
        self.shape, self.dtype, self.bytes = shape, dtype, size
        self.address = self.tensor.data_ptr()
        self.storage = self.tensor.untyped_storage()
        self.alone = self._owners()

    def _owners(self) -> tuple[int, int]:
        assert owners is not None
        return owners(self.storage)

    def is_free(self) -> bool:
        # The address differs if the caller has resized the storage.
        return self._owners() == self.alone and self.tensor.data_ptr() == self.address


_kept: deque[_Kept] = deque()  # the latest last


def empty_like(logits: Tensor) -> Tensor:
    """Return an uninitialised dense tensor of the logits' shape, dtype and device."""
    if torch.compiler.is_compiling() or type(logits) not in PLAIN:
        return torch.empty_like(logits, memory_format=torch.contiguous_format)
    return empty_rows(logits, False)


def empty_rows(logits: Tensor, contiguous: bool) -> Tensor:
    """Return :func:`empty_like` of a plain tensor in an eager call.

    It is 0.4 us faster than :func:`empty_like`. It is another 0.3 us faster if ``contiguous`` is
    True, which says that the logits are contiguous.
    """
    size = logits.nbytes
    if size < SMALLEST or size > LIMIT or owners is None or not logits.is_cpu:
        if contiguous:
            return torch.empty_like(logits)
        # The result is dense even if the logits are not.
        return torch.empty_like(logits, memory_format=torch.contiguous_format)
    shape, dtype = logits.shape, logits.dtype
    # Search from the latest to the oldest: the latest may still be in the caches.
    others, again = [], None
    while _kept and again is None:
        try:
            kept = _kept.pop()  # no other thread can find it while it is checked
        except IndexError:  # other threads have taken the rest
            break
        if kept.shape == shape and kept.dtype == dtype and kept.is_free():
            again = kept.tensor.data
        else:
            others.append(kept)
    _kept.extend(reversed(others))
    if again is not None:
        _kept.append(kept)
        return again
    kept = _Kept(shape, dtype, size)
    fresh = kept.tensor.data
    _kept.append(kept)
    _trim()
    return fresh


def release() -> None:
    """Drop all kept storages."""
    _kept.clear()


def _trim() -> None:
    try:
        while len(_kept) > COUNT or sum(kept.bytes for kept in list(_kept)) > LIMIT:
            _kept.popleft()
    except IndexError:
        pass  # another thread has trimmed
