"""An error of a plugin prints one line, and allowed behaviour is accepted. Plugins register
objectives, data sources, optimizers and metrics.
"""

import json
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from test_plugins import failure

from bdkd import plugins
from bdkd.cli import main
from bdkd.errors import RunError, UsageError
from bdkd.plugins import load_plugins
from bdkd.trainer import Trainer

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("name", "text", "kind", "words"),
    [
        ("nothing_here", None, UsageError, "there is no plugin 'nothing_here': --plugin takes a"),
        ("nothing.py", None, UsageError, "there is no plugin nothing.py"),
        ("json.py", "", UsageError, "json.py has the name of another module: rename it"),
        ("sklearn.py", "", UsageError, "sklearn.py has the name of another module: rename it"),
        ("needs_more.py", "import not_installed_anywhere", RunError,
         "cannot import the plugin needs_more.py: ModuleNotFoundError: No module named 'not_ins"),
        ("broken.py", "1 / 0", RunError, "broken.py: ZeroDivisionError: division by zero"),
        ("syntax.py", "def", RunError, "cannot import the plugin syntax.py: SyntaxError"),
        ("taken.py", "import bdkd\n@bdkd.register_metric('top1')\ndef mine(x, y): ...", RunError,
         "ValueError: the metric 'top1' is registered by bdkd.metrics.Metric and by taken.mine"),
    ],
)  # fmt: skip
def test_a_plugin_that_cannot_be_imported_causes_one_line(
    name, text, kind, words, tmp_path, monkeypatch, registries
):  # fmt: skip
    monkeypatch.chdir(tmp_path)
    if text is not None:
        Path(name).write_text(text)
    for _ in range(2):  # a second import fails in the same way
        with pytest.raises(kind) as raised:
            load_plugins([name])
        assert words in str(raised.value)
        assert "\n" not in str(raised.value)


def test_an_installed_plugin_that_is_broken_is_named_with_its_package(
    monkeypatch, tmp_path, capsys
):
    (tmp_path / "broken_plugin.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    entry = EntryPoint("mine", "broken_plugin", plugins.GROUP)
    monkeypatch.setattr(plugins, "entry_points", lambda group: [entry])
    monkeypatch.setattr(plugins, "_installed", None)
    for _ in range(2):
        said = failure(capsys, "train", "digits")
        assert "cannot import the plugin broken_plugin of the package" in said
        assert "ZeroDivisionError" in said
    main(["doctor"])
    assert "missing  plugins" in capsys.readouterr().out


def plugin(text: str, name: str) -> list[str]:
    """Return the arguments that load a plugin with this text."""
    Path(f"{name}.py").write_text(text)
    return ["--plugin", f"{name}.py"]


OBJECTIVE = """
import bdkd, torch
from bdkd.objectives import Objective, ObjectiveOutput
@bdkd.register_objective("mine")
class Mine(Objective):
    def __call__(self, logits, target, normaliser, grad_scale, active=None):
        losses = {{n: x.logsumexp(-1).sum() / normaliser for n, x in logits.items()}}
        {body}
"""


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("return losses", "must return an ObjectiveOutput, got dict"),
        ("del losses['student']; return ObjectiveOutput(losses)",
         "must return a loss for each network that trains (teacher, student), got teacher"),
        ("losses['x'] = losses['student']; return ObjectiveOutput(losses)",
         "must return a loss for each network that trains (teacher, student), got teacher, stud"),
        ("losses['student'] = logits['student'].sum(-1); return ObjectiveOutput(losses)",
         "must return 0-dim losses; the loss of student has the shape (64,)"),
        ("losses['student'] = losses['student'] + losses['teacher']; "
         "return ObjectiveOutput(losses)",
         "returns a loss of student that depends on the logits of teacher: detach them"),
        ("losses['student'] = losses['student'].detach(); return ObjectiveOutput(losses)",
         "returns a loss of student that does not depend on its logits"),
        ("raise RuntimeError('no')", "fails on logits (64, 10): RuntimeError: no (--debug shows"),
        ("return ObjectiveOutput(losses, gradients={'student': torch.zeros(3)})",
         "must return gradients with the shapes of the logits, and only for networks that train; "
         "student does not match"),
        ("return ObjectiveOutput(losses, {'kl': torch.zeros(())})",
         "must return statistics of the shape (64,), one value for each sample; kl has the shape "
         "()"),
    ],
)  # fmt: skip
def test_an_objective_with_a_wrong_interface_is_refused_before_training(
    body, words, tmp_path, monkeypatch, capsys, registries
):  # fmt: skip
    monkeypatch.chdir(tmp_path)
    given = plugin(OBJECTIVE.format(body=body), "wrong_objective")
    try:
        said = failure(capsys, "train", "digits", *given, "--objective.name", "mine")
    finally:
        del sys.modules["wrong_objective"]
    assert f"the objective 'mine' {words}" in said
    assert not Path("runs").exists()


