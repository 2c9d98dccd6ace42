"""The interface between data sources and the trainer.

The order of an epoch is a pure function of (seed, epoch), and the augmentation of a batch is a pure
function of (seed, epoch, position). Data sources are therefore stateless: resuming needs only the
epoch and the image count, and the number of workers may change.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from bdkd.config import Bounds, DataConfig, Share
from bdkd.registry import SOURCES, Entry

Split = Literal["train", "val", "test"]


class Batch(NamedTuple):
    """Images and labels on the device."""

    views: tuple[Tensor, ...]
    """One or more augmentations of the images, ``(B, C, H, W)`` each, normalised."""
    target: Tensor
    """Labels ``(B,)`` int64, or ``(B, classes)`` soft labels for mixed images."""

    def micro_batches(self, parts: int) -> Iterator[tuple["Batch", bool]]:
        """Yield ``parts`` equal parts of the batch as pairs (part, whether it is the last one)."""
        targets = self.target.chunk(parts)
        views = zip(*(view.chunk(parts) for view in self.views), strict=True)
        for number, (part, target) in enumerate(zip(views, targets, strict=True), 1):
            yield Batch(part, target), number == len(targets)


class Shard(NamedTuple):
    """The images of one rank. The shards of all ranks are disjoint and may differ in size."""

    rank: int = 0
    world: int = 1

    def of_batch(self, size: int) -> slice:
        """Return this rank's contiguous part of a global training batch."""
        return slice(size * self.rank // self.world, size * (self.rank + 1) // self.world)

    def of_split(self, count: int) -> slice:
        """Return this rank's part of an evaluation split: every ``world``-th image."""
        return slice(self.rank, count, self.world)


WHOLE = Shard()


@dataclass(frozen=True)
class Normalisation:
    """The normalisation of pixels, ``(value - mean) / std`` per channel."""

    mean: tuple[float, ...]  # in pixel values
    std: tuple[float, ...]
    largest: float  # pixel values are in [0, largest]


@dataclass(frozen=True)
class DataInfo:
    """The description of a data set.

    ``digests`` and ``files`` cover the whole data set without the images of ``data.exclude``,
    before validation images are held out and before subset and noise are applied. See
    ``bdkd.data.digest``.
    """

    source: str
    """The value of ``data.source``."""
    classes: tuple[str, ...]
    """Names of the classes, in the order of the labels."""
    channels: int
    """Channels of the images."""
    image_size: tuple[int, int]
    """Height and width of evaluation images in pixels."""
    counts: dict[Split, int]
    """Number of images of each split. ``val`` may have none."""
    normalisation: Normalisation | None = None
    """The normalisation of the pixels. None: the inputs are not pixels."""
    digests: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 of ``train`` and of ``test`` in hex. Without digests, two data sets with the same
    classes and counts are considered the same."""
    files: Mapping[str, int] = field(default_factory=dict)
    """Number of images that each digest covers."""

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def identity(self) -> dict[str, Any]:
        """Return the identity of the data set as plain values; see :mod:`bdkd.identity`."""
        return {
            "source": self.source, "classes": list(self.classes),
            "images": dict(self.files), "digests": dict(self.digests),
        }  # fmt: skip


@dataclass(frozen=True)
class ImagesConfig(DataConfig):
    """Options that the built-in data sources share."""

    train_images: Annotated[int, Bounds(ge=2)] | None = None
    """Number of training images to use, with the class proportions of the data set. Validation
    images are held out first. Default: all."""
    label_noise: Share = 0.0
    """Share of the training labels to replace by a random other class. The replaced labels do not
    depend on the seed."""
    flip: bool = False
    """Augmentation: mirror each training image with probability 1/2."""


class SourceContext(NamedTuple):
    """Where and how a data source returns images."""

    seed: int
    """Seed of the order and the augmentation of training images."""
    device: torch.device
    """Device of images and labels."""
    memory_format: torch.memory_format
    """Memory format of images."""
    dtype: torch.dtype = torch.float32
    """Data type of training images. A source may return float32 instead. Evaluation images are
    always float32."""


class DataSource(Protocol):
    """A data set with splits ``train``, ``val`` and ``test``."""

    info: DataInfo

    def train_batches(
        self, epoch: int, start: int, batch_size: int, views: int, shard: Shard = WHOLE
    ) -> Iterator[Batch]:
        """Yield the shard's part of each full batch of an epoch; an incomplete batch is dropped.

        The order and augmentation of an image do not depend on the shard.

        Args:
            epoch: number of epochs that are completed, 0 in the first epoch.
            start: position in the epoch at which to start, in images of all ranks.
            batch_size: number of images of all ranks.
            views: number of augmentations of each image.
        """

    def eval_batches(self, split: Split, batch_size: int, shard: Shard = WHOLE) -> Iterator[Batch]:
        """Yield the shard's images of a split once, in a fixed order and without augmentation.

        The last batch may have fewer than ``batch_size`` images.
        """


Load = TypeVar("Load", bound=Callable[..., DataSource])
Missing = Callable[[Path], str]


def nothing_missing(root: Path) -> str:
    return ""


@dataclass(frozen=True)
class SourceEntry(Entry):
    """A registered data source, with the facts that ``bdkd data list`` shows."""

    reads: str = ""
    needs_root: bool = False
    missing: Missing = nothing_missing


def register_source(
    name: str, config: type[DataConfig], *, reads: str = "", needs_root: bool = False,
    missing: Missing = nothing_missing,
) -> Callable[[Load], Load]:  # fmt: skip
    """Return a decorator that registers a data source.

    The decorated function (or class) takes a ``config`` and a :class:`SourceContext`, and returns a
    :class:`DataSource`.

    Args:
        name: the value of ``data.source``.
        config: a frozen dataclass with the options of the source, a subclass of
            :class:`bdkd.config.DataConfig`.
        reads: description of the data, for ``bdkd data list``.
        needs_root: whether ``data.root`` must be set.
        missing: function of a folder that is used as ``data.root``. It returns a message that says
            what is missing and how to get it, or an empty string if the source is ready.
    """
    facts = {"reads": reads, "needs_root": needs_root, "missing": missing}
    return SOURCES.decorator(name, config, DataConfig, SourceEntry, **facts)


def mix_seed(*numbers: int) -> int:
    """Return a well-mixed 63-bit seed from several numbers (seed, epoch, position, purpose)."""
    words = np.random.SeedSequence(numbers).generate_state(2, np.uint32)
    return (int(words[0]) << 32 | int(words[1])) & (2**63 - 1)


def epoch_order(seed: int, epoch: int, count: int) -> Tensor:
    """Return the order of an epoch's images, ``(count,)`` int64."""
    generator = torch.Generator().manual_seed(mix_seed(seed, epoch, 0))
    return torch.randperm(count, generator=generator)


def stratified_split(labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices of the remaining images and of a held-out share of each class.

    Classes with two or more images have at least one image in each of the two parts.

    Args:
        labels: ``(N,)`` integers.
        share: fraction to hold out; 0 holds out no image.
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
    """Return the indices of ``count`` images with the class proportions of ``labels``.

    With the same seed, a smaller subset is contained in a larger one.

    Args:
        labels: ``(N,)`` integers.
        count: at most N.
    """
    rng = np.random.default_rng(seed)
    depth = np.empty(len(labels))  # relative position of an image in its class, in (0, 1)
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        depth[members] = (np.arange(len(members)) + 0.5) / len(members)
    return np.sort(np.argsort(depth, kind="stable")[:count])
