"""Run mutants and store their outcomes in a session, which can be stopped at any time.

The session is a database of Cosmic Ray, ``.mutate/session.sqlite``, which ``cr-report`` and
``cr-html`` can read. A mutant's key changes with the code of its function, so an outcome is never
reused for other code.
"""

import difflib
import fcntl
import threading
import tomllib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from copies import ROOT, STATE, make_copy
from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import MutationSpec, TestOutcome, WorkerOutcome, WorkItem, WorkResult
from forks import Tests
from line_map import INTERPRETED, LineMap
from mutants import PACKAGES, Mutant, mutants, mutated_source, source_files

SESSION = STATE / "session.sqlite"
JUDGED = Path(__file__).parent / "judged.toml"

# A mutant runs its tests in the order of line_map.py, as many as take this time without the mutant
# (interpreted tests do not count). After twice this time, the mutant counts as an endless loop.
SECONDS_OF_TESTS = 90
MOST_TESTS = 1000


def package_of(path: str) -> str:
    return next(package for package in PACKAGES if f"{path}/".startswith(f"{package}/"))


def all_mutants(paths: Iterable[str] = ()) -> list[Mutant]:
    """Return the mutants of all files, or of the files under ``paths``.

    The order is arbitrary but fixed, and takes the packages in turn. The start of the list is
    therefore a sample of the whole list.
    """
    chosen = [
        file
        for file in source_files(ROOT)
        if not paths or any(Path(file).is_relative_to(path) for path in paths)
    ]
    groups = defaultdict(list)
    for file in chosen:
        groups[package_of(file)].extend(mutants(ROOT, file))
    in_turn = zip_longest(*(sorted(group, key=lambda m: m.key) for group in groups.values()))
    return [mutant for turn in in_turn for mutant in turn if mutant is not None]


def changed_lines(before: str, after: str) -> tuple[str, str]:
    """Return the removed and the added lines of a change, each stripped and joined."""
    diff = list(difflib.ndiff(before.splitlines(), after.splitlines()))
    took = " ".join(line[2:].strip() for line in diff if line.startswith("- "))
    put = " ".join(line[2:].strip() for line in diff if line.startswith("+ "))
    return took, put


@dataclass(frozen=True)
class Outcome:
    """The outcome of one mutant. ``by`` is the test that caught it, or a note."""

    mutant: Mutant
    was: str
    now: str
    result: str  # killed, survived, uncovered, no change
    by: str


class Worker:
    """Run one mutant at a time in a copy of the tree."""

    def __init__(self, number: int, line_map: LineMap):
        self.copy = make_copy(f"worker-{number}")
        self.runner = Tests(self.copy)
        self.line_map = line_map

    def tests(self, mutant: Mutant) -> list[str]:
        lines = range(mutant.start[0], mutant.end[0] + 1)
        if mutant.at_import:
            found = self.line_map.tests_of_import(mutant.path)
        else:
            found = self.line_map.tests_of(mutant.path, lines)
        chosen, seconds = [], 0.0
        for test in found[:MOST_TESTS]:
            if not test.startswith(INTERPRETED):
                seconds += self.line_map.seconds[test]
            # Any test may depend on a constant at the top of a file.
            if chosen and seconds > SECONDS_OF_TESTS * (1 + mutant.at_import):
                break
            chosen.append(test)
        return chosen

    def try_mutant(self, mutant: Mutant) -> Outcome:
        source = (ROOT / mutant.path).read_text("utf-8")
        changed = mutated_source(source, mutant.operator, mutant.occurrence)
        if changed is None:
            return Outcome(mutant, "", "", "no change", "")
        was, now = changed_lines(source, changed)
        tests = self.tests(mutant)
        if not tests:
            return Outcome(mutant, was, now, "uncovered", "no test runs this line")
        seconds = sum(self.line_map.seconds[test] for test in tests)
        file = self.copy / mutant.path
        file.write_text(changed, "utf-8")
        try:
            status, output = self.runner.run(tests, 60 + 2 * seconds)
        finally:
            file.write_text(source, "utf-8")
        if status == 0:
            return Outcome(mutant, was, now, "survived", f"{len(tests)} tests passed")
        if status is None:
            return Outcome(mutant, was, now, "killed", "time")
        failed = [line for line in output.splitlines() if line.startswith(("FAILED ", "ERROR "))]
        if failed:
            return Outcome(mutant, was, now, "killed", failed[0].split(" ")[1])
        if status < 0 or status == 1:
            return Outcome(mutant, was, now, "killed", f"status {status}")
        # pytest did not run, for example because a test was renamed.
        return Outcome(mutant, was, now, "survived", f"status {status}: {output[-300:]!r}")


