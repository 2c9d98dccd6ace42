"""Open Hugging Face data sets from the Hub or from disk, and Parquet files, with ``datasets``.

``datasets`` converts Parquet files and data sets of the Hub once, into Arrow files in its cache.
Only the labels are read into memory here.
"""

import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from bdkd.data.imagenet.index import Index, names_array
from bdkd.data.images.columns import choose_image_column, choose_label_column
from bdkd.data.images.rows import Rows, read_rows
from bdkd.data.notes import note
from bdkd.data.own_splits import FoundImages, Role, split_roles, val_as_test
from bdkd.errors import RunError
from bdkd.text import expand_user

PREFIX = "hf:"
PROBE_SECONDS = 10.0
INSTALL = "pip install 'bdkd[hf]'"


def missing_datasets() -> str:
    """Return a message if ``datasets`` is not installed, or an empty string."""
    return "" if find_spec("datasets") else f"datasets is not installed: {INSTALL}"


def is_saved(folder: Path) -> bool:
    """Return whether ``save_to_disk`` of ``datasets`` wrote a folder."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def find_rows(
    name: str, where: str, image_column: str | None, label_column: str | None
) -> FoundImages:
    """Index a data set.

    Args:
        name: a folder, a ``.parquet`` file, or ``OWNER/NAME`` of the Hub. A configuration may
            follow after a colon.
        where: name of the data set in messages.
        image_column: column of the images. None: the only one.
        label_column: column of the labels. None: the only one.

    Raises:
        UsageError: a column must be chosen, or does not exist.
        RunError: ``datasets`` is not installed, the data set is missing or cannot be read, or it
            has no images or labels.
    """
    parts = _open(name, where)
    roles = split_roles(parts, where)
    if len(parts) == 1:
        roles = {"train": next(iter(parts))}
    if "train" not in roles:
        raise RunError(
            f"{where} has no split train, only {', '.join(parts)}: choose another data set"
        )
    if unused := [part for part in parts if part not in roles.values()]:
        note(f"{where} holds more splits, which are not used: {', '.join(unused)}")
    features = parts[roles["train"]].features
    image = choose_image_column(features, image_column, where)
    label = choose_label_column(features, label_column, where)
    rows: dict[Role, Rows] = {}
    for role, part in roles.items():
        place = f"the split {part} of {where}"
        if missing := {image, label} - {*parts[part].features}:
            note(f"{place} is not used: it has no column {', '.join(sorted(missing))}")
        elif found := _rows(parts[part], image, label, place, optional=role != "train"):
            rows[role] = found
    return _indexed(rows, roles, getattr(features[label], "names", None), where)


def _rows(part: Any, image: str, label: str, place: str, optional: bool) -> Rows | None:
    """Return the rows of a split, or None if it is optional and has no labels."""
    rows = read_rows([file["filename"] for file in part.cache_files], image, label, place)
    if len(rows.labels) != len(part):
        raise RunError(
            f"{place} has only some of the rows in its Arrow files: load the data set with "
            "datasets and save it with save_to_disk"
        )
    unlabelled = sum(value is None or value == -1 for value in rows.labels)
    if optional and unlabelled == len(rows.labels):
        note(f"{place} is not used: its images have no labels")
        return None
    if unlabelled:
        raise RunError(
            f"{unlabelled} of {len(rows.labels)} images of {place} have no label in the column "
            f"{label}: remove these rows from the data set"
        )
    return rows


def _indexed(
    rows: Mapping[Role, Rows], roles: dict[Role, str], names: list[str] | None, where: str
) -> FoundImages:
    """Return the index of each split.

    Args:
        names: class names, if the label column has the type ``ClassLabel``.
    """
    if "train" not in rows:
        raise RunError(f"{where} has no training images with labels: choose another data set")
    values = sorted({*rows["train"].labels}, key=lambda value: (str(type(value)), value))
    for role, found in rows.items():
        if unknown := sorted({*map(str, found.labels)} - {*map(str, values)}):
            raise RunError(
                f"the split {roles[role]} of {where} has labels that {roles['train']} does not "
                f"have: {', '.join(unknown[:5])}{' ...' if len(unknown) > 5 else ''}"
            )
    number = {value: label for label, value in enumerate(values)}
    if names is not None and len(values) < len(names):
        absent = [name for i, name in enumerate(names) if i not in number]
        note(f"{len(absent)} of the {len(names)} classes of {where} have no images and are left "
             f"out: {', '.join(absent[:5])}{' ...' if len(absent) > 5 else ''}")  # fmt: skip
    classes = tuple(str(value) if names is None else names[value] for value in values)
    stored = val_as_test({role: roles[role] for role in rows})
    by_name = {roles[role]: found for role, found in rows.items()}
    indices = {role: _index(by_name[name], name, number, where) for role, name in stored.items()}
    return FoundImages(where, classes, indices, stored)


def _index(rows: Rows, split: str, number: Mapping[Any, int], where: str) -> Index:
    labels = np.array([number[value] for value in rows.labels], np.int64)
    names = names_array([str(row) for row in range(len(labels))])
    containers = (split,) * len(rows.files)
    return Index(
        Path(where), containers, rows.file, names, labels, rows.offsets, rows.sizes, rows.files
    )


def _open(name: str, where: str) -> dict[str, Any]:
    """Return the splits by name, as objects of ``datasets``."""
    try:
        import datasets
        import huggingface_hub
    except ImportError as error:
        raise RunError(f"{where} needs the package datasets: {INSTALL}") from error
    path, config = _path_and_config(name)
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # errors say what failed
    huggingface_hub.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    if path is None:
        loaded = _open_hub(*name.partition(":")[::2], where)
    else:
        loaded = _described(where, lambda: _open_local(path, config))
    parts = loaded if isinstance(loaded, dict) else {"train": loaded}
    if not parts:
        raise RunError(f"{where} has no splits: choose another data set")
    return {str(part): content for part, content in parts.items()}


def _path_and_config(name: str) -> tuple[Path | None, str | None]:
    """Return the path and the configuration of a local data set. No path: it is on the Hub."""
    whole = expand_user(name, "data.root")
    if name and whole.exists():
        return whole, None
    before, colon, config = name.rpartition(":")
    if colon and (path := expand_user(before, "data.root")).exists():
        return path, config
    if name.startswith(("/", ".", "~")) or name.count("/") > 1 or not name:
        raise RunError(
            f"no data set at {name or 'an empty path'}: hf: needs an existing folder or .parquet "
            "file, or OWNER/NAME of a data set on the Hugging Face Hub"
        )
    return None, None


def _open_local(path: Path, config: str | None) -> Any:
    import datasets

    if path.is_dir() and is_saved(path):
        return datasets.load_from_disk(str(path), keep_in_memory=False)
    if path.is_file():
        files = {"data_files": str(path)}
        return datasets.load_dataset("parquet", config, keep_in_memory=False, **files)
    return datasets.load_dataset(str(path), config, keep_in_memory=False)


def _described(where: str, load: Any) -> Any:
    """Call a function of ``datasets``, and turn its many kinds of errors into ``RunError``."""
    try:
        return load()
    except (MemoryError, RunError):
        raise
    except Exception as error:
        reason = " ".join(str(error.__cause__ or error).split())[:200] or type(error).__name__
        raise RunError(f"cannot read the data set {where}: {reason}") from error


def _open_hub(name: str, config: str, where: str) -> Any:
    """Load a data set of the Hub. Without a network, load the copy in the cache.

    A single request first checks the connection, because ``datasets`` retries for 20 seconds.
    """
    import datasets
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
    )

    def load() -> Any:
        return datasets.load_dataset(name, config or None, keep_in_memory=False)

    try:
        HfApi().dataset_info(name, timeout=PROBE_SECONDS)
    except GatedRepoError as error:
        raise RunError(
            f"the data set {name} needs permission: accept its terms at "
            f"https://huggingface.co/datasets/{name}, and run hf auth login"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise RunError(
            f"no data set {name!r} on the Hugging Face Hub: check the name (hf:OWNER/NAME); a "
            "folder must exist (hf:DIR)"
        ) from error
    except Exception as error:  # no network or offline mode; the type depends on the version
        with _offline():
            try:
                return load()
            except Exception as missing:
                text = " ".join(str(error).split())[:80] or type(error).__name__
                reason = re.sub(r"^\[Errno -?\d+\] ", "", text)
                raise RunError(
                    f"cannot reach the Hugging Face Hub ({reason}) and {name} is not in the cache: "
                    f"run hf download {name} --repo-type dataset --local-dir DIR where there is a "
                    "network, copy DIR here, and pass hf:DIR"
                ) from missing
    return _described(where, load)


@contextmanager
def _offline() -> Iterator[None]:
    """Switch ``datasets`` to its offline mode within the context."""
    import datasets
    import huggingface_hub

    modules: tuple[Any, ...] = (datasets.config, huggingface_hub.constants)
    before = [module.HF_HUB_OFFLINE for module in modules]
    try:
        for module in modules:
            module.HF_HUB_OFFLINE = True
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = value
