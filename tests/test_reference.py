"""The pages of the reference that docs/generate_reference.py writes from the code."""

import dataclasses
import re
import sys
from pathlib import Path
from typing import get_type_hints

import pytest

from bdkd.bounds import check_value
from bdkd.config import options as sections
from bdkd.registry import SELECTIONS

DOCS = Path(__file__).parent.parent / "docs"
sys.path.insert(0, str(DOCS))
import generate_reference  # noqa: E402

FIELDS = [
    *(("", sections.Recipe, field) for field in dataclasses.fields(sections.Recipe)
      if field.name not in generate_reference._SECTION_FIELDS),
    *((section, kind, field) for section, kind in generate_reference.SECTIONS.items()
      for field in dataclasses.fields(kind)),
    *((selection.section, entry.config, field) for selection in SELECTIONS
      for name, entry in selection.items() if not selection.is_foreign(name)
      for field in dataclasses.fields(entry.config)),
]  # fmt: skip


def key_of(section: str, field: dataclasses.Field) -> str:
    return f"{section}.{field.name}" if section else field.name


@pytest.mark.parametrize("path", generate_reference.pages(), ids=lambda path: path.stem)
def test_a_page_is_up_to_date(path):
    """If this fails, run python docs/generate_reference.py."""
    assert path.read_text("utf-8") == generate_reference.pages()[path]


@pytest.mark.parametrize(
    ("section", "kind", "field"), FIELDS, ids=lambda value: getattr(value, "name", None)
)
def test_the_example_of_an_option_is_valid_and_not_its_default(section, kind, field):
    key = key_of(section, field)
    example = generate_reference.EXAMPLES[key]
    check_value(key, example, get_type_hints(kind, include_extras=True)[field.name])
    defaults = {
        other.default for other_section, _, other in FIELDS if key_of(other_section, other) == key
    } - {dataclasses.MISSING}
    assert {example if not isinstance(example, dict) else None} != defaults


def test_every_example_belongs_to_an_option():
    assert set(generate_reference.EXAMPLES) == {key_of(s, field) for s, _, field in FIELDS}


def test_every_option_of_the_command_line_is_on_the_page():
    """The help of a recipe lists the options as the parser knows them."""
    from bdkd.cli.flags import flags_of
    from bdkd.cli.train import Arguments
    from bdkd.config import load_recipe

    page = (DOCS / "reference" / "recipe.md").read_text("utf-8")
    keys = set(re.findall(r"^\| `(\w+)` \|", page, re.M))
    recipe = load_recipe("imagenet-r50-mbv1")
    flags = flags_of(Arguments(recipe=recipe.name, config=recipe))
    own = {field.name for field in dataclasses.fields(Arguments)}
    for flag in flags:
        name = flag.removeprefix("--").split(".")[-1].replace("-", "_")
        assert {name, name.removeprefix("no_")} & (keys | own), flag
