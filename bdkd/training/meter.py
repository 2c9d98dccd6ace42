"""Running means of a log interval, kept on the device and read once, when they are logged."""

from collections.abc import Mapping

import torch
from torch import Tensor

BINS = 15
_SUMS = ("count", "loss", "top1", "top5", "nll", "entropy")


class TrainingMeter:
    """Per network: loss, top-1, top-5, NLL, entropy and ECE of the training batches since the last
    read, at temperature 1; and the mean of the objective's per-sample statistics.

    The weights move within an interval, so these are means over an interval and no evaluation.
    """

    def __init__(self, networks: list[str], device: torch.device) -> None:
        self.device = device
        self.sums = {
            name: torch.zeros(len(_SUMS), dtype=torch.float64, device=device) for name in networks
        }
        self.bins = {  # rows: samples, correct ones, confidence
            name: torch.zeros(3, BINS, dtype=torch.float64, device=device) for name in networks
        }
        self.statistics: dict[str, Tensor] = {}  # (2,): sum, count
        # Bin edges k / 15, pinned once in float64; a bin is (lo, hi].
        edges = torch.arange(1, BINS, dtype=torch.float64) / BINS
        self.edges = edges.to(device)

    @torch.no_grad()
    def update(
        self,
        logits: Mapping[str, Tensor],  # (B, C) each
        target: Tensor,  # (B,)
        losses: Mapping[str, Tensor],  # 0-dim, already a share of the step's mean
        statistics: Mapping[str, Tensor],  # (B,) each
        step_samples: float,
    ) -> None:
        """Add one part of a step's batch. No host sync."""
        for name, x in logits.items():
            log_p = torch.log_softmax(x.detach().float(), -1)
            p = log_p.exp()
            confidence, predicted = p.max(-1)
            correct = (predicted == target).double()
            best = log_p.topk(min(5, log_p.shape[-1])).indices
            values = (
                torch.ones_like(correct),
                torch.zeros_like(correct),
                correct,
                (best == target[:, None]).any(-1).double(),
                -log_p.gather(-1, target[:, None]).squeeze(-1).double(),
                torch.special.entr(p).sum(-1).double(),
            )
            sums = torch.stack(values).sum(-1)
            if name in losses:
                sums[1] = losses[name].detach().double() * step_samples
            self.sums[name] += sums
            confidence = confidence.double()
            index = torch.bucketize(confidence, self.edges)
            self.bins[name].index_add_(
                1, index, torch.stack((torch.ones_like(correct), correct, confidence))
            )
        for name, value in statistics.items():
            value = value.detach().double()
            # ones_like and not a number: a number would be copied from the host, and waited for
            total = torch.stack((value.sum(), torch.ones_like(value).sum()))
            self.statistics[name] = self.statistics.get(name, 0) + total

    def read(self) -> dict[str, object]:
        """The interval's means, as they go into metrics.jsonl, and start anew. Syncs."""
        values: dict[str, object] = {}
        for name, sums in self.sums.items():
            count, *rest = sums.tolist()
            _, correct, confidence = self.bins[name]
            ece = (correct - confidence).abs().sum().item() / max(count, 1.0)
            means = dict(zip(_SUMS[1:], (x / max(count, 1.0) for x in rest), strict=True))
            values[name] = means | {"ece": ece}
        for name, pair in self.statistics.items():
            total, count = pair.tolist()
            values[name] = total / count
        self.reset()
        return values

    def reset(self) -> None:
        for tensor in (*self.sums.values(), *self.bins.values()):
            tensor.zero_()
        self.statistics = {}

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        return {"sums": dict(self.sums), "bins": dict(self.bins), "statistics": self.statistics}

    def load_state_dict(self, state: Mapping[str, dict[str, Tensor]]) -> None:
        for name in self.sums:
            self.sums[name].copy_(state["sums"][name])
            self.bins[name].copy_(state["bins"][name])
        self.statistics = {k: v.to(self.device) for k, v in state["statistics"].items()}
