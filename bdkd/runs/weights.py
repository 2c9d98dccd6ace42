"""Load the initial weights of networks (``networks.NAME.weights``)."""

import copy
import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from bdkd.config import PRETRAINED, RANDOM, NetworkConfig, Recipe
from bdkd.data import DataInfo
from bdkd.engine.components import Components
from bdkd.engine.state import EMA_SUFFIX
from bdkd.errors import RunError, UsageError, first_line
from bdkd.identity import class_difference
from bdkd.models.bridge import TimmNetwork, adapted_to_timm
from bdkd.models.key_names import head_keys, layouts
from bdkd.models.pretrained import check_published, published_weights
from bdkd.models.published import locate
from bdkd.runs.checkpoint import is_checkpoint
from bdkd.runs.misfits import describe, no_state_dict, no_such_key, several
from bdkd.runs.resume import check_data, warn_of_copied_statistics
from bdkd.runs.state_dicts import EMA, WRAPPERS, Match, Misfit, Target, match_names, state_dicts
from bdkd.runs.weight_files import check_architecture, read_weights, weight_file


def relocate(recipe: Recipe, device: str, data_root: str | None) -> Recipe:
    """Return a recipe with another device and another ``data.root``.

    Args:
        data_root: None: keep the ``data.root`` of the recipe.
    """
    root = recipe.data.root if data_root is None else data_root
    data = dataclasses.replace(recipe.data, root=root)
    return dataclasses.replace(recipe, device=device, data=data)


def check_pretrained(recipe: Recipe) -> None:
    """Check that pretrained weights are published for each network that requests them.

    This reads neither the weights nor the data set.

    Raises:
        UsageError: no pretrained weights of a model are published.
        RunError: timm or torchvision is missing or cannot be imported.
    """
    for name, network in recipe.networks.items():
        if network.weights == PRETRAINED:
            check_published(name, network.model, network.options)


def check_initial_weights(components: Components) -> None:
    """Check that frozen networks get weights.

    Call this only for new runs, because runs of older versions may contain frozen networks with
    random weights.

    Raises:
        UsageError: a frozen network would have random weights that the recipe does not request, or
            a random classifier.
    """
    needed = components.source.info.num_classes
    for name in sorted(components.objective.frozen):
        network = components.recipe.networks[name]
        if network.weights is None and not network.options.get("pretrained"):
            raise UsageError(
                f"networks.{name} is frozen and has no weights: set networks.{name}.weights to a "
                "file or to the folder of the run that trained it, to pretrained for the weights "
                "that timm or torchvision publish, or to random for random weights"
            )
        if network.weights != PRETRAINED:
            continue
        published = published_weights(network.model, network.options)
        if published is not None and published.num_classes != needed:
            raise UsageError(
                f"networks.{name} is frozen, and its pretrained weights are for "
                f"{published.num_classes} classes, needed {needed}: its new classifier would never "
                f"train; set networks.{name}.weights to a teacher that was trained on this data "
                "set, or do not freeze the network"
            )


def load_initial_weights(components: Components) -> None:
    """Load the weights that the recipe names into the networks of a new run.

    Raises:
        UsageError: see :func:`check_initial_weights`.
        RunError: a file cannot be read or does not fit its network, pretrained weights cannot be
            downloaded, or a frozen network was trained on other classes.
    """
    check_initial_weights(components)
    context, info = components.context, components.source.info
    for name, config in components.recipe.networks.items():
        if config.weights in (None, RANDOM):
            continue
        network = components.networks.members[name]
        if config.weights == PRETRAINED:
            loaded = context.broadcast_from_rank0(
                partial(load_pretrained, network, name, config, info.num_classes, info.channels)
            )
            context.broadcast_tensors(network.state_dict().values())
        else:
            loaded = load_weights(network, name, config)
        if context.is_rank0:
            print(f"{name}: {loaded.text}")
            if config.weights == PRETRAINED and (warning := _other_pixels(name, config, info)):
                print(f"warning: {warning}")
        if name not in components.objective.frozen or loaded.classes is None:
            continue
        if differs := class_difference(loaded.classes, info.classes):
            raise RunError(
                f"networks.{name}.weights: {config.weights} was trained on other classes than "
                f"those of this data set: {differs}; use a teacher that was trained on this data "
                "set, or do not freeze the network"
            )


