"""Show the progress of a run on a terminal or in a log file, in lines of at most 80 columns."""

import os
import sys
from collections.abc import Mapping, Sequence
from typing import IO, Any

from tqdm import tqdm

from bdkd.runs.progress_table import ProgressTable

WIDTH = 80
HEADER_EVERY = 20  # lines between two headers, so that one is visible on a terminal of 24 lines


class Console:
    """Show the progress of a run: one updated line on a terminal, else a row for each log interval.

    On a terminal, a progress bar counts the steps until the end of the first log interval. Then the
    row of the newest interval replaces the bar, and the step in this row is updated. The header of
    the rows is printed again after 20 lines, and if a column gets wider.

    Args:
        total: number of steps in the run.
        done: number of steps that earlier sessions completed.
        bar: draw on standard error if it is a terminal.
        unit: name of a step in the progress bar.
        stream: where to print lines. Default: standard output.
    """

    def __init__(
        self, total: int, done: int, bar: bool = True, unit: str = "step",
        stream: IO[str] | None = None,
    ) -> None:  # fmt: skip
        self.stream = stream
        self.table = ProgressTable(total)
        live = bar and _is_terminal(sys.stderr)
        self.bar = tqdm(
            total=total, initial=done, unit=unit, ncols=_columns(sys.stderr), disable=not live
        )
        self._header = ""
        self._lines = 0  # printed since the last header

    @property
    def width(self) -> int:
        """Maximum width of a line in columns: 80, or the width of a narrower terminal."""
        printed = self.stream or sys.stdout
        return _columns(printed if self.bar.disable else sys.stderr)

    def step(self) -> None:
        """Count a step."""
        if not self.bar.disable:
            self.bar.ncols = self.width  # the terminal may have been resized
            self.bar.update(1)

    def metrics(self, values: Mapping[str, Any], epochs: int, seconds_left: float) -> None:
        """Show a line of training metrics.

        Args:
            values: the values of the line in ``metrics.jsonl``.
            epochs: number of epochs of the run.
            seconds_left: estimated time until the end of the run.
        """
        header, row = self.table.format(values, epochs, seconds_left, self.width)
        if header != self._header or self._lines >= HEADER_EVERY:
            self._header, self._lines = header, 0
            self._print_header(header)
        if self.bar.disable:
            self.line(row.with_step(f"{values['step']:>{row.digits}}"))
        else:
            self.bar.bar_format = row.with_step(f"{{n:>{row.digits}}}")  # tqdm fills in the step
            self.bar.refresh()

    def _print_header(self, header: str) -> None:
        if self.bar.disable:
            print(header, file=self.stream, flush=True)
        else:  # standard output may be a file, which gets no rows
            self.bar.write(header, file=sys.stderr)

    def line(self, text: str) -> None:
        """Print a line."""
        self._lines += text.count("\n") + 1
        if self.bar.disable:
            print(text, file=self.stream, flush=True)
        else:
            self.bar.write(text, file=self.stream)

    def close(self) -> None:
        self.bar.close()


def wrap(parts: Sequence[str], width: int) -> str:
    """Join parts with two spaces. Break lines between parts, and indent the lines after the
    first."""
    lines = [parts[0]]
    for part in parts[1:]:
        longer = f"{lines[-1]}  {part}"
        if len(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(f"    {part}")
    return "\n".join(lines)


def _is_terminal(stream: IO[str] | None) -> bool:
    try:
        return stream is not None and stream.isatty()
    except ValueError:  # the stream is closed
        return False


def _columns(stream: IO[str] | None) -> int:
    if not _is_terminal(stream):
        return WIDTH
    assert stream is not None
    try:
        columns = os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):  # an object that claims to be a terminal
        return WIDTH
    return min(WIDTH, columns or WIDTH)  # some pseudo-terminals have 0 columns
