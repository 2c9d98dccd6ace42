"""The command line of ``bdkd train``: a recipe, and options that override its keys."""

import dataclasses
import math
import os
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, get_args

import tyro

from bdkd.cli.help import Help, asks_for_help, exit_with_help
from bdkd.cli.options import parse_options, value_of
from bdkd.config import (
    Recipe,
    differing_keys,
    load_recipe,
    nearest,
    replace_unchecked,
    shipped_recipes,
)
from bdkd.errors import RunError, UsageError
from bdkd.registry import NAME

Resume = Literal["never", "auto", "require"]

OWN_IMAGES = "images"  # the shipped recipe of command lines without a recipe
FINE_TUNING_RATE = 3e-4  # of AdamW with --pretrained; the recipe's rate is for random weights
HELP = Help(
    "bdkd train [RECIPE] [options]",
    "Train a teacher and a student together. RECIPE is a shipped recipe (bdkd recipes) or a TOML "
    "file. To train on your own images without a recipe: bdkd train --data photos/ --teacher "
    "timm:resnet50 --pretrained --student timm:mobilenetv2_100",
    {
        "--resume": ("", "continue an earlier run from its folder"),
        "--dry-run": ("", "print the plan (hours, memory) without training"),
        "--profile": ("STEPS", "profile this number of steps for TensorBoard"),
        "--quiet": ("", "print only the run's folder"),
    },
)


@dataclass(frozen=True)
class Arguments:
    """Train the networks of a recipe together."""

    recipe: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE")]
    """Name of a shipped recipe, or a TOML file."""
    config: Annotated[Recipe, tyro.conf.arg(name="")]
    resume: Resume = "never"
    """Resume the run in the folder. auto: start a new run if the folder contains none. require:
    fail if the folder contains none. A plain --resume means require."""
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print the plan (data, networks, operations, steps, memory, hours) and stop. A few real steps
    are timed on this machine to estimate the hours."""
    no_probe: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """With --dry-run: do not time steps."""
    images_per_second: float | None = None
    """With --dry-run: estimate the hours from this speed, such as that of another machine, and do
    not time steps."""
    profile: Annotated[int, tyro.conf.arg(metavar="STEPS")] = 0
    """Profile this number of steps after the first ten. Write a trace to the folder profile/ of the
    run, and print a table of the time of each phase. A plain --profile means 8."""
    quiet: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print only the run's folder at the end, and failures."""


class Command(NamedTuple):
    """A parsed command line."""

    arguments: Arguments
    given: list[str]  # a plain --resume is replaced by --resume require
    recipe: str | None  # name or file; None: the recipe stored in the folder of the run


def run(given: list[str]) -> None:
    """Run ``bdkd train``."""
    from bdkd.train import main

    main(given)


def parse_command(given: list[str]) -> Command:
    """Parse a command line.

    Raises:
        UsageError, RunError: an option is wrong, or a recipe or run cannot be read.
        SystemExit: tyro has printed help or an error.
    """
    name = given[0] if given and not given[0].startswith("-") else None
    if asks_for_help(given):
        recipe = load_recipe(name or OWN_IMAGES)
        exit_with_help(given, "bdkd train", HELP, Arguments(recipe=recipe.name, config=recipe))
    if name is not None and name not in shipped_recipes() and os.path.isdir(name):
        raise UsageError(f"{name} is a folder, not a recipe: --data {name} trains on its images")
    given = _expand_resume(given)
    arguments = _without_recipe(given) if name is None else parse(given, load_recipe(name))
    return Command(arguments, given, name)


def parse(given: list[str], default: Recipe) -> Arguments:
    """Parse a command line with a recipe as defaults.

    An option that selects another objective, data source or optimizer also changes the available
    options; see :func:`bdkd.config.select`. Raises ``UsageError`` if an option is wrong.
    """
    check_network_names(given, default)
    arguments = parse_options(
        Arguments, "bdkd train", _expand_profile(given), Arguments(recipe=given[0], config=default)
    )
    rate = arguments.images_per_second
    if arguments.no_probe and not arguments.dry_run:
        raise UsageError("--no-probe needs --dry-run: give --dry-run too")
    if rate is not None and not arguments.dry_run:
        raise UsageError("--images-per-second needs --dry-run: give --dry-run too")
    if rate is not None and not 0 < rate < math.inf:
        raise UsageError(f"--images-per-second must be above 0 and finite, got {rate}")
    if (steps := arguments.profile) < 0 or (steps and arguments.dry_run):
        needed = "a number of steps of at least 1, without --dry-run"
        raise UsageError(f"--profile must be {needed}, got {steps}")
    return arguments


def check_network_names(given: list[str], default: Recipe) -> None:
    """Raise ``UsageError`` for unknown networks, because tyro's message does not name them."""
    known = {name.replace("_", "-") for name in default.networks}
    for option in given:
        group, _, rest = option.partition(".")
        name, dot, _ = rest.partition(".")
        if group == "--networks" and dot and name.replace("_", "-") not in known:
            unknown = f"{option}: the recipe {default.name!r} has no network {name!r}"
            hint = nearest(name, list(default.networks))
            raise UsageError(f"{unknown}: {hint} (add networks in a recipe file)")


