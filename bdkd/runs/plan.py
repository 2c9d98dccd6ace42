"""Describe a run before it starts, for ``bdkd train`` and ``bdkd train --dry-run``."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from bdkd.config import PRETRAINED, RANDOM, NetworkConfig, Recipe
from bdkd.engine.components import Components
from bdkd.engine.progress import Progress
from bdkd.engine.throughput import StepTimes

if TYPE_CHECKING:
    from bdkd.engine.cost import Cost, Memory  # this import takes a quarter of a second

WIDTH = 80
Row = tuple[str, list[str]]  # a label, and pieces of text; a line may break between two pieces

_Costs = Mapping[str, "Cost"]


def banner(components: Components, folder: Path, step: int = 0) -> str:
    """Return the lines that ``bdkd train`` prints before its first step.

    Args:
        folder: the folder of the run.
        step: the step from which the run continues.
    """
    return format_rows(run_rows(components, components.context.world_size, folder, step))


def summary_of_run(components: Components) -> str:
    """Return the lines of :func:`banner` that describe what affects the speed of a step."""
    rows = run_rows(components, components.context.world_size, Path(), 0)
    return format_rows([row for row in rows if row[0] not in ("optimizer", "steps", "folder")])


def describe(
    components: Components, ranks: int, each: _Costs, memory: Row, time: Sequence[Row]
) -> str:
    """Return the lines of ``--dry-run``.

    Args:
        ranks: number of ranks of the run.
        each: the cost of each network by name.
        memory: the result of :func:`memory_row`.
        time: the result of :func:`measured_rows` or :func:`assumed_row`.
    """
    step = sum(cost.step for cost in each.values())
    batch = components.recipe.train.batch_size
    operations = [
        f"{flops(step)} per image forward and backward", f"{flops(step * batch)} per step",
        "of convolutions and matrix products", "a multiply-add counts as 2",
    ]  # fmt: skip
    folder = Path(str(components.recipe.run_dir))
    *rows, last = run_rows(components, ranks, folder, 0, each)
    return format_rows([*rows, ("operations", operations), memory, *time, last])


def run_rows(
    components: Components, ranks: int, folder: Path, step: int, each: _Costs | None = None
) -> list[Row]:
    """Return the rows that :func:`describe` and :func:`banner` share. The last row is the folder.

    Args:
        ranks: number of ranks of the run.
        step: the step from which the run continues.
        each: the cost of each network by name. None: do not show the costs.
    """
    recipe, info = components.recipe, components.source.info
    o, s = recipe.optimizer, recipe.schedule
    counts = [f"{n:,} {split}" for split, n in info.counts.items() if n]
    counts[-1] += f" images of {'x'.join(map(str, (info.channels, *info.image_size)))}"
    return [
        ("recipe", [recipe.name, *_objective(components), f"seed {recipe.seed}"]),
        ("device", _device(components.device)),
        ("data", [info.source, *counts, f"{info.num_classes:,} classes"]),
        *_networks(components, ranks, step, each),
        ("optimizer", [
            o.name, f"peak learning rate {o.learning_rate:g}", f"{s.name} schedule",
            f"warm-up of {s.warmup:g} {s.unit.removesuffix('s') if s.warmup == 1 else s.unit}",
        ]),
        ("batch", _batch(recipe, ranks)),
        ("precision", _precision(recipe, components.device)),
        ("steps", _steps(recipe, info.counts["train"], step)),
        ("folder", [str(folder)]),
    ]  # fmt: skip


def _objective(components: Components) -> Iterator[str]:
    recipe, warmup = components.recipe, components.objective.warmup
    yield f"objective {recipe.objective.name}"
    if warmup > recipe.train.epochs:
        yield (
            f"warning: its warm-up of {warmup:g} epochs is longer than the {recipe.train.epochs} "
            "epochs of the run"
        )
    elif warmup:
        yield f"its warm-up of {warmup:g} epochs"


def _device(device: torch.device) -> list[str]:
    if device.type == "cuda":
        return [str(device), torch.cuda.get_device_name(device)]
    threads = torch.get_num_threads()
    return [str(device), f"{threads} thread{'s' * (threads > 1)}"]


def _networks(components: Components, ranks: int, step: int, each: _Costs | None) -> Iterator[Row]:
    label, train = "networks", components.recipe.train
    images = math.ceil(math.ceil(train.batch_size / ranks) / train.accumulate)
    for name, network in components.networks.members.items():
        config, frozen = components.recipe.networks[name], name in components.networks.frozen
        role = config.role if config.role != name else ""
        notes = ", ".join(filter(None, (role, "frozen" * frozen)))
        parameters = sum(p.numel() for p in network.parameters())
        pieces = [
            f"{name}{f' ({notes})' * bool(notes)}: {config.model}", f"{parameters:,} parameters",
            "weights of the checkpoint" if step else _weights(config),
        ]  # fmt: skip
        if each is not None:
            forward = f"{flops(each[name].forward)} per image forward"
            pieces += [forward, f"{binary_size(each[name].kept * images)} of activations"]
        yield label, pieces
        label = ""


def _weights(config: NetworkConfig) -> str:
    if config.weights == PRETRAINED or config.options.get("pretrained"):
        return "pretrained weights"
    known = config.weights not in (None, RANDOM)
    return f"weights of {config.weights}" if known else "random weights"


def _batch(recipe: Recipe, ranks: int) -> list[str]:
    size, parts = recipe.train.batch_size, recipe.train.accumulate
    pieces = [f"{size:,} images"]
    if ranks > 1:
        pieces.append(f"{math.ceil(size / ranks):,} on each of {ranks} ranks")
    if parts > 1:
        pieces.append(f"in {parts} micro-batches (train.accumulate)")
    return pieces


def _precision(recipe: Recipe, device: torch.device) -> list[str]:
    train = recipe.train
    on = {
        "TF32": train.tf32 and train.precision == "fp32" and device.type == "cuda",
        "compiled": train.compile,
        "CUDA graph": train.cuda_graph,
        "networks overlap": train.overlap,
        "deterministic": train.deterministic,
    }
    return [train.precision, *(name for name, applies in on.items() if applies)]


def plural(count: int, noun: str) -> str:
    """Return a number and its noun, such as "1 epoch" or "2 epochs"."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def _steps(recipe: Recipe, train_images: int, step: int) -> list[str]:
    per_epoch = train_images // recipe.train.batch_size
    total = per_epoch * recipe.train.epochs
    pieces = [f"{total:,}: {plural(recipe.train.epochs, 'epoch')} of {plural(per_epoch, 'step')}"]
    if recipe.max_steps is not None:
        pieces.append(f"stopping after {min(total, recipe.max_steps):,} (max_steps)")
    return [*pieces, f"continuing from step {step:,}"] if step else pieces


