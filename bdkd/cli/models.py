"""``bdkd models``: list the networks that a recipe can name."""

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Annotated

import torch
import tyro

from bdkd.cli.flags import parse
from bdkd.cli.table import table
from bdkd.errors import RunError, UsageError
from bdkd.models import create_model, list_models
from bdkd.models.libraries import INSTALL, import_library, is_installed
from bdkd.models.pretrained import published_weights
from bdkd.models.registry import image_size_of
from bdkd.registry import nearest

# Numbers of classes with which parameters are counted, as in CIFAR-100 and ImageNet
SMALL_CLASSES, CLASSES = 100, 1000
# Counting the parameters of a network of timm takes about 0.1 s.
MOST_COUNTED = 24


@dataclass(frozen=True)
class Arguments:
    """List networks with their name in a recipe, number of parameters (with 1000 classes, or with
    100 for networks for small images), image size, and whether pretrained weights are published
    (yes) or are on this machine (here)."""

    pattern: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[PATTERN]")] = None
    """A part of the name (resnet18) or a glob (resnet*, timm:*vit*). With a dot, also the tags of
    timm's weights (timm:resnet50.*). Default: the networks of bdkd."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print one JSON array instead of a table."""


@dataclass(frozen=True)
class Row:
    """One network."""

    name: str
    parameters: int | None  # None: not counted
    image_size: int | None  # None: small images of any size
    pretrained: str  # where the weights are: "", "yes" (published) or "here" (on this machine)


def run(given: list[str]) -> None:
    """Print the networks that match a pattern."""
    arguments = parse(Arguments, "bdkd models", given)
    pattern = arguments.pattern
    names, notes = (list_models(), _others()) if pattern is None else _matching(pattern)
    counted = sum(name.startswith("timm:") for name in names) <= MOST_COUNTED
    if not counted:
        notes.append(
            f"the parameters of timm's networks are counted for at most {MOST_COUNTED} matches: "
            "give a narrower pattern"
        )
    rows = [row for name in names if (row := _row(name, counted or not name.startswith("timm:")))]
    if not rows:
        raise UsageError(
            f"no model that matches {pattern!r} has a linear classifier, which bdkd requires"
        )
    if arguments.json:
        print(json.dumps([asdict(row) for row in rows], indent=2), flush=True)
        return
    header = ["name", "parameters", "image size", "pretrained"]
    print(table(header, [_cells(row) for row in rows]))
    print(
        f"\nparameters: with {CLASSES} classes, or {SMALL_CLASSES} if any image size fits",
        *notes,
        sep="\n",
    )
    print(end="", flush=True)  # so that a closed pipe is an error here


def _others() -> list[str]:
    """Return lines about the networks of timm and torchvision."""
    lines = []
    for library, list_names in _LIBRARIES.items():
        if not is_installed(library):
            lines.append(f"{library} is not installed: {INSTALL}")
            continue
        try:
            count = len([*list_names("")])
        except RunError as error:
            lines.append(str(error))
            continue
        lines.append(f"{count:,} networks of {library}: bdkd models '{library}:*'")
    return lines


def _matching(pattern: str) -> tuple[list[str], list[str]]:
    """Return the names that match a pattern, and lines about libraries that cannot be used.

    Raises:
        UsageError: there is no match.
        RunError: the pattern names a library that cannot be used.
    """
    matches = _matcher(pattern)
    names, notes = list_models(), []
    asked, colon, _ = pattern.lower().partition(":")
    for library, list_names in _LIBRARIES.items():
        if colon and asked in _LIBRARIES and asked != library:
            continue
        if colon and asked == library:
            import_library(library)  # raises if it cannot be used
        try:
            names += [f"{library}:{name}" for name in list_names(pattern)]
        except RunError as error:
            missing = f"{library} is not installed: {INSTALL}"
            notes.append(str(error) if is_installed(library) else missing)
    found = [name for name in names if matches(name)]
    if not found:
        bare = {name.partition(":")[2] or name: name for name in reversed(names)}
        wanted = re.sub(r"[*?\[\]]", "", pattern.lower())
        hint = nearest(wanted, [*names, *bare])
        if not hint.startswith("did"):  # a list of all names
            hint = "give a part of a name, such as resnet"
        raise UsageError(f"no model matches {pattern!r}: {'; '.join([hint, *notes])}")
    return found, notes


def _matcher(pattern: str) -> Callable[[str], bool]:
    """Return a function that tests names. A glob must match the whole name or the name without its
    library. Any other pattern must be a part of the name."""
    lowered = pattern.lower()
    if not set("*?[") & set(lowered):
        return lambda name: lowered in name.lower()
    return lambda name: any(
        fnmatchcase(form.lower(), lowered) for form in (name, name.partition(":")[2])
    )


def _timm_names(pattern: str) -> Iterable[str]:
    return import_library("timm").list_models(include_tags="." in pattern)


def _torchvision_names(_: str) -> Iterable[str]:
    models = import_library("torchvision").models
    return models.list_models(module=models)


_LIBRARIES: dict[str, Callable[[str], Iterable[str]]] = {
    "timm": _timm_names, "torchvision": _torchvision_names,
}  # fmt: skip


def _row(name: str, counted: bool) -> Row | None:
    """Describe a network. Return None if bdkd cannot use it, such as torchvision's SqueezeNet,
    which has no linear classifier."""
    size = image_size_of(name, {})
    count = None
    if counted:
        try:
            with torch.device("meta"):
                network = create_model(name, SMALL_CLASSES if size is None else CLASSES)
            count = sum(parameter.numel() for parameter in network.parameters())
        except ValueError:
            return None
        except RuntimeError:  # a plugin's network that cannot be built on the meta device
            count = None
    try:
        published = published_weights(name)
    except RunError:  # weights for a network of bdkd, from a torchvision that is not installed
        published = None
    where = "" if published is None else "yes" if published.path() is None else "here"
    return Row(name, count, size, where)


def _cells(row: Row) -> list[str]:
    count = "-" if row.parameters is None else f"{row.parameters:,}"
    size = "any" if row.image_size is None else str(row.image_size)
    return [row.name, count, size, row.pretrained or "-"]
