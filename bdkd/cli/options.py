"""Parse the options of a recipe on the command line, including the options of models."""

import contextlib
import dataclasses
import math
import re
from collections import deque
from collections.abc import Callable
from itertools import pairwise
from typing import Annotated, Any, TypeVar, get_args

import tyro
from tyro.constructors import (
    ConstructorRegistry,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from bdkd.bounds import Bounds, bounds_of, plain_type
from bdkd.cli.flags import check_flags, flags_of
from bdkd.cli.shortcuts import expand
from bdkd.config import (
    DataConfig,
    NetworkConfig,
    ObjectiveConfig,
    OptimizerConfig,
    Options,
    Recipe,
    refuse_foreign,
    replace_unchecked,
    select_unchecked,
)
from bdkd.errors import UsageError
from bdkd.models.registry import default_options, describe_options
from bdkd.registry import OBJECTIVES, OPTIMIZERS, SELECTIONS, SOURCES

Parsed = TypeVar("Parsed", bound=Any)  # a dataclass with a field ``config``, the recipe

REGISTRY = ConstructorRegistry()
_SELECTED = (
    (SOURCES, DataConfig), (OBJECTIVES, ObjectiveConfig), (OPTIMIZERS, OptimizerConfig),
)  # fmt: skip
_OPTIONS = re.compile(
    r"--networks\.(?P<name>[^.=]+)\.options(\.(?P<key>[^=]+))?(=(?P<value>.*))?", re.DOTALL
)
_in_progress: set[Any] = set()


@REGISTRY.struct_rule
def _with_help(info: StructTypeInfo) -> StructConstructorSpec | None:
    """Extend tyro's rule for dataclasses by help texts with bounds and valid names."""
    known = isinstance(info.type, type) and issubclass(info.type, Options | Recipe)
    if not known or info.type in _in_progress:
        return None
    _in_progress.add(info.type)
    try:
        spec = ConstructorRegistry.get_struct_spec(info)
    finally:
        _in_progress.remove(info.type)
    assert isinstance(spec, StructConstructorSpec)
    fields = tuple(_field(field, info.default) for field in spec.fields)
    return dataclasses.replace(spec, fields=fields)


def _field(field: StructFieldSpec, default: Any) -> StructFieldSpec:
    if isinstance(default, Recipe) and field.name == "plugins":
        suppressed: Any = Annotated[field.type, tyro.conf.Suppress]  # main() has read --plugin
        return dataclasses.replace(field, type=suppressed)
    note = ""
    for selection, kind in _SELECTED:
        if isinstance(default, kind) and field.name == selection.key:
            note = f"One of {', '.join(selection)}."
    if bounds := element_bounds(field.type):
        note = f"{str(bounds).capitalize()}."
    elif isinstance(default, NetworkConfig) and field.name == "options":
        note = "; ".join(
            f"{name}: {what}" for name, what in describe_options(default.model).items()
        )
        note = f"{default.model} takes {note or 'no options'}."
    return dataclasses.replace(field, helptext=_appended(field.helptext, note)) if note else field


def element_bounds(hint: Any) -> Bounds | None:
    """Return the bounds in a type, or those that all elements of a tuple have."""
    kinds = [kind for kind in get_args(plain_type(hint)) if kind is not Ellipsis]
    of_elements = {bounds_of(kind) for kind in kinds}
    return bounds_of(hint) or (of_elements.pop() if len(of_elements) == 1 else None)


def parse_options(kind: type[Parsed], prog: str, given: list[str], default: Parsed) -> Parsed:
    """Parse a command line with ``default.config`` as the recipe.

    Raises:
        UsageError: an option is wrong.
        SystemExit: tyro has printed the help.
    """
    given = expand(given, default.config, flags_of(default))
    args, recipe = take_model_options(given, select_given(default.config, given))
    # tyro would add an option for each key of a dictionary.
    without = {n: dataclasses.replace(net, options={}) for n, net in recipe.networks.items()}
    default = dataclasses.replace(default, config=replace_unchecked(recipe, networks=without))
    if "--help" not in args:
        check_flags(prog, args, flags_of(default), most=1)
    parsed = tyro.cli(kind, prog=prog, args=args, default=default, registry=REGISTRY)
    networks = {
        name: dataclasses.replace(network, options=recipe.networks[name].options)
        for name, network in parsed.config.networks.items()
    }
    config = dataclasses.replace(parsed.config, networks=networks)
    return dataclasses.replace(parsed, config=config)


def select_given(recipe: Recipe, given: list[str]) -> Recipe:
    """Select the objective, data source and optimizer that a command line names. The result is not
    validated, because the command line may set further options.

    Raises:
        UsageError: a selected name does not exist, or does not have an option that is set.
    """
    for selection in SELECTIONS:
        section = f"--{selection.section}."
        name = value_of(given, section + selection.key)
        if name is not None:
            recipe = select_unchecked(recipe, selection.section, name)
        options = [x.removeprefix(section) for x in given if x.startswith(section)]
        keys = [option.partition("=")[0].replace("-", "_") for option in options]
        refuse_foreign(keys, selection, getattr(getattr(recipe, selection.section), selection.key))
    return recipe


def take_model_options(given: list[str], recipe: Recipe) -> tuple[list[str], Recipe]:
    """Remove the options of models from a command line and set them in the recipe.

    They are written as ``--networks.NAME.options width 0.5 ...`` or
    ``--networks.NAME.options.width 0.5``.

    Returns:
        The other arguments, and the changed recipe.

    Raises:
        UsageError: an option has no value.
    """
    networks = dict(recipe.networks)
    spelled = {name.replace("_", "-"): name for name in networks}
    for name, network in networks.items():
        model = value_of(given, f"--networks.{name}.model")
        if model is not None and model != network.model:
            old, new = describe_options(network.model), describe_options(model)
            defaults = default_options(network.model)
            kept = {
                key: value
                for key, value in network.options.items()
                if key not in old or (key in new and value != defaults.get(key))
            }
            networks[name] = dataclasses.replace(network, model=model, options=kept)
    others, arguments = [], deque(given)
    while arguments:
        argument = arguments.popleft()
        match = _OPTIONS.fullmatch(argument)
        hyphened = match["name"].replace("_", "-") if match else None
        if match is None or hyphened not in spelled:
            others.append(argument)
            continue
        name, key, value = spelled[hyphened], match["key"], match["value"]
        words = [word for word in (key and key.replace("-", "_"), value) if word is not None]
        wanted = math.inf if key is None else 2
        while arguments and not _is_option(arguments[0]) and len(words) < wanted:
            words.append(arguments.popleft())
        if not words or len(words) % 2:
            found = " ".join(words) or "nothing"
            raise UsageError(f"{argument} needs pairs of name and value, got {found}")
        pairs = dict(zip(words[::2], map(_value, words[1::2]), strict=True))
        options = {**networks[name].options, **pairs}
        networks[name] = dataclasses.replace(networks[name], options=options)
    return others, replace_unchecked(recipe, networks=networks)


def value_of(given: list[str], option: str) -> str | None:
    """Return the last value of an option, or None. As in tyro, the last value counts, and hyphens
    and underscores are equal."""
    found = None
    for argument, following in pairwise([*given, ""]):
        name, equals, value = argument.partition("=")
        if name.replace("_", "-") == option.replace("_", "-"):
            found = value if equals else following or None
    return found


def _is_option(argument: str) -> bool:
    return argument.startswith("--") or argument == "-h"


def _value(text: str) -> bool | int | float | str:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def _appended(help_text: str | Callable[[], str | None] | None, note: str) -> Callable[[], str]:
    def text() -> str:
        own = help_text() if callable(help_text) else help_text
        return f"{own or ''} {note}".strip()

    return text
