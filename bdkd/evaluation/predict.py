"""Evaluation: one pass over a split, shared by the ranks.

The pass gives accuracy and calibration. With temperatures it also measures the recalibrated
networks, and on request it keeps every prediction and some features for figures.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
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
from bdkd.evaluation import predictions
from bdkd.evaluation.calibration import Calibration, CalibrationResult
from bdkd.evaluation.predictions import NetworkPredictions, Predictions, featured_images
from bdkd.evaluation.temperature import fit_temperature
from bdkd.metrics import SCALED

HALF_MAX = torch.finfo(torch.float16).max
_ANSWERS = ("confidence", "entropy", "predicted")


class Evaluator(NamedTuple):
    """Networks, images and the way to run them, the same for every split."""

    networks: Mapping[str, nn.Module]
    source: DataSource
    batch_size: int  # over all ranks
    precision: str  # a train.precision
    context: DistributedContext = SINGLE_PROCESS

    def evaluate(self, split: Split) -> dict[str, CalibrationResult]:
        """Return accuracy and calibration of every network.

        Each image counts once. The ranks share the images and add up counts and sums, never
        averages; all ranks get the result. The running statistics are those of rank 0.

        Raises:
            RunError: the split has no images.
        """
        return self.run(split).results()

    def fit_temperatures(self) -> dict[str, float | None]:
        """Return the temperature of every network on the validation images, or None if there are
        none. The logits are kept meanwhile in the networks' own dtype: 4 bytes for each image and
        class, or 2 in low precision."""
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
                name: fit_temperature(torch.cat(x), target, self._sum_of_ranks)
                for name, x in parts.items()
            }

    def run(
        self,
        split: Split,
        temperatures: Mapping[str, float | None] | None = None,
        keep_predictions: bool = False,
    ) -> "SplitPass":
        """Run all networks on all images of a split.

        The networks' training mode is restored, and no random state changes.

        Args:
            temperatures: also measure these networks with logits divided by their temperature.
            keep_predictions: keep what :meth:`SplitPass.predictions` returns.

        Raises:
            RunError: the split has no images.
        """
        done = SplitPass(self, split, temperatures or {}, keep_predictions)
        with self._forward(split) as batches:
            for images, target, logits in batches:
                done.update(images, target, logits)
        return done

    @contextmanager
    def _forward(self, split: Split) -> Iterator[Iterator[tuple[Tensor, Tensor, dict]]]:
        """Yield images, targets and logits of this rank's batches, in evaluation mode."""
        if not self.source.info.counts[split]:
            raise RunError(
                f"there are no {split} images to evaluate on (data.validation is 0): take --split "
                "test"
            )
        was_training = {name: network.training for name, network in self.networks.items()}
        for network in self.networks.values():
            network.eval()
        context = self.context
        context.broadcast_tensors(b for n in self.networks.values() for b in n.buffers())
        try:
            with torch.inference_mode():
                yield self._batches(split)
        finally:
            for name, network in self.networks.items():
                network.train(was_training[name])

    def _batches(self, split: Split) -> Iterator[tuple[Tensor, Tensor, dict]]:
        context, count = self.context, self.source.info.counts[split]
        share = math.ceil(self.batch_size / context.world_size)
        done = 0
        for batch in self.source.eval_batches(split, share, context.shard):
            done += 1
            images = batch.views[0]
            with autocast(batch.target.device, self.precision):
                logits = {name: network(images) for name, network in self.networks.items()}
            yield images, batch.target, logits
        # The ranks of a sharded network need each other in every call. A rank with fewer images
        # calls it once more, for an image that does not count.
        most = math.ceil(math.ceil(count / context.world_size) / share)
        for _ in range(most - done if context.is_distributed else 0):
            like = next(next(iter(self.networks.values())).parameters())
            shape = (1, self.source.info.channels, *self.source.info.image_size)
            images = torch.zeros(shape, dtype=like.dtype, device=like.device)
            logits = {name: network(images)[:0] for name, network in self.networks.items()}
            yield images, torch.empty(0, dtype=torch.int64, device=like.device), logits

    def _sum_of_ranks(self, sums: Tensor) -> Tensor:
        self.context.all_reduce_sum(sums)
        return sums


