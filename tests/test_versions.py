"""``make versions`` tries the right pairs and prints its table. A fake pip makes the tests fast."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import versions
from versions import Pair, Result

ROOT = Path(__file__).parent.parent


def answer(stdout: str = "", stderr: str = "", status: int = 0) -> subprocess.CompletedProcess:
    return subprocess.CompletedProcess([], status, stdout, stderr)


def test_the_newest_release_of_each_minor_version_is_tried():
    listed = ["2.15.0rc1", "2.13.0+cpu", "2.13.0", "2.10.1", "2.10.0", "2.9.1", "2.8.0", "2.7.1"]
    assert versions.newest_of_each_minor(listed) == ["2.8.0", "2.9.1", "2.10.1", "2.13.0"]


def test_a_pair_is_what_the_wheel_of_torch_requires(monkeypatch):
    def wheel(*requirements: str):
        report = {"install": [{"metadata": {"requires_dist": list(requirements)}}]}
        monkeypatch.setattr(versions, "pip", lambda *_: answer(json.dumps(report)))

    wheel("filelock", "opt-einsum; extra == 'opt'", "triton~=3.8.0; platform_system == 'Linux'")
    assert versions.pair_of("2.14.1") == Pair("2.14.1", "~=3.8.0")
    wheel("filelock")  # a CPU build
    assert versions.pair_of("2.13.0") == Pair("2.13.0", "==3.7.1")
    refusal = "WARNING: slow\nERROR: Cannot install torch==2.15.0\nERROR: ResolutionImpossible"
    monkeypatch.setattr(versions, "pip", lambda *_: answer(stderr=refusal, status=1))
    assert versions.pair_of("2.15.0").problem == "ERROR: Cannot install torch==2.15.0"


def test_numpy_is_limited_only_for_the_interpreter_of_triton_3_6(tmp_path):
    for triton, held in (("==3.6.0", True), ("~=3.9.0", False), ("", False)):
        lines = versions.constraints(tmp_path, triton).read_text("utf-8").splitlines()
        assert ("numpy<2.4" in lines) == held
        assert not any(line.startswith(("torch==", "triton==", "numpy==")) for line in lines)
        assert any(line.startswith("hypothesis==") for line in lines)


def test_every_suite_names_tests_that_exist():
    for suite in versions.SUITES:
        assert all((ROOT / versions.KERNELS / file).is_file() for file in suite.files)


def imports(path: Path) -> set[str]:
    """Return the top-level modules that a file imports, also within functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module)
    return {name.split(".")[0] for name in names}


def test_environments_contain_the_packages_that_tests_import():
    """8 tests failed when NumPy was no longer a dependency of bdkd and was therefore missing."""
    paths = [ROOT / versions.KERNELS / file for suite in versions.SUITES for file in suite.files]
    seen, found = set(), {"pytest"}
    while paths:
        seen.add(path := paths.pop())
        for name in imports(path) - sys.stdlib_module_names - {"bdkd", "bdkd_kernels"}:
            ours = [f for x in ("tests", "tests/kernels", "bench")
                    if (f := ROOT / x / f"{name}.py").is_file()]  # fmt: skip
            paths += [file for file in ours if file not in seen]
            found |= set() if ours else {name}
    assert len(seen) > 15
    assert found <= {"torch", "triton", *versions.TOOLS}


def test_passed_and_failed_tests_are_counted(tmp_path):
    (tmp_path / "test_it.py").write_text(
        "import os, pytest\n"
        "def test_good(): assert os.environ['TRITON_INTERPRET'] == '1'\n"
        "def test_bad(): assert False\n"
        "@pytest.mark.skip\ndef test_skipped(): pass\n"
    )
    (tmp_path / "test_broken.py").write_text("import no_such_module\n")
    suite = versions.Suite("here", ("test_it.py", "test_broken.py"), interpreted=True)
    log = tmp_path / "log"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(versions, "KERNELS", f"{tmp_path}{os.sep}")
        assert versions.run(suite, Path(sys.executable), log, workers=0) == Result(1, 2)
    assert "no_such_module" in log.read_text()


def test_prints_a_line_per_pair_and_a_table(tmp_path, monkeypatch, capsys):
    pairs = {
        "2.8.0": Pair("2.8.0", "==3.4.0"),
        "2.14.1": Pair("2.14.1", "~=3.8.0"),
        "2.15.0": Pair("2.15.0", "~=3.9.0", problem="ERROR: no such file"),
    }
    monkeypatch.setattr(versions, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(versions, "releases", lambda: list(pairs))
    monkeypatch.setattr(versions, "pair_of", pairs.get)
    monkeypatch.setattr(
        versions, "install", lambda pair, _: Pair(pair.torch, pair.triton.strip("=~"))
    )
    monkeypatch.setattr(
        versions, "run",
        lambda suite, python, log, workers: (log.touch(), Result(9, int(suite.interpreted)))[1],
    )  # fmt: skip
    suites = ["--suites", "native", "triton, interpreted"]
    assert versions.main(suites) == 1
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[0].startswith("torch 2.8.0  triton 3.4.0  native: 9  0 s")
    assert "triton, interpreted: 9, 1 failed" in lines[1]
    assert f"log: {tmp_path / 'cache' / 'torch-2.14.1.log'}" in lines[1]
    assert "not available" in lines[2]
    assert lines[2].endswith("ERROR: no such file")
    python = ".".join(map(str, sys.version_info[:3]))
    assert out.endswith(
        "| torch | triton | python | native | triton, interpreted |\n"
        "| --- | --- | --- | --- | --- |\n"
        f"| 2.8.0 | 3.4.0 | {python} | 9 | - |\n"
        f"| 2.14.1 | 3.8.0 | {python} | 9 | 9, 1 failed |\n"
        f"| 2.15.0 | ~=3.9.0 | {python} | not available | not available |\n"
    )
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["torch-2.14.1.log"]
    assert versions.main([*suites, "--only", "2.8"]) == 0
    with pytest.raises(SystemExit, match=r"pip lists no torch 2\.99"):
        versions.main(["--only", "2.99"])


def test_a_pip_that_lists_nothing_is_quoted(monkeypatch):
    monkeypatch.setattr(versions, "pip", lambda *_: answer(stderr="ERROR: no network", status=1))
    with pytest.raises(SystemExit, match="pip lists no torch: ERROR: no network"):
        versions.releases()
