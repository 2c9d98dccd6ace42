"""From folders of runs to the file of a page."""

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
    """Write one page of all runs at ``paths``; returns what could not be shown on it.

    Args:
        paths: run folders, or folders that hold them, as ``bdkd compare`` makes.
        tsne: draw the features, which takes some seconds a network.

    Raises:
        RunError: a path holds no run, the runs were tested on different data sets, or the page
            cannot be written; an old page is then whole.
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
    if output.exists() and not output.is_file():  # /dev/stdout must not be replaced by a file
        output.write_text(page, "utf-8")
        return
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(page, "utf-8")
        os.replace(temporary, output)
    finally:
        temporary.unlink(missing_ok=True)
