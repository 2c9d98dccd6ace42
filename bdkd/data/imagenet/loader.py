"""The interface of the two decoders, DALI and Pillow, and the code that they share."""

import os
from collections.abc import Generator, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
from torch import Tensor

from bdkd.data.decode import UndecodableError, decode_rgb
from bdkd.data.imagenet.crops import Crop, random_resized_crop, resize_and_center_crop
from bdkd.data.imagenet.index import Item
from bdkd.errors import RunError

if TYPE_CHECKING:
    from PIL import Image


class Request(NamedTuple):
    """The images of a batch and the parameters of their crops."""

    items: Sequence[Item]  # B
    side: int  # of the square crop, in pixels
    drawn: np.ndarray | None  # (B, NUM_DRAWS) uniform numbers; None: evaluation
    smallest_crop: float
    flip: bool

    def crop(self, i: int, height: int, width: int) -> Crop:
        """Return the crop of the ``i``-th image, which has this size."""
        sizes = (height, width, self.side)
        if self.drawn is None:
            return resize_and_center_crop(*sizes)
        return random_resized_crop(*sizes, self.drawn[i], self.smallest_crop, self.flip)


class Loader(Protocol):
    """Decodes batches before they are needed."""

    def batches(
        self, requests: Iterator[Request], largest: int, raw: bool
    ) -> Generator[Tensor, None, None]:
        """Yield a tensor ``(B, 3, side, side)`` on the device for each request.

        Args:
            largest: the largest batch size.
            raw: yield uint8 pixels in [0, 255] instead of normalised images.

        Raises:
            RunError: an image cannot be decoded; the message names it.
        """


def decoded(item: Item) -> "Image.Image":
    """Return an image decoded by Pillow, or raise ``RunError`` with the name of the image."""
    try:
        return decode_rgb(item.read())
    except UndecodableError as error:
        raise bad_image(item, str(error)) from error


def bad_image(item: Item, reason: str) -> RunError:
    """Return an error that names the image and the remedy."""
    return RunError(
        f"cannot decode the image {item}: {reason}; replace it with a readable image, or run bdkd "
        "data check to list all such files, and pass the list as data.exclude to a new run"
    )


def processors() -> int:
    """Return the number of processors per rank on this machine."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
