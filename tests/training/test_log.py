"""Destinations of metrics besides metrics.jsonl: wandb, TensorBoard and the terminal."""

import dataclasses
import os
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest

from bdkd.config import load_recipe
from bdkd.errors import RunError
from bdkd.runs.log import check_sinks, flat_scalars, open_sinks


def test_a_line_of_metrics_becomes_flat_scalars():
    line = {
        "step": 3,
        "epoch": 1,
        "split": "train",
        "student": {"loss": 0.5},
        "frozen": {"loss": None, "top1": 0.25},
        "forward_weight": 1.5,
        "mfu": None,
    }
    assert flat_scalars(line) == {
        "train/epoch": 1, "train/student/loss": 0.5, "train/frozen/top1": 0.25,
        "train/forward_weight": 1.5,
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
    """wandb needs an account, so a fake module replaces it."""
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
    assert settings["dir"] == str(tmp_path / "run")
    assert settings["resume"] == "allow"


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_missing_sink_package_says_how_to_install_it(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    recipe = dataclasses.replace(load_recipe("digits"), log=(name,))
    with pytest.raises(RunError, match=f"--log {name} needs {name}: pip install"):
        check_sinks(recipe)


def test_a_resumed_run_finds_its_wandb_run_by_its_folder(monkeypatch, tmp_path):
    """Two paths of one folder give one id. Another folder of the same name gives another id."""
    identities, fake = [], types.ModuleType("wandb")
    fake.init = lambda **options: identities.append(options["id"])
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.chdir(tmp_path)
    recipe = dataclasses.replace(load_recipe("digits"), log=("wandb",))
    for folder in (tmp_path / "run", Path("run"), tmp_path / "other" / "run"):
        open_sinks(recipe, folder, folder / "events", 0)
    assert identities[0] == identities[1] != identities[2]


def test_tensorboard_shows_each_step_of_a_resumed_run_once(tmp_path):
    """The steps between the last checkpoint and the kill are trained and logged again."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = dataclasses.replace(load_recipe("digits"), log=("tensorboard",))
    for start, steps, value in ((0, (1, 2, 3, 4), 1.0), (2, (3, 4, 5), 2.0)):
        [sink] = open_sinks(recipe, tmp_path, tmp_path / "events", start)
        for step in steps:
            sink.scalars(step, {"train/loss": value})
        sink.close()
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    shown = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert shown == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 2.0)]


@pytest.mark.parametrize("call", [
    "line('a line')", "metrics({'step': 1, 'epoch': 1, 'images_per_second': 2.0}, 1, 1.0)",
])  # fmt: skip
def test_a_line_is_flushed_to_a_pipe_at_once(call):
    """A line does not wait for a full buffer, so you can follow the log of a run."""
    code = (
        "import sys\nfrom bdkd.runs.console import Console\n"
        f"Console(9, 0, bar=False).{call}\nsys.stdin.read()"
    )
    buffered = {key: x for key, x in os.environ.items() if key != "PYTHONUNBUFFERED"}
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, env=buffered,
                          stdout=subprocess.PIPE, text=True) as process:  # fmt: skip
        timer = threading.Timer(60, process.kill)
        timer.start()
        assert process.stdout.readline()  # the process still runs: it waits for input
        timer.cancel()
        process.communicate("\n")
