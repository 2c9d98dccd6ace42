"""Everything a run needs before its first step: device, data, method, networks."""

import dataclasses
from pathlib import Path

import torch

from bdkd.config import Recipe, check_recipe
from bdkd.data import DataSource, create_source
from bdkd.errors import RunError, UsageError
from bdkd.identity import class_difference
from bdkd.objectives import Objective, create_objective, resolve_options
from bdkd.training import apex_optimizers, captured, compiled, overlap
from bdkd.training.checkpoint import load_weights
from bdkd.training.device import set_flags
from bdkd.training.distributed import ALONE, Ranks, local_rank
from bdkd.training.networks import Networks, build_networks
from bdkd.training.run_folder import selected_checkpoint
from bdkd.training.step import AUTOCAST


class Setup:
    """The parts of a run, made from its recipe.

    Args:
        initial_weights: a run begins: read ``networks.NAME.weights``, and refuse what its steps
            cannot do here before any data is read. A run that has a checkpoint does not need the
            weights any more, and their files may be gone; where it is evaluated it makes no step.
        ranks: the processes that train together.

    Raises:
        UsageError: a value of the recipe does not fit, or names nothing there is.
        RunError: data or weights are missing or cannot be read.
    """

    def __init__(self, recipe: Recipe, initial_weights: bool = True, ranks: Ranks = ALONE) -> None:
        check_recipe(recipe)
        # What a run's files say of its method is what was used.
        recipe = dataclasses.replace(recipe, objective=resolve_options(recipe.objective))
        self.recipe, self.ranks = recipe, ranks
        self.device = choose_device(recipe.device, local_rank())
        if recipe.threads is not None:
            torch.set_num_threads(recipe.threads)
        set_flags(self.device, recipe.train)
        # Made first: it refuses networks that do not suit the method before any data is read.
        self.objective: Objective = create_objective(recipe.objective, recipe.networks)
        check_ranks(recipe, self.objective, ranks, self.device)
        if self.objective.controls and recipe.train.compile:
            raise UsageError(
                f"train.compile must be false with the method {recipe.objective.name!r}, which "
                "pauses networks: one graph of all networks would train them all"
            )
        if self.objective.controls and recipe.train.accumulate > 1:
            raise UsageError(
                f"train.accumulate must be 1 with the method {recipe.objective.name!r}, which "
                f"decides on whole batches, got {recipe.train.accumulate}"
            )
        if initial_weights:
            check_step(self)
        layout = torch.channels_last if recipe.train.channels_last else torch.contiguous_format
        dtype = AUTOCAST[recipe.train.precision] or torch.float32
        self.source: DataSource = create_source(
            recipe.data, recipe.seed, self.device, layout, dtype
        )
        images, batch_size = self.source.info.counts["train"], recipe.train.batch_size
        if images < batch_size:
            raise UsageError(
                f"train.batch_size must be at most the {images} training images, got {batch_size}"
            )
        torch.manual_seed(recipe.seed)
        self.networks: Networks = self.fresh_networks()
        for name, config in recipe.networks.items():
            if initial_weights and config.weights is not None:
                path = Path(config.weights)
                file = selected_checkpoint(path) if path.is_dir() else path
                classes = load_weights(self.networks.members[name], name, file)
                if name in self.objective.frozen and classes is not None:
                    self.check_classes(name, file, classes)
        self.sharded = [] if ranks.alone else [n for n, c in recipe.networks.items() if c.shard]
        if recipe.distributed.sync_batch_norm and not ranks.alone:
            torch.nn.SyncBatchNorm.convert_sync_batchnorm(self.networks, ranks.group)
        if self.sharded:
            from bdkd.training.sharding import shard

            for name in self.sharded:
                # FSDP refuses parameters in the channels-last layout.
                self.networks.members[name].to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
                shard(self.networks.members[name], ranks, self.device)

    def check_classes(self, name: str, file: Path, classes: list[str]) -> None:
        """Raise ``RunError`` if a frozen network was trained on other classes, or on the same in
        another order: its answers would be taken for those to other labels."""
        if differs := class_difference(classes, self.source.info.classes):
            raise RunError(
                f"networks.{name}.weights: {file} was trained on other classes than those of this "
                f"data set: {differs}; give a teacher of this data set, or let {name} train"
            )

    def fresh_networks(self) -> Networks:
        """The networks with random weights, whole, on the device."""
        info, train = self.source.info, self.recipe.train
        try:
            networks = build_networks(
                self.recipe.networks, self.objective.frozen, info.num_classes, info.channels
            )
        except ValueError as error:  # an unknown model or option, said in one line
            raise UsageError(str(error)) from error
        layout = torch.channels_last if train.channels_last else torch.contiguous_format
        networks.to(self.device)
        networks.to(memory_format=layout)  # type: ignore[call-overload]  # torch's stub lacks it
        return networks


def check_step(setup: Setup) -> None:
    """Raise ``UsageError`` or ``RunError`` for what a step of this run cannot do here."""
    train = setup.recipe.train
    if train.cuda_graph:
        captured.check(setup)
    if train.overlap:
        overlap.check(setup)
    if train.compile:
        compiled.check(setup)
    apex_optimizers.check(setup.recipe.optimizer, setup.device)


def check_ranks(recipe: Recipe, objective: Objective, ranks: Ranks, device: torch.device) -> None:
    """Raise ``UsageError`` for what does not suit so many ranks."""
    if ranks.alone:
        return
    train = recipe.train
    if train.batch_size // ranks.world < train.accumulate:
        raise UsageError(
            f"train.batch_size must be at least {ranks.world * train.accumulate}, an image for "
            f"each of the {ranks.world} ranks and parts, got {train.batch_size}"
        )
    if objective.controls and any(network.shard for network in recipe.networks.values()):
        raise UsageError(
            f"networks.NAME.shard must be false with the method {recipe.objective.name!r}, which "
            "lets a teacher pause"
        )
    if recipe.distributed.sync_batch_norm and device.type == "cpu":
        raise UsageError("distributed.sync_batch_norm must be false on CPUs: torch has it on GPUs")


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """``auto`` is a GPU where there is one; of several ranks of a machine each takes its own."""
    if name in ("auto", "cuda") and torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise RunError(
                f"no GPU for local rank {local_rank}: there are {torch.cuda.device_count()}, so "
                "give torchrun at most as many --nproc-per-node"
            )
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    if name == "auto":
        return torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise RunError(
            f"no device {name} here ({torch.cuda.device_count()} GPUs): use --device cpu"
        )
    if device.type == "cuda":
        torch.cuda.set_device(device)  # streams, graphs and kernels are the current device's
    return device
