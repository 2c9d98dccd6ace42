"""Measure an exported file, and compare it with another file, in one pass over the images."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bdkd.config import Recipe, parse_recipe
from bdkd.data import Split
from bdkd.device import processor
from bdkd.distributed.context import SINGLE_PROCESS, DistributedContext
from bdkd.engine.components import Components, build_components
from bdkd.errors import RunError, UsageError, shown
from bdkd.evaluation.paired_images import Change, Logits, compare_on_images
from bdkd.evaluation.predict import Collected, Evaluator
from bdkd.evaluation.temperature import fit_temperature
from bdkd.export.facts import Exported, corrupt
from bdkd.export.foreign import FOREIGN, describe_foreign
from bdkd.export.formats import (
    ForeignFile,
    is_exported,
    open_network,
    read_exported,
    without_others,
)
from bdkd.export.runnable import build_network
from bdkd.identity import class_difference
from bdkd.metrics import values_of
from bdkd.runs.weights import relocate

_AFTER, _BEFORE = "after", "before"
_GAINED = ("top1", "nll", "ece", "brier")  # metrics that a folded temperature can change


def components_of(
    exported: Exported,
    device: str = "auto",
    data_root: str | None = None,
    context: DistributedContext = SINGLE_PROCESS,
) -> Components:
    """Return the components of the run that a file was exported from, in float32.

    Args:
        data_root: folder of the data set. Default: that of the run.

    Raises:
        RunError: the data set cannot be read, or is not the data set of the file.
    """
    facts = exported.facts
    recipe = parse_recipe(facts.recipe, source=str(exported.path), of_run=True)
    components = components_for_files(
        without_others(recipe, facts.network), device, data_root, context
    )
    info = components.source.info
    differs = class_difference(facts.classes, info.classes)
    if not differs and info.normalisation != facts.normalisation:
        differs = "its mean and standard deviation differ"
    if differs:
        remedy = "pass the folder of the file's data set with --data-root"
        raise RunError(f"the data set here is not the one of {exported.path}: {differs}; {remedy}")
    return components


def components_for_files(
    recipe: Recipe, device: str, data_root: str | None, context: DistributedContext
) -> Components:
    """Return the components of a recipe, in float32 even if it trains in another precision."""
    recipe = relocate(recipe, device, data_root)
    train = dataclasses.replace(recipe.train, precision="fp32")
    recipe = dataclasses.replace(recipe, train=train)
    return build_components(recipe, context, training=False)


def find_baseline(exported: Exported) -> tuple[Exported | None, str]:
    """Return the fp32 file that an int8 file was made from, or None and why the int8 file cannot be
    compared with it. Return None and an empty string for a file that names no fp32 file."""
    made = exported.facts.quantization
    if made is None or not made.baseline:
        return None, ""
    name, remedy = made.baseline, "--against FILE compares it with another file"
    path = exported.path.parent / name
    where = f"{shown(name)}, the fp32 file that {exported.path.name} was made from,"
    # The name comes from an untrusted file.
    if Path(name).name != name or not name.isprintable() or not is_exported(path):
        return None, f"{where} is not the name of an exported file: {remedy}"
    try:
        baseline = read_exported(path)
    except RunError as error:
        there = f"cannot be used ({error})" if os.path.exists(path) else "is not in the same folder"
        return None, f"{where} {there}: {remedy}"
    if baseline.weights != made.baseline_weights:
        return None, f"{where} has been replaced by a file with other weights: {remedy}"
    return baseline, ""


def read_against(path: Path, exported: Exported, components: Components) -> Exported:
    """Read the file to compare ``exported`` with. An ONNX file that ``bdkd export`` did not write
    is evaluated on the same data.

    Raises:
        UsageError: ``path`` is not an exported file.
        RunError: the file cannot be read, or its classes or images are not those of ``exported``.
    """
    if not is_exported(path) or path.is_dir():
        needed = "an exported file (.onnx, .pt2, .safetensors)"
        raise UsageError(f"--against needs {needed}, got {path}")
    try:
        against = read_exported(path)
    except ForeignFile as file:
        return describe_foreign(file, components.recipe, components.source.info)
    ours, theirs = exported.facts, against.facts
    differs = class_difference(ours.classes, theirs.classes)
    if not differs and theirs.input_shape != ours.input_shape:
        differs = f"it takes images of the shape {theirs.input_shape}, and not {ours.input_shape}"
    if not differs and theirs.normalisation != ours.normalisation:
        differs = "its images have another mean and standard deviation"
    if differs:
        raise RunError(f"{path} cannot be compared with {exported.path}: {differs}")
    return against


def saturation_warning(exported: Exported) -> str | None:
    """Return a warning if this processor may compute other logits for an int8 file."""
    cpu = processor()
    if exported.facts.precision != "int8" or cpu.vnni is not False:
        return None
    return (
        f"{cpu.name} has no VNNI instructions: onnxruntime may saturate sums of 8-bit products, "
        f"and the logits of {exported.path.name} may be less accurate than on other processors"
    )


def measure(
    exported: Exported, components: Components, split: Split, against: Exported | None = None
) -> dict[str, Any]:
    """Evaluate a file, and compare it with another file on the same images.

    Returns the object that ``bdkd evaluate FILE --json`` prints. Values are fractions and nats.
    With several ranks, all ranks must call this function. It returns an empty dict on all ranks
    except rank 0.

    Args:
        components: see :func:`components_of`. Their networks are not used.
        against: the file before the change, such as the fp32 file of an int8 file.

    Raises:
        RunError: a network cannot be run, or the split has no images.
    """
    files = {_AFTER: exported} | ({_BEFORE: against} if against else {})
    evaluator = Evaluator(
        {name: _network_of(file, components) for name, file in files.items()},
        components.source, components.recipe.train.batch_size, "fp32", components.context,
    )  # fmt: skip
    collected = evaluator.collect(split)
    validation = collected if split == "val" else None
    if split != "val" and components.source.info.counts["val"]:
        validation = evaluator.collect("val")
    if collected is None:  # not on rank 0
        return {}
    facts = exported.facts
    foreign = facts.role == FOREIGN
    for name, file in files.items():
        if file.facts.role == FOREIGN:
            _refuse_probabilities(file.path, collected.logits[name])
    summary: dict[str, Any] = {
        "checkpoint": str(exported.path), "step": None if foreign else facts.step, "split": split,
        "images": len(collected.target),
        "networks": {
            facts.network: {
                "model": facts.model, "role": facts.role,
                "parameters": None if foreign else facts.parameters, **_size_of(exported),
                **_metrics(evaluator, split, collected, validation),
            }
        },
    }  # fmt: skip
    if against is not None:
        summary["comparison"] = _comparison(against, collected, validation)
    if facts.temperature != 1.0:
        summary["temperature_gain"] = _temperature_gain(exported, collected)
    return summary


def _network_of(exported: Exported, components: Components) -> nn.Module:
    # An ONNX file contains its graph, so the network of the recipe is not needed.
    network = nn.Module() if exported.format == "onnx" else build_network(exported)
    return open_network(exported, network, components.device)


def _refuse_probabilities(path: Path, logits: Tensor) -> None:
    """Raise ``RunError`` if a foreign file returns probabilities. They would be taken for logits,
    and the softmax of probabilities has a high ECE. The tolerance is wide because sums of quantised
    probabilities differ from 1 by a few percent."""
    if logits.shape[1] > 1 and (logits >= 0).all() and ((logits.sum(1) - 1).abs() < 0.05).all():
        raise RunError(
            f"the output of {path} is probabilities, and logits are needed: export it without the "
            "last softmax"
        )


def _size_of(exported: Exported) -> dict[str, Any]:
    return {"precision": exported.facts.precision, "bytes": len(exported.content)}


def _metrics(
    evaluator: Evaluator, split: Split, collected: Collected, validation: Collected | None
) -> dict[str, Any]:
    logits = collected.logits[_AFTER]
    temperature = None
    if validation is not None:
        temperature = fit_temperature(validation.logits[_AFTER], validation.target)
    done = evaluator._replace(networks={_AFTER: evaluator.networks[_AFTER]}).measure(
        split, Collected({_AFTER: logits}, collected.target), {_AFTER: temperature}
    )
    return {**values_of(done.results()[_AFTER]), **done.recalibrated()[_AFTER]}


def _comparison(
    against: Exported, collected: Collected, validation: Collected | None
) -> dict[str, Any]:
    def pair(of: Collected) -> Logits:
        return Logits(of.logits[_BEFORE], of.logits[_AFTER], of.target)

    compared = compare_on_images(pair(collected), pair(validation) if validation else None)
    return {
        "file": against.path.name, **_size_of(against), "images": compared.images,
        "validation_images": compared.validation_images, "draws": compared.draws,
        "agreement": compared.agreement._asdict(), "changes": _as_dicts(compared.changes),
    }  # fmt: skip


def _temperature_gain(exported: Exported, collected: Collected) -> dict[str, Any]:
    temperature, logits = exported.facts.temperature, collected.logits[_AFTER]
    if not 1e-3 <= temperature <= 1e4:  # a fit is between 0.05 and 100
        raise corrupt(exported.path, f"its temperature is {temperature}")
    before = logits.to(torch.float64) * temperature
    changes = dict(compare_on_images(Logits(before, logits, collected.target)).changes)
    changes["top1"] = changes["top1"]._replace(low=0.0, high=0.0)  # no prediction changes
    return {
        "temperature": temperature,
        "changes": _as_dicts({metric: changes[metric] for metric in _GAINED}),
    }


def _as_dicts(changes: Mapping[str, Change]) -> dict[str, dict[str, float | None]]:
    return {metric: change._asdict() for metric, change in changes.items()}
