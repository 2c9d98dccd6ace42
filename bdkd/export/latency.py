"""Measure the latency and memory of exported files on the CPU.

Each file runs in a separate process. Only one process runs at a time. In each round, every file is
timed once, so that a change in the speed of the machine affects all files. The order of the files
is rotated from round to round. Each process is started several times.
"""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from multiprocessing import Pipe
from typing import NamedTuple

import numpy as np

from bdkd.export import inference_process
from bdkd.export.facts import memory_limit
from bdkd.export.runnable import Runnable
from bdkd.plugins import plugin_arguments

ANSWER_SECONDS = 300.0  # time limit of a process, to load a file or to answer one request
WARMUP_ROUNDS = 5
STARTS = 5  # number of times that the process of each file is started
STUDENT = 2.776  # the 97.5% quantile of Student's distribution with STARTS - 1 degrees of freedom


class Measurement(NamedTuple):
    """The result of one file for one number of threads and one batch size. The values are None
    after a failure."""

    times: np.ndarray | None
    """Seconds of an inference, of shape (starts, rounds of each start)."""
    peak_bytes: int | None
    """Largest resident memory of a process."""
    runtime_bytes: int | None
    """Resident memory of the process before it loaded the network."""
    failure: str | None


def measure(files: Sequence[Runnable], threads: int, batch: int, rounds: int) -> list[Measurement]:
    """Measure files together.

    Args:
        rounds: number of rounds in each of the :data:`STARTS` starts.
    """
    started: list[list[Inference]] = [[] for _ in files]
    for _ in range(STARTS):
        running = []
        with contextlib.ExitStack() as stack:
            for file, earlier in zip(files, started, strict=True):
                if earlier and earlier[-1].failure is not None:
                    continue
                one = Inference(file, threads, batch)
                stack.callback(one.close)
                one.start()
                earlier.append(one)
                running.append(one)
            times = time_rounds([one.run for one in running], rounds)
        for one, column in zip(running, times.T, strict=True):
            one.times = column
    return [_summary(processes) for processes in started]


def _summary(processes: Sequence["Inference"]) -> Measurement:
    if (failure := processes[-1].failure) is not None:
        return Measurement(None, None, None, failure)
    times = np.stack([one.times for one in processes])
    return Measurement(times, *max((one.peak, one.runtime) for one in processes), None)


def time_rounds(runs: Sequence[Callable[[], float]], rounds: int) -> np.ndarray:
    """Call functions in rounds, in a rotated order, and return what they return.

    Args:
        runs: each runs one file and returns the seconds of an inference.
        rounds: number of measured rounds. :data:`WARMUP_ROUNDS` rounds run before them.

    Returns:
        Seconds, of shape (rounds, files).
    """
    times = np.empty((rounds, len(runs)))
    for number in range(-WARMUP_ROUNDS, rounds):
        for place in range(len(runs)):
            file = (number + place) % len(runs)
            seconds = runs[file]()
            if number >= 0:
                times[number, file] = seconds
    return times


class Ratio(NamedTuple):
    """A ratio of latencies and its 95% interval."""

    value: float
    low: float
    high: float


def ratio_of(times: np.ndarray, reference: np.ndarray) -> Ratio:
    """Return the ratio of the latencies of two files, with an interval.

    For each start, take the median over rounds of the ratio of the two times. The value is the
    geometric mean of these medians. The interval is Student's t-interval of their logarithms over
    starts, because rounds of one start are not independent: where a process lies in memory changes
    its speed by 1 to 2%.

    Args:
        times: seconds of a file, (starts, rounds).
        reference: seconds of the file in the denominator, (starts, rounds).
    """
    medians = np.log(np.median(times / reference, axis=1))
    mean = medians.mean()
    half = STUDENT * medians.std(ddof=1) / math.sqrt(len(medians))
    return Ratio(*(math.exp(x) for x in (mean, mean - half, mean + half)))


class Inference:
    """A process that runs one file on random images. After a failure, the times are NaN."""

    def __init__(self, file: Runnable, threads: int, batch: int) -> None:
        self.file = file
        self.failure: str | None = None
        self.process: subprocess.Popen | None = None
        self.peak = self.runtime = 0  # bytes, see Measurement
        self.times = np.empty(0)
        self.request = {
            "shape": [batch, *file.shape], "threads": threads, "memory": memory_limit(),
            "name": file.input, "plugins": plugin_arguments()[1::2],
        }  # fmt: skip

    def start(self) -> None:
        """Start the process and load the network."""
        self.connection, remote = Pipe()
        command = [sys.executable, "-P", inference_process.__file__, self.file.format]
        # A terminal sends Ctrl-C to every process of a session. The new process must not receive
        # it, so it gets its own session. It ends when this process closes the connection.
        self.process = subprocess.Popen(
            command, stdin=remote.fileno(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)},
        )  # fmt: skip
        remote.close()
        self._exchange()
        self.runtime = self.peak
        self._exchange(json.dumps(self.request).encode(), self.file.content)

    def close(self) -> None:
        """End the process."""
        if self.process is not None:
            self.connection.close()
            self.process.kill()
            self.process.wait()

    def run(self) -> float:
        """Return the seconds of one inference."""
        return self._exchange(b"")

    def _exchange(self, *messages: bytes) -> float:
        """Send messages, and return the seconds that the answer contains, or NaN."""
        if self.failure is not None:
            return np.nan
        try:
            for message in messages:
                self.connection.send_bytes(message)
            if not self.connection.poll(ANSWER_SECONDS):
                self._fail(f"its process did not answer for {ANSWER_SECONDS:g} s")
                return np.nan
            answer = json.loads(self.connection.recv_bytes())
        except (EOFError, OSError):
            self._fail(self._how_it_ended())
            return np.nan
        if "error" in answer:
            self._fail(answer["error"])
            return np.nan
        self.peak = answer["peak"]
        return answer.get("seconds", np.nan)

    def _fail(self, reason: str) -> None:
        assert self.process is not None
        self.process.kill()  # it may hang
        runner = "onnxruntime" if self.file.format == "onnx" else "torch"
        self.failure = f"{runner} cannot run {self.file.path}: {reason}"

    def _how_it_ended(self) -> str:
        assert self.process is not None
        try:
            code = self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            return "its process closed the connection"
        if code >= 0:
            return f"its process ended with code {code}"
        hint = " (possibly out of memory)" if -code == signal.SIGKILL else ""
        return f"its process ended with {signal.Signals(-code).name}{hint}"
