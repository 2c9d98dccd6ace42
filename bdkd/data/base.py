"""What every data source is to the trainer.

The order of an epoch is a pure function of (seed, epoch), and the augmentation of a batch one of
(seed, epoch, position). So the whole state of a source is (epoch, images seen in it): nothing of it
needs saving, and it means the same whatever the number of workers.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

Split = Literal["train", "val", "test"]


class Batch(NamedTuple):
    """Images and labels of some samples, on the device."""

    views: tuple[Tensor, ...]  # one or more augmentations of the images, (B, C, H, W) each
    target: Tensor  # (B,) int64, or (B, C) soft labels of mixed images

    def micro_batches(self, parts: int) -> Iterator[tuple["Batch", bool]]:
        """Yield ``parts`` equal parts of the batch, and whether each is the last one."""
        targets = self.target.chunk(parts)
        views = zip(*(view.chunk(parts) for view in self.views), strict=True)
        for number, (part, target) in enumerate(zip(views, targets, strict=True), 1):
            yield Batch(part, target), number == len(targets)


class Shard(NamedTuple):
    """The part of the images that one rank takes. Ranks may take unequal parts, none twice."""

    rank: int = 0
    world: int = 1

    def of_batch(self, size: int) -> slice:
        """This rank's images of a global training batch, a contiguous run of it."""
        return slice(size * self.rank // self.world, size * (self.rank + 1) // self.world)

    def of_split(self, count: int) -> slice:
        """This rank's images of a split that is evaluated: every ``world``-th."""
        return slice(self.rank, count, self.world)


WHOLE = Shard()


@dataclass(frozen=True)
class Normalisation:
    """What a pixel becomes before a network sees it: ``(value - mean) / std``, by channel."""

    mean: tuple[float, ...]  # in pixel values
    std: tuple[float, ...]
    largest: float  # pixel values are 0 to largest


@dataclass(frozen=True)
class DataInfo:
    """Describe a data set.

    ``digests`` and ``files`` identify the data set itself, before validation images are held out
    of "train" and before the recipe's subset and noise, but without the images of
    ``data.exclude``. See ``bdkd.data.digest``.
    """

    source: str
    classes: tuple[str, ...]
    channels: int
    image_size: tuple[int, int]  # height, width in pixels
    counts: dict[Split, int]
    normalisation: Normalisation | None = None  # None: the images are not pixels
    digests: Mapping[str, str] = field(default_factory=dict)  # "train" and "test": SHA-256 in hex
    files: Mapping[str, int] = field(default_factory=dict)  # images that each digest covers

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def identity(self) -> dict[str, Any]:
        """Return what identifies the data set, as plain values; see :mod:`bdkd.identity`."""
        return {
            "source": self.source,
            "classes": list(self.classes),
            "images": dict(self.files),
            "digests": dict(self.digests),
        }


class DataSource(Protocol):
    """A data set with splits ``train``, ``val`` and ``test``."""

    info: DataInfo

    def train_batches(
        self, epoch: int, start: int, batch_size: int, views: int, shard: Shard = WHOLE
    ) -> Iterator[Batch]:
        """The shard's part of the whole batches of one epoch, from its ``start``-th image on; a
        ragged rest is left out. ``start`` and ``batch_size`` count the images of all ranks; order
        and augmentation of an image do not depend on the shard."""
        ...

    def eval_batches(self, split: Split, batch_size: int, shard: Shard = WHOLE) -> Iterator[Batch]:
        """Every image of the shard's part of a split once, in a fixed order, not augmented, in
        batches of ``batch_size``; the last may be ragged."""
        ...


def mix_seed(*numbers: int) -> int:
    """One well-mixed 63-bit seed from several numbers (seed, epoch, position, purpose)."""
    words = np.random.SeedSequence(numbers).generate_state(2, np.uint32)
    return (int(words[0]) << 32 | int(words[1])) & (2**63 - 1)


def epoch_order(seed: int, epoch: int, count: int) -> Tensor:
    """The order of an epoch's images, ``(count,)`` int64, a pure function of its arguments."""
    generator = torch.Generator().manual_seed(mix_seed(seed, epoch, 0))
    return torch.randperm(count, generator=generator)


def stratified_split(labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the rest and of a ``share`` held out, class by class, at least one of each class
    on either side where it has two; of a share of 0, none is held out.

    Args:
        labels: ``(N,)`` integers.
    """
    rng = np.random.default_rng(seed)
    rest, held_out = [], []
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        size = min(max(1, round(len(members) * share)), len(members) - 1) if share else 0
        held_out.append(members[:size])
        rest.append(members[size:])
    return np.sort(np.concatenate(rest)), np.sort(np.concatenate(held_out))


def stratified_subset(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Indices of ``count`` samples with the classes in the proportions that ``labels`` has; a
    smaller subset is part of a larger one.

    Args:
        labels: ``(N,)`` integers, ``count`` at most N.
    """
    rng = np.random.default_rng(seed)
    depth = np.empty(len(labels))  # how far down in its class a sample stands, in (0, 1)
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        depth[members] = (np.arange(len(members)) + 0.5) / len(members)
    return np.sort(np.argsort(depth, kind="stable")[:count])
