"""``bdkd train``: a recipe, overridden key by key, run or planned."""

import contextlib
import dataclasses
import io
import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from bdkd.cli.table import results_table
from bdkd.config import (
    Recipe,
    differing_keys,
    load_recipe,
    nearest,
    shipped_recipes,
)
from bdkd.errors import RunError, UsageError

if TYPE_CHECKING:
    from bdkd.training.distributed import Ranks
    from bdkd.training.run_folder import RunFolder

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


def run(given: list[str]) -> None:
    """Parse, then plan or train, on all the ranks that torchrun started."""
    from bdkd.training.distributed import first_rank_speaks, join_ranks, speak_into
    from bdkd.training.run_folder import RunFolder

    with first_rank_speaks():
        given = _resume_alone(given)
        name = given[0] if given and not given[0].startswith("-") else None
        arguments = _without_recipe(given) if name is None else parse(given, load_recipe(name))
    quiet = arguments.quiet and not arguments.dry_run
    with (
        contextlib.redirect_stdout(io.StringIO()) if quiet else contextlib.nullcontext(),
        join_ranks(arguments.config.distributed.timeout, arguments.config.device) as ranks,
    ):
        asked = arguments
        arguments = ranks.from_first(lambda: _with_stored_config(_of_launch(asked), given, name))
        folder = RunFolder(Path(str(arguments.config.run_dir)))
        if not arguments.dry_run:
            if not ranks.first:
                speak_into(folder.logs, ranks.rank)
            _train(arguments, folder, ranks)
        elif ranks.first:
            from bdkd.training.plan import plan
            from bdkd.training.setup import Setup

            print(plan(Setup(arguments.config), arguments.images_per_second))
    if quiet and ranks.first:
        print(arguments.config.run_dir)


def _train(arguments: Arguments, folder: "RunFolder", ranks: "Ranks") -> None:
    from bdkd.training.distributed import launch_identity
    from bdkd.training.loop import train
    from bdkd.training.setup import Setup

    begins = ranks.from_first(lambda: arguments.resume == "never" or not folder.resumable_paths())
    setup = Setup(arguments.config, initial_weights=begins, ranks=ranks)
    summary = train(
        setup, folder, arguments.resume, not arguments.quiet, launch_identity(), arguments.profile
    )
    if not ranks.first:
        return
    print()
    print(results_table(summary))
    print()
    print(f"run folder           {folder.path}")
    print(f"reliability diagram  {folder.figures / 'reliability.png'}")


def parse(given: list[str], default: Recipe) -> Arguments:
    """The command line over a recipe; a wrong option exits 2 with tyro's message.

    Another method than the recipe's begins from its own defaults: the recipe's options are its
    method's, but for those that are of all methods alike."""
    _check_network_names(given, default)
    method = _value_of(given, "--objective.name")
    if method is not None and method != default.objective.name:
        from bdkd.objectives import switch_method

        default = dataclasses.replace(default, objective=switch_method(default.objective, method))
    arguments = tyro.cli(
        Arguments,
        prog="bdkd train",
        args=_profile_alone(given),
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
    """tyro takes a network that the recipe lacks for an option like any other."""
    for option in given:
        group, _, rest = option.partition(".")
        name, dot, _ = rest.partition(".")
        if group == "--networks" and dot and name not in default.networks:
            raise UsageError(
                f"{option}: the recipe {default.name!r} has no network {name!r}: "
                f"{nearest(name, list(default.networks))} (more are added in a recipe file)"
            )


def _without_recipe(given: list[str]) -> Arguments:
    """``--help`` shows the first shipped recipe's values; otherwise there must be a run to resume,
    whose folder knows its recipe."""
    shipped = shipped_recipes()
    if "-h" in given or "--help" in given:
        return parse([shipped[0], *given], load_recipe(shipped[0]))
    run_dir = _value_of(given, "--run-dir")
    if "--resume" not in given or run_dir is None:
        raise UsageError(
            "train needs a recipe as its first argument: "
            f"{', '.join(shipped)} or a TOML file (or --resume with --run-dir)"
        )
    from bdkd.training.run_folder import RunFolder

    stored = RunFolder(Path(run_dir)).read_config()
    return parse([stored.name, *given], stored)


def _with_stored_config(arguments: Arguments, given: list[str], name: str | None) -> Arguments:
    """Settle the run's folder. A resumed run takes its keys from there, and then from ``given``."""
    from bdkd.training.run_folder import RunFolder, default_run_dir

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


def _with_method_options(recipe: Recipe) -> Recipe:
    """The recipe with its method's own defaults written out, as a run's folder has them."""
    from bdkd.objectives import resolve_options

    return dataclasses.replace(recipe, objective=resolve_options(recipe.objective))


def _of_launch(arguments: Arguments) -> Arguments:
    """A restart by torchrun continues what the same torchrun began, in the same folder."""
    from bdkd.training.distributed import launch_identity
    from bdkd.training.run_folder import RunFolder, default_run_dir

    launch, config = launch_identity(), arguments.config
    if launch is None or arguments.resume != "never":
        return arguments
    run_dir = Path(config.run_dir) if config.run_dir else default_run_dir(config, "auto")
    if not RunFolder(run_dir).launched_by(launch):
        return arguments
    config = dataclasses.replace(config, run_dir=str(run_dir))
    return dataclasses.replace(arguments, config=config, resume="auto")


def _resume_alone(given: list[str]) -> list[str]:
    """``--resume`` without a value means ``require``."""
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


def _profile_alone(given: list[str]) -> list[str]:
    """``--profile`` without a value means 8 steps."""
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
