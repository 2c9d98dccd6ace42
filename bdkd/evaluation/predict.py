"""Evaluate networks in one pass over a split, which the ranks share.

A pass measures accuracy and calibration. Optionally, it also measures the networks at given
temperatures, and keeps predictions and features for figures.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

from bdkd.extras import missing_packages

if message := missing_packages(("numpy",)):
    raise ImportError(message)

import numpy as np
import torch
from torch import Tensor, nn

from bdkd.data import DataSource, Split
from bdkd.device import autocast
from bdkd.distributed.context import SINGLE_PROCESS, DistributedContext, is_sharded
from bdkd.errors import RunError
from bdkd.evaluation.calibration import Calibration, CalibrationResult
from bdkd.evaluation.predictions import NetworkPredictions, Predictions, featured_images
from bdkd.evaluation.temperature import fit_temperature
from bdkd.metrics import SCALED, registered_metrics

HALF_MAX = torch.finfo(torch.float16).max
_COLUMNS = ("confidence", "entropy", "predicted")


class Collected(NamedTuple):
    """The logits of networks on all images of a split, on the CPU and in the order of the split."""

    logits: Mapping[str, Tensor]  # by network, (N, C)
    target: Tensor  # (N,)


class Evaluator(NamedTuple):
    """Evaluate networks on the splits of a data source."""

    networks: Mapping[str, nn.Module]
    source: DataSource
    batch_size: int  # over all ranks
    precision: str  # a value of train.precision
    context: DistributedContext = SINGLE_PROCESS

    def evaluate(self, split: Split) -> dict[str, CalibrationResult]:
        """Return accuracy and calibration of every network, on all ranks.

        Each image counts once: the ranks share the images and add up counts and sums. Batch
        normalization uses the running statistics of rank 0.

        Raises:
            RunError: the split has no images.
        """
        return self.run(split).results()

    def fit_temperatures(self) -> dict[str, float | None]:
        """Return the temperature of every network on the validation images, or None if there are
        none. All logits are kept in memory: 4 bytes for each image and class, or 2 in low
        precision."""
        if self.source.info.counts["val"] == 0:
            return dict.fromkeys(self.networks)
        parts: dict[str, list[Tensor]] = {name: [] for name in self.networks}
        targets: list[Tensor] = []
        with self._forward("val") as batches:
            for _, target, logits in batches:
                targets.append(target)
                for name, x in logits.items():
                    parts[name].append(x)
            target = torch.cat(targets)
            return {
                name: fit_temperature(torch.cat(x), target, self._sum_over_ranks)
                for name, x in parts.items()
            }

    def run(
        self,
        split: Split,
        temperatures: Mapping[str, float | None] | None = None,
        keep_predictions: bool = False,
    ) -> "SplitPass":
        """Run all networks on all images of a split.

        The training mode of the networks is restored, and random states do not change.

        Args:
            split: the images.
            temperatures: by network; also measure these networks with the logits divided by their
                temperature.
            keep_predictions: keep the data for :meth:`SplitPass.predictions`.

        Raises:
            RunError: the split has no images.
        """
        result = SplitPass(self, split, temperatures or {}, keep_predictions)
        with self._forward(split) as batches:
            for images, target, logits in batches:
                result.update(images, target, logits)
        return result

    def collect(self, split: Split) -> Collected | None:
        """Return the logits of every network on rank 0, and None on the other ranks. All logits are
        kept in memory: 4 bytes for each image and class.

        Raises:
            RunError: the split has no images.
        """
        parts: dict[str, list[Tensor]] = {name: [] for name in self.networks}
        targets: list[Tensor] = []
        with self._forward(split) as batches:
            for _, target, logits in batches:
                targets.append(target.cpu())
                for name, x in logits.items():
                    parts[name].append(x.float().cpu())
        shares = self.context.gather_objects(
            ({name: _to_numpy(x) for name, x in parts.items()}, _to_numpy(targets))
        )
        if shares is None:
            return None
        logits = {
            name: torch.from_numpy(_interleave([own[name] for own, _ in shares]))
            for name in self.networks
        }
        return Collected(logits, torch.from_numpy(_interleave([target for _, target in shares])))

    def measure(
        self, split: Split, collected: Collected, temperatures: Mapping[str, float | None]
    ) -> "SplitPass":
        """Return the same as :meth:`run`, computed from collected logits on one rank."""
        result = SplitPass(self._replace(context=SINGLE_PROCESS), split, temperatures, False)
        size = max(1, 2**22 // self.source.info.num_classes)
        target = collected.target
        for start in range(0, len(target), size):
            rows = slice(start, start + size)
            logits = {name: x[rows] for name, x in collected.logits.items()}
            result.update(torch.empty(0), target[rows], logits)
        return result

    @contextmanager
    def _forward(self, split: Split) -> Iterator[Iterator[tuple[Tensor, Tensor, dict]]]:
        """Yield the images, targets and logits of this rank's batches, in evaluation mode."""
        if not self.source.info.counts[split]:
            raise RunError(
                f"there are no {split} images to evaluate on (data.validation is 0): pass --split "
                "test"
            )
        was_training = {name: network.training for name, network in self.networks.items()}
        for network in self.networks.values():
            network.eval()
        self.context.broadcast_tensors(b for n in self.networks.values() for b in n.buffers())
        try:
            with torch.inference_mode():
                yield self._batches(split)
        finally:
            for name, network in self.networks.items():
                network.train(was_training[name])

    def _batches(self, split: Split) -> Iterator[tuple[Tensor, Tensor, dict]]:
        context, info = self.context, self.source.info
        size = math.ceil(self.batch_size / context.world_size)
        done = 0
        # Gives the dtype and device of the extra image below. Exported files have no parameters.
        like = next((p for n in self.networks.values() for p in n.parameters()), torch.empty(0))
        for batch in self.source.eval_batches(split, size, context.shard):
            done += 1
            images = batch.views[0]
            with autocast(batch.target.device, self.precision):
                logits = {name: network(images) for name, network in self.networks.items()}
            yield images, batch.target, logits
        # All ranks must call a sharded network equally often. A rank with fewer batches calls it
        # once more, with an image that does not count.
        most = math.ceil(math.ceil(info.counts[split] / context.world_size) / size)
        for _ in range(most - done if context.is_distributed else 0):
            shape = (1, info.channels, *info.image_size)
            images = torch.zeros(shape, dtype=like.dtype, device=like.device)
            logits = {name: network(images)[:0] for name, network in self.networks.items()}
            yield images, torch.empty(0, dtype=torch.int64, device=like.device), logits

    def _sum_over_ranks(self, sums: Tensor) -> Tensor:
        self.context.all_reduce_sum(sums)
        return sums


