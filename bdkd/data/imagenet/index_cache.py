"""A cache of archive indexes, because reading the headers of all of ImageNet takes minutes.

Each split has one file in ``$XDG_CACHE_HOME/bdkd`` (``~/.cache/bdkd``). It is valid as long as the
name, size and times of every archive are unchanged. If it cannot be written, each run reads the
headers again.
"""

import hashlib
import os
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np

from bdkd.data.imagenet.index import Index

RULES = "2"  # increase this when other archive members count as images
COLUMNS = ("container", "names", "labels", "offsets", "sizes")


def cached_index(
    kind: str, root: Path, archives: list[Path], make: Callable[[], Index], fresh: bool
) -> Index:
    """Return the cached index of unchanged archives, or call ``make`` and cache its result.

    Args:
        kind: the archive format, a part of the cache key.
        fresh: call ``make`` even if the cache is valid.
    """
    names = tuple(str(path.relative_to(root)) for path in archives)
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if not os.path.isabs(cache):  # the user has no home directory
        return make()
    key = os.fsencode("\0".join([kind, RULES, str(root.resolve()), *names]))
    file = Path(cache, "bdkd", f"index-{hashlib.sha256(key).hexdigest()[:20]}.npz")
    # Take the stamps before the headers are read, so that an archive that changes meanwhile is read
    # again in the next run. The stamps include ctime, which no tool can set back.
    stats = [path.stat() for path in archives]
    stamps = np.array([(s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in stats], np.int64)
    if not fresh and (found := _load(file, root, names, stamps)) is not None:
        return found
    index = make()
    _save(file, index, stamps)
    return index


def _load(file: Path, root: Path, names: tuple[str, ...], stamps: np.ndarray) -> Index | None:
    try:
        with np.load(file, allow_pickle=False) as found:
            # _save() writes without compression, so that the arrays are no larger than the file.
            if any(member.compress_type for member in found.zip.infolist()):
                return None
            if not np.array_equal(found["stamps"], stamps):
                return None
            return Index(root, names, *(found[column] for column in COLUMNS))
    # The file is missing, unreadable, truncated or of another version.
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _save(file: Path, index: Index, stamps: np.ndarray) -> None:
    """Write the cache file atomically, because several runs may write it at once."""
    columns = {column: getattr(index, column) for column in COLUMNS}
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as stream:
            np.savez(stream, stamps=stamps, **columns)
        temporary.replace(file)
    except OSError:  # the disk is full or read-only: the next run reads the headers again
        with suppress(OSError):
            temporary.unlink()
