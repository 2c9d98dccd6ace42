"""Images in folders, ``ROOT/train/<class>/*`` and ``ROOT/test/<class>/*`` (or ``val``), small
enough to be kept in memory whole, at one size."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bdkd.config import DataConfig
from bdkd.data.in_memory import Images, InMemory
from bdkd.data.splits import make_splits
from bdkd.errors import RunError, UsageError

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm"}


def load(
    config: DataConfig, seed: int, device: torch.device, memory_format: torch.memory_format
) -> InMemory:
    """Every image resized to ``data.image_size``, RGB."""
    if config.root is None:
        raise UsageError("data.root must name the folder of the data set (source 'folder')")
    root = Path(config.root)
    train = _folder(root, "train")
    held_out = _folder(root, "test", "val")
    classes = _classes(train)
    unlike = set(classes).symmetric_difference(_classes(held_out))
    if unlike:
        raise RunError(f"{train} and {held_out} must hold the same classes: {sorted(unlike)}")

    training = Images(*_read(train, classes, config.image_size))
    test = Images(*_read(held_out, classes, config.image_size))
    return InMemory(
        "folder", make_splits(config, training, test, 255), classes, config, scale=255,
        seed=seed, device=device, memory_format=memory_format,
    )  # fmt: skip


def _folder(root: Path, *names: str) -> Path:
    for name in names:
        if (root / name).is_dir():
            return root / name
    if not root.is_dir():
        raise RunError(f"no data set at {root}: data.root must name an existing folder")
    expected = " or ".join(str(root / name) for name in names)
    raise RunError(f"no folder {expected}: images belong in {root / names[0]}/<class>/")


def _classes(folder: Path) -> tuple[str, ...]:
    classes = tuple(sorted(entry.name for entry in folder.iterdir() if entry.is_dir()))
    if len(classes) < 2:
        raise RunError(f"{folder} must hold a folder for each of at least 2 classes, got {classes}")
    return classes


def _read(folder: Path, classes: tuple[str, ...], size: int) -> tuple[Tensor, Tensor]:
    """Pixels ``(N, 3, size, size)`` uint8 and labels ``(N,)``."""
    try:
        from PIL import Image
    except ImportError as error:
        raise RunError(
            "the data source 'folder' needs Pillow: pip install 'bdkd[imagenet]'"
        ) from error
    pixels, labels = [], []
    for label, name in enumerate(classes):
        paths = sorted(p for p in (folder / name).iterdir() if p.suffix.lower() in SUFFIXES)
        if len(paths) < 2:
            raise RunError(
                f"the class folder {folder / name} holds {len(paths)} images: it needs at least 2 "
                f"({', '.join(sorted(SUFFIXES))}), or remove it"
            )
        for path in paths:
            try:
                with Image.open(path) as image:
                    resized = image.convert("RGB").resize((size, size))
            except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises for bad files
                raise RunError(
                    f"cannot read the image {path}: {error}; mend or remove it"
                ) from error
            pixels.append(np.asarray(resized))
            labels.append(label)
    stacked = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()
    return stacked, torch.tensor(labels)
