"""Long benchmarks show progress on stderr: one rewritten line on a terminal, and a line every 10 s
in a log."""

import io
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from progress import EVERY, Progress, clock

ROOT = Path(__file__).parents[2]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def test_a_log_gets_a_line_at_most_every_ten_seconds():
    now, log = Clock(), io.StringIO()
    with Progress("loss_cpu: case", 60, log, now) as progress:
        for number in range(60):
            now.seconds = float(number)
            progress.start(f"size {number}")
    assert log.getvalue().splitlines() == [
        "loss_cpu: case 11 of 60, 0:10 elapsed, about 0:50 left: size 10",
        "loss_cpu: case 21 of 60, 0:20 elapsed, about 0:40 left: size 20",
        "loss_cpu: case 31 of 60, 0:30 elapsed, about 0:30 left: size 30",
        "loss_cpu: case 41 of 60, 0:40 elapsed, about 0:20 left: size 40",
        "loss_cpu: case 51 of 60, 0:50 elapsed, about 0:10 left: size 50",
    ]


def test_a_short_command_prints_no_progress_to_a_log():
    now, log = Clock(), io.StringIO()
    with Progress("accuracy: cell", 3, log, now) as progress:
        for _ in range(3):
            progress.start()
            now.seconds += EVERY / 4
    assert log.getvalue() == ""


def test_the_first_part_has_no_estimate_and_details_follow_the_name():
    now, log = Clock(), io.StringIO()
    progress = Progress("step_cpu: case", 3, log, now)
    progress.start("a pair")
    now.seconds = 3725.0
    progress.update("round 2 of 20")
    assert log.getvalue() == "step_cpu: case 1 of 3, 1:02:05 elapsed: a pair, round 2 of 20\n"


def test_an_unknown_number_of_parts_is_not_shown():
    now, log = Clock(), io.StringIO()
    progress = Progress("scan: file", None, log, now)
    progress.start()
    now.seconds = 61.0
    progress.start()
    assert log.getvalue() == "scan: file 2, 1:01 elapsed\n"


def test_a_terminal_shows_one_line_that_is_removed_at_the_end(monkeypatch, capsys):
    monkeypatch.setattr("shutil.get_terminal_size", lambda: os.terminal_size((40, 24)))
    now, screen = Clock(), Terminal()
    with Progress("loss_cpu: case", 2, screen, now) as progress:
        progress.start("a long name of a case that does not fit in the line")
        assert screen.getvalue() == "\r\x1b[Kloss_cpu: case 1 of 2, 0:00 elapsed: a "
        progress.update("too soon to be drawn again")
        assert screen.getvalue().count("\r") == 1
        progress.print("a table")
        assert screen.getvalue().endswith("\r\x1b[K")
        now.seconds = 1.0
        progress.start()
    assert screen.getvalue().endswith("\r\x1b[K")
    assert "\n" not in screen.getvalue()
    assert capsys.readouterr().out == "a table\n"


def test_waiting_returns_the_results_in_order_and_keeps_the_line_current():
    log = io.StringIO()
    progress = Progress("prepare: call group", 2, log)
    progress.shown -= EVERY
    with ThreadPoolExecutor(1) as pool:
        futures = [pool.submit(time.sleep, 1.2), pool.submit(int, "7")]
        assert progress.results(futures, "compiling") == [None, 7]
        with pytest.raises(ValueError, match="invalid literal"):
            progress.results([pool.submit(int, "x")])
    assert log.getvalue().startswith("prepare: call group 0 of 2, 0:0")


def test_times_are_minutes_and_hours():
    assert [clock(s) for s in (0.4, 59.6, 61, 3600)] == ["0:00", "1:00", "1:01", "1:00:00"]


@pytest.mark.parametrize("command", [
    ["bench/data_imagenet.py", "--index", "200"],
    pytest.param(["bench/checkpoint_stall.py", "--every", "1", "--checkpoints", "3"],
                 marks=pytest.mark.soak),
    pytest.param(["bench/compare_commits.py", str(ROOT), "--cases", "clip", "--steps", "1"],
                 marks=pytest.mark.soak),
])  # fmt: skip
def test_long_scripts_report_their_progress(command, tmp_path):
    """The interval of 10 s is set to 0, so that each update prints a line."""
    code = (
        "import runpy, sys; import progress; progress.EVERY = 0.0; sys.argv = sys.argv[1:]; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    path = os.pathsep.join(map(str, (ROOT / "bench", ROOT, ROOT / "kernels")))
    done = subprocess.run(
        [sys.executable, "-c", code, *command], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    name = Path(command[0]).stem
    assert f"{name}: " in done.stderr
    assert " 1 of " in done.stderr
    assert name not in done.stdout
