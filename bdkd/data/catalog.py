"""The registered data sources for ``bdkd data list``."""

import shlex
from pathlib import Path
from typing import NamedTuple

from bdkd.data.base import SourceEntry
from bdkd.data.fetch import DATA_SETS
from bdkd.data.images.hub import missing_datasets
from bdkd.registry import SOURCES


class ListedSource(NamedTuple):
    """A data source, and whether it can be used on this machine."""

    name: str
    """The value of ``data.source``, or ``hf`` for Hugging Face data sets."""
    reads: str
    """Description of the data that it reads."""
    needs_root: bool
    """Whether ``data.root`` must be set."""
    download_bytes: int | None
    """Bytes that ``bdkd data fetch`` downloads. None: it cannot download this data set."""
    ready: bool
    """Whether the source can be used here."""
    missing: str
    """What is missing and how to get it, if the source is not ready."""
    command: str
    """The command that trains on it."""


def listed_sources(root: Path) -> list[ListedSource]:
    """Return every registered data source, with ``root`` as the folder of the data sets."""
    missing = missing_datasets()
    hugging_face = ListedSource(
        "hf", "Hugging Face data sets: from the Hub, from save_to_disk, or Parquet files", True,
        None, not missing, missing, "bdkd train --data hf:NAME",
    )  # fmt: skip
    return [*(_listed(name, root) for name in SOURCES), hugging_face]


def _listed(name: str, root: Path) -> ListedSource:
    entry, fetched = SOURCES[name], DATA_SETS.get(name)
    assert isinstance(entry, SourceEntry)
    missing = entry.missing(root)
    known = fetched is not None or not missing
    place = shlex.quote(str(root)) if known else "FOLDER"
    command = f"bdkd train RECIPE --data.source {name}"
    if name == "images":
        command = f"bdkd train --data {place}"
    elif entry.needs_root or (fetched is not None and (root / fetched.folder).is_dir()):
        command += f" --data.root {place}"
    size = None if fetched is None else fetched.size
    return ListedSource(name, entry.reads, entry.needs_root, size, not missing, missing, command)
