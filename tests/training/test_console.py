"""Printed rows of training metrics and lines of evaluations: their content, within 80 columns."""

import fcntl
import io
import itertools
import math
import os
import pty
import struct
import sys
import termios

import pytest
from small_runs import shown_step

from bdkd.runs.console import HEADER_EVERY, WIDTH, Console, wrap
from bdkd.runs.progress_table import ProgressTable, hours, percent, shorten
from bdkd.runs.remaining_time import RemainingTime

LINE = {
    "step": 7, "epoch": 3, "split": "train", "seconds": 100.0,
    "student": {"loss": 1.25, "top1": 0.257}, "teacher": {"loss": None, "top1": 0.5},
    "images_per_second": 1234.4, "data_wait": 0.034, "memory_mib": 24.3 * 1024, "mfu": None,
    "learning_rate": 0.1, "skipped_steps": 0,
}  # fmt: skip
ROWS = """\
                  student     teacher
epoch     step   loss top-1  loss top-1  images/s  wait  memory     left
 3/30    7/570  1.250 25.7%     - 50.0%     1,234    3%   24.3G  2:05:01
"""


def printed(steps: int, epochs: int, width: int = WIDTH, **values) -> list[str]:
    """Return the lines of the header and a row."""
    header, row = ProgressTable(steps).format({**LINE, **values}, epochs, 7501.0, width)
    return [*header.split("\n"), row.with_step(f"{LINE['step']:>{row.digits}}")]


def networks(*names: str, loss: float = 12345.678, top1: float = 1.0) -> dict:
    return {name: {"loss": loss, "top1": top1} for name in names}


def columns(lines: list[str]) -> list[str]:
    return lines[-2].split()


# --- rows -----------------------------------------------------------------------------------------


def test_a_row_in_a_log_file(capsys):
    """A network that did not train has no loss."""
    Console(570, 3, bar=False).metrics(LINE, 30, 7501.0)
    assert capsys.readouterr().out == ROWS


def test_the_header_repeats_after_twenty_lines(capsys):
    """Other lines between the rows count too, so that the header stays on the screen."""
    console = Console(570, 0, bar=False)
    for step in range(1, 61):
        console.metrics({**LINE, "step": step}, 30, 60.0)
        if step % 2 == 0:
            console.line("epoch 1/30  val\n    more")
    lines = capsys.readouterr().out.splitlines()
    headers = [i for i, line in enumerate(lines) if line.startswith("epoch ") and "loss" in line]
    assert headers[0] == 1
    assert {b - a for a, b in itertools.pairwise(headers)} <= {HEADER_EVERY + 2, HEADER_EVERY + 3}
    assert [step for step in map(shown_step, lines) if step is not None] == list(range(1, 61))


def test_only_a_wider_column_prints_a_new_header(capsys):
    console = Console(570, 0, bar=False)
    for loss in (1.0, 12345678.0, -12345678.0, 1.0):
        console.metrics({**LINE, **networks("student", "teacher", loss=loss)}, 30, 60.0)
    lines = capsys.readouterr().out.splitlines()
    # The second header is for -1e+07.
    assert [line.startswith("epoch") for line in lines].count(True) == 2
    assert len({len(line) for line in lines[-3:]}) == 1


NAMES = [
    ["student"], ["student", "teacher"], ["a_student_with_a_long_name", "teacher_with_a_long_name"],
    ["student", "teacher", "assistant"], [f"a_very_long_name_{k}" for k in range(3)],
    [f"teacher_{k}" for k in range(4)], [f"a_very_long_name_{k}" for k in range(5)],
    [f"a_very_long_name_{k}" for k in range(6)], [f"teacher_{k}" for k in range(12)], ["x" * 200],
]  # fmt: skip


