"""Test every numeric option of a recipe at its bounds: the last accepted value, and the first
refused value, whose message must name the option.

The bounds in this file are copied from the documentation of the options, not from the code. An
option without a row fails a test.
"""

import dataclasses
import math
import typing
from types import UnionType
from typing import Annotated

import pytest

from bdkd.bounds import Bounds, check_value
from bdkd.config import Recipe, load_recipe, select
from bdkd.config.options import sections
from bdkd.data import InMemoryConfig
from bdkd.data.imagenet.options import ImageNetConfig
from bdkd.errors import UsageError
from bdkd.registry import SELECTIONS

ABOVE_0, BELOW_0 = 5e-324, -5e-324  # the floating-point numbers next to 0 and 1
ABOVE_1, BELOW_1 = math.nextafter(1, 2), math.nextafter(1, 0)

COUNT = ([1], [0, -1])  # at least 1
SHARE = ([0.0, 1.0], [BELOW_0, ABOVE_1])  # in [0, 1]
NOT_NEGATIVE = ([0.0, 1e9], [BELOW_0])
POSITIVE = ([ABOVE_0, 1e9], [0.0, BELOW_0])
OPEN_1 = ([0.0, BELOW_1], [BELOW_0, 1.0])  # in [0, 1)

# Option: (accepted values, refused values). The batch size is 64, except for train.batch_size.
EDGES: dict[str, tuple[list, list]] = {
    "seed": ([0, 2**63 - 1], [-1, 2**63]),
    "threads": COUNT,
    "max_steps": COUNT,
    "evaluate_every": COUNT,
    "log_every": COUNT,
    "data.image_size": ([8, 4096], [7, 4097]),
    "data.validation": OPEN_1,
    "data.test_share": ([ABOVE_0, BELOW_1], [0.0, 1.0]),
    "data.train_images": ([2], [1]),
    "data.label_noise": SHARE,
    "data.pixel_noise": SHARE,
    "data.crop": ([0], [-1]),
    "data.cutout": ([0], [-1]),
    "data.workers": ([0], [-1]),
    "data.smallest_crop": ([ABOVE_0, 1.0], [0.0, ABOVE_1]),
    "data.progressive": (
        [(), ((0, 8),), ((0, 4096), (1, 8))],
        [((0, 7),), ((0, 4097),), ((-1, 8),), ((1, 8), (1, 16)), ((2, 8), (1, 16))],
    ),
    "data.rand_augment": ([(1, 0), (1, 10)], [(0, 5), (1, -1), (1, 11)]),
    "data.erasing": SHARE,
    "data.mixup": NOT_NEGATIVE,
    "data.cutmix": NOT_NEGATIVE,
    "data.images": ([100], [99]),  # ten images of each of 10 classes
    "data.classes": ([2], [1]),
    "data.characters": ([2], [1]),
    "networks.student.learning_rate": POSITIVE,
    "objective.label_smoothing": SHARE,
    "objective.target_kd": ([0.0, 1e9], [BELOW_0, 1.1e9]),
    "objective.other_kd": ([0.0, 1e9], [BELOW_0, 1.1e9]),
    "objective.warmup": NOT_NEGATIVE,
    "optimizer.learning_rate": POSITIVE,
    "optimizer.momentum": OPEN_1,
    "optimizer.betas": (
        [(0.0, 0.0), (BELOW_1, BELOW_1)],
        [(BELOW_0, 0.9), (0.9, BELOW_0), (1.0, 0.9), (0.9, 1.0)],
    ),
    "optimizer.weight_decay": NOT_NEGATIVE,
    "schedule.warmup": NOT_NEGATIVE,
    "schedule.milestones": ([(), (0.0, 0.0)], [(1.0, BELOW_0)]),
    "schedule.factor": ([ABOVE_0, 1.0], [0.0, ABOVE_1]),
    "schedule.final": SHARE,
    "train.epochs": COUNT,
    "train.batch_size": ([2], [1, 0]),
    "train.accumulate": ([1, 2, 32, 64], [0, -1, 3, 128]),
    "train.clip_norm": POSITIVE,
    "train.ema_decay": ([ABOVE_0, BELOW_1], [0.0, 1.0]),
    "train.max_skipped": COUNT,
    "checkpoint.every_steps": COUNT,
    "checkpoint.every_minutes": POSITIVE,
    "checkpoint.keep": COUNT,
    "distributed.timeout": POSITIVE,
    "distributed.grace": POSITIVE,
}
# Options of the fused loss. bdkd_kernels defines their bounds; see tests/objectives.
OF_THE_LOSS = {f"objective.{name}" for name in (
    "temperature", "gamma", "student_ce", "student_kd", "teacher_ce", "teacher_kd",
)}  # fmt: skip
# Selections of the recipe digits. Options of other sources or optimizers need another selection.
NEEDED = {
    "data.images": ("data", "synthetic"), "data.classes": ("data", "synthetic"),
    "data.test_share": ("data", "images"), "data.characters": ("data", "glyphs"),
    "optimizer.betas": ("optimizer", "adamw"),
    **{f"objective.{name}": ("objective", "dkd") for name in ("target_kd", "other_kd", "warmup")},
    **{f"data.{field.name}": ("data", "imagenet") for field in dataclasses.fields(ImageNetConfig)
       if not hasattr(InMemoryConfig, field.name)},
}  # fmt: skip


