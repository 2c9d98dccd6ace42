"""Fashion-MNIST from its original IDX files: 28x28 grey images of clothes in ten classes.

Source: Xiao, Rasul and Vollgraf, arXiv 1708.07747. On Debian, ``apt install dataset-fashion-mnist``
installs the files.
"""

import gzip
import hashlib
import zlib
from pathlib import Path

import numpy as np
import torch

from bdkd.data.base import SourceContext, register_source
from bdkd.data.fetch import FILE_SETS
from bdkd.data.in_memory import Images, InMemory, InMemoryConfig
from bdkd.data.splits import in_memory_source
from bdkd.errors import RunError, reason_of
from bdkd.text import expand_user, open_regular

SOURCE = "fashion-mnist"
PACKAGE_FOLDER = Path("/usr/share/datasets/fashion-mnist")
CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag",
    "Ankle boot",
)  # fmt: skip
SIDE = 28
# SHA-256 of the unpacked files
SHA256 = {file.file.removesuffix(".gz"): file.sha256 for file in FILE_SETS[SOURCE].files}
PARTS = {"train": ("train", 60_000), "test": ("t10k", 10_000)}  # split -> prefix, images
REMEDY = (
    "install Debian's package dataset-fashion-mnist, or run bdkd data fetch fashion-mnist --to DIR "
    "and pass --data.root DIR"
)


def _missing(root: Path) -> str:
    folder = _folder_with_files(root) or _folder_with_files(PACKAGE_FOLDER)
    if folder is None:
        return f"no {_names('train')[0]} in {root} or {PACKAGE_FOLDER}: {REMEDY}"
    absent = [name for split in PARTS for name in _names(split) if not _is_there(folder, name)]
    return f"no {absent[0]} in {folder}: {REMEDY}" if absent else ""


@register_source(
    SOURCE, InMemoryConfig, reads="the original IDX files: 70,000 grey images of 28x28, 10 classes",
    missing=_missing,
)  # fmt: skip
def load(config: InMemoryConfig, context: SourceContext) -> InMemory:
    """Load 60,000 training and 10,000 test images from ``data.root`` or its subfolder
    ``fashion-mnist``, or by default from the folder of Debian's package."""
    root = PACKAGE_FOLDER if config.root is None else expand_user(config.root, "data.root")
    folder = _folder_with_files(root)
    if folder is None:
        raise RunError(f"no data set fashion-mnist at {root}: {REMEDY}")
    training, test = (_images(folder, split) for split in ("train", "test"))
    return in_memory_source(training, test, CLASSES, config, context)


def _names(split: str) -> tuple[str, str]:
    prefix, _ = PARTS[split]
    return f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte"


def _is_there(folder: Path, name: str) -> bool:
    """Return whether a folder holds a file, compressed or not."""
    return any((folder / (name + suffix)).is_file() for suffix in ("", ".gz"))


def _folder_with_files(root: Path) -> Path | None:
    for folder in (root, root / SOURCE):
        if _is_there(folder, _names("train")[0]):
            return folder
    return None


def _images(folder: Path, split: str) -> Images:
    count = PARTS[split][1]
    images, labels = _names(split)
    pixels = _read_idx(folder, images, (count, SIDE, SIDE))
    classes = _read_idx(folder, labels, (count,))
    return Images(torch.from_numpy(pixels)[:, None], torch.from_numpy(classes).long())


def _read_idx(folder: Path, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return the values of an IDX file, which may be compressed with gzip.

    The file consists of two zero bytes, the type 8 (unsigned bytes), the number of dimensions, each
    dimension as a big-endian 32-bit integer, and the values.
    """
    path = folder / name
    if not path.is_file():
        path = folder / f"{name}.gz"
    header = bytes((0, 0, 8, len(shape))) + np.array(shape, dtype=">u4").tobytes()
    expected = len(header) + int(np.prod(shape))
    try:
        with open_regular(path) as file, gzip.GzipFile(fileobj=file) as unpacked:
            stream = unpacked if path.suffix == ".gz" else file
            content = stream.read(expected + 1)  # one more, to detect a longer file
    except (OSError, EOFError, zlib.error) as error:
        if isinstance(error, OSError) and error.errno:
            raise RunError(f"cannot read {path}: {reason_of(error)}; {REMEDY}") from error
        raise RunError(f"{path} is damaged or incomplete ({error}): {REMEDY}") from error
    if not content.startswith(header) or len(content) != expected:
        needed = f"an IDX file of {' x '.join(map(str, shape))} bytes"
        raise RunError(f"{path} is not {needed}: it is not the original file; {REMEDY}")
    # MNIST and Kuzushiji-MNIST have files of the same names and shapes.
    if hashlib.sha256(content).hexdigest() != SHA256[name]:
        raise RunError(
            f"{path} has the size of the original file but different content (is it MNIST?): "
            f"{REMEDY}"
        )
    return np.frombuffer(content, np.uint8, offset=len(header)).reshape(shape).copy()