@pytest.mark.parametrize("names", NAMES, ids=len)
@pytest.mark.parametrize("loss", [2.1, math.nan, math.inf, -math.inf, -1.5e300, 99999.49, None])
@pytest.mark.parametrize(("steps", "epochs"), [(570, 30), (1_000_000, 300), (10**12, 10**9)])
def test_rows_are_at_most_80_columns_wide(names, loss, steps, epochs):
    shown = {**LINE, **networks(*names, loss=loss), "images_per_second": 123456789.0}
    for name in {"student", "teacher"} - set(names):
        del shown[name]
    header, row = ProgressTable(steps).format(shown, epochs, 1e7, WIDTH)
    lines = [*header.split("\n"), row.with_step(str(steps))]
    assert max(map(len, lines)) <= WIDTH
    said = lines[-1].split()
    assert said[:2] == [f"3/{epochs}", str(steps)] or said[1] == f"{steps}/{steps}"
    assert said[-1] == "2777:46:40"


@pytest.mark.parametrize(("steps", "epochs", "total"), [(17_100, 30, True), (10**6, 300, False)])
def test_two_networks_have_all_columns(steps, epochs, total):
    """The rows of a very long run leave out only the total number of steps."""
    lines = printed(steps, epochs, **networks("student", "teacher"))
    assert columns(lines) == [
        "epoch", "step", "loss", "top-1", "loss", "top-1", "images/s", "wait", "memory", "left",
    ]  # fmt: skip
    assert (f"7/{steps} " in lines[-1]) == total


def test_long_names_are_shortened_to_distinct_names():
    assert shorten(["resnet50_teacher", "resnet18_student", "short"], 11) == [
        "resnet50_t~", "resnet18_s~", "short",
    ]  # fmt: skip
    assert shorten(["assistant_a", "assistant_b", "student"], 8) == [
        "assist~1", "assist~2", "student",
    ]  # fmt: skip


@pytest.mark.parametrize("limit", [7, 8, 11, 15])
def test_shortened_names_are_all_different(limit):
    for count in range(2, 40):
        short = shorten([f"network_{'x' * (k % 3)}_{k:03d}" for k in range(count)], limit)
        assert len(set(short)) == count
        assert max(map(len, short)) <= limit


def test_networks_that_do_not_fit_are_counted():
    shown = {key: x for key, x in LINE.items() if key not in ("student", "teacher")}
    shown |= networks(*(f"teacher_{k}" for k in range(12)), loss=1.0)
    header, _ = ProgressTable(17_100).format(shown, 30, 60.0, WIDTH)
    above, titles = header.split("\n")
    assert titles.split().count("top-1") == 5
    assert above.split()[-1] == "+7"


def test_rows_fit_a_narrow_terminal():
    for width in range(1, WIDTH + 1):
        lines = printed(17_100, 30, width)
        assert max(map(len, lines)) <= width
        if width >= 39:  # enough for accuracies and the time left
            assert {"epoch", "step", "top-1", "left"} <= set(columns(lines))


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        ("images_per_second", 0.52, "0.5"), ("images_per_second", 9.97, "10"),
        ("images_per_second", 999_999.4, "999,999"), ("images_per_second", 1.5e6, "1.5M"),
        ("images_per_second", math.nan, "nan"), ("data_wait", 1.0, "100%"),
        ("memory_mib", 409.3, "409M"), ("memory_mib", 999.7, "1.0G"), ("memory_mib", 2e6, "1.9T"),
        ("memory_mib", None, "-"),
        ("student", {"loss": math.nan, "top1": 0.1}, "nan"),
        ("student", {"loss": 9.99996, "top1": 0.1}, "10.00"),
        ("student", {"loss": 123.456, "top1": 0.1}, "123.5"),
        ("student", {"loss": 1.0, "top1": 0.9999}, "100%"),
        ("student", {"loss": 1.0, "top1": 0.9994}, "99.9%"),
    ],
)  # fmt: skip
def test_values_are_shortened(key, value, shown):
    assert shown in printed(570, 30, **{key: value})[-1].split()


def test_hours_and_percent():
    assert [hours(x) for x in (0.4, 59.6, 3599.4, 360_061, -1.0, math.inf, math.nan)] == [
        "0:00:00", "0:01:00", "0:59:59", "100:01:01", "0:00:00", "-", "-",
    ]  # fmt: skip
    assert [percent(x) for x in (0.0, 0.25, 1.0, None)] == ["0.0%", "25.0%", "100%", "-"]


# --- lines ----------------------------------------------------------------------------------------


