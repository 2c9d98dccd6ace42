"""Build the parts of a run from its recipe. Training, evaluation and export use them."""

import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch

from bdkd.config import Recipe
from bdkd.data import DataSource, create_source
from bdkd.device import AUTOCAST, choose_device, set_flags
from bdkd.distributed.context import SINGLE_PROCESS, DistributedContext
from bdkd.distributed.launch import local_rank
from bdkd.engine.image_size import check_image_size, mistaken_models, with_image_size
from bdkd.engine.networks import Networks, build_networks, with_model_options
from bdkd.engine.requirements import check_requirements
from bdkd.errors import UsageError
from bdkd.objectives import Objective, check_objective, create_objective
from bdkd.registry import OBJECTIVES


@dataclass(frozen=True)
class Components:
    """The objects that a recipe describes, on the device of this process."""

    recipe: Recipe
    context: DistributedContext
    device: torch.device
    objective: Objective
    source: DataSource
    networks: Networks  # with random weights

    @property
    def sharded(self) -> list[str]:
        """Names of the networks whose weights are sharded across the ranks."""
        shards = self.context.is_distributed
        return [name for name, config in self.recipe.networks.items() if config.shard and shards]


def build_components(
    recipe: Recipe,
    context: DistributedContext = SINGLE_PROCESS,
    *,
    training: bool = True,
    create: Callable[..., DataSource] = create_source,
) -> Components:
    """Build the device, objective, data source and networks, and set the flags of torch.

    The networks have random weights.

    Args:
        context: the processes that train together.
        training: check that a training step can run here, before any data is read.
        create: creates the data source, with the signature of :func:`bdkd.data.create_source`.

    Raises:
        UsageError: a value of the recipe is invalid, or names something that does not exist.
        RunError: the data set is missing or cannot be read, or a package is missing.
    """
    device = choose_device(recipe.device, local_rank())
    # Resolve defaults, so that the files of a run contain the value of each option.
    recipe = with_image_size(with_model_options(recipe))
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    set_flags(device, recipe.train)
    objective = create_objective(recipe.objective, recipe.networks)
    if training:
        check_requirements(recipe, device, context, objective)
        check_image_size(recipe)
    layout = torch.channels_last if recipe.train.channels_last else torch.contiguous_format
    dtype = AUTOCAST[recipe.train.precision] or torch.float32
    source = create(recipe.data, recipe.seed, device, layout, dtype)
    recipe = with_image_size(recipe, source.info.image_size[0])
    if training and context.is_rank0:
        for warning in mistaken_models(recipe, source.info.image_size[0]):
            print(f"warning: {warning}", file=sys.stderr)
    images, batch_size = source.info.counts["train"], recipe.train.batch_size
    if images < batch_size:
        raise UsageError(
            f"train.batch_size must be at most the {images} training images, got {batch_size}: "
            "pass a smaller --batch-size"
        )
    info = source.info
    if training and OBJECTIVES.is_foreign(recipe.objective.name):
        share = context.world_size * recipe.train.accumulate
        check_objective(
            create_objective(recipe.objective, recipe.networks), recipe.networks,
            max(1, recipe.train.batch_size // share), info.num_classes, device,
        )  # fmt: skip
    torch.manual_seed(recipe.seed)
    try:
        networks = build_networks(
            recipe.networks, objective.frozen, info.num_classes, info.channels
        )
    except ValueError as error:  # an unknown model or option
        raise UsageError(str(error)) from error
    networks.to(device)
    networks.to(memory_format=layout)  # type: ignore[call-overload]  # torch's stub lacks it
    return Components(recipe, context, device, objective, source, networks)
