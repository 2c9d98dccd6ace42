"""``bdkd evaluate``: evaluate the networks of a run, or exported networks."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from bdkd.cli.changes import describe_comparison, describe_temperature_gain
from bdkd.cli.flags import parse
from bdkd.cli.table import printable, results_table
from bdkd.config import parse_recipe
from bdkd.errors import UsageError

if TYPE_CHECKING:
    from bdkd.distributed.context import DistributedContext
    from bdkd.engine.components import Components
    from bdkd.export.facts import Exported


@dataclass(frozen=True)
class Arguments:
    """Print accuracy and calibration of every network of a run, or of one exported file. An int8
    file is compared with its fp32 file."""

    path: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_OR_FILE")]
    """The folder of a run (evaluates its selected checkpoint), a checkpoint file, or a file that
    bdkd export wrote (.onnx, .pt2, .safetensors). Other ONNX files need --recipe."""
    split: Literal["val", "test"] = "val"
    """val: the images held out of training to select a checkpoint; test: the test images."""
    against: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Compare the exported file with this exported file. Both must have the same classes, image
    shape and normalisation. Default: for an int8 file, the fp32 file in its folder from which it
    was made."""
    recipe: Annotated[str | None, tyro.conf.arg(metavar="RECIPE")] = None
    """For an ONNX file that bdkd did not write: evaluate it on the data of this recipe (name, TOML
    file, or folder of a run). Images are normalised as in training with the recipe."""
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
    if not exported:
        for option, value in (("--against", arguments.against), ("--recipe", arguments.recipe)):
            if value is not None:
                raise UsageError(
                    f"{option} needs an exported file as RUN_OR_FILE (.onnx, .pt2, .safetensors), "
                    f"got {arguments.path}"
                )
    with init_distributed(arguments.timeout, arguments.device) as context:
        summary = (measure_exported if exported else measure_run)(arguments, context)
        if not context.is_rank0:
            return
        print(to_json(summary, indent=2) if arguments.json else described(summary))


def described(summary: dict[str, Any]) -> str:
    """Return a summary as text for a terminal."""
    images = {"val": "validation images", "test": "test images"}[summary["split"]]
    title = [printable(summary["checkpoint"])]
    [*_, network] = summary["networks"].values()
    if "precision" in network:
        title += [network["precision"], f"{network['bytes']:,} bytes"]
    if summary["step"] is not None:
        title += [f"step {summary['step']}"]
    parts = [", ".join([*title, images]), results_table(summary)]
    if summary["split"] == "val" and (
        network.get("precision") == "int8" or "temperature_gain" in summary
    ):
        parts += [
            "The ranges of the activations or the temperature of this file come from the "
            "validation images:\npass --split test for a fair result."
        ]
    if "comparison" in summary:
        parts += describe_comparison(summary)
    if "temperature_gain" in summary:
        parts += describe_temperature_gain(summary)
    return "\n\n".join(parts)


def measure_run(arguments: Arguments, context: "DistributedContext") -> dict[str, Any]:
    """Evaluate every network of a run or checkpoint."""
    from bdkd.engine.components import build_components
    from bdkd.runs.checkpoint import load_checkpoint
    from bdkd.runs.folder import selected_checkpoint
    from bdkd.runs.summary import describe, evaluator_of
    from bdkd.runs.weights import load_networks, relocate

    def load() -> tuple[Path, str, dict[str, Any]]:
        path = selected_checkpoint(arguments.path)
        return path, *load_checkpoint(path)

    path, text, saved = context.broadcast_from_rank0(load)
    recipe = parse_recipe(text, source=str(path), of_run=True)
    recipe = relocate(recipe, arguments.device, arguments.data_root)
    components = build_components(recipe, context, training=False)
    networks = load_networks(components, path, saved)
    results = evaluator_of(components, networks).evaluate(arguments.split)
    images = components.source.info.counts[arguments.split]
    described = {
        name: describe(components.recipe, name, x, results[name]) for name, x in networks.items()
    }
    return {"checkpoint": str(path), "step": saved["position"]["step"], "split": arguments.split,
            "images": images, "networks": described}  # fmt: skip


def measure_exported(arguments: Arguments, context: "DistributedContext") -> dict[str, Any]:
    """Evaluate the network of an exported file on the data set of its run, or on the data set of
    ``--recipe``, and compare it with another file."""
    from bdkd.export.measure import find_baseline, measure, read_against, saturation_warning

    exported, components = _open(arguments, context)
    against, note = find_baseline(exported)
    if arguments.against is not None:
        against, note = read_against(arguments.against, exported, components), ""
    if context.is_rank0:
        files = [exported, against] if against else [exported]
        for message in [note, next(filter(None, map(saturation_warning, files)), "")]:
            if message:
                print(f"warning: {message}", file=sys.stderr, flush=True)
    return measure(exported, components, arguments.split, against)


def _open(arguments: Arguments, context: "DistributedContext") -> tuple["Exported", "Components"]:
    from bdkd.export.foreign import describe_foreign, recipe_for_data
    from bdkd.export.formats import ForeignFile, read_exported
    from bdkd.export.measure import components_for_files, components_of

    path, where = arguments.path, (arguments.device, arguments.data_root, context)
    try:
        exported = read_exported(path)
    except ForeignFile as file:
        if arguments.recipe is None or file.kind != "onnx":
            raise
        components = components_for_files(recipe_for_data(arguments.recipe), *where)
        return describe_foreign(file, components.recipe, components.source.info), components
    if arguments.recipe is not None:
        raise UsageError(
            f"{path} was written by bdkd export and contains its own recipe: leave out --recipe"
        )
    return exported, components_of(exported, *where)
