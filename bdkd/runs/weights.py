"""Load the initial weights of networks (``networks.NAME.weights``)."""

import copy
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bdkd.config import Recipe
from bdkd.engine.components import Components
from bdkd.engine.state import EMA_SUFFIX
from bdkd.errors import RunError, first_line
from bdkd.identity import class_difference
from bdkd.runs.checkpoint import is_checkpoint, load_file
from bdkd.runs.folder import selected_checkpoint
from bdkd.runs.resume import check_data, warn_of_copied_statistics


def relocate(recipe: Recipe, device: str, data_root: str | None) -> Recipe:
    """Return a recipe with another device and, unless it is None, another data folder."""
    root = recipe.data.root if data_root is None else data_root
    data = dataclasses.replace(recipe.data, root=root)
    return dataclasses.replace(recipe, device=device, data=data)


def load_initial_weights(components: Components) -> None:
    """Load the weights that the recipe names into the networks of a new run.

    Raises:
        RunError: a file cannot be read or does not fit its network, or a frozen network was trained
            on other classes.
    """
    for name, config in components.recipe.networks.items():
        if config.weights is None:
            continue
        path = Path(config.weights)
        file = selected_checkpoint(path) if path.is_dir() else path
        classes = load_weights(components.networks.members[name], name, file)
        if name not in components.objective.frozen or classes is None:
            continue
        if differs := class_difference(classes, components.source.info.classes):
            raise RunError(
                f"networks.{name}.weights: {file} was trained on other classes than those of this "
                f"data set: {differs}; give a teacher of this data set, or let {name} train"
            )


def load_networks(
    components: Components, path: Path, saved: Mapping[str, Any]
) -> dict[str, nn.Module]:
    """Load the networks of a checkpoint with the state ``saved`` into ``components`` and return
    them by name, including the students' averages. ``path`` is for messages.

    Raises:
        RunError: the networks do not match the recipe, or were trained on another data set.
    """
    networks = components.networks
    averages = {}
    try:
        check_data(path, saved, components.source.info)
        for name, weights in saved["ema"].items():
            member = networks.members[name.removesuffix(EMA_SUFFIX)]
            averages[name] = copy.deepcopy(member).requires_grad_(False)
            averages[name].load_state_dict(weights)
        networks.load_state_dict(saved["networks"])
    except (RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{path} does not match its recipe: {first_line(error)}") from error
    if components.context.is_rank0:
        warn_of_copied_statistics(path, saved, components.recipe.train.ema_decay)
    return {**dict(networks.members.items()), **averages}


def load_weights(network: nn.Module, name: str, path: Path) -> list[str] | None:
    """Load weights from a file into a network.

    Args:
        path: a state dict (``.pt``, ``.pth``, ``.safetensors``), or a checkpoint of a run with a
            network called ``name``.

    Returns:
        The classes that the network was trained on, if the file contains them.

    Raises:
        RunError: the file cannot be read, or its weights do not fit this network.
    """
    classes = None
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file as load_safetensors

        try:
            weights: Any = load_safetensors(path)
        except (OSError, SafetensorError) as error:
            raise RunError(f"cannot read the weights {path}: {first_line(error)}") from error
    else:
        weights = load_file(path)
        if is_checkpoint(weights):
            classes = (weights["state"].get("data") or {}).get("classes")
            weights = network_weights(weights["state"], name, path)
    mismatch = mismatched_keys(network, weights) if isinstance(weights, dict) else "no state dict"
    if mismatch:
        raise RunError(f"networks.{name}.weights: {path} does not fit {name!r}: {mismatch}")
    network.load_state_dict(weights)
    return classes


def network_weights(state: Mapping[str, Any], name: str, path: Path) -> dict[str, Any]:
    """Return the state dict of one network in a checkpoint's state."""
    if name in state["ema"]:
        return state["ema"][name]
    prefix, tensors = f"members.{name}.", state["networks"].items()
    weights = {key.removeprefix(prefix): x for key, x in tensors if key.startswith(prefix)}
    if not weights:
        names = sorted({key.split(".")[1] for key in state["networks"]})
        raise RunError(f"{path} contains no network {name!r}: it has {', '.join(names)}")
    return weights


def mismatched_keys(module: nn.Module, weights: Mapping[str, Any]) -> str:
    """Describe the first mismatch between a state dict and a module, or return an empty string."""
    own = module.state_dict()
    for key in own:
        if key not in weights:
            return f"it lacks {key!r}"
        if not isinstance(weights[key], torch.Tensor) or own[key].shape != weights[key].shape:
            came = tuple(getattr(weights[key], "shape", ()))
            return f"{key!r} has shape {came}, needed {tuple(own[key].shape)}"
    extra = [key for key in weights if key not in own]
    return f"it has {extra[0]!r}, which the network has not" if extra else ""
