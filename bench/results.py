"""Read and write results as JSON, as CSV and as tables.

Each suite has one JSON file::

    {"schema": 1, "suite": ..., "title": ..., "date": ..., "command": ...,
     "commit": {"id": ..., "date": ..., "dirty": ...}, "machine": {...}, "others_share": ...,
     "cases": [{"case": ..., "parameters": {...}, "sets": ..., "base": ...,
       "caches": {"cold": "inputs from memory", "hot": "inputs in cache"},
       "rows": [
        {"name": ..., "kind": "ours" | "peer" | "limit", "note": ..., "bytes": ...,
         "images": ..., "peak_bytes": ..., "error": {"loss": ..., "gradient": ...},
         "by": ..., "trials": ..., "calls": ..., "seconds": {"median": ..., "p20": ..., "p80": ...},
         "ratio": {...}, "of_copy": ...,
         "hot": {"by": ..., "trials": ..., "calls": ..., "seconds": ..., "ratio": ...,
                 "of_copy": ...} or {"not_run": why}},
        or {"name": ..., "kind": ..., "note": ..., "not_run": why}]}]}

``ratio`` is the ratio to the base in the same rounds, ``of_copy`` the share of the copy's
bandwidth, and ``others_share`` the share of the processor time that other processes used during
the run. The first name of ``caches`` describes ``seconds``. ``hot`` is a second measurement of the
same contender. Older files have neither ``caches`` nor ``hot``.
"""

import csv
import io
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

SCHEMA = 1
QUIET = 0.05  # if other processes used more of the processor time, results are not for publishing


class ResultsError(Exception):
    """A file cannot be read as results. The message is one line with its path."""