def _without_recipe(given: list[str]) -> Arguments:
    """Parse a command line without a recipe: ``--resume`` uses the recipe in the run's folder, and
    other runs start from the shipped recipe for the user's own images."""
    run_dir = value_of(given, "--run-dir")
    if any(word.partition("=")[0] == "--data" for word in given):
        return _own_images(given)
    if run_dir is not None and any(word.partition("=")[0] == "--resume" for word in given):
        from bdkd.runs.folder import RunFolder

        stored = RunFolder(Path(run_dir)).read_config()
        return parse([stored.name, *given], stored)
    if recipes := [word for word in given if word in shipped_recipes() or word.endswith(".toml")]:
        raise UsageError(
            f"train needs the recipe as its first argument: bdkd train {recipes[0]} ..."
        )
    raise UsageError(
        "train needs a recipe as its first argument (bdkd recipes lists them, or a TOML file), "
        "--data with your own images, or --resume with --run-dir"
    )


def _own_images(given: list[str]) -> Arguments:
    """Parse a command line that describes a run with ``--data``. The run is named after the data.
    It has smaller batches if there are few images, and a lower learning rate with
    ``--pretrained``, unless the command line sets them."""
    recipe = load_recipe(OWN_IMAGES)
    data = value_of(given, "--data") or ""
    words = NAME.findall(data.removeprefix("hf:").rstrip("/").rpartition("/")[2])
    name = words[0].removesuffix(".parquet") if words else OWN_IMAGES
    config = replace_unchecked(recipe, name=name)
    flags = {word.partition("=")[0].replace("_", "-") for word in given}
    if "--pretrained" in flags and "--optimizer.name" not in flags:
        rate = dataclasses.replace(recipe.optimizer, learning_rate=FINE_TUNING_RATE)
        config = replace_unchecked(config, optimizer=rate)
    arguments = parse([OWN_IMAGES, *given], config)
    if flags & {"--batch-size", "--train.batch-size"}:
        return arguments
    config = arguments.config
    batch_size = min(config.train.batch_size, _fitting_batch(config))
    train = dataclasses.replace(config.train, batch_size=batch_size)
    return dataclasses.replace(arguments, config=dataclasses.replace(config, train=train))


def _fitting_batch(config: Recipe) -> int:
    """Return the largest batch size, a power of two and at least 2, that gives ten batches an
    epoch."""
    import torch

    from bdkd.data import create_source

    source = create_source(config.data, 0, torch.device("cpu"), torch.contiguous_format)
    images = source.info.counts["train"]
    return 2 ** max(1, (images // 10).bit_length() - 1)


def resolve_run(command: Command) -> Arguments:
    """Choose the run's folder. A resumed run takes its options from the folder, overridden by the
    command line. Raise ``RunError`` if the folder contains a run of another recipe."""
    from bdkd.engine.image_size import with_image_size_of
    from bdkd.engine.networks import with_model_options
    from bdkd.runs.folder import RunFolder, default_run_dir

    arguments, given, name = command
    config = arguments.config
    run_dir = Path(config.run_dir) if config.run_dir else default_run_dir(config, arguments.resume)
    folder = RunFolder(run_dir)
    if arguments.resume != "never" and folder.config.exists():
        stored = folder.read_config()
        if stored.name != config.name:
            found = f"{run_dir} contains a run of the recipe {stored.name!r}"
            raise RunError(f"{found}, not of {config.name!r}: choose another --run-dir")
        config = parse(given if name else [stored.name, *given], stored).config
        stored, config = with_model_options(stored), with_model_options(config)
        if changed := [key for key in differing_keys(stored, config) if key != "run_dir"]:
            print(f"resuming with changed {', '.join(changed)}")
        if name:
            recipe, asked = (
                with_image_size_of(with_model_options(each), stored)
                for each in (load_recipe(name), arguments.config)
            )
            ignored = set(differing_keys(stored, recipe)) - {"run_dir"}
            overridden = set(differing_keys(asked, recipe))
            if edited := sorted(ignored - overridden - set(changed)):
                print(f"using {folder.config}, which differs from {name}: {', '.join(edited)}")
    config = dataclasses.replace(config, run_dir=str(run_dir))
    return dataclasses.replace(arguments, config=config)


def continue_launch(command: Command, launch: str | None) -> Command:
    """Resume the run of this ``torchrun`` launch if ``torchrun`` has restarted its ranks.

    Args:
        launch: identifier of the launch. None without ``torchrun``.
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


def _expand_resume(given: list[str]) -> list[str]:
    """Add ``require`` after a ``--resume`` without a value."""
    values = get_args(Resume)
    expanded = []
    for argument, following in pairwise([*given, ""]):
        expanded.append(argument)
        if argument == "--resume" and following not in values:
            if following and not following.startswith("-"):
                needed = f"{', '.join(values)} or have no value (require)"
                hint = f"got {following!r} (put the recipe first)"
                if os.path.isdir(following):
                    hint = f"got the folder {following!r}: pass --resume --run-dir {following}"
                raise UsageError(f"--resume must be {needed}, {hint}")
            expanded.append("require")
    return expanded


def _expand_profile(given: list[str]) -> list[str]:
    """Add 8 after a ``--profile`` without a value."""
    expanded = []
    for argument, following in pairwise([*given, ""]):
        expanded.append(argument)
        number = following.removeprefix("-").isdigit()
        if argument == "--profile" and not number and following[:1] in ("", "-"):
            expanded.append("8")
    return expanded
