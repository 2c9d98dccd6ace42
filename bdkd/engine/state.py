"""The training state: everything that a checkpoint contains, and the operations of a step."""

import contextlib
import copy
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bdkd._torch_compat import foreach_copy_, foreach_lerp_
from bdkd.data.base import mix_seed
from bdkd.engine.components import Components
from bdkd.engine.meter import TrainingMeter
from bdkd.engine.networks import parallelize
from bdkd.engine.optim import build_optimizer, optimizer_entry
from bdkd.engine.progress import Best, Progress
from bdkd.engine.schedule import Span

if TYPE_CHECKING:
    from bdkd.distributed.fsdp import Sharding

EMA_SUFFIX = "_ema"


class TrainingState:
    """Networks, optimizer, loss scale, averages, progress, random state and counters of a run.

    Attributes:
        networks: the networks by name.
        model: the module that a step calls: ``networks``, wrapped in DDP if there are several
            ranks.
        ema: the exponential moving average of each student, with the name ``NAME_ema``.
        skipped: ``(3,)`` int64 on the device: the number of skipped steps, the current number of
            consecutive skipped steps, and the largest such number since it was last read.
    """

    def __init__(self, components: Components) -> None:
        self.recipe, self.networks = components.recipe, components.networks
        self.device, self.context = components.device, components.context
        recipe = self.recipe
        self.model = parallelize(
            self.networks, components.sharded, self.context, recipe.distributed, self.device,
            ddp=not components.objective.has_dynamic_active_set,
        )  # fmt: skip
        self.sharding: Sharding | None = None
        if components.sharded:
            from bdkd.distributed import fsdp  # this import takes a second

            self.sharding = fsdp.Sharding(components.sharded)
        local_part = self.sharding.local_part if self.sharding else lambda parameter: parameter
        self.optimizer = build_optimizer(
            self.networks, recipe.networks, recipe.optimizer, local_part
        )
        self.skips_on_device = optimizer_entry(recipe.optimizer).skips_on_device
        self.scaler = torch.amp.GradScaler(
            self.device.type, enabled=recipe.train.precision == "fp16"
        )
        self.students = [n for n, config in recipe.networks.items() if config.role == "student"]
        self.ema: dict[str, nn.Module] = {}
        if recipe.train.ema_decay is not None:
            self.ema = {
                name + EMA_SUFFIX: copy.deepcopy(self.networks.members[name]).requires_grad_(False)
                for name in self.students
            }
        # The number of updates of the averages is on the device, so that a captured step counts it.
        self.ema_updates = torch.zeros((), dtype=torch.int64, device=self.device)
        # Number of updates in which an older version copied the batch norm statistics instead of
        # averaging them. None: no update.
        self.ema_copied_until: int | None = None
        self.meter = TrainingMeter(list(recipe.networks), self.device)
        self.info = components.source.info
        self.train_images = self.info.counts["train"]
        self.progress = Progress()
        self.span = Span(recipe.train.batch_size, recipe.train.epochs)
        self.best: Best | None = None
        self.skipped = torch.zeros(3, dtype=torch.int64, device=self.device)
        if not self.context.is_rank0:  # each rank draws its own dropout masks
            torch.manual_seed(mix_seed(recipe.seed, 2, self.context.rank))

    def evaluated_networks(self) -> dict[str, nn.Module]:
        """Return all networks by name, including the averages of the students."""
        return {**dict(self.networks.members.items()), **self.ema}

    def selection_networks(self) -> list[str]:
        """Return the names of the networks whose accuracy selects the best checkpoint.

        These are the averages of the students if the run has any, or else the students, or else all
        networks.
        """
        return list(self.ema) or self.students or list(self.networks.members)

    def remaining_steps(self) -> int:
        """Return the number of optimizer steps until the end of the recipe."""
        return self.progress.remaining_steps(self.recipe, self.train_images)

    # -- one step ----------------------------------------------------------------------------------

    def schedule_step(self) -> float:
        """Return the number of completed schedule steps. It equals the number of optimizer steps
        unless the run was resumed with another batch size."""
        return self.span.step(self.progress.epoch, self.progress.seen, self.train_images)

    def epochs_done(self) -> float:
        """Return the number of completed epochs, including the completed fraction of this epoch."""
        return self.progress.epoch + self.progress.seen / self.train_images

    def set_learning_rate(self) -> None:
        """Set the learning rate of each parameter group for the next step."""
        factor = self.span.factor(self.recipe.schedule, self.schedule_step(), self.train_images)
        for group in self.optimizer.param_groups:
            rate = group["peak_rate"] * factor
            if isinstance(group["lr"], Tensor):  # a captured step reads this tensor
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def loss_scale(self) -> Tensor:
        """Return the factor that multiplies the losses, 0-dim on the device.

        It includes the number of ranks: the losses of each rank are shares of the mean over the
        whole batch, so the gradients must be added up over the ranks, but DDP averages them.
        """
        scale = torch.full((), float(self.context.world_size), device=self.device)
        return self.scaler.scale(scale)

    def sync_gradients(self, enabled: bool) -> AbstractContextManager:
        """Return a context manager in which a backward pass averages gradients over the ranks if
        ``enabled``. Only the last micro-batch of a step needs this."""
        if enabled or not isinstance(self.model, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.model.no_sync()

    def unscale_gradients(self) -> None:
        """Divide the gradients by the loss scale. If DDP did not average them over the ranks,
        average them first."""
        if self.model is self.networks:
            self.context.average_gradients(
                p.grad for p in self.networks.parameters() if p.grad is not None
            )
        self.scaler.unscale_(self.optimizer)

    def check_and_clip(self, clip_norm: float | None) -> Tensor:
        """Clip the gradients of each network separately.

        Args:
            clip_norm: the largest norm. None: do not clip.

        Returns:
            A 0-dim bool tensor on the device. It is True if the norms of all networks are finite.
        """
        finite = torch.ones((), dtype=torch.bool, device=self.device)
        for name, network in self.networks.trained().items():
            parameters = [p for p in network.parameters() if p.grad is not None]
            if not parameters:
                continue  # this network does not train on this batch
            norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
            if self.sharding is not None and name in self.sharding.names:
                norm = self.sharding.full_tensor(norm)
            finite = finite & norm.isfinite()
            if clip_norm is not None:
                torch.nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm)
        return finite

    def optimizer_step(self, finite: Tensor) -> None:
        """Update the parameters if ``finite`` is true. Fused optimizers read ``finite`` on the
        device. For other optimizers the host waits for its value."""
        optimizer: Any = self.optimizer
        if self.skips_on_device:
            optimizer.grad_scale = None  # the gradients are already unscaled
            optimizer.found_inf = (~finite).float()
        if self.sharding is not None:
            self.sharding.set_local_gradients()
        if self.skips_on_device or bool(finite):
            optimizer.step()
        self.scaler.update()

    @torch.no_grad()
    def update_ema(self, finite: Tensor) -> None:
        """Update the moving averages of the students if ``finite`` is true.

        Parameters and floating-point buffers (batch norm statistics) are averaged with the same
        decay. Integer buffers (counters) are copied. The decay warms up as in timm's
        ``ModelEmaV3``: ``min(ema_decay, 1 - (1 + updates)^(-2/3))``.
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
            foreach_lerp_([mine for mine, _ in averaged], [own for _, own in averaged], weight)
            if counters:
                foreach_copy_([mine for mine, _ in counters], [own for _, own in counters])
        self.ema_updates += finite.long()

    def count_skipped(self, finite: Tensor) -> None:
        """Update the counters ``skipped`` on the device. The step was skipped if ``finite`` is
        false."""
        total, row, longest = self.skipped
        skipped = (~finite).long()
        row = (row + skipped) * skipped
        self.skipped.copy_(torch.stack((total + skipped, row, torch.maximum(longest, row))))

    def last_step_was_skipped(self) -> bool:
        """Return whether the last step was skipped. A checkpoint of such a step should not replace
        an older one. Synchronizes with the device."""
        return int(self.skipped[1]) > 0

    # -- checkpoints -------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any] | None:
        """Return the whole state on rank 0, and None on other ranks. All ranks must call this.

        The state contains only tensors and plain values, so that ``torch.load(weights_only=True)``
        can read it.
        """
        cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        rng = {"cpu": torch.get_rng_state(), "cuda": cuda}
        own = {"rng": rng, "meter": self.meter.state_dict()}
        networks, optimizer = self.networks.state_dict(), self.optimizer.state_dict()
        if self.sharding is not None:
            networks = self.sharding.gather_weights(networks)
            optimizer = self.sharding.gather_moments(self.optimizer, optimizer)
        of_ranks = self.context.gather_objects(
            snapshot(own) if self.context.is_distributed else own
        )
        if of_ranks is None:
            return None
        return {
            "train_images": self.train_images,
            "data": self.info.identity(),
            "networks": networks,
            "ema": {name: average.state_dict() for name, average in self.ema.items()},
            "ema_updates": self.ema_updates,
            "ema_copied_until": self.ema_copied_until,
            "optimizer": optimizer,
            "scaler": self.scaler.state_dict(),
            "skipped": self.skipped,
            "position": dict(vars(self.progress)),
            "schedule": dict(vars(self.span)),
            "best": dict(vars(self.best)) if self.best else None,
            "ranks": of_ranks,
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Load a saved state.

        Training continues bit for bit if the recipe and the number of ranks are the same. Averages
        and a loss scale that the saved run did not have are initialised. If the number of epochs
        differs, :meth:`Span.with_epochs` changes the schedule.
        """
        networks, optimizer = saved["networks"], saved["optimizer"]
        if self.sharding is not None:
            networks = self.sharding.distribute_weights(networks, self.networks.state_dict())
            optimizer = self.sharding.distribute_moments(self.optimizer, optimizer)
        self.networks.load_state_dict(networks)
        for name, average in self.ema.items():
            student = self.networks.members[name.removesuffix(EMA_SUFFIX)]
            average.load_state_dict(saved["ema"].get(name) or student.state_dict())
        if saved["ema"]:
            self.ema_updates.copy_(torch.as_tensor(saved["ema_updates"]))
            self.ema_copied_until = saved["ema_copied_until"]
        # Load the moments from the checkpoint. Take learning rates and weight decays from the
        # recipe, which may differ from the recipe of the saved run.
        groups = self.optimizer.param_groups
        settings = [{k: v for k, v in group.items() if k != "params"} for group in groups]
        self.optimizer.load_state_dict(optimizer)
        for group, own in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(own)
        if saved["scaler"]:
            self.scaler.load_state_dict(saved["scaler"])
        self.skipped.copy_(torch.as_tensor(saved["skipped"]))
        self.progress = Progress(**saved["position"])
        self.span = Span(**saved["schedule"])
        if self.span.epochs != self.recipe.train.epochs:
            self.span = self.span.with_epochs(
                self.recipe.train.epochs, self.recipe.schedule, self.schedule_step(),
                self.train_images,
            )  # fmt: skip
        self.best = Best(**saved["best"]) if saved["best"] else None
        self._load_of_ranks(saved["ranks"])

    def _load_of_ranks(self, saved: Sequence[Mapping[str, Any]]) -> None:
        """Load the random state and the meter of each rank.

        If the number of ranks differs, each rank gets a new random state, and the meter of rank 0
        loads the sums of all saved meters.
        """
        rank, world_size = self.context.rank, self.context.world_size
        if len(saved) != world_size:
            self.meter.load_state_dict(*(own["meter"] for own in saved if rank == 0))
            torch.manual_seed(mix_seed(self.recipe.seed, 2, rank, self.progress.step))
            return
        self.meter.load_state_dict(saved[rank]["meter"])
        rng = saved[rank]["rng"]
        torch.set_rng_state(rng["cpu"].cpu())
        if self.device.type == "cuda" and rng["cuda"] is not None:
            torch.cuda.set_rng_state(rng["cuda"].cpu(), self.device)


def _tensors(network: nn.Module) -> list[Tensor]:
    """Return the parameters of a network, followed by its buffers."""
    return [*network.parameters(), *network.buffers()]


def snapshot(value: Any) -> Any:
    """Return a copy of nested dictionaries and lists in which all tensors are copies on the CPU.

    Later steps do not change the copies. This waits for the device once.
    """
    copied = _copy_to_cpu(value)
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return copied


def _copy_to_cpu(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", non_blocking=True, copy=True)
    if isinstance(value, Mapping):
        return {key: _copy_to_cpu(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copy_to_cpu(item) for item in value)
    return value
