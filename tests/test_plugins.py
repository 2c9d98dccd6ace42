"""The plugin of docs/extending.md, written from the page and used from outside of this repository:
installed with its entry point, named with ``--plugin``, and missing.
"""

import json
import os
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from test_docs import DOCS, ROOT, blocks, registries, write_file  # noqa: F401

from bdkd import plugins
from bdkd.cli import main
from bdkd.errors import RunError, UsageError
from bdkd.plugins import load_plugins
from bdkd.runs.checkpoint import load_checkpoint
from bdkd.trainer import Trainer

SMALL = ["--train.batch-size", "32", "--checkpoint.every-steps", "1", "--log", "--threads", "1"]


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """A folder with ``mine.toml`` and ``my-plugin/``."""
    folder = tmp_path_factory.mktemp("outside")
    for block in blocks(DOCS / "extending.md"):
        write_file(block.body, folder)
    return folder


@pytest.fixture(scope="module")
def installed(written: Path) -> Path:
    """A folder of installed packages, in which the plugin is."""
    site = written / "site"
    install = ["install", "--no-deps", "--no-build-isolation", "--target", str(site)]
    subprocess.run([sys.executable, "-m", "pip", "-q", *install, str(written / "my-plugin")],
                   check=True, capture_output=True, timeout=120)  # fmt: skip
    return site


def bdkd(*arguments: str, site: Path, cwd: Path, ranks: int = 1) -> str:
    """What a command prints."""
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    paths = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *launch, "-m", "bdkd", *arguments],
        cwd=cwd, env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def run(written: Path, installed: Path) -> Path:
    """A run of three steps that was resumed for three more."""
    for steps, more in (("3", []), ("6", ["--resume"])):
        bdkd("train", "mine.toml", *SMALL, "--max-steps", steps, "--run-dir", "run", *more,
             site=installed, cwd=written)  # fmt: skip
    return written / "run"


