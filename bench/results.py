"""Results as JSON, as tables, and beside each other.

One file a suite::

    {"schema": 1, "suite": ..., "title": ..., "date": ..., "command": ...,
     "commit": {"id": ..., "date": ..., "dirty": ...}, "machine": {...}, "others_share": ...,
     "cases": [{"case": ..., "parameters": {...}, "sets": ..., "base": ..., "rows": [
        {"name": ..., "kind": "ours" | "peer" | "limit", "note": ..., "bytes": ...,
         "images": ..., "by": ..., "trials": ..., "calls": ...,
         "seconds": {"median": ..., "p20": ..., "p80": ...},
         "ratio": {...}, "of_copy": ..., "peak_bytes": ..., "error": {"loss": ...,
         "gradient": ...}}, or {"name": ..., "kind": ..., "note": ..., "not_run": why}]}]}

``ratio`` is over the base in the same rounds; ``of_copy`` the share of the copy's bandwidth;
``others_share`` the processor time that other processes took meanwhile.
"""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

SCHEMA = 1
QUIET = 0.05  # more than this share of the processors' time for others, and numbers are not kept


class ResultsError(Exception):
    """A file of results that is not one; the message is one line that names it."""


def write(path: Path, result: dict[str, Any]) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read(path: Path) -> dict[str, Any]:
    result = _load(path)
    if result.get("schema") != SCHEMA or not result.keys() >= _FIELDS:
        raise ResultsError(f"{path} holds no results of schema {SCHEMA}")
    return result


_FIELDS = {"suite", "date", "commit", "machine", "others_share", "cases"}


def _load(path: Path) -> dict[str, Any]:
    try:
        result = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ResultsError(f"cannot read {path}: {error}") from error
    return result if isinstance(result, dict) else {}


def read_all(path: Path) -> dict[str, dict[str, Any]]:
    """Results by suite: those of a file, or of all files of a folder (other JSON, as accuracy.json,
    is passed over)."""
    if not path.is_dir():
        result = read(path)
        return {result["suite"]: result}
    files = [file for file in sorted(path.glob("*.json")) if "suite" in _load(file)]
    found = {result["suite"]: result for result in map(read, files)}
    if not found:
        raise ResultsError(f"{path} holds no results")
    return found


def head(result: dict[str, Any]) -> str:
    """Where and when, in two lines."""
    machine, commit = result["machine"], result["commit"]
    gpu = f"{machine['gpu']['name']}; " if machine["gpu"] else ""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    dirty = " with changes" if commit["dirty"] else ""
    return (
        f"{gpu}{machine['cpu']}; {machine['threads']} of {machine['cores']} cores, last-level "
        f"cache {machine['last_level_cache'] / 2**20:.0f} MiB; {versions}; python "
        f"{machine['python']}\n{result['date']}, commit {commit['id']}{dirty}: {result['command']}"
    )


def busy_warning(result: dict[str, Any]) -> str | None:
    """What to say of a machine that was not quiet."""
    share = result["others_share"]
    if share is None:
        return "whether other processes ran meanwhile is not known here"
    if share <= QUIET:
        return None
    return (
        f"OTHERS TOOK {share:.0%} OF THE PROCESSORS' TIME meanwhile: for judging a change at most, "
        "not for publishing"
    )


