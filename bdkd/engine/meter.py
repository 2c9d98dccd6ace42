"""Means of the training metrics over a log interval. They stay on the device until they are
logged."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bdkd.distributed.context import SINGLE_PROCESS, DistributedContext
from bdkd.errors import UsageError
from bdkd.evaluation.calibration import BINS, bin_edges
from bdkd.metrics import OF_A_LINE

_SUMS = ("loss", "top1", "top5", "nll", "entropy")


class StepOutput(NamedTuple):
    """The results of a training step on one micro-batch."""

    target: Tensor  # (B,) labels, or (B, C) soft labels
    logits: Mapping[str, Tensor]  # (B, C) by network
    losses: Mapping[str, Tensor]  # 0-dim share of the step's mean, for each network that trains
    statistics: Mapping[str, Tensor]  # (B,) each


class TrainingMeter:
    """Compute means over the training batches since the last read.

    The metrics of each network are the loss, top-1, top-5, NLL, entropy and ECE, at temperature 1.
    The per-sample statistics of the objective are averaged too. The weights change during an
    interval, so the means do not replace an evaluation. The sums of all networks are in one tensor,
    so that the number of launches does not grow with the number of networks.

    Args:
        networks: names of the networks.
    """

    def __init__(self, networks: Sequence[str], device: torch.device) -> None:
        self.networks, self.device = list(networks), device
        count = len(self.networks)
        self.samples = torch.zeros((), dtype=torch.float64, device=device)
        self.trained = torch.zeros(count, dtype=torch.float64, device=device)  # samples with a loss
        self.sums = torch.zeros(count, len(_SUMS), dtype=torch.float64, device=device)
        # Sum of (correct - confidence) by network and bin, from which the ECE is computed
        self.gaps = torch.zeros(count * BINS, dtype=torch.float64, device=device)
        self.statistics: dict[str, Tensor] = {}  # 0-dim sums
        self.edges = bin_edges(BINS, device)
        self.first_bins = torch.arange(count, device=device)[:, None] * BINS  # (K, 1)

    @torch.no_grad()
    def update(self, output: StepOutput, step_samples: float) -> None:
        """Add one micro-batch, without synchronizing with the device.

        Args:
            step_samples: number of images in the step, over all ranks and micro-batches.
        """
        target = output.target  # a soft label counts as its most likely class
        target = target.argmax(-1) if target.ndim == 2 else target
        x = torch.stack([output.logits[name].detach().float() for name in self.networks])
        log_p = torch.log_softmax(x, -1)  # (K, B, C)
        p = log_p.exp()
        first = log_p.topk(min(5, x.shape[-1]), dim=-1).indices == target[:, None]  # (K, B, 5)
        correct = first[..., 0].double()  # (K, B)
        confidence = p.amax(-1).double()
        label = target.expand(len(x), -1)[..., None]
        self.samples += len(target)
        losses = output.losses
        for row, name in enumerate(self.networks):
            self.trained[row] += len(target) * (name in losses)
        no_loss = torch.zeros((), device=self.device)
        self.sums += torch.stack(
            (
                torch.stack([losses.get(name, no_loss).detach().double() for name in self.networks])
                * step_samples,
                correct.sum(-1),
                first.any(-1).double().sum(-1),
                -log_p.gather(-1, label).double().sum((-2, -1)),
                torch.special.entr(p).double().sum((-2, -1)),
            ),
            dim=1,
        )
        bins = torch.bucketize(confidence, self.edges) + self.first_bins  # (K, B)
        self.gaps.index_add_(0, bins.flatten(), (correct - confidence).flatten())
        for name, value in output.statistics.items():
            self._statistic(name).add_(value.detach().double().sum())

    def read(self, context: DistributedContext = SINGLE_PROCESS) -> dict[str, object]:
        """Return the means over all ranks in the format of ``metrics.jsonl``, and reset the sums.

        The loss of a network that did not train is None. This synchronizes with the device.
        """
        context.all_reduce_sum(
            self.samples, self.trained, self.sums, self.gaps, *self.statistics.values()
        )
        samples = max(self.samples.item(), 1.0)
        eces = self.gaps.view(-1, BINS).abs().sum(-1) / samples
        means = self.sums / samples
        means[:, 0] = self.sums[:, 0] / self.trained
        networks: dict[str, dict[str, float | None]] = {
            name: dict(zip(_SUMS, of_network, strict=True)) | {"ece": ece}
            for name, of_network, ece in zip(
                self.networks, means.tolist(), eces.tolist(), strict=True
            )
        }
        for name, trained in zip(self.networks, self.trained.tolist(), strict=True):
            if not trained:
                networks[name]["loss"] = None
        statistics = {name: total.item() / samples for name, total in self.statistics.items()}
        self.reset()
        return {**networks, **statistics}

    def reset(self) -> None:
        """Set all sums to 0, in place, because a captured step adds to these tensors."""
        sums = (self.samples, self.trained, self.sums, self.gaps, *self.statistics.values())
        for tensor in sums:
            tensor.zero_()

    def _statistic(self, name: str) -> Tensor:
        if name not in self.statistics:
            if name in self.networks or name in OF_A_LINE:
                raise UsageError(
                    f"the objective has a statistic {name!r}, which is the name of a network or "
                    "another key of metrics.jsonl: rename it"
                )
            self.statistics[name] = torch.zeros((), dtype=torch.float64, device=self.device)
        return self.statistics[name]

    def state_dict(self) -> dict[str, object]:
        return {
            "samples": self.samples, "trained": self.trained, "sums": self.sums,
            "gaps": self.gaps, "statistics": self.statistics,
        }  # fmt: skip

    def load_state_dict(self, *states: Mapping[str, Any]) -> None:
        """Load the sums of one or more saved meters. The sums of several meters are added."""
        self.reset()
        for state in states:
            for name in ("samples", "trained", "sums", "gaps"):
                getattr(self, name).add_(state[name].to(self.device))
            for name, value in state["statistics"].items():
                self._statistic(name).add_(value.to(self.device))
