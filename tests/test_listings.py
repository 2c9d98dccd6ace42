"""``bdkd models`` and ``bdkd recipes``."""

import json
import subprocess
import sys

import pytest
import torch
from vision import mended_torchvision

from bdkd.cli import main
from bdkd.config import load_recipe, shipped_recipes
from bdkd.models import create_model, list_models

mended_torchvision()


def output(capsys, *arguments: str) -> str:
    main(list(arguments))
    return capsys.readouterr().out


def names(capsys, *arguments: str) -> list[str]:
    return [row["name"] for row in json.loads(output(capsys, "models", *arguments, "--json"))]


def refused(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit):
        main(list(arguments))
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_by_default_the_networks_of_bdkd_are_listed(capsys):
    lines = output(capsys, "models").splitlines()
    assert lines[0].split() == ["name", "parameters", "image", "size", "pretrained"]
    assert [line.split()[0] for line in lines[2:-4]] == list_models()
    cells = {cells[0]: cells[1:] for cells in map(str.split, lines[2:-4])}
    assert cells["resnet20"] == ["278,324", "any", "-"]  # with 100 classes
    assert cells["imagenet_resnet50"] == ["25,557,032", "224", "yes"]  # with 1,000
    for line, library in zip(lines[-2:], ("timm", "torchvision"), strict=True):
        assert f"networks of {library}: bdkd models '{library}:*'" in line


@pytest.mark.parametrize(
    ("pattern", "some", "none"),
    [
        ("wrn_40", ["wrn_40_1", "wrn_40_2"], ["wrn_16_2"]),
        ("resnet18", ["resnet18", "imagenet_resnet18", "timm:resnet18", "torchvision:resnet18"],
         ["resnet20", "timm:resnet18.a1_in1k"]),
        ("resnet18*", ["resnet18", "timm:resnet18", "torchvision:resnet18"],
         ["imagenet_resnet18", "timm:seresnet18"]),
        ("TIMM:*tiny*patch16_224", ["timm:vit_tiny_patch16_224"], ["timm:vit_tiny_patch16_384"]),
        ("timm:resnet18.*", ["timm:resnet18.a1_in1k"], ["timm:resnet18", "timm:resnet34.a1_in1k"]),
        ("torchvision:resnet?0", ["torchvision:resnet50"], ["torchvision:resnet18", "resnet50"]),
    ],
)  # fmt: skip
def test_a_pattern_is_a_part_of_a_name_or_a_glob(pattern, some, none, capsys):
    pytest.importorskip("timm")
    found = names(capsys, pattern)
    assert set(found) >= set(some)
    assert not set(found) & set(none)
    for name in found[:3]:
        with torch.device("meta"):
            create_model(name, 10)


def test_a_long_list_omits_parameters_with_a_note(capsys):
    pytest.importorskip("timm")
    text = output(capsys, "models", "timm:*resnet*")
    assert "give a narrower pattern" in text
    assert all(line.split()[1] == "-" for line in text.splitlines()[2:-3])


def test_weights_on_this_machine_are_marked(capsys, monkeypatch, tmp_path):
    models = pytest.importorskip("torchvision").models
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    url = models.ResNet18_Weights.DEFAULT.url
    path = tmp_path / "hub" / "checkpoints" / url.rpartition("/")[2]
    path.parent.mkdir(parents=True)
    path.touch()
    rows = json.loads(output(capsys, "models", "*resnet[13][84]", "--json"))
    found = {row["name"]: row["pretrained"] for row in rows if "timm" not in row["name"]}
    assert found["torchvision:resnet18"] == found["imagenet_resnet18"] == "here"
    assert found["torchvision:resnet34"] == "yes"
    assert found["resnet18"] == ""


def test_missing_libraries_are_noted_and_an_error_if_named_in_the_pattern(capsys, monkeypatch):
    for library in ("timm", "torchvision"):
        for module in [name for name in sys.modules if name.split(".")[0] == library]:
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.setitem(sys.modules, library, None)
    for arguments in ([], ["resnet18"]):
        text = output(capsys, "models", *arguments)
        assert "imagenet_resnet18" in text
        for library in ("timm", "torchvision"):
            assert f"{library} is not installed: pip install 'bdkd[imagenet]' torch==" in text
    assert "timm is not installed" in refused(capsys, "models", "timm:resnet18")
    assert "torchvision is not installed" in refused(capsys, "models", "torchvision:*")


def test_a_pattern_without_matches_suggests_the_nearest_name(capsys):
    assert "no model matches 'wrn_4_2': did you mean 'wrn_40_2'?" in refused(
        capsys, "models", "wrn_4_2"
    )
    assert "give a part of a name" in refused(capsys, "models", "*xyzzyxyzzy*")


def test_networks_that_bdkd_cannot_use_are_not_listed(capsys):
    pytest.importorskip("torchvision")
    assert "has a linear classifier" in refused(capsys, "models", "torchvision:squeezenet*")


@pytest.mark.parametrize("command", [
    pytest.param(["models"], marks=pytest.mark.soak), ["recipes"],
    pytest.param(["recipes", "digits"], marks=pytest.mark.soak),
])  # fmt: skip
def test_a_closed_pipe_ends_the_listing_quietly(command):
    """A reader such as head closes the pipe before or after the first line."""
    for reads in (0, 1):
        process = subprocess.Popen(
            [sys.executable, "-m", "bdkd", *command],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert process.stdout is not None
        assert process.stderr is not None
        for _ in range(reads):
            process.stdout.readline()
        process.stdout.close()
        errors = process.stderr.read().splitlines()
        process.stderr.close()
        assert process.wait(60) in (0, 141)  # 141 is 128 + SIGPIPE
        assert [line for line in errors if not line.startswith("warning: the installed")] == []


def test_every_recipe_is_listed_with_what_it_trains(capsys):
    listed = json.loads(output(capsys, "recipes", "--json"))
    assert [entry["name"] for entry in listed] == shipped_recipes()
    text = output(capsys, "recipes")
    for entry in listed:
        recipe = load_recipe(entry["name"])
        models = {name: network.model for name, network in recipe.networks.items()}
        assert entry["teachers"] | entry["students"] == models
        assert entry["data"] == recipe.data.source
        assert entry["objective"] == recipe.objective.name
        assert entry["epochs"] == recipe.train.epochs
        assert entry["description"][-1] in ".?!", "a sentence begins the file of each recipe"
        assert entry["name"] in text
    assert "digits: wrn_16_2 -> resnet8, bdkd, 30 epochs" in text


def test_a_printed_recipe_equals_its_file_and_can_be_trained(capsys, tmp_path):
    mine = tmp_path / "mine.toml"
    mine.write_text(output(capsys, "recipes", "digits"))
    assert load_recipe(str(mine)) == load_recipe("digits")
    assert mine.read_text().startswith("# Handwritten digits")
