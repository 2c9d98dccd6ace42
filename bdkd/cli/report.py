"""``bdkd report``: write one HTML page about finished or running runs."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from bdkd.cli.flags import parse


@dataclass(frozen=True)
class Arguments:
    """Write one self-contained HTML page about runs: results, curves, reliability diagrams,
    entropies, weights over time, features, speed. Runs that differ only in their seed are averaged.
    The page is made from the files in the folders: no network is trained or evaluated again."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ...]")]
    """Folders of finished or unfinished runs, or folders of runs, such as those of bdkd compare."""
    output: Path = Path("report.html")
    """File to write. An existing file is replaced."""
    title: str = "Distillation runs"
    """Title of the page."""
    tsne: bool = True
    """Plot the features with t-SNE. This takes some seconds for each network."""


def run(given: list[str]) -> None:
    """Write the page and print its path. Print warnings about missing parts to stderr."""
    arguments = parse(Arguments, "bdkd report", given)

    from bdkd.errors import UsageError
    from bdkd.evaluation.report import write_report

    if not arguments.runs:
        raise UsageError("report needs the folder of at least one run, such as runs/mine")
    for warning in write_report(arguments.runs, arguments.output, arguments.tsne, arguments.title):
        print(f"bdkd: {warning}", file=sys.stderr)
    print(arguments.output)