class SplitPass:
    """What one pass over a split has gathered on this rank."""

    def __init__(
        self,
        evaluator: Evaluator,
        split: Split,
        temperatures: Mapping[str, float | None],
        keep_predictions: bool,
    ) -> None:
        self.networks, self.context = evaluator.networks, evaluator.context
        self.info, self.count = evaluator.source.info, evaluator.source.info.counts[split]
        self.precision = evaluator.precision
        self.temperatures = {name: t for name, t in temperatures.items() if t is not None}
        self.names = list(temperatures)
        self.meters: dict[str, Calibration] = {}
        self.scaled: dict[str, Calibration] = {}
        self.keep = keep_predictions
        self.targets: list[Tensor] = []
        self.answers: dict[str, list[tuple[Tensor, ...]]] = {name: [] for name in self.networks}
        self.candidates = _Candidates()
        # By network: (index of the image in the split, its features)
        self.features: dict[str, list[tuple[int, np.ndarray]]] = {}

    def update(self, images: Tensor, target: Tensor, logits: Mapping[str, Tensor]) -> None:
        """Count one batch of this rank."""
        for name, x in logits.items():
            self._count(self.meters, name, x, target)
            if name in self.temperatures:
                self._count(self.scaled, name, x.double() / self.temperatures[name], target)
        if not self.keep:
            return
        for name, x in logits.items():
            entropy = torch.special.entr(x.double().softmax(-1)).sum(-1)
            # Of the logits, because probabilities of large ones are equal. Of a NaN, no class.
            confidence = self.meters[name].confidences[-1]
            predicted = x.argmax(-1).where(confidence > 0, -1)
            self.answers[name].append((confidence, entropy.float(), predicted))
        chosen = np.flatnonzero(self.candidates.choose(target.cpu().numpy()))  # (M,)
        for name, network in self.networks.items():
            if hasattr(network, "forward_features"):
                self._keep_features(name, network, images, chosen)
        self.targets.append(target)

    def _keep_features(
        self, name: str, network: nn.Module, images: Tensor, chosen: np.ndarray
    ) -> None:
        # All ranks must call a sharded network together, and they choose different images.
        rows = torch.from_numpy(chosen).to(images.device)
        if not (self.context.is_distributed and is_sharded(network)):
            if not len(chosen):
                return
            images, rows = images[rows], torch.arange(len(chosen))
        with autocast(images.device, self.precision):
            x = network.forward_features(images)  # type: ignore[operator]
        x = x.float().mean((2, 3)) if x.ndim == 4 else x.float()  # (M, F); maps are pooled
        kept = x[rows].clamp(-HALF_MAX, HALF_MAX).half().cpu().numpy()
        of_rank = chosen + sum(len(target) for target in self.targets)
        of_split = of_rank * self.context.world_size + self.context.rank
        features = self.features.setdefault(name, [])
        features += zip(of_split.tolist(), kept, strict=True)

    def _count(
        self, meters: dict[str, Calibration], name: str, logits: Tensor, target: Tensor
    ) -> None:
        if name not in meters:
            meters[name] = Calibration(self.info.num_classes, target.device)
        meters[name].update(logits, target)

    def results(self) -> dict[str, CalibrationResult]:
        """Return accuracy and calibration by network, on all ranks."""
        return self._compute(self.meters, list(self.networks))

    def recalibrated(self) -> dict[str, dict[str, float | None]]:
        """Return by network ``temperature``, ``ece_scaled``, ``nll_scaled`` and ``brier_scaled``:
        None if there is no temperature."""
        results = self._compute(self.scaled, list(self.temperatures))
        return {
            name: {"temperature": self.temperatures.get(name)}
            | {
                f"{metric}_scaled": getattr(results[name], metric) if name in results else None
                for metric in SCALED
            }
            for name in self.names
        }

    def _compute(
        self, meters: dict[str, Calibration], names: list[str]
    ) -> dict[str, CalibrationResult]:
        if self.context.is_distributed:
            for name in names:
                _add_up(meters[name], self.context)
        return self.context.broadcast_from_rank0(
            lambda: {name: meters[name].compute() for name in names}
        )

    def predictions(self) -> Predictions | None:
        """Return every network's predictions on rank 0, and None on the others.

        Features are kept for the images of :func:`featured_images`, and only of networks with
        ``forward_features``.
        """
        own: dict[str, Any] = {"target": _to_numpy(self.targets), "networks": {}}
        for name, answers in self.answers.items():
            columns = map(_to_numpy, zip(*answers, strict=True))
            own["networks"][name] = dict(zip(_ANSWERS, columns, strict=True))
            own["networks"][name]["features"] = self.features.get(name, [])
        parts = self.context.gather_objects(own)
        if parts is None:
            return None
        target = _interleave([part["target"] for part in parts])
        featured = featured_images(target)
        networks = {}
        for name in self.networks:
            mine = [part["networks"][name] for part in parts]
            features = dict(pair for part in mine for pair in part["features"])
            networks[name] = NetworkPredictions(
                **{key: _interleave([part[key] for part in mine]) for key in _ANSWERS},
                features=np.stack([features[i] for i in featured.tolist()]) if features else None,
            )
        return Predictions(self.info.classes, target, featured, networks)


class _Candidates:
    """Chooses, batch by batch, every image that may be one of :func:`featured_images`.

    A class among the lowest of all labels is always among the lowest labels seen so far, and the
    first images of a class in the split are among the first ones of each rank.
    """

    def __init__(self) -> None:
        self.counts: dict[int, int] = {}  # images so far, by label

    def choose(self, target: np.ndarray) -> np.ndarray:  # (B,) -> (B,) bool
        for label in np.unique(target).tolist():
            self.counts.setdefault(label, 0)
        lowest = set(sorted(self.counts)[: predictions.FEATURE_CLASSES])
        chosen = np.zeros(len(target), dtype=bool)
        for i, label in enumerate(target.tolist()):
            chosen[i] = label in lowest and self.counts[label] < predictions.FEATURES_PER_CLASS
            self.counts[label] += 1
        return chosen


def _to_numpy(parts: Iterable[Tensor]) -> np.ndarray:
    return torch.cat(list(parts)).cpu().numpy()


def _interleave(parts: list[np.ndarray]) -> np.ndarray:
    """Return the ranks' shares in the order of the split, of which each rank has every N-th."""
    whole = np.empty(sum(map(len, parts)), dtype=parts[0].dtype)
    for rank, part in enumerate(parts):
        whole[rank :: len(parts)] = part
    return whole


def _add_up(meter: Calibration, context: DistributedContext) -> None:
    """Let the meter of rank 0 count the images of all ranks, in the order of the split."""
    context.all_reduce_sum(meter.counts, meter.sums, meter.class_gaps)
    confidence, correct = meter.samples()
    shares = context.gather_objects((confidence.cpu().numpy(), correct.cpu().numpy()))
    if shares is not None:
        confidences, corrects = zip(*shares, strict=True)
        meter.confidences = [torch.from_numpy(_interleave(list(confidences)))]
        meter.corrects = [torch.from_numpy(_interleave(list(corrects)))]
