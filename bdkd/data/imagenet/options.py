"""Options of the data sources imagenet and images, which decode each batch when it is needed."""

from dataclasses import dataclass
from typing import Annotated, Literal

from bdkd.config import Bounds, NotNegative, Share
from bdkd.data.base import ImagesConfig
from bdkd.errors import UsageError


@dataclass(frozen=True)
class DecodedImagesConfig(ImagesConfig):
    """Options of the sources whose images are decoded batch by batch."""

    loader: Literal["auto", "dali", "pillow"] = "auto"
    """Decode with NVIDIA DALI or with Pillow. auto: DALI if it is installed."""
    workers: NotNegative[int] | None = None
    """Number of decoding threads (dali) or processes (pillow) of each rank. Default: one for each
    processor of the rank. 0: pillow decodes in the training process."""
    exclude: str | None = None
    """File with a list of images to leave out. bdkd data check writes such a file."""
    smallest_crop: Annotated[float, Bounds(gt=0, le=1)] = 0.08
    """Smallest area of a random crop, as a share of the image's area."""
    progressive: tuple[tuple[int, int], ...] = ()
    """Training resolution by epoch, as pairs of a number of completed epochs and a side in pixels.
    Example: 0 160 5 224 trains 5 epochs at 160 pixels, and then at 224. Default: data.image_size.
    Evaluation always uses data.image_size."""
    rand_augment: tuple[int, int] | None = None
    """Number of RandAugment operations per image, and their magnitude in [0, 10]. Default: off."""
    erasing: Share = 0.0
    """Probability that a random rectangle of a training image is erased."""
    mixup: NotNegative[float] = 0.0
    """Alpha of mixup, which blends each image and its label with those of the next image. 0: off.
    """
    cutmix: NotNegative[float] = 0.0
    """Alpha of CutMix, which pastes a part of the next image into each image. 0: off. If mixup is
    on too, one of the two is applied to each image, at random."""

    def check(self) -> None:
        epochs = [epoch for epoch, _ in self.progressive]
        ascending = epochs == sorted(set(epochs)) and all(epoch >= 0 for epoch in epochs)
        if not ascending or not all(8 <= side <= 4096 for _, side in self.progressive):
            raise UsageError(
                "data.progressive must be pairs of a number of completed epochs, ascending from "
                f"0 or more, and a side in [8, 4096], got {self.progressive}"
            )
        operations, magnitude = self.rand_augment or (1, 0)
        if operations < 1 or not 0 <= magnitude <= 10:
            raise UsageError(
                "data.rand_augment must be a number of operations of at least 1, and a magnitude "
                f"in [0, 10], got {self.rand_augment}"
            )

    def training_sizes(self) -> set[int | None]:
        return {self.image_size} | {side for _, side in self.progressive}


@dataclass(frozen=True)
class ImageNetConfig(DecodedImagesConfig):
    """Options of the source imagenet."""

    format: Literal["folder", "webdataset", "tfrecord"] = "folder"
    """Format of the data set. folder: image files in train/<wnid>. webdataset: tar shards.
    tfrecord: TFRecords."""