class SplitPass:
    """The results of one pass over a split. Each rank has the results of its own images."""

    def __init__(
        self,
        evaluator: Evaluator,
        split: Split,
        temperatures: Mapping[str, float | None],
        keep_predictions: bool,
    ) -> None:
        self.networks, self.context = evaluator.networks, evaluator.context
        self.info, self.precision = evaluator.source.info, evaluator.precision
        self.temperatures = temperatures
        self.meters: dict[str, Calibration] = {}
        self.scaled_meters: dict[str, Calibration] = {}
        self.registered = registered_metrics()
        self.values: dict[str, dict[str, list[Tensor]]] = {name: {} for name in self.networks}
        self.keep_predictions = keep_predictions
        self.targets: list[Tensor] = []
        self.columns: dict[str, list[tuple[Tensor, ...]]] = {name: [] for name in self.networks}
        self.candidates = np.empty(0, np.int64)  # labels of the images whose features are kept
        # By network: (index of the image in the split, its features)
        self.features: dict[str, list[tuple[int, np.ndarray]]] = {}

    def update(self, images: Tensor, target: Tensor, logits: Mapping[str, Tensor]) -> None:
        """Add one batch of this rank."""
        for name, x in logits.items():
            self._measure(self.meters, name, x, target)
            if len(target):
                self._measure_registered(name, x, target)
            if (temperature := self.temperatures.get(name)) is not None:
                self._measure(self.scaled_meters, name, x.double() / temperature, target)
        if not self.keep_predictions:
            return
        for name, x in logits.items():
            entropy = torch.special.entr(x.double().softmax(-1)).sum(-1)
            # The argmax of logits, because large probabilities are equal in floating point. The
            # class of NaN is -1.
            confidence = self.meters[name].confidences[-1]
            predicted = x.argmax(-1).where(confidence > 0, -1)
            self.columns[name].append((confidence, entropy.float(), predicted))
        chosen = self._choose(target.cpu().numpy())
        for name, network in self.networks.items():
            if hasattr(network, "forward_features"):
                self._keep_features(name, network, images, chosen)
        self.targets.append(target)

    def _measure(
        self, meters: dict[str, Calibration], name: str, logits: Tensor, target: Tensor
    ) -> None:
        if name not in meters:
            meters[name] = Calibration(self.info.num_classes, target.device)
        meters[name].update(logits, target)

    def _measure_registered(self, name: str, logits: Tensor, target: Tensor) -> None:
        for metric in self.registered:
            assert metric.of_samples is not None
            values = metric.of_samples(logits.double(), target)
            shape = values.shape if isinstance(values, Tensor) else None
            if metric.reduce is not None:
                shape = shape and shape[:1]
            if shape != target.shape:
                found = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
                raise RunError(
                    f"the metric {metric.key!r} must return a tensor with a value for each of the "
                    f"{len(target)} samples, got {found}; other shapes (B, ...) need reduce"
                )
            self.values[name].setdefault(metric.key, []).append(values.double())

    def _choose(self, target: np.ndarray) -> np.ndarray:
        """Return the indices of the images of a batch that can be in :func:`featured_images`.

        If a class of this rank is among the first classes of the whole split, it is also among the
        first classes of this rank so far. The same holds for the first images of a class.
        """
        start = len(self.candidates)
        chosen = featured_images(np.concatenate((self.candidates, target))) - start
        chosen = chosen[chosen >= 0]
        self.candidates = np.concatenate((self.candidates, target[chosen]))
        return chosen

    def _keep_features(
        self, name: str, network: nn.Module, images: Tensor, chosen: np.ndarray
    ) -> None:
        # All ranks must call a sharded network together, but they choose different images.
        rows = torch.from_numpy(chosen).to(images.device)
        if not (self.context.is_distributed and is_sharded(network)):
            if not len(chosen):
                return
            images, rows = images[rows], torch.arange(len(chosen))
        with autocast(images.device, self.precision):
            x = network.forward_features(images)  # type: ignore[operator]
        x = x.float().mean((2, 3)) if x.ndim == 4 else x.float()  # (M, F); maps are pooled
        kept = x[rows].clamp(-HALF_MAX, HALF_MAX).half().cpu().numpy()
        index_in_rank = chosen + sum(len(target) for target in self.targets)
        index_in_split = index_in_rank * self.context.world_size + self.context.rank
        features = self.features.setdefault(name, [])
        features += zip(index_in_split.tolist(), kept, strict=True)

    def results(self) -> dict[str, CalibrationResult]:
        """Return accuracy, calibration and the metrics of plugins by network, on all ranks."""
        results = self._compute(self.meters)
        if not self.registered:
            return results
        own = {n: {k: _to_numpy(v) for k, v in of.items()} for n, of in self.values.items()}
        shares = self.context.gather_objects(own)
        return self.context.broadcast_from_rank0(
            lambda: {
                name: replace(result, registered=self._reduce(name, shares or []))
                for name, result in results.items()
            }
        )

    def _reduce(self, name: str, shares: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Return the metrics of plugins from the values of all ranks."""
        reduced = {}
        for metric in self.registered:
            parts = [share[name].get(metric.key) for share in shares]
            parts = [parts[0][:0] if part is None else part for part in parts]
            values = torch.from_numpy(_interleave(parts))
            try:
                reduced[metric.key] = float((metric.reduce or _mean)(values))
            except Exception as error:
                failed = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                raise RunError(f"cannot reduce the metric {metric.key!r}: {failed}") from error
        return reduced

    def recalibrated(self) -> dict[str, dict[str, float | None]]:
        """Return by network ``temperature``, ``ece_scaled``, ``nll_scaled`` and ``brier_scaled``.
        The values are None if there is no temperature."""
        results = self._compute(self.scaled_meters)
        return {
            name: {"temperature": temperature}
            | {f"{metric}_scaled": getattr(results.get(name), metric, None) for metric in SCALED}
            for name, temperature in self.temperatures.items()
        }

    def _compute(self, meters: dict[str, Calibration]) -> dict[str, CalibrationResult]:
        if self.context.is_distributed:
            for meter in meters.values():
                _merge_ranks(meter, self.context)
        return self.context.broadcast_from_rank0(
            lambda: {name: meter.compute() for name, meter in meters.items()}
        )

    def predictions(self) -> Predictions | None:
        """Return the predictions of every network on rank 0, and None on the other ranks.

        Networks with ``forward_features`` also have the features of the images that
        :func:`featured_images` chooses.
        """
        own: dict[str, Any] = {"target": _to_numpy(self.targets), "networks": {}}
        for name, columns in self.columns.items():
            arrays = map(_to_numpy, zip(*columns, strict=True))
            own["networks"][name] = dict(zip(_COLUMNS, arrays, strict=True))
            own["networks"][name]["features"] = self.features.get(name, [])
        parts = self.context.gather_objects(own)
        if parts is None:
            return None
        target = _interleave([part["target"] for part in parts])
        featured = featured_images(target)
        networks = {}
        for name in self.networks:
            by_rank = [part["networks"][name] for part in parts]
            features = dict(pair for part in by_rank for pair in part["features"])
            networks[name] = NetworkPredictions(
                **{key: _interleave([part[key] for part in by_rank]) for key in _COLUMNS},
                features=np.stack([features[i] for i in featured.tolist()]) if features else None,
            )
        return Predictions(self.info.classes, target, featured, networks)


def _to_numpy(parts: Iterable[Tensor]) -> np.ndarray:
    return torch.cat(list(parts)).cpu().numpy()


def _mean(values: Tensor) -> Tensor:
    return values.double().mean()


def _interleave(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Return the values of all ranks in the order of the split. Of N ranks, rank r has the values
    r, r + N, r + 2N and so on."""
    joined = np.empty((sum(map(len, parts)), *parts[0].shape[1:]), dtype=parts[0].dtype)
    for rank, part in enumerate(parts):
        joined[rank :: len(parts)] = part
    return joined


def _merge_ranks(meter: Calibration, context: DistributedContext) -> None:
    """Add the samples of all ranks to the meter of rank 0, in the order of the split."""
    context.all_reduce_sum(meter.counts, meter.sums, meter.class_gaps)
    shares = context.gather_objects([tensor.cpu().numpy() for tensor in meter.samples()])
    if shares is not None:
        confidences, corrects = zip(*shares, strict=True)
        meter.confidences = [torch.from_numpy(_interleave(confidences))]
        meter.corrects = [torch.from_numpy(_interleave(corrects))]
