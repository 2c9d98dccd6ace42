"""Find the tests that run a line. This is measured for each test file, and again when it changes.

Measurements are stored in ``.mutate/lines/``, so that an interrupted measurement continues. The
text of each source file is stored too. After an edit, ``tests_of`` finds the old line by its text.
"""

import difflib
import hashlib
import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue

import coverage
from copies import ROOT, STATE, environment, make_copy, pytest_command

LINES = STATE / "lines"
# Time limit of a test file for each mutant. Its quickest tests run, and at least one of them.
SECONDS_OF_A_FILE = 60
SECONDS_OF_THE_GRID = 240  # limit of the interpreted tests, which test the kernels best
FEW = 10
SOURCES = STATE / "sources"

# Test files that mutants do not run, and why.
LEFT_OUT = {
    "tests/test_house.py": "ruff rejects the layout of a mutant, whatever it does",
    "tests/test_mutation.py": "runs none of the packages",
    "tests/test_docs.py": "runs every example of the documentation, which takes minutes",
    "tests/test_packaging.py": "builds and installs the wheel, which takes minutes",
    "tests/test_evidence.py": "reads results and runs no code of the packages",
    "tests/kernels/test_triton.py": "runs the two files below, which mutants run directly",
    "tests/kernels/test_triton_aot.py": "compiles for four devices, which takes minutes",
    "tests/kernels/test_triton_gpu.py": "needs a GPU",
    "tests/training/test_kills.py": "a soak",
    "tests/data/imagenet/test_imagenet_soak.py": "a soak",
}
# pytest does not collect these files by name, because each needs a process with other Triton
# settings.
INTERPRETED = "tests/kernels/triton_grid.py"
LAUNCHES = "tests/kernels/triton_launches.py"
FOLDERS_LEFT_OUT = ("tests/bench/", "tests/examples/", "tests/mutation/")


def test_files() -> list[str]:
    found = (str(p.relative_to(ROOT)) for p in (ROOT / "tests").rglob("test_*.py"))
    chosen = (f for f in found if f not in LEFT_OUT and not f.startswith(FOLDERS_LEFT_OUT))
    return [*sorted(chosen), *(f for f in (LAUNCHES, INTERPRETED) if (ROOT / f).exists())]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _record(test_file: str) -> Path:
    return LINES / f"{test_file.replace('/', '.')}.json"


def _is_measured(test_file: str) -> bool:
    record = _record(test_file)
    if not record.exists():
        return False
    return json.loads(record.read_text("utf-8"))["file"] == _digest((ROOT / test_file).read_text())


def _measure(test_file: str, copy: Path, seconds: int = 1800) -> str:
    """Run one test file under coverage in a copy, and store which lines its tests run."""
    data = copy / ".coverage-data" / "data"
    data.parent.mkdir(exist_ok=True)
    for old in data.parent.iterdir():
        old.unlink()
    times = data.parent / "times.json"
    settings = f"--rcfile={copy / 'tests/mutation/coverage.ini'}"
    env = environment(copy, interpreted=test_file == INTERPRETED) | {
        "MUTATION_COPY": str(copy), "MUTATION_DATA": str(data), "MUTATION_TIMES": str(times)
    }  # fmt: skip
    command = pytest_command("-p", "recorder", "-p", "no:xdist", test_file)
    command[1:3] = ["-m", "coverage", "run", settings, "-m", "pytest"]
    try:
        done = subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True,
                              timeout=seconds)  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"did not end within {seconds} s"
    if not times.exists():
        return f"no test ran:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    subprocess.run([sys.executable, "-m", "coverage", "combine", "-q", settings],
                   cwd=copy, env=env, capture_output=True)  # fmt: skip
    written = json.loads(times.read_text())
    passed = written["seconds"]
    users = defaultdict(set)  # measured name -> tests that use it
    for test in passed:
        for name in (test, *written["fixtures"][test]):
            users[name].add(test)
    measured = coverage.CoverageData(str(data))
    measured.read()
    sources, ran = {}, defaultdict(lambda: defaultdict(list))
    for file in measured.measured_files():
        path = str(Path(file).relative_to(copy))
        text = Path(file).read_text("utf-8")
        sources[path] = _digest(text)
        SOURCES.mkdir(exist_ok=True)
        (SOURCES / sources[path]).write_text(text, "utf-8")
        for line, contexts in measured.contexts_by_lineno(file).items():
            # A subprocess reports the context as "tests/x.py::test (call)".
            names = {context.rsplit(" (", 1)[0] for context in contexts}
            for test in set().union(*(users.get(name, ()) for name in names)):
                ran[test][path].append(line)
    record = {"file": _digest((copy / test_file).read_text()), "sources": sources,
              "tests": {t: {"seconds": s, "lines": ran[t]} for t, s in passed.items()}}  # fmt: skip
    new = _record(test_file).with_suffix(".new")
    new.write_text(json.dumps(record), "utf-8")
    os.replace(new, _record(test_file))
    return f"{len(passed)} tests, {sum(passed.values()):.0f} s"


