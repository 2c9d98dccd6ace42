"""Where the time of a step goes: named ranges, a trace of some steps, and a table made from it.

The trace is what ``torch.profiler.tensorboard_trace_handler`` writes: torch-tb-profiler, Perfetto
and Holistic Trace Analysis read it. The table is read from that file and from nothing else.
"""

import bisect
import json
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, schedule, tensorboard_trace_handler

from bdkd.engine.ranges import start_recording, stop_recording
from bdkd.errors import RunError
from bdkd.runs.checkpoint import first_line, write_atomically

# Compilation, cuDNN's search for algorithms and the first allocations are over by then.
SETTLING_STEPS = 10
OTHER, IDLE = "other", "device idle"
_STEP = "ProfilerStep#"  # what torch.profiler calls a step
_DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
_LAUNCHES = ("cuda_runtime", "cuda_driver", "hip_runtime")


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    share: float  # of the recorded time; all rows together are 1
    milliseconds: float  # a step


class StepProfiler:
    """Records some of the steps that remain and writes ``profile/*.pt.trace.json``; the first rank
    also writes ``profile.json`` and shows the table.

    Args:
        steps: to record; fewer where fewer remain, and none for 0.
        remaining: steps of the run from now on.
        folder: the run's.
        rank: of this process; each writes a trace of its own.
        show: takes the lines to print.
    """

    def __init__(
        self,
        steps: int,
        remaining: int,
        folder: Path,
        device: torch.device,
        show: Callable[[str], object],
        rank: int = 0,
    ) -> None:
        self.steps = min(steps, remaining)
        self.folder, self.device, self.show, self.rank = folder, device, show, rank
        self.traces = folder / "profile"
        settling = min(SETTLING_STEPS, remaining - self.steps)
        self.cold = settling < SETTLING_STEPS
        self.profiler: torch.profiler.profile | None = None
        if not self.steps:
            return
        warm_up = min(2, settling)
        activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        with warnings.catch_warnings():
            # said by the table, where no step is left to warm up on
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
        if self.profiler is not None:  # the run ended before the last step to record
            self.profiler.on_trace_ready = None
            self.profiler.stop()

    def step(self) -> None:
        """To be called after each step."""
        if self.profiler is not None:
            self.profiler.step()

    def _finish(self, profiler: torch.profiler.profile) -> None:
        names = stop_recording()
        self.profiler = None  # what it holds of the trace is no longer needed
        try:
            said = self._write(profiler, names)
        except (OSError, RuntimeError, ValueError, RunError) as error:
            # ValueError: cut off. A run is worth more than its profile.
            said = [
                f"warning: training goes on without the profile: cannot write {self.traces}: "
                f"{first_line(error)}; make room there"
            ]
        for line in said:
            self.show(line)

    def _write(self, profiler: torch.profiler.profile, names: set[str]) -> list[str]:
        """Write the trace and what it says; what to show of it."""
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
        written = {
            "device": str(self.device),
            "steps": self.steps,
            "phases": [asdict(row) for row in device or host],
            "host": [asdict(row) for row in host],
        }
        text = json.dumps(written, indent=2) + "\n"
        path = self.folder / "profile.json"
        write_atomically(path, lambda file: file.write(text.encode()))
        return [table(host, device, self.steps, self.cold), f"trace   {trace}"]


class _Segment(NamedTuple):
    """A stretch of the training thread's time in one range and in none inside it."""

    begin: float  # microseconds
    end: float
    name: str


