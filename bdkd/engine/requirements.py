"""Check that the options of a recipe fit each other, the device and the number of ranks."""

import torch

from bdkd._torch_compat import check_cpp_compiler
from bdkd.config import Recipe
from bdkd.distributed.context import DistributedContext
from bdkd.engine.optim import optimizer_entry
from bdkd.errors import UsageError
from bdkd.objectives import Objective


def check_requirements(
    recipe: Recipe, device: torch.device, context: DistributedContext, objective: Objective
) -> None:
    """Check that training steps of a recipe can run here, before any data is read.

    Raises:
        UsageError: an option conflicts with another option, the device or the number of ranks.
        RunError: a compiler or a package is missing.
    """
    for applies, holds, message in _requirements(recipe, device, context, objective):
        if applies and not holds:
            raise UsageError(message)
    if recipe.train.compile and device.type == "cpu":
        check_cpp_compiler("or train without train.compile")
    optimizer_entry(recipe.optimizer).check(recipe.optimizer, device)


def _requirements(
    recipe: Recipe, device: torch.device, context: DistributedContext, objective: Objective
) -> list[tuple[bool, bool, str]]:
    """Return a row for each requirement: whether it applies, whether it is met, and the message for
    a recipe that does not meet it."""
    train, name, optimizer = recipe.train, recipe.objective.name, optimizer_entry(recipe.optimizer)
    several, pauses = context.is_distributed, objective.has_dynamic_active_set
    on_gpu, least = device.type == "cuda", context.world_size * train.accumulate
    shards = any(network.shard for network in recipe.networks.values())
    graph, overlap = "train.cuda_graph can be true only", "train.overlap can be true only"
    return [
        (several, train.batch_size >= least,
         f"train.batch_size must be at least {least} (one image for each micro-batch of each of "
         f"{context.world_size} ranks), got {train.batch_size}"),
        (several and shards, not pauses,
         f"networks.NAME.shard must be false with the objective {name!r}, which pauses networks"),
        (several and recipe.distributed.sync_batch_norm, on_gpu,
         "distributed.sync_batch_norm must be false on a CPU: torch supports it only on GPUs"),
        (train.compile, not pauses,
         f"train.compile must be false with the objective {name!r}, which pauses networks: a "
         "compiled graph would train all networks"),
        (train.accumulate > 1, not pauses,
         f"train.accumulate must be 1 with the objective {name!r}, which selects the networks to "
         f"train from the whole batch, got {train.accumulate}"),
        (train.cuda_graph, on_gpu, f"{graph} on a GPU (device is {device})"),
        (train.cuda_graph, not several, f"{graph} with one rank"),
        (train.cuda_graph, not pauses,
         f"{graph} if all steps run the same operations, and the objective {name!r} pauses "
         "networks"),
        (train.cuda_graph, optimizer.skips_on_device,
         f"{graph} with optimizer.name sgd or adamw, and not with {recipe.optimizer.name}"),
        (train.overlap, on_gpu, f"{overlap} on a GPU (device is {device})"),
        # A DDP bucket contains gradients of several networks, so it waits for all their streams.
        (train.overlap, not several, f"{overlap} with one rank"),
        (train.overlap, not train.compile,
         f"{overlap} without train.compile (a compiled graph runs the networks in one order)"),
    ]  # fmt: skip
