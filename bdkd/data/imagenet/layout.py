"""The ways in which ImageNet lies on disks: a folder a class, webdataset shards, TFRecords.

Its test images have no public labels, so, as everywhere in the literature, ``val`` is the test set;
validation images are held out of ``train``.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from bdkd.data.imagenet.archives import index_tars, index_tfrecords
from bdkd.data.imagenet.index import Index, names_array
from bdkd.data.listing import (
    archive_files,
    class_folders,
    image_files,
    is_hidden,
    record_files,
)
from bdkd.errors import RunError
from bdkd.text import read_text, text_lines

SORT_VAL = (
    "tail -n +2 LOC_val_solution.csv | while IFS=', ' read -r f w _; do mkdir -p val/$w && "
    "mv val/$f.JPEG val/$w/; done"
)


class Layout(NamedTuple):
    """A data set on disk. Classes may be empty."""

    classes: tuple[str, ...]
    train: Index
    val: Index

    def require_images(self) -> None:
        """Raise ``RunError`` for the first class without two training images."""
        counts = np.bincount(self.train.labels, minlength=len(self.classes))
        for name, count in zip(self.classes, counts, strict=True):
            if count < 2:
                raise RunError(
                    f"the class {name} in {self.train.root / 'train'} holds {count} images: it "
                    "needs at least 2 (fetch it again, or remove its folder in train and val)"
                )


def find(root: Path, format: str, fresh: bool = False) -> Layout:
    """Index a data set. Nothing is decoded. The index of unchanged archives is read from a cache
    unless ``fresh``; folders are listed every time, which takes seconds.

    Raises:
        RunError: the data set is missing, or not in this format.
    """
    if not root.is_dir():
        raise RunError(f"no data set at {root}: data.root must name an existing folder")
    if format == "folder":
        return _folders(root)
    return {"webdataset": _webdataset, "tfrecord": _tfrecord}[format](root, fresh)


def _folders(root: Path) -> Layout:
    for split in ("train", "val"):
        if not (root / split).is_dir():
            raise RunError(
                f"no folder {root / split}: data.root must hold train/<wnid>/*.JPEG and "
                f"val/<wnid>/*.JPEG{_other_format(root)}"
            )
    classes = class_folders(root / "train")
    if len(classes) < 2:
        raise RunError(f"{root / 'train'} must hold a folder for each of at least 2 classes")
    in_val = class_folders(root / "val")
    if not in_val:
        raise RunError(
            f"{root / 'val'} is flat: its images belong into a folder for each class, "
            "val/<wnid>/*.JPEG. With the ground truth of Kaggle's archive (LOC_val_solution.csv), "
            f"in {root}: {SORT_VAL}"
        )
    unknown = sorted(set(in_val) - set(classes))
    if unknown:
        raise RunError(
            f"{root / 'val'} holds classes that {root / 'train'} does not have: "
            f"{', '.join(unknown[:5])}{' ...' if len(unknown) > 5 else ''}"
        )
    number = {name: label for label, name in enumerate(classes)}
    return Layout(
        classes, _scan(root, "train", classes, number), _scan(root, "val", in_val, number)
    )


def _scan(root: Path, split: str, folders: tuple[str, ...], number: dict[str, int]) -> Index:
    """Index every image file in the folders, sorted: the order of a listing is arbitrary."""
    names: list[str] = []
    container: list[int] = []
    for place, folder in enumerate(folders):
        found = image_files(root / split / folder)
        names += found
        container += [place] * len(found)
    within = np.asarray(container, np.int32)
    labels = np.asarray([number[folder] for folder in folders], np.int64)[within]
    containers = tuple(f"{split}/{folder}" for folder in folders)
    return Index(root, containers, within, names_array(names), labels)


def _webdataset(root: Path, fresh: bool) -> Layout:
    train = index_tars(root, _archives(root, "train", tars=True), fresh)
    val = index_tars(root, _archives(root, "val", tars=True), fresh)
    return _labelled_by_number(root, train, val)


def _tfrecord(root: Path, fresh: bool) -> Layout:
    train = index_tfrecords(root, _archives(root, "train", tars=False), fresh)
    val = index_tfrecords(root, _archives(root, "val", tars=False), fresh)
    if min(train.labels.min(), val.labels.min()) == 1:
        # The field's TFRecords number ImageNet's classes from 1: 0 was to be the background.
        train = train.take(np.arange(len(train)), train.labels - 1)
        val = val.take(np.arange(len(val)), val.labels - 1)
    return _labelled_by_number(root, train, val)


def _archives(root: Path, split: str, tars: bool) -> list[Path]:
    """Return the archives of a split, ``ROOT/train/*.tar`` or ``ROOT/*train*.tar``; ``val`` stands
    for ``validation`` too."""
    ours = [e for e in sorted(root.iterdir()) if split in e.name and not is_hidden(e.name)]
    found = [file for folder in ours if folder.is_dir() for file in archive_files(folder)]
    found += [file for file in ours if file.is_file() or not file.exists()]
    found = [f for f in found if f.suffix.lower() == ".tar"] if tars else record_files(found)
    if not found:
        raise RunError(
            f"no archives {split}{'*.tar' * tars or '*'} in {root} or in a folder {split} of it"
            f"{_other_format(root)}"
        )
    for file in found:
        if not file.exists():
            raise RunError(f"{file} is a symbolic link to something that does not exist")
    return found


def _labelled_by_number(root: Path, train: Index, val: Index) -> Layout:
    """Class names are the lines of ``classes.txt``, or the numbers where it is missing."""
    count = int(max(train.labels.max(), val.labels.max())) + 1
    if min(train.labels.min(), val.labels.min()) < 0:
        raise RunError(f"the archives in {root} hold a negative label")
    if count > len(train):
        raise RunError(
            f"the archives in {root} hold {len(train)} training images and labels up to "
            f"{count - 1}: every class needs at least 2 images"
        )
    listed = root / "classes.txt"
    if not listed.exists():
        return Layout(tuple(map(str, range(count))), train, val)
    try:
        classes = tuple(line.strip() for line in text_lines(read_text(listed)))
    except OSError as error:
        raise RunError(f"cannot read {listed}: {error.strerror}") from error
    if "" in classes:
        raise RunError(f"{listed}, line {classes.index('') + 1} is empty: it must name a class")
    if len(classes) < count:
        raise RunError(f"{listed} names {len(classes)} classes, the labels go to {count - 1}")
    return Layout(classes, train, val)


def _other_format(root: Path) -> str:
    """Return a hint if the folder holds another format than the one asked for."""
    entries = {entry.name for folder in (root, root / "train") if folder.is_dir()
               for entry in folder.iterdir() if not is_hidden(entry.name)}  # fmt: skip
    if any(name.endswith(".tar") for name in entries):
        return "; it holds tar files: shards of webdataset need data.format = webdataset"
    if any("-of-" in name or name.endswith(".tfrecord") for name in entries):
        return "; it holds what looks like TFRecords: data.format = tfrecord"
    return ""
