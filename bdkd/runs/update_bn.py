"""Recompute the batch norm statistics of trained networks on training images."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bdkd.config import parse_recipe
from bdkd.data import DataSource, Split
from bdkd.device import autocast
from bdkd.engine.components import build_components
from bdkd.errors import RunError
from bdkd.evaluation.calibration import CalibrationResult
from bdkd.runs.checkpoint import explain_oserror, load_checkpoint, save_checkpoint
from bdkd.runs.summary import evaluator_of
from bdkd.runs.weights import load_networks, relocate


class Updated(NamedTuple):
    """The result of :func:`update_bn`."""

    images: int  # training images for the statistics
    split: Split  # the evaluated split
    results: list[tuple[str, CalibrationResult, CalibrationResult]]  # name, before, after


def update_bn(
    checkpoint: Path, output: Path, images: int | None, device: str, data_root: str | None
) -> Updated:
    """Write a copy of a checkpoint with new batch norm statistics.

    The statistics are means over complete training batches with the augmentation of training
    (``torch.optim.swa_utils.update_bn``). Weights and frozen networks do not change.

    Args:
        checkpoint: the checkpoint to read.
        output: the file to write.
        images: number of training images to use, at least one batch. None: one epoch.
        device: the device to use, as in a recipe.
        data_root: the folder of the data set. None: the folder in the recipe.

    Raises:
        RunError: no network has batch norm, a file cannot be read or written, or the data set is
            not the one of the run.
    """
    text, saved = load_checkpoint(checkpoint)
    recipe = relocate(parse_recipe(text, source=str(checkpoint), of_run=True), device, data_root)
    components = build_components(recipe, training=False)
    source, train = components.source, recipe.train
    loaded = load_networks(components, checkpoint, {**saved, "ema_copied_until": None})
    trained = {name: loaded[name] for name in loaded if name not in components.networks.frozen}
    networks = {
        name: network
        for name, network in trained.items()
        if any(getattr(module, "running_mean", None) is not None for module in network.modules())
    }
    if not networks:
        raise RunError(f"{checkpoint} has no network with batch norm statistics to recompute")
    split: Split = "val" if source.info.counts["val"] else "test"
    evaluator = evaluator_of(components, networks)
    before = evaluator.evaluate(split)
    batches = max(1, (images or source.info.counts["train"]) // train.batch_size)
    used = 0
    for network in networks.values():
        network.train()
        used = _update(network, source, train.batch_size, train.precision, batches)
    after = evaluator.evaluate(split)
    # Optimizer moments and random states do not change.
    averages = {name: loaded[name].state_dict() for name in saved["ema"]}
    trained_state = {"networks": components.networks.state_dict(), "ema": averages}
    written = {**saved, "ema_copied_until": None, **trained_state}
    with explain_oserror(f"cannot write {output}", "choose another --output"):
        output.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(output, text, written, "run the same command again")
    return Updated(used, split, [(name, before[name], after[name]) for name in networks])


def _update(
    network: nn.Module, source: DataSource, batch_size: int, precision: str, batches: int
) -> int:
    """Recompute the statistics of a network on some batches. Return the number of images."""
    used = 0

    def images() -> Iterator[Tensor]:
        nonlocal used
        for batch in islice(source.train_batches(0, 0, batch_size, 1), batches):
            used += batch_size
            yield batch.views[0]

    device = next(network.parameters()).device
    with autocast(device, precision):
        torch.optim.swa_utils.update_bn(images(), network)
    return used
