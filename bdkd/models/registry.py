"""The registry of models by name.

A family is a function of ``(num_classes, in_channels, *, ...)``. A name fixes some of its
keyword-only arguments, such as the depth. The others are options that a user may set.
"""

import inspect
import math
import re
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import SequenceMatcher
from os.path import commonprefix
from typing import Any, TypeVar

from torch import nn

from bdkd.bounds import bounds_of, plain_type
from bdkd.registry import Registry

from . import bridge
from .bridge import LIBRARIES

_Family = TypeVar("_Family", bound=Callable[..., nn.Module])


@dataclass(frozen=True)
class _Entry:
    build: Callable[..., nn.Module]
    fixed: Mapping[str, Any]

    @property
    def options(self) -> dict[str, inspect.Parameter]:
        """Return the keyword-only arguments that a name does not fix."""
        takes = inspect.signature(self.build).parameters.values()
        own = (p for p in takes if p.kind is p.KEYWORD_ONLY and p.name not in self.fixed)
        return {p.name: p for p in own}


_IMAGENET = "imagenet_"
MODELS: Registry[_Entry] = Registry("model", "bdkd.models")
_patterns: dict[str, Callable[..., nn.Module]] = {}


def register_model(
    names: str | Mapping[str, Mapping[str, Any]], pattern: str | None = None
) -> Callable[[_Family], _Family]:
    """Return a decorator that registers a family of models.

    The decorated function (or class) takes ``(num_classes, in_channels, *, ...)`` and returns a
    module that maps images ``(N, in_channels, H, W)`` to logits ``(N, num_classes)``. If the module
    has a method ``forward_features``, reports show its features. The keyword-only arguments are
    options of a recipe. Their types and bounds are checked, as in
    ``width: Annotated[float, Bounds(gt=0)] = 1.0``.

    Args:
        names: a name, or a mapping from several names to the arguments that each name fixes.
        pattern: a regular expression for further names that are not listed, with ``_`` for hyphens.
            Its named groups are integer arguments that the name fixes.

    Raises:
        TypeError: a name is not a string.
        ValueError: a name has other characters than letters, digits, ``-``, ``_`` and ``.``, or
            another model has this name.
    """

    listed = names if isinstance(names, Mapping) else {names: {}}
    for name in listed:
        MODELS.check_name(name)
    if len({_normalised(name) for name in listed}) < len(listed):
        raise ValueError(f"two names differ only in case or hyphens: {', '.join(listed)}")

    def add(build: _Family) -> _Family:
        for name, fixed in listed.items():
            MODELS.add(_normalised(name), _Entry(build, fixed), build)
        if pattern is not None:
            _patterns[pattern] = build
        return build

    return add


def default_options(name: str) -> dict[str, Any]:
    """Return the options of a registered model that a recipe can hold, with their defaults."""
    entry = _find(name)
    options = entry.options.items() if entry is not None else ()
    return {
        option: parameter.default
        for option, parameter in options
        if isinstance(parameter.default, bool | int | float | str)
        and not (isinstance(parameter.default, float) and not math.isfinite(parameter.default))
    }


def describe_options(name: str) -> dict[str, str]:
    """Return the type, the bounds and the default of each option of a registered model, as text."""
    entry = _find(name)
    if entry is None:  # of timm or torchvision
        return {}
    return {
        option: f"{_needed(_hint(entry, option))} (default: {parameter.default})"
        for option, parameter in entry.options.items()
    }


def _hint(entry: _Entry, option: str) -> Any:
    build: Any = entry.build
    if isinstance(build, type):
        build = build.__init__  # type: ignore[misc]
    return typing.get_type_hints(build, include_extras=True).get(option)


def _needed(hint: Any) -> str:
    kind, bounds = plain_type(hint), bounds_of(hint)
    if choices := _choices(kind):
        return f"one of {', '.join(map(repr, choices))}"
    within = f" {bounds}" if bounds else ""
    return {
        bool: "true or false", int: f"an integer{within}", float: f"a finite number{within}",
        str: "a string",
    }.get(kind, str(kind))  # fmt: skip


def _choices(kind: Any) -> tuple[Any, ...]:
    return typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else ()


def _checked(entry: _Entry, option: str, value: Any) -> Any:
    """Return the value of an option, or raise ``ValueError`` if it does not fit its type."""
    hint = _hint(entry, option)
    kind, bounds = plain_type(hint), bounds_of(hint)
    if choices := _choices(kind):
        fits = value in choices
    elif kind not in (bool, int, float, str):
        return value
    elif kind in (int, float):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        fits = number and (isinstance(value, int) or math.isfinite(value))
        fits = fits and (bounds is None or bounds.contains(value))
        fits = fits and (kind is float or value == int(value))
    else:
        fits = isinstance(value, kind)
    if not fits:
        raise ValueError(f"{option} must be {_needed(hint)}, got {value!r}")
    return int(value) if kind is int else value


