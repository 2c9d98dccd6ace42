"""Profile steps of a run: write a trace, and print the time of each named range as a table.

``torch.profiler.tensorboard_trace_handler`` writes the trace. torch-tb-profiler, Perfetto and
Holistic Trace Analysis can read it. The table is computed from the trace.
"""

import bisect
import json
import math
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, schedule, tensorboard_trace_handler

from bdkd.engine.ranges import start_recording, stop_recording
from bdkd.errors import RunError
from bdkd.runs.checkpoint import first_line, write_atomically

# Steps before the profile, in which compilation, cuDNN's benchmarks and the first allocations end
SETTLING_STEPS = 10
OTHER, IDLE = "other", "device idle"
NOT_OF_A_STEP = ("evaluation", "checkpoint")  # ranges between steps, which the table leaves out
_STEP = "ProfilerStep#"  # prefix of the names that torch.profiler gives to steps
_DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
_LAUNCHES = ("cuda_runtime", "cuda_driver", "hip_runtime")


class Row(NamedTuple):
    """One row of the table."""

    name: str
    share: float  # of the recorded time; the shares of all rows add up to 1
    milliseconds: float  # per step


class StepProfiler:
    """Record training steps of a run with ``torch.profiler``.

    Each rank writes ``profile/*.pt.trace.json``. Rank 0 also writes ``profile.json`` and shows the
    table.

    Args:
        steps: number of steps to record. 0: do nothing.
        remaining: number of steps until the end of the run.
        folder: the folder of the run.
        show: called with each line of the table.
    """

    def __init__(
        self, steps: int, remaining: int, folder: Path, device: torch.device,
        show: Callable[[str], object], rank: int = 0,
    ) -> None:  # fmt: skip
        self.steps = min(steps, remaining)
        self.folder, self.device, self.show, self.rank = folder, device, show, rank
        self.traces = folder / "profile"
        settling = min(SETTLING_STEPS, remaining - self.steps)
        self.cold = settling < SETTLING_STEPS
        self.profiler: torch.profiler.profile | None = None
        if not self.steps:
            return
        warm_up = min(2, settling)
        activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * (device.type == "cuda")]
        with warnings.catch_warnings():
            # If no step is left for the warm-up, the table contains a note instead.
            warnings.filterwarnings("ignore", "Profiler won't be using warmup")
            plan = schedule(wait=settling - warm_up, warmup=warm_up, active=self.steps, repeat=1)
        self.profiler = torch.profiler.profile(
            activities=activities, schedule=plan, on_trace_ready=self._finish, acc_events=True
        )

    def __enter__(self) -> "StepProfiler":
        if self.profiler is not None:
            start_recording()
            self.profiler.start()
        return self

    def __exit__(self, *_: object) -> None:
        stop_recording()
        if self.profiler is not None:  # the run ended before all steps were recorded
            self.profiler.on_trace_ready = None
            self.profiler.stop()

    def step(self) -> None:
        """Mark the end of a step."""
        if self.profiler is not None:
            self.profiler.step()

    def _finish(self, profiler: torch.profiler.profile) -> None:
        names = stop_recording()
        self.profiler = None  # frees the trace
        try:
            for line in self._write(profiler, names):
                self.show(line)
        except (OSError, RuntimeError, ValueError, RunError) as error:  # ValueError: partial trace
            failed = f"cannot write {self.traces}: {first_line(error)}; free some space"
            self.show(f"warning: training continues without the profile: {failed}")

    def _write(self, profiler: torch.profiler.profile, names: set[str]) -> list[str]:
        """Write the trace and ``profile.json``. Return the lines to print."""
        worker = f"rank-{self.rank}"
        before = set(self.traces.glob("*"))
        try:
            tensorboard_trace_handler(str(self.traces), worker)(profiler)
            (trace,) = set(self.traces.glob(f"{worker}.*.pt.trace.json")) - before
            events = json.loads(trace.read_text("utf-8"))["traceEvents"]
        except (OSError, RuntimeError, ValueError):
            for half in set(self.traces.glob(f"{worker}.*")) - before:
                half.unlink()
            raise
        if self.rank:
            return []
        host, device = where_time_goes(events, names)
        rows = {"phases": [*map(Row._asdict, device or host)], "host": [*map(Row._asdict, host)]}
        written = {"device": str(self.device), "steps": self.steps, **rows}
        text = json.dumps(written, indent=2) + "\n"
        write_atomically(self.folder / "profile.json", text.encode())
        return [table(host, device, self.steps, self.cold), f"trace   {trace}"]


class _Segment(NamedTuple):
    """A time interval of a range, without the ranges inside it, in microseconds."""

    begin: float
    end: float
    name: str


