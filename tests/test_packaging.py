"""What a user installs: the wheel, with and without a compiler, and the loss from the README."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest
from bdkd_kernels import available_backends
from compiler import HAS_COMPILER

ROOT = Path(__file__).parent.parent


def run(*command: object, **options) -> subprocess.CompletedProcess:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True,
                          timeout=550, **options)  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """The files that git would deliver, in a folder with a space in its name."""
    target = tmp_path_factory.mktemp("a source") / "bd kd"
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    for name in listed.stdout.splitlines():
        if (ROOT / name).exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    return target


def build_wheel(source: Path, target: Path, **environment: str) -> Path:
    """A wheel, under build isolation."""
    shutil.rmtree(source / "build", ignore_errors=True)
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", target, source,
        env=os.environ | environment)  # fmt: skip
    [wheel] = target.glob("*.whl")
    return wheel


def clean_environment(folder: Path, wheel: Path) -> Path:
    """A virtual environment that has the wheel and, from this one, its dependencies: nothing of the
    source tree. Returns its Python."""
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", wheel)
    [site] = folder.glob("lib/python3*/site-packages")
    # A folder named in a .pth file is searched, but its own .pth files (the editable install of
    # this source tree) are not read.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return python


def test_the_build_needs_no_torch():
    requires = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert not [name for name in requires if "torch" in name]


def test_the_native_kernel_is_there_where_a_compiler_is():
    """Building it is optional, so a broken build would only show as skipped tests."""
    native = available_backends()["native"]
    assert bool(native) == HAS_COMPILER, native


def test_a_wheel_in_a_clean_environment(source, tmp_path):
    wheel = build_wheel(source, tmp_path / "wheels")
    assert wheel.name.endswith("-py3-none-any.whl") != HAS_COMPILER, wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    for needed in ("bdkd/recipes/digits.toml", "bdkd/py.typed", "bdkd_kernels/py.typed"):
        assert needed in names
    assert ("bdkd_kernels/libbdkd_native.so" in names) == HAS_COMPILER
    assert not [name for name in names if name.startswith(("tests", "bench", "kernels", "build"))]

    python = clean_environment(tmp_path / "environment", wheel)
    code = (
        "import bdkd, torch; print(bdkd.__file__);"
        "print(bool(bdkd.available_backends()['native']));"
        "s, t = torch.randn(2, 8, 10, requires_grad=True).unbind();"
        "out = bdkd.bdkd_loss(s, t, torch.arange(8), backend='auto');"
        "(out.student + out.teacher).backward()"
    )
    done = run(python, "-I", "-c", code, cwd=tmp_path)
    where, native = done.stdout.split()
    assert str(tmp_path) in where
    assert native == str(HAS_COMPILER)
    run(python, "-I", "-m", "bdkd", "train", "digits", "--max-steps", "2", "--log", cwd=tmp_path)
    assert (tmp_path / "runs/digits-bdkd-seed0/summary.json").exists()


def test_without_a_compiler_the_package_installs_and_says_what_is_missing(source, tmp_path):
    wheel = build_wheel(source, tmp_path / "wheels", CC="/nonexistent/cc", CXX="/nonexistent/c++")
    assert wheel.name.endswith("-py3-none-any.whl")
    python = clean_environment(tmp_path / "environment", wheel)
    done = run(python, "-I", "-m", "bdkd", "doctor", cwd=tmp_path)
    [line] = [line for line in done.stdout.splitlines() if "native kernel" in line]
    assert line.startswith("missing")
    assert "compiler" in done.stdout
    done = run(
        python, "-I", "-m", "bdkd", "train", "digits", "--max-steps", "2", "--log", cwd=tmp_path
    )
    assert "run folder" in done.stdout


def test_make_plans_nothing_where_everything_is_installed(source):
    """A second `make` only runs the command; a first one in a folder with a space sets up."""
    # The suite itself is run by make, whose flags must not reach this one.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
    first = run("make", "--dry-run", "demo", cwd=source, env=environment).stdout
    assert "venv .venv" in first
    assert "'.[train]'" in first
    venv = source / ".venv"
    (venv / "bin").mkdir(parents=True)
    for made in ("bin/python", ".installed", ".installed-dev"):
        (venv / made).touch()
    for target, command in (("demo", "bdkd train digits"), ("test", "pytest")):
        planned = run("make", "--dry-run", target, cwd=source, env=environment).stdout
        planned = planned.strip().splitlines()
        assert len(planned) == 1
        assert command in planned[0]
    shutil.rmtree(venv)


def readme_blocks(language: str) -> list[str]:
    text = (ROOT / "README.md").read_text("utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_the_readme_runs():
    """Every Python block of the README, in order, as one program."""
    blocks = readme_blocks("python")
    assert blocks
    run(sys.executable, "-c", "\n".join(blocks))
