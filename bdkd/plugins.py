"""Plugins: modules outside of this package that register objectives, models and so on.

A plugin is named on the command line (``--plugin MODULE``), or installed with an entry point of the
group ``bdkd.plugins``. A recipe or a run cannot import a module. It only records which plugins it
needs, because importing a module runs its code.
"""

import contextlib
import importlib.util
import os
import re
import shlex
import sys
from collections.abc import Iterable
from importlib.metadata import EntryPoint, entry_points
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from bdkd.errors import RunError, UsageError
from bdkd.text import expand_user

GROUP = "bdkd.plugins"

_named: list[str] = []  # plugins that the command line names
_installed: list[EntryPoint] | None = None


def load_plugins(names: Iterable[str]) -> None:
    """Import the plugins that a command line names. They register what they contain.

    Args:
        names: modules, which may be in the working folder, or paths of ``.py`` files.

    Raises:
        UsageError: there is no such module or file.
        RunError: a module raises an error.
    """
    _named.clear()
    for name in names:
        try:
            if name.endswith(".py"):
                _import_file(expand_user(name, "--plugin"))
            else:
                _import_module(name)
        except (UsageError, RunError):
            raise
        except (Exception, SystemExit) as error:
            raise RunError(_failed(f"the plugin {name}", error)) from error
        if _key(name) not in map(_key, _named):
            _named.append(name)


def plugin_arguments() -> list[str]:
    """Return the arguments that name the same plugins on another command line."""
    return [argument for name in _named for argument in ("--plugin", name)]


def merge_plugins(recorded: Iterable[str]) -> tuple[str, ...]:
    """Return the plugins that a recipe records and the plugins that the command line names, sorted.
    For a file, only its name is recorded, without its folder.

    Raises:
        UsageError: a recorded plugin is neither named nor installed, or its name is not valid.
    """
    recorded = list(recorded)
    for name in recorded:
        if not name.isprintable() or not name.strip():
            raise UsageError(f"plugins must be names of modules or .py files, got {name!r}")
    if missing := missing_plugins(recorded):
        options = " ".join(f"--plugin {shlex.quote(name)}" for name in missing)
        raise UsageError(
            f"the recipe needs {options}: add it to the command line (this runs the plugin's code)"
        )
    return tuple(sorted({_key(name) for name in [*_named, *recorded]}))


def missing_plugins(recorded: Iterable[str]) -> list[str]:
    """Return the plugins that are neither named on the command line nor installed. Files are
    compared by their names, because a run may be used from another folder."""
    load_installed()
    known = {*map(_key, _named), *(entry.module for entry in _installed or ())}
    return [name for name in recorded if _key(name) not in known]


def _key(name: str) -> str:
    return Path(name).name if name.endswith(".py") else name


def load_installed() -> None:
    """Import the plugins that are installed with an entry point. Only the first call has an effect.

    Raises:
        RunError: a plugin raises an error.
    """
    global _installed
    if _installed is not None:
        return
    _installed = list(entry_points(group=GROUP))
    for entry in _installed:
        try:
            entry.load()
        except (Exception, SystemExit) as error:
            _installed = None  # so that the next call fails too
            package = entry.dist.name if entry.dist else "?"
            failed = _failed(f"the plugin {entry.value} of the package {package}", error)
            raise RunError(f"{failed}; fix it, or pip uninstall {package}") from error


def _import_module(name: str) -> None:
    if not re.fullmatch(r"\w+(\.\w+)*", name):
        raise UsageError(f"--plugin takes a module or the path of a .py file, got {name!r}")
    # The script bdkd does not have the working folder on its path, unlike python -m.
    if (folder := os.getcwd()) not in sys.path:
        sys.path.append(folder)
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # a module that the plugin imports
        raise UsageError(
            f"there is no plugin {name!r}: --plugin takes a module that can be imported, or the "
            "path of a .py file"
        ) from error


def _import_file(path: Path) -> None:
    if not os.path.isfile(path):
        raise UsageError(f"there is no plugin {path}: --plugin takes a .py file or a module")
    loaded = path.stem in sys.modules
    with contextlib.suppress(ImportError, ValueError):  # the module has no spec
        known = importlib.util.find_spec(path.stem)
        if known is not None and os.path.realpath(known.origin or "") != os.path.realpath(path):
            raise UsageError(f"the plugin {path} has the name of another module: rename it")
    if loaded:
        return
    spec = spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[path.stem] = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[path.stem]
        raise


def _failed(what: str, error: BaseException) -> str:
    text = " ".join(str(error).split())[:300]
    return f"cannot import {what}: {type(error).__name__}: {text}"
