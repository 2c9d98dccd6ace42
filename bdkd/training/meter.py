"""Running means of a log interval, kept on the device and read once, when they are logged."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bdkd.training.distributed import ALONE, Ranks

BINS = 15
_SUMS = ("loss", "top1", "top5", "nll", "entropy")


class TrainingMeter:
    """Per network: loss, top-1, top-5, NLL, entropy and ECE of the training batches since the last
    read, at temperature 1; and the mean of the objective's per-sample statistics.

    The weights move within an interval, so these are means over an interval and no evaluation. All
    networks go through as one tensor: a handful of launches a step, however many there are.
    """

    def __init__(self, networks: Sequence[str], device: torch.device) -> None:
        self.networks, self.device = list(networks), device
        count = len(self.networks)
        self.samples = torch.zeros((), dtype=torch.float64, device=device)
        self.trained = torch.zeros(count, dtype=torch.float64, device=device)  # samples with a loss
        self.sums = torch.zeros(count, len(_SUMS), dtype=torch.float64, device=device)
        # correct ones less confidence, summed by network and bin: all that the ECE needs
        self.gaps = torch.zeros(count * BINS, dtype=torch.float64, device=device)
        self.statistics: dict[str, Tensor] = {}  # 0-dim sums
        # Bin edges k / 15, pinned once in float64; a bin is (lo, hi].
        self.edges = (torch.arange(1, BINS, dtype=torch.float64) / BINS).to(device)
        self.first_bins = torch.arange(count, device=device)[:, None] * BINS  # (K, 1)

    @torch.no_grad()
    def update(
        self,
        logits: Mapping[str, Tensor],  # (B, C) each
        target: Tensor,  # (B,), or (B, C) soft labels, which count as their likeliest class
        losses: Mapping[str, Tensor],  # 0-dim, each a share of the step's mean; of those that train
        statistics: Mapping[str, Tensor],  # (B,) each
        step_samples: float,
    ) -> None:
        """Add one part of a step's batch. No host sync."""
        target = target.argmax(-1) if target.ndim == 2 else target
        x = torch.stack([logits[name].detach().float() for name in self.networks])  # (K, B, C)
        log_p = torch.log_softmax(x, -1)
        p = log_p.exp()
        first = log_p.topk(min(5, x.shape[-1]), dim=-1).indices == target[:, None]  # (K, B, 5)
        correct = first[..., 0].double()  # (K, B)
        confidence = p.amax(-1).double()
        label = target.expand(len(x), -1)[..., None]
        self.samples += len(target)
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
        for name, value in statistics.items():
            self._statistic(name).add_(value.detach().double().sum())

    def read(self, ranks: Ranks = ALONE) -> dict[str, object]:
        """The interval's means over all ranks, as they go into metrics.jsonl, and start anew.
        Syncs."""
        ranks.sum(self.samples, self.trained, self.sums, self.gaps, *self.statistics.values())
        samples = max(self.samples.item(), 1.0)
        eces = self.gaps.view(-1, BINS).abs().sum(-1) / samples
        means = self.sums / samples
        means[:, 0] = self.sums[:, 0] / self.trained  # NaN: frozen, or paused all the while
        values: dict[str, object] = {
            name: dict(zip(_SUMS, of_network, strict=True)) | {"ece": ece}
            for name, of_network, ece in zip(
                self.networks, means.tolist(), eces.tolist(), strict=True
            )
        }
        values |= {name: total.item() / samples for name, total in self.statistics.items()}
        self.reset()
        return values

    def reset(self) -> None:
        for tensor in (
            self.samples, self.trained, self.sums, self.gaps, *self.statistics.values(),
        ):  # fmt: skip
            tensor.zero_()

    def _statistic(self, name: str) -> Tensor:
        """A sum by its name. Once there, it keeps its place: a captured step adds to it there."""
        if name not in self.statistics:
            self.statistics[name] = torch.zeros((), dtype=torch.float64, device=self.device)
        return self.statistics[name]

    def state_dict(self) -> dict[str, object]:
        return {
            "samples": self.samples, "trained": self.trained, "sums": self.sums,
            "gaps": self.gaps, "statistics": self.statistics,
        }  # fmt: skip

    def load_state_dict(self, *states: Mapping[str, Any]) -> None:
        """Go on from the sums of some saved meters: one's own, or several to be counted as one."""
        self.reset()
        for state in states:
            for name in ("samples", "trained", "sums", "gaps"):
                getattr(self, name).add_(state[name].to(self.device))
            for name, value in state["statistics"].items():
                self._statistic(name).add_(value.to(self.device))
