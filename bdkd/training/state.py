"""The one owner of everything that a checkpoint holds."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bdkd.config import Recipe
from bdkd.training.meter import TrainingMeter
from bdkd.training.networks import Networks, build_optimizer
from bdkd.training.schedule import rate_factor

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
    """Networks, optimizer, loss scale, averages, position, random state and counters of a run."""

    def __init__(
        self, recipe: Recipe, networks: Networks, train_images: int, device: torch.device
    ) -> None:
        self.recipe, self.networks, self.device = recipe, networks, device
        self.optimizer = build_optimizer(networks, recipe.networks, recipe.optimizer)
        self.scaler = torch.amp.GradScaler(device.type, enabled=recipe.train.precision == "fp16")
        self.students = [n for n, config in recipe.networks.items() if config.role == "student"]
        self.ema: dict[str, nn.Module] = {}
        if recipe.train.ema_decay is not None:
            self.ema = {
                name + EMA_SUFFIX: copy.deepcopy(networks.members[name]).requires_grad_(False)
                for name in self.students
            }
        self.meter = TrainingMeter(list(recipe.networks), device)
        self.train_images = train_images
        self.steps_per_epoch = train_images // recipe.train.batch_size
        self.total_steps = self.steps_per_epoch * recipe.train.epochs
        self.position = Position()
        self.best: Best | None = None
        # (3,) on the device: steps skipped, skipped in a row now, longest such row since last read
        self.skipped = torch.zeros(3, dtype=torch.int64, device=device)

    def evaluated_networks(self) -> dict[str, nn.Module]:
        """Every network by name, the students' averages among them."""
        return {**dict(self.networks.members.items()), **self.ema}

    def judged_networks(self) -> list[str]:
        """The networks that the best checkpoint is chosen by: the students' averages where they are
        kept, else the students, else all."""
        return list(self.ema) or self.students or list(self.networks.members)

    def loss_scale(self) -> Tensor:
        """What the losses will be multiplied by, 0-dim on the device."""
        return self.scaler.scale(torch.ones((), device=self.device))

    def set_learning_rate(self) -> None:
        factor = rate_factor(
            self.recipe.schedule, self.position.step, self.steps_per_epoch, self.total_steps
        )
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_rate"] * factor

    def check_and_clip(self, clip_norm: float | None) -> Tensor:
        """Whether every network's gradient norm is finite, 0-dim; each is clipped by its own."""
        finite = torch.ones((), dtype=torch.bool, device=self.device)
        for network in self.networks.trained().values():
            parameters = [p for p in network.parameters() if p.grad is not None]
            if not parameters:
                continue  # it paused on this batch
            norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
            finite = finite & norm.isfinite()
            if clip_norm is not None:
                torch.nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm)
        return finite

    def optimizer_step(self, finite: Tensor) -> None:
        """Step, or not: the fused optimizer decides on the device, as it does for a GradScaler."""
        self.optimizer.grad_scale = None  # type: ignore[attr-defined]  # gradients are unscaled
        self.optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
        self.optimizer.step()
        self.scaler.update()

    @torch.no_grad()
    def update_ema(self, finite: Tensor) -> None:
        """Move the students' averages towards them, by nothing where the step was skipped."""
        if not self.ema:
            return
        assert self.recipe.train.ema_decay is not None
        weight = (1 - self.recipe.train.ema_decay) * finite.float()
        for name, average in self.ema.items():
            student = self.networks.members[name.removesuffix(EMA_SUFFIX)]
            mine: list[Tensor] = list(average.parameters())
            theirs: list[Tensor] = list(student.parameters())
            difference = torch._foreach_sub(theirs, mine)
            torch._foreach_mul_(difference, weight)
            torch._foreach_add_(mine, difference)
            # Running statistics are averages already.
            buffers = list(average.buffers())
            if buffers:
                torch._foreach_copy_(buffers, list(student.buffers()))

    def advance(self, samples: int, finite: Tensor) -> None:
        """Count the step and its images; an epoch ends when no whole batch is left of it."""
        total, row, longest = self.skipped
        skipped = (~finite).long()
        row = (row + skipped) * skipped
        self.skipped = torch.stack((total + skipped, row, torch.maximum(longest, row)))
        self.position.step += 1
        self.position.seen += samples
        if self.position.seen + samples > self.train_images:
            self.position.epoch += 1
            self.position.seen = 0

    def in_a_skipped_row(self) -> bool:
        """Whether the last step was skipped: no time to let a good checkpoint make way for one.
        Syncs, as saving does."""
        return int(self.skipped[1]) > 0

    def state_dict(self) -> dict[str, object]:
        """Tensors and plain values only: what ``torch.load(weights_only=True)`` can read."""
        cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        return {
            "train_images": self.train_images,
            "networks": self.networks.state_dict(),
            "ema": {name: average.state_dict() for name, average in self.ema.items()},
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "meter": self.meter.state_dict(),
            "skipped": self.skipped,
            "position": dict(vars(self.position)),
            "best": dict(vars(self.best)) if self.best else None,
            "rng": {"cpu": torch.get_rng_state(), "cuda": cuda},
        }

    def load_state_dict(self, saved: Mapping[str, dict]) -> None:
        """Go on from a saved state, bit for bit. What the saved run did not have (averages, a loss
        scale) begins afresh."""
        self.networks.load_state_dict(saved["networks"])
        for name, average in self.ema.items():
            student = self.networks.members[name.removesuffix(EMA_SUFFIX)]
            average.load_state_dict(saved["ema"].get(name) or student.state_dict())
        # Moments are the saved ones; rates and decays the recipe's, which a resumed run may have
        # been given anew.
        groups = self.optimizer.param_groups
        settings = [{k: v for k, v in group.items() if k != "params"} for group in groups]
        self.optimizer.load_state_dict(saved["optimizer"])
        for group, own in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(own)
        if saved["scaler"]:
            self.scaler.load_state_dict(saved["scaler"])
        self.meter.load_state_dict(saved["meter"])
        self.skipped = torch.as_tensor(saved["skipped"]).to(self.device)
        self.position = Position(**saved["position"])
        self.best = Best(**saved["best"]) if saved["best"] else None
        torch.set_rng_state(saved["rng"]["cpu"].cpu())
        if self.device.type == "cuda" and saved["rng"]["cuda"] is not None:
            torch.cuda.set_rng_state(saved["rng"]["cuda"].cpu(), self.device)