def _store(database: WorkDB, outcome: Outcome) -> None:
    survived = outcome.result in ("survived", "uncovered")
    database.set_result(
        outcome.mutant.key,
        WorkResult(
            {"uncovered": WorkerOutcome.NO_TEST, "no change": WorkerOutcome.SKIPPED}.get(
                outcome.result, WorkerOutcome.NORMAL
            ),
            f"{outcome.result}: {outcome.by}",
            TestOutcome.SURVIVED if survived else TestOutcome.KILLED,
            f"{outcome.was}\n{outcome.now}",
        ),
    )


def _load(database: WorkDB) -> dict[str, tuple[str, str, str, str]]:
    """Return a map from keys of mutants to (result, by, was, now)."""
    found = {}
    for key, stored in database.results:
        result, by = stored.output.split(": ", 1)
        was, now = stored.diff.split("\n")
        found[key] = (result, by, was, now)
    return found


def outcomes(wanted: Iterable[Mutant]) -> Iterator[Outcome]:
    """Yield the known outcomes of some mutants."""
    if not SESSION.exists():
        return
    with use_db(SESSION) as database:
        known = _load(database)
    for mutant in wanted:
        if mutant.key in known:
            result, by, was, now = known[mutant.key]
            yield Outcome(mutant, was, now, result, by)


def run(wanted: list[Mutant], workers: int, again: bool = False) -> None:
    """Run every mutant without a result. With ``again``, also run survivors without a judgement."""
    STATE.mkdir(exist_ok=True)
    with open(STATE / "lock", "w") as lock, use_db(SESSION) as database:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit("another run is active: see .mutate/log, or stop it first") from None
        known = _load(database)
        judgements = Judgements()

        def is_survivor(mutant: Mutant) -> bool:
            result, by, was, now = known[mutant.key]
            outcome = Outcome(mutant, was, now, result, by)
            return result in ("survived", "uncovered") and judgements.reason(outcome) is None

        todo = [m for m in wanted if m.key not in known or (again and is_survivor(m))]
        stored = {item.job_id for item in database.work_items}
        database.add_work_items(
            WorkItem.single(m.key, MutationSpec(m.path, m.operator, m.occurrence, m.start, m.end))
            for m in todo
            if m.key not in stored
        )
        line_map = LineMap()
        queue, guard = iter(todo), threading.Lock()
        count = {"killed": 0, "survived": 0, "uncovered": 0, "no change": 0}
        stop = threading.Event()

        def work(number: int) -> None:
            worker = Worker(number, line_map)
            while not stop.is_set():
                with guard:
                    mutant = next(queue, None)
                if mutant is None:
                    break
                outcome = worker.try_mutant(mutant)
                with guard:
                    _store(database, outcome)
                    count[outcome.result] += 1
                    if outcome.result in ("survived", "uncovered"):
                        where = f"{mutant.path}:{mutant.start[0]} {mutant.function}"
                        print(f"{outcome.result}: {where}\n  - {outcome.was}\n  + {outcome.now}")
                    print(f"{sum(count.values())} of {len(todo)}: {count}", flush=True)
            worker.runner.close()

        threads = [threading.Thread(target=work, args=(n,)) for n in range(workers)]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            stop.set()  # after Ctrl-C, each worker finishes its current mutant


class Judgements:
    """Survivors in ``judged.toml`` that no test needs to catch, with reasons."""

    def __init__(self):
        read = tomllib.loads(JUDGED.read_text("utf-8")) if JUDGED.exists() else {}
        self.functions = {
            (entry["file"], name): entry["reason"]
            for entry in read.get("functions", ())
            for name in entry["names"]
        }
        self.changes = {
            (entry["file"], entry["was"], entry["now"]): entry["reason"]
            for entry in read.get("change", ())
        }

    def reason(self, outcome: Outcome) -> str | None:
        path = outcome.mutant.path
        names = outcome.mutant.function.split(".")
        for end in range(len(names), 0, -1):
            if reason := self.functions.get((path, ".".join(names[:end]))):
                return reason
        return self.functions.get((path, "*")) or self.changes.get((path, outcome.was, outcome.now))
