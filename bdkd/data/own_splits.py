"""The splits of a user's own data set. If it has no test split, test images are held out.

The sources ``images`` and ``folder`` share this module.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import numpy as np

from bdkd.config import Bounds
from bdkd.data.base import ImagesConfig, stratified_split
from bdkd.data.decode import UndecodableError, open_image
from bdkd.data.imagenet.assemble import IndexedSplits
from bdkd.data.imagenet.index import Index
from bdkd.data.listing import IMAGE_SUFFIXES
from bdkd.data.splits import SPLIT_SEED
from bdkd.errors import RunError

Role = Literal["train", "val", "test"]
# Names of splits, of folders and of Hugging Face data sets, in upper or lower case.
SPLIT_NAMES: dict[Role, tuple[str, ...]] = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
ALL_SPLIT_NAMES = {name for names in SPLIT_NAMES.values() for name in names}
SAMPLE = 64  # images whose headers are read for the typical size
LARGEST_SIDE = 224
SMALLEST_SIDE = 8


@dataclass(frozen=True)
class OwnSplitsConfig(ImagesConfig):
    """Options of the sources that read a user's own data set."""

    test_share: Annotated[float, Bounds(gt=0, lt=1)] = 0.2
    """Share of the images of each class to hold out as the test split, if the data set has none.
    The held-out images do not depend on the seed."""
    use_val_split: bool = True
    """Whether to use the data set's own validation split, if it has a test split too. false: hold
    out data.validation of the training images instead."""

    def has_validation(self) -> bool:
        return self.use_val_split or super().has_validation()

    def image_size_from_networks(self) -> bool:
        return True


class FoundImages(NamedTuple):
    """The images of a data set as they are stored."""

    where: str
    """Name of the data set in messages."""
    classes: tuple[str, ...]
    indices: dict[Role, Index]
    """``train`` always, ``test`` and ``val`` if the data set has them. Labels are indices into
    ``classes``."""
    names: dict[Role, str]
    """Name of each split as it is stored."""
    place: str = "the split {name} of {where}"
    """Template for the name of a split in messages."""
    all_classes: bool = False
    """Whether every split must have images of every class."""
    records: bool = False
    """Whether the images are in TFRecords, which have checksums."""

    def place_of(self, role: Role) -> str:
        """Return the name of a split for messages."""
        return self.place.format(name=self.names[role], where=self.where)

    def splits(self, config: OwnSplitsConfig) -> IndexedSplits:
        """Return the splits. If there is no ``test``, it is held out of ``train``.

        Raises:
            RunError: there is one class, or a class has too few images.
        """
        if len(self.classes) < 2:
            raise RunError(
                f"{self.where} must hold images of at least 2 classes, got {len(self.classes)}: "
                f"{', '.join(self.classes)}"
            )
        train, test = self.indices["train"], self.indices.get("test")
        val = self.indices.get("val") if config.use_val_split else None
        if test is None:
            check_class_sizes(self.classes, train, [*_uses(config, val), "to test"], self.where)
            rest, held_out = stratified_split(train.labels, config.test_share, SPLIT_SEED)
            train, test = train.take(rest), train.take(held_out)
        return IndexedSplits(self.classes, train, test, val)

    def check(self, splits: IndexedSplits, config: OwnSplitsConfig) -> None:
        """Raise ``RunError`` if a class has too few images in one of the splits."""
        own = "test" in self.indices
        check_class_sizes(
            self.classes, splits.train, _uses(config, splits.val), self.place_of("train")
        )
        if self.all_classes or not own:
            name = self.place_of("test") if own else f"the test images of {self.where}"
            check_class_sizes(self.classes, splits.test, ["to test"], name)
        if self.all_classes and splits.val is not None:
            check_class_sizes(self.classes, splits.val, ["for validation"], self.place_of("val"))
        for name, index in (("test", splits.test), ("validation", splits.val)):
            if index is not None and not len(index):
                remedy = "add some, or remove the split"
                raise RunError(f"{self.where} holds no {name} images: {remedy}")


def _uses(config: OwnSplitsConfig, val: Index | None) -> list[str]:
    """Return the purposes for which each class needs one image of the training split."""
    return ["to train", "for validation"] if config.validation and val is None else ["to train"]


def check_class_sizes(
    classes: Sequence[str], index: Index, uses: Sequence[str], where: str
) -> None:
    """Raise ``RunError`` if a class has fewer images than ``uses``, each of which needs one."""
    counts = np.bincount(index.labels, minlength=len(classes))
    for name, count in zip(classes, counts, strict=True):
        if count < len(uses):
            images = "image" if count == 1 else "images"
            reasons = f"1 {', 1 '.join(uses)}" if count else ", ".join(IMAGE_SUFFIXES)
            raise RunError(
                f"the class {name} in {where} holds {count} {images}: it needs at least "
                f"{len(uses)} ({reasons}); add images, or remove the class"
            )


def split_roles(names: Collection[str], where: str) -> dict[Role, str]:
    """Return the name of each split that is among ``names``.

    Raises:
        RunError: two names mean the same split.
    """
    roles: dict[Role, str] = {}
    for role, known in SPLIT_NAMES.items():
        found = sorted(name for name in names if name.lower() in known)
        if len(found) > 1:
            raise RunError(f"{where} holds both {found[0]} and {found[1]}: rename or remove one")
        if found:
            roles[role] = found[0]
    return roles


def val_as_test(roles: dict[Role, str]) -> dict[Role, str]:
    """Return the roles, with ``val`` as the test split if there is no ``test``."""
    if "test" in roles or "val" not in roles:
        return roles
    return {"test" if role == "val" else role: name for role, name in roles.items()}


def typical_side(index: Index) -> int:
    """Return the median of the shorter sides of some images, at most ``LARGEST_SIDE`` pixels. For
    the same index, the same images are read each time."""
    sides = []
    for i in np.unique(np.linspace(0, len(index) - 1, min(SAMPLE, len(index))).astype(int)):
        try:
            with open_image(index.item(i).read()) as image:
                sides.append(min(image.size))
        except UndecodableError:  # the loader will raise an error that names the image
            continue
    side = int(np.median(sides)) if sides else LARGEST_SIDE
    return min(max(side, SMALLEST_SIDE), LARGEST_SIDE)
