"""Names and what they build.

A family is one function of ``(num_classes, in_channels, *, ...)``; its keyword-only arguments are
what a name fixes (a depth, say) and, the rest of them, the options that a user may set.
"""

import inspect
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
        return [
            name
            for name, parameter in inspect.signature(self.build).parameters.items()
            if parameter.kind is parameter.KEYWORD_ONLY and name not in self.fixed
        ]


_IMAGENET = "imagenet_"
_named: dict[str, _Entry] = {}
_patterns: list[tuple[re.Pattern[str], Callable[..., nn.Module]]] = []


def register(
    names: Mapping[str, Mapping[str, Any]], pattern: str | None = None
) -> Callable[[_Family], _Family]:
    """Decorate a family: ``names`` says what each listed name fixes; ``pattern``, a regular
    expression whose named groups are integers that a name fixes, admits names beyond the list."""

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
    """Raise ``ValueError`` that says what ``option`` needs, unless ``value`` is a number that
    ``fits``."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not fits(value):
        raise ValueError(f"{option} must be {needed}, got {value!r}")


def list_models() -> list[str]:
    """The networks in the box: those for small images, then the ``imagenet_`` ones, a family's
    small networks first.

    Families with a width in their name (``wrn_16_2``) also build the widths that are not listed,
    and :func:`create_model` takes any name of timm's and torchvision's behind ``timm:`` and
    ``torchvision:``.
    """
    return sorted(_named, key=lambda name: name.startswith(_IMAGENET))


def create_model(name: str, num_classes: int, in_channels: int = 3, **options: object) -> nn.Module:
    """Build a registered network, freshly initialised.

    The network maps images ``(N, in_channels, H, W)`` to logits ``(N, num_classes)``; its
    ``forward_features`` gives the features ``(N, num_features)`` that its classifier sees.

    Args:
        name: one of :func:`list_models`; case does not matter, nor do hyphens for underscores.
            Or ``timm:NAME`` or ``torchvision:NAME``, where that library is installed.
        num_classes: length of the logits.
        in_channels: channels of the images.
        options: what the family takes besides, such as ``width`` or ``dropout``; with ``timm:``,
            what ``timm.create_model`` takes, such as ``pretrained`` or ``img_size``.

    Raises:
        ValueError: an unknown name (the nearest valid one is named), an option that the model does
            not take (those it takes are named), or a value that does not fit.
        RunError: timm or torchvision is missing or does not import, or the pretrained weights
            cannot be had.
    """
    if not isinstance(name, str):
        raise TypeError(
            f"name must be a string such as 'resnet20', got {name!r} ({type(name).__name__}): "
            "list_models() names them all"
        )
    for argument, value in (("num_classes", num_classes), ("in_channels", in_channels)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{argument} must be an integer >= 1, got {value!r}")
    library, colon, its_name = name.partition(":")
    if colon and library.lower() in LIBRARIES:
        return LIBRARIES[library.lower()](its_name, num_classes, in_channels, **options)
    known = name.lower().replace("-", "_")
    entry = _find(known)
    if entry is None:
        raise ValueError(
            f"there is no model named {name!r}; the nearest name is {_nearest(known)!r}"
        )
    unknown = next((option for option in options if option not in entry.options), None)
    if unknown is not None:
        takes = ", ".join(entry.options) or "no option"
        raise ValueError(f"model {known!r} has no option {unknown!r}; it takes {takes}")
    return entry.build(num_classes, in_channels, **entry.fixed, **options)


def _find(name: str) -> _Entry | None:
    if name in _named:
        return _named[name]
    for pattern, build in _patterns:
        if match := pattern.fullmatch(name):
            return _Entry(build, {key: int(value) for key, value in match.groupdict().items()})
    return None


def _nearest(name: str) -> str:
    def likeness(known: str) -> tuple[float, int]:
        shared = commonprefix([name, known])  # noqa: RUF071 (strings are meant, not paths)
        # torchvision's users leave the prefix out.
        forms = (known, known.removeprefix(_IMAGENET))
        return max(SequenceMatcher(None, name, form).ratio() for form in forms), len(shared)

    return max(_named, key=likeness)