def test_lines_are_wrapped_only_between_parts():
    assert wrap(["epoch 1/3", "val", "student top-1 20.0%"], 80) == (
        "epoch 1/3  val  student top-1 20.0%"
    )
    assert wrap(["epoch 1/3", "val", "student top-1 20.0%", "teacher"], 30) == (
        "epoch 1/3  val\n    student top-1 20.0%\n    teacher"
    )


# --- a terminal -----------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def a_terminal(monkeypatch) -> Terminal:
    """Replace standard error with a terminal. Not a fixture: pytest sets its own stderr later."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    return terminal


def test_a_live_row_on_a_terminal(monkeypatch, capsys):
    """The row starts at the step of the resume, and its step advances between two log lines."""
    terminal = a_terminal(monkeypatch)
    console = Console(40, 30)
    console.step()
    console.bar.refresh()
    assert "31/40" in terminal.getvalue()
    console.metrics(LINE, 30, 1.0)
    console.step()
    console.close()
    shown = terminal.getvalue()
    assert "epoch   step   loss top-1  loss top-1  images/s  wait  memory     left\n" in shown
    rest = "  1.250 25.7%     - 50.0%     1,234    3%   24.3G  0:00:01"
    assert f" 3/30  31/40{rest}" in shown
    assert f" 3/30  32/40{rest}" in shown
    assert capsys.readouterr().out == ""  # standard output gets no header, because it gets no rows


def test_lines_go_above_the_live_row(monkeypatch, capsys):
    a_terminal(monkeypatch)
    console = Console(40, 0)
    console.metrics(LINE, 30, 1.0)
    console.line("epoch 1/30  val")
    console.close()
    assert capsys.readouterr().out == "epoch 1/30  val\n"


def test_a_comparison_counts_runs(monkeypatch):
    terminal = a_terminal(monkeypatch)
    console = Console(6, 2, unit="run")
    console.step()
    console.close()
    assert "3/6" in terminal.getvalue()
    assert max(map(len, terminal.getvalue().replace("\r", "\n").split("\n"))) <= WIDTH


@pytest.mark.parametrize(("columns", "width"), [(120, 80), (80, 80), (50, 50), (0, 80)])
def test_the_width_of_a_terminal(columns, width, monkeypatch):
    """Some pseudo-terminals report 0 columns."""
    other, own = pty.openpty()
    fcntl.ioctl(own, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with os.fdopen(own, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        console = Console(17_100, 0)
        assert console.width == width
        console.step()
        console.metrics(LINE, 30, 18_720.0)
        console.close()
        stream.flush()
        seen = b""
        while b"5:12:00" not in seen or not seen.endswith(b"\n"):  # output in several parts
            seen += os.read(other, 65_536)
    os.close(other)
    said = seen.decode().replace("\r", "\n").split("\n")
    assert max(map(len, said)) <= width
    assert any(line.startswith(" 3/30 ") for line in said)


@pytest.mark.parametrize("stream", [None, "closed"])
def test_a_process_without_standard_error(stream, monkeypatch, capsys):
    if stream:
        stream = io.StringIO()
        stream.close()
    monkeypatch.setattr(sys, "stderr", stream)
    console = Console(570, 0)
    console.step()
    console.metrics(LINE, 30, 7501.0)
    console.close()
    assert "    7/570  1.250 25.7%" in capsys.readouterr().out


# --- the time left --------------------------------------------------------------------------------


def test_the_time_left_counts_steps_evaluations_and_checkpoints():
    remaining = RemainingTime()
    remaining.add_interval(10, 100.0)  # the first interval may include compiling
    assert remaining.seconds(20, 2) == 200  # no evaluation is measured yet
    remaining.add_interval(10, 20.0)
    assert remaining.seconds(20, 2) == 40
    remaining.add_phase("evaluation", 30.0)
    remaining.add_phase("evaluation", 50.0)
    assert remaining.seconds(20, 2) == 40 + 2 * 40
    remaining.add_phase("checkpoint", 5.0)
    assert remaining.seconds(20, 2) == 40 + 2 * 40 + 20 * 5 / 20
    assert remaining.seconds(0, 0) == 0
