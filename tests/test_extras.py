"""Without the extra ``bdkd[train]``, every command prints one line that says what to install.

These tests replace ``find_spec``, because a command in an environment without the packages takes
seconds. ``test_packaging.py`` runs two commands, and imports every module, in such an environment.
"""

import ast
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

import bdkd
from bdkd import extras
from bdkd.cli import COMMANDS, main
from bdkd.extras import TRAINER_PACKAGES, missing_packages

PACKAGE = Path(bdkd.__file__).parent


@pytest.fixture
def hide(monkeypatch):
    """Return a function that makes modules appear as not installed."""

    def hide(*modules: str) -> None:
        monkeypatch.setattr(
            extras, "find_spec", lambda name: None if name in modules else find_spec(name)
        )

    return hide


@pytest.mark.parametrize(
    "arguments",
    [[], ["--help"], ["--version"], ["--debug"], ["unknown"], *([name] for name in COMMANDS)],
    ids=" ".join,
)
def test_every_command_says_what_to_install(arguments, hide, capsys):
    hide(*TRAINER_PACKAGES.values())
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    said = capsys.readouterr()
    packages = "msgspec, numpy, safetensors, tomli-w, tqdm, tyro"
    assert said.err == (
        f"bdkd: the trainer and its command line need {packages}: pip install 'bdkd[train]'\n"
    )
    assert (exit_.value.code, said.out) == (1, "")


def test_only_the_missing_packages_are_named(hide, capsys):
    hide("tomli_w")
    with pytest.raises(SystemExit, match="1"):
        main(["doctor"])
    assert "command line need tomli-w: pip" in capsys.readouterr().err
    assert missing_packages(("numpy", "tqdm")) is None
    hide()
    assert missing_packages() is None


def test_one_process_per_machine_prints_the_message(hide, capsys, monkeypatch):
    """torchrun starts one process per GPU, which would all print the same line."""
    hide("tyro")
    for rank, lines in (("0", 1), ("3", 0)):
        monkeypatch.setenv("RANK", f"1{rank}")  # a rank of a second machine
        monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(SystemExit, match="1"):
            main(["train", "digits"])
        assert len(capsys.readouterr().err.splitlines()) == lines


def imported_at_once(path: Path) -> set[str]:
    """Return the packages of PyPI that importing a file imports, except torch and its dependencies
    jinja2 and markupsafe."""
    found = set()
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.split(".")[0])
    installed = {"torch", "jinja2", "markupsafe", "bdkd", "bdkd_kernels"}
    return found - sys.stdlib_module_names - installed


def asked_for(path: Path) -> set[str]:
    """Return the modules of the packages that a file passes to ``missing_packages``."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "missing_packages":
            found |= {TRAINER_PACKAGES[name] for name in ast.literal_eval(node.args[0])}
    return found


def test_every_module_checks_the_packages_that_it_imports():
    """The check is in the module's file or in the ``__init__.py`` of a package that contains it."""
    checked = 0
    for path in PACKAGE.rglob("*.py"):
        needed = imported_at_once(path)
        if path.is_relative_to(PACKAGE / "cli"):  # main checks all packages
            assert needed <= set(TRAINER_PACKAGES.values()), path
            continue
        folders = [folder for folder in path.parents if folder.is_relative_to(PACKAGE)]
        known = set().union(*map(asked_for, [path, *(f / "__init__.py" for f in folders)]))
        assert needed <= known, f"{path} does not ask for {needed - known}"
        checked += bool(needed)
    assert checked > 20


@pytest.mark.parametrize("name", ["bdkd.config", "bdkd.evaluation.predictions", "bdkd.engine"])
def test_a_module_names_the_extra_that_it_needs(name, hide, monkeypatch):
    monkeypatch.delitem(sys.modules, name, raising=False)
    hide(*TRAINER_PACKAGES.values())
    with pytest.raises(ImportError, match=r"need .*: pip install 'bdkd\[train\]'$"):
        import_module(name)