# -- memory ----------------------------------------------------------------------------------------


def memory_row(memory: "Memory", available: int | None, ranks: int) -> Row:
    """Return a row with the estimated memory of a rank, its parts, and the free memory.

    Args:
        available: free memory in bytes. None: unknown.
        ranks: number of ranks of the run.
    """
    parts = {
        "Python and torch": memory.process,
        "images in memory": memory.data,
        "weights": memory.weights,
        "gradients and optimizer state": memory.gradients,
        "activations": memory.activations,
        "batches and workspace": memory.workspace,
    }
    first = f"about {binary_size(memory.total)}{' on each rank' * (ranks > 1)}, estimated"
    pieces = [f"{binary_size(size)} {name}" for name, size in parts.items() if size]
    if available is not None:
        pieces.append(f"{binary_size(available)} more is free here")
    return "memory", [f"{first}: {pieces[0]}", *pieces[1:]]


def memory_warning(memory: "Memory", available: int | None, recipe: Recipe) -> str | None:
    """Return a warning if the estimated memory exceeds the free memory, else None."""
    if available is None or memory.to_come <= available:
        return None
    return (
        f"not enough memory: training needs about {binary_size(memory.to_come)} more, "
        f"and {binary_size(available)} is free: {memory_remedy(recipe)}"
    )


def memory_remedy(recipe: Recipe) -> str:
    """Return the options of a recipe that reduce its memory, as text."""
    remedies = ["raise train.accumulate", "lower train.batch_size or data.image_size"]
    if recipe.train.precision == "fp32":
        remedies.append("set train.precision to bf16")
    return ", or ".join([", ".join(remedies[:-1]), remedies[-1]])


