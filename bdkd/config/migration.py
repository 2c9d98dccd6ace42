"""Convert recipes of older versions, such as the ``config.toml`` of an old run."""

from typing import Any

Table = dict[str, Any]

# Before format 3 of checkpoints, [data] contained the options of all sources, and [optimizer]
# contained the options of all optimizers. These are the defaults of those options.
_IMAGENET: Table = {
    "format": "folder", "loader": "auto", "smallest_crop": 0.08, "progressive": [], "erasing": 0.0,
    "mixup": 0.0, "cutmix": 0.0,
}  # fmt: skip
_IN_MEMORY: Table = {"pixel_noise": 0.0, "crop": 0, "crop_padding": "zero", "cutout": 0}


def migrate(recipe: Table) -> Table:
    """Return the tables of a recipe in the current layout.

    In the old layout, every ``config.toml`` of a run contains ``[data.synthetic]``.
    """
    data, optimizer = recipe.get("data"), recipe.get("optimizer")
    if not isinstance(data, dict) or not isinstance(data.get("synthetic"), dict):
        return recipe
    data = dict(data)
    synthetic, source = data.pop("synthetic"), data.get("source", "digits")
    if source == "synthetic":
        data |= synthetic
    foreign = _IN_MEMORY if source == "imagenet" else _IMAGENET
    data = {key: value for key, value in data.items() if foreign.get(key, _USED) != value}
    recipe = {**recipe, "data": data}
    if isinstance(optimizer, dict):
        sgd = optimizer.get("name", "sgd") == "sgd"
        foreign_keys = ("betas",) if sgd else ("momentum", "nesterov")
        recipe["optimizer"] = {k: v for k, v in optimizer.items() if k not in foreign_keys}
    return recipe


def migrate_of_run(recipe: Table) -> Table:
    """Return a run's recipe with the options that an old run used but did not store.

    Runs of older versions with the source ``folder`` resized images to 32x32 pixels by default, and
    did not read a ``val`` folder if there was a ``test`` folder.
    """
    data = recipe.get("data")
    if not isinstance(data, dict) or data.get("source") != "folder" or "image_size" in data:
        return recipe
    return {**recipe, "data": {**data, "image_size": 32, "use_val_split": False}}


_USED = object()
