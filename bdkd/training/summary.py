"""The end of a run: the test images, looked at once, and what is kept of them."""

from collections.abc import Mapping
from dataclasses import asdict
from statistics import median
from typing import Any

import torch
from torch import nn

from bdkd.errors import RunError
from bdkd.evaluation.calibration import CalibrationResult
from bdkd.evaluation.figures import reliability_diagram, training_curves
from bdkd.training.checkpoint import load_checkpoint
from bdkd.training.evaluate import evaluate
from bdkd.training.predictions import predict
from bdkd.training.recalibration import recalibrate
from bdkd.training.run_folder import RunFolder
from bdkd.training.setup import Setup
from bdkd.training.state import EMA_SUFFIX, TrainingState

METRICS = (
    "top1", "top5", "nll", "brier", "ece", "mce", "adaptive_ece", "classwise_ece", "entropy",
    "ece_if_calibrated",
)  # fmt: skip


def summarise(setup: Setup, state: TrainingState, folder: RunFolder) -> dict[str, Any]:
    """Evaluate the selected weights on the test images; write figures and ``summary.json``."""
    recipe = setup.recipe
    seconds = state.position.seconds
    if recipe.train.select == "best" and state.best is not None:
        # Into the same networks: the run is over and its last weights are saved.
        path = folder.best_path(state.best.step)
        if not path.exists():
            raise RunError(f"the best checkpoint {path} is gone: --resume with --train.select last")
        state.load_state_dict(load_checkpoint(path)[1])
    networks = state.evaluated_networks()
    results = evaluate(
        networks, setup.source, "test", recipe.train.batch_size, recipe.train.precision
    )
    recalibrated = recalibrate(
        networks, setup.source, recipe.train.batch_size, recipe.train.precision
    )
    summary = {
        "recipe": recipe.name,
        "method": recipe.objective.name,
        "seed": recipe.seed,
        "device": str(setup.device),
        "torch": torch.__version__,
        "wall_seconds": seconds,
        "images_per_second": throughput(folder),
        "selected_step": state.position.step,
        "split": "test",
        "images": setup.source.info.counts["test"],
        "data": setup.source.info.identity(),
        "objective": {k: v for k, v in asdict(recipe.objective).items() if v is not None},
        "networks": {
            name: {**describe(setup, name, network, results[name]), **recalibrated[name]}
            for name, network in networks.items()
        },
    }
    folder.write_predictions(
        predict(networks, setup.source, "test", recipe.train.batch_size, recipe.train.precision)
    )
    folder.write_summary(summary)
    try:
        title = f"{recipe.name}, {recipe.objective.name}: test images"
        reliability_diagram(results, folder.figures / "reliability.png", title)
        training_curves(folder.metrics, folder.figures / "curves.png")
    except OSError as error:
        raise RunError(
            f"cannot write the figures in {folder.figures}: {error.strerror or error}; mend that "
            f"and draw them with --resume (the results are in {folder.summary})"
        ) from error
    return summary


def describe(
    setup: Setup, name: str, network: nn.Module, result: CalibrationResult
) -> Mapping[str, Any]:
    """Model, size and metrics of one network, fractions in [0, 1]."""
    config = setup.recipe.networks[name.removesuffix(EMA_SUFFIX)]
    return {
        "model": config.model,
        "role": config.role,
        "parameters": sum(p.numel() for p in network.parameters()),
        **{metric: getattr(result, metric) for metric in METRICS},
    }


def throughput(folder: RunFolder) -> float | None:
    """Median images a second over the log intervals of training."""
    lines = [line for line in folder.read_metrics() if line.get("split") == "train"]
    rates = [r for line in lines if isinstance(r := line.get("images_per_second"), int | float)]
    return median(rates) if rates else None
