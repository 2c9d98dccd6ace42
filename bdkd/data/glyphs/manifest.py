"""The manifest of the source ``glyphs`` lists the characters, and the font faces of each split."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Literal

import msgspec

from bdkd.config.toml import parse_toml
from bdkd.errors import RunError, UsageError, reason_of
from bdkd.text import expand_user, read_text

SHIPPED = "japanese.toml"
JIS_LEVEL_1 = "jis-level-1"
SPLITS = ("train", "val", "test")
LARGEST = 1_000_000  # bytes of a manifest
MOST_FACES = 1 << 16  # in a collection; FreeType stores the index of a face in 16 bits


class Face(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A font face that draws every character once."""

    name: str
    file: str
    """Name of the font file, without a folder."""
    lineage: str
    """Name of the design. Faces with equal or scaled outlines have the same lineage."""
    split: Literal["train", "val", "test"]
    package: str = ""
    """Debian package that holds the file."""
    index: int = 0
    """Number of the face in a collection (.ttc)."""


class Manifest(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Characters, and the faces that draw them."""

    characters: str
    """The characters, or ``jis-level-1``."""
    face: tuple[Face, ...]
    without: str = ""
    """Characters to leave out, because a face does not have them."""

    def of_split(self, split: str) -> list[Face]:
        return [face for face in self.face if face.split == split]

    def alphabet(self) -> str:
        """Return all characters."""
        named = jis_level_1() if self.characters == JIS_LEVEL_1 else self.characters
        without = set(self.without)
        return "".join(letter for letter in named if letter not in without)


def jis_level_1() -> str:
    """Return the 2,965 kanji of JIS X 0208 level 1, rows 16 to 47, in the order of the standard."""
    return "".join(
        bytes((row, cell)).decode("euc_jp", "ignore")
        for row in range(0xB0, 0xD0)
        for cell in range(0xA1, 0xFF)
    )


def read_manifest(path: str | None) -> Manifest:
    """Read and check a manifest. None: the shipped manifest of Japanese faces.

    Raises:
        UsageError: it is not a valid manifest.
        RunError: it cannot be read.
    """
    if path is None:
        name, text = SHIPPED, (files("bdkd.data.glyphs") / SHIPPED).read_text("utf-8")
    else:
        name, given = path, expand_user(path, "data.manifest")
        try:
            text = read_text(given, limit=LARGEST)
        except OSError as error:
            raise RunError(f"cannot read the manifest {path}: {reason_of(error)}") from error
    try:
        manifest = msgspec.convert(parse_toml(text), Manifest)
    except (msgspec.ValidationError, ValueError) as error:
        raise UsageError(f"{name} is not a manifest of glyphs: {error}") from error
    if problem := _problem(manifest):
        raise UsageError(f"{name}: {problem}")
    return manifest


def _problem(manifest: Manifest) -> str:
    """Return what is wrong with a manifest, or an empty text."""
    alphabet = manifest.alphabet()
    doubled = [letter for letter, count in Counter(alphabet).items() if count > 1]
    if len(alphabet) < 2 or doubled:
        found = f"{doubled[0]!r} twice" if doubled else f"{len(alphabet)}"
        return f"characters must be at least two different characters, got {found}"
    for split in ("train", "test"):
        if not manifest.of_split(split):
            return f"at least one face must have split = {split!r}, got none"
    splits: dict[str, str] = {}
    seen: set[tuple[str, int]] = set()
    for face in manifest.face:
        if Path(face.file).name != face.file or not face.file:
            return f"file must be the name of a font file without a folder, got {face.file!r}"
        if not 0 <= face.index < MOST_FACES:
            return f"index must be from 0 to {MOST_FACES - 1}, got {face.index} ({face.name})"
        if (face.file, face.index) in seen:
            return f"every face must be listed once, got the face {face.index} of {face.file} twice"
        seen.add((face.file, face.index))
        if splits.setdefault(face.lineage, face.split) != face.split:
            return (
                f"the lineage {face.lineage!r} has faces in {splits[face.lineage]} and in "
                f"{face.split}: one design must be in one split"
            )
    return ""


def font_folders() -> list[Path]:
    """Return the folders in which systems and users install fonts."""
    data = os.environ.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share")
    own = [Path(data, "fonts"), Path(os.path.expanduser("~/.fonts"))]
    return [*own, Path("/usr/local/share/fonts"), Path("/usr/share/fonts")]


def find_fonts(faces: Sequence[Face], root: Path | None = None) -> dict[Face, Path]:
    """Return the font file of each face, from ``root`` or the font folders of system and user.

    Raises:
        RunError: a file is not installed. The message names the packages to install.
    """
    wanted = {face.file for face in faces}
    found: dict[str, Path] = {}
    for folder in font_folders() if root is None else [root]:
        for path in _files(folder):
            if path.name in wanted and path.is_file():
                found.setdefault(path.name, path)
    if absent := [face for face in faces if face.file not in found]:
        raise RunError(_missing_fonts(absent, root))
    return {face: found[face.file] for face in faces}


def _missing_fonts(absent: Sequence[Face], root: Path | None) -> str:
    """Return one line about faces that are not installed."""
    names = ", ".join(dict.fromkeys(face.file for face in absent))
    where = ", ".join(map(str, font_folders() if root is None else [root]))
    packages = sorted({face.package for face in absent if face.package})
    remedy = "put them there" + ("" if root else ", or pass their folder with --data.root")
    if packages:
        install = f"apt install --no-install-recommends {' '.join(packages)}"
        remedy = f"{remedy}, or leave out data.root and run {install}" if root else install
    return f"no font files {names} in {where}: {remedy}"


def _files(folder: Path) -> Iterator[Path]:
    """Iterate over the files at every level. Each folder is visited once, because symbolic links
    may form a cycle."""
    visited = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in visited:
            folders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        folders.sort()
        yield from (Path(parent, name) for name in sorted(names))
