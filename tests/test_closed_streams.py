"""Run commands with closed standard streams (``2>&-``), as some daemons do."""

import subprocess
import sys
from pathlib import Path

import pytest

TINY = str(Path(__file__).with_name("training") / "tiny.toml")


def with_closed(streams: str, *arguments: str) -> subprocess.CompletedProcess:
    """Run a command with closed streams, such as ``>&- 2>&-``."""
    command = ["sh", "-c", f'exec "$@" {streams}', "sh", sys.executable, "-m", "bdkd", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("streams", "prints"),
    [
        pytest.param("2>&-", True, marks=pytest.mark.soak),
        pytest.param(">&-", False, marks=pytest.mark.soak),
        pytest.param(">&- 2>&-", False, marks=pytest.mark.soak),
        ("<&- >&- 2>&-", False),
    ],
)
def test_training_works_with_closed_streams(streams, prints, tmp_path):
    run = tmp_path / "run"
    done = with_closed(streams, "train", TINY, "--train.epochs", "1", "--run-dir", str(run))
    assert done.returncode == 0, done.stdout + done.stderr
    assert (run / "summary.json").exists()
    assert ("run folder" in done.stdout) == prints


def test_a_comparison_works_with_closed_streams(tmp_path):
    command = ["compare", TINY, "--methods", "dml", "--seeds", "1", "--train.epochs", "1"]
    done = with_closed(">&- 2>&-", *command, "--folder", str(tmp_path / "c"))
    assert done.returncode == 0
    assert (tmp_path / "c" / "comparison.json").exists()


@pytest.mark.parametrize("streams", [
    "2>&-", pytest.param(">&-", marks=pytest.mark.soak),
    pytest.param("<&- >&- 2>&-", marks=pytest.mark.soak),
])  # fmt: skip
def test_a_failure_with_closed_streams_keeps_its_exit_code(streams, tmp_path):
    assert with_closed(streams, "evaluate", str(tmp_path / "nothing")).returncode == 1
    assert with_closed(streams, "train", "no-such-recipe").returncode == 2
