"""Start runs under torchrun, wait for their steps, and send signals to their ranks."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from small_runs import metrics

# One epoch of 19 steps of two small networks, with every option that adds state to a checkpoint.
TINY = [
    "digits", "--networks.teacher.model", "resnet8", "--train.epochs", "1",
    "--train.ema-decay", "0.9", "--train.clip-norm", "5", "--checkpoint.every-steps", "4",
    "--log-every", "1", "--log",
]  # fmt: skip


class Launch:
    """Run ``bdkd train`` under ``torchrun`` on ``ranks`` ranks."""

    def __init__(self, ranks: int, run: Path, *arguments: str, options: tuple[str, ...] = ()):
        self.run, self.ranks = run, ranks
        run.parent.mkdir(parents=True, exist_ok=True)
        self.output = run.with_name(f"{run.name}.out")
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                [
                    sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks),
                    "--standalone", *options, "-m", "--", "bdkd", "train", *arguments,
                    "--run-dir", str(run),
                ],
                stdout=output, stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip

    def __enter__(self) -> "Launch":
        return self

    def __exit__(self, *_: object) -> None:
        for pid in [*self.pids().values(), self.process.pid]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()

    def text(self) -> str:
        return self.output.read_text()

    def pids(self) -> dict[int, int]:
        """Return the process id of each running rank."""
        found = {}
        listed = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        for pid in listed.read_text().split() if listed.exists() else []:
            try:
                entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            except OSError:
                continue
            rank = [e[5:] for e in entries if e.startswith(b"RANK=")]
            if rank:
                found[int(rank[0])] = int(pid)
        return found

    def until(self, ready: Callable[[], bool], seconds: float = 240) -> None:
        """Wait until ``ready`` returns True. Fails if the launch ends first or the time is over."""
        deadline = time.monotonic() + seconds
        while not ready():
            assert self.process.poll() is None, self.text()
            assert time.monotonic() < deadline, f"not ready after {seconds} s: {self.text()}"
            time.sleep(0.005)

    def until_step(self, step: int) -> None:
        self.until(lambda: steps_done(self.run) >= step)

    def signal(self, rank: int, number: int) -> None:
        os.kill(self.pids()[rank], number)

    def end(self, seconds: float = 240) -> int:
        return self.process.wait(seconds)


def steps_done(run: Path) -> int:
    """Return the last step in the run's metrics, or 0 if there is none."""
    try:
        done = metrics(run)
    except (OSError, ValueError):  # no file yet, or its last line is incomplete
        return 0
    return max((line["step"] for line in done), default=0)
