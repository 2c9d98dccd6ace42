"""Format the metrics of log intervals as rows of a table that fits a given width."""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

# Sets of columns to leave out, in the order in which they are tried
_LEFT_OUT: tuple[frozenset[str], ...] = tuple(
    frozenset(names.split())
    for names in (
        "", "total", "total memory", "total memory wait", "total loss",
        "total memory loss", "total memory wait loss", "total memory wait loss images/s",
    )
)  # fmt: skip
_SHORTEST_NAME = 7  # of a network: "student" and "teacher" are never shortened
_STEP = "\0"  # placeholder for a digit of the step


class Layout(NamedTuple):
    """The contents of the rows of a table."""

    networks: int  # number of shown networks, starting with the first
    whole_names: bool  # do not shorten the names of networks
    left_out: frozenset[str]  # titles of columns


class Cell(NamedTuple):
    """One value of a row."""

    network: str  # name above the title; empty for columns of the run
    title: str
    text: str


class Row(NamedTuple):
    """A row whose step can be filled in later."""

    text: str
    digits: int  # width of the step

    def with_step(self, step: str) -> str:
        return self.text.replace(_STEP * self.digits, step).replace(_STEP, "")


class ProgressTable:
    """Format training metrics as rows of a table.

    The columns are the epoch, the step, the loss and top-1 of each network, images per second, the
    wait for data, the memory and the remaining time.

    If a row is too wide, the names of networks are shortened first. Then columns are left out in
    the order of ``_LEFT_OUT``, and at last the networks that do not fit. ``metrics.jsonl`` always
    contains all values. Columns never get narrower, so a header is valid for all rows until the
    next header.

    Args:
        steps: number of steps in the run.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self._widths: dict[tuple[Layout, str, str], int] = {}

    def format(
        self, values: Mapping[str, Any], epochs: int, seconds_left: float, width: int
    ) -> tuple[str, Row]:
        """Return the header (one or two lines) and the row for a line of training metrics.

        Args:
            values: the values of the line in ``metrics.jsonl``.
            epochs: number of epochs in the run.
            seconds_left: estimated time until the end of the run.
            width: maximum width in columns.
        """
        networks = {name: v for name, v in values.items() if isinstance(v, dict)}
        header, row = "", ""
        for layout in _layouts(len(networks)):
            cells = self._cells(values, networks, epochs, seconds_left, layout)
            widths = [self._width(layout, cell) for cell in cells]
            header, row = _lay_out(cells, widths, layout.whole_names)
            if max(map(len, (row, *header.split("\n")))) <= width:
                break
        header = "\n".join(line[:width].rstrip() for line in header.split("\n"))
        return header, Row(row[:width].rstrip(), len(str(self.steps)))

    def _width(self, layout: Layout, cell: Cell) -> int:
        """Return the width of a cell's column: the width of its widest cell so far."""
        key = (layout, cell.network, cell.title)
        width = max(len(cell.title), len(cell.text), self._widths.get(key, 0))
        self._widths[key] = width
        return width

    def _cells(
        self, values: Mapping[str, Any], networks: Mapping[str, Mapping[str, Any]], epochs: int,
        seconds_left: float, layout: Layout,
    ) -> list[Cell]:  # fmt: skip
        """Return the cells of a row from left to right."""
        total = "" if "total" in layout.left_out else f"/{self.steps}"
        cells = [
            Cell("", "epoch", f"{values['epoch']}/{epochs}"),
            Cell("", "step", _STEP * len(str(self.steps)) + total),
        ]
        for name, network in list(networks.items())[: layout.networks]:
            cells.append(Cell(name, "loss", _number(network["loss"])))
            cells.append(Cell(name, "top-1", percent(network["top1"])))
        if hidden := len(networks) - layout.networks:
            cells.append(Cell(f"+{hidden}", "more", ""))
        waited = values.get("data_wait")
        cells += [
            Cell("", "images/s", _speed(values["images_per_second"])),
            Cell("", "wait", "-" if waited is None else f"{100 * waited:.0f}%"),
            Cell("", "memory", _memory(values.get("memory_mib"))),
            Cell("", "left", hours(seconds_left)),
        ]
        return [cell for cell in cells if cell.title not in layout.left_out]


