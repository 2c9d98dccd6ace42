"""Decode images to 8-bit RGB. Every source and loader uses this module."""

import io
import os
import struct
import threading
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from bdkd.data.image_warnings import shown
from bdkd.errors import RunError, reason_of

if TYPE_CHECKING:
    from PIL import Image

# The format is detected from the content, not from the suffix. The list omits formats whose Pillow
# plug-ins start another program (EPS) and formats that are not photographs.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF", "GIF", "JPEG2000", "AVIF")
PNG = b"\x89PNG\r\n\x1a\n"
LARGEST = 2 * 89_478_485  # pixels; Pillow refuses more (Image.MAX_IMAGE_PIXELS)
LARGEST_FILE = 4 * LARGEST + (1 << 20)  # bytes of LARGEST pixels without compression
# Images with more pixels are decoded one after the other, because each takes up to 1.2 GB and there
# are up to 16 threads.
LARGE = 1 << 24
# Modes that convert to 8-bit RGB. As in DALI and torchvision, transparency is dropped and EXIF
# orientation is ignored.
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")

_one_large_image = threading.Lock()


class UndecodableError(Exception):
    """An image cannot be decoded. The message is the reason, in one line."""


def require_pillow() -> None:
    """Raise ``RunError`` if Pillow is not installed."""
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise RunError("image files need Pillow: pip install 'bdkd[imagenet]'") from error


@contextmanager
def _errors_of_pillow() -> Iterator[None]:
    """Turn the many kinds of errors that Pillow's plug-ins raise for damaged files (struct.error,
    KeyError, ...) into ``UndecodableError``."""
    try:
        yield
    except (MemoryError, UndecodableError):
        raise
    except Exception as error:
        # Remove the address in "cannot identify image file <_io.BytesIO object at 0x...>".
        reason = " ".join(str(error).split(" <_io")[0].split()) or type(error).__name__
        raise UndecodableError(reason) from error


def open_image(content: bytes) -> "Image.Image":
    """Open an encoded image of at most ``LARGEST`` pixels, or raise ``UndecodableError``."""
    from PIL import Image

    if content.startswith(PNG):
        png_is_whole(content)
    Image.init()
    with _errors_of_pillow():
        image = Image.open(io.BytesIO(content), formats=[f for f in FORMATS if f in Image.OPEN])
    if image.width * image.height > LARGEST:
        raise UndecodableError(too_large(image.height, image.width))
    return image


def decode_rgb(content: bytes) -> "Image.Image":
    """Decode a complete image and return it in RGB, or raise ``UndecodableError``."""
    with closing(open_image(content)) as image:
        alone = _one_large_image if image.width * image.height > LARGE else nullcontext()
        with alone, _errors_of_pillow():
            image.load()
            return to_rgb(image)


def to_rgb(image: "Image.Image") -> "Image.Image":
    """Return an image as 8-bit RGB. 16-bit grey values keep their upper byte, as in Pillow's
    conversion of 16-bit colour.

    Raises:
        UndecodableError: the mode (32 bits, floating point) cannot be converted to 8 bits.
    """
    if _is_grey16(image):
        from PIL import Image

        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode not in MODES:
        raise UndecodableError(
            f"a {image.format} of mode {image.mode} has no standard conversion to 8 bits: convert "
            "it to 8-bit grey or RGB"
        )
    image.info.pop("transparency", None)  # avoids a warning of Pillow
    return image.convert("RGB")


def _is_grey16(image: "Image.Image") -> bool:
    """Return whether values are grey from 0 (black) to 65535. Old Pillow opens such PNGs as "I"."""
    if image.format == "TIFF":  # "I;16" is also used for 12-bit and inverted values
        tags = getattr(image, "tag_v2", {})
        return image.mode.startswith("I;16") and tags.get(258) == (16,) and tags.get(262) == 1
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))


def png_is_whole(content: bytes) -> bool:
    """Return whether a PNG has all its chunks, or raise ``UndecodableError`` for a wrong checksum.

    Pillow does not verify the checksums of pixel data.
    """
    position = len(PNG)
    while position + 12 <= len(content):
        end = position + 8 + int.from_bytes(content[position : position + 4], "big")
        kind, checksum = content[position + 4 : position + 8], content[end : end + 4]
        if len(checksum) < 4:
            return False
        if zlib.crc32(memoryview(content)[position + 4 : end]) != int.from_bytes(checksum, "big"):
            name = kind.decode("ascii", "backslashreplace")
            raise UndecodableError(f"the checksum of its {name} chunk is wrong: it is damaged")
        if kind == b"IEND":
            return True
        position = end + 4
    return False


def too_large(height: int, width: int) -> str:
    """Return the message for an image with more than ``LARGEST`` pixels."""
    return f"it has {width}x{height} pixels, more than the limit of {LARGEST:,}"


def check_file_size(size: int) -> None:
    """Raise ``UndecodableError`` if an encoded image has more than ``LARGEST_FILE`` bytes."""
    if size > LARGEST_FILE:
        raise UndecodableError(f"it has {size:,} bytes, more than the limit of {LARGEST_FILE:,}")


def jpeg_frame(content: bytes) -> tuple[int, int, int, int] | None:
    """Return (bits, height, width, components) from the header of a JPEG, or None if the header is
    damaged. This takes a tenth of the time of ``Image.open``."""
    position, frame = 2, None
    while content[:2] == b"\xff\xd8" and position + 10 <= len(content):
        if content[position] != 0xFF:
            return None
        marker = content[position + 1]
        if marker == 0xDA:  # the first scan
            return frame
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # a start of frame
            frame = struct.unpack_from(">BHHB", content, position + 4)
        position += 2 + int.from_bytes(content[position + 2 : position + 4], "big")
    return None


def read_images(paths: Sequence[Path], size: int) -> Tensor:
    """Return RGB pixels ``(N, 3, size, size)`` uint8, channels-last, resized if necessary.

    Raises:
        RunError: Pillow is missing, a file cannot be decoded, or the images exceed the memory.
    """
    require_pillow()
    try:
        pixels = np.empty((len(paths), size, size, 3), np.uint8)
    except MemoryError as error:
        raise RunError(
            f"{len(paths):,} images of {size}x{size} pixels do not fit into memory: lower "
            "data.image_size"
        ) from error

    def read(index: int) -> None:
        path = paths[index]
        try:
            with shown(str(path)):
                check_file_size(path.stat().st_size)
                image = decode_rgb(path.read_bytes())
        except (OSError, UndecodableError) as error:
            why = reason_of(error)
            raise RunError(f"cannot read the image {path}: {why}; replace or remove it") from error
        if image.size != (size, size):
            image = image.resize((size, size))
        pixels[index] = np.asarray(image)

    # Threads suffice: Pillow releases the GIL while it decodes.
    pool = ThreadPoolExecutor(min(16, os.cpu_count() or 1))
    try:
        list(pool.map(read, range(len(paths))))  # raises the first error
    finally:
        pool.shutdown(cancel_futures=True)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)
