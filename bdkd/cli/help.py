"""The short help of commands that take a recipe: the most common options on one screen."""

import dataclasses
import textwrap
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple, NoReturn

from bdkd.cli.flags import Flag, flags_of
from bdkd.cli.options import parse_options
from bdkd.cli.shortcuts import SHORTCUTS
from bdkd.config import load_recipe, shipped_recipes
from bdkd.errors import UsageError

WIDTH, COLUMN = 80, 29

# Flags of a recipe, each with the name of its value and a help text that fits one line.
COMMON = {
    "--data.image-size": ("N", "side of the images in pixels"),
    "--data.validation": ("SHARE", "share of the images held out for validation"),
    "--optimizer.learning-rate": ("X", "peak learning rate for the global batch size"),
    "--train.precision": ("", "fp32, or mixed precision with bf16 or fp16"),
    "--train.compile": ("", "compile the training step with torch.compile"),
    "--train.accumulate": ("N", "split each batch into N parts to save memory"),
    "--networks.NAME.weights": ("F", "initial weights of a network: a file or a run"),
    "--networks.NAME.frozen": ("", "do not train this network"),
    "--max-steps": ("N", "stop after this number of optimizer steps"),
    "--seed": ("N", "seed of weights, data order and augmentation"),
    "--device": ("NAME", "auto, cpu, cuda or cuda:N"),
    "--run-dir": ("DIR", "folder of the run (default: below runs/)"),
}


class Help(NamedTuple):
    """The short help of a command that takes a recipe."""

    usage: str
    text: str
    own: Mapping[str, tuple[str, str]]
    """Flags of the command, each with the name of its value and its help text."""
    omitted: Collection[str] = ()
    """Flags of a recipe that the command does not take."""

    def show(self, default: Any) -> str:
        """Return the help.

        Args:
            default: arguments of the command, whose values are shown as defaults.
        """
        recipe, flags = default.config, flags_of(default)
        names = {net.role: name.replace("_", "-") for name, net in recipe.networks.items()}
        rows = []
        for name, shortcut in SHORTCUTS.items():
            flag = flags.get(f"--{shortcut.key.format(**names)}") if shortcut.key else None
            if name not in self.omitted:
                rows.append(_row(name, shortcut.metavar, shortcut.help, flag))
        common = {name: row for name, row in COMMON.items() if name not in self.omitted}
        for name, (metavar, text) in common.items():
            rows.append(_row(name, metavar, text, flags.get(name)))
        own = [_row(name, *row, flags.get(name)) for name, row in self.own.items()]
        footer = (
            f"Values in [ ] are those of the recipe {recipe.name!r}. --help-all lists all "
            f"{len(flags)} options. Each option is a key of the recipe: --train.epochs is epochs "
            "under [train]."
        )
        parts = [f"usage: {self.usage}", "", textwrap.fill(self.text, WIDTH), "", *own, *rows, ""]
        return "\n".join([*parts, textwrap.fill(footer, WIDTH)])


def exit_with_help(given: list[str], prog: str, help: Help, default: Any) -> NoReturn:
    """Print the short help and exit. With ``--help-all``, also print all options."""
    print(help.show(default))
    if "--help-all" in given:
        parse_options(type(default), prog, [default.config.name, "--help"], default)
    raise SystemExit(0)


def with_recipe(kind: type, given: list[str], prog: str, help: Help, example: str) -> Any:
    """Return the default arguments of a command whose first argument is a recipe.

    Args:
        kind: class of the arguments.
        example: name of the recipe whose values the help shows if the command line has no recipe.

    Raises:
        UsageError: the recipe is missing or wrong.
        SystemExit: the help was printed.
    """
    name = given[0] if given and not given[0].startswith("-") else None
    if asks_for_help(given):
        recipe = load_recipe(name or example)
        exit_with_help(given, prog, help, kind(recipe=recipe.name, config=recipe))
    if name is not None:
        return kind(recipe=name, config=load_recipe(name))
    known = f"{', '.join(shipped_recipes())} or a TOML file"
    if any(word.partition("=")[0] == "--data" for word in given):
        known = f"{prog} images --data ... starts from the recipe for your own images"
    command = prog.removeprefix("bdkd ")
    raise UsageError(f"{command} needs a recipe as its first argument: {known}")


def asks_for_help(given: list[str]) -> bool:
    return not {"-h", "--help", "--help-all"}.isdisjoint(given)


def _row(name: str, metavar: str, text: str, flag: Flag | None) -> str:
    if flag is not None and flag.choices:
        metavar = "{" + ",".join(map(str, flag.choices)) + "}"
    default = None if flag is None or flag.takes_no_value else flag.default
    if default not in (None, (), "auto", dataclasses.MISSING):
        values = default if isinstance(default, tuple) else (default,)
        text += f" [{' '.join(map(str, values))}]"
    head = f"  {name} {metavar}".rstrip()
    lines = [" " * COLUMN + line for line in textwrap.wrap(text, WIDTH - COLUMN)]
    if len(head) > COLUMN - 1:
        return "\n".join([head, *lines])
    return "\n".join([head + lines[0][len(head) :], *lines[1:]])
