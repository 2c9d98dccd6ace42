"""Run pytest many times without importing torch each time: each run is a fork of a process.

``Tests`` starts this file as a process in a copy of the tree. A request is one line of JSON on its
standard input, ``{"arguments": [...], "seconds": 60}``. The answer is one line on standard output,
``{"status": 1, "output": "..."}``. The status is that of pytest, or null if the tests did not end
in time.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from copies import environment
from line_map import INTERPRETED


class Tests:
    """Run tests in one copy of the tree."""

    def __init__(self, copy: Path):
        self.copy = copy
        self._processes: dict[bool, subprocess.Popen] = {}

    def run(self, tests: list[str], seconds: float) -> tuple[int | None, str]:
        """Run tests until one fails. Tests of the Triton kernels run in a separate process."""
        status, output = 0, ""
        for interpreted in (False, True):
            part = [test for test in tests if test.startswith(INTERPRETED) == interpreted]
            if part and status == 0:
                process = self._process(interpreted)
                print(json.dumps({"arguments": part, "seconds": seconds}), file=process.stdin)
                answer = json.loads(process.stdout.readline())
                status, output = answer["status"], answer["output"]
        return status, output

    def _process(self, interpreted: bool) -> subprocess.Popen:
        if interpreted not in self._processes:
            self._processes[interpreted] = subprocess.Popen(
                [sys.executable, "-c", "import forks; forks.serve()"],
                cwd=self.copy, env=environment(self.copy, interpreted), text=True, bufsize=1,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
            )  # fmt: skip
        return self._processes[interpreted]

    def close(self) -> None:
        for process in self._processes.values():
            process.stdin.close()
            process.wait()


def _preload() -> None:
    """Import the third-party packages that tests need. Our packages are imported after each
    change."""
    import hypothesis.strategies
    import pytest

    assert hypothesis, pytest
    if Path("kernels").is_dir():  # it is missing in the tests of this tool
        import torch._dynamo
        import torch._subclasses.fake_tensor
        import torch.utils.checkpoint
        import torch.utils.flop_counter

        assert torch


def _run(arguments: list[str], seconds: float) -> tuple[int | None, str]:
    with tempfile.TemporaryFile() as log:
        pid = os.fork()
        if pid == 0:
            status = 3
            try:
                os.setsid()
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
                import pytest

                options = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist"]
                status = int(pytest.main([*options, *arguments]))
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        end = time.monotonic() + seconds
        ended, wait_status = 0, 0
        while not ended and time.monotonic() < end:
            ended, wait_status = os.waitpid(pid, os.WNOHANG)
            time.sleep(0.01)
        if not ended:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        log.seek(0)
        output = log.read().decode(errors="replace")
    return (os.waitstatus_to_exitcode(wait_status) if ended else None), output


def serve() -> None:
    _preload()
    for line in sys.stdin:
        request = json.loads(line)
        status, output = _run(request["arguments"], request["seconds"])
        print(json.dumps({"status": status, "output": output[-20000:]}), flush=True)
