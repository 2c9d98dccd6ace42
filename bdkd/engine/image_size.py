"""The size of the images that a run uses, and whether the networks take it."""

import dataclasses

from bdkd.config import Recipe
from bdkd.errors import UsageError
from bdkd.models.registry import fixed_image_size_of, image_size_of, list_models

LARGEST_SMALL_IMAGE = 112  # pixels; the networks for small images do not reduce them at first


def with_image_size(recipe: Recipe, side: int | None = None) -> Recipe:
    """Return a recipe with ``data.image_size``, if it is not set and the data source leaves it to
    the networks.

    Args:
        side: the size. Default: the one that the first teacher was made for, or else the first
            other network; unchanged if all networks take small images of any size.

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
    """Return a warning for each network for small images that sees large ones, if there is a
    network of the same name for large images.

    Args:
        side: of the images, in pixels.
    """
    return [
        f"networks.{name}: {network.model} is a network for small images, as in CIFAR, and these "
        f"have {side} pixels: for large images there is imagenet_{network.model}"
        for name, network in recipe.networks.items()
        if side > LARGEST_SMALL_IMAGE and f"imagenet_{network.model}" in list_models()
    ]


def with_image_size_of(recipe: Recipe, stored: Recipe) -> Recipe:
    """Return a recipe for comparison with the recipe of a run, whose ``data.image_size`` was
    resolved."""
    if recipe.data.source != stored.data.source:
        return recipe
    return with_image_size(recipe, stored.data.image_size)


def check_image_size(recipe: Recipe) -> None:
    """Raise ``UsageError`` if a network takes images of another size only.

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
