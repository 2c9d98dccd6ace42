"""Recipes as TOML files: round trips, messages about wrong keys and values, and differences."""

import dataclasses

import pytest
from small_runs import TINY_RUN

from bdkd.cli.train import parse
from bdkd.config import (
    DataConfig,
    NetworkConfig,
    OptimizerConfig,
    differing_keys,
    load_recipe,
    parse_recipe,
    select,
    to_toml,
)
from bdkd.config.options import sections
from bdkd.errors import UsageError
from bdkd.registry import OPTIMIZERS, SOURCES

TINY = load_recipe(TINY_RUN[0])


def named(name: str, **changes):
    """Return the tiny recipe with a third network."""
    network = NetworkConfig("resnet8", "student", **changes)
    return dataclasses.replace(TINY, networks={**TINY.networks, name: network})


@pytest.mark.parametrize("name", ["a", "B-2", "x_1", "ema", "s_emas", "9"])
def test_a_network_may_have_any_plain_name(name):
    named(name)


@pytest.mark.parametrize(
    "name",
    [
        "", "-a", "a b", "a.b", "\N{LATIN SMALL LETTER E WITH ACUTE}",
        "pupil_ema",  # the name of an average
        "step", "learning_rate", "mfu", "teacher_active",  # keys of metrics.jsonl
        "keys", "items", "training", "forward",  # attributes of torch.nn.ModuleDict
    ],
)  # fmt: skip
def test_reserved_and_invalid_network_names_are_refused(name):
    with pytest.raises(UsageError, match=f"^the network name '{name}' must be "):
        named(name)


def test_only_a_teacher_is_sharded_and_not_in_fp16():
    with pytest.raises(UsageError, match=r"networks.pupil.shard must be false for a student"):
        named("pupil", shard=True)
    teacher = dataclasses.replace(TINY.networks["teacher"], shard=True)
    recipe = dataclasses.replace(TINY, networks={**TINY.networks, "teacher": teacher})
    for precision in ("fp32", "bf16"):
        train = dataclasses.replace(recipe.train, precision=precision)
        dataclasses.replace(recipe, train=train)
    train = dataclasses.replace(recipe.train, precision="fp16")
    with pytest.raises(UsageError, match=r"networks.teacher.shard must be false with .* fp16"):
        dataclasses.replace(recipe, train=train)


@pytest.mark.parametrize(
    ("place", "line", "said"),
    [
        ("", 'sed = 1', "unknown key sed: did you mean 'seed'?"),
        ("[train]", "epoch = 2", "unknown key train.epoch: did you mean 'epochs'?"),
        ("[data]", "image = 2", "unknown key data.image: did you mean 'images'?"),
        ("[networks.teacher]", "weight = 1", "unknown key networks.teacher.weight: did you mean"),
    ],
)  # fmt: skip
def test_unknown_keys_are_refused_with_a_suggestion(place, line, said):
    text = to_toml(TINY)
    text = text.replace(f"{place}\n", f"{place}\n{line}\n", 1) if place else f"{line}\n{text}"
    with pytest.raises(UsageError) as raised:
        parse_recipe(text, "mine.toml")
    assert str(raised.value).startswith(f"mine.toml: {said}")


def test_a_recipe_keeps_all_values_when_it_is_written_and_read():
    """This includes values that are false, 0 or empty while the default is not."""
    recipe = dataclasses.replace(
        TINY, log=(), seed=0, threads=3, evaluate_every=4, max_steps=None,
        optimizer=OPTIMIZERS.configure("adamw", betas=(0.5, 0.25)),
        train=dataclasses.replace(TINY.train, channels_last=False, tf32=False, clip_norm=2.5,
                                  select="last"),
        schedule=dataclasses.replace(TINY.schedule, milestones=(1.5, 2.0)),
        data=SOURCES.configure("imagenet", progressive=((0, 8), (3, 16)), validation=0.0),
    )  # fmt: skip
    again = parse_recipe(to_toml(recipe), "again")
    assert again == recipe
    assert differing_keys(again, recipe) == []


