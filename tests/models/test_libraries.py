"""timm and torchvision can be imported with a torchvision that was built for another torch.

The packages here are small replacements. Their import fails in the same place as that of the real
packages, also on a machine with a matching torchvision.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {
    # As in torchvision: the compiled operators are not found, and the fake kernels need two of them
    "torchvision/__init__.py": "from . import extension\nfrom . import _meta_registrations, models",
    "torchvision/extension.py": "print('extension')\nloaded = False",
    "torchvision/_meta_registrations.py": """
import torch
import torchvision.extension
assert not torchvision.extension.loaded
@torch.library.register_fake("torchvision::nms")
def nms(dets, scores, iou_threshold): ...
@torch.library.register_fake("torchvision::qnms")
def qnms(dets, scores, iou_threshold): ...
""",
    "torchvision/models.py": "import torchvision.extension",
    # timm imports torchvision after some of its own modules.
    "timm/__init__.py": "from . import layers\nfrom . import data",
    "timm/layers.py": "",
    "timm/data.py": "import torchvision",
}


def python(script: str, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join(map(str, (folder, ROOT, ROOT / "kernels")))
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": path, **environment},
    )  # fmt: skip


@pytest.fixture
def packages(tmp_path):
    for name, text in PACKAGES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


IMPORT = "from bdkd.models.libraries import import_library as get, lacks_operators as lacks\n"


@pytest.mark.parametrize(
    "script",
    [
        "get('timm'), get('timm')",
        "get('torchvision'), get('timm')",
        # A notebook in which the first import failed
        "try: import timm\nexcept RuntimeError: pass\nget('timm')",
    ],
)
def test_networks_of_a_torchvision_for_another_torch_can_be_used(script, packages):
    check = "\nimport timm, torchvision.models; torchvision.extension, timm.layers; assert lacks()"
    done = python(IMPORT + script + check, packages)
    assert done.returncode == 0, done.stderr
    warned, *others = done.stderr.splitlines()
    assert others == []
    assert warned.startswith("warning: the installed torchvision")
    assert "does not belong to torch" in warned
    assert "only its networks can be used" in warned


def test_only_rank_0_warns(packages):
    assert python(IMPORT + "get('timm')", packages, RANK="1").stderr == ""


def test_a_matching_torchvision_is_imported_without_changes(packages):
    (packages / "torchvision" / "_meta_registrations.py").write_text("")
    done = python(IMPORT + "get('timm'); assert not lacks()", packages)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "extension\n")


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("torchvision/extension.py", "raise OSError('libcudart.so: cannot open')",
         "timm is installed but does not import (OSError: libcudart.so: cannot open)"),
        ("torchvision/extension.py", "raise RuntimeError('different CUDA major versions')",
         "timm is installed but does not import (RuntimeError: different CUDA major versions)"),
        # After the placeholders, something else is missing.
        ("torchvision/models.py", "raise RuntimeError('operator torchvision::roi does not exist')",
         "(RuntimeError: operator torchvision::roi does not exist)"),
        ("timm/data.py", "import torchvision, no_such_module", "timm needs no_such_module"),
    ],
)  # fmt: skip
def test_other_import_errors_keep_their_message(file, text, message, packages):
    (packages / file).write_text(text)
    done = python(
        f"{IMPORT}from bdkd.errors import RunError\n"
        "try: get('timm')\nexcept RunError as error: print(error)\nassert not lacks()",
        packages,
    )
    assert message in done.stdout
    assert done.stderr == ""


def test_doctor_reports_the_mismatch_and_does_not_warn(packages):
    script = "from bdkd.cli.doctor import _torchvision; print(_torchvision())"
    done = python(script, packages)
    assert "found=False" in done.stdout
    assert "does not match this torch" in done.stdout
    assert "install the torchvision built for this torch" in done.stdout
    assert done.stderr == ""
