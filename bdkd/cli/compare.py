"""``bdkd compare``: methods and seeds on one recipe, a run folder each, and one table of them."""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from bdkd.cli.compare_plan import chosen_methods, chosen_seeds, plan_runs, room_for
from bdkd.config import Recipe, load_recipe, shipped_recipes
from bdkd.errors import RunError, UsageError


@dataclass(frozen=True)
class Arguments:
    """Train several methods with several seeds on one recipe, and set them side by side.

    Finished runs are taken as they are and half-done ones continued, so that the same command goes
    on where it was stopped."""

    recipe: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE")]
    """A shipped recipe's name or a TOML file."""
    config: Annotated[Recipe, tyro.conf.arg(name="")]
    methods: tuple[str, ...] = ()
    """Methods, the first being what the others are tested against; an option of a method after a
    colon (bdkd:gamma=1,temperature=2). The recipe's [objective] is for its own method, others have
    their own defaults. Without it, all methods against independent."""
    seeds: tuple[int, ...] = (3,)
    """One number N: the seeds 0 to N-1. Several: those seeds."""
    jobs: int | None = None
    """Runs at a time; without it, as many as the CPU has room for, or one on a GPU."""
    folder: Path | None = None
    """Folder of the runs and tables; without it, runs/compare-<recipe>."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print the content of comparison.json instead of tables."""


def run(given: list[str]) -> None:
    """Parse, train what is not yet trained, write and print the tables."""
    name = given[0] if given and not given[0].startswith("-") else None
    if name is None and not {"-h", "--help"} & set(given):
        raise UsageError(
            "compare needs a recipe as its first argument: "
            f"{', '.join(shipped_recipes())} or a TOML file"
        )
    name = name or shipped_recipes()[0]
    default = Arguments(recipe=name, config=load_recipe(name))
    line = given if given[:1] == [name] else [name, *given]
    arguments = tyro.cli(Arguments, prog="bdkd compare", args=line, default=default)
    for key, remedy in (("seed", "--seeds"), ("run_dir", "--folder")):
        if getattr(arguments.config, key) != getattr(default.config, key):
            raise UsageError(f"--{key.replace('_', '-')} is not for compare: use {remedy}")

    folder = arguments.folder or Path("runs") / f"compare-{arguments.config.name}"
    methods, seeds = chosen_methods(arguments.methods), chosen_seeds(arguments.seeds)
    runs = plan_runs(arguments.config, methods, seeds, folder)
    jobs = arguments.jobs if arguments.jobs is not None else room_for(arguments.config)
    if jobs < 1:
        raise UsageError(f"--jobs must be at least 1, got {jobs}")
    command = shlex.join(["bdkd", "compare", *given])

    from bdkd.cli.compare_report import report
    from bdkd.cli.compare_train import locked, train_all

    with locked(folder):
        outcomes = train_all(runs, jobs, folder, command, sys.stderr if arguments.json else None)
        failed = {name: outcome for name, outcome in outcomes.items() if outcome.code}
        listed = [run for run in runs if run.method in methods and run.name not in failed]
        if listed:
            report(listed, methods, folder, command, failed, arguments.json)
        if failed:
            first, outcome = next(iter(failed.items()))
            raise RunError(
                f"{len(failed)} of {len(runs)} runs failed; {first}: {outcome.message}"
                + (f" (the others: {', '.join(list(failed)[1:])})" if len(failed) > 1 else "")
                + "; mend that and give the same command again"
            )
