"""List the files and folders that are data, for every source and for ``bdkd data check``.

- Hidden entries are skipped at every level: names that begin with ``.`` (``.ipynb_checkpoints``,
  ``._0.jpg``, ``.DS_Store``), and ``__MACOSX``, which macOS adds to archives.
- An image is a file with one of :data:`IMAGE_SUFFIXES`, in upper or lower case.
- A class is a folder. Sources raise an error for empty folders. A folder that holds only hidden
  entries is skipped.
- Symbolic links are followed. A broken link that may be a class raises an error here, and a broken
  link that is named like an image raises an error when it is read.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from unicodedata import normalize

from bdkd.errors import RunError
from bdkd.text import read_text, text_lines, unicode_hint

# The suffixes of torchvision.datasets.ImageFolder.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
# Suffixes of images that no source reads. A note says that these files are not used.
OTHER_IMAGE_SUFFIXES = (
    ".gif", ".jfif", ".jpe", ".jp2", ".heic", ".heif", ".avif", ".tga", ".ico", ".svg", ".dng",
)  # fmt: skip
# Common names of TFRecord files: "train-00000-of-01024" (the TPU scripts),
# "imagenet2012-train.tfrecord-00000-of-01024" (TensorFlow Datasets), "train.tfrecord".
RECORDS = re.compile(r"-\d+-of-\d+$|\.(tfrecords?|tfrec|records?)$", re.IGNORECASE)
NO_RECORDS = re.compile(
    r"\.(txt|json|idx|index|csv|tsv|md|rst|html?|xml|ya?ml|toml|pbtxt|log|md5|sha\d+|py|sh|db|ini"
    r"|npy|npz|pkl|pdf|tar|zip)$|^(readme|licen[cs]e|checksums?)\b",
    re.IGNORECASE,
)


def is_hidden(name: str) -> bool:
    """Return whether a file or folder with this name is skipped."""
    return name.startswith(".") or name == "__MACOSX"


def is_hidden_member(path: str) -> bool:
    """Return whether a member of an archive or one of its parent folders is hidden."""
    return any(is_hidden(part) for part in path.split("/") if part not in (".", ".."))


def is_image(name: str) -> bool:
    """Return whether a file with this name is an image."""
    return name.lower().endswith(IMAGE_SUFFIXES) and not is_hidden(name)


def class_folders(folder: Path) -> tuple[str, ...]:
    """Return the sorted names of the class folders, or raise ``RunError`` for a broken link."""
    found = []
    for entry in _entries(folder):
        if _is_folder(entry):
            if not _holds_only_hidden(Path(entry.path)):
                found.append(entry.name)
        elif entry.is_symlink() and not is_image(entry.name) and not os.path.exists(entry.path):
            raise RunError(
                f"{entry.path} is a symbolic link to something that does not exist, and may be a "
                "class: repair or remove it"
            )
    # Names that differ only in their Unicode form have one key, which keeps the last name.
    by_form = {normalize("NFC", name): name for name in found}
    if len(by_form) < len(found):
        hint = unicode_hint(found, by_form.values())
        raise RunError(f"{folder} holds two classes with the same name{hint}")
    return tuple(sorted(found))


def image_files(folder: Path) -> list[str]:
    """Return the sorted names of the images in ``folder``, without opening them."""
    # On nearly every file system scandir returns the type, so no file needs a stat.
    return sorted(e.name for e in _entries(folder) if is_image(e.name) and _is_file_or_broken(e))


def unlisted_images(folder: Path) -> list[str]:
    """Return the sorted names of the files in ``folder`` with one of
    :data:`OTHER_IMAGE_SUFFIXES`."""
    return sorted(e.name for e in _entries(folder) if e.name.lower().endswith(OTHER_IMAGE_SUFFIXES))


def archive_files(folder: Path) -> list[Path]:
    """Return the files in ``folder`` that are not hidden, sorted."""
    return sorted(folder / e.name for e in _entries(folder) if _is_file_or_broken(e))


def record_files(files: Sequence[Path]) -> list[Path]:
    """Return the files that are named like TFRecords. If there are none, return all files except
    those with the suffix of another format."""
    named = [file for file in files if RECORDS.search(file.name)]
    return named or [file for file in files if not NO_RECORDS.search(file.name)]


def read_lines(
    path: Path, label: str = "", errors: str = "strict", pipe: bool = False
) -> list[str]:
    """Return the lines of a text file, or raise ``RunError`` with ``label`` before the path. See
    :func:`bdkd.text.read_text`."""
    try:
        return text_lines(read_text(path, errors, pipe=pipe))
    except OSError as error:
        raise RunError(f"cannot read {label}{path}: {error.strerror}") from error


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not is_hidden(entry.name)]
    except OSError as error:
        raise RunError(f"cannot list the folder {folder}: {error.strerror}") from error


def _holds_only_hidden(folder: Path) -> bool:
    """Return whether a folder has entries and all of them are hidden. The listing stops at the
    first entry that is not hidden, because a class may hold thousands of images."""
    try:
        with os.scandir(folder) as entries:
            hidden = (is_hidden(entry.name) for entry in entries)
            return next(hidden, False) and all(hidden)
    except OSError as error:
        raise RunError(f"cannot list the folder {folder}: {error.strerror}") from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a symbolic link to itself
        return False


def _is_file_or_broken(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a file or a broken link, which raises an error when read."""
    try:
        return entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path))
    except OSError:
        return True
