"""Images of characters, drawn with the fonts of this machine.

Each character is a class, and each font face draws one image of it. All images of a face are in one
split, so networks are tested on faces that they were not trained on. The images are not part of the
package: pixels and digests depend on the versions of the fonts, of Pillow and of FreeType.
"""

from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Annotated

import numpy as np
import torch

from bdkd.bounds import Bounds
from bdkd.data.base import SourceContext, register_source
from bdkd.data.decode import require_pillow
from bdkd.data.glyphs.manifest import Face, Manifest, find_fonts, read_manifest
from bdkd.data.glyphs.render import glyph_images
from bdkd.data.in_memory import Images, InMemory, InMemoryConfig
from bdkd.data.splits import SPLIT_SEED, in_memory_source
from bdkd.errors import RunError, UsageError
from bdkd.text import expand_user

SIDE = 32  # pixels
LARGEST_SIDE = 256  # all characters in 19 faces take 3.7 GB
LEAK = 0.5  # share of characters drawn equally that is refused for faces of different splits


@dataclass(frozen=True)
class GlyphsConfig(InMemoryConfig):
    """Options of the source glyphs."""

    manifest: str | None = None
    """A TOML file with the characters, the faces and their splits. Default: JIS level 1 kanji in 19
    faces that Debian packages."""
    characters: Annotated[int, Bounds(ge=2)] | None = None
    """Number of characters of the manifest to use as classes. The random choice does not depend on
    the seed, and a smaller set is part of a larger one. Default: all."""

    def has_validation(self) -> bool:
        return super().has_validation() or bool(read_manifest(self.manifest).of_split("val"))


def _missing(root: Path) -> str:
    try:
        require_pillow()
        find_fonts(read_manifest(None).face)
    except RunError as error:
        return str(error)
    return ""


@register_source(
    "glyphs", GlyphsConfig, reads="2,964 kanji drawn by installed fonts of Debian's packages",
    missing=_missing,
)  # fmt: skip
def load(config: GlyphsConfig, context: SourceContext) -> InMemory:
    """Draw every character with every face.

    The images of faces with ``split = "val"`` are the validation images. If the manifest has no
    such faces, ``data.validation`` of the training images are held out.

    Raises:
        UsageError: the manifest is not valid, or it has fewer than ``data.characters``.
        RunError: a font is missing or damaged, does not have a character, or draws most characters
            like a font of another split.
    """
    require_pillow()
    manifest = read_manifest(config.manifest)
    characters = _chosen(manifest, config.characters)
    root = None if config.root is None else expand_user(config.root, "data.root")
    fonts = find_fonts(manifest.face, root)
    side = config.image_size or SIDE
    if side > LARGEST_SIDE:
        raise UsageError(f"data.image_size must be at most {LARGEST_SIDE} for glyphs, got {side}")
    drawn = {face: glyph_images(face, fonts[face], characters, side) for face in manifest.face}
    _check_leaks(drawn)

    def of(faces: list[Face]) -> Images:
        pixels = np.concatenate([drawn[face] for face in faces])[:, None]
        labels = torch.arange(len(characters)).repeat(len(faces))
        return Images(torch.from_numpy(pixels), labels)  # (faces * characters, 1, H, W)

    train, val = manifest.of_split("train"), manifest.of_split("val")
    own_validation = None
    if val:
        first = len(train) * len(characters)
        own_validation = np.arange(first, first + len(val) * len(characters))
    return in_memory_source(
        of(train + val), of(manifest.of_split("test")), tuple(characters), config, context,
        own_validation=own_validation,
    )  # fmt: skip


def _chosen(manifest: Manifest, count: int | None) -> str:
    """Return ``count`` characters in the order of the manifest."""
    alphabet = manifest.alphabet()
    if count is None:
        return alphabet
    if count > len(alphabet):
        raise UsageError(
            f"data.characters must be at most {len(alphabet):,}, the characters of the manifest, "
            f"got {count:,}"
        )
    order = np.random.default_rng(SPLIT_SEED).permutation(len(alphabet))
    return "".join(alphabet[position] for position in sorted(order[:count]))


def _check_leaks(drawn: dict[Face, np.ndarray]) -> None:
    """Raise ``RunError`` if two faces of different splits draw most characters equally. Font files
    with the same design often have different names."""
    for first, second in combinations(drawn, 2):
        if first.split != second.split:
            same = (drawn[first] == drawn[second]).all(axis=(1, 2))  # (characters,)
            if same.mean() >= LEAK:
                raise RunError(
                    f"the faces {first.name!r} ({first.split}) and {second.name!r} "
                    f"({second.split}) draw {same.sum():,} of {len(same):,} characters equally: "
                    "give them one lineage and one split in the manifest"
                )
