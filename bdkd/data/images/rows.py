"""Find the bytes of each image in Arrow files, without reading them.

``datasets`` stores a data set in Arrow files (the streaming format), whose columns are not
compressed. An array of a memory-mapped file points into the mapped memory, so the difference of the
two addresses is the position of the array in the file. Images are then read from their positions,
like members of a tar file.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from bdkd.data.imagenet.index import WHOLE_FILE
from bdkd.errors import RunError


class Rows(NamedTuple):
    """The rows of a split, in the order of its files."""

    files: tuple[str, ...]
    file: np.ndarray  # (N,) int32, indices into files
    offsets: np.ndarray  # (N,) int64
    sizes: np.ndarray  # (N,) int64, or WHOLE_FILE for a path
    labels: list[Any]  # None: no label


def read_rows(files: Sequence[str], image: str, label: str, where: str) -> Rows:
    """Return the position of each image and the label of each row.

    Args:
        image: column of images: ``{bytes, path}``, bytes, or paths.
        label: column of numbers or strings.
        where: name of the split in messages.

    Raises:
        RunError: a file cannot be read, or a row has no image.
    """
    import pyarrow as pa

    every_file = list(files)
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    labels: list[Any] = []
    for number, name in enumerate(files):
        try:
            with pa.memory_map(name) as mapped:
                base, size = mapped.read_buffer(mapped.size()).address, mapped.size()
                mapped.seek(0)
                for batch in pa.ipc.open_stream(mapped):
                    images = batch.column(image)
                    places = _places(images, base, size, number, where)
                    outside = np.flatnonzero(places[2] == WHOLE_FILE)
                    paths = _paths(images, where, outside, len(labels))
                    places[0][outside] = np.arange(len(paths)) + len(every_file)
                    every_file += paths
                    parts.append(places)
                    labels += batch.column(label).to_pylist()
        except (OSError, pa.ArrowException) as error:
            raise RunError(f"cannot read {name} of {where}: {error}") from error
    if not parts:
        raise RunError(f"{where} holds no rows: choose another data set")
    file, offsets, sizes = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Rows(tuple(every_file), file, offsets, sizes, labels)


def _places(
    images: Any, base: int, size: int, number: int, where: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (file, offset, size) of each image of a column of a batch."""
    import pyarrow as pa

    count, kind = len(images), images.type
    files = np.full(count, number, np.int32)
    offsets, sizes = np.zeros(count, np.int64), np.full(count, WHOLE_FILE, np.int64)
    content = images
    if pa.types.is_struct(kind):
        if kind.get_field_index("bytes") < 0:
            return files, offsets, sizes
        content = images.field("bytes")
    if not (pa.types.is_binary(content.type) or pa.types.is_large_binary(content.type)):
        return files, offsets, sizes
    width = np.int64 if pa.types.is_large_binary(content.type) else np.int32
    _, ends, data = content.buffers()
    start = data.address - base if data is not None and data.size else 0
    if not 0 <= start <= size:  # not in the mapped memory: a compressed column is decompressed
        raise RunError(
            f"the Arrow files of {where} are compressed: load them with datasets and save them "
            "with save_to_disk"
        )
    ends = np.frombuffer(ends, width)[content.offset : content.offset + count + 1].astype(np.int64)
    present = np.asarray(content.is_valid()) & np.asarray(images.is_valid())
    offsets[present] = start + ends[:-1][present]
    sizes[present] = np.diff(ends)[present]
    return files, offsets, sizes


def _paths(images: Any, where: str, rows: np.ndarray, first: int) -> list[str]:
    """Return the paths of the images that are not in the Arrow file.

    Args:
        rows: ``(M,)`` indices into the column ``images`` of a batch.
        first: number of the batch's first row, for messages.
    """
    import pyarrow as pa

    if not len(rows):
        return []
    if pa.types.is_struct(images.type):
        known = images.type.get_field_index("path") >= 0
        images = images.field("path") if known else pa.nulls(len(images), pa.string())
    paths = []
    for row, path in zip(rows.tolist(), images.take(pa.array(rows)).to_pylist(), strict=True):
        if not path or not isinstance(path, str):
            raise RunError(
                f"row {first + row} of {where} has no image: remove such rows from the data set"
            )
        if "://" in path:
            raise RunError(
                f"row {first + row} of {where} is at {path[:100]}, but only local files and images "
                "inside the data set can be read: load the data set with datasets and save it with "
                "save_to_disk"
            )
        paths.append(path)
    return paths
