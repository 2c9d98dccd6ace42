"""What a decoder is asked for, and what both decoders share."""

import os
from collections.abc import Generator, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
from torch import Tensor

from bdkd.data.decode import UndecodableError, decode_rgb
from bdkd.data.imagenet.index import Item
from bdkd.data.imagenet.windows import Window, central_window, training_window
from bdkd.errors import RunError

if TYPE_CHECKING:
    from PIL import Image


class Request(NamedTuple):
    """The images of a batch, and how they are to be cut."""

    items: Sequence[Item]  # B
    side: int  # pixels, of the square that a network sees
    drawn: np.ndarray | None  # (B, DRAWS) uniform numbers; None: evaluation
    smallest_crop: float
    flip: bool

    def window(self, i: int, height: int, width: int) -> Window:
        """What is cut out of the ``i``-th image, which has this size."""
        if self.drawn is None:
            return central_window(height, width, self.side)
        return training_window(
            height, width, self.side, self.drawn[i], self.smallest_crop, self.flip
        )


class Loader(Protocol):
    """Decodes batches ahead of their use."""

    def batches(
        self, requests: Iterator[Request], largest: int, raw: bool
    ) -> Generator[Tensor, None, None]:
        """A tensor ``(B, 3, side, side)`` on the device for each request, of at most ``largest``
        images; normalised, or pixels in [0, 255] as uint8 where ``raw``.

        Raises:
            RunError: an image cannot be decoded; it is named.
        """
        ...


def decoded(item: Item) -> "Image.Image":
    """Return an image, decoded by Pillow to its last byte, in RGB.

    Raises:
        RunError: the image cannot be decoded; the message names it.
    """
    try:
        return decode_rgb(item.read())
    except UndecodableError as error:
        raise bad_image(item, str(error)) from error


def bad_image(item: Item, reason: str) -> RunError:
    """Return an error that names the image and the remedy."""
    return RunError(
        f"cannot decode the image {item}: {reason}; bdkd data check finds all such files, "
        "data.exclude leaves them out"
    )


def processors() -> int:
    """Processors of this rank: those of the process, shared by the ranks of the machine."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
