"""``bdkd evaluate``: evaluate the networks of a run, or an exported network."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from bdkd.cli.flags import parse
from bdkd.cli.table import results_table
from bdkd.config import parse_recipe
from bdkd.errors import RunError
from bdkd.identity import class_difference

if TYPE_CHECKING:
    from bdkd.distributed.context import DistributedContext
    from bdkd.engine.components import Components


@dataclass(frozen=True)
class Arguments:
    """Print accuracy and calibration of every network of a run, or of one exported file."""

    path: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_OR_FILE")]
    """The folder of a run (evaluates its selected checkpoint), a checkpoint file, or a file that
    bdkd export wrote (.onnx, .pt2, .safetensors)."""
    split: Literal["val", "test"] = "val"
    """val: the images held out of training to select a checkpoint; test: the test images."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:N."""
    data_root: str | None = None
    """Folder of the data set, if it has moved since training."""
    timeout: float = 600.0
    """Seconds that a rank waits for another rank, under torchrun."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print one JSON object instead of a table."""


def run(given: list[str]) -> None:
    """Evaluate on all ranks that torchrun started, and print the results on rank 0."""
    from bdkd.distributed.launch import init_distributed, only_rank0_prints

    with only_rank0_prints():
        arguments = parse(Arguments, "bdkd evaluate", given)

    from bdkd.export.formats import is_exported
    from bdkd.runs.folder import to_json

    exported = is_exported(arguments.path) and not arguments.path.is_dir()
    with init_distributed(arguments.timeout, arguments.device) as context:
        summary = (measure_exported if exported else measure_run)(arguments, context)
        if not context.is_rank0:
            return
        if arguments.json:
            print(to_json(summary, indent=2))
        else:
            images = {"val": "validation images", "test": "test images"}[summary["split"]]
            title = f"{summary['checkpoint']}, step {summary['step']}, {images}"
            print(f"{title}\n\n{results_table(summary)}")


def measure_run(arguments: Arguments, context: "DistributedContext") -> dict[str, Any]:
    """Evaluate every network of a run or checkpoint."""
    from bdkd.engine.components import build_components
    from bdkd.runs.checkpoint import load_checkpoint
    from bdkd.runs.folder import selected_checkpoint
    from bdkd.runs.weights import load_networks, relocate

    def load() -> tuple[Path, str, dict[str, Any]]:
        path = selected_checkpoint(arguments.path)
        return path, *load_checkpoint(path)

    path, text, saved = context.broadcast_from_rank0(load)
    recipe = parse_recipe(text, source=str(path), of_run=True)
    recipe = relocate(recipe, arguments.device, arguments.data_root)
    components = build_components(recipe, context, training=False)
    networks = load_networks(components, path, saved)
    return _evaluate(arguments, components, path, saved["position"]["step"], networks)


def measure_exported(arguments: Arguments, context: "DistributedContext") -> dict[str, Any]:
    """Evaluate the network of a file that ``bdkd export`` wrote on the data set of its run. The
    precision is float32, like the file, for any precision of the training."""
    from bdkd.engine.components import build_components
    from bdkd.export.formats import open_network, read_exported, without_others
    from bdkd.runs.weights import relocate

    exported = read_exported(arguments.path)
    facts = exported.facts
    recipe = parse_recipe(facts.recipe, source=str(arguments.path), of_run=True)
    recipe = without_others(recipe, facts.network)
    recipe = relocate(recipe, arguments.device, arguments.data_root)
    recipe = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, precision="fp32"))
    components = build_components(recipe, context, training=False)
    info = components.source.info
    differs = class_difference(facts.classes, info.classes)
    if not differs and info.normalisation != facts.normalisation:
        differs = "its mean and standard deviation differ"
    if differs:
        remedy = "pass the folder of the right one with --data-root"
        raise RunError(f"the data set here is not the one of {arguments.path}: {differs}; {remedy}")
    [reference] = components.networks.members.values()
    network = open_network(exported, reference, components.device)
    summary = _evaluate(arguments, components, arguments.path, facts.step, {facts.network: network})
    summary["networks"][facts.network] |= {"role": facts.role, "parameters": facts.parameters}
    return summary


def _evaluate(
    arguments: Arguments, components: "Components", path: Path, step: int,
    networks: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    from bdkd.runs.summary import describe, evaluator_of

    results = evaluator_of(components, networks).evaluate(arguments.split)
    recipe, images = components.recipe, components.source.info.counts[arguments.split]
    described = {name: describe(recipe, name, x, results[name]) for name, x in networks.items()}
    return {"checkpoint": str(path), "step": step, "split": arguments.split, "images": images,
            "networks": described}  # fmt: skip
