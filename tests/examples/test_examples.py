"""Every example runs and its student learns. The lines that its docstring lists are in its code."""

import ast
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compiler import COMPILER
from vision import mended_torchvision

FOLDER = Path(__file__).parent.parent.parent / "examples"
EXAMPLES = sorted(path.stem for path in FOLDER.glob("*.py"))
IN_A_PROCESS = [name for name in EXAMPLES if name != "ddp_by_hand"]  # that one needs two processes


@pytest.fixture(autouse=True)
def _torchvision_imports():
    mended_torchvision()


def accuracy(printed: str) -> float:
    """Return the student's accuracy on test data that an example has printed, as a fraction."""
    return float(re.findall(r"student accuracy ([\d.]+)%", printed)[-1]) / 100


@pytest.mark.parametrize("name", IN_A_PROCESS)
def test_an_example_runs_and_its_student_learns(name, capsys, monkeypatch):
    if name == "compile_and_cuda_graph" and COMPILER != "inductor":
        compile_ = torch.compile
        monkeypatch.setattr(torch, "compile", lambda f, **o: compile_(f, backend=COMPILER, **o))
    with torch.random.fork_rng():
        runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert accuracy(printed) > 0.8, printed
    if name == "compile_and_cuda_graph":
        assert ("captured" in printed) == torch.cuda.is_available()


def test_ddp_by_hand_runs_on_two_ranks_and_ends_its_threads(tmp_path):
    # A thread of gloo that is still running when Python exits sometimes aborts the process.
    script = tmp_path / "train.py"
    script.write_text(
        f"import pathlib, runpy\nrunpy.run_path({str(FOLDER / 'ddp_by_hand.py')!r})\n"
        "tasks = pathlib.Path('/proc/self/task').glob('*/comm')\n"  # Linux names its threads there
        "left = [name for task in tasks if 'gloo' in (name := task.read_text())]\n"
        "assert not left, left\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
               "2", str(script)]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=400)
    assert done.returncode == 0, done.stderr
    assert accuracy(done.stdout) > 0.8
    assert "of 256, 2 ranks" in done.stdout


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_opens_with_at_most_three_lines_to_change(name):
    text = (FOLDER / f"{name}.py").read_text("utf-8")
    docstring = ast.get_docstring(ast.parse(text))
    assert docstring is not None
    opening, changes = re.fullmatch(
        r"([^\n]+)\n\nWhat changes in your \w+:\n\n((?: {4}.+\n?)+)", docstring
    ).groups()
    assert opening
    lines = [line.strip() for line in changes.splitlines()]
    assert 1 <= len(lines) <= 3
    code = [line.split("  #")[0].strip() for line in text.split('"""', 2)[2].splitlines()]
    for line in lines:
        assert line in code


def test_the_index_names_every_example():
    listed = re.findall(r"\((\w+)\.py\)", (FOLDER / "README.md").read_text("utf-8"))
    assert sorted(listed) == EXAMPLES


def test_examples_write_no_files(tmp_path, monkeypatch):
    """An example writes nothing into the current folder."""
    copy = tmp_path / "here"
    copy.mkdir()
    shutil.copy(FOLDER / "huggingface_trainer.py", copy)
    monkeypatch.chdir(copy)
    with torch.random.fork_rng():
        runpy.run_path("huggingface_trainer.py", run_name="__main__")
    assert [path.name for path in copy.iterdir()] == ["huggingface_trainer.py"]