def _other_pixels(name: str, config: NetworkConfig, info: DataInfo) -> str | None:
    """Return a warning if the pretrained weights of a network expect another normalisation of the
    images than that of the data set."""
    published = published_weights(config.model, config.options)
    if published is None or info.normalisation is None or info.channels != len(published.mean):
        return None
    scale = info.normalisation.largest
    own = [tuple(x / scale for x in values) for values in
           (info.normalisation.mean, info.normalisation.std)]  # fmt: skip
    theirs = [published.mean, published.std]
    if np.allclose(own, theirs, atol=0.02):
        return None
    (mean, std), (needed_mean, needed_std) = (
        [" ".join(f"{x:.3f}" for x in values) for values in each] for each in (own, theirs)
    )
    return (
        f"the pretrained weights of {name} expect images that are normalised with mean "
        f"{needed_mean} and std {needed_std}, but this data set uses {mean} and {std}: the network "
        "starts less accurate"
    )


def load_networks(
    components: Components, path: Path, saved: Mapping[str, Any]
) -> dict[str, nn.Module]:
    """Load the networks of a checkpoint into ``components``, and return them by name.

    The result includes the averages of the students.

    Args:
        path: the checkpoint, for messages.
        saved: the state in the checkpoint.

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


class Loaded(NamedTuple):
    """A description of loaded weights."""

    classes: list[str] | None  # names of the classes of the training data; None: unknown
    text: str  # a line for the log


def load_weights(network: nn.Module, name: str, config: NetworkConfig) -> Loaded:
    """Load the weights that a recipe names into a network.

    ``config.weights`` is a torch or safetensors file from any trainer, a checkpoint of a run with a
    network called ``name``, or a folder that contains one of these. :func:`find_weights` describes
    how the weights are found in a file.

    Args:
        network: the network to change.
        name: name of the network in the recipe.
        config: options of the network.

    Raises:
        RunError: the file cannot be read, or its weights do not fit this network.
    """
    path = weight_file(Path(str(config.weights)))
    file = read_weights(path)
    content, classes, key = file.content, file.classes, config.weights_key
    of_network = ""
    try:
        if is_checkpoint(content):
            classes, member, content = _of_checkpoint(content["state"], name, key, path)
            of_network, key = f" of {member!r}", None
        check_architecture(file, config)
        count, found = _copy(content, network, config.model, name, key, config.reset_head)
    except Misfit as error:
        raise RunError(
            f"networks.{name}.weights: {path} does not fit {name!r} ({config.model}): {error}"
        ) from error
    origin = "" if found.layout == "bdkd" else f", named as in {found.layout}"
    head = ", without the classifier" if config.reset_head else ""
    text = f"loaded {count} tensors{of_network} {found.where} of {path}{origin}{head}"
    return Loaded(None if config.reset_head else classes, text)


def load_pretrained(
    network: nn.Module, name: str, config: NetworkConfig, num_classes: int, in_channels: int
) -> Loaded:
    """Load the weights that timm or torchvision publish for a network.

    The weights are downloaded if they are not on this machine. If the number of classes differs,
    the network keeps its random classifier.

    Args:
        network: the network to change.
        name: name of the network in the recipe.
        config: options of the network.
        num_classes, in_channels: number of classes and of input channels of the network.

    Raises:
        RunError: the weights cannot be downloaded or read, or do not fit this network.
    """
    published = published_weights(config.model, config.options)
    if published is None:  # only if the caller did not call check_pretrained
        raise RunError(f"networks.{name}.weights: no weights of {config.model} are published")
    try:
        path = locate(published)
        content = read_weights(path).content
    except RunError as error:
        raise RunError(f"networks.{name}.weights: {error}") from error
    other_classes = published.num_classes != num_classes
    try:
        if isinstance(network, TimmNetwork):
            content = adapted_to_timm(
                config.model.partition(":")[2], content, published.num_classes, in_channels,
                config.options,
            )  # fmt: skip
        reset_head = config.reset_head or other_classes
        count, _ = _copy(content, network, config.model, name, None, reset_head)
    except (Misfit, ValueError) as error:
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        raise RunError(
            f"networks.{name}.weights: {path}, the pretrained weights of {published.model}, does "
            f"not fit {name!r} ({config.model}, {in_channels} channels): {reason}"
        ) from error
    text = f"loaded {count} tensors of {path}, the pretrained weights of {published.model}"
    if reset_head:
        text += ", without the classifier"
    if other_classes:
        text += f" ({published.num_classes} classes, needed {num_classes})"
    return Loaded(None, text)


def _copy(
    content: Any, network: nn.Module, model: str, name: str, key: str | None, reset_head: bool
) -> tuple[int, Match]:
    """Copy weights from the content of a file into a network. Return the number of tensors, and
    where they were found. Raise ``Misfit`` if they do not fit the network, or are not finite."""
    own = network.state_dict()
    weights, found = find_weights(content, network, model, name, key=key, reset_head=reset_head)
    for k, tensor in weights.items():
        if tensor.is_floating_point() and not tensor.to(own[k].dtype).isfinite().all():
            raise Misfit(f"{found.names[k]!r} contains NaN or infinity")
    network.load_state_dict({**own, **weights})
    return len(weights), found


def _of_checkpoint(
    state: Mapping[str, Any], name: str, key: str | None, path: Path
) -> tuple[list[str] | None, str, dict[str, Any]]:
    """Find the weights of a network in a checkpoint of bdkd.

    The network is ``key``, or else the average of ``name``, or else ``name`` itself.

    Returns:
        The classes of the training data, the name of the network, and its weights.
    """
    try:
        average = f"{name}{EMA_SUFFIX}"
        name = key or (average if average in state["ema"] else name)
        classes = (state.get("data") or {}).get("classes")
        return classes, name, network_weights(state, name, path)
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise RunError(f"{path} is not a complete checkpoint of bdkd; use another file") from error


def find_weights(
    content: Any, network: nn.Module, model: str, name: str, *, key: str | None = None,
    reset_head: bool = False,
) -> tuple[dict[str, Tensor], Match]:  # fmt: skip
    """Return the weights of a network from the content of a file, and where they were found.

    Args:
        content: the content of the file, with any structure.
        network: the network that needs the weights.
        model: name of the network's model.
        name: name of the network in the recipe. If the file contains several networks, the one with
            this name is preferred.
        key: the key of the state dict in the file, a prefix of its names, or both. Default: the
            network with the same name, then moving averages, as in timm.
        reset_head: do not return the weights of the classifier.

    Returns:
        The tensors by key of the network, and the match. Counters that are not in the file are
        missing.

    Raises:
        Misfit: no state dict in the content fits the network, or several fit.
    """
    head = head_keys(network)
    target = Target(
        model, network.state_dict(), layouts(network, model), head, head if reset_head else set()
    )
    found = state_dicts(content, everything=key is not None)
    matches = [match for k, tensors in found.items() for match in match_names(k, tensors, target)]
    if not matches:
        raise Misfit(no_state_dict(content))
    chosen = [match for match in matches if key is None or _is_at(match.place, key)]
    if not chosen:
        raise Misfit(no_such_key(str(key), [match.place for match in matches]))
    if key is None:
        chosen = _preferred([m for m in matches if 2 * len(m.names) >= len(target.own)], name)
    whole = _distinct([match for match in chosen if match.fits], target)
    if len(whole) > 1:
        raise Misfit(several([match.place for match in whole]))
    if not whole:
        best = max(chosen or matches, key=lambda match: (len(match.names), len(match.tensors)))
        raise Misfit(describe(best, target, [m.place for m in matches if m.fits]))
    (match,) = whole
    return match.weights(target), match


def _is_at(place: str, key: str) -> bool:
    return f".{place}.".startswith(f".{key}.") or f".{place}.".endswith(f".{key}.")


def _preferred(matches: list[Match], name: str) -> list[Match]:
    """Return the matches with the same name if there are any, and of these the moving averages if
    there are any."""
    same = {name, f"{name}_ema", f"ema_{name}"} if name not in WRAPPERS else set()
    matches = [m for m in matches if same & set(m.place.split("."))] or matches
    return [m for m in matches if EMA.search(m.place)] or matches


def _distinct(matches: list[Match], target: Target) -> list[Match]:
    """Return the matches without duplicates. Two layouts of names may find the same tensors."""
    found: list[tuple[Match, dict[str, Tensor]]] = []
    for match in matches:
        weights = match.weights(target)
        if not any(
            all(torch.equal(weights[k], known[k]) for k in weights.keys() & known.keys())
            for _, known in found
        ):
            found.append((match, weights))
    return [match for match, _ in found]


def network_weights(state: Mapping[str, Any], name: str, path: Path) -> dict[str, Any]:
    """Return the state dict of a network or an average from the state in a checkpoint of bdkd.

    Raises:
        RunError: the checkpoint (``path``) contains no such network.
    """
    if name in state["ema"]:
        return state["ema"][name]
    prefix, tensors = f"members.{name}.", state["networks"].items()
    weights = {key.removeprefix(prefix): x for key, x in tensors if key.startswith(prefix)}
    if not weights:
        names = sorted({key.split(".")[1] for key in state["networks"]} | {*state["ema"]})
        raise RunError(f"{path} contains no network {name!r}: it has {', '.join(names)}")
    return weights


def mismatched_keys(module: nn.Module, weights: Mapping[str, Any]) -> str:
    """Return the first mismatch between a state dict and a module, or an empty string."""
    own = module.state_dict()
    for key in own:
        if key not in weights:
            return f"it lacks {key!r}"
        if not isinstance(weights[key], torch.Tensor) or own[key].shape != weights[key].shape:
            came = tuple(getattr(weights[key], "shape", ()))
            return f"{key!r} has shape {came}, needed {tuple(own[key].shape)}"
    extra = [key for key in weights if key not in own]
    return f"it contains {extra[0]!r}, but the network does not" if extra else ""
