"""Build and install the wheel, with and without a compiler, and run the loss of the README."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path

import pytest
import pythons
import yaml
from bdkd_kernels import available_backends
from compiler import HAS_COMPILER
from environments import add_the_other_packages, link, requirements, run, torch_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import bdkd
from bdkd.cli import main
from bdkd.extras import TRAINER_PACKAGES

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Return a copy of the files that git tracks, in a folder with a space in its name."""
    target = tmp_path_factory.mktemp("a source") / "bd kd"
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    for name in listed.stdout.splitlines():
        if (ROOT / name).exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    return target


@pytest.fixture(scope="module")
def builder(tmp_path_factory) -> Path:
    """Return the Python of an environment that contains only setuptools, without torch and pip.

    Together with cmake and ninja on the path, it equals the environment that pip makes for a build,
    but needs no network.
    """
    folder = tmp_path_factory.mktemp("builder")
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    link(folder, {"setuptools"})
    return folder / "bin" / "python"


def build(builder: Path, source: Path, target: Path, kind: str, **environment: str) -> Path:
    """Build an sdist or a wheel with the hook that pip calls (PEP 517)."""
    shutil.rmtree(source / "build", ignore_errors=True)
    target.mkdir(exist_ok=True)
    hook = f"import sys, setuptools.build_meta as b; print(b.build_{kind}(sys.argv[1]))"
    path = f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}"  # cmake and ninja
    done = run(
        builder, "-c", hook, target, cwd=source, env=os.environ | {"PATH": path} | environment
    )
    return target / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def sdist(builder, source, tmp_path_factory) -> Path:
    """Return the unpacked source distribution."""
    folder = tmp_path_factory.mktemp("sd ist")
    archive = build(builder, source, folder, "sdist")
    # Python 3.11.2 and 3.11.3 have no extraction filters, and newer versions warn without one.
    options = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
    shutil.unpack_archive(archive, folder, **options)
    return folder / archive.name.removesuffix(".tar.gz")


def test_the_build_needs_no_torch():
    requires = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert not [name for name in requires if "torch" in name]


def test_the_native_kernel_is_built_if_there_is_a_compiler():
    """Building it is optional, so without this test a broken build would only skip tests."""
    native = available_backends()["native"]
    assert bool(native) == HAS_COMPILER, native


def test_a_wheel_in_a_clean_environment(builder, sdist, tmp_path):
    """The wheel is built from the sdist, which shows that the sdist is complete."""
    wheel = build(builder, sdist, tmp_path / "wheels", "wheel")
    assert wheel.name.endswith("-py3-none-any.whl") != HAS_COMPILER, wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    for needed in ("bdkd/recipes/digits.toml", "bdkd/data/glyphs/japanese.toml", "bdkd/py.typed",
                   "bdkd_kernels/py.typed"):  # fmt: skip
        assert needed in names
    assert ("bdkd_kernels/libbdkd_native.so" in names) == HAS_COMPILER
    strangers = ("tests", "bench", "kernels", "build", "examples", "docs")
    assert not [name for name in names if name.startswith(strangers)]

    assert requirements(wheel) == {"torch"}
    python = torch_environment(tmp_path / "environment", wheel)
    assert six_lines(python, tmp_path, native=HAS_COMPILER)
    says = run(python, "-I", ROOT / "tests" / "loss_alone.py", cwd=tmp_path).stdout
    assert f"not installed: {' '.join(TRAINER_PACKAGES)}\n" in says
    assert ("native" in says) == HAS_COMPILER
    packages = ", ".join(TRAINER_PACKAGES)
    line = f"the trainer and its command line need {packages}: pip install 'bdkd[train]'"
    outside = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    for command in ([python.with_name("bdkd"), "train", "digits"], [python, "-m", "bdkd"]):
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=outside)
        assert (done.returncode, done.stdout, done.stderr) == (1, "", f"bdkd: {line}\n")

    add_the_other_packages(tmp_path / "environment")
    run(python, "-I", "-m", "bdkd", "train", "digits", "--max-steps", "2", "--log", cwd=tmp_path)
    assert (tmp_path / "runs/digits-bdkd-seed0/summary.json").exists()


def test_without_a_compiler_the_package_installs_and_says_what_is_missing(builder, sdist, tmp_path):
    none = {"CC": "/nonexistent/cc", "CXX": "/nonexistent/c++"}
    wheel = build(builder, sdist, tmp_path / "wheels", "wheel", **none)
    assert wheel.name.endswith("-py3-none-any.whl")
    python = torch_environment(tmp_path / "environment", wheel)
    assert six_lines(python, tmp_path, native=False)
    add_the_other_packages(tmp_path / "environment")
    done = run(python, "-I", "-m", "bdkd", "doctor", cwd=tmp_path)
    [line] = [line for line in done.stdout.splitlines() if "native kernel" in line]
    assert line.startswith("missing")
    assert "compiler" in done.stdout
    done = run(
        python, "-I", "-m", "bdkd", "train", "digits", "--max-steps", "2", "--log", cwd=tmp_path
    )
    assert "run folder" in done.stdout


