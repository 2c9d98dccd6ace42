"""Format plain tables for a terminal."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from bdkd.metrics import registered_metrics


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table with the first column aligned to the left and the others to the right."""
    widths = [max(len(line[i]) for line in (header, *rows)) for i in range(len(header))]
    lines = []
    for first, *others in (header, ["-" * width for width in widths], *rows):
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)


def _count(number: int | None) -> str:
    return "–" if number is None else f"{number:,}"


def printable(text: str) -> str:
    """Escape the control characters in a text that comes from a file."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def results_table(summary: Mapping[str, Any]) -> str:
    """Return a table with the metrics of a run's networks on one split."""
    registered = registered_metrics()
    rows = [
        [
            printable(f"{name} ({network['model']})"), _count(network["parameters"]),
            f"{100 * network['top1']:.2f}%", f"{network['nll']:.4f}",
            f"{100 * network['ece']:.2f}%", f"{100 * network['ece_if_calibrated']:.2f}%",
            *(metric.show(network.get(metric.key)) for metric in registered),
        ]
        for name, network in summary["networks"].items()
    ]  # fmt: skip
    header = ["network", "parameters", "top-1", "NLL", "ECE", "ECE if calibrated",
              *(metric.label for metric in registered)]  # fmt: skip
    images = summary["images"]
    split = {"val": "validation", "test": "test"}[summary["split"]]
    gain = summary.get("temperature_gain")
    how = (
        f"with the temperature {gain['temperature']:.4g} in the last layer"
        if gain
        else ("without temperature scaling")
    )
    caption = (
        f"{images} {split} images. ECE: 15 bins, {how}. "
        '"ECE if calibrated" is the expected ECE of a perfectly calibrated network with these '
        f"confidences on {images} images."
    )
    return f"{table(header, rows)}\n\n{textwrap.fill(caption, 80)}"
