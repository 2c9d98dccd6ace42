"""Tiny-ImageNet-200 in the layout of its archive: 64x64 colour images in 200 classes.

Source: Stanford CS231N. The images in ``test`` have no labels. As in the literature, ``val`` is the
test set, and validation images are held out of ``train``.
"""

from collections.abc import Sequence
from pathlib import Path

from bdkd.data.base import SourceContext, register_source
from bdkd.data.fetch import ARCHIVES, missing_archive, required_root, where_to_get
from bdkd.data.folder import read_labelled
from bdkd.data.in_memory import InMemory, InMemoryConfig
from bdkd.data.listing import class_folders, image_files, read_lines
from bdkd.data.splits import in_memory_source
from bdkd.errors import RunError

SOURCE = "tiny-imagenet"
SIDE = 64


@register_source(
    SOURCE, InMemoryConfig, reads="the downloaded layout: 110,000 images, 200 classes",
    needs_root=True, missing=missing_archive(SOURCE),
)  # fmt: skip
def load(config: InMemoryConfig, context: SourceContext) -> InMemory:
    """Load 100,000 training and 10,000 test images at 64x64, or at ``data.image_size``."""
    root = _set_folder(required_root(config))
    wnids = class_folders(root / "train")
    if len(wnids) < 2:
        raise RunError(f"{root / 'train'} must hold a folder for each class, got {wnids}")
    number = {wnid: label for label, wnid in enumerate(wnids)}
    size = config.image_size or SIDE
    labelled = [(path, number[wnid]) for wnid in wnids for path in _train(root, wnid)]
    # The digest has WordNet ids as class names, because several ids share a name.
    (training, train_digest), (test, test_digest) = (
        read_labelled(root, images, wnids, size) for images in (labelled, _annotated(root, number))
    )
    return in_memory_source(
        training, test, _names(root, wnids), config, context,
        digests={"train": train_digest, "test": test_digest},
    )  # fmt: skip


def _set_folder(root: Path) -> Path:
    archive = ARCHIVES[SOURCE]
    for folder in (root / archive.folder, root):
        if (folder / "train").is_dir() and (folder / "val" / "val_annotations.txt").is_file():
            return folder
    raise RunError(
        f"no data set {SOURCE} at {root}: data.root must name {archive.folder} (with train/ and "
        f"val/val_annotations.txt) or the folder that holds it; {where_to_get(SOURCE, root)}"
    )


def _train(root: Path, wnid: str) -> list[Path]:
    folder = root / "train" / wnid / "images"
    names = image_files(folder) if folder.is_dir() else []
    if not names:
        raise RunError(f"no images (*.JPEG) in {folder}: {where_to_get(SOURCE)}")
    return [folder / name for name in names]


def _annotated(root: Path, number: dict[str, int]) -> list[tuple[Path, int]]:
    """Return the images of ``val`` and their labels from lines of file, class and box."""
    listed = root / "val" / "val_annotations.txt"
    found = []
    for count, line in enumerate(read_lines(listed), 1):
        file, _, rest = line.partition("\t")
        wnid = rest.partition("\t")[0].strip()
        if wnid not in number or Path(file).name != file:
            raise RunError(
                f"{listed}, line {count}: must be an image and a class of this set, got {line!r}"
            )
        found.append((root / "val" / "images" / file, number[wnid]))
    if not found:
        raise RunError(f"{listed} is empty: {where_to_get(SOURCE)}")
    return found


def _names(root: Path, wnids: Sequence[str]) -> tuple[str, ...]:
    """Return the class names from ``words.txt``, or the WordNet ids of classes without a name."""
    words = root / "words.txt"
    lines = read_lines(words) if words.exists() else []
    pairs = [line.split("\t", 1) for line in lines if "\t" in line]
    names = {wnid: name.strip() for wnid, name in pairs}
    return tuple(names.get(wnid, wnid) for wnid in wnids)
