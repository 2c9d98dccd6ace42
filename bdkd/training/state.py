"""The one owner of everything that a checkpoint holds."""

import contextlib
import copy
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bdkd.config import Recipe
from bdkd.data.base import mix_seed
from bdkd.training import apex_optimizers
from bdkd.training.checkpoint import snapshot
from bdkd.training.distributed import ALONE, Ranks
from bdkd.training.meter import TrainingMeter
from bdkd.training.networks import Networks, build_optimizer, on_all_ranks, unsharded
from bdkd.training.schedule import Span

if TYPE_CHECKING:
    from bdkd.training.sharding import Sharding

EMA_SUFFIX = "_ema"


@dataclass
class Position:
    """How far the run is."""

    step: int = 0  # optimizer steps done, skipped ones included
    epoch: int = 0  # whole epochs done
    seen: int = 0  # images seen in the current epoch
    validation_due: bool = False  # an epoch has ended and was not evaluated yet
    seconds: float = 0.0  # of training and evaluating, over all sessions of the run


@dataclass
class Best:
    """The best student so far, on the validation part."""

    step: int
    top1: float


class TrainingState:
    """Networks, optimizer, loss scale, averages, position, random state and counters of a run.

    Args:
        sharded: networks whose weights are shared out among the ranks.
        controls: the method decides batch by batch which networks train.
        data: the identity of the data set (:meth:`bdkd.data.DataInfo.identity`).

    Attributes:
        model: the networks as a step calls them, under DDP where there are several ranks.
    """

    def __init__(
        self,
        recipe: Recipe,
        networks: Networks,
        train_images: int,
        device: torch.device,
        *,
        ranks: Ranks = ALONE,
        sharded: Sequence[str] = (),
        controls: bool = False,
        data: Mapping[str, Any] | None = None,
    ) -> None:
        self.recipe, self.networks, self.device, self.ranks = recipe, networks, device, ranks
        # DDP waits for a gradient of every network, and one may pause.
        self.model = (
            networks if controls else on_all_ranks(networks, sharded, ranks, recipe.distributed)
        )
        self.sharding: Sharding | None = None
        own_part = unsharded
        if sharded:
            from bdkd.training import sharding  # a second to import

            self.sharding = sharding.Sharding(sharded)
            own_part = self.sharding.own_part
        self.optimizer = build_optimizer(networks, recipe.networks, recipe.optimizer, own_part)
        self.scaler = torch.amp.GradScaler(device.type, enabled=recipe.train.precision == "fp16")
        self.students = [n for n, config in recipe.networks.items() if config.role == "student"]
        self.ema: dict[str, nn.Module] = {}
        if recipe.train.ema_decay is not None:
            self.ema = {
                name + EMA_SUFFIX: copy.deepcopy(networks.members[name]).requires_grad_(False)
                for name in self.students
            }
        # Updates that the averages have had, on the device: a captured step counts them too.
        self.ema_updates = torch.zeros((), dtype=torch.int64, device=device)
        # Updates until which an older version copied the statistics of batch norm; None: never.
        self.ema_copied_until: int | None = None
        self.meter = TrainingMeter(list(recipe.networks), device)
        self.train_images = train_images
        self.data = data
        self.steps_per_epoch = train_images // recipe.train.batch_size
        self.position = Position()
        self.span = Span(recipe.train.batch_size, recipe.train.epochs)
        self.best: Best | None = None
        # (3,) on the device: steps skipped, skipped in a row now, longest such row since last read
        self.skipped = torch.zeros(3, dtype=torch.int64, device=device)
        if not ranks.first:  # each rank's dropout is its own
            torch.manual_seed(mix_seed(recipe.seed, 2, ranks.rank))

    def evaluated_networks(self) -> dict[str, nn.Module]:
        """Every network by name, the students' averages among them."""
        return {**dict(self.networks.members.items()), **self.ema}

    def judged_networks(self) -> list[str]:
        """The networks that the best checkpoint is chosen by: the students' averages where they are
        kept, else the students, else all."""
        return list(self.ema) or self.students or list(self.networks.members)

    def loss_scale(self) -> Tensor:
        """What the losses will be multiplied by, 0-dim on the device. Each rank's losses are shares
        of the whole batch's mean, and the ranks' gradients are averaged where a sum is wanted."""
        return self.scaler.scale(torch.full((), float(self.ranks.world), device=self.device))

    def exchanging(self, last: bool) -> AbstractContextManager:
        """The gradients travel between the ranks in the backward pass of a step's last part."""
        if last or not isinstance(self.model, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.model.no_sync()

    def unscale_gradients(self) -> None:
        """Take the loss scale out of the gradients, once they are those of all ranks."""
        if self.model is self.networks:
            self.ranks.average_gradients(
                p.grad for p in self.networks.parameters() if p.grad is not None
            )
        self.scaler.unscale_(self.optimizer)

    def remaining_steps(self) -> int:
        """Optimizer steps from here to the end that the recipe asks for; 0 at or past the end."""
        position, train, limit = self.position, self.recipe.train, self.recipe.max_steps
        if position.epoch >= train.epochs:
            return 0
        in_epoch = (self.train_images - position.seen) // train.batch_size
        steps = in_epoch + (train.epochs - position.epoch - 1) * self.steps_per_epoch
        return steps if limit is None else max(0, min(steps, limit - position.step))

    def schedule_step(self) -> float:
        """Steps of the schedule that are done; they are the optimizer's steps unless a resume has
        changed the batch size."""
        return self.span.step(self.position.epoch, self.position.seen, self.train_images)

    def set_learning_rate(self) -> None:
        """Set the rate of the step that follows."""
        factor = self.span.factor(self.recipe.schedule, self.schedule_step(), self.train_images)
        for group in self.optimizer.param_groups:
            rate = group["peak_rate"] * factor
            if isinstance(group["lr"], Tensor):  # of a captured step, which knows its address
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def check_and_clip(self, clip_norm: float | None) -> Tensor:
        """Whether every network's gradient norm is finite, 0-dim; each is clipped by its own."""
        finite = torch.ones((), dtype=torch.bool, device=self.device)
        for name, network in self.networks.trained().items():
            parameters = [p for p in network.parameters() if p.grad is not None]
            if not parameters:
                continue  # it paused on this batch
            norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
            if self.sharding is not None and name in self.sharding.names:
                norm = self.sharding.whole(norm)
            finite = finite & norm.isfinite()
            if clip_norm is not None:
                torch.nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm)
        return finite

    def optimizer_step(self, finite: Tensor) -> None:
        """Step, or not: the fused optimizer decides on the device, as it does for a GradScaler.
        Apex's cannot, so for them the host waits, as a GradScaler lets it."""
        self.optimizer.grad_scale = None  # type: ignore[attr-defined]  # gradients are unscaled
        self.optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
        if self.sharding is not None:
            self.sharding.take_gradients()
        if self.recipe.optimizer.name not in apex_optimizers.CLASSES or bool(finite):
            self.optimizer.step()
        self.scaler.update()

    @torch.no_grad()
    def update_ema(self, finite: Tensor) -> None:
        """Move the students' averages towards the students, unless the step was skipped.

        Parameters and floating-point buffers (the statistics of batch norm) are averaged with the
        same decay; counters are copied. The decay warms up as in timm's ``ModelEmaV3``:
        ``min(ema_decay, 1 - (1 + updates)^(-2/3))``.
        """
        if not self.ema:
            return
        assert self.recipe.train.ema_decay is not None
        kept = 1 - (1.0 + self.ema_updates.double()) ** (-2 / 3)
        weight = (1 - kept.clamp(max=self.recipe.train.ema_decay)).float() * finite.float()
        for name, average in self.ema.items():
            student = self.networks.members[name.removesuffix(EMA_SUFFIX)]
            pairs = list(zip(_tensors(average), _tensors(student), strict=True))
            averaged = [(mine, theirs) for mine, theirs in pairs if mine.is_floating_point()]
            counters = [(mine, theirs) for mine, theirs in pairs if not mine.is_floating_point()]
            mine, theirs = map(list, zip(*averaged, strict=True))
            difference = torch._foreach_sub(theirs, mine)
            torch._foreach_mul_(difference, weight)
            torch._foreach_add_(mine, difference)
            if counters:
                torch._foreach_copy_([mine for mine, _ in counters], [own for _, own in counters])
        self.ema_updates += finite.long()

    def count_skipped(self, finite: Tensor) -> None:
        """Count the step if it was skipped, on the device."""
        total, row, longest = self.skipped
        skipped = (~finite).long()
        row = (row + skipped) * skipped
        self.skipped.copy_(torch.stack((total + skipped, row, torch.maximum(longest, row))))

    def advance(self, samples: int) -> None:
        """Count the step and its images; an epoch ends when no whole batch is left of it."""
        self.position.step += 1
        self.position.seen += samples
        if self.position.seen + samples > self.train_images:
            self.position.epoch += 1
            self.position.seen = 0

    def end_short_epoch(self) -> None:
        """End the epoch if less than a batch is left of it, as after a resume with larger batches.
        It is evaluated as any other epoch."""
        position, size = self.position, self.recipe.train.batch_size
        if position.seen and position.seen + size > self.train_images:
            position.epoch, position.seen = position.epoch + 1, 0
            ends = position.epoch >= self.recipe.train.epochs
            position.validation_due |= ends or position.epoch % self.recipe.evaluate_every == 0

    def in_a_skipped_row(self) -> bool:
        """Whether the last step was skipped: no time to let a good checkpoint make way for one.
        Syncs, as saving does."""
        return int(self.skipped[1]) > 0

    def state_dict(self) -> dict[str, Any] | None:
        """Tensors and plain values only: what ``torch.load(weights_only=True)`` can read. All ranks
        must call it; the first has the whole, the others None."""
        cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        rng = {"cpu": torch.get_rng_state(), "cuda": cuda}
        own = {"rng": rng, "meter": self.meter.state_dict()}
        networks, optimizer = self.networks.state_dict(), self.optimizer.state_dict()
        if self.sharding is not None:
            networks = self.sharding.gather_weights(networks)
            optimizer = self.sharding.gather_moments(self.optimizer, optimizer)
        of_ranks = self.ranks.gather(own if self.ranks.alone else snapshot(own))
        if of_ranks is None:
            return None
        return {
            "train_images": self.train_images,
            "data": self.data,
            "networks": networks,
            "ema": {name: average.state_dict() for name, average in self.ema.items()},
            "ema_updates": self.ema_updates,
            "ema_copied_until": self.ema_copied_until,
            "optimizer": optimizer,
            "scaler": self.scaler.state_dict(),
            "skipped": self.skipped,
            "position": dict(vars(self.position)),
            "schedule": dict(vars(self.span)),
            "best": dict(vars(self.best)) if self.best else None,
            "ranks": of_ranks,
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Continue from a saved state: bit for bit if the recipe and the number of ranks are the
        same. State that the saved run did not have (averages, a loss scale) starts new. A changed
        number of epochs changes the schedule as :meth:`Span.with_epochs` describes."""
        networks, optimizer = saved["networks"], saved["optimizer"]
        if self.sharding is not None:
            networks = self.sharding.share_out_weights(networks, self.networks.state_dict())
            optimizer = self.sharding.share_out_moments(self.optimizer, optimizer)
        self.networks.load_state_dict(networks)
        for name, average in self.ema.items():
            student = self.networks.members[name.removesuffix(EMA_SUFFIX)]
            average.load_state_dict(saved["ema"].get(name) or student.state_dict())
        if saved["ema"]:
            self.ema_updates.copy_(torch.as_tensor(saved["ema_updates"]))
            self.ema_copied_until = saved["ema_copied_until"]
        # Moments are the saved ones; rates and decays the recipe's, which a resumed run may have
        # been given anew.
        groups = self.optimizer.param_groups
        settings = [{k: v for k, v in group.items() if k != "params"} for group in groups]
        self.optimizer.load_state_dict(optimizer)
        for group, own in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(own)
        if saved["scaler"]:
            self.scaler.load_state_dict(saved["scaler"])
        self.skipped.copy_(torch.as_tensor(saved["skipped"]))
        self.position = Position(**saved["position"])
        self.span = Span(**saved["schedule"])
        if self.span.epochs != self.recipe.train.epochs:
            self.span = self.span.with_epochs(
                self.recipe.train.epochs, self.recipe.schedule, self.schedule_step(),
                self.train_images,
            )  # fmt: skip
        self.best = Best(**saved["best"]) if saved["best"] else None
        self._load_of_ranks(saved["ranks"])

    def _load_of_ranks(self, saved: Sequence[Mapping[str, Any]]) -> None:
        """Random state and meter are each rank's own. For another number of ranks the random state
        begins anew, and the first rank's meter counts what all had counted."""
        rank, world = self.ranks.rank, self.ranks.world
        if len(saved) != world:
            self.meter.load_state_dict(*(own["meter"] for own in saved if rank == 0))
            torch.manual_seed(mix_seed(self.recipe.seed, 2, rank, self.position.step))
            return
        self.meter.load_state_dict(saved[rank]["meter"])
        rng = saved[rank]["rng"]
        torch.set_rng_state(rng["cpu"].cpu())
        if self.device.type == "cuda" and rng["cuda"] is not None:
            torch.cuda.set_rng_state(rng["cuda"].cpu(), self.device)


def _tensors(network: nn.Module) -> list[Tensor]:
    """Parameters and buffers, in the order of the module."""
    return [*network.parameters(), *network.buffers()]
