"""The identity of a data set: a SHA-256 digest of its training images and one of its test images.

Digests are computed before validation images are held out and before the recipe's subset and noise
are applied, so they depend only on the data set. For image files they cover class names and file
names, because reading 1.3 million images would take minutes. For sets in memory they cover pixels
and labels.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from torch import Tensor

OwnSplit = Literal["train", "test"]


class Digest(NamedTuple):
    """The digest of a split."""

    sha256: str  # hex
    images: int  # number of images that the digest covers


Digests = Mapping[OwnSplit, Digest]


def digest_pixels(pixels: Tensor, labels: Tensor) -> Digest:
    """Return the digest of images in memory. It depends on the order of the images.

    Args:
        pixels: ``(N, C, H, W)`` uint8.
        labels: ``(N,)`` int64.
    """
    found = hashlib.sha256(repr(tuple(pixels.shape)).encode())
    for start in range(0, len(pixels), 1000):  # in parts, because contiguous() copies
        found.update(pixels[start : start + 1000].contiguous().numpy().tobytes())
    found.update(labels.contiguous().numpy().astype("<i8").tobytes())
    return Digest(found.hexdigest(), len(labels))


def digest_text(definition: str, images: int) -> Digest:
    """Return the digest of ``images`` generated images, given the text that defines them."""
    return Digest(hashlib.sha256(f"{definition} {images}".encode()).hexdigest(), images)


def digest_names(
    classes: Sequence[str], labels: np.ndarray, containers: Sequence[str], container: np.ndarray,
    names: Iterable[bytes],
) -> Digest:  # fmt: skip
    """Return the digest of the sorted list of (class name, container, image name).

    Args:
        labels: ``(N,)`` integers, indices into ``classes``.
        containers: folders or archives, relative to the data set.
        container: ``(N,)`` integers, indices into ``containers``.
        names: N names within the containers, without NUL.
    """
    first, second = [*map(_netstring, classes)], [*map(_netstring, containers)]
    places = zip(labels.tolist(), container.tolist(), names, strict=True)
    entries = sorted([first[i] + second[j] + name for i, j, name in places])
    return Digest(hashlib.sha256(b"\0".join(entries)).hexdigest(), len(entries))


def _netstring(text: str) -> bytes:
    """Prefix text with its length, so that different sequences of texts have different bytes."""
    content = text.encode("utf-8", "surrogateescape")
    return b"%d:%b" % (len(content), content)
