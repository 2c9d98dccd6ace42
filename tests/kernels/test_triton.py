"""Run the tests of the Triton kernels on the CPU; see triton_grid.py and triton_launches.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from compiler import HAS_COMPILER

pytest.importorskip(
    "triton", minversion="3.6", reason="no triton here: native and reference tests run"
)


def run_by_itself(name: str, workers: str, interpreted: str, **variables: str) -> None:
    """Run a file of tests in a new process, because its variables must be set before it starts."""
    file = Path(__file__).with_name(name)
    command = [
        sys.executable, "-m", "pytest", "-q", "-n", workers, "-p", "no:cacheprovider", str(file),
    ]  # fmt: skip
    environment = {
        **os.environ, "TRITON_INTERPRET": interpreted, "OMP_NUM_THREADS": "1", **variables,
    }  # fmt: skip
    environment.pop("PYTEST_XDIST_WORKER", None)
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.timeout(1800)
def test_interpreted_grid():
    run_by_itself("triton_grid.py", workers="2", interpreted="1")


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_a_larger_interpreted_grid():
    run_by_itself("triton_grid.py", workers="2", interpreted="1", BDKD_SOAK="1")


@pytest.mark.skipif(
    not HAS_COMPILER, reason="waits for a C compiler; test_interpreted_grid needs none"
)
def test_launches_with_a_stub_driver():
    run_by_itself("triton_launches.py", workers="0", interpreted="0")


def test_cpu_tensors_need_the_interpreter():
    code = (
        "import torch, bdkd_kernels as k\n"
        "x = torch.zeros(2, 3)\n"
        "try: k.bdkd_loss(x, x, None, backend='triton')\n"
        "except RuntimeError as error: print(error)\n"
        "print(bool(k.available_backends()['triton']) == torch.cuda.is_available())"
    )
    environment = {key: x for key, x in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True,
                          text=True, check=True)  # fmt: skip
    message, agrees = done.stdout.strip().splitlines()
    assert "TRITON_INTERPRET=1" in message
    assert agrees == "True"


def test_cache_keys_do_not_depend_on_what_is_called_first():
    """Triton's own keys depend on it, so cached kernels would be compiled again."""
    code = (
        "import sys\n"
        "from bdkd_kernels.triton import launcher as t\n"
        "t.Launcher(getattr(t, sys.argv[1] + '_kernel'), 4)\n"
        "print(getattr(t, sys.argv[1] + '_kernel').cache_key, t.loop_kernel.cache_key)"
    )
    environment = {key: x for key, x in os.environ.items() if key != "TRITON_INTERPRET"}
    keys = {
        subprocess.run([sys.executable, "-c", code, first], env=environment, capture_output=True,
                       text=True, check=True).stdout.split()[1]
        for first in ("loop", "tile")
    }  # fmt: skip
    assert len(keys) == 1
