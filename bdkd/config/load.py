"""Read and write recipes as TOML: shipped recipes, files, and the ``config.toml`` of a run."""

import copy
import dataclasses
import os
import typing
from collections.abc import Collection, Iterable
from importlib.resources import files
from pathlib import Path

import tomli_w

from bdkd.config.convert import EXAMPLE, convert
from bdkd.config.migration import migrate, migrate_of_run
from bdkd.config.options import NetworkConfig, Recipe
from bdkd.config.toml import MAX_CHARACTERS, parse_toml
from bdkd.errors import RunError, UsageError, shown
from bdkd.plugins import merge_plugins
from bdkd.registry import SELECTIONS, Selection, nearest
from bdkd.text import read_text, unicode_hint_of_path

Table = dict[str, typing.Any]
MAX_RECIPE_BYTES = 4 * MAX_CHARACTERS
# What a recipe selects if it does not contain the section or its key
DEFAULTS = {"data": "digits", "objective": "bdkd", "optimizer": "sgd"}


def shipped_recipes() -> list[str]:
    """Return the names of the shipped recipes."""
    names = [entry.name for entry in files("bdkd.recipes").iterdir()]
    return sorted(name.removesuffix(".toml") for name in names if name.endswith(".toml"))


def recipe_text(name: str) -> str:
    """Return the TOML text of a shipped recipe."""
    return (files("bdkd.recipes") / f"{name}.toml").read_text("utf-8")


def load_recipe(name_or_path: str) -> Recipe:
    """Return a shipped recipe by name, or the recipe in a TOML file.

    Raises:
        UsageError: no recipe has this name, or a key or value is invalid.
        RunError: the file cannot be read.
    """
    if name_or_path in shipped_recipes():
        return parse_recipe(recipe_text(name_or_path), source=f"recipe {name_or_path}")
    if not name_or_path:
        raise UsageError("the recipe must be a name or a TOML file, got an empty string")
    path = Path(name_or_path)
    if path.suffix != ".toml" and not os.path.exists(path):  # unlike path.exists(), never raises
        hint = f"{nearest(name_or_path, shipped_recipes())} (or give a TOML file)"
        raise UsageError(f"unknown recipe {shown(name_or_path)}: {hint}")
    try:
        text = read_text(path, limit=MAX_RECIPE_BYTES, pipe=True)
    except OSError as error:
        raise RunError(
            f"cannot read the recipe {path}: {error.strerror}: give the path of a TOML file, or "
            f"the name of a shipped recipe (bdkd recipes lists them){unicode_hint_of_path(path)}"
        ) from error
    return parse_recipe(text, source=str(path))


def parse_recipe(text: str, source: str, of_run: bool = False) -> Recipe:
    """Return the recipe in a TOML text.

    Args:
        source: name of the text in error messages.
        of_run: True if a run wrote the text. An older version of bdkd may have written it.

    Raises:
        UsageError: a key is unknown, a value is invalid, or a plugin is missing.
    """
    try:
        values = parse_toml(text)
    except ValueError as error:
        raise UsageError(f"{source} is not valid TOML: {error}") from error
    try:
        values = migrate(values)
        return _to_recipe(migrate_of_run(values) if of_run else values)
    except UsageError as error:
        raise UsageError(f"{source}: {error}") from error
    except RecursionError as error:
        raise UsageError(f"{source}: its arrays or tables are nested too deeply") from error


def _to_recipe(values: Table) -> Recipe:
    hints = typing.get_type_hints(Recipe, include_extras=True)
    refuse_unknown(values, hints, "")
    parts: Table = {
        "plugins": merge_plugins(convert(values.pop("plugins", []), list[str], "plugins"))
    }
    for selection in SELECTIONS:
        section = selection.section
        table = _table(values.pop(section, {}), section)
        table = {selection.key: DEFAULTS[section], **table}
        name = convert(table[selection.key], str, f"{section}.{selection.key}")
        refuse_foreign(table, selection, name)
        parts[section] = _section(table, selection.find(name).config, section)
    parts["networks"] = {
        name: _section(table, NetworkConfig, f"networks.{name}")
        for name, table in _table(values.pop("networks", {}), "networks").items()
    }
    for key, value in values.items():
        is_section = dataclasses.is_dataclass(hints[key])
        parts[key] = (_section if is_section else convert)(value, hints[key], key)
    if "name" not in parts:
        raise UsageError(f"the recipe has no name{EXAMPLE}")
    return Recipe(**parts)


