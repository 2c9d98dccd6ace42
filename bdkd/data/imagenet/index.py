"""The position of each image of a split: its own file, or a part of a tar or TFRecord file.

All formats have the same index, so order, augmentation and resuming do not depend on the format.
"""

import os
from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bdkd.data.decode import check_file_size
from bdkd.data.digest import Digest, digest_names
from bdkd.data.listing import read_lines
from bdkd.errors import RunError

WHOLE_FILE = -1
ESCAPES = {ord("\t"): "\\t", ord("\n"): "\\n", ord("\r"): "\\r"}  # for names in data.exclude


class Item(NamedTuple):
    """The position of one image's bytes, as sent to worker processes."""

    path: str
    member: str  # name within an archive; empty for an image file
    offset: int
    size: int  # bytes, or WHOLE_FILE

    def __str__(self) -> str:
        return f"{self.path} ({self.member})" if self.member else self.path

    def read(self) -> bytes:
        """Return the encoded image.

        Raises:
            RunError: it cannot be read completely.
            UndecodableError: it is too large.
        """
        try:
            with open(self.path, "rb", buffering=0) as file:
                size = self.size
                size = os.fstat(file.fileno()).st_size if size == WHOLE_FILE else size
                check_file_size(size)
                if self.size == WHOLE_FILE:
                    return file.readall()
                content = os.pread(file.fileno(), self.size, self.offset)
        except OSError as error:
            raise RunError(f"cannot read the image {self}: {error.strerror}") from error
        if len(content) < self.size:
            raise RunError(f"cannot read the image {self}: the file was cut short; fetch it again")
        return content


@dataclass(frozen=True)
class Index:
    """The images of a split, in flat arrays because ImageNet has 1.3 million images."""

    root: Path
    containers: tuple[str, ...]  # folders of image files, or archives, below the root
    container: np.ndarray  # (N,) int32, indices into containers
    names: np.ndarray  # (N,) bytes: file in the folder, or member of the archive
    labels: np.ndarray  # (N,) int64
    offsets: np.ndarray | None = None  # (N,) int64; None: image files
    sizes: np.ndarray | None = None  # (N,) int64
    # Only for the rows of tables: the file of each container. The name of a container is then the
    # name of its split, and the name of an image is the number of its row. If the size of an image
    # is WHOLE_FILE, the image has its own file.
    files: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def item(self, i: int) -> Item:
        container, name = self._place(i)
        if self.files is not None and self.offsets is not None and self.sizes is not None:
            place = int(self.offsets[i]), int(self.sizes[i])
            return Item(self.files[self.container[i]], f"{container}, row {name}", *place)
        path = os.path.join(self.root, container)
        if self.offsets is None or self.sizes is None:
            return Item(os.path.join(path, name), "", 0, WHOLE_FILE)
        return Item(path, name, int(self.offsets[i]), int(self.sizes[i]))

    def identity(self, i: int) -> str:
        """Return the name of an image in ``data.exclude``: one line, relative to the root."""
        container, name = self._place(i)
        between = "/" if self.offsets is None else "#"
        return f"{container}{between}{name}".translate(ESCAPES)

    def _place(self, i: int) -> tuple[str, str]:
        return self.containers[self.container[i]], os.fsdecode(bytes(self.names[i]))

    def digest(self, classes: Sequence[str]) -> Digest:
        """Return the digest of the images; labels are indices into ``classes``. For rows of tables,
        the digest covers the sizes of the images too, because their names are only numbers."""
        names = self.names.tolist()
        if self.files is not None and self.sizes is not None:
            names = [b"%b %d" % row for row in zip(names, self.sizes.tolist(), strict=True)]
        return digest_names(classes, self.labels, self.containers, self.container, names)

    def take(self, chosen: np.ndarray, labels: np.ndarray | None = None) -> "Index":
        """Return the images at the indices ``chosen`` (M,), with ``labels`` (M,) if given."""
        return replace(
            self,
            container=self.container[chosen],
            names=self.names[chosen],
            labels=self.labels[chosen] if labels is None else labels,
            offsets=None if self.offsets is None else self.offsets[chosen],
            sizes=None if self.sizes is None else self.sizes[chosen],
        )

    def join(self, other: "Index") -> "Index":
        """Return these images followed by those of an index of the same kind."""

        def joined(column: str) -> Any:
            parts = [getattr(index, column) for index in (self, other)]
            return None if parts[0] is None else np.concatenate(parts)

        columns = {name: joined(name) for name in ("names", "labels", "offsets", "sizes")}
        moved = other.container + len(self.containers)
        return replace(
            self,
            containers=self.containers + other.containers,
            container=np.concatenate([self.container, moved]),
            files=None if self.files is None else self.files + (other.files or ()),
            **columns,
        )

    def find(self, identities: Container[str]) -> np.ndarray:
        """Return a mask of the images that are listed, ``(N,)`` bool."""
        return np.array([self.identity(i) in identities for i in range(len(self))], bool)


def names_array(names: Sequence[str]) -> np.ndarray:
    """Return names as fixed-length bytes, which need a fifth of the memory of strings."""
    return np.array([os.fsencode(name) for name in names] or [b""], np.bytes_)[: len(names)]


def read_exclusions(path: Path) -> list[str]:
    """Return the image identities in a list that ``bdkd data check`` wrote.

    Each line has an identity, a tab and a reason. Empty lines and lines that start with ``#`` are
    skipped.
    """
    lines = read_lines(path, "data.exclude, ", "surrogateescape", pipe=True)
    return [line.split("\t", 1)[0] for line in lines if line.strip() and not line.startswith("#")]


def spellings(line: str) -> tuple[str, str]:
    """Return the line itself, and the line as a POSIX path without a leading ``./``."""
    return line, line.strip().replace("\\", "/").removeprefix("./")
