"""Detect the format of ``data.root`` for the source ``images``, and index the data set."""

from pathlib import Path

from bdkd.data.folder_splits import find_folders, has_class_folders, require_folder
from bdkd.data.imagenet.index import Index
from bdkd.data.imagenet.layout import archives_of, index_splits
from bdkd.data.images.hub import PREFIX, find_rows, is_saved
from bdkd.data.listing import RECORDS, archive_files, class_folders, record_files
from bdkd.data.own_splits import FoundImages, Role, val_as_test
from bdkd.errors import RunError, UsageError
from bdkd.text import expand_user

KINDS = {"webdataset": "tar", "tfrecord": "tfrecord"}


def find_images(
    root: str, format: str, image_column: str | None = None, label_column: str | None = None,
    fresh: bool = False,
) -> FoundImages:  # fmt: skip
    """Index a data set. No image is decoded.

    Args:
        root: a folder, a ``.parquet`` file, or ``hf:NAME``.
        format: a value of ``data.format``.
        image_column, label_column: see :class:`bdkd.data.images.OwnImagesConfig`.
        fresh: whether to read the archives again instead of the cached index.

    Raises:
        UsageError: an option does not apply.
        RunError: the data set is missing or has another format.
    """
    if root.startswith(PREFIX):
        format = "hf" if format == "auto" else format
        if format != "hf":
            raise UsageError(f"data.format must be auto or hf for {root}, got {format!r}")
        return find_rows(root.removeprefix(PREFIX), root, image_column, label_column)
    path = expand_user(root, "data.root")
    if format == "auto":
        format = detect_format(path)
    if format == "hf":
        return find_rows(str(path), str(path), image_column, label_column)
    for option, value in (("image_column", image_column), ("label_column", label_column)):
        if value is not None:
            raise UsageError(
                f"data.{option} applies to Hugging Face data sets and Parquet files, and {path} "
                f"is read as {format}: remove it"
            )
    require_folder(path)
    return find_folders(path) if format == "folder" else _find_archives(path, format, fresh)


def detect_format(root: Path) -> str:
    """Return the value of ``data.format`` for a folder or file, from the names in it."""
    if root.is_file() and root.suffix.lower() == ".parquet":
        return "hf"
    require_folder(root)
    if is_saved(root):
        return "hf"
    if has_class_folders(root):
        return "folder"
    inner = [root / name for name in class_folders(root) if name.lower() in ("train", "data")]
    files = [file for folder in (root, *inner) for file in archive_files(folder)]
    suffixes = {file.suffix.lower() for file in files}
    if ".parquet" in suffixes:
        return "hf"
    if ".tar" in suffixes:
        return "webdataset"
    return "tfrecord" if any(RECORDS.search(file.name) for file in files) else "folder"


def _find_archives(root: Path, format: str, fresh: bool) -> FoundImages:
    """Index the archives whose names contain a split. If there are none, train on all archives."""
    kind = KINDS[format]
    parts: tuple[Role, ...] = ("train", "val", "test")
    archives = {role: files for role in parts if (files := archives_of(root, role, kind))}
    if not archives:
        files = archive_files(root)
        tars = [file for file in files if file.suffix.lower() == ".tar"]
        archives["train"] = tars if kind == "tar" else record_files(files)
    if not archives.get("train"):
        raise RunError(
            f"{root} holds no {format} files for training: put train*.tar (webdataset) or "
            "train*-of-* (TFRecords) there, or into train/"
        )
    names = val_as_test({role: str(role) for role in archives})
    classes, found = index_splits(root, kind, {str(r): a for r, a in archives.items()}, fresh)
    indices: dict[Role, Index] = {role: found[name] for role, name in names.items()}
    return FoundImages(str(root), classes, indices, names, records=kind == "tfrecord")