def changed(values, path: list[str], value: object):
    """Return a copy of nested dataclasses and dicts with one value replaced."""
    name, *rest = path
    inner = values[name] if isinstance(values, dict) else getattr(values, name)
    new = changed(inner, rest, value) if rest else value
    return {**values, name: new} if isinstance(values, dict) else _replace(values, name, new)


def _replace(values, name: str, new: object):
    return dataclasses.replace(values, **{name: new})


def recipe_with(option: str, value: object) -> Recipe:
    recipe = load_recipe("digits")
    assert recipe.train.batch_size == 64
    recipe = changed(recipe, ["train", "select"], "last")
    if option in NEEDED:
        recipe = select(recipe, *NEEDED[option])
    if option == "data.classes":
        recipe = changed(recipe, ["data", "images"], 100)
    return changed(recipe, option.split("."), value)


@pytest.mark.parametrize("option", EDGES)
def test_an_option_is_accepted_up_to_its_bound_and_refused_beyond(option):
    accepted, refused = EDGES[option]
    for value in accepted:
        recipe_with(option, value)
    for value in refused:
        with pytest.raises(UsageError) as raised:
            recipe_with(option, value)
        assert str(raised.value).startswith(f"{option} must be "), value
        assert str(raised.value).endswith(f", got {value}"), value


@pytest.mark.parametrize(
    ("option", "refused"),
    [("temperature", 0.9e-4), ("temperature", 1.1e4), ("student_ce", -0.1), ("student_ce", 1.1e9)],
)
def test_dkd_has_the_same_bounds_as_the_fused_loss(option, refused):
    """The fused loss checks these options of other objectives. DKD does not use it."""
    recipe = select(load_recipe("digits"), "objective", "dkd")
    with pytest.raises(UsageError, match=rf"^objective\.{option} must be in \["):
        changed(recipe, ["objective", option], refused)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_no_option_takes_a_number_that_is_not_finite(value):
    for option in sorted(numeric_options()):
        example = EDGES[option][0][-1] if option in EDGES else 1.0
        if isinstance(example, float):
            wrong: object = value
        elif isinstance(example, tuple) and example and isinstance(example[0], float):
            wrong = (example[0], value)
        else:
            continue  # TOML and the command line do not accept "nan" for an integer
        with pytest.raises(UsageError, match=option.replace(".", r"\.")):
            recipe_with(option, wrong)


def numeric(kind: type, prefix: str) -> set[str]:
    """Return the dotted names of the options of a dataclass that contain numbers, also in
    tuples."""
    types = typing.get_type_hints(kind)
    names = {field.name for field in dataclasses.fields(kind)}
    return {prefix + name for name in names if leaves(types[name]) & {int, float}}


def numeric_options() -> set[str]:
    """Return the numeric options of every section, objective, data source and optimizer."""
    recipe = load_recipe("digits")
    kinds = [("", Recipe), *((f"{key}.", type(part)) for key, part in sections(recipe).items())]
    for selection in SELECTIONS:
        kinds += [(f"{selection.section}.", entry.config) for entry in selection.values()]
    kinds = [(prefix, kind) for prefix, kind in kinds if prefix != "networks.teacher."]
    return set().union(*(numeric(kind, prefix) for prefix, kind in kinds))


def leaves(type_: object) -> set[object]:
    """Return the types inside a union or tuple, and none for a dict."""
    if typing.get_origin(type_) in (UnionType, typing.Union, tuple):
        return set().union(*(leaves(part) for part in typing.get_args(type_)))
    return {type_}


def test_every_numeric_option_has_a_row():
    assert numeric_options() == EDGES.keys() | OF_THE_LOSS


PAIR = tuple[Annotated[int, Bounds(ge=1)], Annotated[int, Bounds(ge=0, le=10)]]


@pytest.mark.parametrize(
    ("kind", "accepted", "refused", "needed"),
    [
        (PAIR, (1, 0), (1, 11), r"in \[0, 10\]"),
        (PAIR, (2, 10), (0, 10), "at least 1"),
        (Annotated[float | None, Bounds(lt=5)], None, 5.0, "below 5"),
        (Annotated[Annotated[float, Bounds(le=5)] | None, "text"], 5.0, 6.0, "at most 5"),
        (tuple[tuple[float, float], ...], ((0.0, 1.0),), ((0.0, math.nan),), "finite"),
        (int, 2**63 - 1, math.inf, "finite"),
        (int, -(2**63), 2**63, "within 64 bits"),
        (bool, True, math.nan, "finite"),
        (int | tuple[Annotated[int, Bounds(ge=1)], ...], (1, 2, 3), (1, 2, 0), "at least 1"),
        (Annotated[int, Bounds(ge=1)] | tuple[int, ...], (0, 0), 0, "at least 1"),
        (tuple[float, float], (0.5,), (math.nan,), "finite"),
    ],
)
def test_bounds_apply_to_each_number_in_a_type(kind, accepted, refused, needed):
    check_value("x", accepted, kind)
    with pytest.raises(UsageError, match=f"^x must be {needed}, got"):
        check_value("x", refused, kind)
