"""Evaluate networks on the test images at the end of a run, and write the results."""

from collections.abc import Mapping
from dataclasses import asdict
from math import isfinite
from statistics import median
from typing import Any

import torch
from torch import nn

from bdkd.config import Recipe
from bdkd.engine.components import Components
from bdkd.engine.state import EMA_SUFFIX, TrainingState
from bdkd.errors import RunError
from bdkd.evaluation.calibration import CalibrationResult
from bdkd.evaluation.figures import reliability_diagram, training_curves
from bdkd.evaluation.metric_lines import as_number
from bdkd.evaluation.predict import Evaluator
from bdkd.metrics import values_of
from bdkd.runs.checkpoint import explain_oserror, load_checkpoint
from bdkd.runs.folder import RunFolder


def evaluator_of(components: Components, networks: Mapping[str, nn.Module]) -> Evaluator:
    """Return an evaluator that uses the data set and the precision of a run."""
    train = components.recipe.train
    return Evaluator(
        networks, components.source, train.batch_size, train.precision, components.context
    )


def summarise(components: Components, state: TrainingState, folder: RunFolder) -> dict[str, Any]:
    """Evaluate the selected weights on the test images.

    Write ``summary.json``, predictions and figures. All ranks must call this function.

    Returns:
        The content of ``summary.json`` on rank 0, an empty dictionary on other ranks.

    Raises:
        RunError: the best checkpoint is missing, or a file cannot be written.
    """
    recipe, context, seconds = components.recipe, components.context, state.progress.seconds
    context.location = "the evaluation on the test images"
    if recipe.train.select == "best" and state.best is not None:
        # The best weights can replace the last weights in memory, because those are saved.
        path = folder.best_path(state.best.step)

        def load() -> dict[str, Any]:
            if path.exists():
                return load_checkpoint(path)[1]
            raise RunError(f"the best checkpoint {path} is gone: resume with --train.select last")

        state.load_state_dict(context.broadcast_from_rank0(load))
    elif recipe.train.select == "best" and context.is_rank0:
        print(
            "warning: train.select is best, but it was last during training, so no best "
            "checkpoint exists: the last weights are evaluated", flush=True,
        )  # fmt: skip
    networks = state.evaluated_networks()
    evaluator = evaluator_of(components, networks)
    done = evaluator.run("test", evaluator.fit_temperatures(), keep_predictions=True)
    results, recalibrated, predictions = done.results(), done.recalibrated(), done.predictions()
    if predictions is None:
        return {}
    info = components.source.info
    summary = {
        "recipe": recipe.name, "method": recipe.objective.name, "seed": recipe.seed,
        "device": str(components.device), "torch": torch.__version__,
        "wall_seconds": seconds, "images_per_second": throughput(folder),
        "selected_step": state.progress.step, "split": "test", "images": info.counts["test"],
        "data": info.identity(),
        "objective": {k: v for k, v in asdict(recipe.objective).items() if v is not None},
        "networks": {
            name: {**describe(recipe, name, network, results[name]), **recalibrated[name]}
            for name, network in networks.items()
        },
    }  # fmt: skip
    folder.write_predictions(predictions)
    folder.write_summary(summary)
    remedy = f"fix the cause and draw them with --resume (the results are in {folder.summary})"
    with explain_oserror(f"cannot write the figures in {folder.figures}", remedy):
        title = f"{recipe.name}, {recipe.objective.name}: test images"
        reliability_diagram(results, folder.figures / "reliability.png", title)
        try:
            training_curves(folder.metrics, folder.figures / "curves.png")
        except ValueError as error:  # the results are complete without the figure
            print(f"warning: {error}: curves.png was not written", flush=True)
    return summary


def describe(
    recipe: Recipe, name: str, network: nn.Module, result: CalibrationResult
) -> dict[str, Any]:
    """Return the model, size and metrics of one network."""
    config = recipe.networks[name.removesuffix(EMA_SUFFIX)]
    return {
        "model": config.model, "role": config.role,
        "parameters": sum(p.numel() for p in network.parameters()),
        **values_of(result),
    }  # fmt: skip


def throughput(folder: RunFolder) -> float | None:
    """Return the median images per second over the log intervals of training."""
    lines = [line for line in folder.read_metrics() if line.get("split") == "train"]
    rates = [as_number(line.get("images_per_second")) for line in lines]
    rates = [rate for rate in rates if isfinite(rate)]
    return median(rates) if rates else None
