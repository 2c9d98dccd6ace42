"""Map the value of ``--data`` to options of a recipe."""

import os
from pathlib import Path

from bdkd.data.base import SourceEntry
from bdkd.data.fetch import ARCHIVES, DATA_SETS, FILE_SETS
from bdkd.errors import UsageError
from bdkd.registry import SOURCES, nearest
from bdkd.text import expand_user, unicode_hint_of_path

FORMS = "a data source, a folder of images, a .parquet file, or hf:NAME"


def data_options(text: str) -> dict[str, str]:
    """Return the options ``source`` and ``root`` of ``[data]`` for the name of a data source, a
    path, or ``hf:NAME``.

    If a folder holds a downloaded CIFAR, Fashion-MNIST or Tiny-ImageNet, the source of that data
    set reads it. The source ``images`` reads every other folder. If the text is the name of a
    folder and also of a source that needs ``data.root``, it means the folder.

    Raises:
        UsageError: the text is none of these; it names both a folder and a source that reads no
            folder; or the folder contains several downloaded data sets.
    """
    if text in SOURCES and not os.path.isdir(text):
        return {"source": text}
    entry = SOURCES.get(text)
    if isinstance(entry, SourceEntry) and not entry.needs_root:
        raise UsageError(
            f"--data {text} is a data source and a folder: pass ./{text} for the folder, or "
            f"--data.source {text}"
        )
    if text.startswith("hf:") and len(text) > len("hf:"):
        return {"source": "images", "root": text}
    path = expand_user(text, "--data")
    downloaded = _downloaded(path)
    if len(downloaded) > 1:
        folders = ", ".join(str(path / DATA_SETS[source].folder) for source in downloaded)
        raise UsageError(f"--data {text} holds several data sets: pass one of {folders}")
    if downloaded:
        return {"source": downloaded[0], "root": text}
    if text and (path.is_dir() or (path.is_file() and path.suffix.lower() == ".parquet")):
        return {"source": "images", "root": text}
    if path.is_file():
        raise UsageError(f"--data must be {FORMS}, got the file {text}: pass its folder")
    hint = unicode_hint_of_path(path) or f"; {nearest(text, list(SOURCES))}"
    raise UsageError(f"--data must be {FORMS}, got {text!r}, and there is no such path{hint}")


def _downloaded(path: Path) -> list[str]:
    """Return the sources whose downloaded folder or archive is at a path or in it."""
    archives = [
        source
        for source, archive in ARCHIVES.items()
        if (path.resolve().name in (archive.folder, archive.file) and path.exists())
        or (path / archive.folder).is_dir()
        or (path / archive.file).is_file()
    ]
    # Another data set can have files of the same names (MNIST), so the folder name must match too.
    sets = [
        source
        for source, known in FILE_SETS.items()
        for folder in (path.resolve(), path / known.folder)
        if folder.name == known.folder and any((folder / f.file).is_file() for f in known.files)
    ]
    return archives + sets
