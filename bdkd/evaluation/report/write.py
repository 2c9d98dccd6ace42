"""Write the report of run folders to a file."""

import os
from collections.abc import Sequence
from pathlib import Path

from bdkd.errors import RunError
from bdkd.identity import refuse_other_data

from .groups import group_runs
from .page import render
from .runs import find_runs, read_comparisons, read_run


def write_report(
    paths: Sequence[Path], output: Path, tsne: bool = True, title: str = "Distillation runs"
) -> list[str]:
    """Write one HTML page about all runs at ``paths`` and return warnings about missing parts.

    Args:
        paths: run folders, or folders of run folders, such as the output of ``bdkd compare``.
        output: the HTML file.
        tsne: draw t-SNE maps of the features, which takes a few seconds for each network.
        title: the heading of the page.

    Raises:
        RunError: a path contains no run, the runs were tested on different data sets, or the page
            cannot be written. An existing page is not changed.
    """
    runs = [read_run(path) for path in find_runs(paths)]
    refuse_other_data([(str(run.path), run.summary.get("data")) for run in runs])
    page, warnings = render(group_runs(runs), read_comparisons(paths), tsne, title)
    try:
        _write(page, output.resolve())
    except OSError as error:
        raise RunError(
            f"cannot write {output}: {error.strerror or error}; choose another --output"
        ) from error
    return warnings


def _write(page: str, output: Path) -> None:
    if output.exists() and not output.is_file():  # do not replace /dev/stdout by a file
        output.write_text(page, "utf-8")
        return
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(page, "utf-8")
        os.replace(temporary, output)
    finally:
        temporary.unlink(missing_ok=True)
