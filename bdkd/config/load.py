"""Recipes as TOML: shipped ones, files, and the ``config.toml`` of a run."""

import dataclasses
import difflib
import tomllib
import typing
from importlib.resources import files
from pathlib import Path

import msgspec
import tomli_w

from bdkd.config.options import Recipe
from bdkd.errors import RunError, UsageError
from bdkd.text import read_text


def shipped_recipes() -> list[str]:
    """Return the names of the shipped recipes."""
    names = [entry.name for entry in files("bdkd.recipes").iterdir()]
    return sorted(name.removesuffix(".toml") for name in names if name.endswith(".toml"))


def load_recipe(name_or_path: str) -> Recipe:
    """Return a shipped recipe by name, or the recipe in a TOML file. Raise ``UsageError`` if it is
    missing or has an invalid key or value, and ``RunError`` if the file cannot be read."""
    if name_or_path in shipped_recipes():
        text = (files("bdkd.recipes") / f"{name_or_path}.toml").read_text("utf-8")
        return parse_recipe(text, source=f"recipe {name_or_path}")
    path = Path(name_or_path)
    if path.suffix != ".toml" and not path.exists():
        hint = f"{nearest(name_or_path, shipped_recipes())} (or give a TOML file)"
        raise UsageError(f"unknown recipe {name_or_path!r}: {hint}")
    try:
        text = read_text(path)
    except OSError as error:
        raise RunError(
            f"cannot read the recipe {path}: {error.strerror}: give the path of a TOML file, or "
            "the name of a shipped recipe (bdkd train lists them)"
        ) from error
    return parse_recipe(text, source=str(path))


def parse_recipe(text: str, source: str) -> Recipe:
    """Return the recipe in a TOML text. ``source`` names the text in error messages. Raise
    ``UsageError`` for an unknown key or a value of the wrong type."""
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{source} is not valid TOML: {error}") from error
    _refuse_unknown_keys(values, Recipe, source, "")
    try:
        return msgspec.convert(values, Recipe)
    except msgspec.ValidationError as error:
        lacks = "missing required" in str(error)
        remedy = "; see the config.toml of any run for a complete recipe" if lacks else ""
        raise UsageError(f"{source}: {error}{remedy}") from error


def to_toml(recipe: Recipe) -> str:
    """Return a recipe as TOML. :func:`parse_recipe` of the text returns an equal recipe."""
    return tomli_w.dumps(_without_none(dataclasses.asdict(recipe)))


def differing_keys(a: Recipe, b: Recipe) -> list[str]:
    """Return the dotted keys in which two recipes differ."""
    left, right = _flatten(dataclasses.asdict(a)), _flatten(dataclasses.asdict(b))
    return sorted({key for key, _ in left.items() ^ right.items()})


def nearest(name: str, known: list[str]) -> str:
    """Return a hint for an unknown name: the nearest known name, or all of them."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"there are {', '.join(known)}"


def _refuse_unknown_keys(values: object, kind: typing.Any, source: str, prefix: str) -> None:
    """Raise ``UsageError`` for unknown keys, which msgspec ignores in dataclasses."""
    if not isinstance(values, dict):
        return
    if typing.get_origin(kind) is dict:
        known = dict.fromkeys(values, typing.get_args(kind)[1])
    elif dataclasses.is_dataclass(kind):
        known = {field.name: field.type for field in dataclasses.fields(kind)}
    else:
        return
    for key, value in values.items():
        if key not in known:
            raise UsageError(f"{source}: unknown key {prefix}{key}: {nearest(key, list(known))}")
        _refuse_unknown_keys(value, known[key], source, f"{prefix}{key}.")


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
