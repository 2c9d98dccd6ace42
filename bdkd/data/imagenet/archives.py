"""Index the images in webdataset tar shards and in TFRecord files. Only headers are read.

A shard is a POSIX tar file with members ``KEY.jpg`` and ``KEY.cls`` (the label as text). A TFRecord
file is a sequence of frames (length, checksum, data, checksum); the data is an ``Example`` message
with ``image/encoded`` and ``image/class/label``.
"""

import mmap
import os
import re
import struct
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bdkd.data.imagenet.index import Index, names_array
from bdkd.data.imagenet.index_cache import cached_index
from bdkd.data.listing import is_hidden_member, is_image
from bdkd.errors import RunError, reason_of, shown
from bdkd.text import decode_text

MAX_LABEL_BYTES = 100  # longest content of a member KEY.cls
NUMBER = re.compile(r"[+-]?[0-9]+")
BYTES, INTEGERS = 1, 3  # field numbers of the two kinds of features in a TFRecord
ENCODED, LABEL = b"image/encoded", b"image/class/label"


class ArchivedImage(NamedTuple):
    """The position and label of an image in an archive."""

    name: str
    offset: int
    size: int
    label: int


def index_archives(kind: str, root: Path, archives: list[Path], fresh: bool = False) -> Index:
    """Return the index of every image in the archives of a split.

    The index of unchanged archives is read from a cache unless ``fresh``. For TFRecords, this
    verifies the checksums of lengths only. :func:`damaged_records` verifies those of the data.

    Args:
        kind: ``tar`` or ``tfrecord``.

    Raises:
        RunError: an archive is damaged, an image has no valid label, or google-crc32c is missing.
    """
    return cached_index(kind, root, archives, lambda: _index(kind, root, archives), fresh)


def damaged_records(path: Path) -> dict[str, str]:
    """Return a message for each record whose data do not match the checksum, by record number."""
    return {
        str(number): "the record's data do not match its checksum: fetch the file again"
        for number, content, start, end in _records(path)
        if masked_crc32c(content[start:end]) != int.from_bytes(content[end : end + 4], "little")
    }


def masked_crc32c(content: bytes) -> int:
    """Return the CRC-32C of ``content``, masked as TFRecords store it."""
    try:
        import google_crc32c
    except ImportError as error:
        raise RunError(
            "google-crc32c is not installed; TFRecords need it to verify checksums: "
            "pip install 'bdkd[imagenet]'"
        ) from error
    crc = google_crc32c.value(content)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _index(kind: str, root: Path, archives: list[Path]) -> Index:
    images_of = _images_of_tar if kind == "tar" else _images_of_tfrecord
    # Threads, because most of the time is spent waiting for headers on network storage.
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        found = list(pool.map(lambda path: list(images_of(path)), archives))
    for path, images in zip(archives, found, strict=True):
        if not images:
            raise RunError(f"{path} contains no images: fetch it again, or remove it")
    flat = [image for images in found for image in images]
    if not flat:
        raise RunError(
            f"no image in {archives[0]} and {len(archives) - 1} more archives: fetch them again"
        )
    containers = tuple(str(path.relative_to(root)) for path in archives)
    container = np.repeat(np.arange(len(found), dtype=np.int32), [len(images) for images in found])
    names, offsets, sizes, labels = zip(*flat, strict=True)
    numbers = {"labels": labels, "offsets": offsets, "sizes": sizes}
    columns: dict[str, Any] = {name: np.asarray(n, np.int64) for name, n in numbers.items()}
    return Index(root, containers, container, names_array(names), **columns)


def _images_of_tar(path: Path) -> Iterator[ArchivedImage]:
    images: dict[str, tarfile.TarInfo] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile() or is_hidden_member(member.name):
                    continue
                if member.issparse():  # 512 bytes can declare terabytes of zeros
                    raise RunError(
                        f"{path} is refused: {member.name} is a sparse file: pack it again"
                    )
                # As in webdataset, the key ends at the first dot of the file name.
                folder, slash, file = member.name.rpartition("/")
                key, _, suffix = file.partition(".")
                key = folder + slash + key
                if is_image(f"image.{suffix}") and "." not in suffix:
                    images[key] = member
                elif suffix == "cls":
                    labels[key] = _label(tar, member, path)
    except OSError as error:
        raise RunError(f"cannot read {path}: {reason_of(error)}") from error
    except (EOFError, tarfile.TarError, ValueError) as error:
        raise RunError(
            f"{path} is not a complete webdataset shard ({error}): fetch it again"
        ) from error
    size = path.stat().st_size
    for key, member in images.items():
        if key not in labels:
            raise RunError(f"{path}: the image {member.name} has no label: add a member {key}.cls")
        if member.offset_data + member.size > size:
            raise RunError(f"{path} was cut short: fetch it again")
        yield ArchivedImage(member.name, member.offset_data, member.size, labels[key])