def six_lines(python: Path, folder: Path, native: bool) -> bool:
    """Run the examples of the README with an empty PATH, and so without a compiler."""
    says = (
        "\nimport bdkd; print(bdkd.__file__); print(bdkd.__version__)"
        "\nprint(bool(bdkd.available_backends()['native']), float(accuracy))"
    )
    environment = os.environ | {"PATH": "", "CC": "/nonexistent/cc", "CXX": "/nonexistent/c++"}
    done = run(
        python, "-I", "-c", "\n".join(readme_blocks("python")) + says, cwd=folder, env=environment
    )
    where, its_version, has_native, correct = done.stdout.split()
    assert str(folder) in where
    assert its_version == project()["version"]
    assert 0 <= float(correct) <= 1
    return has_native == str(native)


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def test_an_sdist_holds_what_a_build_and_a_reader_need(sdist):
    for needed in ("LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "CMakeLists.txt",
                   "kernels/csrc/kernel.cpp", "kernels/bdkd_kernels/loss.py",
                   "bdkd/recipes/digits.toml"):  # fmt: skip
        assert (sdist / needed).exists(), needed
    assert "License-Expression: Apache-2.0" in (sdist / "PKG-INFO").read_text("utf-8")


def extras(name: str) -> set[str]:
    """Return the packages of an extra, and of the extras of bdkd that it includes."""
    found = set()
    for needed in map(Requirement, project()["optional-dependencies"][name]):
        found |= (
            set().union(*map(extras, needed.extras)) if needed.name == "bdkd" else {needed.name}
        )
    return found


def test_an_extra_that_needs_the_command_line_installs_it():
    for name in project()["optional-dependencies"]:
        for_the_loss = name in ("triton", "examples")
        assert (extras(name) >= TRAINER_PACKAGES.keys()) != for_the_loss, name
    rest = {"matplotlib", "scikit-learn", "scipy", "tensorboard"}
    assert extras("train") == TRAINER_PACKAGES.keys() | rest


def test_every_pin_fits_the_oldest_python():
    """If a pin requires a later patch release than Debian's 3.11.2, pip searches for minutes."""
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    oldest = f"{wanted.removeprefix('>=')}.0"
    pins = re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert len(pins) > 100
    here = {canonicalize_name(d.name): d.metadata.get("Requires-Python") for d in distributions()}
    named = {name: here.get(canonicalize_name(name)) for name in pins}
    refused = {k: v for k, v in named.items() if v and not SpecifierSet(v).contains(oldest)}
    assert not refused
    assert sum(value is not None for value in named.values()) > 100


def test_the_version_is_written_in_one_place():
    number = project()["version"]
    assert bdkd.__version__ == version("bdkd") == number
    changes = (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert re.search(r"^## (\S+)", changes, re.MULTILINE)[1] == number
    listed = run("git", "ls-files", "*.py", "*.cff", "*.cfg", "Makefile", cwd=ROOT).stdout
    for name in listed.splitlines():
        text = (ROOT / name).read_text("utf-8") if (ROOT / name).exists() else ""
        assert not re.search(rf"version\s*[:=]\s*[\"']?{re.escape(number)}\b", text), name


def test_a_source_tree_that_is_not_installed_has_an_unknown_version(monkeypatch, capsys):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr("bdkd.extras.version", missing)
    assert bdkd.__version__ == "0+unknown"
    main(["--version"])
    main(["doctor"])
    assert "0+unknown, Python" in capsys.readouterr().out


def test_wheels_are_made_for_both_linux_architectures():
    """cibuildwheel plans one wheel for each architecture, and the workflow runs it."""
    command = [sys.executable, "-m", "cibuildwheel", "--print-build-identifiers",
               "--platform", "linux", "--archs", "x86_64,aarch64", ROOT]  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if not k.startswith("CIBW_")}
    identifiers = run(*command, env=environment).stdout.split()
    assert identifiers == ["cp311-manylinux_x86_64", "cp311-manylinux_aarch64"]
    workflow = yaml.safe_load((ROOT / ".github/workflows/wheels.yml").read_text("utf-8"))
    machines = workflow["jobs"]["wheels"]["strategy"]["matrix"]["machine"]
    assert machines == ["ubuntu-latest", "ubuntu-24.04-arm"]
    steps = [step.get("run", "") for step in workflow["jobs"]["wheels"]["steps"]]
    assert any("cibuildwheel" in step for step in steps)
    assert any("--sdist" in step.get("run", "") for step in workflow["jobs"]["sdist"]["steps"])


def test_the_citation_names_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= citation.keys()  # required by the format
    assert citation["license"] == project()["license"]
    paper = citation["preferred-citation"]
    assert paper["title"] == "BD-KD: Balancing the Divergences for Online Knowledge Distillation"
    assert paper["url"].endswith("2212.12965")
    assert len(paper["authors"]) == 5