LEGITIMATE = """
import bdkd, torch
from bdkd.objectives import Objective, ObjectiveOutput
@bdkd.register_objective("closed-form")
class ClosedForm(Objective):
    def __call__(self, *arguments): raise NotImplementedError
    def loss_and_grad(self, logits, target, normaliser, grad_scale, active=None):
        losses = {n: x.detach().logsumexp(-1).sum() / normaliser for n, x in logits.items()}
        scale = grad_scale / normaliser
        gradients = {n: x.detach().softmax(-1) * scale for n, x in logits.items()}
        return ObjectiveOutput(losses, {}, gradients)
@bdkd.register_objective("in-turn")
class InTurn(Objective):
    has_dynamic_active_set, step = True, 0
    def measure(self, logits, target): return torch.zeros(1)
    def active(self, means):
        self.step += 1
        return frozenset({"student"} if self.step == 1 else {"teacher"})
    def __call__(self, logits, target, normaliser, grad_scale, active=None):
        hard = logits["teacher"].detach().amax(-1).topk(40).indices
        losses = {n: logits[n][hard].logsumexp(-1).sum() / normaliser for n in active}
        return ObjectiveOutput(losses)
"""


@pytest.mark.parametrize("name", ["closed-form", "in-turn"])
def test_an_objective_with_the_right_interface_trains(
    name, tmp_path, monkeypatch, registries
):  # fmt: skip
    """The check uses the batch size of the recipe, and another instance than the training."""
    monkeypatch.chdir(tmp_path)
    given = plugin(LEGITIMATE, "own_objective")
    main(["train", "digits", *given, "--objective.name", name, "--max-steps", "1", "--log",
          "--run-dir", "run"])  # fmt: skip
    [line] = [json.loads(x) for x in Path("run/metrics.jsonl").read_text().splitlines()
              if '"train"' in x]  # fmt: skip
    assert line["student"]["loss"] is not None
    assert (line["teacher"]["loss"] is None) == (name == "in-turn")
    del sys.modules["own_objective"]


SOURCE = """
import bdkd, torch
from bdkd.data import Images, InMemoryConfig, in_memory_source
@bdkd.register_source("mine", InMemoryConfig)
def load(config, context):
    pixels, labels = torch.zeros(60, 1, 8, 8, dtype=torch.uint8), torch.arange(60) % 3
    {body}
    images = Images(pixels, labels)
    return in_memory_source(images, images, "abc", config, context)
"""


@pytest.mark.parametrize(
    ("body", "options", "words"),
    [
        ("return None", [], "the data source 'mine' must return a DataSource, whose info is a"),
        ("labels = labels[:30]", [],
         "need a label of int64 for each of the 60 images, got torch.int64 (30,)"),
        ("labels = labels.int()", [], "need a label of int64 for each of the 60 images"),
        ("labels = labels + 1", [], "must have labels from 0 to 2, one for each class, got 1 to 3"),
        ("pixels = pixels.float()", [], "must be pixels (N, C, H, W) of uint8, got torch.float32"),
        ("config.check(); pixels, labels = pixels[:0], labels[:0]", [],
         "the training images of the source 'mine' must be at least one, got none"),
        ("", ["--data.image-size", "16"], "data.image_size does not apply to the source 'mine'"),
    ],
)  # fmt: skip
def test_a_data_source_with_wrong_images_is_named(
    body, options, words, tmp_path, monkeypatch, capsys, registries
):  # fmt: skip
    monkeypatch.chdir(tmp_path)
    given = [*plugin(SOURCE.format(body=body), "wrong_source"), *options]
    try:
        said = failure(capsys, "train", "digits", *given, "--data.source", "mine")
    finally:
        del sys.modules["wrong_source"]
    assert words in said


