"""``bdkd evaluate``: the networks of a run, or one that was exported, measured again."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from bdkd.cli.table import results_table
from bdkd.config import Recipe
from bdkd.errors import RunError
from bdkd.identity import class_difference


@dataclass(frozen=True)
class Arguments:
    """Accuracy and calibration of every network of a run, or of one exported file."""

    path: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_OR_FILE")]
    """A run's folder (its selected checkpoint is taken), one checkpoint file, or a file that
    bdkd export wrote (.onnx, .pt2, .safetensors)."""
    split: Literal["val", "test"] = "val"
    """Images held out of training for choosing a checkpoint, or the test images."""
    device: str = "auto"
    """auto (a GPU where there is one), cpu, cuda or cuda:N."""
    data_root: str | None = None
    """Folder of the data set, where it has moved since the training."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print one JSON object instead of a table."""


def run(given: list[str]) -> None:
    """Parse, evaluate, print."""
    arguments = tyro.cli(Arguments, prog="bdkd evaluate", args=given)

    from bdkd.training.exported import is_exported
    from bdkd.training.run_folder import to_json

    exported = is_exported(arguments.path) and not arguments.path.is_dir()
    summary = measure_exported(arguments) if exported else measure_run(arguments)
    if arguments.json:
        print(to_json(summary, indent=2))
    else:
        print(f"{summary['checkpoint']}, step {summary['step']}\n")
        print(results_table(summary))


def measure_run(arguments: Arguments) -> dict[str, Any]:
    """Every network of a run or checkpoint."""
    from bdkd.config import parse_recipe
    from bdkd.training.checkpoint import load_checkpoint
    from bdkd.training.evaluate import evaluate
    from bdkd.training.resume import restore
    from bdkd.training.run_folder import selected_checkpoint
    from bdkd.training.setup import Setup
    from bdkd.training.state import TrainingState

    checkpoint = selected_checkpoint(arguments.path)
    text, saved = load_checkpoint(checkpoint)
    recipe = _here(arguments, parse_recipe(text, source=str(checkpoint)))
    setup = Setup(recipe, initial_weights=False)
    info = setup.source.info
    state = TrainingState(
        recipe, setup.networks, info.counts["train"], setup.device, data=info.identity()
    )
    restore(state, checkpoint, saved)
    results = evaluate(
        state.evaluated_networks(), setup.source, arguments.split, recipe.train.batch_size,
        recipe.train.precision,
    )  # fmt: skip
    return _summary(
        arguments, setup, checkpoint, state.position.step, state.evaluated_networks(), results
    )


def measure_exported(arguments: Arguments) -> dict[str, Any]:
    """The network of a file that ``bdkd export`` wrote, on the data set of its run; float32, as
    the file is, whatever the precision of the training was."""
    from bdkd.config import parse_recipe
    from bdkd.training.evaluate import evaluate
    from bdkd.training.exported import alone, open_network, read_exported
    from bdkd.training.setup import Setup

    exported = read_exported(arguments.path)
    facts = exported.facts
    recipe = alone(parse_recipe(facts.recipe, source=str(arguments.path)), facts.network)
    setup = Setup(_here(arguments, recipe), initial_weights=False)
    info = setup.source.info
    differs = class_difference(facts.classes, info.classes)
    if not differs and info.normalisation != facts.normalisation:
        differs = "its mean and standard deviation differ"
    if differs:
        raise RunError(
            f"the data set here is not the one of {arguments.path}: {differs}; give the right one "
            "with --data-root"
        )
    [reference] = setup.networks.members.values()
    network = open_network(exported, reference, setup.device)
    batch_size = setup.recipe.train.batch_size
    results = evaluate({facts.network: network}, setup.source, arguments.split, batch_size, "fp32")
    summary = _summary(
        arguments, setup, arguments.path, facts.step, {facts.network: reference}, results
    )
    summary["networks"][facts.network] |= {"role": facts.role}
    return summary


def _here(arguments: Arguments, recipe: Recipe) -> Recipe:
    """A recipe on the device and with the data that the arguments say."""
    data = recipe.data
    if arguments.data_root is not None:
        data = dataclasses.replace(data, root=arguments.data_root)
    return dataclasses.replace(recipe, device=arguments.device, data=data)


def _summary(
    arguments: Arguments, setup, path: Path, step: int, networks, results
) -> dict[str, Any]:
    from bdkd.training.summary import describe

    return {
        "checkpoint": str(path),
        "step": step,
        "split": arguments.split,
        "images": setup.source.info.counts[arguments.split],
        "networks": {
            name: dict(describe(setup, name, network, results[name]))
            for name, network in networks.items()
        },
    }
