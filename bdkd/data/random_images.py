"""Random images that are on the device already, to measure training without files or a loader.

They replace the data set of a recipe, with the same image size and number of classes. The source
``synthetic`` has random images that a network can learn.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from bdkd.config import DataConfig
from bdkd.data import cifar, fashion_mnist, glyphs, synthetic, tiny_imagenet
from bdkd.data.base import WHOLE, Batch, DataInfo, Shard, SourceContext, Split
from bdkd.data.imagenet import source as imagenet
from bdkd.errors import UsageError


class Shape(NamedTuple):
    """The images of a data source."""

    classes: int | None  # None: depends on the files
    channels: int
    side: int | None  # in pixels, without data.image_size; None: unknown


SHAPES = {
    "digits": Shape(10, 1, 8),
    "cifar10": Shape(10, 3, cifar.SIDE),
    "cifar100": Shape(100, 3, cifar.SIDE),
    "tiny-imagenet": Shape(200, 3, tiny_imagenet.SIDE),
    "imagenet": Shape(1000, 3, imagenet.SIDE),
    "fashion-mnist": Shape(10, 1, fashion_mnist.SIDE),
    "glyphs": Shape(None, 1, glyphs.SIDE),
    "synthetic": Shape(None, synthetic.CHANNELS, synthetic.SIDE),
    "folder": Shape(None, 3, None),
    "images": Shape(None, 3, None),
}


def create_random_images(
    config: DataConfig, classes: int | None, batch_size: int, context: SourceContext
) -> "RandomImages":
    """Create random images like those of the data source that a recipe names.

    Args:
        classes: number of classes. Default: that of the data source.
        batch_size: number of images, which is also the length of an epoch.

    Raises:
        UsageError: the number of classes or the size of the images is unknown.
    """
    options: Any = config
    shape = SHAPES.get(config.source, Shape(None, 3, None))
    named = [getattr(options, option, None) for option in ("classes", "characters")]
    classes = classes or shape.classes or next(filter(None, named), None)
    if not isinstance(classes, int):
        raise UsageError(
            f"the number of classes of the data source {config.source!r} is unknown without its "
            "data: pass --classes N"
        )
    side = config.image_size or shape.side
    if side is None:
        raise UsageError(
            f"the image size of the data source {config.source!r} is unknown without its data: "
            "pass --data.image-size N"
        )
    counts: dict[Split, int] = {"train": batch_size, "val": 0, "test": batch_size}
    names = tuple(map(str, range(classes)))
    info = DataInfo("random images", names, shape.channels, (side, side), counts)
    mixes = getattr(options, "mixup", 0) or getattr(options, "cutmix", 0)
    return RandomImages(info, context, soft_labels=bool(mixes))


class RandomImages:
    """Implements :class:`bdkd.data.DataSource`. Batches with the same shapes and types are the same
    tensors."""

    def __init__(self, info: DataInfo, context: SourceContext, soft_labels: bool) -> None:
        self.info, self.context, self.soft_labels = info, context, soft_labels
        self._made: dict[tuple[int, int, torch.dtype, bool], Batch] = {}

    def train_batches(
        self, epoch: int, start: int, batch_size: int, views: int, shard: Shard = WHOLE
    ) -> Iterator[Batch]:
        part = shard.of_batch(batch_size)
        yield self._batch(part.stop - part.start, views, self.context.dtype, self.soft_labels)

    def eval_batches(self, split: Split, batch_size: int, shard: Shard = WHOLE) -> Iterator[Batch]:
        count = len(range(self.info.counts[split])[shard.of_split(self.info.counts[split])])
        if count:
            yield self._batch(min(count, batch_size), 1, torch.float32, False)

    def _batch(self, count: int, views: int, dtype: torch.dtype, soft: bool) -> Batch:
        key = count, views, dtype, soft
        if key not in self._made:
            _, device, memory_format, _ = self.context
            shape = count, self.info.channels, *self.info.image_size
            images = tuple(
                torch.randn(shape, device=device).to(dtype, memory_format=memory_format)
                for _ in range(views)
            )
            classes = self.info.num_classes
            target = torch.randint(classes, (count,), device=device)
            if soft:
                target = torch.rand(count, classes, device=device).softmax(-1)
            self._made[key] = Batch(images, target)
        return self._made[key]