def where_time_goes(
    events: Iterable[dict[str, Any]], names: Iterable[str]
) -> tuple[list[Row], list[Row]]:
    """Rows of the host's wall time and of the device's, from a trace's events; no rows for a device
    that there is not.

    The host's time is that of the thread which trains: each stretch counts for the innermost of the
    named ranges, else as "other". The device's work counts for the range in which the host launched
    it, whatever the thread: backward passes launch from one of autograd's own. Work that overlaps
    on several streams is shared out evenly; where nothing ran, the device was idle.

    Args:
        events: Chrome trace events, as torch.profiler writes them.
        names: the ranges to tell apart.
    """
    events = [event for event in events if event.get("ph") == "X"]
    known = set(names)
    annotations = [event for event in events if event.get("cat") == "user_annotation"]
    steps = [event for event in annotations if event["name"].startswith(_STEP)]
    thread = {(event["pid"], event["tid"]) for event in steps}
    inside = [event for event in annotations if event["name"] in known]
    spans = [
        _Segment(event["ts"], event["ts"] + event["dur"], name)
        for event, name in [(e, OTHER) for e in steps] + [(e, e["name"]) for e in inside]
        if (event["pid"], event["tid"]) in thread
    ]
    segments = _innermost(spans)
    count = max(len(steps), 1)
    host: dict[str, float] = {}
    for segment in segments:
        host[segment.name] = host.get(segment.name, 0.0) + segment.end - segment.begin

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
    return _rows(host, host, count), _rows(_shared_out(work), host, count)


def _innermost(spans: Sequence[_Segment]) -> list[_Segment]:
    """Nested spans as consecutive segments, each with the name of the innermost span there."""
    segments: list[_Segment] = []
    open_spans: list[_Segment] = []
    now = 0.0

    def advance(to: float) -> None:
        nonlocal now
        if open_spans and to > now:
            segments.append(_Segment(now, to, open_spans[-1].name))
        now = to

    for span in sorted(spans, key=lambda span: (span.begin, -span.end)):
        while open_spans and open_spans[-1].end <= span.begin:
            advance(open_spans[-1].end)
            open_spans.pop()
        advance(span.begin)
        open_spans.append(span)
    while open_spans:
        advance(open_spans[-1].end)
        open_spans.pop()
    return segments


def _shared_out(work: Sequence[_Segment]) -> dict[str, float]:
    """Microseconds by name from the first work's begin to the last one's end; gaps idle."""
    edges = sorted(
        [(segment.begin, 1, segment.name) for segment in work]
        + [(segment.end, -1, segment.name) for segment in work]
    )
    totals: dict[str, float] = {}
    running: dict[str, int] = {}
    for (moment, change, name), (following, _, _) in pairwise(edges):
        running[name] = running.get(name, 0) + change
        at_once = sum(running.values())
        for each, number in running.items():
            if number:
                totals[each] = totals.get(each, 0.0) + (following - moment) * number / at_once
        if not at_once and following > moment:
            totals[IDLE] = totals.get(IDLE, 0.0) + following - moment
    return totals


def _rows(microseconds: dict[str, float], order: Iterable[str], steps: int) -> list[Row]:
    """Rows in the order in which the ranges first came; what has no name of its own comes last."""
    whole = sum(microseconds.values())
    context = {name: rank for rank, name in enumerate(order)} | {OTHER: 10**6, IDLE: 10**6 + 1}
    return [
        Row(name, microseconds[name] / whole, microseconds[name] / 1000 / steps)
        for name in sorted(microseconds, key=context.__getitem__)
    ]


def table(host: Sequence[Row], device: Sequence[Row], steps: int, cold: bool) -> str:
    """The rows as text: the device's time where there is a device, and the host's beside it."""
    rows = device or host
    waits = {row.name: row.milliseconds for row in host}
    names = [row.name for row in rows] + [n for n in waits if n not in {r.name for r in rows}]
    by_name = {row.name: row for row in rows}
    width = max(map(len, [*names, "where a step's time went"]))
    head = f"{'where a step’s time went':{width}}  share   ms a step"
    lines = [head + ("   ms of the host" if device else "")]
    for name in names:
        row = by_name.get(name, Row(name, 0.0, 0.0))
        line = f"{name:{width}}  {100 * row.share:5.1f}%  {row.milliseconds:9.2f}"
        if device:
            line += f"  {waits[name]:15.2f}" if name in waits else f"  {'':15}"
        lines.append(line.rstrip())
    what = "device's time by the range that launched it" if device else "wall time"
    text = f"({what}, mean of {steps} step{'s' * (steps != 1)}"
    lines.append(text + ("; first steps, so compilation and warm-up are in it)" if cold else ")"))
    return "\n".join(lines)
