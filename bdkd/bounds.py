"""Bounds of options. They are part of the type of an option: ``Annotated[int, Bounds(ge=1)]``."""

import dataclasses
import math
import types
import typing
from collections.abc import Iterator
from functools import lru_cache
from operator import ge, gt, le, lt
from typing import Annotated, Any, NamedTuple, TypeVar

from bdkd.errors import UsageError, shown


class Bounds(NamedTuple):
    """The bounds of a number. Each is optional."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None

    def contains(self, number: float) -> bool:
        """Return whether a number is within the bounds. NaN is not."""
        bounds = zip((ge, gt, le, lt), self, strict=True)
        return number == number and all(b is None or holds(number, b) for holds, b in bounds)

    def __str__(self) -> str:
        low = self.gt if self.ge is None else self.ge
        high = self.lt if self.le is None else self.le
        if high is None:
            return f"above {low}" if self.ge is None else f"at least {low}"
        if low is None:
            return f"below {high}" if self.le is None else f"at most {high}"
        left, right = "(" if self.ge is None else "[", ")" if self.le is None else "]"
        return f"in {left}{low}, {'2**63' if high == 2**63 else high}{right}"


Number = TypeVar("Number", int, float)
NotNegative = Annotated[Number, Bounds(ge=0)]
Count = Annotated[int, Bounds(ge=1)]
Side = Annotated[int, Bounds(ge=8, le=4096)]
Positive = Annotated[float, Bounds(gt=0)]
Share = Annotated[float, Bounds(ge=0, le=1)]
Rate = Annotated[float, Bounds(ge=0, lt=1)]


def check_bounds(options: Any, key: str) -> None:
    """Check every number of a dataclass, also those in tuples.

    Args:
        key: key of the dataclass in a recipe, such as ``networks.student``; may be empty.

    Raises:
        UsageError: a number is out of its bounds or not finite. The message has its key.
    """
    kind: Any = type(options)
    for name, hint in _hints(kind).items():
        check_value(f"{key}.{name}" if key else name, getattr(options, name), hint)


def check_value(key: str, value: object, hint: Any = None) -> None:
    """Raise ``UsageError`` if a number is not finite, not within the bounds of its type, or an
    integer of more than 64 bits; or if a string cannot be a path or be written as UTF-8.

    Args:
        value: a number, a string, or a tuple of them. Other values pass.
        hint: type of the value, with bounds.
    """
    for text in value if isinstance(value, tuple) else (value,):
        if isinstance(text, str) and ("\0" in text or _is_not_utf8(text)):
            raise UsageError(f"{key} must be UTF-8 text without NUL, got {shown(text)}")
    for number, bounds in _numbers(value, hint, None):
        if bounds is not None and not bounds.contains(number):
            raise UsageError(f"{key} must be {bounds}, got {shown(value)}")
        if isinstance(number, int) and not -(2**63) <= number < 2**63:
            raise UsageError(f"{key} must be within 64 bits, got {shown(value)}")
        if isinstance(number, float) and not math.isfinite(number):
            raise UsageError(f"{key} must be finite, got {shown(value)}")


def _is_not_utf8(text: str) -> bool:
    """Return whether a text contains surrogates. Python uses them for bytes of a command line or a
    file name that are not UTF-8."""
    return any("\ud800" <= letter <= "\udfff" for letter in text)


def _numbers(
    value: object, hint: Any, bounds: Bounds | None
) -> Iterator[tuple[float, Bounds | None]]:
    """Yield every number in a value with its bounds."""
    hint, bounds = plain_type(hint), bounds_of(hint) or bounds
    if _is_union(hint):
        of_tuple = isinstance(value, tuple)
        kinds = [k for k in typing.get_args(hint) if _is_tuple(k) == of_tuple]
        hint = kinds[0] if kinds else None
        yield from _numbers(value, hint, bounds)
    elif isinstance(value, tuple):
        kinds = list(typing.get_args(hint))
        if len(kinds) != len(value) or Ellipsis in kinds:
            kinds = [kinds[0] if Ellipsis in kinds else None] * len(value)
        for item, kind in zip(value, kinds, strict=True):
            yield from _numbers(item, kind, bounds)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value, bounds


def _is_tuple(hint: Any) -> bool:
    return typing.get_origin(plain_type(hint)) is tuple


@lru_cache
def _hints(kind: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def plain_type(hint: Any) -> Any:
    """Return a type without its bounds, and without ``None``."""
    if typing.get_origin(hint) is Annotated:
        return plain_type(hint.__origin__)
    return hint if (only := _without_none(hint)) is None else plain_type(only)


def bounds_of(hint: Any) -> Bounds | None:
    """Return the bounds of a type, which may be optional, or None."""
    if typing.get_origin(hint) is Annotated:
        own = (item for item in hint.__metadata__ if isinstance(item, Bounds))
        return next(own, None) or bounds_of(hint.__origin__)
    return None if (only := _without_none(hint)) is None else bounds_of(only)


def _without_none(hint: Any) -> Any:
    """Return T of ``T | None``, and None for all other types."""
    if not _is_union(hint):
        return None
    kinds = [kind for kind in typing.get_args(hint) if kind is not types.NoneType]
    return kinds[0] if len(kinds) == 1 else None


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (types.UnionType, typing.Union)
