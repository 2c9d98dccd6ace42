"""The registry of models by name.

A family is a function of ``(num_classes, in_channels, *, ...)``. A name fixes some of its
keyword-only arguments, such as the depth. The others are options that a user may set.
"""

import inspect
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import SequenceMatcher
from os.path import commonprefix
from typing import Any, TypeVar

from torch import nn

from .bridge import LIBRARIES

_Family = TypeVar("_Family", bound=Callable[..., nn.Module])


@dataclass(frozen=True)
class _Entry:
    build: Callable[..., nn.Module]
    fixed: Mapping[str, Any]

    @property
    def options(self) -> list[str]:
        takes = inspect.signature(self.build).parameters.values()
        return [p.name for p in takes if p.kind is p.KEYWORD_ONLY and p.name not in self.fixed]


_IMAGENET = "imagenet_"
_named: dict[str, _Entry] = {}
_patterns: list[tuple[re.Pattern[str], Callable[..., nn.Module]]] = []


def register(
    names: Mapping[str, Mapping[str, Any]], pattern: str | None = None
) -> Callable[[_Family], _Family]:
    """Return a decorator that registers a family.

    Args:
        names: the arguments that each listed name fixes.
        pattern: a regular expression for further, unlisted names. Its named groups are integer
            arguments that the name fixes.
    """

    def add(build: _Family) -> _Family:
        for name, fixed in names.items():
            if name in _named:
                raise ValueError(f"two models are named {name!r}")
            _named[name] = _Entry(build, fixed)
        if pattern is not None:
            _patterns.append((re.compile(pattern), build))
        return build

    return add


def check_number(option: str, value: object, needed: str, fits: Callable[[float], bool]) -> None:
    """Raise ``ValueError`` unless ``value`` is a number that ``fits``."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not fits(value):
        raise ValueError(f"{option} must be {needed}, got {value!r}")


def check_width(width: object) -> None:
    """Raise ``ValueError`` unless ``width`` can multiply channels."""
    check_number("width", width, "a finite number > 0", lambda x: 0 < x < math.inf)


def check_dropout(dropout: object) -> None:
    """Raise ``ValueError`` unless ``dropout`` is a valid probability."""
    check_number("dropout", dropout, "a number in [0, 1)", lambda x: 0 <= x < 1)


def list_models() -> list[str]:
    """Return the names of the built-in networks: for small images first, then ``imagenet_`` names.

    Families with a width in their name (``wrn_16_2``) also build unlisted widths, and
    :func:`create_model` accepts every name of timm and torchvision with the prefix ``timm:`` or
    ``torchvision:``.
    """
    return sorted(_named, key=lambda name: name.startswith(_IMAGENET))


def create_model(name: str, num_classes: int, in_channels: int = 3, **options: object) -> nn.Module:
    """Build a network with new weights.

    The network maps images ``(N, in_channels, H, W)`` to logits ``(N, num_classes)``. Its method
    ``forward_features`` returns the features ``(N, num_features)`` that its classifier reads.

    Args:
        name: one of :func:`list_models`, in upper or lower case, with hyphens or underscores; or
            ``timm:NAME`` or ``torchvision:NAME``, if that library is installed.
        num_classes: length of the logits.
        in_channels: channels of the images.
        options: options of the family, such as ``width`` or ``dropout``; with ``timm:``, arguments
            of ``timm.create_model``, such as ``pretrained`` or ``img_size``.

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
    known = name.lower().replace("-", "_")
    entry = _named.get(known)
    for pattern, build in _patterns:
        if entry is None and (match := pattern.fullmatch(known)):
            entry = _Entry(build, {key: int(value) for key, value in match.groupdict().items()})
    if entry is None:
        raise ValueError(
            f"there is no model named {name!r}; the nearest name is {_nearest(known)!r}"
        )
    if unknown := [option for option in options if option not in entry.options]:
        takes = ", ".join(entry.options) or "no option"
        raise ValueError(f"model {known!r} has no option {unknown[0]!r}; it takes {takes}")
    return entry.build(num_classes, in_channels, **entry.fixed, **options)


def _nearest(name: str) -> str:
    def similarity(known: str) -> tuple[float, int]:
        shared = commonprefix([name, known])  # noqa: RUF071 (strings, not paths)
        # Users of torchvision omit the prefix.
        forms = (known, known.removeprefix(_IMAGENET))
        return max(SequenceMatcher(None, name, form).ratio() for form in forms), len(shared)

    return max(_named, key=similarity)
