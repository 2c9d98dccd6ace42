"""Everything a run needs before its first step: device, data, method, networks."""

import dataclasses
from pathlib import Path

import torch

from bdkd.config import Recipe, check_recipe
from bdkd.data import DataSource, create_source
from bdkd.errors import RunError, UsageError
from bdkd.objectives import Objective, create_objective, resolve_options
from bdkd.training.checkpoint import load_weights
from bdkd.training.networks import Networks, build_networks


class Setup:
    """The parts of a run, made from its recipe.

    Args:
        initial_weights: read ``networks.NAME.weights``. A run that has a checkpoint does not need
            them any more, and their files may be gone.

    Raises:
        UsageError: a value of the recipe does not fit, or names nothing there is.
        RunError: data or weights are missing or cannot be read.
    """

    def __init__(self, recipe: Recipe, initial_weights: bool = True) -> None:
        check_recipe(recipe)
        # What a run's files say of its method is what was used.
        recipe = dataclasses.replace(recipe, objective=resolve_options(recipe.objective))
        self.recipe = recipe
        self.device = choose_device(recipe.device)
        if recipe.threads is not None:
            torch.set_num_threads(recipe.threads)
        # Made first: it refuses networks that do not suit the method before any data is read.
        self.objective: Objective = create_objective(recipe.objective, recipe.networks)
        if self.objective.controls and recipe.train.accumulate > 1:
            raise UsageError(
                f"train.accumulate must be 1 with the method {recipe.objective.name!r}, which "
                f"decides on whole batches, got {recipe.train.accumulate}"
            )
        layout = torch.channels_last if recipe.train.channels_last else torch.contiguous_format
        self.source: DataSource = create_source(recipe.data, recipe.seed, self.device, layout)
        images, batch_size = self.source.info.counts["train"], recipe.train.batch_size
        if images < batch_size:
            raise UsageError(
                f"train.batch_size must be at most the {images} training images, got {batch_size}"
            )
        torch.manual_seed(recipe.seed)
        try:
            self.networks: Networks = build_networks(
                recipe.networks,
                self.objective.frozen,
                self.source.info.num_classes,
                self.source.info.channels,
            )
        except ValueError as error:  # an unknown model or option, said in one line
            raise UsageError(str(error)) from error
        for name, config in recipe.networks.items():
            if initial_weights and config.weights is not None:
                load_weights(self.networks.members[name], name, Path(config.weights))
        self.networks.to(self.device)
        self.networks.to(memory_format=layout)  # type: ignore[call-overload]  # torch's stub lacks it


def choose_device(name: str) -> torch.device:
    """``auto`` is a GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
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
    return device