def _label(tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> int:
    """Read the label in a member ``KEY.cls``."""
    stream = tar.extractfile(member)
    assert stream is not None
    content = stream.read(MAX_LABEL_BYTES + 1)
    found: bytes | str = content
    with suppress(RunError):
        found = decode_text(content, member.name).strip()
        is_number = NUMBER.fullmatch(found) and len(content) <= MAX_LABEL_BYTES
        if is_number and abs(label := int(found)) < 2**31:
            return label
    raise RunError(
        f"{path}: the label {member.name} must hold the number of a class, got {shown(found)}"
    )


def _images_of_tfrecord(path: Path) -> Iterator[ArchivedImage]:
    for number, content, start, end in _records(path):
        try:
            encoded, label = _image_and_label(content, start, end)
        except (KeyError, ValueError, IndexError, StopIteration) as error:
            reason = str(error) if type(error) is ValueError else "one is missing or cut off"
            raise RunError(
                f"{path}, record {number}: no Example with image/encoded and image/class/label "
                f"({reason})"
            ) from error
        yield ArchivedImage(str(number), encoded[0], encoded[1] - encoded[0], label)


def _records(path: Path) -> Iterator[tuple[int, mmap.mmap, int, int]]:
    """Iterate over (record number, file content, start and end of the record's data)."""
    if path.stat().st_size == 0:  # an empty file cannot be mapped
        return
    try:
        file = path.open("rb")
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror}") from error
    with file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        position = number = 0
        while position < len(content):
            header = content[position : position + 12]
            start, end = position + 12, len(content)
            if len(header) == 12:
                length, checksum = struct.unpack("<QI", header)
                if masked_crc32c(header[:8]) != checksum:
                    raise RunError(
                        f"{path}, record {number}: the checksum of its length is wrong; the file "
                        "is damaged or not a TFRecord: fetch it again"
                    )
                end = start + length
            position = end + 4
            if position > len(content):
                raise RunError(
                    f"{path} is not a complete TFRecord file (record {number} is cut off): fetch "
                    "it again"
                )
            yield number, content, start, end
            number += 1


def _image_and_label(content: mmap.mmap, start: int, end: int) -> tuple[tuple[int, int], int]:
    """Return (start, end) of the encoded image, and the label, of an Example message.

    The fields of the message, by number, are
    ``{1: features {1: entry {1: name, 2: feature {1: bytes list | 3: integer list {1: value}}}}}``.
    """
    values: dict[bytes, tuple[int, int]] = {}
    for _, features in _fields(content, start, end, 1):
        for _, entry in _fields(content, *features, 1):
            parts = dict(_fields(content, *entry))
            name = content[slice(*parts[1])]
            if name in (ENCODED, LABEL):
                kind, values_list = next(_fields(content, *parts[2]))
                place = next(place for _, place in _fields(content, *values_list, 1))
                if kind != (BYTES if name == ENCODED else INTEGERS):
                    needed = "bytes" if name == ENCODED else "the number of a class"
                    found = shown(content[slice(*place)][:60])
                    raise ValueError(f"{name.decode()} must be {needed}, got {found}")
                values[name] = place
    label, _ = _varint(content, values[LABEL][0])
    return values[ENCODED], label - (label >> 63 << 64)


def _fields(
    content: mmap.mmap, start: int, end: int, only: int | None = None
) -> Iterator[tuple[int, tuple[int, int]]]:
    """Iterate over (field number, (start, end)) of a protocol buffers message."""
    while start < end:
        key, start = _varint(content, start)
        kind = key & 7
        if kind == 2:  # bytes, a message, packed numbers
            length, start = _varint(content, start)
        elif kind == 0:
            length = _varint(content, start)[1] - start
        else:
            length = {1: 8, 5: 4}[kind]
        if start + length > end:
            raise ValueError("a field ends beyond its message")
        if only is None or key >> 3 == only:
            yield key >> 3, (start, start + length)
        start += length


def _varint(content: mmap.mmap, position: int) -> tuple[int, int]:
    """Return the varint at ``position`` (7 bits per byte) and the position after it."""
    value = shift = 0
    while True:
        byte = content[position]
        position += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, position
