"""Runs without validation images: all images train, and the last weights are selected."""

import dataclasses
import json

import pytest
from small_runs import components_of

from bdkd.cli.evaluate import run as evaluate
from bdkd.config import load_recipe
from bdkd.errors import RunError, UsageError
from bdkd.runs.folder import RunFolder
from bdkd.trainer import Trainer


def recipe_without_validation(select: str, run_dir: str):
    recipe = load_recipe("digits")
    student = dataclasses.replace(recipe.networks["student"], model="resnet8")
    teacher = dataclasses.replace(recipe.networks["teacher"], model="resnet8")
    return dataclasses.replace(
        recipe,
        networks={"teacher": teacher, "student": student},
        data=dataclasses.replace(recipe.data, validation=0.0, train_images=200),
        train=dataclasses.replace(recipe.train, epochs=2, batch_size=50, select=select),
        log=(), run_dir=run_dir,
    )  # fmt: skip


def test_all_images_train_and_the_last_weights_are_tested(tmp_path, capsys):
    recipe = recipe_without_validation("last", str(tmp_path / "run"))
    whole = dataclasses.replace(recipe.data, train_images=None)
    components = components_of(dataclasses.replace(recipe, data=whole))
    assert components.source.info.counts == {"train": 1438, "val": 0, "test": 359}
    summary = Trainer(components_of(recipe)).train(RunFolder(tmp_path / "run"))
    assert summary["selected_step"] == 8
    assert summary["split"] == "test"
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert {line["split"] for line in lines} == {"train"}
    with pytest.raises(RunError, match=r"no val images .* pass --split test"):
        evaluate([str(tmp_path / "run")])
    capsys.readouterr()
    evaluate([str(tmp_path / "run"), "--split", "test", "--json"])
    found = json.loads(capsys.readouterr().out)["networks"]["student"]["top1"]
    assert found == summary["networks"]["student"]["top1"]


def test_select_best_requires_validation_images(tmp_path):
    with pytest.raises(UsageError, match=r"train.select must be last if data.validation is 0"):
        components_of(recipe_without_validation("best", str(tmp_path)))
