"""The layouts of ImageNet on disk: a folder for each class, webdataset shards, or TFRecords.

ImageNet's test images have no public labels. As in the literature, ``val`` is the test set, and
validation images are held out of ``train``.
"""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bdkd.data import listing
from bdkd.data.imagenet.archives import index_archives
from bdkd.data.imagenet.index import Index, names_array
from bdkd.errors import RunError
from bdkd.text import unicode_hint, unicode_hint_of_path

SORT_VAL = (
    "tail -n +2 LOC_val_solution.csv | while IFS=', ' read -r f w _; do mkdir -p val/$w && "
    "mv val/$f.JPEG val/$w/; done"
)


class Layout(NamedTuple):
    """A data set on disk. Classes may have no images."""

    classes: tuple[str, ...]
    train: Index
    val: Index

    def require_images(self) -> None:
        """Raise ``RunError`` if a class has fewer than two training images."""
        counts = np.bincount(self.train.labels, minlength=len(self.classes))
        for name, count in zip(self.classes, counts, strict=True):
            if count < 2:
                raise RunError(
                    f"the class {name} in {self.train.root / 'train'} holds {count} images: it "
                    "needs at least 2; fetch it again, or remove its folder in train and val"
                )


def find(root: Path, format: str, fresh: bool = False) -> Layout:
    """Index a data set without decoding any image.

    The index of unchanged archives is read from a cache unless ``fresh``. Folders are listed every
    time, which takes seconds.

    Raises:
        RunError: the data set is missing or has another format.
    """
    if not root.is_dir():
        hint = unicode_hint_of_path(root)
        raise RunError(f"no data set at {root}: data.root must name an existing folder{hint}")
    if format == "folder":
        return _folders(root)
    return _archived(root, {"webdataset": "tar", "tfrecord": "tfrecord"}[format], fresh)


def _folders(root: Path) -> Layout:
    for split in ("train", "val"):
        if not (root / split).is_dir():
            raise RunError(
                f"no folder {root / split}: data.root must hold train/<wnid>/*.JPEG and "
                f"val/<wnid>/*.JPEG{_other_format(root)}"
            )
    classes = listing.class_folders(root / "train")
    if len(classes) < 2:
        raise RunError(f"{root / 'train'} must hold a folder for each of at least 2 classes")
    in_val = listing.class_folders(root / "val")
    if not in_val:
        raise RunError(
            f"{root / 'val'} is flat: move its images into a folder for each class, "
            "val/<wnid>/*.JPEG. With the ground truth of Kaggle's archive (LOC_val_solution.csv), "
            f"in {root}: {SORT_VAL}"
        )
    if unknown := sorted(set(in_val) - set(classes)):
        raise RunError(
            f"{root / 'val'} holds classes that {root / 'train'} does not have: "
            f"{', '.join(unknown[:5])}{' ...' if len(unknown) > 5 else ''}"
            f"{unicode_hint(unknown, classes)}"
        )
    train, val = (
        index_folders(root, split, folders, classes)
        for split, folders in (("train", classes), ("val", in_val))
    )
    return Layout(classes, train, val)


def index_folders(
    root: Path, split: str, folders: tuple[str, ...], classes: tuple[str, ...]
) -> Index:
    """Return the index of every image file in the class folders of a split, sorted by name.

    Args:
        split: folder below the root; empty if the class folders are in the root itself.
        folders: the class folders, which are some of the ``classes``.
    """
    number = {name: label for label, name in enumerate(classes)}
    found = [listing.image_files(root / split / folder) for folder in folders]
    container = np.repeat(np.arange(len(folders), dtype=np.int32), [len(names) for names in found])
    labels = np.asarray([number[folder] for folder in folders], np.int64)[container]
    containers = tuple(f"{split}/{folder}" if split else folder for folder in folders)
    return Index(root, containers, container, names_array([n for names in found for n in names]),
                 labels)  # fmt: skip


def _archived(root: Path, kind: str, fresh: bool) -> Layout:
    archives = {split: _archives(root, split, kind) for split in ("train", "val")}
    classes, indices = index_splits(root, kind, archives, fresh)
    return Layout(classes, indices["train"], indices["val"])


