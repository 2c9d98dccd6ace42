"""Image files into one array, all of one size, for sets that are kept in memory."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bdkd.errors import RunError


def read_images(paths: Sequence[Path], size: int) -> Tensor:
    """RGB pixels ``(N, 3, size, size)`` uint8, channels-last; other sizes and shapes are resized.

    Raises:
        RunError: Pillow is missing, a file is no whole image, or there are too many for the memory.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise RunError("image files need Pillow: pip install 'bdkd[imagenet]'") from error
    try:
        pixels = np.empty((len(paths), size, size, 3), np.uint8)
    except MemoryError as error:
        raise RunError(
            f"{len(paths):,} images of {size}x{size} do not fit into memory, where this source "
            "keeps them: lower data.image_size"
        ) from error

    def read(index: int) -> None:
        path = paths[index]
        try:
            with Image.open(path) as image:
                whole = image.convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise RunError(f"cannot read the image {path}: {error}; mend or remove it") from error
        if whole.size != (size, size):
            whole = whole.resize((size, size))
        pixels[index] = np.asarray(whole)

    # Pillow lets go of the interpreter while it decodes.
    pool = ThreadPoolExecutor(min(16, os.cpu_count() or 1))
    try:
        for _ in pool.map(read, range(len(paths))):
            pass  # raises what its reading raised
    finally:
        pool.shutdown(cancel_futures=True)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)