# -- time ------------------------------------------------------------------------------------------


def measured_rows(components: Components, steps: StepTimes, evaluation: float) -> list[Row]:
    """Return rows with the measured speed and memory, and the estimated time of the whole run.

    Args:
        steps: the measured times of some steps.
        evaluation: seconds per evaluated image.
    """
    recipe, counts = components.recipe, components.source.info.counts
    train_images = counts["train"]
    total = Progress().remaining_steps(recipe, train_images)
    evaluations = count_evaluations(recipe, train_images)
    # At the end of the run, the validation images are evaluated once more to fit temperatures,
    # and then the test images.
    val = (evaluations + 1) * counts["val"]
    test = (evaluations * recipe.watch_test + 1) * counts["test"]
    training, evaluating = total * steps.mean, (val + test) * evaluation
    passes = evaluations * ((counts["val"] > 0) + recipe.watch_test) + (counts["val"] > 0) + 1
    # The steps were timed with the largest images (data.progressive): the time is an upper bound.
    bound = "at most " * (len(recipe.data.training_sizes()) > 1)
    what = "tensors on the GPU" if components.device.type == "cuda" else "the whole process"
    return [
        ("measured", [
            f"{rate(steps.images_per_second)} images/s", f"{1000 * steps.mean:,.1f} ms a step",
            f"{steps.data_wait:.0%} of it waiting for data",
            f"peak memory {binary_size(round(steps.memory_mib * 2**20))} ({what})",
            f"mean of {len(steps.seconds)} steps",
        ]),
        ("time", [
            f"{bound}{duration(training + evaluating)} on this machine",
            f"{duration(training)} for {total:,} steps",
            f"{duration(evaluating)} for {plural(passes, 'evaluation')}",
            "without checkpoints" + " and compilation" * recipe.train.compile,
        ]),
    ]  # fmt: skip


def assumed_row(components: Components, images_per_second: float) -> Row:
    """Return a row with the time of the training steps at a given speed."""
    recipe, train_images = components.recipe, components.source.info.counts["train"]
    images = Progress().remaining_steps(recipe, train_images) * recipe.train.batch_size
    time = duration(images / images_per_second)
    return "time", [f"{time} at {images_per_second:,.6g} images/s", "without the evaluations"]


def count_evaluations(recipe: Recipe, train_images: int) -> int:
    """Return the number of evaluations during training. A run is evaluated every
    ``evaluate_every`` epochs and after the last step."""
    total = Progress().remaining_steps(recipe, train_images)
    between = recipe.evaluate_every * (train_images // recipe.train.batch_size)
    return math.ceil(total / between)


# -- text ------------------------------------------------------------------------------------------


def format_rows(rows: Sequence[Row]) -> str:
    """Return aligned lines of at most ``WIDTH`` columns. A longer piece is not broken."""
    indent = max(len(label) for label, _ in rows) + 2
    lines = []
    for label, pieces in rows:
        line = label.ljust(indent)
        for number, piece in enumerate(pieces, 1):
            text = piece + "," * (number < len(pieces))
            separator = "" if number == 1 else " "
            if number > 1 and len(line) + len(separator) + len(text) > WIDTH:
                lines.append(line)
                line, separator = " " * indent, ""
            line += separator + text
        lines.append(line)
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """Return a time in seconds below 2 minutes, in minutes below 2 hours, or else in hours."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:,.1f} hours"


def rate(value: float) -> str:
    """Return a number of images per second with at least three digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def flops(count: float) -> str:
    """Return a number of floating-point operations with its unit."""
    units = {1e15: "PFLOP", 1e12: "TFLOP", 1e9: "GFLOP", 1e6: "MFLOP"}
    size = next((size for size in units if count >= size), 1e3)
    return f"{count / size:,.3g} {units.get(size, 'kFLOP')}"


def binary_size(count: int) -> str:
    """Return a number of bytes in MiB or GiB."""
    if count >= 2**30:
        return f"{count / 2**30:,.1f} GiB"
    return f"{count / 2**20:,.0f} MiB" if count >= 10 * 2**20 else f"{count / 2**20:,.1f} MiB"
