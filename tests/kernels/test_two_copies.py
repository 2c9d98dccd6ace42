"""Two copies of the package in one process, as where another project vendors the loss.

Each copy registers its own operators, so both load, in either order, and compute the same.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import bdkd_kernels
import pytest

PACKAGE = Path(bdkd_kernels.__file__).parent

USE_BOTH = """
import sys
from importlib import import_module

import torch

copies = [import_module(name) for name in sys.argv[1:]]
names = {name for name in torch._C._dispatch_get_all_op_names() if "native_forward" in name}
assert names == {"bdkd::native_forward", "vendor_fast_loss::native_forward"}, names

torch.manual_seed(0)
s, t = torch.randn(2, 6, 10)
y = torch.arange(6)


def results(copy, backend, compiled):
    def loss(a, b):
        out = copy.bdkd_loss(a, b, y, temperature=4.0, backend=backend)
        return out.student + 2 * out.teacher, out.stats.reverse_kl

    if compiled:
        loss = torch.compile(loss, fullgraph=True, backend="aot_eager")
    a, b = s.clone().requires_grad_(), t.clone().requires_grad_()
    value, reverse_kl = loss(a, b)
    value.backward()
    return value.detach(), reverse_kl, a.grad, b.grad


for backend, available in copies[0].available_backends().items():
    assert bool(copies[1].available_backends()[backend]) == bool(available)
    if available:
        expected = results(copies[0], backend, False)
        for copy in copies:
            for compiled in (False, True):
                found = results(copy, backend, compiled)
                torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
        print(backend)
"""


@pytest.mark.parametrize("vendored_first", [False, True])
def test_two_copies_in_one_process_compute_the_same(tmp_path, vendored_first):
    (tmp_path / "vendor").mkdir()
    copy = tmp_path / "vendor" / "fast_loss"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    names = ["bdkd_kernels", "vendor.fast_loss"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1",
                   "PYTHONPATH": os.pathsep.join((str(tmp_path), str(PACKAGE.parent)))}  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", USE_BOTH, *(reversed(names) if vendored_first else names)],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    expected = {"reference", "native"}
    if importlib.util.find_spec("triton"):
        expected |= {"triton"}
    assert set(done.stdout.split()) == expected