def _section(value: object, kind: type, key: str) -> typing.Any:
    """Return a table as a dataclass."""
    refuse_unknown(_table(value, key), _names(kind), key)
    converted = convert(value, kind, key)
    # msgspec does not set attributes that have their default, which vars() would miss.
    return kind(**{name: getattr(converted, name) for name in _names(kind)})


def refuse_foreign(keys: Iterable[str], selection: Selection, name: str) -> None:
    """Raise ``UsageError`` for an option of another objective, data source or optimizer.

    Args:
        keys: keys of a section of the recipe.
        name: the selected item, such as ``kd`` for the selection of objectives.
    """
    own = _names(selection.find(name).config)
    for key in keys:
        owners = [other for other in selection if key in _names(selection[other].config)]
        if owners and key not in own:
            raise UsageError(
                f"{selection.section}.{key} is an option of {', '.join(owners)}: remove it for the "
                f"{selection.kind} {name!r}"
            )


def _names(config: type) -> list[str]:
    return [field.name for field in dataclasses.fields(config)]


def refuse_unknown(given: Collection[str], known: Collection[str], key: str) -> None:
    """Raise ``UsageError`` for an unknown key of a section, and suggest the nearest key."""
    for name in given:
        if name not in known:
            dotted = f"{key}.{name}" if key else name
            raise UsageError(f"unknown key {dotted}: {nearest(name, list(known))}")


def _table(value: object, key: str) -> Table:
    if not isinstance(value, dict):
        raise UsageError(f"{key} must be a table ([{key}]), got {shown(value)}")
    return value


def to_toml(recipe: Recipe) -> str:
    """Return a recipe as TOML text. :func:`parse_recipe` converts the text to an equal recipe."""
    return tomli_w.dumps(_without_none(dataclasses.asdict(recipe)))


def differing_keys(a: Recipe, b: Recipe) -> list[str]:
    """Return the dotted keys in which two recipes differ."""
    left, right = _flatten(dataclasses.asdict(a)), _flatten(dataclasses.asdict(b))
    absent = object()
    keys = sorted(left.keys() | right.keys())
    return [key for key in keys if left.get(key, absent) != right.get(key, absent)]


def select(recipe: Recipe, section: str, name: str) -> Recipe:
    """Return a recipe with another objective, data source or optimizer.

    An option keeps its value if the old and the new selection both have it and the value is not the
    old default. All other options get the defaults of the new selection. Objectives keep only
    ``label_smoothing`` and ``backend``, because the meaning of the other options depends on the
    objective.

    Args:
        section: ``"objective"``, ``"data"`` or ``"optimizer"``.
        name: the objective, data source or optimizer to select.

    Raises:
        UsageError: nothing is registered under this name, or the new recipe is not valid.
    """
    return dataclasses.replace(select_unchecked(recipe, section, name))


def select_unchecked(recipe: Recipe, section: str, name: str) -> Recipe:
    """Like :func:`select`, but do not validate the recipe. The caller may still set options."""
    selection = next(s for s in SELECTIONS if s.section == section)
    before = getattr(recipe, section)
    if getattr(before, selection.key) == name:
        return recipe
    kinds = type(before), selection.find(name).config
    old, new = (typing.get_type_hints(kind, include_extras=True) for kind in kinds)
    defaults = dataclasses.asdict(selection.configure(getattr(before, selection.key)))
    kept = {
        key: value
        for key, value in dataclasses.asdict(before).items()
        if key != selection.key and new.get(key) == old[key] and value != defaults[key]
        if section != "objective" or key in ("label_smoothing", "backend")
    }
    return replace_unchecked(recipe, **{section: selection.configure(name, **kept)})


def replace_unchecked(recipe: Recipe, **parts: typing.Any) -> Recipe:
    """Return a copy of a recipe with other fields. Unlike ``dataclasses.replace``, this does not
    validate the result."""
    changed = copy.copy(recipe)
    for name, part in parts.items():
        object.__setattr__(changed, name, part)  # Recipe is a frozen dataclass
    return changed


def _without_none(value: object) -> typing.Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return value


def _flatten(values: dict, prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in values.items():
        nested = isinstance(value, dict)
        flat |= _flatten(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return flat
