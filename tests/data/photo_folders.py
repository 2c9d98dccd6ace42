"""Small folders of real JPEG files, and the sources that read them."""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from bdkd.data import create_source
from bdkd.registry import SOURCES


def jpeg(number: int, size: tuple[int, int] = (40, 30)) -> bytes:
    """Return a JPEG whose pixels differ for each number."""
    pixels = np.random.default_rng(number).integers(0, 256, (*reversed(size), 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG")
    return stream.getvalue()


def make_photos(root: Path, size: tuple[int, int] = (40, 30), **counts: int) -> Path:
    """Write images into class folders, by number: ``make_photos(root, cat=3, dog=4)``."""
    for label, (name, count) in enumerate(counts.items()):
        folder = root / name
        folder.mkdir(parents=True)
        for number in range(count):
            content = jpeg(1000 * label + number, size)
            (folder / f"{number:03d}.jpg").write_bytes(content)
    return root


def open_source(source: str, root: object, seed: int = 0, **options: object):
    if source == "images":
        options = {"workers": 0, "loader": "pillow", **options}
    config = SOURCES.configure(source, root=root and str(root), **options)
    return create_source(config, seed, torch.device("cpu"), torch.contiguous_format)


def files_of(source, split: str) -> list[str]:
    """Return the identities of the images in a split of the source ``images``."""
    index = source.splits[split]
    return [index.identity(i) for i in range(len(index))]
