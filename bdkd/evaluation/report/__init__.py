"""Write a self-contained HTML report of runs, without scripts or external resources."""

from collections.abc import Sequence
from pathlib import Path

from bdkd.errors import RunError
from bdkd.evaluation.figures import replace_file
from bdkd.extras import missing_packages
from bdkd.identity import refuse_other_data
from bdkd.text import without_waiting

if message := missing_packages(("numpy",)):
    raise ImportError(message)

from .groups import group_runs
from .page import render
from .runs import find_runs, read_comparisons, read_run

__all__ = ["write_report"]


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
    target = output.resolve()
    try:
        if target.exists() and not target.is_file():  # do not replace /dev/stdout by a file
            with open(target, "w", encoding="utf-8", opener=without_waiting) as file:
                file.write(page)
        else:
            replace_file(target, lambda temporary: temporary.write_text(page, "utf-8"))
    except OSError as error:
        raise RunError(
            f"cannot write {output}: {error.strerror or error}; choose another --output"
        ) from error
    return warnings