def index_splits(
    root: Path, kind: str, archives: Mapping[str, list[Path]], fresh: bool = False
) -> tuple[tuple[str, ...], dict[str, Index]]:
    """Return the classes and the index of each split's archives. Class names are the lines of
    ``classes.txt``, or numbers without the file.

    Args:
        kind: ``tar`` or ``tfrecord``.
        archives: by split; ``train`` is one of the splits.
        fresh: see :func:`find`.

    Raises:
        RunError: an archive is damaged, or a label does not fit.
    """
    indices = {s: index_archives(kind, root, files, fresh) for s, files in archives.items()}
    lowest, where = min(map(_lowest, indices.values()))
    if kind == "tfrecord" and lowest == 1:
        # Common TFRecords of ImageNet number classes from 1 and reserve 0 for the background.
        indices = {s: replace(index, labels=index.labels - 1) for s, index in indices.items()}
        lowest = 0
    if lowest < 0:
        raise RunError(
            f"{where} has the negative label {lowest}: labels must be 0 or more; write it again"
        )
    last = max(indices.values(), key=lambda index: index.labels.max())
    count, images = int(last.labels.max()) + 1, len(indices["train"])
    if count > images:
        where = str(last.item(int(last.labels.argmax())))
        raise RunError(
            f"the archives in {root} hold {images} training images and labels up to {count - 1} "
            f"({where}): every class needs at least 2 images"
        )
    return _class_names(root, count), indices


def _class_names(root: Path, count: int) -> tuple[str, ...]:
    listed = root / "classes.txt"
    if not os.path.lexists(listed):  # a broken link raises an error when it is read
        return tuple(map(str, range(count)))
    classes = tuple(line.strip() for line in listing.read_lines(listed))
    if "" in classes:
        raise RunError(f"{listed}, line {classes.index('') + 1} is empty: it must name a class")
    if len(classes) < count:
        raise RunError(
            f"{listed} names {len(classes)} classes, but there are labels up to {count - 1}: add a "
            "line for each class"
        )
    return classes


def _lowest(index: Index) -> tuple[int, str]:
    """Return the lowest label, and the name of an image with this label."""
    i = int(index.labels.argmin())
    return int(index.labels[i]), str(index.item(i))


def _archives(root: Path, split: str, kind: str) -> list[Path]:
    found = archives_of(root, split, kind)
    if not found:
        raise RunError(
            f"no archives {split}*{'.tar' if kind == 'tar' else ''} in {root} or in {root}/{split}"
            f"{_other_format(root)}"
        )
    return found


def archives_of(root: Path, split: str, kind: str) -> list[Path]:
    """Return the archives of a split, such as ``ROOT/train/*.tar`` or ``ROOT/*train*.tar``. The
    split ``val`` also matches ``validation``."""
    named = [path for path in sorted(root.iterdir()) if split in path.name]
    entries = [path for path in named if not listing.is_hidden(path.name)]
    found = [file for path in entries if path.is_dir() for file in listing.archive_files(path)]
    found += [path for path in entries if path.is_file() or not path.exists()]
    tars = [file for file in found if file.suffix.lower() == ".tar"]
    found = tars if kind == "tar" else listing.record_files(found)
    for file in found:
        if not file.exists():
            raise RunError(
                f"{file} is a symbolic link to something that does not exist: repair or remove it"
            )
    return found


def _other_format(root: Path) -> str:
    """Return a hint for the end of an error message if the folder seems to have another format."""
    entries = {entry.name for folder in (root, root / "train") if folder.is_dir()
               for entry in folder.iterdir() if not listing.is_hidden(entry.name)}  # fmt: skip
    if any(name.endswith(".tar") for name in entries):
        return "; it holds tar files: if they are webdataset shards, set data.format = webdataset"
    if any("-of-" in name or name.endswith(".tfrecord") for name in entries):
        return "; it seems to hold TFRecords: set data.format = tfrecord"
    return ""
