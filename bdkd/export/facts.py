"""What all formats of exported files share: the facts in them, digests, limits."""

import contextlib
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

import torch
from torch import Tensor, nn

from bdkd.data.base import Normalisation
from bdkd.errors import RunError

Format = Literal["onnx", "export", "safetensors"]

VERSION = 1
FACTS, DIGEST = "bdkd", "bdkd_sha256"  # keys of a file's metadata


@dataclass(frozen=True)
class Facts:
    """What a user of an exported network needs to know, stored with its weights."""

    version: int  # of these facts' layout
    network: str
    """Its name in the run; a student's average is ``NAME_ema``."""
    model: str
    role: str
    parameters: int
    method: str
    seed: int
    step: int
    recipe: str  # TOML
    classes: tuple[str, ...]
    channels: int
    image_size: tuple[int, int]  # height, width in pixels
    normalisation: Normalisation | None
    measured_on: str  # test, val, or nothing
    images: int  # that it was measured on
    metrics: dict[str, float | None]
    versions: dict[str, str]  # of bdkd and torch, and the commit where it is known

    @property
    def input_shape(self) -> tuple[int, int, int]:
        return (self.channels, *self.image_size)


class Exported(NamedTuple):
    """A file that was read but not run yet."""

    path: Path
    format: Format
    content: bytes
    facts: Facts


Digest = Callable[[str], str]
"""Returns the SHA-256 of facts together with a file's weights. It detects damage, not forgery."""


def digest_of_bytes(content: bytes) -> Digest:
    return lambda facts: hashlib.sha256(facts.encode() + content).hexdigest()


class FileFormat(NamedTuple):
    """One kind of exported file."""

    suffix: str
    max_bytes: int
    """The largest file that is read."""
    encode: Callable[[nn.Module, str, tuple[int, ...]], bytes]
    """Returns the file of a network in evaluation mode, from its facts as JSON and the shape of an
    image."""
    check: Callable[[Path, BinaryIO], None]
    """Checks sizes in an open file before it is read into memory."""
    decode: Callable[[Path, bytes], tuple[dict[str, str], Digest]]
    """Returns a file's metadata and its digest."""
    open: Callable[[Exported, nn.Module, torch.device], nn.Module]
    """Returns the network in a file. The second argument is that network with any weights."""


class Function(nn.Module):
    """A function of images ``(B, C, H, W)`` as a module without modes."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, images: Tensor) -> Tensor:
        return self.function(images)


def corrupt(path: Path, reason: str) -> RunError:
    """Return the error of a file that is damaged."""
    return RunError(f"cannot read {path}: it is corrupt or cut off ({reason}); export it again")


def memory_limit() -> int:
    """Return half of the memory, in bytes, of this machine or of its control group (cgroup v2): the
    most that a file, or the tensors of an ONNX model, may take."""
    limit = 2**40
    if hasattr(os, "sysconf"):
        limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # no control group, or "max"
        limit = min(limit, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return limit // 2
