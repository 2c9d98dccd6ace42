"""``bdkd report``: one HTML page of finished or running runs."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class Arguments:
    """One self-contained HTML page of runs: results, curves, reliability diagrams, entropies,
    weights over time, features, speed. Runs that differ in their seed alone are averaged. It reads
    folders of runs alone: nothing is trained or evaluated again."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ...]")]
    """Folders of runs, finished or not, or folders that hold them (as bdkd compare makes)."""
    output: Path = Path("report.html")
    """File of the page; one that is there is replaced."""
    title: str = "Distillation runs"
    """Heading of the page."""
    tsne: bool = True
    """Draw the features by t-SNE, some seconds a network."""


def run(given: list[str]) -> None:
    """Parse, read, write; print the path of the page, and what it lacks to stderr."""
    arguments = tyro.cli(Arguments, prog="bdkd report", args=given)

    from bdkd.errors import UsageError
    from bdkd.evaluation.report import write_report

    if not arguments.runs:
        raise UsageError("report needs at least one run's folder, such as runs/mine")
    for warning in write_report(arguments.runs, arguments.output, arguments.tsne, arguments.title):
        print(f"bdkd: {warning}", file=sys.stderr)
    print(arguments.output)
