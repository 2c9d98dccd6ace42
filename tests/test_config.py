"""A recipe as a TOML file: what it keeps, what it names when it is wrong, and how two differ."""

import dataclasses

import pytest
from small_runs import TINY_RUN

from bdkd.config import (
    NetworkConfig,
    check_recipe,
    differing_keys,
    load_recipe,
    parse_recipe,
    to_toml,
)
from bdkd.errors import UsageError

TINY = load_recipe(TINY_RUN[0])


def named(name: str, **changes):
    """The tiny recipe with a third network."""
    network = NetworkConfig("resnet8", "student", **changes)
    return dataclasses.replace(TINY, networks={**TINY.networks, name: network})


@pytest.mark.parametrize("name", ["a", "B-2", "x_1", "ema", "s_emas", "9"])
def test_a_network_may_have_any_plain_name(name):
    check_recipe(named(name))


@pytest.mark.parametrize(
    "name",
    [
        "", "-a", "a b", "a.b", "\N{LATIN SMALL LETTER E WITH ACUTE}",
        "pupil_ema",  # of an average
        "step", "learning_rate", "mfu", "teacher_active",  # keys of metrics.jsonl
        "keys", "items", "training", "forward",  # attributes of torch.nn.ModuleDict
    ],
)  # fmt: skip
def test_a_name_that_means_something_else_is_refused(name):
    with pytest.raises(UsageError, match=f"^the network name '{name}' must be "):
        check_recipe(named(name))


def test_only_a_teacher_is_sharded_and_not_in_fp16():
    with pytest.raises(UsageError, match=r"networks.pupil.shard must be a teacher's option"):
        check_recipe(named("pupil", shard=True))
    teacher = dataclasses.replace(TINY.networks["teacher"], shard=True)
    recipe = dataclasses.replace(TINY, networks={**TINY.networks, "teacher": teacher})
    for precision in ("fp32", "bf16"):
        train = dataclasses.replace(recipe.train, precision=precision)
        check_recipe(dataclasses.replace(recipe, train=train))
    train = dataclasses.replace(recipe.train, precision="fp16")
    with pytest.raises(UsageError, match=r"networks.teacher.shard must be off with .* fp16"):
        check_recipe(dataclasses.replace(recipe, train=train))


@pytest.mark.parametrize(
    ("place", "line", "said"),
    [
        ("", 'sed = 1', "unknown key sed: did you mean 'seed'?"),
        ("[train]", "epoch = 2", "unknown key train.epoch: did you mean 'epochs'?"),
        ("[data.synthetic]", "image = 2", "unknown key data.synthetic.image: did you mean"),
        ("[networks.teacher]", "weight = 1", "unknown key networks.teacher.weight: did you mean"),
    ],
)  # fmt: skip
def test_a_key_that_does_not_exist_is_named_and_not_ignored(place, line, said):
    text = to_toml(TINY)
    text = text.replace(f"{place}\n", f"{place}\n{line}\n", 1) if place else f"{line}\n{text}"
    with pytest.raises(UsageError) as raised:
        parse_recipe(text, "mine.toml")
    assert str(raised.value).startswith(f"mine.toml: {said}")


def test_a_recipe_comes_back_from_its_file_with_every_value():
    """Also those that are false, zero or empty where the default is not."""
    recipe = dataclasses.replace(
        TINY, log=(), seed=0, threads=3, evaluate_every=4, max_steps=None,
        optimizer=dataclasses.replace(TINY.optimizer, nesterov=False, momentum=0.0,
                                      betas=(0.5, 0.25)),
        train=dataclasses.replace(TINY.train, channels_last=False, tf32=False, clip_norm=2.5),
        schedule=dataclasses.replace(TINY.schedule, milestones=(1.5, 2.0)),
        data=dataclasses.replace(TINY.data, progressive=((0, 8), (3, 16)), validation=0.0),
    )  # fmt: skip
    again = parse_recipe(to_toml(recipe), "again")
    assert again == recipe
    assert differing_keys(again, recipe) == []


def test_two_recipes_differ_in_the_keys_that_differ():
    """Also in one that is absent on one side, or None there."""
    other = dataclasses.replace(named("pupil"), seed=1, threads=None)
    other = dataclasses.replace(other, train=dataclasses.replace(other.train, clip_norm=1.0))
    expected = ["seed", "threads", "train.clip_norm"]
    pupil = [f"networks.pupil.{field.name}" for field in dataclasses.fields(NetworkConfig)]
    pupil.remove("networks.pupil.options")  # an empty table has no key
    for a, b in ((TINY, other), (other, TINY)):
        assert differing_keys(a, b) == sorted([*expected, *pupil])
