"""``bdkd recipes``: list the shipped recipes, or print one."""

import json
import re
import textwrap
from dataclasses import asdict, dataclass
from typing import Annotated

import tyro

from bdkd.cli.flags import parse
from bdkd.config import load_recipe, nearest, recipe_text, shipped_recipes
from bdkd.errors import UsageError

WIDTH = 80  # of a line of a description


@dataclass(frozen=True)
class Arguments:
    """List the shipped recipes, or print the TOML file of one, for example to start your own:
    bdkd recipes digits > mine.toml."""

    name: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[NAME]")] = None
    """The recipe to print. Default: list all of them."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print one JSON array instead of a list."""


@dataclass(frozen=True)
class Description:
    """What a recipe trains."""

    name: str
    data: str
    teachers: dict[str, str]  # model by name
    students: dict[str, str]
    objective: str
    epochs: int
    description: str


def run(given: list[str]) -> None:
    """Print the recipes, or the file of one."""
    arguments = parse(Arguments, "bdkd recipes", given)
    shipped = shipped_recipes()
    if arguments.name is not None:
        if arguments.json:
            raise UsageError("--json lists all recipes: leave out NAME")
        if arguments.name not in shipped:
            hint = nearest(arguments.name, shipped)
            raise UsageError(f"unknown recipe {arguments.name!r}: {hint}")
        print(recipe_text(arguments.name), end="", flush=True)
        return
    described = [describe(name) for name in shipped]
    if arguments.json:
        print(json.dumps([asdict(recipe) for recipe in described], indent=2), flush=True)
        return
    print("\n\n".join(map(_paragraph, described)), flush=True)


def describe(name: str) -> Description:
    """Return what a shipped recipe trains. The description is the first sentence of the comment at
    the beginning of its file."""
    recipe = load_recipe(name)
    models = {
        role: {n: network.model for n, network in recipe.networks.items() if network.role == role}
        for role in ("teacher", "student")
    }
    comment = re.match(r"(#.*\n)*", recipe_text(name))
    text = " ".join(line.lstrip("# ") for line in comment[0].splitlines()) if comment else ""
    sentence = re.split(r"(?<=[.?!])\s", text)[0]
    return Description(
        name, recipe.data.source, models["teacher"], models["student"], recipe.objective.name,
        recipe.train.epochs, sentence,
    )  # fmt: skip


def _paragraph(recipe: Description) -> str:
    pair = " -> ".join(
        ", ".join(models.values()) for models in (recipe.teachers, recipe.students) if models
    )
    epochs = f"{recipe.epochs} epoch{'s' * (recipe.epochs > 1)}"
    facts = f"{recipe.data}: {pair}, {recipe.objective}, {epochs}"
    lines = textwrap.wrap(recipe.description, WIDTH - 2, break_on_hyphens=False)
    return "\n".join([recipe.name, f"  {facts}", *(f"  {line}" for line in lines)])