def list_models() -> list[str]:
    """Return the names of the built-in networks: for small images first, then ``imagenet_`` names.

    Families with a width in their name (``wrn_16_2``) also build unlisted widths, and
    :func:`create_model` accepts every name of timm and torchvision with the prefix ``timm:`` or
    ``torchvision:``.
    """
    return sorted(MODELS, key=lambda name: name.startswith(_IMAGENET))


def image_size_of(name: str, options: Mapping[str, object]) -> int | None:
    """Return the side in pixels of the images for which a model was made, or None if the model is
    unknown or was made for small images of any size.

    Raises:
        RunError: timm is missing or cannot be imported.
    """
    library, colon, library_name = name.partition(":")
    if colon and library.lower() in LIBRARIES:
        return bridge.image_size_of(library.lower(), library_name, options)
    return 224 if _normalised(name).startswith(_IMAGENET) else None


def fixed_image_size_of(name: str, options: Mapping[str, object]) -> int | None:
    """Return the side in pixels of the only images that a model supports, or None if it supports
    several sizes. Vision transformers, for example, support one size. See :func:`image_size_of` for
    arguments and errors."""
    library, colon, library_name = name.partition(":")
    if colon and library.lower() in LIBRARIES:
        return bridge.fixed_image_size_of(library.lower(), library_name, options)
    return None


def create_model(name: str, num_classes: int, in_channels: int = 3, **options: object) -> nn.Module:
    """Build a network with new weights.

    The network maps images ``(N, in_channels, H, W)`` to logits ``(N, num_classes)``. Its method
    ``forward_features`` returns the features ``(N, num_features)``, the input of the classifier.

    Args:
        name: a name of :func:`list_models`, in upper or lower case, with hyphens or underscores; or
            ``timm:NAME`` or ``torchvision:NAME``, if that library is installed.
        num_classes: number of classes.
        in_channels: channels of the images.
        options: options of the family, such as ``width`` or ``dropout``. For ``timm:NAME``,
            arguments of ``timm.create_model``, such as ``pretrained`` or ``img_size``.

    Raises:
        ValueError: the name is unknown, the model does not have an option, or a value is invalid.
        RunError: timm or torchvision is missing or cannot be imported, or pretrained weights
            cannot be downloaded.
    """
    if not isinstance(name, str):
        raise TypeError(
            f"name must be a string such as 'resnet20', got {name!r} ({type(name).__name__}): "
            "call list_models() for all names"
        )
    for argument, value in (("num_classes", num_classes), ("in_channels", in_channels)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{argument} must be an integer >= 1, got {value!r}")
    library, colon, library_name = name.partition(":")
    if colon and library.lower() in LIBRARIES:
        return LIBRARIES[library.lower()](library_name, num_classes, in_channels, **options)
    entry, known = _find(name), _normalised(name)
    if entry is None:
        nearest = bridge.in_timm(name) or f"the nearest name is {_nearest(known)!r}"
        raise ValueError(f"there is no model named {name!r}; {nearest}")
    if unknown := [option for option in options if option not in entry.options]:
        takes = ", ".join(entry.options) or "no option"
        raise ValueError(f"model {known!r} has no option {unknown[0]!r}; it takes {takes}")
    given = {option: _checked(entry, option, value) for option, value in options.items()}
    return entry.build(num_classes, in_channels, **entry.fixed, **given)


def _normalised(name: str) -> str:
    return name.lower().replace("-", "_")


def _find(name: str) -> _Entry | None:
    known = _normalised(name)
    entry = MODELS.get(known)
    for pattern, build in _patterns.items():
        match = re.fullmatch(pattern, known, re.IGNORECASE)
        if entry is None and match is not None:
            entry = _Entry(build, {key: int(value) for key, value in match.groupdict().items()})
    return entry


def _nearest(name: str) -> str:
    def similarity(known: str) -> tuple[float, int]:
        shared = commonprefix([name, known])  # noqa: RUF071 (strings, not paths)
        # Users of torchvision omit the prefix.
        forms = (known, known.removeprefix(_IMAGENET))
        return max(SequenceMatcher(None, name, form).ratio() for form in forms), len(shared)

    return max(MODELS, key=similarity)
