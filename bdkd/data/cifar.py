"""CIFAR-10 and CIFAR-100 from their original Python files: 32x32 colour images.

Source: A. Krizhevsky, Learning multiple layers of features from tiny images, 2009.
"""

import gzip
import io
import tarfile
import zlib
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import torch

from bdkd.data import plain_pickle
from bdkd.data.base import SourceContext, register_source
from bdkd.data.fetch import ARCHIVES, missing_archive, required_root, where_to_get
from bdkd.data.in_memory import Images, InMemory, InMemoryConfig
from bdkd.data.splits import in_memory_source
from bdkd.errors import RunError, reason_of
from bdkd.text import open_regular

SIDE = 32
# In bytes. The largest real file is CIFAR-100's "train": 50,000 rows of 3,072 bytes and labels.
LARGEST_FILE = 256 << 20


class Layout(NamedTuple):
    """The file names and pickle keys of a data set."""

    source: str
    train: tuple[str, ...]
    test: str
    meta: str
    labels: str
    names: str


CIFAR10 = Layout(
    "cifar10", tuple(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta",
    "labels", "label_names",
)  # fmt: skip
CIFAR100 = Layout("cifar100", ("train",), "test", "meta", "fine_labels", "fine_label_names")


@register_source(
    "cifar10",
    InMemoryConfig,
    reads="the original Python files: 60,000 images, 10 classes",
    needs_root=True,
    missing=missing_archive("cifar10"),
)
@register_source(
    "cifar100", InMemoryConfig, reads="the original Python files: 60,000 images, 100 classes",
    needs_root=True, missing=missing_archive("cifar100"),
)  # fmt: skip
def load(config: InMemoryConfig, context: SourceContext) -> InMemory:
    """Load 50,000 training and 10,000 test images, with 10 or 100 (fine) classes."""
    layout = {"cifar10": CIFAR10, "cifar100": CIFAR100}[config.source]
    contents = _contents(layout, required_root(config))
    names = contents[layout.meta].get(layout.names)
    if not isinstance(names, list) or len(names) < 2:
        raise _wrong(layout, layout.meta, f"no list {layout.names!r}")
    classes = tuple(n.decode("utf-8", "replace") if isinstance(n, bytes) else str(n) for n in names)
    parts = [_images(layout, contents, name, len(classes)) for name in layout.train]
    training = Images(*map(torch.cat, zip(*parts, strict=True)))
    test = _images(layout, contents, layout.test, len(classes))
    return in_memory_source(training, test, classes, config, context)


def _contents(layout: Layout, root: Path) -> dict[str, dict[str, Any]]:
    """Return the dictionary of each file, from a folder or from the archive."""
    archive = ARCHIVES[layout.source]
    wanted = (layout.meta, *layout.train, layout.test)
    for folder in (root / archive.folder, root):
        if (folder / layout.meta).is_file():
            return {name: _from_file(layout, folder / name) for name in wanted}
    for path in (root / archive.file, root):
        if path.is_file():
            return _from_archive(layout, path, wanted)
    raise RunError(
        f"no data set {layout.source} at {root}: data.root must name {archive.folder}, the folder "
        f"that holds it, or {archive.file}; {where_to_get(layout.source, root)}"
    )


def _from_file(layout: Layout, path: Path) -> dict[str, Any]:
    try:
        with open_regular(path) as stream:
            return plain_pickle.load(stream, str(path))
    except OSError as error:
        raise RunError(
            f"cannot read {path} ({error.strerror}); {where_to_get(layout.source, path.parent)}"
        ) from error


class _Bounded(gzip.GzipFile):
    """Limits each read to ``LARGEST_FILE``, because tarfile reads headers of any declared size."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= LARGEST_FILE:
            raise tarfile.ReadError(f"a part declares {size:,} bytes")
        return super().read(size)


def _from_archive(layout: Layout, path: Path, wanted: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Read the wanted files in archive order: seeking back would decompress everything again."""
    found, where = {}, where_to_get(layout.source, path.parent)
    try:
        with _Bounded(path, "rb") as unpacked, tarfile.open(fileobj=unpacked, mode="r:") as tar:
            for member in tar:
                if member.size > LARGEST_FILE:
                    raise RunError(
                        f"{path} is refused: {member.name} unpacks to {member.size:,} bytes, and "
                        f"no file of {layout.source} has more than {LARGEST_FILE:,}; {where}"
                    )
                name = PurePosixPath(member.name).name
                stream = tar.extractfile(member) if name in wanted else None  # None: not a file
                if stream is not None:
                    content = io.BytesIO(stream.read())  # raises here if the archive is truncated
                    found[name] = plain_pickle.load(content, f"{path}:{member.name}")
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise RunError(f"cannot read {path}: {reason_of(error)}") from error
        raise RunError(f"{path} is damaged or incomplete ({error}): remove it; {where}") from error
    if missing := [name for name in wanted if name not in found]:
        raise RunError(f"{path} is not the archive of {layout.source}: it lacks {missing}; {where}")
    return found


def _images(layout: Layout, contents: dict[str, dict[str, Any]], name: str, classes: int) -> Images:
    """Return the images of one file. Each row of 3,072 bytes is the red plane of an image, followed
    by the green plane and the blue plane."""
    pixels, labels = contents[name].get("data"), contents[name].get(layout.labels)
    if not isinstance(pixels, np.ndarray) or pixels.ndim != 2 or pixels.shape[1] != 3 * SIDE**2:
        raise _wrong(layout, name, f"no rows of {3 * SIDE**2} bytes 'data'")
    if not isinstance(labels, list) or len(labels) != len(pixels) or not all(
        isinstance(label, int) and 0 <= label < classes for label in labels
    ):  # fmt: skip
        content = f"no list {layout.labels!r} with a class from 0 to {classes - 1} for each image"
        raise _wrong(layout, name, content)
    planes = torch.from_numpy(pixels.copy()).view(-1, 3, SIDE, SIDE)
    return Images(planes, torch.tensor(labels, dtype=torch.int64))


def _wrong(layout: Layout, name: str, what: str) -> RunError:
    return RunError(
        f"the file {name} of {layout.source} holds {what}: it is not the original file; "
        f"{where_to_get(layout.source)}"
    )
