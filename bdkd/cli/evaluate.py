"""``bdkd evaluate``: the networks of a finished or running training, measured again."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from bdkd.cli.table import results_table
from bdkd.errors import RunError


@dataclass(frozen=True)
class Arguments:
    """Accuracy and calibration of every network of a run."""

    path: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_OR_CHECKPOINT")]
    """A run's folder (its selected checkpoint is taken) or one checkpoint file."""
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

    from bdkd.config import parse_recipe
    from bdkd.training.checkpoint import load_checkpoint
    from bdkd.training.evaluate import evaluate
    from bdkd.training.loop import restore
    from bdkd.training.run_folder import to_json
    from bdkd.training.setup import Setup
    from bdkd.training.state import TrainingState
    from bdkd.training.summary import describe

    checkpoint = find_checkpoint(arguments.path)
    text, saved = load_checkpoint(checkpoint)
    recipe = parse_recipe(text, source=str(checkpoint))
    data = recipe.data
    if arguments.data_root is not None:
        data = dataclasses.replace(data, root=arguments.data_root)
    recipe = dataclasses.replace(recipe, device=arguments.device, data=data)
    setup = Setup(recipe, initial_weights=False)
    state = TrainingState(recipe, setup.networks, setup.source.info.counts["train"], setup.device)
    restore(state, checkpoint, saved)
    results = evaluate(
        state.evaluated_networks(), setup.source, arguments.split, recipe.train.batch_size,
        recipe.train.precision,
    )  # fmt: skip
    summary = {
        "checkpoint": str(checkpoint),
        "step": state.position.step,
        "split": arguments.split,
        "images": setup.source.info.counts[arguments.split],
        "networks": {
            name: describe(setup, name, network, results[name])
            for name, network in state.evaluated_networks().items()
        },
    }
    if arguments.json:
        print(to_json(summary, indent=2))
    else:
        print(f"{checkpoint}, step {state.position.step}\n")
        print(results_table(summary))


def find_checkpoint(path: Path) -> Path:
    """The checkpoint file that a path means."""
    from bdkd.training.run_folder import RunFolder

    if path.is_file():
        return path
    folder = RunFolder(path)
    if not path.is_dir() or not folder.config.exists():
        raise RunError(f"no run and no checkpoint at {path}")
    saved = folder.checkpoint_paths()
    if folder.read_config().train.select == "best":
        saved = folder.checkpoint_paths("best") or saved
    if not saved:
        raise RunError(f"the run {path} has no checkpoint yet")
    return saved[0]
