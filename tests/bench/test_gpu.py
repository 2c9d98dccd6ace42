"""Dry runs of the scripts for GPU runs, and the tables that are made from a GPU run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed, so its kernels cannot be compiled")

ROOT = Path(__file__).parents[2]
RUN = ROOT / "bench" / "results" / "2026-11-27-gpu-h200"


@pytest.mark.soak
@pytest.mark.timeout(300)
def test_a_dry_run_writes_a_summary_and_few_files(tmp_path):
    """Only stage 3 runs, because `bench/gpu.sh OUT --stages 1 2 3 4 --dry-run` takes minutes."""
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    command = ["bash", "bench/gpu.sh", str(tmp_path / "out"), "--stages", "3", "--dry-run"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "summary.txt", "measurements.jsonl", "measurements.csv", "results.json", "logs.tar.gz",
    }  # fmt: skip
    assert "Targets" in (tmp_path / "out" / "summary.txt").read_text()


def test_the_comparison_of_two_runs_matches_the_docs():
    command = [sys.executable, "bench/gpu/figure.py", str(RUN), "--compare",
               str(RUN / "stage1-1ebbab2.jsonl")]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    page = " ".join((ROOT / "docs" / "explanation" / "triton-kernel.md").read_text("utf-8").split())
    assert f"{done.stdout.strip()} the times of the table" in page


def test_the_table_is_that_of_the_run():
    code = (
        "import sys; sys.path.insert(0, 'bench/gpu')\n"
        "from pathlib import Path\n"
        "import figure, measurements\n"
        "print(figure.markdown(figure.table(measurements.read(Path(sys.argv[1])))))"
    )
    command = [sys.executable, "-c", code, str(RUN)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    page = (ROOT / "docs" / "explanation" / "triton-kernel.md").read_text("utf-8")
    assert done.stdout.strip() in page
