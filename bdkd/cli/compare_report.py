"""Write the results of ``bdkd compare``: tables, a figure and JSON."""

import dataclasses
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bdkd.cli.compare_plan import TEACHERS, PlannedRun, read_summary, warmup_warnings
from bdkd.cli.compare_quantize import read_students
from bdkd.cli.processes import Outcome
from bdkd.cli.table import table
from bdkd.evaluation import comparison, quantized
from bdkd.evaluation.comparison_figure import comparison_figure
from bdkd.evaluation.quantized import QuantizedRun
from bdkd.identity import refuse_other_data
from bdkd.runs.checkpoint import explain_oserror, write_atomically
from bdkd.runs.folder import to_json


def report(
    planned: Sequence[PlannedRun], methods: Sequence[str], folder: Path, command: str,
    failed: Mapping[str, Outcome], as_json: bool, exports: Mapping[str, Outcome] | None = None,
) -> None:  # fmt: skip
    """Write ``comparison.json``, ``.csv``, ``.md`` and ``.png``; print the tables or the JSON.

    Args:
        exports: failed exports of students to int8. None: do not compare int8 files.
    """
    runs = [comparison.Run(run.method, run.seed, read_summary(run), run.frozen) for run in planned]
    pairs = list(zip(runs, planned, strict=True))
    refuse_other_data([(str(plan.path), run.summary.get("data")) for run, plan in pairs])
    rows = comparison.compare(runs, methods)
    some = runs[0].summary
    notes = comparison.notes(methods[0], some["images"], rows) + _notes(planned, failed)
    content: dict[str, Any] = {
        "command": command, "recipe": some["recipe"], "methods": list(methods),
        "torch": some["torch"], "device": some["device"], "notes": notes,
        "failed": {name: bad.message for name, bad in {**failed, **(exports or {})}.items()},
        "rows": [dataclasses.asdict(row) for row in rows],
        "runs": [
            {"method": run.method, "seed": run.seed, "folder": plan.path.name, **run.summary}
            for run, plan in pairs
        ],
    }  # fmt: skip
    plain, marked = _tables(rows, methods[0])
    rows_of_csv = rows
    if exports is not None:
        files = [read_students(plan, run) for run, plan in pairs]
        more_plain, more_marked = _quantized_tables(files, methods)
        plain, marked = plain + more_plain, marked + more_marked
        int8_rows = quantized.labelled(files, methods)
        content["quantized"] = [dataclasses.asdict(row) for row in int8_rows]
        rows_of_csv = [*rows, *int8_rows]
        notes += quantized.notes(files, methods)
    text = to_json(content, indent=2)
    marked = [f"# {some['recipe']}: {', '.join(methods)}", f"`{command}`", *marked, *notes]
    marked += [f"torch {some['torch']}, {some['device']}.", "![seeds and means](comparison.png)"]
    texts = {"json": text, "csv": comparison.to_csv(rows_of_csv), "md": "\n\n".join(marked)}
    again = "run the same command again"
    for suffix, written in texts.items():
        write_atomically(folder / f"comparison.{suffix}", f"{written.rstrip()}\n".encode(), again)
    figure = folder / "comparison.png"
    remedy = f"fix the cause and {again} (the tables are written)"
    with explain_oserror(f"cannot write {figure}", remedy):
        comparison_figure(rows, figure, f"{some['recipe']}: test images")
    if as_json:
        print(text)
        return
    print("\n" + "\n\n".join(plain) + "\n")
    for note in notes:
        print(textwrap.fill(note, 100))
    print(f"\ntables and figure    {folder}/comparison.md, .csv, .json, .png")


def _notes(planned: Sequence[PlannedRun], failed: Mapping[str, Outcome]) -> list[str]:
    """Return what a reader must know about the runs."""
    notes = []
    if taught := sorted({run.method for run in planned if run.teachers}):
        notes.append(
            f"{', '.join(taught)}: the frozen teacher comes from the run of {TEACHERS} with the "
            "same seed. The column train s does not include the training of this teacher."
        )
    notes += warmup_warnings(planned)
    if failed:
        notes.append(f"The tables leave out the runs that failed: {', '.join(failed)}.")
    return notes


def _quantized_tables(
    files: Sequence[QuantizedRun], methods: Sequence[str]
) -> tuple[list[str], list[str]]:
    """Return the tables of all int8 students as plain text and as Markdown."""
    plain, marked = [], []
    for network in dict.fromkeys(student.network for file in files for student in file.students):
        for head, (header, lines) in (
            (f"{network}, fp32 and int8", quantized.changes(files, methods, network)),
            (
                f"changes of {network} (int8 - fp32) compared with those of {methods[0]}",
                quantized.differences(files, methods, network),
            ),
        ):
            if lines:
                plain.append(f"{head}\n\n{table(header, lines)}")
                marked.append(f"## {head}")
                marked.append(comparison.to_markdown(header, lines))
    return plain, marked


def _tables(rows: Sequence[comparison.Row], first: str) -> tuple[list[str], list[str]]:
    """Return the tables of all networks as plain text and as Markdown."""
    plain, marked = [], []
    for network, model, role in dict.fromkeys((row.network, row.model, row.role) for row in rows):
        head = f"{network} ({model}, {role})"
        tables = [comparison.results(rows, network), comparison.differences(rows, network)]
        for header, lines in tables:
            if lines:
                plain.append(f"{head}\n\n{table(header, lines)}")
                marked.append(f"## {head}" if not head.startswith("difference") else head)
                marked.append(comparison.to_markdown(header, lines))
            head = f"differences of {network} from {first}"
    return plain, marked
