"""Check the bounds of the options, and the options that depend on each other."""

import dataclasses
import math
import re
import typing
from collections.abc import Iterator
from typing import Any

from bdkd.config.options import Interval, Recipe
from bdkd.errors import UsageError
from bdkd.metrics import RESERVED

# Names of networks and recipes become keys and folders.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def check_recipe(recipe: Recipe) -> None:
    """Raise ``UsageError`` with the key of the first invalid value of a recipe."""
    for key, value, interval in _numbers(recipe, type(recipe), ""):
        for number in value if isinstance(value, tuple) else (value,):
            if interval is not None and not interval.contains(number):
                raise UsageError(f"{key} must be {interval}, got {value}")
            if isinstance(number, float) and not math.isfinite(number):
                raise UsageError(f"{key} must be finite, got {value}")
    for key, value, fits, needed in (*_relations(recipe), *_networks(recipe)):
        if not fits:
            raise UsageError(f"{key} must be {needed}, got {value}")


def _numbers(value: Any, kind: Any, key: str) -> Iterator[tuple[str, Any, Interval | None]]:
    """Yield every number, or tuple of numbers, with its key and its bounds."""
    if dataclasses.is_dataclass(value):
        hints = typing.get_type_hints(type(value), include_extras=True)
        for field in dataclasses.fields(value):
            name = f"{key}.{field.name}" if key else field.name
            yield from _numbers(getattr(value, field.name), hints[field.name], name)
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _numbers(item, typing.get_args(kind)[1], f"{key}.{name}")
    elif _is_number(value) or (isinstance(value, tuple) and all(map(_is_number, value))):
        yield key, value, _interval(kind)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _interval(kind: Any) -> Interval | None:
    """Return the bounds in a type. The type may be optional, or a tuple of bounded numbers."""
    if typing.get_origin(kind) is typing.Annotated:
        return next((x for x in kind.__metadata__ if isinstance(x, Interval)), None)
    return next(filter(None, map(_interval, typing.get_args(kind))), None)


Check = tuple[str, object, bool, str]  # key, value, whether the value is valid, what is needed


def _relations(recipe: Recipe) -> list[Check]:
    t, d = recipe.train, recipe.data
    epochs = [epoch for epoch, _ in d.progressive]
    operations, magnitude = d.rand_augment or (1, 0)
    return [
        ("name", recipe.name, NAME.fullmatch(recipe.name) is not None,
         "letters, digits, -, _ and ."),
        ("networks", "none", len(recipe.networks) > 0, "at least one network"),
        ("train.accumulate", t.accumulate,
         1 <= t.accumulate <= t.batch_size and t.batch_size % t.accumulate == 0,
         f"a divisor of train.batch_size ({t.batch_size})"),
        ("train.select", t.select, t.select == "last" or d.validation > 0,
         "last if data.validation is 0 (no images are held out to select the best weights)"),
        ("data.progressive", d.progressive,
         all(epoch >= 0 and 8 <= side <= 4096 for epoch, side in d.progressive)
         and epochs == sorted(set(epochs)),
         "pairs of a first epoch, ascending, and a side in [8, 4096]"),
        ("data.rand_augment", d.rand_augment, operations >= 1 and 0 <= magnitude <= 10,
         "a number of operations of at least 1, and a magnitude in [0, 10]"),
        ("data.synthetic.images", d.synthetic.images,
         d.synthetic.images >= 10 * d.synthetic.classes,
         "at least ten for each of data.synthetic.classes"),
    ]  # fmt: skip


def _networks(recipe: Recipe) -> Iterator[Check]:
    from torch import nn  # names of attributes of nn.ModuleDict cannot be names of networks

    for name, network in recipe.networks.items():
        usable = NAME.fullmatch(name) is not None and "." not in name and name not in RESERVED
        usable = usable and not hasattr(nn.ModuleDict(), name) and not name.endswith("_ema")
        yield (
            f"the network name {name!r}", name, usable,
            "letters, digits, - and _, not ending in _ema, no key of metrics.jsonl and no "
            "attribute of torch.nn.ModuleDict",
        )  # fmt: skip
        for fits, needed in (
            (network.role == "teacher", "a teacher's option: an exported student is on one device"),
            (recipe.train.precision != "fp16",
             "off with train.precision fp16, whose loss scale needs all gradients: use bf16"),
        ):  # fmt: skip
            yield f"networks.{name}.shard", network.shard, fits or not network.shard, needed