OPTIMIZER = """
import bdkd, torch
from dataclasses import dataclass
from bdkd.config import OptimizerConfig
@dataclass(frozen=True)
class Own(OptimizerConfig):
    learning_rate: float = 0.25
    weight_decay: float = 0.0
@bdkd.register_optimizer("plain", Own)
def plain(config, groups):
    return torch.optim.Adam(groups, config.learning_rate)
@bdkd.register_optimizer("bare")
def bare(config, groups):
    return torch.optim.Adam([p for group in groups for p in group["params"]])
"""


def test_an_optimizer_of_torch_without_fused_kernels_trains(
    tmp_path, monkeypatch, capsys, registries
):  # fmt: skip
    monkeypatch.chdir(tmp_path)
    given = ["train", "digits", *plugin(OPTIMIZER, "own_optimizer"), "--max-steps", "2", "--log"]
    main([*given, "--optimizer.name", "plain", "--run-dir", "plain"])
    config = tomllib.loads(Path("plain/config.toml").read_text())["optimizer"]
    assert config == {"name": "plain", "learning_rate": 0.25, "weight_decay": 0.0,
                      "decay_norms": False}  # fmt: skip
    capsys.readouterr()
    said = failure(capsys, *given, "--optimizer.name", "bare", "--run-dir", "bare")
    assert "must be built from the parameter groups that its function receives" in said
    del sys.modules["own_optimizer"]


def test_a_comparison_loads_only_the_plugins_of_the_command_line(
    tmp_path, monkeypatch, registries
):  # fmt: skip
    """A recipe may record a file of the same name in another folder."""
    monkeypatch.chdir(tmp_path)
    for folder in ("mine", "strangers"):
        Path(folder).mkdir()
        Path(folder, "own.py").write_text(f"open({str(tmp_path / (folder + '.ran'))!r}, 'w')")
    text = (ROOT / "bdkd" / "recipes" / "digits.toml").read_text()
    Path("own.toml").write_text(f'plugins = ["{tmp_path}/strangers/own.py"]\n{text}')
    main(["compare", "own.toml", "--plugin", "mine/own.py", "--methods", "independent",
          "--seeds", "1", "--max-steps", "1", "--folder", "compared"])  # fmt: skip
    assert Path("mine.ran").exists()
    assert not Path("strangers.ran").exists()
    del sys.modules["own"]


def test_the_message_of_a_stopped_run_contains_its_plugins(
    tmp_path, monkeypatch, capsys, registries
):  # fmt: skip
    monkeypatch.chdir(tmp_path)
    given = plugin("import signal, bdkd.trainer as t\n"
                   "before = t.Trainer.train_step\n"
                   "def step(self, batch):\n"
                   "    before(self, batch); signal.raise_signal(signal.SIGTERM)\n"
                   "t.Trainer.train_step = step\n", "stops")  # fmt: skip
    monkeypatch.setattr(Trainer, "train_step", Trainer.train_step)  # restored after the test
    with pytest.raises(SystemExit):
        main(["train", "digits", *given, "--run-dir", "run", "--log"])
    assert "bdkd train --plugin stops.py --resume --run-dir run" in capsys.readouterr().err
    del sys.modules["stops"]


def test_a_metric_that_does_not_return_a_value_for_each_sample_is_named(
    tmp_path, monkeypatch, capsys, registries
):  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("wrong_metric.py").write_text(
        "import bdkd\n@bdkd.register_metric('mine')\ndef mine(logits, target): return logits.mean()"
    )
    said = failure(capsys, "train", "digits", "--plugin", "wrong_metric.py", "--max-steps", "1",
                   "--run-dir", "run", "--log")  # fmt: skip
    assert "the metric 'mine' must return a tensor with a value for each of the" in said
    del sys.modules["wrong_metric"]
