"""``bdkd benchmark``: measure the training steps of a recipe, or exported files."""

import contextlib
import io
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from bdkd.cli.help import Help, with_recipe
from bdkd.cli.options import parse_options
from bdkd.cli.table import table
from bdkd.cli.train import check_network_names
from bdkd.config import (
    Bounds,
    Count,
    DataConfig,
    NotNegative,
    Recipe,
)
from bdkd.errors import RunError, UsageError

if TYPE_CHECKING:
    from bdkd.data import DataSource
    from bdkd.distributed.context import DistributedContext
    from bdkd.engine.components import Components
    from bdkd.engine.throughput import StepTimes

HELP = Help(
    "bdkd benchmark RECIPE [options]",
    "Measure the training steps of a recipe: time, images/s, memory, and the share of the time "
    "spent waiting for data. --data synthetic replaces the data set with random images of the same "
    "size on the device, so that no files are needed. Nothing is written. bdkd benchmark FILE... "
    "measures exported files (bdkd benchmark model.onnx --help).",
    {
        "--steps": ("N", "steps to measure"),
        "--warmup": ("N", "steps to run before the measured steps"),
        "--classes": (
            "N",
            "number of classes with --data synthetic (default: that of the recipe's data)",
        ),
        "--json": ("", "print one JSON object instead of a table"),
    },
    ("--max-steps", "--run-dir", "--pretrained", "--networks.NAME.weights"),
)


@dataclass(frozen=True)
class Arguments:
    """Measure the time and memory of a recipe's training steps, and the speed of each network's
    forward pass. Nothing is written."""

    recipe: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE")]
    """Name of a shipped recipe, or a TOML file."""
    config: Annotated[Recipe, tyro.conf.arg(name="")]
    synthetic: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """The same as --data synthetic: random images in the memory of the device, with the recipe's
    image size and number of classes. They need no files and no loader."""
    classes: Annotated[int, Bounds(ge=2)] | None = None
    """With --data synthetic: number of classes. Default: that of the recipe's data source."""
    steps: Count = 50
    """Number of steps to measure."""
    warmup: NotNegative[int] = 10
    """Number of steps to run before the measured steps."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print one JSON object instead of a table."""


def run(given: list[str]) -> None:
    """Measure on all ranks that torchrun started, and print the results on rank 0."""
    if names_file(given):
        from bdkd.cli import benchmark_files

        return benchmark_files.run(given)

    from bdkd.distributed.launch import init_distributed, only_rank0_prints

    with only_rank0_prints():
        arguments = parse(given)

    from bdkd.runs.folder import to_json

    config = arguments.config
    with init_distributed(config.distributed.timeout, config.device) as context:
        # Compilers print lines on standard output, which is for the results.
        with contextlib.redirect_stdout(sys.stderr if context.is_rank0 else io.StringIO()):
            title, results = measure(arguments, context)
        if context.is_rank0:
            text = to_json(results, indent=2) if arguments.json else describe(results)
            print(text if arguments.json else f"{title}\n\n{text}")


def names_file(given: list[str]) -> bool:
    """Return whether a command line names exported files instead of a recipe. A recipe is always
    the first argument."""
    from bdkd.export.formats import is_exported

    if given and given[0].startswith("-"):
        return any(is_exported(Path(word)) for word in given if not word.startswith("-"))
    return bool(given) and is_exported(Path(given[0]))


def parse(given: list[str]) -> Arguments:
    """Parse a command line.

    Raises:
        UsageError: there is no recipe, or an option is wrong.
    """
    default = with_recipe(Arguments, given, "bdkd benchmark", HELP, "digits")
    check_network_names(given, default.config)
    arguments = parse_options(Arguments, "bdkd benchmark", _expand_synthetic(given), default)
    if arguments.classes is not None and not arguments.synthetic:
        raise UsageError("--classes needs --data synthetic: give both, or neither")
    return arguments


def _expand_synthetic(given: list[str]) -> list[str]:
    """Replace ``--data synthetic``, which in ``bdkd train`` selects the data source
    ``synthetic``."""
    expanded: list[str] = []
    for argument, before in zip(given, ["", *given], strict=False):
        if argument == "--data=synthetic":
            expanded.append("--synthetic")
        elif (before, argument) == ("--data", "synthetic"):
            expanded[-1] = "--synthetic"
        else:
            expanded.append(argument)
    return expanded


def measure(arguments: Arguments, context: "DistributedContext") -> tuple[str, dict[str, Any]]:
    """Return a description of the run and the results, which are complete on rank 0. All ranks must
    call this."""
    from bdkd.data import create_source
    from bdkd.device import is_out_of_memory
    from bdkd.engine.components import build_components
    from bdkd.runs.plan import memory_remedy, summary_of_run

    create = partial(_create_random_images, arguments) if arguments.synthetic else create_source
    components = build_components(arguments.config, context, create=create)
    context.broadcast_from_rank0(partial(_announce, arguments, components))
    try:
        return summary_of_run(components), _measure(arguments, components)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        remedy = memory_remedy(arguments.config)
        raise RunError(f"out of memory while timing steps: {remedy}") from error


