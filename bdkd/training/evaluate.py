"""Accuracy and calibration of several networks on one split, in one pass over it."""

import math
from collections.abc import Mapping

import torch
from torch import nn

from bdkd.data import DataSource, Split
from bdkd.errors import RunError
from bdkd.evaluation.calibration import Calibration, CalibrationResult
from bdkd.training.distributed import ALONE, Ranks
from bdkd.training.step import autocast


def evaluate(
    networks: Mapping[str, nn.Module],
    source: DataSource,
    split: Split,
    batch_size: int,
    precision: str,
    ranks: Ranks = ALONE,
) -> dict[str, CalibrationResult]:
    """The result of every network, in evaluation mode; each image counts once.

    Several ranks share the images and add up counts and sums, never averages; all have the result.
    The running statistics are the first rank's. The networks' training mode is put back; no random
    state is touched.

    Raises:
        RunError: the split has no images.
    """
    if not source.info.counts[split]:
        raise RunError(
            f"there are no {split} images to evaluate on (data.validation is 0): take --split test"
        )
    was_training = {name: network.training for name, network in networks.items()}
    meters: dict[str, Calibration] = {}
    for network in networks.values():
        network.eval()
    ranks.copy_from_first(b for network in networks.values() for b in network.buffers())
    share = math.ceil(batch_size / ranks.world)
    with torch.inference_mode():
        batches = 0
        for batch in source.eval_batches(split, share, ranks.shard):
            batches += 1
            device = batch.target.device
            with autocast(device, precision):
                logits = {name: network(batch.views[0]) for name, network in networks.items()}
            for name, x in logits.items():
                if name not in meters:
                    meters[name] = Calibration(source.info.num_classes, device)
                meters[name].update(x, batch.target)
        if not ranks.alone:
            of_each = math.ceil(math.ceil(source.info.counts[split] / ranks.world) / share)
            _keep_step(networks, source, of_each - batches)
    for name, network in networks.items():
        network.train(was_training[name])
        if not ranks.alone:
            _add_up(meters.setdefault(name, _no_images(network, source)), ranks)
    return ranks.from_first(lambda: {name: meter.compute() for name, meter in meters.items()})


def _keep_step(networks: Mapping[str, nn.Module], source: DataSource, passes: int) -> None:
    """Forward passes for nothing: a sharded network's ranks need one another in each of them, also
    where one has fewer images."""
    shape = (1, source.info.channels, *source.info.image_size)
    for network in networks.values():
        like = next(network.parameters())
        for _ in range(passes):
            network(torch.zeros(shape, dtype=like.dtype, device=like.device))


def _no_images(network: nn.Module, source: DataSource) -> Calibration:
    return Calibration(source.info.num_classes, next(network.parameters()).device)


def _add_up(meter: Calibration, ranks: Ranks) -> None:
    """Let the meter of the first rank count the images of all, in the order of the split."""
    ranks.sum(meter.counts, meter.sums, meter.class_gaps)
    confidence, correct = meter.samples()
    shares = ranks.gather((confidence.cpu(), correct.cpu()))
    if shares is None:
        return
    confidence = torch.empty(sum(len(c) for c, _ in shares), dtype=torch.float64)
    correct = torch.empty(len(confidence), dtype=torch.bool)
    for rank, share in enumerate(shares):
        confidence[rank :: ranks.world], correct[rank :: ranks.world] = share
    meter.confidences, meter.corrects = [confidence], [correct]
