"""Determine the image size of a run, and check that the networks support it."""

import dataclasses

from bdkd.config import Recipe
from bdkd.errors import UsageError
from bdkd.models.registry import fixed_image_size_of, image_size_of, list_models

LARGEST_SMALL_IMAGE = 112  # pixels; networks for small images do not downsample in the first layers


def with_image_size(recipe: Recipe, side: int | None = None) -> Recipe:
    """Return a recipe whose ``data.image_size`` is set.

    The recipe does not change if the option is already set, or if the networks do not determine the
    size of this data source.

    Args:
        side: the size in pixels. Default: the input size of the first teacher, or else of the first
            student. The recipe does not change if all networks accept any size.

    Raises:
        RunError: timm is missing or cannot be imported.
    """
    data = recipe.data
    if data.image_size is not None or not data.image_size_from_networks():
        return recipe
    if side is None:
        networks = sorted(recipe.networks.values(), key=lambda n: n.role != "teacher")
        sizes = (image_size_of(network.model, network.options) for network in networks)
        side = next((size for size in sizes if size is not None), None)
    if side is None:
        return recipe
    return dataclasses.replace(recipe, data=dataclasses.replace(data, image_size=side))


def mistaken_models(recipe: Recipe, side: int) -> list[str]:
    """Return a warning for each network for small images that would train on large images, if bdkd
    has a model ``imagenet_NAME`` for large images.

    Args:
        side: width of the images in pixels.
    """
    return [
        f"networks.{name}: {network.model} is a network for small images such as CIFAR's, and the "
        f"images have {side} pixels: use imagenet_{network.model} for large images"
        for name, network in recipe.networks.items()
        if side > LARGEST_SMALL_IMAGE and f"imagenet_{network.model}" in list_models()
    ]


def with_image_size_of(recipe: Recipe, stored: Recipe) -> Recipe:
    """Return a recipe with the ``data.image_size`` of a run's stored recipe, so that the two can be
    compared. A run stores the size that it determined."""
    if recipe.data.source != stored.data.source:
        return recipe
    return with_image_size(recipe, stored.data.image_size)


def check_image_size(recipe: Recipe) -> None:
    """Raise ``UsageError`` if a network only supports images of another size.

    Raises:
        RunError: timm is missing or cannot be imported.
    """
    sizes = {side for side in recipe.data.training_sizes() if side is not None}
    if not sizes:
        return
    for name, network in recipe.networks.items():
        fixed = fixed_image_size_of(network.model, network.options)
        if fixed is not None and (wrong := sorted(sizes - {fixed})):
            raise UsageError(
                f"networks.{name}: {network.model} takes images of {fixed}x{fixed} pixels, and "
                f"data.image_size or data.progressive is {wrong[0]}: set them to {fixed}, "
                "or the option img_size of the network"
            )
