"""Ctrl-C at any moment of a command: exit code 130, one line, no traceback, no process left."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bdkd import cli
from bdkd.cli import main

TINY = str(Path(__file__).with_name("training") / "tiny.toml")
# Sends Ctrl-C to this process when a module is imported for the first time.
SITE = """
import os, signal, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ["INTERRUPT_AT"]:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
"""


@pytest.fixture(autouse=True)
def _interruptible():
    """Let this process and its children receive SIGINT. Background jobs of a shell ignore this
    signal, and their children inherit this."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    "module",
    ["bdkd_kernels", "numpy", "torch.nn", "torch.fx", "bdkd.trainer", "matplotlib.figure"],
)
def test_ctrl_c_during_the_import_of_any_module_prints_one_line(module, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(SITE)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "bdkd", "train", TINY, "--train.epochs", "1", "--run-dir"]
    done = subprocess.run(
        [*command, str(tmp_path / "run")], capture_output=True, text=True, timeout=120,
        env=os.environ | {"PYTHONPATH": path, "INTERRUPT_AT": module},
    )  # fmt: skip
    assert done.returncode in (130, 0)  # 0 if this version of torch does not import the module
    if done.returncode:
        (line,) = done.stderr.splitlines()
        assert line.startswith(("bdkd: interrupted", "bdkd: stopped"))
    else:
        assert module not in ("bdkd_kernels", "torch.nn", "bdkd.trainer")


@pytest.mark.parametrize("seconds", [0.0, pytest.param(0.5, marks=pytest.mark.soak), 2.5])
def test_ctrl_c_leaves_no_process_of_a_comparison(seconds, tmp_path):
    """A terminal sends SIGINT to all processes of the comparison."""
    command = [sys.executable, "-m", "bdkd", "compare", TINY, "--methods", "independent", "dml",
               "--seeds", "2", "--train.epochs", "50", "--jobs", "2", "--folder"]  # fmt: skip
    process = subprocess.Popen(
        [*command, str(tmp_path / "c")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline()  # "4 runs in ..."
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    (line,) = err.splitlines()
    assert "continue with the same command" in line
    time.sleep(1)
    listed = subprocess.run(["ps", "-s", str(process.pid), "-o", "stat="],
                            capture_output=True, text=True)  # fmt: skip
    assert [state for state in listed.stdout.split() if not state.startswith("Z")] == []


def test_ctrl_c_that_a_library_turns_into_another_error_is_an_interrupt(monkeypatch, capsys):
    def imports_half_a_module(given: list[str]) -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        except KeyboardInterrupt:
            raise AttributeError("module 'numpy' has no attribute 'matrix'") from None

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(cli, "run", imports_half_a_module)
    with pytest.raises(SystemExit) as raised:
        main(["doctor"])
    assert raised.value.code == 130
    assert capsys.readouterr().err == "bdkd: interrupted\n"
    assert signal.getsignal(signal.SIGINT) == before


def test_import_bdkd_does_not_change_the_signal_handler_of_a_program():
    script = (
        "import signal; before = signal.getsignal(signal.SIGINT); import bdkd; "
        "assert signal.getsignal(signal.SIGINT) is before"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
