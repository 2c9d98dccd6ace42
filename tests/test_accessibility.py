"""Test the output on a terminal and for scripts: colours, progress bars, ``--quiet`` and
``--json``.

test_cli.py tests that output into a pipe has no progress bar and no colours.
"""

import json
import os
import pty
import re
import sys
import termios

import pytest
from small_runs import SMALL

from bdkd.cli import main

QUICK = [*SMALL, "--max-steps", "2", "--log"]


def on_a_terminal(*arguments: str, **environment: str) -> str:
    """Return the output of a command on a new terminal."""
    child, terminal = pty.fork()
    if child == 0:
        termios.tcsetwinsize(1, (24, 120))  # a new terminal has 0 columns
        os.environ.update(environment)
        os.execv(sys.executable, [sys.executable, "-m", "bdkd", *arguments])
    drawn = b""
    while True:
        try:
            piece = os.read(terminal, 65536)
        except OSError:  # on Linux, if the other end is closed
            break
        if not piece:
            break
        drawn += piece
    os.waitpid(child, 0)
    os.close(terminal)
    return drawn.decode()


def test_no_color_disables_colours():
    coloured = on_a_terminal("doctor", "--help", TERM="xterm", NO_COLOR="")
    plain = on_a_terminal("doctor", "--help", TERM="xterm", NO_COLOR="1")
    assert "\x1b[" in coloured
    assert "\x1b" not in plain
    words = re.sub(r"\x1b\[[\d;]*m", "", coloured)
    assert words.split() == plain.split()


def test_a_terminal_shows_a_progress_bar_and_with_quiet_only_the_folder(tmp_path):
    options = {"TERM": "xterm", "NO_COLOR": "1", "OMP_NUM_THREADS": "1"}
    loud = on_a_terminal("train", *QUICK, "--run-dir", str(tmp_path / "a"), **options)
    assert "2/2" in loud
    assert "step/s" in loud or "s/step" in loud
    assert not re.search(r"\x1b\[[\d;]*m", loud)  # it moves the cursor but uses no colours
    quiet = on_a_terminal("train", *QUICK, "--quiet", "--run-dir", str(tmp_path / "b"), **options)
    assert quiet.splitlines() == [str(tmp_path / "b")]


def test_quiet_prints_a_folder_that_bdkd_chose(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    main(["train", *QUICK, "--quiet"])
    out, err = capfd.readouterr()
    assert (tmp_path / out.strip() / "summary.json").exists()
    assert err == ""
    main(["train", "--resume", "--run-dir", out.strip(), "--max-steps", "3", "--quiet"])
    assert capfd.readouterr() == (out, "")


def test_quiet_still_prints_failures(tmp_path, capfd):
    target = tmp_path / "file"
    target.touch()
    with pytest.raises(SystemExit) as exit_:
        main(["train", *QUICK, "--quiet", "--run-dir", str(target)])
    assert exit_.value.code == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert str(target) in err


def test_with_json_only_json_is_printed(tmp_path, capfd):
    main(["train", *QUICK, "--quiet", "--run-dir", str(tmp_path / "run")])
    capfd.readouterr()
    main(["evaluate", str(tmp_path / "run"), "--json"])
    out, err = capfd.readouterr()
    assert json.loads(out)["networks"].keys() >= {"teacher", "student"}
    assert err == ""
    main(["doctor", "--json"])
    out, err = capfd.readouterr()
    assert {finding["name"] for finding in json.loads(out)} > {"bdkd", "system", "CPU", "torch"}
    assert err == ""