def measure(workers: int, files: Iterable[str] | None = None) -> None:
    """Measure the test files that have no current measurement."""
    LINES.mkdir(parents=True, exist_ok=True)
    missing = [file for file in files or test_files() if not _is_measured(file)]
    if not missing:
        return
    copies: Queue[Path] = Queue()
    for worker in range(min(workers, len(missing))):
        copies.put(make_copy(f"measure-{worker}"))

    def one(file: str) -> None:
        copy = copies.get()
        try:
            print(f"measured {file}: {_measure(file, copy)}", flush=True)
        finally:
            copies.put(copy)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(one, missing))


class LineMap:
    """Map lines to the tests that run them."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        # path -> digest of the text -> line -> tests
        self._by_line: dict = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
        self._new_line: dict = {}
        for file in test_files():
            if not _record(file).exists():
                continue
            record = json.loads(_record(file).read_text("utf-8"))
            for test, ran in record["tests"].items():
                self.seconds[test] = ran["seconds"]
                for path, lines in ran["lines"].items():
                    for line in lines:
                        self._by_line[path][record["sources"][path]][line].append(test)

    def _old_lines(self, path: str, digest: str) -> dict[int, int]:
        """Map the current number of a line to its number in the measured text."""
        if (path, digest) not in self._new_line:
            now = (ROOT / path).read_text("utf-8")
            then = (SOURCES / digest).read_text("utf-8")
            blocks = difflib.SequenceMatcher(
                None, now.splitlines(), then.splitlines(), autojunk=False
            ).get_matching_blocks()
            self._new_line[path, digest] = {
                block.a + i + 1: block.b + i + 1 for block in blocks for i in range(block.size)
            }
        return self._new_line[path, digest]

    def tests_of(self, path: str, lines: Iterable[int]) -> list[str]:
        """Return the tests that run one of the lines. If few tests are known, add all tests of the
        file, because the line may run at import or in a process that ends before coverage writes
        its data."""
        found = set()
        for digest, by_line in self._by_line[path].items():
            old = self._old_lines(path, digest)
            for line in lines:
                found.update(by_line.get(old.get(line, -1), ()))
        in_order = self._in_order(path, found)
        if len(found) < FEW:
            in_order += [test for test in self.tests_of_import(path) if test not in found]
        return in_order

    def tests_of_import(self, path: str) -> list[str]:
        """Return the tests for a line that runs when its file is imported: all tests of the test
        files that run any line of the file. Coverage assigns such a line to no test."""
        by_lines = self._by_line[path].values()
        found = {t.split("::")[0] for lines in by_lines for tests in lines.values() for t in tests}
        return self._in_order(path, {t for t in self.seconds if t.split("::")[0] in found})

    def _in_order(self, path: str, tests: set[str]) -> list[str]:
        """Sort tests. Tests of a file stay together, because its fixtures would be made again after
        a test of another file. Files with tests of the same package come first, then the quickest
        files. Within a file, one case of each test comes first."""
        package = path.removeprefix("bdkd/").split("/")[0]  # its tests are in tests/<package>/
        files = defaultdict(lambda: defaultdict(list))
        for test in sorted(tests, key=lambda t: (self.seconds[t], t)):
            files[test.split("::")[0]][test.split("[")[0]].append(test)
        parts = []
        for file, cases in files.items():
            most = SECONDS_OF_THE_GRID if file == INTERPRETED else SECONDS_OF_A_FILE
            rounds = ((i, self.seconds[t], t) for of in cases.values() for i, t in enumerate(of))
            part, seconds = [], 0.0
            for _, takes, test in sorted(rounds):
                seconds += takes
                if part and seconds > most:
                    break
                part.append(test)
            is_other = not file.startswith(f"tests/{package}/")
            parts.append((is_other, sum(map(self.seconds.__getitem__, part)), part))
        return [test for _, _, part in sorted(parts) for test in part]
