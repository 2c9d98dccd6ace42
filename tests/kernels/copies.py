"""Copies of the package under other names, as in a project that vendors it."""

import importlib
import shutil
import sys
from pathlib import Path
from types import ModuleType

import bdkd_kernels

FOLDER = Path(bdkd_kernels.__file__).parent


def copy_package(name: str, folder: Path) -> Path:
    """Copy the package to ``folder`` as ``name``, which may have dots, and return its folder."""
    target = folder.joinpath(*name.split("."))
    shutil.copytree(FOLDER, target, ignore=shutil.ignore_patterns("__pycache__"))
    return target


def import_copy(name: str, folder: Path) -> ModuleType:
    """Import a copy. Each name can be imported once in a process: torch's registries are global."""
    sys.path.insert(0, str(folder))
    try:
        importlib.invalidate_caches()
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(folder))
