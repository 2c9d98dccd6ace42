"""Batch norm statistics of trained networks, recomputed on training images."""

import dataclasses
from collections.abc import Iterator
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
from bdkd.runs.checkpoint import load_checkpoint, save_checkpoint
from bdkd.runs.summary import evaluator_of
from bdkd.runs.weights import load_networks


class Updated(NamedTuple):
    """What :func:`update_bn` did."""

    images: int  # training images that the statistics were computed on
    split: Split  # that was evaluated
    results: list[tuple[str, CalibrationResult, CalibrationResult]]  # name, before, after


def update_bn(
    checkpoint: Path, output: Path, images: int | None, device: str, data_root: str | None
) -> Updated:
    """Write a copy of a checkpoint whose networks have new batch norm statistics.

    The statistics are the means over whole training batches, augmented as in training, with the
    weights fixed (``torch.optim.swa_utils.update_bn``). Frozen networks keep theirs.

    Args:
        images: how many training images to use, at least one batch; None: one epoch.

    Raises:
        RunError: no network has batch norm, a file cannot be read or written, or the data set is
            not the one of the run.
    """
    text, saved = load_checkpoint(checkpoint)
    recipe = parse_recipe(text, source=str(checkpoint))
    data = recipe.data if data_root is None else dataclasses.replace(recipe.data, root=data_root)
    recipe = dataclasses.replace(recipe, device=device, data=data)
    components = build_components(recipe, training=False)
    source, train = components.source, recipe.train
    loaded = load_networks(components, checkpoint, {**saved, "ema_copied_until": None})
    networks = {
        name: network
        for name, network in loaded.items()
        if name not in components.networks.frozen and _has_statistics(network)
    }
    if not networks:
        raise RunError(f"{checkpoint}: no network of it has batch norm statistics to recompute")
    split: Split = "val" if source.info.counts["val"] else "test"
    evaluator = evaluator_of(components, networks)
    before = evaluator.evaluate(split)
    batches = max(1, (images or source.info.counts["train"]) // train.batch_size)
    used = 0
    for network in networks.values():
        network.train()
        used = _update(network, source, train.batch_size, train.precision, batches)
    after = evaluator.evaluate(split)
    # Moments and random states stay those of the run.
    written = saved | {
        "ema_copied_until": None,
        "networks": components.networks.state_dict(),
        "ema": {name: loaded[name].state_dict() for name in saved["ema"]},
    }
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(
            f"cannot write {output}: {error.strerror or error}; choose another --output"
        ) from error
    save_checkpoint(output, text, written)
    return Updated(used, split, [(name, before[name], after[name]) for name in networks])


def _update(
    network: nn.Module, source: DataSource, batch_size: int, precision: str, batches: int
) -> int:
    """Recompute a network's statistics on so many batches; returns the number of images."""
    used = 0

    def images() -> Iterator[Tensor]:
        nonlocal used
        for number, batch in enumerate(source.train_batches(0, 0, batch_size, 1)):
            if number == batches:
                return
            used += batch_size
            yield batch.views[0]

    device = next(network.parameters()).device
    with autocast(device, precision):
        torch.optim.swa_utils.update_bn(images(), network)
    return used


def _has_statistics(network: nn.Module) -> bool:
    return any(getattr(m, "running_mean", None) is not None for m in network.modules())
