"""House rules: dependencies between packages, sizes of files and functions, style and types."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {"bdkd": ROOT / "bdkd", "bdkd_kernels": ROOT / "kernels" / "bdkd_kernels"}

# Allowed imports: cli -> trainer -> runs -> engine -> objectives, data, models, evaluation,
# distributed -> kernels.
LEAVES = {
    "bdkd._torch_compat", "bdkd.bounds", "bdkd.config", "bdkd.device", "bdkd.errors",
    "bdkd.extras", "bdkd.identity", "bdkd.interrupts", "bdkd.metrics", "bdkd.plugins",
    "bdkd.registry", "bdkd.text",
}  # fmt: skip
ENGINE = {
    "bdkd.engine", "bdkd.evaluation", "bdkd.distributed", "bdkd.objectives", "bdkd.data",
    "bdkd.models", *LEAVES,
}  # fmt: skip
ALLOWED = {
    "bdkd_kernels": {"bdkd_kernels"},
    "bdkd.objectives": {"bdkd_kernels", "bdkd.objectives", *LEAVES},
    "bdkd.data": {"bdkd.data", *LEAVES},
    "bdkd.models": {"bdkd.models", *LEAVES},
    "bdkd.distributed": {"bdkd.distributed", "bdkd.data", *LEAVES},
    "bdkd.evaluation": {
        "bdkd.evaluation", "bdkd_kernels", "bdkd.distributed", "bdkd.data", "bdkd.models", *LEAVES,
    },
    "bdkd.engine": ENGINE,
    "bdkd.runs": {"bdkd.runs", *ENGINE},
    "bdkd.export": {"bdkd.export", "bdkd.runs", *ENGINE},
    "bdkd.trainer": {"bdkd.runs", *ENGINE},
    "bdkd._torch_compat": {"bdkd.errors"},
    "bdkd.config": {
        "bdkd.bounds", "bdkd.config", "bdkd.errors", "bdkd.extras", "bdkd.metrics", "bdkd.plugins",
        "bdkd.registry", "bdkd.text",
    },
    "bdkd.device": {"bdkd.config", "bdkd.errors"},
    "bdkd.extras": set(),
    "bdkd.bounds": {"bdkd.errors"},
    "bdkd.metrics": {"bdkd.registry"},
    "bdkd.plugins": {"bdkd.errors", "bdkd.text"},
    "bdkd.registry": {"bdkd.errors", "bdkd.plugins"},
    "bdkd.text": {"bdkd.errors"},
    "bdkd.errors": set(),
    "bdkd.identity": {"bdkd.errors"},
    "bdkd.interrupts": set(),
}  # fmt: skip


def modules() -> dict[str, Path]:
    found = {}
    for package, folder in PACKAGES.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((package, *parts)).removesuffix(".__init__")] = path
    return found


def package_of(module: str) -> str:
    """``bdkd.engine.step`` -> ``bdkd.engine``; ``bdkd_kernels.ops`` -> ``bdkd_kernels``."""
    parts = module.split(".")
    return parts[0] if parts[0] == "bdkd_kernels" else ".".join(parts[:2])


def imports(path: Path) -> set[str]:
    """Return the modules of bdkd and bdkd_kernels that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module)
    return {name for name in found if name.split(".")[0] in PACKAGES}


def test_dependencies_point_one_way():
    checked = 0
    for module, path in modules().items():
        allowed = ALLOWED.get(package_of(module))
        if allowed is None:
            continue  # the command line and bdkd/__init__.py may import everything
        for imported in imports(path):
            checked += 1
            assert package_of(imported) in allowed, f"{module} must not import {imported}"
    assert checked > 50


def test_importing_the_kernels_does_not_import_the_trainer():
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); import bdkd_kernels; "
        "print([m for m in sys.modules if m.split('.')[0] in ('bdkd', 'triton', 'tyro')])"
    )
    done = subprocess.run([sys.executable, "-I", "-c", script, str(ROOT / "kernels")],
                          capture_output=True, text=True, check=True)  # fmt: skip
    assert done.stdout.strip() == "[]"


# Functions whose signature torch.utils.flop_counter prescribes
GIVEN = {"_convolution_backward"}


def test_files_and_functions_have_a_limited_size():
    """Files have at most 400 lines, and functions at most 60. Functions have at most 14 parameters
    in the kernels and 10 in the trainer. Triton kernels are exempt from the latter, because Triton
    needs a parameter for each pointer and stride."""
    for package, folder in PACKAGES.items():
        for path in folder.rglob("*.py"):
            text = path.read_text("utf-8")
            assert text.count("\n") <= 400, path
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.FunctionDef):
                    where = f"{path.name}, {node.name}"
                    assert node.end_lineno - node.lineno < 60, where
                    parameters = len(node.args.args) + len(node.args.kwonlyargs)
                    most = 14 if package == "bdkd_kernels" else 10
                    given = node.name.endswith("_kernel") or node.name in GIVEN
                    assert parameters <= most or given, where
    for path in (ROOT / "kernels" / "csrc").iterdir():
        assert path.read_text("utf-8").count("\n") <= 400, path


NAMED_TUPLE = {"_asdict", "_fields", "_make", "_replace"}  # public, in spite of the underscore


def private_names(text: str) -> list[str]:
    """Return attributes with an underscore that the file does not define, and private modules."""
    tree = ast.parse(text)
    own = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            own.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            own.add(node.id)
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("self", "cls"):
            own.add(node.attr)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node, ast.Import):
            names = [part for alias in node.names for part in alias.name.split(".")]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr"):
            names = [x.value for x in node.args[1:2] if isinstance(x, ast.Constant)]
        else:
            continue
        found += [x for x in names if re.match(r"_[^_]", str(x)) and x not in own | NAMED_TUPLE]
    return found


def test_private_apis_are_used_in_one_file():
    """Only _torch_compat.py uses private APIs of torch and triton."""
    for folder in (ROOT / "kernels", ROOT / "bdkd"):
        [compat] = folder.rglob("_torch_compat.py")
        assert private_names(compat.read_text("utf-8"))
        for path in folder.rglob("*.py"):
            # os._exit is documented. atexit has no public function that runs registered functions.
            found = set(private_names(path.read_text("utf-8"))) - {
                "_exit", "_run_exitfuncs", "_torch_compat",
            }  # fmt: skip
            assert path == compat or not found, f"{path.relative_to(ROOT)} uses {found}"
    for text, names in (
        ("import torch\ntorch._C._len()", ["_C", "_len"]),
        ("from torch._subclasses import FakeTensor", ["_subclasses"]),
        ("from torch.utils._pytree import tree_map", ["_pytree"]),
        ("from torch.autograd.forward_ad import _current_level", ["_current_level"]),
        ("getattr(x, '_version', 0)", ["_version"]),
        ("class A:\n    def f(self, other):\n        self._x = other._x._replace()", []),
    ):
        assert sorted(private_names(text)) == sorted(names)


@pytest.mark.parametrize(
    "command",
    [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]],
    ids=["ruff", "format", "mypy"],
)
def test_style_and_types_are_clean(command):
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_continuous_integration_runs_the_tests_and_the_mutants(tmp_path):
    """An empty script once passed without running a test."""
    for name in ("make", "chromium"):
        stub = tmp_path / name
        stub.write_text(f'#!/bin/sh\necho {name} "$@" >> {tmp_path}/called\n')
        stub.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run(["bash", ROOT / ".ci" / "run"], env=environment, check=True)
    assert (tmp_path / "called").read_text().splitlines() == ["make test", "make mutate-sample"]