def where_time_goes(
    events: Iterable[dict[str, Any]], names: Iterable[str]
) -> tuple[list[Row], list[Row]]:
    """Return the rows of the host's wall time and the rows of the device's wall time.

    Host time is the time of the training thread. It counts for the innermost named range, or for
    "other" outside of all ranges. Evaluations and checkpoints are left out, including the ranges
    inside them.

    Device time counts for the range in which the work was launched. The launching thread does not
    matter, because autograd launches backward passes from other threads. If work on several streams
    overlaps, the time is divided evenly. The remaining time counts as "device idle".

    Args:
        events: Chrome trace events from torch.profiler.
        names: names of the ranges.

    Returns:
        The rows of the host and the rows of the device. The latter are empty without a device.
    """
    events = [event for event in events if event.get("ph") == "X"]
    annotations = [event for event in events if event.get("cat") == "user_annotation"]
    steps = [event for event in annotations if event["name"].startswith(_STEP)]
    thread = {(event["pid"], event["tid"]) for event in steps}
    known = {event["name"]: OTHER for event in steps} | {name: name for name in names}
    spans = [
        _Segment(event["ts"], event["ts"] + event["dur"], known[event["name"]])
        for event in annotations
        if event["name"] in known and (event["pid"], event["tid"]) in thread
    ]
    segments = _innermost(_without_inner_names(spans))
    count = max(len(steps), 1)
    host: dict[str, float] = defaultdict(float)
    for begin, end, name in segments:
        if name not in NOT_OF_A_STEP:
            host[name] += end - begin

    launched = {
        event["args"]["correlation"]: event["ts"]
        for event in events
        if event.get("cat") in _LAUNCHES and "correlation" in event.get("args", {})
    }
    begins = [segment.begin for segment in segments]
    work = []
    for event in events:
        launch = launched.get(event.get("args", {}).get("correlation"))
        if event.get("cat") not in _DEVICE_WORK or launch is None:
            continue
        index = bisect.bisect_right(begins, launch) - 1
        if index >= 0 and launch <= segments[index].end:
            name = segments[index].name
            work.append(_Segment(event["ts"], event["ts"] + event["dur"], name))
    return _rows(host, host, count), _rows(_divide(work), host, count)


def _without_inner_names(spans: Sequence[_Segment]) -> list[_Segment]:
    """Give the spans inside a span of ``NOT_OF_A_STEP`` the name of the outer span."""
    outer = [span for span in spans if span.name in NOT_OF_A_STEP]
    renamed = []
    for span in spans:
        around = [o.name for o in outer if o.begin <= span.begin and span.end <= o.end]
        renamed.append(span._replace(name=around[0]) if around else span)
    return renamed


def _innermost(spans: Sequence[_Segment]) -> list[_Segment]:
    """Split nested spans into consecutive segments with the name of the innermost span."""
    segments: list[_Segment] = []
    open_spans: list[_Segment] = []
    now = 0.0
    last = _Segment(math.inf, math.inf, "")  # closes all spans
    for span in [*sorted(spans, key=lambda span: (span.begin, -span.end)), last]:
        while open_spans and open_spans[-1].end <= span.begin:
            ended = open_spans.pop()
            if ended.end > now:
                segments.append(_Segment(now, ended.end, ended.name))
            now = ended.end
        if open_spans and span.begin > now:
            segments.append(_Segment(now, span.begin, open_spans[-1].name))
        now = span.begin
        open_spans.append(span)
    return segments


def _divide(work: Sequence[_Segment]) -> dict[str, float]:
    """Return the microseconds of each name between the first and the last segment.

    Overlapping segments share their time evenly. Gaps count as idle. The result excludes work of
    ``NOT_OF_A_STEP`` and the gaps before and after it.
    """
    edges = sorted([(begin, 1, name) for begin, _, name in work]
                   + [(end, -1, name) for _, end, name in work])  # fmt: skip
    totals: dict[str, float] = defaultdict(float)
    running: Counter[str] = Counter()
    for (moment, change, name), (following, _, next_name) in pairwise(edges):
        running[name] += change
        for each in running.elements():
            totals[each] += (following - moment) / running.total()
        of_a_step = not {name, next_name} & {*NOT_OF_A_STEP}
        if not running.total() and following > moment and of_a_step:
            totals[IDLE] += following - moment
    return {name: time for name, time in totals.items() if name not in NOT_OF_A_STEP}


def _rows(times: Mapping[str, float], order: Iterable[str], steps: int) -> list[Row]:
    """Return rows in the order of the ranges, followed by "other" and "device idle"."""
    total = sum(times.values())
    names = [name for name in order if name != OTHER] + [OTHER, IDLE]
    return [Row(x, times[x] / total, times[x] / 1000 / steps) for x in names if x in times]


def table(host: Sequence[Row], device: Sequence[Row], steps: int, cold: bool) -> str:
    """Return the rows as a table: the device's time, if there is a device, and the host's time.

    Args:
        steps: number of recorded steps.
        cold: whether the recorded steps include compilation and warm-up.
    """
    rows = device or host
    waits = {row.name: row.milliseconds for row in host}
    by_name = {name: Row(name, 0.0, 0.0) for name in waits} | {row.name: row for row in rows}
    names = [*dict.fromkeys([*(row.name for row in rows), *waits])]
    width = max(map(len, [*names, "where a step's time went"]))
    head = f"{'where a step’s time went':{width}}  share   ms a step"
    lines = [head + ("   ms of the host" if device else "")]
    for name in names:
        row = by_name[name]
        line = f"{name:{width}}  {100 * row.share:5.1f}%  {row.milliseconds:9.2f}"
        if device:
            line += f"  {waits[name]:15.2f}" if name in waits else f"  {'':15}"
        lines.append(line.rstrip())
    what = "device's time by the range that launched it" if device else "wall time"
    text = f"({what}, mean of {steps} step{'s' * (steps != 1)}"
    lines.append(text + ("; first steps, including compilation and warm-up)" if cold else ")"))
    return "\n".join(lines)
