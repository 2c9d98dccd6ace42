"""``bdkd tune``: choose options of objectives by their accuracy on the validation images."""

import shlex
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro

from bdkd.cli.compare_plan import chosen_seeds, room_for
from bdkd.cli.help import Help, with_recipe
from bdkd.cli.options import parse_options
from bdkd.cli.table import table
from bdkd.cli.tune_search import Found, Trainer, parse_searches, search_all
from bdkd.config import Recipe
from bdkd.errors import RunError, UsageError
from bdkd.evaluation.comparison import to_markdown
from bdkd.metrics import METRICS
from bdkd.plugins import plugin_arguments
from bdkd.runs.checkpoint import write_atomically
from bdkd.runs.folder import to_json

HELP = Help(
    "bdkd tune RECIPE --methods NAME:OPTION=A/B/C ... [options]",
    "Choose options of objectives by the students' top-1 accuracy on the validation images, "
    "never on the test images. Repeat the same command to continue a search that was stopped.",
    {
        "--methods": ("NAME:OPTION=A/B/C ...", "objectives, and the values to try for each option"),
        "--seeds": ("N ...", "seeds; use different seeds for bdkd compare"),
        "--jobs": ("N", "concurrent runs (default: by cores; 1 on a GPU)"),
        "--folder": ("DIR", "for runs and tables (default: runs/tune-RECIPE)"),
        "--json": ("", "print tuning.json instead of tables"),
    },
    ("--objective", "--seed", "--run-dir"),
)


@dataclass(frozen=True)
class Arguments:
    """Choose options of objectives on the validation images.

    The options of a method are searched one after the other, in the given order: all values of the
    first option with the other options at their defaults, then all values of the second option with
    the best value of the first, and so on."""

    recipe: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE")]
    """Name of a shipped recipe, or a TOML file."""
    config: Annotated[Recipe, tyro.conf.arg(name="")]
    methods: tuple[str, ...] = ()
    """Objectives and the values to try, separated by slashes:
    kd:optimizer.learning_rate=0.05/0.1/0.2,student_kd=0.45/0.9/1.8. An option with one value has
    that value in all runs."""
    seeds: tuple[int, ...] = (1000, 1001)
    """The seeds of each candidate. Unlike for bdkd compare, one number is one seed. Use different
    seeds for bdkd compare."""
    jobs: int | None = None
    """Number of concurrent runs. Default: one on a GPU, else as many as the CPU has cores for."""
    folder: Path | None = None
    """Folder of the runs and tables. Default: runs/tune-<recipe>."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print tuning.json instead of tables."""


def run(given: list[str]) -> None:
    """Search stage by stage, then write and print the tables."""
    default = with_recipe(Arguments, given, "bdkd tune", HELP, "digits-hard")
    arguments = parse_options(Arguments, "bdkd tune", given, default)
    for key, remedy in (("seed", "--seeds"), ("run_dir", "--folder")):
        if getattr(arguments.config, key) != getattr(default.config, key):
            raise UsageError(f"tune has no option --{key.replace('_', '-')}: use {remedy}")
    searches = parse_searches(arguments.methods, arguments.config)
    seeds = chosen_seeds(arguments.seeds) if len(arguments.seeds) != 1 else list(arguments.seeds)
    folder = arguments.folder or Path("runs") / f"tune-{arguments.config.name}"
    jobs = arguments.jobs if arguments.jobs is not None else room_for(arguments.config)
    if jobs < 1:
        raise UsageError(f"--jobs must be at least 1, got {jobs}")
    command = shlex.join(["bdkd", "tune", *given, *plugin_arguments()])

    from bdkd.cli.compare_train import locked

    trainer = Trainer(arguments.config, seeds, folder, jobs, command, arguments.json)
    with locked(folder):
        found = search_all(searches, trainer)
        _report(arguments, found, trainer, _compare_command(given, found))
    if lost := [one.search.label for one in found if one.best is None]:
        reason = next(iter(trainer.failed.items()), None)
        because = f"; {reason[0]}: {reason[1]}" if reason else "; a metric was not finite"
        raise RunError(f"no candidate of {', '.join(lost)} succeeded{because}")


def _compare_command(given: Sequence[str], found: Sequence[Found]) -> str:
    """Return the command that compares the chosen candidates with the same options of the
    recipe."""
    own, kept, skipping = {"methods", "seeds", "jobs", "folder", "json"}, [], False
    for argument in given:
        if argument.startswith("--"):
            skipping = argument.removeprefix("--").partition("=")[0] in own
        if not skipping:
            kept.append(argument)
    chosen = [one.best.method for one in found if one.best is not None]
    methods = ["--methods", *dict.fromkeys(chosen)]
    return shlex.join(["bdkd", "compare", *kept, *methods, *plugin_arguments()])


def _report(arguments: Arguments, found: Sequence[Found], trainer: Trainer, compare: str) -> None:
    """Write ``tuning.json`` and ``tuning.md``; print the table or the JSON."""
    header = ["candidate", "top-1 %", "NLL", "ECE %", "chosen"]
    lines = [
        [
            result.method,
            *(
                METRICS[key].show(getattr(result, key)) if result.seeds else "failed"
                for key in ("top1", "nll", "ece")
            ),
            "yes" if result == one.best else "",
        ]
        for one in found
        for result in one.results
    ]
    notes = [
        f"Means over the seeds {', '.join(map(str, trainer.seeds))}, of the students on the "
        "validation images. The most accurate candidate of each method is chosen."
    ]
    notes += [f"{name} failed: {message}" for name, message in trainer.failed.items()]
    content = {
        "command": trainer.command, "recipe": arguments.config.name, "seeds": trainer.seeds,
        "chosen": [one.best and one.best.method for one in found], "failed": trainer.failed,
        "compare": compare,
        "methods": [
            {
                "method": one.search.label, "chosen": one.best and one.best.method,
                "candidates": [asdict(result) for result in one.results if result.seeds],
            }
            for one in found
        ],
    }  # fmt: skip
    text = to_json(content, indent=2)
    title = f"# {arguments.config.name}: tuning on the validation images"
    marked = [title, f"`{trainer.command}`", to_markdown(header, lines), *notes, f"`{compare}`"]
    again = "run the same command again"
    for suffix, written in {"json": text, "md": "\n\n".join(marked)}.items():
        path = trainer.folder / f"tuning.{suffix}"
        write_atomically(path, f"{written.rstrip()}\n".encode(), again)
    if arguments.json:
        print(text)
        return
    print(f"\n{table(header, lines)}\n")
    for note in notes:
        print(textwrap.fill(note, 80))
    print(f"\ncompare them    {compare}")
    print(f"tables          {trainer.folder}/tuning.md, .json")
