"""``bdkd compare``: train objectives and seeds on one recipe, and write a table of the results."""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from bdkd.cli.compare_plan import (
    chosen_methods,
    chosen_seeds,
    plan_runs,
    room_for,
    warmup_warnings,
)
from bdkd.cli.help import Help, with_recipe
from bdkd.cli.options import parse_options
from bdkd.config import Recipe
from bdkd.errors import RunError, UsageError
from bdkd.plugins import plugin_arguments

HELP = Help(
    "bdkd compare RECIPE [options]",
    "Train several objectives with several seeds on one recipe, and print a table with tests of "
    "the differences. Repeat the same command to continue a comparison that was stopped.",
    {
        "--methods": ("NAME ...", "objectives; options follow a colon, as in bdkd:gamma=1"),
        "--seeds": ("N ...", "the number of seeds, or several seeds"),
        "--jobs": ("N", "concurrent runs (default: by cores; 1 on a GPU)"),
        "--folder": ("DIR", "for runs and tables (default: runs/compare-RECIPE)"),
        "--quantize": ("", "also compare the students in int8 (ONNX)"),
        "--json": ("", "print comparison.json instead of tables"),
    },
    ("--objective", "--seed", "--run-dir"),
)


@dataclass(frozen=True)
class Arguments:
    """Train several objectives with several seeds on one recipe, and compare the results.

    Finished runs are reused and unfinished runs are resumed. Repeat the same command to continue a
    comparison that was stopped."""

    recipe: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE")]
    """Name of a shipped recipe, or a TOML file."""
    config: Annotated[Recipe, tyro.conf.arg(name="")]
    methods: tuple[str, ...] = ()
    """Objectives to compare. Each one is tested against the first one. Options follow a colon, as
    in bdkd:gamma=1,optimizer.learning_rate=0.05. They can be options of the objective, and keys of
    [optimizer], [schedule] and [train]. The [objective] table of the recipe applies only to the
    objective that it names. Default: independent, then all other objectives."""
    seeds: tuple[int, ...] = (3,)
    """One number N means the seeds 0 to N-1. Several numbers are the seeds."""
    jobs: int | None = None
    """Number of concurrent runs. Default: one on a GPU, else as many as the CPU has cores for."""
    folder: Path | None = None
    """Folder of the runs and tables. Default: runs/compare-<recipe>."""
    quantize: Literal["int8"] | None = None
    """Also export each student to ONNX in fp32 and int8, as bdkd export --quantize does, and
    compare the methods in int8."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print comparison.json instead of tables."""


def run(given: list[str]) -> None:
    """Train the runs that are not finished, then write and print the tables."""
    default = with_recipe(Arguments, given, "bdkd compare", HELP, "digits-hard")
    arguments = parse_options(Arguments, "bdkd compare", given, default)
    for key, remedy in (("seed", "--seeds"), ("run_dir", "--folder")):
        if getattr(arguments.config, key) != getattr(default.config, key):
            raise UsageError(f"compare has no option --{key.replace('_', '-')}: use {remedy}")

    folder = arguments.folder or Path("runs") / f"compare-{arguments.config.name}"
    methods, seeds = chosen_methods(arguments.methods), chosen_seeds(arguments.seeds)
    runs = plan_runs(arguments.config, methods, seeds, folder)
    jobs = arguments.jobs if arguments.jobs is not None else room_for(arguments.config)
    if jobs < 1:
        raise UsageError(f"--jobs must be at least 1, got {jobs}")
    command = shlex.join(["bdkd", "compare", *given, *plugin_arguments()])

    from bdkd.cli.compare_quantize import check_quantizable, quantize_all
    from bdkd.cli.compare_report import report
    from bdkd.cli.compare_train import locked, train_all

    quantize = arguments.quantize is not None
    if quantize:
        check_quantizable(arguments.config)
    stream = sys.stderr if arguments.json else None
    for warning in warmup_warnings(runs):
        print(f"warning: {warning}", file=sys.stderr)
    with locked(folder):
        outcomes = train_all(runs, jobs, folder, command, stream)
        failed = {name: outcome for name, outcome in outcomes.items() if outcome.code}
        listed = [run for run in runs if run.method in methods and run.name not in failed]
        exports = quantize_all(listed, jobs, command, stream) if quantize else {}
        unquantized = {name: outcome for name, outcome in exports.items() if outcome.code}
        if listed:
            compared = unquantized if quantize else None
            report(listed, methods, folder, command, failed, arguments.json, compared)
        failed |= unquantized
        if failed:
            first, *others = failed
            all_of_them = f"{len(runs)} runs" + (f" and {len(exports)} exports" if exports else "")
            found = f"{len(failed)} of {all_of_them} failed; {first}: {failed[first].message}"
            found += f" (the others: {', '.join(others)})" if others else ""
            raise RunError(f"{found}; fix the cause and run the same command again")
