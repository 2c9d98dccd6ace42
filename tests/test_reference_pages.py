"""The reference: the parts that are made from the code are complete and up to date."""

import dataclasses
import importlib.util
import re
import tomllib
import typing
from pathlib import Path

import pytest
from bdkd_kernels.options import TABLE

from bdkd.bounds import check_value
from bdkd.cli import COMMANDS
from bdkd.cli.completion import argument_classes
from bdkd.cli.flags import fields_of, is_positional
from bdkd.config import NetworkConfig, Recipe, shipped_recipes
from bdkd.config.convert import convert
from bdkd.metrics import METRICS, OBJECTIVE_STATISTICS, OF_A_LINE
from bdkd.models import list_models
from bdkd.models.registry import MODELS
from bdkd.registry import SELECTIONS

DOCS = Path(__file__).parent.parent / "docs"
SECTION = re.compile(r"^## `\[([\w.]+)\]`\n(.*?)(?=^## |\Z)", re.M | re.S)
ROW = re.compile(r"^\| `(\w+)` \|.*\| `(\w+ = .+)` \|$", re.M)


@pytest.fixture(scope="module")
def generator():
    path = DOCS / "generate_reference.py"
    spec = importlib.util.spec_from_file_location("generate_reference", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def page(name: str) -> str:
    return (DOCS / "reference" / name).read_text("utf-8")


def test_the_pages_are_up_to_date(generator, registries):
    pages = generator.pages()
    assert [path.name for path in pages] == ["command-line.md", "metrics.md", "recipe.md"]
    outdated = [path.name for path, (text, new) in pages.items() if text != new]
    assert not outdated, f"run: python docs/generate_reference.py ({outdated})"


def test_plugins_do_not_change_the_pages(generator, registries):
    """The tables list what bdkd contains, also on a machine with plugins."""
    from bdkd import register_metric, register_objective
    from bdkd.objectives.options import MutualConfig

    register_objective("my-objective", MutualConfig)(type("Mine", (), {}))
    register_metric("my_metric")(lambda logits, labels: labels)
    assert all(text == new for text, new in generator.pages().values())


def options_of(section: str) -> set[str]:
    """Every key that a section can have."""
    selection = next((s for s in SELECTIONS if s.section == section), None)
    if selection is not None:
        names = [name for name in selection if not selection.is_foreign(name)]
        return {key for name in names for key in fields_of(selection[name].config)}
    return set(fields_of(kind_of(section)))


def kind_of(section: str) -> type:
    if section == "networks.NAME":
        return NetworkConfig
    return type(fields_of(Recipe)[section].default)


def test_every_option_of_a_recipe_has_a_row(registries):
    text = page("recipe.md")
    found = {name: {key for key, _ in ROW.findall(body)} for name, body in SECTION.findall(text)}
    named = {key for key, flag in fields_of(Recipe).items() if key != "networks"}
    in_sections = {name for name in named if dataclasses.is_dataclass(fields_of(Recipe)[name][1])}
    assert set(found) == {*in_sections, "networks.NAME"}
    for section, keys in found.items():
        assert keys == options_of(section), section
    before = text[: text.index("## `[data]`")]
    assert {key for key, _ in ROW.findall(before)} == named - in_sections


def test_every_example_is_valid(registries):
    """Each example has the type of its option and is within its bounds."""
    parts = [
        ("", page("recipe.md").partition("## `[data]`")[0]),
        *SECTION.findall(page("recipe.md")),
    ]
    checked = 0
    for section, body in parts:
        selection = next((s for s in SELECTIONS if s.section == section), None)
        kinds = [Recipe] if not section else [] if selection else [kind_of(section)]
        if selection is not None:
            kinds = [selection[n].config for n in selection if not selection.is_foreign(n)]
        for key, example in ROW.findall(body):
            hints = [typing.get_type_hints(k, include_extras=True).get(key) for k in kinds]
            (value,) = tomllib.loads(example).values()
            for hint in filter(None, hints):
                check_value(key, convert(value, hint, key), hint)
                checked += 1
            if section == "objective":
                [option.check(value) for option in TABLE if option.name == key]
    assert checked > 100


def test_every_command_and_option_has_a_row():
    text = page("command-line.md")
    for command in COMMANDS:
        body = re.search(rf"^## bdkd {command}\n(.*?)(?=^## |\Z)", text, re.M | re.S)[1]
        for kind in argument_classes(command).values():
            for key, flag in fields_of(kind).items():
                if key != "config" and not is_positional(flag):
                    assert f"`--{key.replace('_', '-')}`" in body, (command, key)


def test_every_metric_has_a_row(registries):
    text = page("metrics.md")
    built_in = [metric.key for metric in METRICS.values() if metric.of_samples is None]
    assert re.findall(r"^\| `(\w+)` \|", text, re.M) == built_in


def test_every_model_and_recipe_is_listed(registries):
    text = page("recipe.md")
    names = [name for name in list_models() if not MODELS.is_foreign(name)]
    missing = [name for name in [*names, *shipped_recipes()] if f"| `{name}` |" not in text]
    assert not missing


def test_every_key_of_a_log_line_is_explained():
    text = page("run-files.md")
    missing = [key for key in {*OF_A_LINE, *OBJECTIVE_STATISTICS} if f"`{key}`" not in text]
    assert not missing
