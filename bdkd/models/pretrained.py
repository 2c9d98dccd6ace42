"""Find the pretrained weights of a model by its name."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch

from bdkd.errors import UsageError

from .key_names import counterpart
from .published import PublishedWeights, timm_weights, torchvision_weights
from .registry import create_model, list_models

# torchvision trained these on images with another normalisation than its other networks. Its own
# builders set the option transform_input for these weights.
_TRANSFORM_INPUT = ("torchvision:googlenet", "torchvision:inception_v3")


def published_weights(
    model: str, options: Mapping[str, Any] = MappingProxyType({})
) -> PublishedWeights | None:
    """Return the pretrained weights of a model, or None if there are none or the model is unknown.

    Networks of bdkd that have a counterpart in torchvision use the weights of torchvision.

    Args:
        model: a name that :func:`bdkd.models.create_model` takes.
        options: options of the model.

    Raises:
        RunError: timm or torchvision is missing or cannot be imported.
    """
    library, colon, name = model.partition(":")
    if colon and library.lower() == "timm":
        return timm_weights(name, options)
    known = counterpart(model, "torchvision")
    return None if known is None else torchvision_weights(known)


def has_published_weights(model: str) -> bool:
    """Return whether pretrained weights of a model exist. This works without an internet
    connection. See :func:`published_weights` for errors."""
    return published_weights(model) is not None


def check_published(name: str, model: str, options: Mapping[str, Any]) -> None:
    """Check that pretrained weights of a network exist, without reading them.

    Args:
        name: name of the network in the recipe, for messages.
        model: model of the network.
        options: options of the model.

    Raises:
        UsageError: no pretrained weights exist, or they need another option.
        RunError: timm or torchvision is missing or cannot be imported.
    """
    if published_weights(model, options) is None:
        try:
            with torch.device("meta"):
                create_model(model, 10, **options)
        except ValueError as error:  # an unknown model or option
            raise UsageError(f"networks.{name}: {error}") from error
        own = ", ".join(known for known in list_models() if counterpart(known, "torchvision"))
        raise UsageError(
            f"networks.{name}.weights cannot be pretrained: no weights of {model} are published; "
            "choose a model of timm or torchvision (bdkd models PATTERN lists them), or one of "
            f"{own}"
        )
    if model.lower() in _TRANSFORM_INPUT and options.get("transform_input") is not True:
        raise UsageError(
            f"networks.{name}.options.transform_input must be true with the pretrained weights of "
            f"{model}, which were trained with another normalisation of the images"
        )
