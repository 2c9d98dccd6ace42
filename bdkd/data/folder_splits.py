"""Find the classes and splits in a folder of images. Its layout is ``train/<class>/*`` with other
splits next to ``train``, or ``<class>/*`` without splits."""

from collections import Counter
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

import numpy as np

from bdkd.data.imagenet.index import Index
from bdkd.data.imagenet.layout import index_folders
from bdkd.data.listing import class_folders, image_files, unlisted_images
from bdkd.data.notes import note
from bdkd.data.own_splits import ALL_SPLIT_NAMES, FoundImages, Role, split_roles, val_as_test
from bdkd.errors import RunError
from bdkd.text import unicode_hint, unicode_hint_of_path

LAYOUT = "<class>/*.jpg, or train/<class>/*.jpg and test/<class>/*.jpg"
DEPTH = 3  # levels below data.root that are searched for a data set, to suggest it in a message


def require_folder(root: Path) -> None:
    """Raise ``RunError`` unless ``root`` is a folder."""
    if not root.exists():
        hint = unicode_hint_of_path(root)
        raise RunError(f"no data set at {root}: data.root must name an existing folder{hint}")
    if not root.is_dir():
        raise RunError(f"data.root must be a folder, got the file {root}: pass its folder")


def find_folders(root: Path) -> FoundImages:
    """Index every image in the class folders of each split. No image is opened.

    Raises:
        RunError: a folder is missing, or its layout is not supported.
    """
    require_folder(root)
    folders = class_folders(root)
    named = [name for name in folders if name.lower() in ALL_SPLIT_NAMES]
    filled = [name for name in named if class_folders(root / name)]
    roles = split_roles(filled, str(root))
    if not roles:
        return _flat_folder(root, folders)
    if "train" not in roles:
        [name, *_] = roles.values()
        raise RunError(
            f"{root} holds {name}/ and no train/ with class folders: data.root must hold {LAYOUT}; "
            f"add train/, or pass {root / name} to hold out test images of it"
        )
    for name in sorted({*named} - {*filled}):  # such as test images of a competition
        count = len(image_files(root / name))
        note(f"{root / name} is not used: it holds {count} images and no class folders")
    if others := [f"{name}/" for name in folders if name not in named]:
        shown = f"{', '.join(others[:5])}{' ...' if len(others) > 5 else ''}"
        note(f"{root} holds folders that are not splits and are not used: {shown}")
    return _split_folders(root, val_as_test(roles))


def has_class_folders(root: Path) -> bool:
    """Return whether a folder or its ``train`` has folders of images."""
    train = [root / name for name in class_folders(root) if name.lower() in ("train", "training")]
    return any(image_files(f / name) for f in (root, *train) for name in class_folders(f))


def missing_images(root: Path) -> str:
    """Return what is missing to read folders of images at ``root``, or an empty string."""
    if find_spec("PIL") is None:
        return "Pillow is not installed: pip install 'bdkd[imagenet]'"
    try:
        found = root.is_dir() and has_class_folders(root)
    except RunError as error:  # a folder cannot be listed
        return str(error)
    return "" if found else f"no class folders of images in {root}: pass the folder of your images"


def _split_folders(root: Path, roles: dict[Role, str]) -> FoundImages:
    train = root / roles["train"]
    classes = class_folders(train)
    _check_classes(train, classes)
    indices: dict[Role, Index] = {}
    for role, name in roles.items():
        present = class_folders(root / name)
        if unknown := sorted(set(present) - set(classes)):
            shown = f"{', '.join(unknown[:5])}{' ...' if len(unknown) > 5 else ''}"
            raise RunError(
                f"{train} and {root / name} must hold the same classes: {train} does not hold "
                f"{shown}{unicode_hint(unknown, classes)}"
            )
        indices[role] = index_folders(root, name, present, classes)
    _check_nested(train, classes, indices["train"])
    _note_unlisted(root, [root / name / label for name in roles.values() for label in classes])
    return FoundImages(str(root), classes, indices, roles, "{where}/{name}", all_classes=True)


def _flat_folder(root: Path, folders: tuple[str, ...]) -> FoundImages:
    images = len(image_files(root))
    if not folders:
        found = f"{images} images and no class folders" if images else "no images"
        raise RunError(f"{root} holds {found}: put the images of each class into {root}/<class>/")
    if all(name.lower() in ALL_SPLIT_NAMES for name in folders):
        folder = root / folders[-1]
        count = len(image_files(folder))
        raise RunError(
            f"{folder} holds {count} images and no class folders: put the images of each class "
            f"into {folder}/<class>/"
        )
    index = index_folders(root, "", folders, folders)
    _check_nested(root, folders, index)
    _check_classes(root, folders)
    _note_unlisted(root, [root / label for label in folders])
    return FoundImages(
        str(root), folders, {"train": index}, {"train": "images"}, "{where}", all_classes=True
    )


def _note_unlisted(root: Path, folders: Iterable[Path]) -> None:
    """Print a note if images are left out because of their suffix."""
    counts = Counter(
        Path(name).suffix.lower()
        for folder in folders
        if folder.is_dir()
        for name in unlisted_images(folder)
    )
    if counts:
        kinds = ", ".join(f"{count:,} {suffix}" for suffix, count in counts.most_common())
        found = f"{counts.total():,} images in {root} are not used: {kinds}"
        note(f"{found}; convert them to JPEG or PNG")


def _check_classes(folder: Path, classes: tuple[str, ...]) -> None:
    if len(classes) < 2:
        [name] = classes
        count = len(image_files(folder / name))
        raise RunError(
            f"{folder} must hold a folder for each of at least 2 classes, got 1: {name} ({count} "
            "images)"
        )


def _check_nested(folder: Path, classes: tuple[str, ...], index: Index) -> None:
    """Raise ``RunError`` if a class folder holds folders instead of images."""
    counts = np.bincount(index.labels, minlength=len(classes))
    for label in np.flatnonzero(counts == 0):
        if inner := class_folders(folder / classes[label]):
            _refuse_nested(folder, classes[label], inner)


def _refuse_nested(folder: Path, name: str, inner: tuple[str, ...]) -> NoReturn:
    shown = f"{', '.join(inner[:3])}{', ...' if len(inner) > 3 else ''}"
    below = _data_set_below(folder / name, DEPTH)
    remedy = "move the images up, or pass another folder" if below is None else f"pass {below}"
    raise RunError(
        f"{folder / name} holds no images but folders ({shown}), and classes must be the direct "
        f"subfolders of {folder}: {remedy}"
    )


def _data_set_below(folder: Path, depth: int) -> Path | None:
    """Return the first folder, at or below this one, whose subfolders are classes or splits."""
    inner = class_folders(folder)
    if sum(1 for name in inner if image_files(folder / name)) > 1 or "train" in inner:
        return folder
    below = (_data_set_below(folder / name, depth - 1) for name in inner) if depth else ()
    return next((found for found in below if found is not None), None)
