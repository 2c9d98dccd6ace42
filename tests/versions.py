"""Run the kernel tests with each pair of torch and triton that pip installs: ``make versions``.

The newest release of each minor version from torch 2.8 on gets a new environment in the cache
folder, with the triton that its wheel requires (7 GB with a CUDA build of torch, removed
afterwards). Prints one line per pair with the results, and then a Markdown table for the docs. A
version that pip cannot install is listed as not available. Requires only the standard library and
the native kernel, which ``make`` builds.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "bdkd-versions"
OLDEST_TORCH = (2, 8)
OLDEST_TRITON = (3, 6)  # the oldest triton that the kernel supports; torch 2.10 requires it
# The triton that PyPI's wheels of torch require. CPU builds of torch require no triton.
TRITON_OF_CPU_BUILDS = {
    "2.8": "==3.4.0", "2.9": "==3.5.1", "2.10": "==3.6.0", "2.11": "==3.6.0", "2.12": "==3.7.1",
    "2.13": "==3.7.1", "2.14": "~=3.8.0", "2.15": "~=3.9.0",
}  # fmt: skip
# Packages of the tests. The loss itself requires only torch.
TOOLS = ["pytest", "pytest-timeout", "pytest-xdist", "pytest-benchmark", "hypothesis", "packaging",
         "numpy"]  # fmt: skip

KERNELS = "tests/kernels/"
# The test with sanitizers compiles C++ for a minute and does not use torch.
SANITIZERS = f"--deselect={KERNELS}test_native.py::test_clean_under_sanitizers"


class Suite(NamedTuple):
    """The tests of one column of the table."""

    name: str
    files: tuple[str, ...]  # relative to tests/kernels
    options: tuple[str, ...] = ()
    triton: bool = False  # run only with a triton that the kernel supports
    interpreted: bool = False


SUITES = (
    Suite("reference", ("test_reference.py",)),
    Suite(
        "native",
        ("test_native.py", "test_memory.py", "test_bounds.py", "test_buffers.py",
         "test_gradient_buffers.py"),
        (SANITIZERS,),
    ),
    Suite(
        "operators",
        ("test_ops.py", "test_torch_features.py", "test_torch_compat.py", "test_loss_api.py",
         "test_compat.py", "test_backends.py"),
    ),
    Suite("triton, interpreted", ("triton_grid.py",), triton=True, interpreted=True),
    Suite("triton, compiled ahead", ("test_triton_aot.py", "triton_launches.py"), triton=True),
)  # fmt: skip


class Pair(NamedTuple):
    torch: str
    triton: str  # a requirement such as "==3.6.0", or the installed version
    problem: str = ""  # why pip cannot install the pair


class Result(NamedTuple):
    passed: int
    failed: int

    def __str__(self) -> str:
        return f"{self.passed}" if not self.failed else f"{self.passed}, {self.failed} failed"


def numbers(version: str) -> tuple[int, ...]:
    """Return the numbers of a release without its suffix: (2, 13, 0) for 2.13.0+cpu."""
    return tuple(int(part) for part in re.match(r"[\d.]+", version)[0].strip(".").split("."))


def pip(python: Path | str, *arguments: str) -> subprocess.CompletedProcess:
    command = [str(python), "-m", "pip", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def last_line(text: str) -> str:
    """Return the first error in pip's output, or its last line if there is no error."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")]
    return (errors or lines or ["pip printed nothing"])[0 if errors else -1]


def newest_of_each_minor(versions: Iterable[str]) -> list[str]:
    """Return the newest release of each supported minor version."""
    found: dict[tuple[int, ...], str] = {}
    for version in versions:
        release = re.fullmatch(r"(\d+(?:\.\d+)+)(?:\+\w+)?", version)  # no release candidates
        if release is None or numbers(version) < OLDEST_TORCH:
            continue
        minor, plain = numbers(version)[:2], release[1]
        if minor not in found or numbers(plain) > numbers(found[minor]):
            found[minor] = plain
    return [found[minor] for minor in sorted(found)]


def releases() -> list[str]:
    """Return the releases of torch that pip lists.

    Raises:
        SystemExit: pip lists none, or does not support ``pip index versions``.
    """
    done = pip(sys.executable, "index", "versions", "torch")
    listed = re.search(r"^Available versions: (.+)$", done.stdout, re.M)
    if listed is None:
        raise SystemExit(f"versions: pip lists no torch: {last_line(done.stderr)}")
    return newest_of_each_minor(listed[1].split(", "))


def pair_of(torch: str) -> Pair:
    """Return the triton that a release of torch requires, from its metadata."""
    done = pip(
        sys.executable, "install", "--dry-run", "--no-deps", "--ignore-installed", "--quiet",
        "--report", "-", f"torch=={torch}",
    )  # fmt: skip
    minor = ".".join(torch.split(".")[:2])
    usual = TRITON_OF_CPU_BUILDS.get(minor, "")
    if done.returncode:
        return Pair(torch, usual, last_line(done.stderr))
    metadata = json.loads(done.stdout)["install"][0]["metadata"]
    for requirement in metadata.get("requires_dist", []):
        match = re.match(r"triton\s*\(?([=~<>!][^;)]*)", requirement)
        if match is not None and "extra" not in requirement:
            return Pair(torch, match[1].strip())
    return Pair(torch, usual)


def constraints(folder: Path, triton: str) -> Path:
    """Write the constraints of this repository without the packages whose versions are tested."""
    free = re.compile(r"(torch|torchvision|triton|numpy|nvidia-.*)==")
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    kept = [line for line in lines if not free.match(line)]
    if triton and numbers(triton.lstrip("=~<>! ")) < (3, 7):
        kept.append("numpy<2.4")  # the interpreter of triton 3.6 fails with newer versions
    path = folder / "constraints.txt"
    path.write_text("\n".join(kept) + "\n", "utf-8")
    return path


