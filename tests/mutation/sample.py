"""Fifty mutants, each with the test that caught it. Continuous integration runs this sample.

The sample runs one test for each mutant, so it needs no map of lines and takes minutes. It shows
that tests still catch these mutants. To measure how many mutants tests catch, run many mutants.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue

from copies import ROOT, STATE, make_copy
from forks import Tests

SAMPLE = Path(__file__).parent / "sample.json"
SIZE = 50
MOST_GONE = 10  # mutants whose code no longer exists


def choose() -> None:
    """Write a new sample of mutants that a test caught, taken from the packages in turn."""
    from session import all_mutants, outcomes

    chosen, tests = [], set()
    for outcome in outcomes(all_mutants()):
        if outcome.result != "killed" or "::" not in outcome.by or outcome.by in tests:
            continue  # each mutant of the sample has a different test
        source = (ROOT / outcome.mutant.path).read_text("utf-8")
        if source.count(outcome.was) != 1 or len(outcome.was) > 120:
            continue  # the text of the line must be unique in the file
        tests.add(outcome.by)
        chosen.append({"file": outcome.mutant.path, "function": outcome.mutant.function,
                       "was": outcome.was, "now": outcome.now, "test": outcome.by})  # fmt: skip
        if len(chosen) == SIZE:
            break
    SAMPLE.write_text(json.dumps(chosen, indent=1) + "\n", "utf-8")
    print(f"{len(chosen)} mutants in {SAMPLE.relative_to(ROOT)}")


def check(workers: int) -> int:
    """Run the sample. Return 1 if a mutant was not caught, or if too many are gone."""
    STATE.mkdir(exist_ok=True)
    runners: Queue[Tests] = Queue()
    for number in range(workers):
        runners.put(Tests(make_copy(f"sample-{number}")))

    def one(entry: dict) -> str:
        runner = runners.get()
        file = runner.copy / entry["file"]
        source = file.read_text("utf-8") if file.exists() else ""
        try:
            if source.count(entry["was"]) != 1:
                return "gone"
            file.write_text(source.replace(entry["was"], entry["now"]), "utf-8")
            status, _ = runner.run([entry["test"]], 300)
            if status == 0:
                return "NOT CAUGHT"
            return "gone" if status == 4 else "caught"  # status 4: the test does not exist
        finally:
            if source:
                file.write_text(source, "utf-8")
            runners.put(runner)

    entries = json.loads(SAMPLE.read_text("utf-8"))
    with ThreadPoolExecutor(workers) as pool:
        results = list(pool.map(one, entries))
    while not runners.empty():
        runners.get().close()
    for entry, result in zip(entries, results, strict=True):
        if result != "caught":
            print(f"{result}: {entry['file']} {entry['function']}\n  - {entry['was']}\n"
                  f"  + {entry['now']}\n  {entry['test']}")  # fmt: skip
    caught, gone = results.count("caught"), results.count("gone")
    print(f"{caught} of {len(entries)} mutants caught, {gone} no longer in the code")
    if gone > MOST_GONE:
        print("too many are gone: run `python tests/mutation --choose-sample` to replace them")
    return int("NOT CAUGHT" in results or gone > MOST_GONE)
