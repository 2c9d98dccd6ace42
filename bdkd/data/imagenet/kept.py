"""The index of archives, kept from run to run: of ImageNet, its headers take minutes to read.

It lies in ``$XDG_CACHE_HOME/bdkd`` (``~/.cache/bdkd``), one file a split, and counts for as long as
every archive has the name, the size and the times of writing that it had. Where it cannot be kept,
it is read again.
"""

import hashlib
import os
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np

from bdkd.data.imagenet.index import Index

RULES = "2"  # increase it when other members of an archive count as images
COLUMNS = ("container", "names", "labels", "offsets", "sizes")


def kept(
    kind: str, root: Path, archives: list[Path], make: Callable[[], Index], fresh: bool
) -> Index:
    """The index that ``make`` returns, or returned for the same archives.

    Args:
        fresh: make it in any case.
    """
    names = tuple(str(path.relative_to(root)) for path in archives)
    file = _file(kind, root, names)
    if file is None:
        return make()
    stamps = _stamps(archives)  # before they are read
    if not fresh and (found := _load(file, root, names, stamps)) is not None:
        return found
    index = make()
    _keep(file, index, stamps)
    return index


def _stamps(archives: list[Path]) -> np.ndarray:
    """Size and times of each archive, ``(A, 3)`` int64. The time of its last change of any kind is
    one that no tool sets back."""
    found = [path.stat() for path in archives]
    return np.array([(s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in found], np.int64)


def _file(kind: str, root: Path, names: tuple[str, ...]) -> Path | None:
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if not os.path.isabs(cache):  # a user without a home
        return None
    said = "\0".join([kind, RULES, str(root.resolve()), *names])
    return Path(cache, "bdkd", f"index-{hashlib.sha256(os.fsencode(said)).hexdigest()[:20]}.npz")


def _load(file: Path, root: Path, names: tuple[str, ...], stamps: np.ndarray) -> Index | None:
    try:
        with np.load(file, allow_pickle=False) as found:
            if not np.array_equal(found["stamps"], stamps):
                return None
            return Index(root, names, *(found[column] for column in COLUMNS))
    # Not there, not readable, cut short, of another version: it is made anew.
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _keep(file: Path, index: Index, stamps: np.ndarray) -> None:
    """Whole or not at all; several runs may do this at once."""
    columns = {column: getattr(index, column) for column in COLUMNS}
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("wb") as stream:
            np.savez(stream, stamps=stamps, **columns)
        beside.replace(file)
    except OSError:  # a disk that is full or not ours: the next run reads the headers again
        with suppress(OSError):
            beside.unlink()