def write(path: Path, result: dict[str, Any]) -> None:
    """Write a result as JSON."""
    write_text(path, json.dumps(result, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file in full or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, "utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read(path: Path) -> dict[str, Any]:
    """Return the result in a JSON file.

    Raises:
        ResultsError: there is no file, or it is not a result.
    """
    result = _load(path)
    if not _is_result(result):
        raise ResultsError(
            f"{path} is not a result of python bench (JSON of schema {SCHEMA}): pass a SUITE.json "
            "or its folder"
        )
    return result


def _is_result(result: dict[str, Any]) -> bool:
    """Return whether a result has all fields that other functions rely on."""
    if result.get("schema") != SCHEMA:
        return False
    try:
        machine, commit = result["machine"], result["commit"]
        texts = [result["suite"], result["date"], commit["id"], machine["cpu"]]
        shares = [result["others_share"]]
        times = []
        for case in result["cases"]:
            texts += [case["case"], case["base"]]
            for row in case["rows"]:
                texts += [row["name"], row["kind"]]
                for measured in (row, row.get("hot") or {}):
                    if "seconds" in measured:
                        times += [measured["seconds"][key] for key in ("median", "p20", "p80")]
                        shares.append(measured.get("of_copy"))
        has_machine = "threads" in machine and isinstance(machine["gpu"], dict | None)
    except (KeyError, TypeError, AttributeError):
        return False
    return (
        has_machine
        and all(isinstance(x, str) for x in texts)
        and all(isinstance(x, float | int) and 0 < x < math.inf for x in times)
        and all(x is None or isinstance(x, float | int) for x in shares)
    )


def _load(path: Path) -> dict[str, Any]:
    try:
        result = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise ResultsError(f"cannot read {path}: there is no such file or folder") from error
    except OSError as error:
        raise ResultsError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ResultsError(f"cannot read {path}: it is not JSON ({error})") from error
    return result if isinstance(result, dict) else {}


def read_all(path: Path) -> dict[str, dict[str, Any]]:
    """Return the results of a file, or of all files in a folder, by suite.

    Other JSON in a folder, such as ``accuracy.json``, is skipped.
    """
    if not path.is_dir():
        result = read(path)
        return {result["suite"]: result}
    files = [file for file in sorted(path.glob("*.json")) if "suite" in _load(file)]
    found = {result["suite"]: result for result in map(read, files)}
    if not found:
        raise ResultsError(f"{path} contains no results: python bench --out FOLDER writes them")
    return found


def head(result: dict[str, Any]) -> str:
    """Return the machine, the versions, the date and the command, in two lines."""
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
    """Return a warning if other processes ran during the measurement, else None."""
    share = result["others_share"]
    if share is None:
        return "it is not known whether other processes ran during the measurement"
    if share <= QUIET:
        return None
    return f"OTHER PROCESSES USED {share:.0%} OF THE CPU TIME: do not publish these numbers"


def case_table(case: dict[str, Any]) -> str:
    """Return one case as a table, with a line for each contender and notes below."""
    kinds = list(dict.fromkeys(k for row in case["rows"] for k in row.get("error") or {}))
    caches = case.get("caches") or {}
    header = ["", next(iter(caches), "median"), "p20", "p80", "x ours", "[p20, p80]", "hot",
              "hot x ours", "images/s", "predicted", "GB/s", "of copy", "extra",
              *(f"{kind} error" for kind in kinds)]  # fmt: skip
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
        else:
            lines.append([name, *_cells(case, row, limit, kinds)])
    trials = [row["trials"] for row in case["rows"] if "trials" in row]
    used = [i for i in range(len(header)) if i < 4 or any(len(x) > i and x[i] for x in lines)]
    text = aligned([header[i] for i in used],
                   [[x[i] for i in used] if len(x) > 2 else x for x in lines])  # fmt: skip
    numbered = [f"  ({i}) {note}" for i, note in enumerate(notes, 1)]
    if caches:
        numbered.insert(0, f"  {'; '.join(f'{name}: {where}' for name, where in caches.items())}")
    by = ", ".join(sorted({row["by"] for row in case["rows"] if "by" in row}))
    title = f"{case['case']}  [{max(trials, default=0)} trials, {case['sets']} buffer sets, {by}]"
    return "\n".join([title, text, *numbered])


def _cells(
    case: dict[str, Any], row: dict[str, Any], limit: dict[str, Any] | None, kinds: list[str]
) -> list[str]:
    """Return the cells of a measured contender after its name."""
    is_base = row["name"] == case["base"]
    hot = row.get("hot") or {}
    if "seconds" in hot:
        of_base = "1" if is_base else f"{hot['ratio']['median']:.2f}"
        hot_cells = [_time(hot["seconds"]["median"]), of_base]
    else:
        hot_cells = ["not run" if hot else "", ""]
    predicted = ""  # time from its bytes and the copy's bandwidth
    if limit and row["bytes"] and row["kind"] == "ours":
        predicted = _time(limit["seconds"]["median"] * row["bytes"] / limit["bytes"])
    rate = _gb_per_second(row)
    # Images per second are shown only for a GPU. Those of a CPU are not meant to be quoted.
    images = row.get("images") if row["by"] != "wall" else None
    ratio, error = row["ratio"], row.get("error") or {}
    return [
        *(_time(row["seconds"][key]) for key in ("median", "p20", "p80")),
        "1" if is_base else f"{ratio['median']:.2f}",
        "" if is_base else f"[{ratio['p20']:.2f}, {ratio['p80']:.2f}]",
        *hot_cells,
        "" if images is None else f"{images / row['seconds']['median']:,.0f}",
        predicted,
        "" if rate is None else f"{rate:.1f}",
        f"{row['of_copy']:.0%}" if row.get("of_copy") is not None else "",
        _bytes(row.get("peak_bytes")),
        *(_error(error.get(kind)) for kind in kinds),
    ]


def _gb_per_second(row: dict[str, Any]) -> float | None:
    return row["bytes"] / row["seconds"]["median"] / 1e9 if row.get("bytes") else None


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return rows as a table. The first column is left-aligned, the others are right-aligned. The
    last cell of a row with fewer cells may be longer than its column."""
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


def csv_text(result: dict[str, Any]) -> str:
    """Return a result as CSV: one row for each contender and case, all columns flat.

    The names of time columns start with ``cold_`` or ``hot_``, or with neither if the suite does
    not control the state of the caches.
    """
    parameters = list(dict.fromkeys(key for case in result["cases"] for key in case["parameters"]))
    machine, commit = result["machine"], result["commit"]
    common = {
        "date": result["date"], "commit": commit["id"], "commit_changed": commit["dirty"],
        "cpu": machine["cpu"], "gpu": (machine["gpu"] or {}).get("name", ""),
        "threads": machine["threads"], "python": machine["python"],
        "torch": machine["versions"]["torch"], "triton": machine["versions"].get("triton", ""),
        "other_processes_share": result["others_share"],
    }  # fmt: skip
    rows = []
    for case in result["cases"]:
        first = next(iter(case.get("caches") or {}), "")
        for row in case["rows"]:
            error = row.get("error") or {}
            values = {
                "suite": result["suite"], "case": case["case"], "contender": row["name"],
                "kind": row["kind"], "base": case["base"], **case["parameters"],
                "buffer_sets": case["sets"], "clock": row.get("by"), "trials": row.get("trials"),
                **_times(row, first), **_times(row.get("hot") or {}, "hot"),
                "least_traffic_bytes": row.get("bytes"), "images_per_call": row.get("images"),
                "rate_gb_per_s": _gb_per_second(row) if "seconds" in row else None,
                "share_of_copy_rate": row.get("of_copy"),
                "peak_extra_bytes": row.get("peak_bytes"),
                "loss_relative_error": error.get("loss"),
                "gradient_relative_error": error.get("gradient"),
                "ece_absolute_error": error.get("ECE"),
                "note": row["note"], "not_run": row.get("not_run"), **common,
            }  # fmt: skip
            rows.append(values)
    times = [column for cache in ("", "cold", "hot") for column in _TIMES[cache]]
    columns = [
        "suite", "case", "contender", "kind", "base", *parameters, "buffer_sets", "clock", "trials",
        *times, "least_traffic_bytes", "images_per_call", "rate_gb_per_s", "share_of_copy_rate",
        "peak_extra_bytes", "loss_relative_error", "gradient_relative_error", "ece_absolute_error",
        "note", "not_run", *common,
    ]  # fmt: skip
    file = io.StringIO()
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


_TIMES = {
    cache: [
        f"{cache}_{key}".lstrip("_") for key in ("median_us", "p20_us", "p80_us", "ratio_to_base")
    ]
    for cache in ("", "cold", "hot")
}


def _times(measured: Mapping[str, Any], cache: str) -> dict[str, float]:
    """Return the times of one measurement in microseconds. The keys are names of columns."""
    if "seconds" not in measured:
        return {}
    values = [1e6 * measured["seconds"][key] for key in ("median", "p20", "p80")]
    return dict(zip(_TIMES[cache], [*values, measured["ratio"]["median"]], strict=True))


def rows_of(result: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every measured row with the name of its case."""
    for case in result["cases"]:
        for row in case["rows"]:
            if "seconds" in row:
                yield case["case"], row