def case_table(case: dict[str, Any]) -> str:
    """One case: a line a contender, notes below."""
    kinds = list(dict.fromkeys(k for row in case["rows"] for k in row.get("error") or {}))
    header = ["", "median", "p20", "p80", "x ours", "[p20, p80]", "images/s", "predicted",
              "GB/s", "of copy", "extra", *(f"{kind} error" for kind in kinds)]  # fmt: skip
    lines: list[list[str]] = []
    notes: list[str] = []
    limit = next((r for r in case["rows"] if r["kind"] == "limit" and r.get("bytes")), None)
    for row in case["rows"]:
        name = row["name"]
        if note := row.get("note"):
            if note not in notes:
                notes.append(note)
            name += f" ({notes.index(note) + 1})"
        if "not_run" in row:
            lines.append([name, f"not run: {row['not_run']}"])
            continue
        ratio, error = row["ratio"], row.get("error") or {}
        seconds = [_time(row["seconds"][key]) for key in ("median", "p20", "p80")]
        is_base = row["name"] == case["base"]
        predicted = ""  # from its bytes and the copy's bandwidth
        if limit and row["bytes"] and row["kind"] == "ours":
            predicted = _time(limit["seconds"]["median"] * row["bytes"] / limit["bytes"])
        rate = row["bytes"] / row["seconds"]["median"] / 1e9 if row["bytes"] else None
        # A rate is for quoting, and those of a CPU are not.
        images = row.get("images") if row["by"] != "wall" else None
        lines.append([
            name, *seconds,
            "1" if is_base else f"{ratio['median']:.2f}",
            "" if is_base else f"[{ratio['p20']:.2f}, {ratio['p80']:.2f}]",
            "" if images is None else f"{images / row['seconds']['median']:,.0f}",
            predicted,
            "" if rate is None else f"{rate:.1f}",
            f"{row['of_copy']:.0%}" if row.get("of_copy") is not None else "",
            _bytes(row.get("peak_bytes")),
            *(_error(error.get(kind)) for kind in kinds),
        ])  # fmt: skip
    trials = [row["trials"] for row in case["rows"] if "trials" in row]
    used = [i for i in range(len(header)) if i < 4 or any(len(x) > i and x[i] for x in lines)]
    text = aligned([header[i] for i in used],
                   [[x[i] for i in used] if len(x) > 2 else x for x in lines])  # fmt: skip
    numbered = [f"  ({i}) {note}" for i, note in enumerate(notes, 1)]
    by = ", ".join(sorted({row["by"] for row in case["rows"] if "by" in row}))
    title = f"{case['case']}  [{max(trials, default=0)} trials, {case['sets']} buffer sets, {by}]"
    return "\n".join([title, text, *numbered])


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns, the first to the left and the others to the right; a short row runs on freely."""
    full = [header, *(row for row in rows if len(row) == len(header))]
    widths = [max(len(line[i]) for line in full) for i in range(len(header))]
    widths[0] = max([widths[0], *(len(row[0]) for row in rows)])
    lines = []
    for row in (header, ["-" * width for width in widths], *rows):
        cells = [row[0].ljust(widths[0])]
        if len(row) == len(header):
            cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        else:
            cells += row[1:]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _time(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{seconds * 1e6:.1f} us"
    return f"{seconds * 1e3:.2f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _bytes(count: int | None) -> str:
    if count is None:
        return ""
    if count < 1e6:
        return f"{count / 1e3:.1f} kB"
    return f"{count / 1e6:.1f} MB" if count < 1e9 else f"{count / 1e9:.2f} GB"


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.0e}"


def compare(a: dict[str, dict], b: dict[str, dict]) -> str:
    """What changed from A to B: every row that both have, B's time over A's."""
    parts = []
    for suite in a.keys() & b.keys():
        parts.append(f"{suite}: A {_origin(a[suite])}\n{' ' * len(suite)}  B {_origin(b[suite])}")
        for key in ("cpu", "threads", "gpu"):
            if a[suite]["machine"][key] != b[suite]["machine"][key]:
                parts.append(f"  not the same {key}: times cannot be compared, shares of copy can")
        left = {(case, row["name"]): row for case, row in _rows(a[suite])}
        lines = []
        for case, row in _rows(b[suite]):
            old = left.get((case, row["name"]))
            if old is None or row["kind"] == "limit":
                continue
            factor = row["seconds"]["median"] / old["seconds"]["median"]
            apart = (row["seconds"]["p20"] > old["seconds"]["p80"]) - (
                row["seconds"]["p80"] < old["seconds"]["p20"]
            )
            shares = [f"{x['of_copy']:.0%}" if x.get("of_copy") else "" for x in (old, row)]
            lines.append([
                f"{case}: {row['name']}", _time(old["seconds"]["median"]),
                _time(row["seconds"]["median"]), f"{factor:.2f}",
                ("faster", "", "slower")[apart + 1], *shares,
            ])  # fmt: skip
        header = ["", "A", "B", "B / A", "spreads apart", "A of copy", "B of copy"]
        parts.append(aligned(header, lines))
    if not parts:
        raise ResultsError("the two have no suite in common")
    return "\n".join(parts)


def _origin(result: dict[str, Any]) -> str:
    warning = busy_warning(result)
    return f"{result['commit']['id']}, {result['date']}{', ' + warning if warning else ''}"


def _rows(result: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every measured row with its case's name."""
    for case in result["cases"]:
        for row in case["rows"]:
            if "seconds" in row:
                yield case["case"], row
