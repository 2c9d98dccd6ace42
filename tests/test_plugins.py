"""The tests write the plugin of docs/how-to/extend.md to a folder outside of the repository. They
use it with its entry point, with ``--plugin``, and check what happens if it is missing.
"""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from test_docs import DOCS, blocks, write_file

from bdkd.cli import main
from bdkd.runs.checkpoint import load_checkpoint

SMALL = ["--train.batch-size", "32", "--checkpoint.every-steps", "1", "--log", "--threads", "1"]


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """A folder with ``mine.toml`` and ``my-plugin/``."""
    folder = tmp_path_factory.mktemp("outside")
    for block in blocks(DOCS / "how-to" / "extend.md"):
        write_file(block.body, folder)
    return folder


@pytest.fixture(scope="module")
def installed(written: Path) -> Path:
    """Return a folder of installed packages that contains the plugin."""
    site = written / "site"
    install = ["install", "--no-deps", "--no-build-isolation", "--target", str(site)]
    subprocess.run([sys.executable, "-m", "pip", "-q", *install, str(written / "my-plugin")],
                   check=True, capture_output=True, timeout=120)  # fmt: skip
    return site


def bdkd(*arguments: str, site: Path, cwd: Path, ranks: int = 1) -> str:
    """Run a command and return its output."""
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
    """Return a run of three steps that was resumed for three more steps."""
    for steps, more in (("3", []), ("6", ["--resume"])):
        bdkd("train", "mine.toml", *SMALL, "--max-steps", steps, "--run-dir", "run", *more,
             site=installed, cwd=written)  # fmt: skip
    return written / "run"


def test_the_files_of_a_run_contain_the_options_of_a_plugin(run):
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


def test_a_run_with_a_plugin_resumes_bit_for_bit(run, written, installed):
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


def test_compare_report_and_export_work_with_a_plugin(run, written, installed):
    bdkd("compare", "mine.toml", *SMALL, "--max-steps", "3", "--methods", "independent",
         "mean-teacher:strength=2", "--seeds", "2", "--folder", "compared",
         site=installed, cwd=written)  # fmt: skip
    compared = written / "compared"
    own = tomllib.loads((compared / "mean-teacher-strength=2-seed1" / "config.toml").read_text())
    assert own["objective"] == {"name": "mean-teacher", "strength": 2.0}
    assert own["networks"]["teacher"]["options"] == {"width": 16}  # the default option of the model
    header = (compared / "comparison.md").read_text()
    assert "worst class %" in header
    bdkd("report", "compared", "--output", "page.html", site=installed, cwd=written)
    page = (written / "page.html").read_text()
    assert page.count("worst class %") >= 2  # a column and a chart
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


# --- in this process, where the plugin is not installed ------------------------------------------


def failure(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as exit_:
        main(list(arguments))
    assert exit_.value.code in (1, 2)
    message = capsys.readouterr().err
    assert message.count("\n") == 1, message
    return message


@pytest.fixture
def outside(written, monkeypatch, registries) -> Path:
    monkeypatch.chdir(written / "my-plugin")
    return written


def test_a_recipe_does_not_import_its_plugin(outside, run, capsys):
    """This holds even if the plugin is on Python's path."""
    sys.path.append(str(outside / "my-plugin"))
    for command in (
        "train ../mine.toml", "evaluate ../run", "export ../run --to onnx",
        "train --resume --run-dir ../run",
    ):  # fmt: skip
        said = failure(capsys, *command.split())
        assert "needs --plugin my_plugin: add it to the command line" in said
    assert "my_plugin" not in sys.modules


def test_a_report_without_the_plugin_names_what_is_missing(outside, run, capsys):
    main(["report", "../run", "--output", "page.html", "--no-tsne"])
    said = capsys.readouterr().err
    assert "metrics of a plugin are left out: --plugin my_plugin shows them" in said
    assert "worst class" not in Path("page.html").read_text()


def test_a_report_names_the_missing_plugins_of_a_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    Path("run/config.toml").write_text('name = "x"\nplugins = ["a\\u0007 b.py", 3]')
    Path("run/metrics.jsonl").write_text("")
    main(["report", "run", "--no-tsne"])
    assert "--plugin 'a\x07 b.py' shows them" in capsys.readouterr().err


def test_plugin_imports_a_module_from_the_working_folder(outside, run, capsys):
    main(["evaluate", "--plugin", "my_plugin", "../run", "--split", "test"])
    assert "worst class %" in capsys.readouterr().out


def test_help_and_errors_include_the_options_of_a_plugin(outside, capsys):
    line = ["train", "--plugin=my_plugin", "../mine.toml"]
    with pytest.raises(SystemExit):
        main([*line, "--help-all"])
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


def test_a_single_file_can_be_a_plugin(outside, tmp_path, capsys):
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
