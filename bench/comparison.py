"""Compare two results. Each is a SUITE.json file or a folder of such files."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from results import ResultsError, aligned, busy_warning, rows_of
from results import _time as time_text

Result = dict[str, Any]
MACHINE = ("cpu", "threads", "gpu")  # times of two machines cannot be compared


class Change(NamedTuple):
    """One contender of one case in both results."""

    suite: str
    case: str
    contender: str
    cache: str  # "cold", "hot" or unknown
    kind: str
    ratio: float  # B's time over A's
    by_share: bool  # whether ``ratio`` is of times relative to the copy, for different machines
    apart: int  # -1: B is faster and the spreads do not overlap; 1: B is slower; 0: they overlap
    cells: list[str]  # cells of the table

    def __str__(self) -> str:
        cache = f" ({self.cache})" if self.cache else ""
        return f"{self.suite}, {self.case}, {self.contender}{cache}"


def compare(a: Mapping[str, Result], b: Mapping[str, Result]) -> str:
    """Return a report of the changes from A to B: the largest gain and loss, then every row that
    both results contain.

    Raises:
        ResultsError: nothing can be compared. The message is one line with the reason.
    """
    if a == b:
        origin = _origin(next(iter(a.values())))
        raise ResultsError(f"A and B are the same results ({origin}): pass two different runs")
    common = [suite for suite in a if suite in b]
    if not common:
        raise ResultsError(
            f"nothing can be compared: no suite in common (A: {', '.join(a)}; B: {', '.join(b)})"
        )
    changes: list[Change] = []
    parts: list[str] = []
    reasons: list[str] = []
    for suite in common:
        found = _changes(suite, a[suite], b[suite])
        if isinstance(found, str):
            reasons.append(found)
            continue
        changes += found
        parts += _part(suite, a[suite], b[suite], found)
    if not changes:
        raise ResultsError(f"nothing can be compared: {'; '.join(reasons)}")
    left_out = [f"not compared: {reason}" for reason in reasons]  # below the tables
    for name, one, other in (("A", a, b), ("B", b, a)):
        if alone := [suite for suite in one if suite not in other]:
            left_out.append(f"only in {name}: {', '.join(alone)}")
    return "\n".join([*_verdict(changes), *parts, *left_out])


def _changes(suite: str, a: Result, b: Result) -> list[Change] | str:
    """Return the changes of the rows that both results contain, or the reason for no such rows."""
    different = _different(a, b, MACHINE)
    before = {(case, row["name"]): row for case, row in rows_of(a)}
    cases_a, cases_b = ([case["case"] for case in x["cases"]] for x in (a, b))
    if not {*cases_a} & {*cases_b}:
        return (
            f"{suite} has no case in common ({len(cases_a)} in A{_such_as(cases_a)}; "
            f"{len(cases_b)} in B{_such_as(cases_b)})"
        )
    caches = {case["case"]: next(iter(case.get("caches") or {}), "") for case in b["cases"]}
    changes, pairs = [], 0
    for case, row in rows_of(b):
        old = before.get((case, row["name"]))
        if old is None or row["kind"] == "limit":
            continue
        pairs += 1
        for cache, x, y in (
            (caches[case], old, row),
            ("hot", old.get("hot") or {}, row.get("hot") or {}),
        ):
            if "seconds" not in x or "seconds" not in y:
                continue
            change = _change(suite, case, row, cache, x, y, by_share=bool(different))
            if change is not None:
                changes.append(change)
    if not pairs:
        return f"{suite} has no contender in common"
    if not changes:
        return f"{suite} was measured on two machines, without a share of the copy: {different}"
    return changes


def _such_as(cases: list[str]) -> str:
    return f", such as {cases[0]!r}" if cases else ""


def _change(
    suite: str, case: str, row: dict[str, Any], cache: str, a: Mapping, b: Mapping, by_share: bool
) -> Change | None:
    old, new = a["seconds"], b["seconds"]
    shares = (a.get("of_copy"), b.get("of_copy"))
    apart = (new["p20"] > old["p80"]) - (new["p80"] < old["p20"])
    ratio = new["median"] / old["median"]
    if by_share:
        if not all(shares):
            return None
        ratio = shares[0] / shares[1]  # type: ignore[operator]
        apart = (ratio > 1.05) - (ratio < 0.95)  # results do not store the spread of a share
    cells = [
        time_text(old["median"]), time_text(new["median"]), f"{new['median'] / old['median']:.2f}",
        ("faster", "", "slower")[apart + 1], *(f"{x:.0%}" if x else "" for x in shares),
    ]  # fmt: skip
    return Change(suite, case, row["name"], cache, row["kind"], ratio, by_share, apart, cells)


def _verdict(changes: list[Change]) -> list[str]:
    """Return the largest gain and loss, of our contenders if there are any."""
    ours = [change for change in changes if change.kind == "ours"]
    whose = "contender of ours" if ours else "contender"
    lines = []
    for name, sign, word in (("largest gain", -1, "faster"), ("largest loss", 1, "slower")):
        found = [change for change in ours or changes if change.apart == sign]
        if not found:
            lines.append(f"{name}: none (no {whose} is {word} by more than its spread)")
            continue
        worst = max(found, key=lambda change: sign * change.ratio)
        times = f"{worst.cells[0]} -> {worst.cells[1]}"
        measure = "relative to the copy" if worst.by_share else times
        lines.append(f"{name}: {worst}: {worst.ratio:.2f} times the time of A ({measure})")
    return lines


def _part(suite: str, a: Result, b: Result, changes: list[Change]) -> list[str]:
    """Return the table of one suite."""
    lines = ["", f"{suite}: A {_origin(a)}", f"{' ' * len(suite)}  B {_origin(b)}"]
    if different := _different(a, b, MACHINE):
        lines.append(
            f"  {different}: times cannot be compared; gain and loss are by the share of the copy"
        )
    versions = [{**x["machine"].get("versions", {}), "python": x["machine"].get("python")}
                for x in (a, b)]  # fmt: skip
    if newer := _different_values(*versions):
        lines.append(f"  other versions: {newer}")
    header = ["", "A", "B", "B / A", "spreads apart", "A of copy", "B of copy"]
    rows = [[str(change).removeprefix(f"{suite}, "), *change.cells] for change in changes]
    return [*lines, aligned(header, rows)]


def _different(a: Result, b: Result, keys: tuple[str, ...]) -> str:
    """Return a description of the given facts that differ between the machines, or an empty
    string."""
    facts = [{key: x["machine"][key] for key in keys} for x in (a, b)]
    for each in facts:
        if isinstance(each.get("gpu"), dict):
            each["gpu"] = each["gpu"].get("name")
    return ", ".join(
        f"not the same {key} (A {facts[0][key]}, B {facts[1][key]})"
        for key in keys
        if facts[0][key] != facts[1][key]
    )


def _different_values(a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    keys = [*a, *(key for key in b if key not in a)]
    return ", ".join(
        f"{key} (A {a.get(key) or 'none'}, B {b.get(key) or 'none'})"
        for key in keys
        if a.get(key) != b.get(key)
    )


def _origin(result: Result) -> str:
    warning = busy_warning(result)
    return f"{result['commit']['id']}, {result['date']}{', ' + warning if warning else ''}"
