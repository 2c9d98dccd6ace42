"""The short help and the complete help of the commands that take a recipe."""

import re

import pytest

from bdkd.cli import main
from bdkd.cli.benchmark import HELP as BENCHMARK
from bdkd.cli.compare import HELP as COMPARE
from bdkd.cli.completion import command_flags
from bdkd.cli.help import COMMON
from bdkd.cli.shortcuts import SHORTCUTS

WITH_RECIPE = ["train", "compare", "benchmark"]
OMITTED = {"train": set(), "compare": set(COMPARE.omitted), "benchmark": set(BENCHMARK.omitted)}


def help_of(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    out, err = capsys.readouterr()
    assert (ended.value.code, err) == (0, "")
    return out


@pytest.mark.parametrize("command", WITH_RECIPE)
@pytest.mark.parametrize("recipe", [[], ["digits"]], ids=["no recipe", "recipe"])
def test_help_fits_one_screen_of_80_columns(command, recipe, capsys):
    lines = help_of(capsys, command, *recipe, "--help").splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("command", WITH_RECIPE)
def test_every_option_of_the_short_help_exists(command, capsys):
    text = help_of(capsys, command, "digits", "--help")
    shown = {flag.replace("NAME", "student") for flag in re.findall(r"^  (--\S+)", text, re.M)}
    assert shown <= command_flags(command).keys()
    assert len(shown) >= 18
    expected = {*COMMON, *SHORTCUTS} - OMITTED[command]
    assert shown >= {name.replace("NAME", "student") for name in expected}


def test_the_short_help_shows_choices_and_values_of_the_recipe(capsys):
    digits = help_of(capsys, "train", "digits", "--help")
    for row in ("teacher (see bdkd models) [wrn_16_2]", "passes over the training images [30]",
                "--train.precision {fp32,bf16,fp16}", "[0.15]"):  # fmt: skip
        assert row in digits
    assert "[imagenet_resnet50]" in help_of(capsys, "train", "--help")


def test_help_all_lists_every_option_of_the_recipe(capsys):
    text = help_of(capsys, "train", "digits", "--help-all")
    assert all(f"{flag} " in text or f"{flag}," in text for flag in command_flags("train"))
    assert "Peak learning rate" in text


def test_help_of_an_unknown_recipe_is_an_error(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["train", "digit", "--help"])
    out, err = capsys.readouterr()
    assert (ended.value.code, out.startswith("usage")) == (2, False)
    assert "unknown recipe 'digit'" in err