def test_issue_templates_ask_for_the_doctor():
    forms = list((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
    assert len(forms) >= 3
    for path in forms:
        form = yaml.safe_load(path.read_text("utf-8"))
        if path.name == "config.yml":
            continue
        assert {"name", "description", "body"} <= form.keys()
        assert len({part["id"] for part in form["body"] if part["type"] != "markdown"}) >= 2
    assert "bdkd doctor" in (ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml").read_text()


def test_pre_commit_hooks_run_without_a_network(tmp_path):
    """In a separate checkout, a commit of a file that ruff rejects fails. The hooks use the tools
    of .venv."""
    for name in (".pre-commit-config.yaml", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    bad = tmp_path / "bad.py"
    bad.write_text("import os\n")
    run("git", "init", "--quiet", cwd=tmp_path)
    run("git", "add", "bad.py", ".pre-commit-config.yaml", cwd=tmp_path)
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [repository["repo"] for repository in hooks] == ["local"]
    outside = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
    linted = run("make", "--dry-run", "--always-make", "lint", cwd=ROOT, env=outside).stdout
    for hook in hooks[0]["hooks"]:
        assert hook["entry"].split(" --")[0] in linted, "make lint and the hooks are the same tools"
    command = [sys.executable, "-m", "pre_commit", "run", "ruff-check", "--all-files"]
    environment = os.environ | {"PRE_COMMIT_HOME": str(tmp_path / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "bad.py" in done.stdout
    assert "F401" in done.stdout


def test_make_installs_nothing_twice(source):
    """The first `make` installs, also in a folder with a space in its name. A second `make` only
    runs the command."""
    # make may also run this suite. Its flags must not reach the make under test.
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


def git_folder(folder: Path, makefile: str) -> Path:
    """Make a repository that contains a Makefile."""
    folder.mkdir()
    (folder / "Makefile").write_text(makefile)
    run("git", "init", "--quiet", folder)
    run("git", "-C", folder, "add", "Makefile")
    identity = ("-c", "user.name=tests", "-c", "user.email=tests@localhost")
    run("git", "-C", folder, *identity, "commit", "--quiet", "-m", "a Makefile")
    return folder


def test_both_commands_are_tried_with_each_python(tmp_path, monkeypatch, capfd):
    """``make pythons`` prints which targets passed and failed, here with a trivial Makefile."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setenv("MAKEFLAGS", "--dry-run")  # as set by a make that runs this suite
    good = git_folder(tmp_path / "a checkout", "demo test:\n\t$(PYTHON) -c 'print(1)' > $@\n")
    number = ".".join(map(str, sys.version_info[:3]))
    assert pythons.main([sys.executable, "--root", str(good)]) == 0
    [line] = capfd.readouterr().out.splitlines()
    assert re.fullmatch(rf"{number} +demo ok +test ok +\d+ s  {sys.executable}", line)
    assert [path.name for path in tmp_path.iterdir()] == ["a checkout"]
    bad = git_folder(tmp_path / "bad", "demo:\n\ttrue\ntest:\n\t@echo the reason; exit 1\n")
    (bad / "changed").touch()
    assert pythons.main([sys.executable, "--root", str(bad)]) == 1
    captured = capfd.readouterr()
    assert re.search(r"demo ok +test FAILED", captured.out)
    assert "the reason" in Path(captured.out.split("log: ")[1].strip()).read_text()
    assert "not committed" in captured.err
    with pytest.raises(SystemExit, match="name another in PYTHONS"):
        pythons.main(["python3.5"])


def test_one_python_of_each_minor_version_is_found(tmp_path):
    def fake(path: str, version: str, status: int = 0) -> Path:
        program = tmp_path / path
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text(f"#!/bin/sh\necho {version.replace('.', ' ')} $0\nexit {status}\n")
        program.chmod(0o755)
        return program

    system = fake("usr/bin/python3.11", "3.11.2")
    (tmp_path / "usr/bin/python3").symlink_to("python3.11")
    newer = fake("pyenv/versions/3.11.7/bin/python3.11", "3.11.7")
    fake("pyenv/versions/3.10.1/bin/python3.10", "3.10.1")
    twelve = fake("path/python3.12", "3.12.1")
    fake("path/python3-config", "3.12.1")
    fake("path/python3.13", "3.13.0", status=1)  # without venv
    environment = {"PATH": f"{tmp_path / 'path'}:/nowhere", "PYENV_ROOT": str(tmp_path / "pyenv")}
    found = pythons.installed(environment, system=tmp_path / "usr/bin/python3")
    assert [(str(python), python.path.resolve()) for python in found] == [
        ("3.11.2", system), ("3.11.7", newer), ("3.12.1", twelve),
    ]  # fmt: skip
    outside = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
    command = ("make", "--dry-run", "pythons", "PYTHONS=python3.12 python3.13")
    planned = run(*command, cwd=ROOT, env=outside).stdout
    assert planned.strip().endswith("tests/pythons.py python3.12 python3.13")


def readme_blocks(language: str) -> list[str]:
    text = (ROOT / "README.md").read_text("utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_the_readme_runs():
    """The Python blocks of the README run in order as one program."""
    blocks = readme_blocks("python")
    assert blocks
    run(sys.executable, "-c", "\n".join(blocks))
