"""Convert TOML values to the types of options, and describe values of the wrong type."""

import dataclasses
import datetime
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import msgspec

from bdkd.bounds import plain_type
from bdkd.errors import UsageError, shown

EXAMPLE = "; see the config.toml of any run for a complete recipe"
_ONE = {
    bool: "true or false", int: "an integer", float: "a number", str: "a string",
    list: "an array", tuple: "an array", dict: "a table", datetime.date: "a date",
    datetime.datetime: "a date", datetime.time: "a time", Path: "a path",
}  # fmt: skip
_MANY = {bool: "true or false", int: "integers", float: "numbers", str: "strings"}


def convert(value: object, kind: Any, key: str) -> Any:
    """Return a TOML value converted to the type ``kind``. Raise ``UsageError`` with the key and the
    value if the type does not match."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise UsageError(_describe(value, kind, key)) from error


def _describe(value: Any, kind: Any, key: str) -> str:
    """Return a message about the innermost value that has the wrong type."""
    kind = plain_type(kind)
    for item, item_kind, item_key in _items(value, kind, key):
        if item is dataclasses.MISSING:
            return f"{item_key} is missing{EXAMPLE}"
        try:
            msgspec.convert(item, item_kind)
        except msgspec.ValidationError:
            return _describe(item, item_kind, item_key)
    found = shown(value)
    if type(value) is int and not -(2**63) <= value < 2**63:
        return f"{key} must be within 64 bits, got {found}"
    if type(value) in _ONE and type(value) is not bool and typing.get_origin(kind) is not Literal:
        found += f" ({_ONE[type(value)]})"
    return f"{key} must be {needed_for(kind)}, got {found}"


def _items(value: Any, kind: Any, key: str) -> list[tuple[Any, Any, str]]:
    """Return the items of a table or array, each with its type and key. Return an empty list if
    ``value`` is not of the type ``kind``."""
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        hints = typing.get_type_hints(kind, include_extras=True)
        needed = [field.name for field in dataclasses.fields(kind) if _is_required(field)]
        return [
            (value.get(name, dataclasses.MISSING), hints[name], f"{key}.{name}")
            for name in hints
            if name in value or name in needed
        ]
    kinds = typing.get_args(kind)
    if typing.get_origin(kind) is dict and isinstance(value, dict):
        return [(item, kinds[1], f"{key}.{name}") for name, item in value.items()]
    if typing.get_origin(kind) in (list, tuple) and isinstance(value, list):
        if len(kinds) == 1 or Ellipsis in kinds:
            kinds = (kinds[0],) * len(value)
        if len(kinds) == len(value):
            numbered = enumerate(zip(value, kinds, strict=True))
            return [(item, kind, f"{key}[{index}]") for index, (item, kind) in numbered]
    return []


def _is_required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def needed_for(kind: Any, many: bool = False) -> str:
    """Return a description of the values of a type, such as "an integer" or "an array of integers".

    Args:
        many: use the plural, for the items of an array.
    """
    kind, kinds = plain_type(kind), typing.get_args(plain_type(kind))
    origin = typing.get_origin(kind)
    if origin is Literal:
        return _either(map(repr, kinds))
    if origin in (types.UnionType, typing.Union):
        return _either(needed_for(k, many) for k in kinds)
    if origin in (list, tuple):
        count = "" if len(kinds) == 1 or Ellipsis in kinds else f"{len(kinds)} "
        array = "arrays" if many else "an array"
        return f"{array} of {count}{needed_for(kinds[0], many=True)}"
    if many and kind in _MANY:
        return _MANY[kind]
    return _ONE.get(origin or kind, "a table")


def _either(choices: Iterable[str]) -> str:
    *others, last = dict.fromkeys(choices)
    return f"{', '.join(others)} or {last}" if others else last
