"""Write the report of a session: how many mutants of each package are caught, and which survive."""

import platform
import subprocess
from collections import Counter
from datetime import date
from pathlib import Path

from copies import ROOT
from mutants import PACKAGES, Mutant
from session import Judgements, Outcome, outcomes, package_of

REPORT = Path(__file__).parent / "report.md"


def _row(name: str, total: int, count: Counter) -> str:
    counted = count["killed"] + count["survived"] + count["uncovered"]
    share = f"{100 * count['killed'] / counted:.1f}%" if counted else "-"
    kinds = (count[kind] for kind in ("killed", "survived", "uncovered", "judged"))
    cells = [name, total, counted + count["judged"], *kinds, share]
    return f"| {' | '.join(map(str, cells))} |"


def score(found: list[Outcome], judgements: Judgements) -> Counter:
    count: Counter = Counter()
    for outcome in found:
        judged = outcome.result in ("survived", "uncovered") and judgements.reason(outcome)
        count["judged" if judged else outcome.result] += 1
    return count


def write(every: list[Mutant]) -> str:
    """Write ``report.md`` and return its table."""
    judgements, found = Judgements(), list(outcomes(every))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True,
                            capture_output=True).stdout.strip()  # fmt: skip
    lines = [
        "| package | mutants | tried | caught | survived | no test | judged | caught of the rest |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for package in PACKAGES:
        total = sum(package_of(m.path) == package for m in every)
        lines.append(_row(f"`{package}`", total, score(
            [o for o in found if package_of(o.mutant.path) == package], judgements)))  # fmt: skip
    lines.append(_row("all", len(every), score(found, judgements)))
    table = "\n".join(lines)
    text = [
        "# Mutants and the tests that catch them",
        "",
        "Written by `make mutate-report`; do not edit. A mutant is one small change to one place "
        "of the code. A survivor counts as judged if `judged.toml` gives a reason why no test "
        "needs to catch it.",
        "",
        f"Commit {commit}, {date.today()}, Python {platform.python_version()}.",
        "",
        table,
        "",
        "## Survivors without a judgement",
        "",
    ]
    for outcome in sorted(found, key=lambda o: (o.mutant.path, o.mutant.start)):
        if outcome.result in ("survived", "uncovered") and not judgements.reason(outcome):
            mutant = outcome.mutant
            text += [f"`{mutant.path}`, `{mutant.function or 'module'}` ({outcome.result})",
                     "```diff", f"- {outcome.was}", f"+ {outcome.now}", "```", ""]  # fmt: skip
    REPORT.write_text("\n".join(text).rstrip() + "\n", "utf-8")
    return table
