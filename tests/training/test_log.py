"""Where metrics go besides metrics.jsonl."""

import dataclasses
import sys
import types

import pytest

from bdkd.config import load_recipe
from bdkd.errors import RunError
from bdkd.training.log import check_sinks, flat_scalars, open_sinks


def test_a_line_becomes_named_scalars():
    line = {
        "step": 3,
        "epoch": 1,
        "split": "train",
        "student": {"loss": 0.5},
        "forward_weight": 1.5,
    }
    assert flat_scalars(line) == {
        "train/epoch": 1, "train/student/loss": 0.5, "train/forward_weight": 1.5,
    }  # fmt: skip


class FakeRun:
    def __init__(self) -> None:
        self.logged: list[tuple[int, dict]] = []
        self.finished = False

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished = True


def test_wandb_gets_the_same_scalars(monkeypatch, tmp_path):
    """wandb itself needs an account: a module of its shape stands in."""
    run, settings = FakeRun(), {}
    fake = types.ModuleType("wandb")
    fake.init = lambda **options: settings.update(options) or run
    monkeypatch.setitem(sys.modules, "wandb", fake)
    recipe = dataclasses.replace(load_recipe("digits"), log=("wandb",))
    [sink] = open_sinks(recipe, tmp_path / "run", tmp_path / "events", 0)
    sink.scalars(7, {"train/student/loss": 0.5})
    sink.close()
    assert run.logged == [(7, {"train/student/loss": 0.5})]
    assert run.finished
    assert settings["name"] == "run"
    assert settings["resume"] == "allow"


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_missing_sink_names_the_remedy(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    recipe = dataclasses.replace(load_recipe("digits"), log=(name,))
    with pytest.raises(RunError, match=f"--log {name} needs {name}: pip install"):
        check_sinks(recipe)
