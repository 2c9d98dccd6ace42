"""Mutation testing (``make mutate``) makes the right changes and reports their results."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parent / "mutation"


@pytest.fixture
def project(tmp_path):
    """Return a repository with one module of two functions. The tests fully cover one of them."""
    shutil.copytree(
        TOOL, tmp_path / "tests/mutation", ignore=shutil.ignore_patterns("*.json", "*.md")
    )
    (tmp_path / "tests/mutation/judged.toml").write_text("")
    (tmp_path / ".gitignore").write_text(".mutate/\n__pycache__/\n")
    (tmp_path / "bdkd/models").mkdir(parents=True)
    (tmp_path / "bdkd/__init__.py").write_text("")
    (tmp_path / "bdkd/models/__init__.py").write_text("")
    (tmp_path / "bdkd/models/sizes.py").write_text(
        "LIMIT = 10\n\n\ndef half(size):\n    return size / 2\n\n\n"
        "def is_small(size):\n    return size < LIMIT\n"
    )
    (tmp_path / "tests/test_sizes.py").write_text(
        "import pytest\nfrom bdkd.models.sizes import half, is_small\n\n\n"
        "@pytest.fixture(scope='module')\ndef of_six():\n    return half(6)\n\n\n"
        "def test_first(of_six):\n    assert of_six\n\n\n"
        "def test_half(of_six):\n    assert of_six == 3\n\n\n"
        "def test_is_small():\n    assert is_small(3) and not is_small(30)\n"
    )
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    return tmp_path


def mutation(project: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "tests/mutation", "--workers", "1", *arguments],
        cwd=project, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def survivors(project: Path) -> list[str]:
    mutation(project, "--report")
    report = (project / "tests/mutation/report.md").read_text()
    return [line[2:] for line in report.splitlines() if line.startswith("+ ")]


@pytest.mark.soak
def test_a_session_from_its_start_to_its_end(project):
    """Caught and missed changes are distinguished. Results are kept, and a new test is taken into
    account. A judgement removes a survivor from the list. The sample notices a weakened test."""
    source = (project / "bdkd/models/sizes.py").read_text()
    mutation(project, "--foreground")
    edges = ["return size <= LIMIT", "LIMIT = 9", "LIMIT = 11"]
    assert sorted(survivors(project)) == sorted(edges)
    assert (project / "bdkd/models/sizes.py").read_text() == source

    assert "killed" not in mutation(project, "--foreground")  # nothing is run twice

    tests = project / "tests/test_sizes.py"
    tests.write_text(tests.read_text() + "\n\ndef test_edge():\n    assert not is_small(10)\n")
    mutation(project, "--foreground", "--again")
    assert survivors(project) == ["LIMIT = 9"]

    (project / "tests/mutation/judged.toml").write_text(
        '[[change]]\nfile = "bdkd/models/sizes.py"\nwas = "LIMIT = 10"\n'
        'now = "LIMIT = 9"\nreason = "sizes are even"\n'
    )
    assert survivors(project) == []

    mutation(project, "--choose-sample")
    assert "0 no longer in the code" in mutation(project, "--sample")
    tests.write_text(tests.read_text().replace("of_six == 3", "of_six"))
    done = subprocess.run([sys.executable, "tests/mutation", "--sample"], cwd=project,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 1
    assert "NOT CAUGHT: bdkd/models/sizes.py half" in done.stdout


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("y = f(a, b, c)", {"y = f(b, a, c)", "y = f(a, c, b)"}),
        ("y = max(a, b)", set()),
        ("y = f(a, b=c, d=e)", {"y = f(a, d=e)", "y = f(a, b=c,)"}),
        ("a * b", {"a / b", "a"}),
        ("a + b - c", {"a - b - c", "a + b + c", "a + b"}),
        ("x: int | None = a", set()),
        ("def f(a: int | None) -> int | None: pass", set()),
        ("raise Error(a + b)", set()),
        ("self.total += a", {"pass"}),
        ("while a <= 1: pass", {"while a < 1: pass", "while a <= 2: pass", "while a <= 0: pass",
                                "while not a <= 1: pass"}),
    ],
)  # fmt: skip
def test_changes_to_a_line(before, after, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(TOOL))
    import mutants

    before += "\n"  # every file ends with a newline
    (tmp_path / "line.py").write_text(before)
    found = {
        " ".join((mutants.mutated_source(before, m.operator, m.occurrence) or "none").split())
        for m in mutants.mutants(tmp_path, "line.py")
    } - {"none"}
    assert found == {" ".join(a.split()) for a in after}
