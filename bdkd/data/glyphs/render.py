"""Draw characters with Pillow, and cache the images.

A cache file holds the images of one face. Its name is a digest of the font file, the characters,
the size and the versions of Pillow and FreeType, so that it is never out of date. If it cannot be
written, each run draws the characters again.
"""

import hashlib
import io
import os
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np

from bdkd.data.glyphs.manifest import Face
from bdkd.errors import RunError, reason_of
from bdkd.text import open_regular

RULES = "1"  # increase this when a change of the code changes the images
EM = 0.9  # font size as a share of the image's side
NO_CHARACTER = "\U0010ffff"  # no font has it, so a font draws its symbol for missing characters


def glyph_images(face: Face, path: Path, characters: str, side: int) -> np.ndarray:
    """Return an image of each character, ``(N, side, side)`` uint8, white on black.

    Raises:
        RunError: the font cannot be read, or does not have all characters.
    """
    try:
        with open_regular(path) as opened:
            content = opened.read()
    except OSError as error:
        raise RunError(f"cannot read the font {path}: {reason_of(error)}") from error
    file = _cache_file(face, content, characters, side)
    shape = (len(characters), side, side)
    if file is not None and (cached := _load(file, shape)) is not None:
        return cached
    images = _draw(face, path, content, characters, side)
    if file is not None:
        _save(file, images)
    return images


def _draw(face: Face, path: Path, content: bytes, characters: str, side: int) -> np.ndarray:
    from PIL import Image, ImageDraw, ImageFont

    try:
        font = ImageFont.truetype(
            io.BytesIO(content), round(EM * side), face.index,
            layout_engine=ImageFont.Layout.BASIC,
        )  # fmt: skip
        unknown = bytes(font.getmask(NO_CHARACTER))
        images = np.zeros((len(characters), side, side), np.uint8)
        lacking = []
        for image, character in zip(images, characters, strict=True):
            left, top, right, bottom = font.getbbox(character)
            # Centre Pillow's bounding box. It covers ink and advance horizontally, and ink and
            # baseline vertically, so that the position of the ink says little about the face.
            place = ((side - right - left) // 2, (side - bottom - top) // 2)
            canvas = Image.new("L", (side, side))
            ImageDraw.Draw(canvas).text(place, character, fill=255, font=font)
            image[:] = np.asarray(canvas)
            if not image.any() or bytes(font.getmask(character)) == unknown:
                lacking.append(character)
    except OSError as error:  # also raised for errors of FreeType
        raise RunError(
            f"cannot read the font {path} (face {face.index}): {error}; install it again"
        ) from error
    if lacking:
        raise RunError(
            f"the font {path} (face {face.index}) does not draw {len(lacking):,} of the "
            f"{len(characters):,} characters ({''.join(lacking[:5])}): leave them out with "
            f"'without' in the manifest, or remove the face {face.name!r}"
        )
    return images


def _cache_file(face: Face, content: bytes, characters: str, side: int) -> Path | None:
    from PIL import __version__, features

    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if not os.path.isabs(cache):  # the user has no home directory
        return None
    freetype = features.version("freetype2")
    font = hashlib.sha256(content).hexdigest()
    key = "\0".join(map(str, (RULES, __version__, freetype, font, face.index, side, characters)))
    return Path(cache, "bdkd", f"glyphs-{hashlib.sha256(key.encode()).hexdigest()[:20]}.npz")


def _load(file: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    try:
        with np.load(file, allow_pickle=False) as found:
            # _save() writes without compression, so that the arrays are no larger than the file.
            if any(member.compress_type for member in found.zip.infolist()):
                return None
            images, digest = found["images"], str(found["digest"])
    # The file is missing, unreadable, truncated, of another version, or not an archive of arrays.
    except (OSError, ValueError, KeyError, EOFError, TypeError, MemoryError, zipfile.BadZipFile):
        return None
    valid = images.shape == shape and images.dtype == np.uint8 and _digest(images) == digest
    return images if valid else None


def _digest(images: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(images).tobytes()).hexdigest()


def _save(file: Path, images: np.ndarray) -> None:
    """Write the cache file atomically, because several runs may write it at once."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as stream:
            np.savez(stream, images=images, digest=_digest(images))
        temporary.replace(file)
    except OSError:  # the disk is full or read-only: the next run draws the characters again
        with suppress(OSError):
            temporary.unlink()
