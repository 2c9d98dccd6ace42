"""The Triton kernels, interpreted, on the CPU: see triton_grid.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="no triton for this platform: native and reference tests run")


@pytest.mark.timeout(900)
def test_interpreted_grid():
    grid = Path(__file__).with_name("triton_grid.py")
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "-p", "no:cacheprovider", str(grid)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


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
