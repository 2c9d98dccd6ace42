"""The command line of ``bdkd train``: a recipe, overridden key by key."""

import dataclasses
import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import tyro

from bdkd.config import (
    Recipe,
    differing_keys,
    load_recipe,
    nearest,
    shipped_recipes,
)
from bdkd.errors import RunError, UsageError

Resume = Literal["never", "auto", "require"]


@dataclass(frozen=True)
class Arguments:
    """Train the networks of a recipe together."""

    recipe: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE")]
    """A shipped recipe's name or a TOML file."""
    config: Annotated[Recipe, tyro.conf.arg(name="")]
    resume: Resume = "never"
    """Continue the run in its folder; auto: if there is one to continue. Alone: require."""
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print the resolved plan (data, networks, operations, steps, memory, hours) and stop."""
    images_per_second: float | None = None
    """With --dry-run: the speed to plan the hours with; without it, 1,000 images/s."""
    profile: Annotated[int, tyro.conf.arg(metavar="STEPS")] = 0
    """Record so many steps once ten have gone by: a trace in the folder's profile/, and a table of
    where their time went. Alone: 8."""
    quiet: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print the run's folder at the end and nothing else, but for failures."""


class Command(NamedTuple):
    """A parsed command line."""

    arguments: Arguments
    given: list[str]  # with the values that options without a value stand for
    recipe: str | None  # as given; None: the run's folder names it


def run(given: list[str]) -> None:
    """Run ``bdkd train``."""
    from bdkd.train import main

    main(given)


def parse_command(given: list[str]) -> Command:
    """Parse a command line.

    Raises:
        UsageError, RunError: it is wrong, or a recipe or run that it names cannot be read.
        SystemExit: tyro has printed help, or what is wrong.
    """
    given = _expand_resume(given)
    name = given[0] if given and not given[0].startswith("-") else None
    arguments = _without_recipe(given) if name is None else parse(given, load_recipe(name))
    return Command(arguments, given, name)


def parse(given: list[str], default: Recipe) -> Arguments:
    """Parse a command line over a recipe. tyro prints wrong options and exits with 2.

    With another objective than the recipe's, the recipe's options of its own objective are dropped.
    """
    _check_network_names(given, default)
    method = _value_of(given, "--objective.name")
    if method is not None and method != default.objective.name:
        from bdkd.objectives import switch_objective

        default = dataclasses.replace(
            default, objective=switch_objective(default.objective, method)
        )
    arguments = tyro.cli(
        Arguments,
        prog="bdkd train",
        args=_expand_profile(given),
        default=Arguments(recipe=given[0], config=default),
    )
    rate = arguments.images_per_second
    if rate is not None and not arguments.dry_run:
        raise UsageError("--images-per-second plans a run: give --dry-run with it")
    if rate is not None and not 0 < rate < math.inf:
        raise UsageError(f"--images-per-second must be above 0 and finite, got {rate}")
    if arguments.profile < 0 or (arguments.profile and arguments.dry_run):
        raise UsageError(
            f"--profile must be a number of steps from 1 on and without --dry-run, "
            f"got {arguments.profile}"
        )
    return arguments


def _check_network_names(given: list[str], default: Recipe) -> None:
    """Reject networks that the recipe does not have, of which tyro's message says nothing."""
    for option in given:
        group, _, rest = option.partition(".")
        name, dot, _ = rest.partition(".")
        if group == "--networks" and dot and name not in default.networks:
            raise UsageError(
                f"{option}: the recipe {default.name!r} has no network {name!r}: "
                f"{nearest(name, list(default.networks))} (more are added in a recipe file)"
            )