def test_differing_keys_returns_all_keys_with_different_values():
    """This includes keys that are missing or None in one recipe."""
    other = dataclasses.replace(named("pupil"), seed=1, threads=None)
    other = dataclasses.replace(other, train=dataclasses.replace(other.train, clip_norm=1.0))
    expected = ["seed", "threads", "train.clip_norm"]
    pupil = [f"networks.pupil.{field.name}" for field in dataclasses.fields(NetworkConfig)]
    pupil.remove("networks.pupil.options")  # an empty table has no key
    for a, b in ((TINY, other), (other, TINY)):
        assert differing_keys(a, b) == sorted([*expected, *pupil])


def test_a_parsed_section_has_an_attribute_for_each_option():
    """msgspec does not set attributes that have their default, so vars() would miss them."""
    for part in sections(parse_recipe('name = "x"\n[networks.s]\nmodel = "resnet8"\n'
                                      'role = "student"', "text")).values():  # fmt: skip
        assert vars(part) == dataclasses.asdict(part)


def test_a_section_must_have_the_class_of_the_selected_item():
    with pytest.raises(UsageError, match="data must be a InMemoryConfig for the data source 'dig"):
        dataclasses.replace(TINY, data=DataConfig("digits"))
    with pytest.raises(UsageError, match="unknown optimizer 'sdg': did you mean 'sgd'"):
        dataclasses.replace(TINY, optimizer=OptimizerConfig("sdg"))


@pytest.mark.parametrize(
    ("options", "section", "name"),
    [
        (["--objective.name", "kd", "--objective.name=dml"], "objective", "dml"),
        (["--optimizer.name=adamw", "--optimizer.name", "sgd"], "optimizer", "sgd"),
        (["--data.source", "synthetic", "--data.source", "digits"], "data", "digits"),
    ],
)
def test_the_last_value_of_a_repeated_selection_counts(options, section, name):
    recipe = parse(["digits", *options], load_recipe("digits")).config
    assert getattr(recipe, section) == getattr(
        select(load_recipe("digits"), section, name), section
    )


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--networks.student.options", "width", "0.5"], {"width": 0.5}),
        (["--networks.student.options.width", "2"], {"width": 2}),
        (["--networks.student.options.width=2", "--networks.student.options.width", "-1"],
         {"width": -1}),
        (["--networks.student.options", "a", "true", "b", "text", "c", "1e-3"],
         {"a": True, "b": "text", "c": 1e-3}),
        (["--networks.student.model", "vgg8"], {}),
        (["--networks.student.model", "resnet18", "--networks.student.options.zero-init-residual",
          "True"], {"zero_init_residual": True}),
    ],
)  # fmt: skip
def test_options_of_models_can_be_passed_in_two_forms(options, expected):
    recipe = load_recipe("digits")
    assert parse(["digits", *options], recipe).config.networks["student"].options == expected
    set_before = named("student", options={"width": 0.1})
    other = {"resnet18", "vgg8"} & {*options}
    merged = {**expected} if other else {"width": 0.1, **expected}
    assert parse(["tiny", *options], set_before).config.networks["student"].options == merged


@pytest.mark.parametrize("spelled", ["my_net", "my-net"])
def test_network_names_may_contain_hyphens_instead_of_underscores(spelled):
    options = [f"--networks.{spelled}.options", "width", "0.5", f"--networks.{spelled}.frozen"]
    network = parse(["tiny", *options], named("my_net")).config.networks["my_net"]
    assert (network.options, network.frozen) == ({"width": 0.5}, True)
    options = [f"--networks.{spelled}.model", "vgg8"]
    network = parse(["tiny", *options], named("my_net", options={"width": 1.0})).config.networks
    assert (network["my_net"].model, network["my_net"].options) == ("vgg8", {})


def test_options_of_models_come_in_pairs():
    for options in (["--networks.student.options", "width"], ["--networks.student.options"]):
        with pytest.raises(UsageError, match=r"networks\.student\.options needs pairs of name and"):
            parse(["digits", *options], load_recipe("digits"))
