"""The source for ImageNet and for other data sets whose images are decoded batch by batch."""

from collections.abc import Callable, Iterator
from contextlib import closing

import numpy as np
import torch
from torch import Tensor

from bdkd.data.base import (
    WHOLE,
    Batch,
    DataInfo,
    Normalisation,
    Shard,
    SourceContext,
    Split,
    epoch_order,
)
from bdkd.data.digest import Digests
from bdkd.data.imagenet import mixing
from bdkd.data.imagenet.counter_rng import uniform_draws
from bdkd.data.imagenet.crops import NUM_DRAWS
from bdkd.data.imagenet.index import Index
from bdkd.data.imagenet.loader import Loader, Request
from bdkd.data.imagenet.options import DecodedImagesConfig
from bdkd.data.imagenet.rand_augment import draw_operations, rand_augment

SIDE = 224
# The statistics of ImageNet's training images that torchvision and timm use, in pixel values.
MEAN = (0.485 * 255, 0.456 * 255, 0.406 * 255)
STD = (0.229 * 255, 0.224 * 255, 0.225 * 255)

CROP, OPERATIONS, ERASING = range(3)  # separate streams of random numbers, see uniform_draws()

MakeLoader = Callable[[torch.device, torch.dtype, Tensor, Tensor], Loader]


class ImageNet:
    """Implements :class:`bdkd.data.DataSource` for images that do not fit into memory.

    Training images are cropped, flipped, augmented and mixed. Evaluation images are resized and
    center-cropped.

    Args:
        splits: ``train``, ``val`` and ``test``.
        context: its ``dtype`` is that of training images; evaluation images are float32.
        digests: digests of the data set before it was split.
    """

    def __init__(
        self, splits: dict[Split, Index], classes: tuple[str, ...], config: DecodedImagesConfig,
        context: SourceContext, make_loader: MakeLoader, digests: Digests,
    ) -> None:  # fmt: skip
        self.splits, self.config = splits, config
        self.seed, self.device, self.memory_format, self.dtype = context
        device, dtype = self.device, self.dtype
        self.mixes = config.mixup > 0 or config.cutmix > 0
        self.mean = torch.tensor(MEAN, device=device).view(1, 3, 1, 1)
        self.std = torch.tensor(STD, device=device).view(1, 3, 1, 1)
        self.training = make_loader(device, dtype, self.mean, self.std)
        self.evaluation = make_loader(device, torch.float32, self.mean, self.std)
        side = config.image_size or SIDE
        counts: dict[Split, int] = {split: len(index) for split, index in splits.items()}
        self.info = DataInfo(
            config.source, classes, 3, (side, side), counts, Normalisation(MEAN, STD, 255.0),
            digests={split: digest.sha256 for split, digest in digests.items()},
            files={split: digest.images for split, digest in digests.items()},
        )  # fmt: skip

    def side(self, epoch: int) -> int:
        """Return the training resolution of an epoch in pixels."""
        steps = [side for first, side in self.config.progressive if first <= epoch]
        return steps[-1] if steps else self.info.image_size[0]

    def train_batches(
        self, epoch: int, start: int, batch_size: int, views: int, shard: Shard = WHOLE
    ) -> Iterator[Batch]:
        images, side, mine = self.splits["train"], self.side(epoch), shard.of_batch(batch_size)
        if self.mixes:
            mixing.check_neighbours(batch_size, mine)
        order = epoch_order(self.seed, epoch, len(images)).numpy()
        positions = range(start, len(order) - batch_size + 1, batch_size)
        within_batch = np.arange(batch_size)[mine]

        def requests() -> Iterator[Request]:
            for position in positions:
                places = position + within_batch
                items = [images.item(i) for i in order[places]]
                drawn = [
                    uniform_draws(self.seed, epoch, (CROP, view), places, NUM_DRAWS)
                    for view in range(views)
                ]
                yield Request(
                    items * views, side, np.concatenate(drawn),
                    self.config.smallest_crop, self.config.flip,
                )  # fmt: skip

        raw = self.config.rand_augment is not None
        largest = views * (mine.stop - mine.start)
        with closing(self.training.batches(requests(), largest, raw)) as decoded:
            for position, pixels in zip(positions, decoded, strict=True):
                places = position + within_batch
                augmented = [
                    self._augmented(view, epoch, number, places)
                    for number, view in enumerate(pixels.chunk(views))
                ]
                labels = self._to_device(images.labels[order[places]])
                if self.mixes:
                    drawn = mixing.draw_mix(
                        self.config, self.seed, epoch, position, batch_size, side
                    )
                    mix = [self._to_device(part[mine]) for part in drawn]
                    augmented = [self._layout(mixing.mix_images(view, *mix)) for view in augmented]
                    labels = mixing.mix_labels(labels, mix[0], self.info.num_classes)
                yield Batch(tuple(augmented), labels)

    def eval_batches(self, split: Split, batch_size: int, shard: Shard = WHOLE) -> Iterator[Batch]:
        images = self.splits[split]
        mine = np.arange(len(images))[shard.of_split(len(images))]
        parts = [mine[first : first + batch_size] for first in range(0, len(mine), batch_size)]

        def requests() -> Iterator[Request]:
            for part in parts:
                items = [images.item(i) for i in part]
                yield Request(items, self.info.image_size[0], None, 1.0, False)

        with closing(self.evaluation.batches(requests(), batch_size, False)) as decoded:
            for part, pixels in zip(parts, decoded, strict=True):
                yield Batch((self._layout(pixels),), self._to_device(images.labels[part]))

    def _augmented(self, images: Tensor, epoch: int, view: int, places: np.ndarray) -> Tensor:
        """Apply RandAugment (to pixels) and random erasing to one view (B, 3, side, side)."""
        if self.config.rand_augment is not None:
            count, magnitude = self.config.rand_augment
            drawn = uniform_draws(self.seed, epoch, (OPERATIONS, view), places, 2 * count)
            images = rand_augment(images.float(), draw_operations(drawn, count), magnitude)
            images = images.sub_(self.mean).div_(self.std).to(self.dtype)
        if self.config.erasing:
            count = mixing.NUM_ERASING_DRAWS
            drawn = uniform_draws(self.seed, epoch, (ERASING, view), places, count)
            boxes = mixing.erasing_boxes(self.config.erasing, drawn, images.shape[-1])
            images = mixing.erase(images, self._to_device(boxes))
        return self._layout(images)

    def _layout(self, images: Tensor) -> Tensor:
        return images.contiguous(memory_format=self.memory_format)

    def _to_device(self, array: np.ndarray) -> Tensor:
        """Copy to the device without synchronizing with it."""
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)