def _without_recipe(given: list[str]) -> Arguments:
    """Parse a command line without a recipe: ``--help`` shows the values of the first shipped one,
    and a run that is resumed knows its own."""
    shipped = shipped_recipes()
    if "-h" in given or "--help" in given:
        return parse([shipped[0], *given], load_recipe(shipped[0]))
    run_dir = _value_of(given, "--run-dir")
    if "--resume" not in given or run_dir is None:
        raise UsageError(
            "train needs a recipe as its first argument: "
            f"{', '.join(shipped)} or a TOML file (or --resume with --run-dir)"
        )
    from bdkd.runs.folder import RunFolder

    stored = RunFolder(Path(run_dir)).read_config()
    return parse([stored.name, *given], stored)


def resolve_run(command: Command) -> Arguments:
    """Choose the run's folder. A resumed run takes its options from there, and then from the
    command line.

    Raises:
        RunError: the folder holds a run of another recipe.
    """
    from bdkd.runs.folder import RunFolder, default_run_dir

    arguments, given, name = command
    config = arguments.config
    run_dir = Path(config.run_dir) if config.run_dir else default_run_dir(config, arguments.resume)
    folder = RunFolder(run_dir)
    if arguments.resume != "never" and folder.config.exists():
        stored = folder.read_config()
        if stored.name != config.name:
            raise RunError(
                f"{run_dir} holds a run of the recipe {stored.name!r}, not of {config.name!r}: "
                "choose another --run-dir"
            )
        line = given if name else [stored.name, *given]
        config = parse(line, stored).config
        changed = [key for key in differing_keys(stored, config) if key != "run_dir"]
        if changed:
            print(f"resuming with changed {', '.join(changed)}")
        if name:
            recipe = _with_method_options(load_recipe(name))
            ignored = set(differing_keys(stored, recipe)) - {"run_dir"}
            overridden = set(differing_keys(_with_method_options(arguments.config), recipe))
            if edited := sorted(ignored - overridden - set(changed)):
                print(f"kept from {folder.config}, unlike {name}: {', '.join(edited)}")
    config = dataclasses.replace(config, run_dir=str(run_dir))
    return dataclasses.replace(arguments, config=config)


def continue_launch(command: Command, launch: str | None) -> Command:
    """Resume the run that the same ``torchrun`` began before it restarted its ranks.

    Args:
        launch: identifier of the ``torchrun``; None: there is none.
    """
    from bdkd.runs.folder import RunFolder, default_run_dir

    arguments, config = command.arguments, command.arguments.config
    if launch is None or arguments.resume != "never":
        return command
    run_dir = Path(config.run_dir) if config.run_dir else default_run_dir(config, "auto")
    if not RunFolder(run_dir).launched_by(launch):
        return command
    config = dataclasses.replace(config, run_dir=str(run_dir))
    return command._replace(arguments=dataclasses.replace(arguments, config=config, resume="auto"))


def _with_method_options(recipe: Recipe) -> Recipe:
    """Return a recipe with its objective's defaults written out, as a run's folder has them."""
    from bdkd.objectives import resolve_options

    return dataclasses.replace(recipe, objective=resolve_options(recipe.objective))


def _expand_resume(given: list[str]) -> list[str]:
    """Add the value of a plain ``--resume``, which is ``require``."""
    values = ("never", "auto", "require")
    expanded = []
    for argument, following in pairwise([*given, ""]):
        expanded.append(argument)
        if argument == "--resume" and following not in values:
            if following and not following.startswith("-"):
                raise UsageError(
                    f"--resume must be {', '.join(values)} or alone, which means require, "
                    f"got {following!r} (a recipe comes first)"
                )
            expanded.append("require")
    return expanded


def _expand_profile(given: list[str]) -> list[str]:
    """Add the value of a plain ``--profile``, which is 8 steps."""
    expanded = []
    for argument, following in pairwise([*given, ""]):
        expanded.append(argument)
        number = following.removeprefix("-").isdigit()
        if argument == "--profile" and not number and following[:1] in ("", "-"):
            expanded.append("8")
    return expanded


def _value_of(given: list[str], option: str) -> str | None:
    for argument, following in pairwise([*given, ""]):
        if argument == option:
            return following or None
        if argument.startswith(option + "="):
            return argument.removeprefix(option + "=")
    return None
