"""Accuracy and calibration of several networks on one split, in one pass over it."""

from collections.abc import Mapping

import torch
from torch import nn

from bdkd.data import DataSource, Split
from bdkd.errors import RunError
from bdkd.evaluation.calibration import Calibration, CalibrationResult
from bdkd.training.step import AUTOCAST


def evaluate(
    networks: Mapping[str, nn.Module],
    source: DataSource,
    split: Split,
    batch_size: int,
    precision: str,
) -> dict[str, CalibrationResult]:
    """The result of every network, in evaluation mode; each image counts once.

    The networks' training mode is put back; no random state is touched.

    Raises:
        RunError: the split has no images.
    """
    if not source.info.counts[split]:
        raise RunError(
            f"there are no {split} images to evaluate on (data.validation is 0): take --split test"
        )
    was_training = {name: network.training for name, network in networks.items()}
    dtype = AUTOCAST[precision]
    meters: dict[str, Calibration] = {}
    for network in networks.values():
        network.eval()
    with torch.inference_mode():
        for batch in source.eval_batches(split, batch_size):
            device = batch.target.device
            with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
                logits = {name: network(batch.views[0]) for name, network in networks.items()}
            for name, x in logits.items():
                if name not in meters:
                    meters[name] = Calibration(source.info.num_classes, device)
                meters[name].update(x, batch.target)
    for name, network in networks.items():
        network.train(was_training[name])
    return {name: meter.compute() for name, meter in meters.items()}
