"""Metadata, digests and size limits that all formats of exported files share."""

import contextlib
import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple, TypedDict

import torch
from torch import Tensor, nn

from bdkd.data.base import Normalisation
from bdkd.errors import RunError

Format = Literal["onnx", "export", "safetensors"]
Precision = Literal["fp32", "int8"]

VERSION = 1
FACTS, DIGEST = "bdkd", "bdkd_sha256"  # keys of a file's metadata


class Interval(TypedDict):
    """A value with its 95% interval."""

    value: float | None
    low: float | None
    high: float | None


class Change(TypedDict):
    """A metric before and after a change of a network, and the 95% interval of the difference."""

    before: float | None
    after: float | None
    difference: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Quantization:
    """How an int8 file was made from an fp32 file."""

    calibration_images: int  # validation images that gave the ranges of the activations
    baseline: str  # name of the fp32 file
    baseline_weights: str  # its ``Exported.weights``
    changes: Mapping[str, Change] = field(default_factory=dict)  # from the baseline, by metric
    agreement: Interval | None = None  # share of the images with equal predictions


@dataclass(frozen=True)
class Facts:
    """Metadata of an exported network, stored with its weights."""

    version: int  # of the metadata format
    network: str  # the name in the run; ``NAME_ema`` for a student's average
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
    measured_on: str  # test, val, or empty
    images: int  # number of images for the metrics
    metrics: dict[str, float | None]
    versions: dict[str, str]  # of bdkd and torch, and the commit if it is known
    temperature: float = 1.0  # the last layer was divided by it
    quantization: Quantization | None = None  # None for fp32 files

    @property
    def precision(self) -> Precision:
        return "int8" if self.quantization else "fp32"

    @property
    def input_shape(self) -> tuple[int, int, int]:
        return (self.channels, *self.image_size)


class Exported(NamedTuple):
    """A file that was read, but whose network was not loaded yet."""

    path: Path
    format: Format
    content: bytes
    facts: Facts
    weights: str
    """SHA-256 of the content without the facts."""


Digest = Callable[[str], str]
"""Return the SHA-256 of facts and a file's weights. This detects damage, not forgery."""


def digest_of_bytes(content: bytes) -> Digest:
    return lambda facts: hashlib.sha256(facts.encode() + content).hexdigest()


class FileFormat(NamedTuple):
    """One kind of exported file."""

    suffix: str
    max_bytes: int  # larger files are not read
    encode: Callable[[nn.Module, str, tuple[int, ...]], bytes]
    """Return the content of a file. Arguments: a network in evaluation mode, its facts as JSON, and
    the shape (C, H, W) of an image."""
    check: Callable[[Path, BinaryIO], None]
    """Check the sizes that an open file states, before the file is read into memory."""
    decode: Callable[[Path, bytes], tuple[dict[str, str], Digest]]
    """Return the metadata and the digest of a file."""
    open: Callable[[Exported, nn.Module, torch.device], nn.Module]
    """Return the network in a file. The second argument is the network of the file's recipe, with
    any weights."""


class Function(nn.Module):
    """Wrap a function of images ``(B, C, H, W)`` in a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, images: Tensor) -> Tensor:
        return self.function(images)


def corrupt(path: Path, reason: str) -> RunError:
    """Return the error for a damaged file."""
    return RunError(f"cannot read {path}: it is corrupt or truncated ({reason}); export it again")


def memory_limit() -> int:
    """Return the largest size of a file or of the tensors of an ONNX model, in bytes: half of the
    memory of this machine, or of its control group (cgroup v2) if that is less."""
    limit = 2**40
    if hasattr(os, "sysconf"):
        limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # no control group, or "max"
        limit = min(limit, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return limit // 2