def _layouts(networks: int) -> Iterator[Layout]:
    """Yield the layouts of a table, starting with the most complete one."""
    for shown in range(networks, 0, -1) or (0,):
        for left_out in _LEFT_OUT:
            for whole_names in (True, False):
                yield Layout(shown, whole_names, left_out)
    yield Layout(min(networks, 1), False, _LEFT_OUT[-1] | {"left"})


def _lay_out(cells: Sequence[Cell], widths: Sequence[int], whole_names: bool) -> tuple[str, str]:
    """Return the header and the row. The columns of a network are grouped below its name."""
    grouped = groupby(range(len(cells)), lambda i: (cells[i].network, cells[i].network or i))
    groups = [(name, list(indices)) for (name, _), indices in grouped]
    spans = [sum(widths[i] for i in indices) + len(indices) - 1 for _, indices in groups]
    shown = {name: name for name, _ in groups}
    if networks := [name for name in shown if name and not whole_names]:
        limit = max(span for span, (name, _) in zip(spans, groups, strict=True) if name)
        shown |= zip(networks, shorten(networks, max(limit, _SHORTEST_NAME)), strict=True)
    lines: tuple[list[str], list[str], list[str]] = ([], [], [])
    for (name, indices), span in zip(groups, spans, strict=True):
        width = max(span, len(shown[name]))
        texts = (
            shown[name].center(width),
            " ".join(cells[i].title.rjust(widths[i]) for i in indices),
            " ".join(cells[i].text.rjust(widths[i]) for i in indices),
        )
        for line, text in zip(lines, texts, strict=True):
            line.append(text.rjust(width))
    above, titles, row = ("  ".join(line).rstrip() for line in lines)
    return "\n".join(filter(None, (above, titles))), row


def shorten(names: Sequence[str], limit: int) -> list[str]:
    """Shorten names that are longer than a limit, and mark them with ``~``.

    If two shortened names are equal, number them. The result is unique, because the name of a
    network cannot contain ``~``.
    """
    cut = [name if len(name) <= limit else f"{name[: limit - 1]}~" for name in names]
    clipped = [name for name in cut if name.endswith("~")]
    if len(set(clipped)) == len(clipped):
        return cut
    marks = [f"~{number}" for number in range(1, len(names) + 1)]
    return [
        name if len(name) <= limit else name[: limit - len(mark)] + mark
        for name, mark in zip(names, marks, strict=True)
    ]


def percent(share: float | None) -> str:
    """Return a share as a percentage with at most 5 characters. None becomes a dash."""
    if share is None:
        return "-"
    return f"{100 * share:.{0 if share >= 0.9995 else 1}f}%"


def hours(seconds: float) -> str:
    """Return a time as ``h:mm:ss``."""
    if not math.isfinite(seconds):
        return "-"
    minutes, seconds = divmod(round(max(seconds, 0.0)), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def _number(value: float | None) -> str:
    """Return a number with about four digits, ``nan`` or ``inf``, or a dash for None."""
    if value is None:
        return "-"
    for limit, digits in ((9.9995, 3), (99.995, 2), (999.95, 1), (99999.5, 0)):
        if abs(value) < limit:
            return f"{value:.{digits}f}"
    return f"{value:.0e}"


def _speed(images: float) -> str:
    if images < 9.95:
        return f"{images:.1f}"
    if images < 999_999.5 or not math.isfinite(images):
        return f"{images:,.0f}"
    return f"{images / 1e6:.1f}M"


def _memory(mebibytes: float | None) -> str:
    """Return a size with the binary prefixes M, G and T."""
    if mebibytes is None or not math.isfinite(mebibytes):
        return "-"
    if mebibytes < 999.5:
        return f"{mebibytes:.0f}M"
    if mebibytes < 999.95 * 1024:
        return f"{mebibytes / 1024:.1f}G"
    return f"{mebibytes / 1024**2:.1f}T"
