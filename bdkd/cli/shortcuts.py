"""Short flags of ``bdkd train``: ``--data photos/ --teacher timm:resnet50 --epochs 30``.

A short flag sets one or more keys of the recipe. It is replaced by the flags of these keys before
the command line is parsed.
"""

from collections.abc import Iterator
from typing import NamedTuple

from bdkd.cli.flags import Flag, check_values, is_option
from bdkd.config import Recipe
from bdkd.errors import UsageError


class Shortcut(NamedTuple):
    """A short flag."""

    metavar: str
    """Name of the value in the help. Empty if the flag takes no value."""
    help: str
    key: str = ""
    """The flag of the recipe that gets the same value. Empty if there is no such flag."""


SHORTCUTS = {
    "--data": Shortcut(
        "DATA",
        "folder of images, .parquet file, hf:NAME of a Hugging Face data set, or source (bdkd "
        "data list)",
    ),
    "--teacher": Shortcut("MODEL", "teacher (see bdkd models)", "networks.{teacher}.model"),
    "--student": Shortcut("MODEL", "student (see bdkd models)", "networks.{student}.model"),
    "--pretrained": Shortcut("", "start from weights that timm or torchvision publish"),
    "--epochs": Shortcut("N", "passes over the training images", "train.epochs"),
    "--batch-size": Shortcut("N", "images per step, over all ranks", "train.batch-size"),
    "--objective": Shortcut("NAME", "objective (bdkd, independent, kd, ...)", "objective.name"),
}  # fmt: skip


def expand(given: list[str], recipe: Recipe, flags: dict[str, Flag]) -> list[str]:
    """Return a command line with its short flags replaced by flags of the recipe.

    Args:
        flags: flags of the recipe, used to check the values.

    Raises:
        UsageError: a value does not fit, or the recipe has no such network.
    """
    expanded: list[str] = []
    pretrained = False
    arguments = iter(_joined(given))
    for argument, value in arguments:
        shortcut = SHORTCUTS.get(argument.replace("_", "-"))
        if shortcut is None:
            expanded.append(argument if value is None else f"{argument}={value}")
            continue
        if not shortcut.metavar:
            if value is not None:
                raise UsageError(f"{argument} takes no value, got {value!r}: pass {argument}")
            pretrained = True
            continue
        if value is None:
            value, _ = next(arguments, ("", None))
            if not value or is_option(value):
                raise UsageError(f"{argument} needs a value: {shortcut.metavar}, {shortcut.help}")
        if shortcut.key:
            key = _key(argument, shortcut, recipe)
            check_values(argument, [value], flags[key])
            expanded.append(f"{key}={value}")
        else:
            expanded += _data_flags(value, recipe, given)
    if pretrained:
        expanded += _pretrained_flags(expanded, recipe)
    return expanded


def _joined(given: list[str]) -> Iterator[tuple[str, str | None]]:
    """Yield the arguments; those of the form ``--flag=value`` in two parts."""
    for argument in given:
        name, equals, value = argument.partition("=")
        split = equals and name.startswith("--")
        yield (name, value) if split else (argument, None)


def _key(argument: str, shortcut: Shortcut, recipe: Recipe) -> str:
    """Return the flag that a shortcut sets. ``--teacher`` and ``--student`` set the model of the
    network with this role."""
    role = argument.lstrip("-")
    if role not in ("teacher", "student"):
        return f"--{shortcut.key}"
    names = [name for name, network in recipe.networks.items() if network.role == role]
    if len(names) != 1:
        options = " or ".join(f"--networks.{name}.model" for name in names)
        found = f"the recipe {recipe.name!r} has {len(names)} {role}s"
        raise UsageError(f"{argument}: {found}" + (f": use {options}" if names else ""))
    return f"--{shortcut.key.format(**{role: names[0].replace('_', '-')})}"


def _data_flags(text: str, recipe: Recipe, given: list[str]) -> list[str]:
    from bdkd.data import data_options

    options = data_options(text)
    flags = [word.partition("=")[0].replace("_", "-") for word in given]
    for flag in ("--data.source", "--data.root"):
        if flag in flags and flag.removeprefix("--data.") in options:
            raise UsageError(f"--data {text} and {flag} both choose the data set: give one of them")
    if flags.count("--data") > 1:
        raise UsageError("--data is given more than once: give one data set")
    if options["source"] != recipe.data.source and "--data.root" not in flags:
        options = {"root": "None", **options}  # the recipe's data.root belongs to another source
    return [f"--data.{key}={value}" for key, value in options.items()]


def _pretrained_flags(expanded: list[str], recipe: Recipe) -> list[str]:
    """Return the flags that load published weights into every network that has published
    weights."""
    from bdkd.cli.options import value_of
    from bdkd.config import PRETRAINED
    from bdkd.models.pretrained import has_published_weights

    models = {
        name: value_of(expanded, f"--networks.{name}.model") or network.model
        for name, network in recipe.networks.items()
    }
    names = [name for name, model in models.items() if has_published_weights(model)]
    if not names:
        raise UsageError(
            f"--pretrained: no weights are published for {' and '.join(models.values())}: use "
            "models of timm or torchvision (bdkd models), or set networks.NAME.weights to a file"
        )
    return [f"--networks.{name.replace('_', '-')}.weights={PRETRAINED}" for name in names]