def _announce(arguments: Arguments, components: "Components") -> None:
    """Print what is measured, and warn if there is too little memory. On a CPU, raise ``RunError``
    instead of a warning: a GPU out of memory reports an error, but on a CPU the system kills the
    process."""
    from bdkd.probe import check_memory
    from bdkd.runs.plan import plural

    warning = check_memory(components, components.context.world_size).warning
    if warning is not None and components.device.type == "cpu":
        raise RunError(warning)
    if warning is not None:
        print(f"warning: {warning}", file=sys.stderr, flush=True)
    count = arguments.warmup + arguments.steps
    steps = plural(count, "step")
    print(f"timing {steps} on {components.device}", file=sys.stderr, flush=True)


def _create_random_images(arguments: Arguments, config: DataConfig, *context: Any) -> "DataSource":
    from bdkd.data import SourceContext
    from bdkd.data.random_images import create_random_images

    batch_size = arguments.config.train.batch_size
    return create_random_images(config, arguments.classes, batch_size, SourceContext(*context))


def _measure(arguments: Arguments, components: "Components") -> dict[str, Any]:
    from bdkd.engine.throughput import ThroughputMeter
    from bdkd.probe import Limit, time_forward, time_steps
    from bdkd.trainer import Trainer

    context, recipe, info = components.context, components.recipe, components.source.info
    limits = [Limit(count, count) for count in (arguments.warmup, arguments.steps)]
    trainer = Trainer(components)
    steps = of_all_ranks(time_steps(trainer, *limits), context)
    meter = ThroughputMeter(components)
    flops = meter.flops_per_image() * steps.images_per_second
    networks = {
        name: {
            "model": recipe.networks[name].model, "role": recipe.networks[name].role,
            "parameters": sum(p.numel() for p in network.parameters()),
            **speed(of_all_ranks(time_forward(trainer, name, *limits), context)),
        }
        for name, network in components.networks.members.items()
    }  # fmt: skip
    return {
        "recipe": recipe.name, "method": recipe.objective.name, "device": str(components.device),
        "ranks": context.world_size, "data": info.source, "image_size": list(info.image_size),
        "classes": info.num_classes, "batch_size": recipe.train.batch_size,
        "accumulate": recipe.train.accumulate, "precision": recipe.train.precision,
        "compile": recipe.train.compile, "warmup": arguments.warmup, "steps": arguments.steps,
        **speed(steps), "data_wait": steps.data_wait, "memory_mib": steps.memory_mib,
        "flops_per_second": flops,
        "mfu": flops / (meter.peak * context.world_size) if meter.peak else None,
        "networks": networks,
    }  # fmt: skip


def of_all_ranks(times: "StepTimes", context: "DistributedContext") -> "StepTimes":
    """Return on rank 0 the largest time of any rank for each step, the largest share of waiting and
    the largest memory, because the slowest rank determines the speed."""
    ranks = context.gather_objects(times) or [times]
    return replace(
        times,
        seconds=tuple(map(max, zip(*(rank.seconds for rank in ranks), strict=True))),
        data_wait=max(rank.data_wait for rank in ranks),
        memory_mib=max(rank.memory_mib for rank in ranks),
    )


def speed(times: "StepTimes") -> dict[str, Any]:
    """Return the times in milliseconds, and the images per second of all ranks."""
    return {
        "images_per_second": times.images_per_second,
        "ms": {
            "mean": 1000 * times.mean, "median": 1000 * times.percentile(50),
            "p90": 1000 * times.percentile(90),
        },
    }  # fmt: skip


def describe(results: Mapping[str, Any]) -> str:
    """Return the results as a table."""
    from bdkd.runs.plan import binary_size, flops, rate

    measured = {"training step": results}
    measured |= {f"{name}, forward only": network for name, network in results["networks"].items()}
    rows = [
        [
            name, rate(row["images_per_second"]),
            *(f"{row['ms'][key]:,.2f}" for key in ("mean", "median", "p90")),
        ]
        for name, row in measured.items()
    ]  # fmt: skip
    header = ["", "images/s", "mean ms", "median ms", "p90 ms"]
    mfu = "" if results["mfu"] is None else f", MFU {results['mfu']:.1%}"
    what = "the whole process" if results["device"] == "cpu" else "tensors on the GPU"
    each = " of a rank" if results["ranks"] > 1 else ""
    memory = binary_size(round(results["memory_mib"] * 2**20))
    return (
        f"{table(header, rows)}\n\n"
        f"measured {results['steps']} steps after {results['warmup']} warm-up steps; "
        f"data wait {results['data_wait']:.1%} of a step\n"
        f"{flops(results['flops_per_second'])}/s{mfu}; "
        f"peak memory{each} {memory} ({what})"
    )