def install(pair: Pair, folder: Path) -> Pair:
    """Make an environment. Return the pair with the installed versions, or with the problem."""
    python = folder / "bin" / "python"
    if not python.exists():
        made = subprocess.run([sys.executable, "-m", "venv", str(folder)],
                              capture_output=True, text=True)  # fmt: skip
        if made.returncode:
            return pair._replace(problem=last_line(made.stderr + made.stdout))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    ours = [x for x in project["dependencies"] if not x.startswith("torch")]
    pinned = [f"torch=={pair.torch}", *([f"triton{pair.triton}"] if pair.triton else [])]
    done = pip(
        python, "install", "--quiet", "--no-compile", "--no-cache-dir",
        "--constraint", str(constraints(folder, pair.triton)), *pinned, *ours, *TOOLS,
    )  # fmt: skip
    if done.returncode:
        return pair._replace(problem=last_line(done.stderr))
    code = (
        "import importlib.metadata as m\n"
        "print(*(next((d.version for d in m.distributions(name=n)), '-') "
        "for n in ('torch', 'triton')))"
    )
    shown = subprocess.run([str(python), "-c", code], capture_output=True, text=True)
    torch, triton = shown.stdout.split()
    return Pair(torch, triton)


def run(suite: Suite, python: Path, log: Path, workers: int) -> Result:
    """Run the tests of one column with the code of this checkout."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "TRITON"))}
    environment |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1",
                    "PYTHONDONTWRITEBYTECODE": "1"}  # fmt: skip
    if suite.interpreted:
        environment["TRITON_INTERPRET"] = "1"
    passed = failed = 0
    # Each file runs in a separate process, because some must import triton before other tests do.
    for file in suite.files:
        report = log.with_suffix(".xml")
        report.unlink(missing_ok=True)
        command = [
            str(python), "-m", "pytest", "--quiet", "-p", "no:cacheprovider", f"-n{workers}",
            f"--junitxml={report}", *suite.options, KERNELS + file,
        ]  # fmt: skip
        with open(log, "a") as output:
            code = subprocess.run(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL,
                                  stdout=output, stderr=subprocess.STDOUT).returncode  # fmt: skip
        good, bad = counts(report)
        passed, failed = passed + good, failed + (bad or code != 0)
        report.unlink(missing_ok=True)
    return Result(passed, failed)


def counts(report: Path) -> tuple[int, int]:
    """Return the numbers of passed and failed tests in a JUnit report, (0, 0) without one."""
    if not report.exists():
        return 0, 0
    suite = next(ElementTree.parse(report).getroot().iter("testsuite"))
    tests, skipped, *bad = (
        int(suite.get(name, 0)) for name in ("tests", "skipped", "failures", "errors")
    )
    return tests - skipped - sum(bad), sum(bad)


def try_one(pair: Pair, options: argparse.Namespace) -> tuple[Pair, dict[str, Result]]:
    """Install a pair, run every suite and print one line. The log is kept if a test failed."""
    folder, log = CACHE / f"torch-{pair.torch}", CACHE / f"torch-{pair.torch}.log"
    CACHE.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)
    began = time.monotonic()
    results: dict[str, Result] = {}
    if not pair.problem:
        pair = install(pair, folder)
    if not pair.problem:
        new = pair.triton != "-" and numbers(pair.triton) >= OLDEST_TRITON
        for suite in options.suites:
            if new or not suite.triton:
                results[suite.name] = run(suite, folder / "bin/python", log, options.workers)
    if not options.keep:
        shutil.rmtree(folder, ignore_errors=True)
    cells = "  ".join(f"{name}: {result}" for name, result in results.items())
    seconds = f"{time.monotonic() - began:.0f} s"
    line = f"torch {pair.torch}  triton {pair.triton}  {cells or 'not available'}  {seconds}"
    if pair.problem:
        line += f"  {pair.problem}"
    elif any(result.failed for result in results.values()):
        line += f"  log: {log}"
    else:
        log.unlink(missing_ok=True)
    print(line, flush=True)
    return pair, results


def table(tried: list[tuple[Pair, dict[str, Result]]], suites: Iterable[Suite]) -> str:
    """Return the Markdown table of the docs."""
    names = [suite.name for suite in suites]
    python = ".".join(map(str, sys.version_info[:3]))
    lines = [f"| {' | '.join(['torch', 'triton', 'python', *names])} |",
             f"| {' | '.join('---' for _ in range(len(names) + 3))} |"]  # fmt: skip
    for pair, results in tried:
        missing = "not available" if pair.problem else "-"
        cells = [str(results.get(name, missing)) for name in names]
        lines.append(f"| {' | '.join([pair.torch, pair.triton, python, *cells])} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", default=(), help="minor versions, such as 2.13")
    parser.add_argument("--suites", nargs="+", choices=[s.name for s in SUITES], help="columns")
    parser.add_argument("--keep", action="store_true", help="keep the environments")
    parser.add_argument("--workers", type=int, default=2, help="processes of pytest-xdist")
    options = parser.parse_args(arguments)
    options.suites = [s for s in SUITES if not options.suites or s.name in options.suites]
    chosen = [x for x in releases()
              if not options.only or ".".join(x.split(".")[:2]) in options.only]  # fmt: skip
    if not chosen:
        raise SystemExit(f"versions: pip lists no torch {' '.join(options.only)}: see pip index")
    tried = [try_one(pair_of(torch), options) for torch in chosen]
    print(f"\n{table(tried, options.suites)}")
    failed = any(pair.problem or any(r.failed for r in found.values()) for pair, found in tried)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