def test_options_of_a_plugin_are_in_the_files_of_a_run(run):
    config = tomllib.loads((run / "config.toml").read_text())
    assert config["plugins"] == ["my_plugin"]
    assert config["data"]["contrast"] == 0.8
    assert config["networks"]["student"]["options"] == {"width": 8}
    assert config["objective"] == {"name": "mean-teacher", "strength": 0.5}
    assert config["optimizer"]["alpha"] == 0.99
    assert config["data"].keys() & {"mixup", "images"} == set()
    summary = json.loads((run / "summary.json").read_text())
    assert summary["objective"] == config["objective"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for network in ("teacher", "student"):
        assert 0 <= summary["networks"][network]["worst_class"] <= 1
        [validated] = [line for line in lines if line["split"] == "val" and line["step"] == 6]
        assert 0 <= validated[network]["worst_class"] <= validated[network]["top1"]


def test_a_run_of_a_plugin_resumes_bit_for_bit(run, written, installed):
    bdkd("train", "mine.toml", *SMALL, "--max-steps", "6", "--run-dir", "whole",
         site=installed, cwd=written)  # fmt: skip
    name = "step-00000006.pt"
    resumed, whole = (
        load_checkpoint(folder / "checkpoints" / name)[1] for folder in (run, written / "whole")
    )
    for part in ("networks", "optimizer"):
        leaves = [torch.utils._pytree.tree_leaves(state[part]) for state in (resumed, whole)]
        for one, other in zip(*leaves, strict=True):
            assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_a_plugins_metric_is_the_same_on_two_ranks(run, written, installed):
    arguments = ["evaluate", "run", "--split", "test", "--json"]
    alone, shared = (
        json.loads(bdkd(*arguments, site=installed, cwd=written, ranks=ranks))["networks"]
        for ranks in (1, 2)
    )
    for name in ("teacher", "student"):
        assert shared[name]["worst_class"] == alone[name]["worst_class"]
    stored = json.loads((run / "summary.json").read_text())["networks"]
    assert alone["student"]["worst_class"] == stored["student"]["worst_class"]


def test_a_plugin_is_compared_reported_and_exported(run, written, installed):
    bdkd("compare", "mine.toml", *SMALL, "--max-steps", "3", "--methods", "independent",
         "mean-teacher:strength=2", "--seeds", "2", "--folder", "compared",
         site=installed, cwd=written)  # fmt: skip
    compared = written / "compared"
    own = tomllib.loads((compared / "mean-teacher-strength=2-seed1" / "config.toml").read_text())
    assert own["objective"] == {"name": "mean-teacher", "strength": 2.0}
    assert own["networks"]["teacher"]["options"] == {"width": 16}  # the default of the model
    header = (compared / "comparison.md").read_text()
    assert "worst class %" in header
    bdkd("report", "compared", "--output", "page.html", site=installed, cwd=written)
    page = (written / "page.html").read_text()
    assert page.count("worst class %") >= 2  # a column, and a chart
    bdkd("export", "run", "--to", "safetensors", "--output", "student.safetensors",
         site=installed, cwd=written)  # fmt: skip
    printed = bdkd(
        "evaluate", "student.safetensors", "--split", "test", site=installed, cwd=written
    )
    assert "worst class %" in printed
    card = (written / "README.md").read_text()
    assert "import my_plugin  # a plugin" in card
    assert "`bdkd evaluate student.safetensors --split test --plugin my_plugin`" in card
    assert "| worst_class |" not in card
    assert "| worst class % |" in card
    assert "my_plugin (my-plugin 1.0)" in bdkd("doctor", site=installed, cwd=written)


# --- in this process, where the plugin is not installed -------------------------------------------


def failure(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as exit_:
        main(list(arguments))
    assert exit_.value.code in (1, 2)
    message = capsys.readouterr().err
    assert message.count("\n") == 1, message
    return message


@pytest.fixture
def outside(written, monkeypatch, registries) -> Path:  # noqa: F811
    monkeypatch.chdir(written / "my-plugin")
    return written


def test_a_recipe_does_not_import_its_plugin(outside, run, capsys):
    """Also where Python would find it."""
    sys.path.append(str(outside / "my-plugin"))
    for command in (
        "train ../mine.toml", "evaluate ../run", "export ../run --to onnx",
        "train --resume --run-dir ../run",
    ):  # fmt: skip
        said = failure(capsys, *command.split())
        assert "needs --plugin my_plugin: add it to the command line" in said
    assert "my_plugin" not in sys.modules


def test_a_report_without_the_plugin_says_what_it_leaves_out(outside, run, capsys):
    main(["report", "../run", "--output", "page.html", "--no-tsne"])
    said = capsys.readouterr().err
    assert "metrics of a plugin are left out: --plugin my_plugin shows them" in said
    assert "worst class" not in Path("page.html").read_text()


def test_a_report_names_any_plugin_of_a_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    Path("run/config.toml").write_text('name = "x"\nplugins = ["a\\u0007 b.py", 3]')
    Path("run/metrics.jsonl").write_text("")
    main(["report", "run", "--no-tsne"])
    assert "--plugin 'a\x07 b.py' shows them" in capsys.readouterr().err


def test_the_option_imports_a_plugin_of_the_working_folder(outside, run, capsys):
    main(["evaluate", "--plugin", "my_plugin", "../run", "--split", "test"])
    assert "worst class %" in capsys.readouterr().out


def test_help_and_errors_know_the_options_of_a_plugin(outside, capsys):
    line = ["train", "--plugin=my_plugin", "../mine.toml"]
    with pytest.raises(SystemExit):
        main([*line, "--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for text in (
        "switokd, mean-teacher. (default: mean-teacher)",
        "--objective.strength FLOAT Weight of the divergence from the mean. At least 0. (default:",
        "--data.contrast FLOAT Contrast of the stripes. In [0, 1]. (default: 0.8)",
        "Decay rate of the mean of squared gradients. In [0, 1). (default: 0.99)",
        "small_cnn takes width: an integer at least 1 (default: 16).",
    ):
        assert text in shown
    for options, words in (
        (["--objective.strength", "-1"], "objective.strength must be at least 0, got -1.0"),
        (["--data.contrast", "nan"], "data.contrast must be in [0, 1], got nan"),
        (["--optimizer.momentum", "0.9"], "optimizer.momentum is an option of sgd"),
        (["--networks.student.options.width", "0"], "width must be an integer at least 1, got 0"),
        (["--networks.teacher.options", "depth", "3"], "no option 'depth'; it takes width"),
        (["--objective.name", "mean-teacer"], "did you mean 'mean-teacher'?"),
    ):  # fmt: skip
        assert words in failure(capsys, *line, "--run-dir", "unused", *options)
    Path("wrong.toml").write_text(Path("../mine.toml").read_text().replace("strength", "strenght"))
    said = failure(capsys, "train", "wrong.toml", "--plugin", "my_plugin")
    assert "wrong.toml: unknown key objective.strenght: did you mean 'strength'?" in said


def test_a_single_file_is_a_plugin(outside, tmp_path, capsys):
    file = tmp_path / "mine_alone.py"
    file.write_text(Path("my_plugin/model.py").read_text())
    options = ["--networks.student.model", "tiny_cnn", "--max-steps", "1", "--log"]
    main(["train", "digits", "--plugin", str(file), *options, "--run-dir", "single"])
    del sys.modules["mine_alone"]
    (tmp_path / "moved").mkdir()
    moved = file.rename(tmp_path / "moved" / file.name)
    main(["evaluate", "single", "--plugin", str(moved)])
    del sys.modules["mine_alone"]
    assert "student (tiny_cnn)" in capsys.readouterr().out


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
def test_a_plugin_that_cannot_be_imported_is_one_line(
    name, text, kind, words, tmp_path, monkeypatch, registries  # noqa: F811
):  # fmt: skip
    monkeypatch.chdir(tmp_path)
    if text is not None:
        Path(name).write_text(text)
    for _ in range(2):  # a failed import leaves nothing behind
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
    """The arguments that load a plugin with this text."""
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
         "must return losses that are sums over the samples; student has (64,)"),
        ("losses['student'] = losses['student'] + losses['teacher']; "
         "return ObjectiveOutput(losses)",
         "returns a loss of student that depends on the logits of teacher: detach them"),
        ("losses['student'] = losses['student'].detach(); return ObjectiveOutput(losses)",
         "returns a loss of student that does not depend on its logits"),
        ("raise RuntimeError('no')", "fails on logits (64, 10): RuntimeError: no (--debug shows"),
        ("return ObjectiveOutput(losses, gradients={'student': torch.zeros(3)})",
         "must return gradients like the logits of networks that train; student has other"),
        ("return ObjectiveOutput(losses, {'kl': torch.zeros(())})",
         "must return statistics with a value for each of the 64 samples; kl has ()"),
    ],
)  # fmt: skip
def test_an_objective_that_breaks_its_interface_is_refused_before_it_trains(
    body, words, tmp_path, monkeypatch, capsys, registries  # noqa: F811
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
def test_an_objective_that_keeps_its_interface_trains(
    name, tmp_path, monkeypatch, registries  # noqa: F811
):  # fmt: skip
    """The check is made with the batch size of the recipe, and on an instance of its own."""
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
def test_a_source_with_wrong_images_is_named(
    body, options, words, tmp_path, monkeypatch, capsys, registries  # noqa: F811
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
    tmp_path, monkeypatch, capsys, registries  # noqa: F811
):  # fmt: skip
    monkeypatch.chdir(tmp_path)
    given = ["train", "digits", *plugin(OPTIMIZER, "own_optimizer"), "--max-steps", "2", "--log"]
    main([*given, "--optimizer.name", "plain", "--run-dir", "plain"])
    config = tomllib.loads(Path("plain/config.toml").read_text())["optimizer"]
    assert config == {"name": "plain", "learning_rate": 0.25, "weight_decay": 0.0,
                      "decay_norms": False}  # fmt: skip
    capsys.readouterr()
    said = failure(capsys, *given, "--optimizer.name", "bare", "--run-dir", "bare")
    assert "must be built from the parameter groups that it is given" in said
    del sys.modules["own_optimizer"]


def test_a_comparison_loads_only_the_plugins_of_the_command_line(
    tmp_path, monkeypatch, registries  # noqa: F811
):  # fmt: skip
    """A recipe may name another file, with the same name."""
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


def test_a_stopped_run_says_how_to_continue_with_its_plugin(
    tmp_path, monkeypatch, capsys, registries  # noqa: F811
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
    tmp_path, monkeypatch, capsys, registries  # noqa: F811
):  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("wrong_metric.py").write_text(
        "import bdkd\n@bdkd.register_metric('mine')\ndef mine(logits, target): return logits.mean()"
    )
    said = failure(capsys, "train", "digits", "--plugin", "wrong_metric.py", "--max-steps", "1",
                   "--run-dir", "run", "--log")  # fmt: skip
    assert "the metric 'mine' must return a tensor with a value for each of the" in said
    del sys.modules["wrong_metric"]
